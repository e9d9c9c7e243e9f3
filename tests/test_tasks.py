"""Tasks: the user's own data from the command line to the result, and what the result says about them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import common
from kdjax import results

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def photos(tmp_path):
    """Sixty photos of different sizes, some upright by their EXIF alone, with what lies about in such folders."""
    rng = np.random.default_rng(0)
    for name in ("cat", "sea lion"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(30):
            exif = Image.Exif()
            exif[0x0112] = rng.integers(1, 9)
            pixels = rng.integers(0, 256, (*rng.integers(8, 20, 2), 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg", exif=exif)
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "photos" / "cat" / "Thumbs.db").write_bytes(b"x")
    return tmp_path / "photos"


def test_photos_of_different_sizes_go_from_the_command_line_to_a_result(photos, tmp_path):
    command = ("experiments.distill", "--smoke", f"--dataset=folder:{photos}", "--batch_size=8")
    command += ("--teacher_num_train=0", f"--workdir={tmp_path / 'run'}")
    code, _, errors = run(*command, "--image_size=8,8")
    assert code == 2
    assert "--skip_broken" in errors
    code, _, errors = run(*command, "--image_size=8,8", "--skip_broken")
    assert code == 0, errors
    found = results.read(tmp_path / "run" / "results.json")
    assert found["class_names"] == ["cat", "sea lion"]
    assert found["flags"]["image_size"] == ["8", "8"]
    assert any("left out as broken: 1 of 61, cat/broken.jpg (" in note for note in found["notes"])
    assert any(note.endswith("not those of images: 1, cat/Thumbs.db.") for note in found["notes"])
    for note in found["notes"]:
        assert errors.count(note) == 1  # although teacher and students each make a task
    assert "sea lion" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.once
@pytest.mark.parametrize("experiment", ["ig_cifar10", "sprkd_malaria"])
def test_every_launcher_takes_the_flags_of_photos(experiment, tmp_path):
    data = (f"--dataset=folder:{tmp_path}", f"--workdir={tmp_path / 'run'}", "--skip_broken")
    code, _, errors = run(f"experiments.{experiment}", *data, "--image_size=32")
    assert (code, errors) == (
        2,
        "error: --image_size=32 must be HEIGHT,WIDTH in pixels, as in --image_size=32,32.\n",
    )


@pytest.mark.parametrize("sides", [["32"], ["32", "0"], ["32", "-1"], ["32", "x"], ["1", "2", "3"], []])
def test_image_sizes_that_are_none_are_refused(sides):
    with pytest.raises(ValueError, match=r"--image_size=.* must be HEIGHT,WIDTH"):
        common.make_task("digits", data_dir=None, image_size=sides)


def test_notes_of_a_task_count_what_its_own_examples_hide(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
    labels = np.array([3, 8])[np.arange(40) % 2]
    np.savez(
        tmp_path / "x.npz",
        images=images,
        labels=labels,
        test_images=images[:4],
        test_labels=np.array([3, 3, 3, 3]),
    )
    task = common.make_task(str(tmp_path / "x.npz"), data_dir=None, devices=1, label_noise=0.5)
    assert task.source.class_names == ("3", "8")
    assert task.notes == (
        f"The labels of {tmp_path / 'x.npz'} are 3, 8: they are numbered 0 to 1, and their own numbers are the "
        "names of the classes.",
        "Classes without a test image: 1 of 2, 8.",
        "Images of test that are also in train, pixel for pixel: 4 of 4.",
        "Images that occur with more than one label: 2.",
    )
    common.make_task(str(tmp_path / "x.npz"), data_dir=None, devices=1)
    assert capsys.readouterr().err == "".join(f"note: {note}\n" for note in task.notes)


def test_an_array_file_called_as_a_set_of_patients_has_none(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8)
    np.savez(tmp_path / "malaria.npz", images=images, labels=np.arange(60) % 2)
    assert len(common.make_task(str(tmp_path / "malaria.npz"), data_dir=None, devices=1).source.labels) == 60
