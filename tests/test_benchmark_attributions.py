"""The benchmark of attributions: what it refuses, how it judges maps, and one tiny run."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.benchmarks import attribution_metrics, attributions_baselines, timing
from kdjax import data, results
from kdjax.teacher import Explanations

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmark(alone):
    with alone("experiments.benchmarks.attributions") as found:
        yield found


def test_relative_residual_is_of_the_sum_and_of_each_image():
    values = np.zeros((3, 2, 2, 1), np.float32)
    values[0, 0, 0], values[1, 1], values[2, 0, 1] = 1.5, 1.0, -1.0
    found = attribution_metrics.relative_residuals(values, np.array([1.0, 2.0, 0.5]))
    np.testing.assert_allclose(found, [0.5, 0.0, 3.0])


def test_map_error_is_of_signed_values_and_of_each_image():
    reference = np.array([3.0, -4.0, 0.0, 2.0]).reshape(2, 1, 2, 1)
    values = np.array([-3.0, -4.0, 1.0, 2.0]).reshape(2, 1, 2, 1)
    np.testing.assert_allclose(attribution_metrics.map_errors(values, reference), [6 / 5, 1 / 2])


def test_a_bound_is_reached_by_nine_images_of_ten():
    residuals = np.array([0.01] * 9 + [5.0] + [0.01])  # numpy's quantile lies on the second largest of 11
    assert attribution_metrics.reaches(residuals, 0.05)
    residuals[0] = 0.06
    assert not attribution_metrics.reaches(residuals, 0.05)
    nodes = {64: np.full(11, 0.01), 16: np.full(11, 0.2), 32: residuals}
    assert attribution_metrics.fewest(nodes, 0.05) == 64
    assert attribution_metrics.fewest(nodes, 0.06) == 32
    assert attribution_metrics.fewest(nodes, 0.001) is None


def test_uniform_nodes_of_a_bound_and_of_a_map_error():
    def quality(residual, error):
        return attribution_metrics.Quality(np.full(4, residual), np.full(4, error))

    uniform = {16: quality(0.2, 0.1), 32: quality(0.01, 0.08), 64: quality(0.01, 0.02)}
    assert attribution_metrics.uniform_nodes(uniform, 0.05, quality(0.05, 0.03)) == (32, 64)
    assert attribution_metrics.uniform_nodes(uniform, 0.05, quality(0.05, 0.01)) == (32, None)
    assert attribution_metrics.uniform_nodes(uniform, 0.005, quality(0.005, 0.5)) == (None, 16)


@pytest.mark.parametrize("fewest", [2, 20, 32, 33, 40, 64, 65, 100])
def test_the_fewest_nodes_are_found_on_both_sides_of_the_scan(benchmark, fewest):
    assert benchmark.fewest_nodes(lambda nodes: nodes >= fewest, 100) == fewest
    assert benchmark.fewest_nodes(lambda nodes: nodes >= fewest, fewest - 1) is None
    # A number that passes among others that do not is found too, if it is small.
    assert benchmark.fewest_nodes(lambda nodes: nodes == 7 or nodes >= fewest, 100) == min(fewest, 7)


def test_captum_is_given_the_better_of_its_rules(benchmark, monkeypatch):
    """The error of these maps is .99 / nodes by midpoints, 1.19 / nodes by the default rule."""
    size = benchmark.Sizes("digits", 8, 1, 4, 6, (4,), 64, 128, 0, 2)
    start = {"gauss_legendre": 1.19, "midpoint": 0.99, "trapezoid": 3.0}

    def explain(worker, folder, *, nodes, rule, chunk=None):
        if nodes != size.reference:
            asked.add((worker, rule, chunk))
        values = np.full((4, 1, 1, 1), 1 if nodes == size.reference else 1 + start[rule] / nodes)
        return benchmark.Explained(values, [nodes] * 4, 0.0)

    asked: set[tuple] = set()
    monkeypatch.setattr(benchmark, "explain", explain)
    adaptive = benchmark.Explained(np.full((4, 1, 1, 1), 1.0295), [17] * 4, 0.0)
    fixed = {"kdjax": ("ours", {}), "captum by 1": ("captum", {})}
    begun = benchmark.Begun(
        "n", {"kdjax": np.ones(4)}, fixed, {}, {"kdjax adaptive 0.05": adaptive}, left_out=None
    )
    _, (row,) = benchmark.assess(begun, size, 1, [0.05], None)
    assert row["by_rule"]["uniform_nodes"] == {"gauss_legendre": 24, "midpoint": 20}
    assert (row["uniform_nodes"], row["uniform_rule"]) == (20, "midpoint")
    assert row["uniform_nodes_of_equal_map_error"] == 34  # .99 / 34 < .0295 < .99 / 33
    assert row["uniform"]["map_error_median"] == pytest.approx(0.99 / 20)
    assert {("captum", "midpoint", 1), ("captum", "gauss_legendre", 1)} < asked
    (said, same, *_) = benchmark.remarks([row | {"threads": 1}], {}, size)
    assert said == "n: captum's fewest nodes for residual ≤ 0.05: 24 by gausslegendre, 20 by riemann_middle."
    assert "the map error as at residual ≤ 0.05: 41 by gausslegendre, 34 by" in same
    _, (row,) = benchmark.assess(begun, size._replace(most=16), 1, [0.05], None)
    assert (row["uniform_nodes"], row["uniform_rule"]) == (None, None)
    assert "over 16 by riemann_middle" in benchmark.remarks([row], {}, size._replace(most=16))[0]


def test_other_scores_or_maps_are_refused():
    rng = np.random.default_rng(0)
    values, scores = rng.standard_normal((2, 4, 4, 3)), np.array([1.0, -2.0])
    maps = {"kdjax": values, "torch": values * 1.001}
    found = attribution_metrics.check_equal("n", maps, {"kdjax": scores, "torch": scores + 1e-4})
    assert found == pytest.approx(0.001)
    with pytest.raises(ValueError, match="n: torch has scores that are"):
        attribution_metrics.check_equal("n", maps, {"kdjax": scores, "torch": scores + 0.1})
    with pytest.raises(ValueError, match=r"n: a map of captum is 0\.5 of its size away from that of kdjax"):
        attribution_metrics.check_equal("n", maps | {"captum": values * 1.5}, {"kdjax": scores})
    with pytest.raises(ValueError, match="a map of captum is nan"):
        attribution_metrics.check_equal("n", maps | {"captum": values * np.nan}, {"kdjax": scores})


def test_goals_and_ratios_are_judged_round_by_round():
    def arm(*ms):
        return {"ms": list(ms), "cpu_ms": [2 * x for x in ms]}

    found = {
        "best": 5,
        "fixed": {
            "kdjax gradients": arm(9, 10),
            "kdjax": arm(10, 10),
            "captum default": arm(21, 25),
            "captum by 1": arm(15, 15),
            "captum by 5": arm(9, 10),
        },
        "equal": {"kdjax adaptive 0.1": arm(5, 4), "captum, 16 nodes": arm(10, 12)},
    }
    row = {"bound": 0.1, "uniform_nodes": 16, "uniform_nodes_of_equal_map_error": None}
    ratios, goals = attribution_metrics.judge(found, [row | {"adaptive": {"reached": True}}], "n", 2, 8)
    assert ratios["n: captum default"] == pytest.approx({"median": 2.3, "low": 2.1, "high": 2.5})
    assert ratios["n: residual ≤ 0.1, captum, 16 nodes"]["median"] == 2.5
    extrapolated = ratios["n: residual ≤ 0.1, captum default, 16 nodes extrapolated"]
    assert extrapolated["low"] == pytest.approx(23 * 16 / 8 / 5)
    assert not any("map error" in name for name in ratios)
    met = {goal["goal"]: goal["met"] for goal in goals}
    assert met["n: 8 nodes ≥ 2× captum default"]
    assert not met["n: 8 nodes ≥ 1× captum's best chunk"]
    assert met["n: 8 nodes ≤ 1.1× 8 gradients"]
    # No equal residual where our own maps miss the bound.
    missed, _ = attribution_metrics.judge(found, [row | {"adaptive": {"reached": False}}], "n", 2, 8)
    assert not any("residual" in name for name in missed)


def test_captums_default_call_is_left_out_where_it_does_not_fit(benchmark, monkeypatch):
    def ask(job, *, options):
        assert options == {"nodes": 5, "chunk": 5}
        return {"peak_mib": 100.0}

    worker = SimpleNamespace(ask=ask)
    monkeypatch.setattr(benchmark, "free_mib", lambda: 1300.0)
    assert benchmark.too_large(worker, {"nodes": 50, "chunk": 5}, 50, 5) is None
    monkeypatch.setattr(benchmark, "free_mib", lambda: 1200.0)
    said = benchmark.too_large(worker, {"nodes": 50, "chunk": 5}, 50, 5)
    assert "would hold about 1,000 MiB, and 1,200 are free. Fewer --images fit." in said
    monkeypatch.setattr(benchmark, "free_mib", lambda: None)
    assert benchmark.too_large(worker, {"nodes": 50, "chunk": 5}, 50, 5) is None


def test_the_rate_of_caching_is_that_of_more_images(benchmark, monkeypatch):
    clock, asked = [0.0], []

    def explain(network, dataset, *, directory):
        asked.append(len(dataset.splits["train"]))
        clock[0] += 3.0 + asked[-1] / 100  # 3 seconds for what every call begins with
        none = np.zeros(asked[-1], np.float32)
        return Explanations({}, none.astype(int) + 17, none)

    monkeypatch.setattr(benchmark.teacher, "explain", explain)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    dataset = data.from_arrays(np.zeros((2, 4, 4), np.uint8), np.arange(2))
    dataset = dataset._replace(splits={"train": np.arange(2000)})
    network = SimpleNamespace(network=SimpleNamespace(name="n"))
    found = benchmark.caching(dataset, network, 3 * benchmark.ROWS)
    assert asked == [benchmark.ROWS, 3 * benchmark.ROWS, benchmark.ROWS]
    assert found["images_per_second"] == pytest.approx(100)
    assert found["hours_of_50000_extrapolated"] == pytest.approx(500 / 3600)


def test_a_network_is_read_back_as_it_was_written(tmp_path):
    images = np.ones((2, 4, 4, 3), np.float32)
    weights = {"params/Dense_0/kernel": np.eye(3, 5), "params/Dense_0/bias": np.arange(5.0)}
    problem = attributions_baselines.Problem("resnet8", images, np.array([1, 0]), weights)
    attributions_baselines.write(tmp_path / "w.npz", {"resnet8": problem, "other": problem})
    found = attributions_baselines.read(tmp_path / "w.npz", "resnet8")
    assert found.num_classes == 5
    assert found.weights.keys() == weights.keys()
    np.testing.assert_array_equal(found.images, images)
    assert attributions_baselines.stage_and_block("stage2_block13") == (2, 13)


@pytest.mark.parametrize(
    ("wanted", "counts"), [(["1"], [1]), ([], list(range(1, 1 + min(2, len(timing.cores())))))]
)
def test_threads_of_the_machine(wanted, counts):
    assert timing.thread_counts(wanted, smoke=False) == counts
    assert timing.thread_counts(wanted, smoke=True) == [1]
    with pytest.raises(ValueError, match="--threads=1000 needs numbers from 1 to"):
        timing.thread_counts(["1000"], smoke=False)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"NETWORKS": ["wrn_16_2"]},
            "--networks=wrn_16_2 is none of mobilenet_v2,",
        ),
        ({"PEERS": ["innvestigate"]}, "--peers=innvestigate is none of captum, torch."),
        ({"DATASET": "digits"}, "write --smoke, or --dataset=cifar10 --data_dir=data."),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(benchmark, monkeypatch, flags, said):
    fine = {"NETWORKS": ["resnet8"], "PEERS": ["captum"], "DATASET": "cifar10", "SMOKE": False}
    for name, value in (fine | flags).items():
        monkeypatch.setattr(benchmark, name, SimpleNamespace(value=value))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        benchmark.check_flags()
    assert said in str(caught.value)


def test_list_flags_are_rising_numbers(benchmark):
    assert benchmark.numbers(SimpleNamespace(name="chunks", value=["5", "1", "5"]), int) == [1, 5]
    for wrong in (["0", "1"], ["a"], []):
        with pytest.raises(
            ValueError, match=r"--bounds=.* needs numbers above 0, such as --bounds=0\.1,0\.05\."
        ):
            benchmark.numbers(SimpleNamespace(name="bounds", value=wrong), float)


@pytest.mark.once
def test_smoke_names_what_is_missing_and_measures_the_rest(tmp_path):
    # A package that cannot be imported, in place of PyTorch if that is installed.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('no torch here')")
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    output = tmp_path / "attributions.json"
    command = ("--smoke", "--networks=resnet8", "--threads=1", "--bounds=0.1", "--fill_images=0")
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "experiments.benchmarks.attributions", *command, f"--output={output}"),
            *(f"--workdir={tmp_path / 'work'}", f"--torch_python={wrapper}"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = results.read(output)
    assert found["absent"] == {"captum": "no torch here", "torch": "no torch here"}
    where = "resnet8, 1 thread"
    assert {f"{where}: kdjax", f"{where}: kdjax gradients", f"{where}: kdjax adaptive 0.1"} == found[
        "arms"
    ].keys()
    assert found["first_calls_s"][where].keys() == {"kdjax", "kdjax adaptive 0.1"}
    (row,) = found["equal"]
    assert row["adaptive"]["ms_per_map"] > 0
    assert row["adaptive"]["nodes_mean"] >= 17
    (sweep,) = found["swept"]
    errors = sweep["arms"]["resnet8: midpoint"]["map_error_median"]
    assert errors[0][0] > errors[-1][0]  # fewer nodes are further from the integral
