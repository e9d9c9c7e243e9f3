"""The benchmark of curvature: what it refuses, what it counts, and one tiny run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import curvature_baselines
from kdjax import results

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def curvature(alone):
    with alone("experiments.benchmarks.curvature") as benchmark:
        yield benchmark


def test_the_networks_have_the_parameters_of_the_study(curvature):
    found = curvature.make_networks(smoke=False)
    assert curvature.size(found["mlp"]) == 178_110
    assert curvature.size(found["cnn"]) == 188_810
    growing = [curvature.size(network) for name, network in found.items() if name.isdigit()]
    np.testing.assert_allclose(growing, curvature.PARAMETERS, rtol=0.02)


def test_a_network_is_read_back_as_it_was_drawn(curvature, tmp_path):
    networks = curvature.make_networks(smoke=True)
    curvature.write(tmp_path / "w.npz", networks)
    problem = curvature_baselines.read(tmp_path / "w.npz", "cnn")
    assert problem.convolutional
    assert problem.size == curvature.size(networks["cnn"])
    np.testing.assert_array_equal(problem.layers[-1][0], networks["cnn"]["kernel3"])


def test_another_loss_or_spectrum_is_refused(curvature):
    same = {"a": [-1.0, 0.0, 2.0], "b": [-1.0, 0.5, 2.001]}
    assert curvature.check_equal("n", {"a": 1.0, "b": 1.00001}, same) == pytest.approx(0.0005)
    with pytest.raises(ValueError, match="b has the loss"):
        curvature.check_equal("n", {"a": 1.0, "b": 1.01}, same)
    with pytest.raises(ValueError, match="b finds eigenvalues"):
        curvature.check_equal("n", {"a": 1.0}, same | {"b": [-0.9, 2.0]})


def test_ghosts_are_values_on_their_neighbour(curvature):
    assert curvature.ghosts([3.0, -1.0, 3.0 + 1e-7, 2.0]) == 1
    assert curvature.ghosts([3.0, 2.999, 1.0]) == 0


@pytest.mark.once
def test_smoke_names_what_is_missing_and_measures_the_rest(tmp_path):
    lacking = (
        tmp_path / "torch"
    )  # a package that cannot be imported, in place of PyTorch if that is installed
    lacking.mkdir()
    (lacking / "__init__.py").write_text("raise ImportError('no torch here')")
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    command = ("--smoke", "--networks=mlp", "--peers=torch,matfree", "--threads=1", "--noscaling")
    output = tmp_path / "curvature.json"
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "experiments.benchmarks.curvature", *command, f"--output={output}"),
            f"--torch_python={wrapper}",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = results.read(output)
    assert found["absent"] == {"torch": "no torch here"}
    assert {"mlp, 1 thread: matfree", "mlp, 1 thread: matfree first call"} <= found["ratios"].keys()
    assert {"mlp, 1 thread: kdjax host", "mlp, 1 thread: kdjax cold"} <= found["arms"].keys()
    assert any("no ghosts" in goal["goal"] and goal["met"] for goal in found["goals"])
