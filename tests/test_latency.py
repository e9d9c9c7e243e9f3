"""Latency of single images: measured in processes of their own, compared as ratios."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kdjax import models, results


@pytest.fixture(scope="module")
def latency(alone):
    with alone("experiments.latency") as module:
        yield module


@pytest.mark.once
def test_smoke_measures_every_runtime_that_is_installed(latency, start, tmp_path, capsys):
    output = tmp_path / "latency.json"
    found = start(
        latency, "--smoke", "--runtimes=jax,litert,litert_int8", "--threads=1", f"--output={output}"
    )
    assert results.read(output) == found
    assert set(found["arms"]) == {
        f"digits_student, {name}, 1 thread" for name in ("jax", "litert", "litert_int8")
    }
    for metrics in found["arms"].values():
        assert 0 < metrics["latency_ms"][0] <= metrics["p95_ms"][0] < metrics["load_ms"][0]
        assert metrics["images"][0] >= 17
        assert (metrics["parameters"], metrics["multiply_adds"]) == ([1626], [8192])
    peaks = [found["arms"][f"digits_student, {name}, 1 thread"]["peak_mib"][0] for name in ("jax", "litert")]
    assert 10 < peaks[1] < 0.6 * peaks[0], "a phone's runtime does not bring JAX along"
    sizes = [
        found["arms"][f"digits_student, {name}, 1 thread"]["file_kb"][0] for name in ("litert", "litert_int8")
    ]
    assert sizes[1] < sizes[0]
    ratio = found["ratios"]["digits_student, 1 thread: jax over litert"]["median"]
    times = [
        found["arms"][f"digits_student, {name}, 1 thread"]["latency_ms"][0] for name in ("jax", "litert")
    ]
    assert ratio == times[0] / times[1]
    assert "litert over litert_int8 ≥ 2" in capsys.readouterr().out


def test_ratios_are_taken_process_by_process(latency):
    arms = {
        f"net, {name}, 2 threads": {"latency_ms": values}
        for name, values in {"jax": [4.0, 9.0], "litert": [2.0, 3.0]}.items()
    }
    found = latency.compared(arms, ["net"], ["jax", "litert"], [2])
    assert found == {"net, 2 threads: jax over litert": {"median": 2.5, "low": 2.0, "high": 3.0}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runtimes=tensorrt"], "--runtimes=tensorrt is not known; there are jax, litert"),
        (["--threads=99"], "--threads=99 needs numbers from 1 to"),
        (["--networks=resnet9"], "there is no model 'resnet9'"),
        (["--bundles=nowhere"], "nowhere is no bundle"),
    ],
)
def test_bad_input_is_one_sentence(latency, start, tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        start(latency, f"--output={tmp_path / 'latency.json'}", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_contender_that_fails_is_named(latency, tmp_path):
    (tmp_path / "student.tflite").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"net, litert, 1 thread failed: ValueError"):
        latency.measured(latency.Contender("net", "litert", 1), tmp_path, 0.1)


def test_onnx_is_left_out_where_it_is_not_installed(latency, start, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(latency.importlib.util, "find_spec", lambda name: None)
    start_flags = ["--runtimes=jax,onnx", "--networks=resnet9", f"--output={tmp_path / 'x.json'}"]
    with pytest.raises(ValueError, match="resnet9"):
        start(latency, *start_flags)
    assert "onnx is left out: jax2onnx and onnxruntime not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shape", "millions"),
    # He et al. and Sandler et al. count 41 and 300 for ImageNet's and CIFAR's sizes; others by hand
    [
        ("resnet20", (32, 32, 3), 40.8),
        ("digits_student", (8, 8, 1), 0.008192),
        ("resnet8", (32, 32, 3), 12.5),
    ],
)
def test_multiply_adds_are_those_of_the_literature(name, shape, millions):
    network = models.from_linen(models.build(name, num_classes=10), shape)
    np.testing.assert_allclose(network.multiply_adds / 1e6, millions, rtol=2e-3)


def test_multiply_adds_by_hand():
    network = models.from_linen(models.build("mlp", num_classes=7, widths=(5, 3)), (2, 2, 1))
    assert network.multiply_adds == 4 * 5 + 5 * 3 + 3 * 7
    depthwise = models.from_linen(models.build("mobilenet_v2_w25", num_classes=10, removed=17), (8, 8, 3))
    whole = models.from_linen(models.build("mobilenet_v2_w25", num_classes=10, removed=15), (8, 8, 3))
    assert depthwise.multiply_adds < whole.multiply_adds


def test_the_worker_prints_one_line_of_json(tmp_path, latency):
    from kdjax import export
    from kdjax.export import litert

    network = models.from_linen(models.build("mlp", num_classes=3, widths=(4,)), (2, 2, 1))
    params, state = network.init(0)
    student = latency.Untrained(
        network, latency.Weights(params, state), latency.Normalisation((0.5,), (0.2,))
    )
    path = tmp_path / "net.tflite"
    path.write_bytes(litert.convert(export.Source(export.function_of(student), (2, 2, 1), 1)))
    module = "experiments.benchmarks.latency_contender"
    done = subprocess.run(
        [sys.executable, "-m", module, "litert", str(path), "1", "0.01"],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert json.loads(line).keys() == {"load_ms", "cold_ms", "peak_mib", "warm_ms"}
