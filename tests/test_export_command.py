"""From a finished run to files and back to predictions, from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdjax import data, export

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments):
    """Exit code, output and errors of an experiment in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory, alone, start):
    """The workdir of a smoke run on an .npz of colour images."""
    folder = tmp_path_factory.mktemp("mine")
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 3
    images = rng.integers(0, 100, (400, 16, 16, 3), np.uint8)
    images[np.arange(400), :, :, labels] += 100  # each class has its colour
    np.savez(folder / "mine.npz", images=images, labels=np.array(["red", "green", "blue"])[labels])
    with alone("experiments.distill") as distill:
        start(
            distill,
            *(
                "--smoke",
                f"--dataset={folder / 'mine.npz'}",
                "--teacher=resnet8_w25",
                "--student=resnet8_w25",
            ),
            *("--arms=scratch", "--seeds=0", "--batch_size=16", f"--workdir={folder / 'run'}"),
        )
    return folder


@pytest.fixture(scope="module")
def exporting(alone):
    with alone("experiments.export") as module:
        yield module


@pytest.mark.once
def test_a_run_becomes_a_bundle_that_names_the_class_of_a_photo(finished):
    bundle = finished / "student"
    code, output, errors = command(
        "experiments.export", f"--run={finished / 'run/scratch/0'}", f"--output={bundle}", "--max_drop=1"
    )
    assert code == 0, errors
    assert [line.partition(":")[0] for line in output.splitlines()] == ["stablehlo", "litert", "litert_int8"]
    said = export.load(bundle).description
    assert said["class_names"] == ["blue", "green", "red"]
    assert said["data"]["name"] == "mine.npz"
    assert said["metrics"]["n"] == said["data"]["splits"]["test"] > 0
    trained = said["provenance"]["trained"]
    assert (trained["arm"], trained["seed"], trained["network"]["class"]) == ("scratch", 0, "ResNet")
    assert said["provenance"]["launch"]["student"] == "resnet8_w25"
    photo = finished / "a photo.png"
    Image.fromarray(np.full((60, 40, 3), (20, 20, 200), np.uint8)).save(photo)
    code, output, errors = command("experiments.predict", f"--bundle={bundle}", "--top=1", photo, photo)
    assert code == 0, errors
    (row,) = export.predict(export.load(bundle), [photo])
    name = ("blue", "green", "red")[row.argmax()]
    assert output == f"{photo}: {name} {row.max():.1%}\n" * 2
    code, _, errors = command("experiments.predict", f"--bundle={bundle}", finished / "mine.npz")
    assert (code, errors.count("\n")) == (2, 1)
    assert "mine.npz: no image that Pillow knows" in errors


def test_the_data_set_of_the_run_is_found_by_its_record(finished, exporting, start, tmp_path):
    options = (f"--run={finished / 'run/teacher/0'}", f"--output={tmp_path / 'student'}", "--formats=")
    bundle = start(exporting, *options)
    dataset = data.load(str(finished / "mine.npz"))
    assert export.predict(bundle, dataset.images[:4]).shape == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run={run}/scratch/1"], "scratch/1 holds no finished network"),
        (["--dataset=digits"], r"--dataset=digits is not the data set of .*class_names"),
        (
            ["--formats=pytorch"],
            "formats=pytorch is not known; there are stablehlo, litert, litert_int8, onnx",
        ),
        (["--formats=litert", "--batch=8"], "batch_size=8: a file of litert takes one image"),
        (["--output={run}"], "holds something that is no bundle; name a new directory"),
        (["--network=nowhere.py:build"], "there is no file nowhere.py"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(finished, exporting, start, tmp_path, arguments, said):
    run, output = finished / "run", tmp_path / "student"
    given = [argument.format(run=run) for argument in arguments]
    before = sorted(finished.rglob("*"))
    with pytest.raises(ValueError, match=said):
        start(exporting, f"--run={run / 'scratch/0'}", f"--output={output}", *given)
    assert sorted(finished.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(finished, exporting, start, tmp_path):
    unfinished = tmp_path / "run" / "kd" / "0"
    unfinished.mkdir(parents=True)
    (unfinished / "network.json").write_text(json.dumps({"body": {}}))
    with pytest.raises(ValueError, match=r"network.json is damaged.*Start the run that trained it again"):
        start(exporting, f"--run={unfinished}", f"--output={tmp_path / 'student'}")
