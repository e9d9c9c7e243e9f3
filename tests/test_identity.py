"""What a run reads back is whole and its own; anything else is named, and refused or computed again."""

import functools
import os
import shutil
import signal
import warnings

import numpy as np
import pytest

from experiments import cli, distill
from kdjax import checkpoints, files, interrupts, models, report, results, train
from kdjax.models.mlp import Mlp

pytestmark = pytest.mark.once


def write_npz(path, *, seed=0, examples=90):
    rng = np.random.default_rng(seed)
    labels = np.arange(examples) % 3
    images = rng.integers(0, 120, (examples, 4, 4, 1)) + (60 * labels)[:, None, None, None]
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="module")
def distilled(start):
    """``distilled(workdir, npz, *flags)``: the arms' numbers of a small distillation, and what was warned of."""

    def distilled(workdir, npz, *more):
        small = (
            f"--dataset={npz}",
            f"--workdir={workdir}",
            "--student=narrow",
            "--epochs=1",
            "--batch_size=16",
        )
        teacher = () if any("--teacher_dir" in str(flag) for flag in more) else ("--teacher=wide",)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            for name, width in (("wide", 16), ("narrow", 8)):
                patch.setitem(models.MODELS, name, functools.partial(Mlp, widths=(width,)))
            for name in ("page", "save_figure"):  # what is drawn is not read back, and takes half of the time
                patch.setattr(report, name, lambda *_, **__: None)
            warnings.simplefilter("always")
            arms = start(distill, *small, *teacher, "--seeds=0,1", *more)["arms"]
        return arms, [str(warning.message) for warning in caught]

    return distilled


@pytest.fixture(scope="module")
def finished(distilled, tmp_path_factory):
    """A finished run with everything that is read back, its data, and its numbers."""
    home = tmp_path_factory.mktemp("finished")
    npz = write_npz(home / "data.npz")
    arms, _ = distilled(home / "run", npz, "--robustness")
    return home / "run", npz, arms


@pytest.fixture
def copied(finished, tmp_path):
    workdir, npz, arms = finished
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run", npz, arms


class TestWorkdir:
    def test_changed_data_are_refused_and_the_advice_leads_to_their_own_numbers(self, distilled, tmp_path):
        npz, run = write_npz(tmp_path / "data.npz"), tmp_path / "run"
        first, _ = distilled(run, npz, "--arms=kd")
        write_npz(npz, seed=1, examples=96)
        said = r"data\.content '.*data\.train \d+ there and \d+ here.*; name another directory, or delete that one"
        with pytest.raises(ValueError, match=said):
            distilled(run, npz, "--arms=kd")
        elsewhere, _ = distilled(tmp_path / "another", npz, "--arms=kd")
        shutil.rmtree(run)
        again, _ = distilled(run, npz, "--arms=kd")
        assert again == elsewhere != first

    def test_a_teacher_with_other_weights_is_another_run(self, finished, distilled, tmp_path):
        workdir, npz, _ = finished
        shutil.copytree(workdir / "teacher" / "0", tmp_path / "teacher")
        asked = (f"--teacher_dir={tmp_path / 'teacher'}", "--arms=kd", "--teacher_mode=online")
        distilled(tmp_path / "run", npz, *asked)
        shutil.rmtree(tmp_path / "teacher")
        shutil.copytree(workdir / "kd" / "0", tmp_path / "teacher")  # a student can be a teacher too
        with pytest.raises(ValueError, match="teacher_weights"):
            distilled(tmp_path / "run", npz, *asked)

    def test_one_that_holds_no_work_gives_way_to_the_corrected_command(self, finished, distilled, tmp_path):
        _, npz, arms = finished
        run = tmp_path / "run"
        with pytest.raises(train.NonFiniteLoss, match=r"not finite"):
            distilled(run, npz, "--learning_rate=1e30", "--optimizer=sgd")
        assert (run / "run.json").exists()
        assert distilled(run, npz)[0] == arms
        said = r"holds another run \(learning_rate 0\.001 there and 0\.002 here\)"
        with pytest.raises(ValueError, match=said):
            distilled(run, npz, "--learning_rate=0.002")

    def test_a_kill_while_the_record_is_written_leaves_one_that_can_be_claimed(self, tmp_path):
        with cli.released():
            workdir = cli.claim_workdir(str(tmp_path / "run"), {"a": 1})
        (workdir / "run.json").rename(workdir / "run.json.tmp")
        with cli.released():
            cli.claim_workdir(str(workdir), {"a": 1})
        assert files.read_sealed(workdir / "run.json") == {"a": 1}


def flipped(path):
    """Another digit in place of one in the middle: JSON still, and plausible."""
    text = bytearray(path.read_bytes())
    at = [i for i, byte in enumerate(text) if chr(byte).isdigit()]
    at = at[len(at) // 2]
    text[at] = ord("0") + (text[at] - ord("0") + 3) % 10
    path.write_bytes(text)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def removed(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def of_another(path):
    """The same file, or folder, of the other seed."""
    other = {"0": "1", "1": "0"}[path.parent.name]
    removed(path)
    source = path.parent.parent / other / path.name
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)


RECORDS = ("kd/1/summary_test.json", "scratch/0/network.json", "robustness/kd/1.json")


class TestFiles:
    @pytest.mark.parametrize(
        ("harm", "names"),
        [
            (flipped, [*RECORDS, "run.json"]),
            (truncated, [*RECORDS, "run.json"]),
            (removed, [*RECORDS, "run.json", "scratch/0/weights", "teacher/0/weights"]),
            (of_another, ["kd/1/summary_test.json", "kd/0/network.json", "scratch/0/weights"]),
        ],
    )
    def test_what_is_damaged_missing_or_of_another_run_is_made_again(
        self, finished, copied, distilled, harm, names
    ):
        whole, (workdir, npz, arms) = finished[0], copied
        for name in names:
            harm(workdir / name)
        again, said = distilled(workdir, npz, "--robustness")
        assert again == arms
        read = {"run.json", "kd/1/summary_test.json", "robustness/kd/1.json"} & set(names)
        for name in read if harm is not removed else ():
            assert any(f"{workdir / name} " in message for message in said), name
        for name in names:
            if name.endswith(".json"):
                assert (workdir / name).read_bytes() == (whole / name).read_bytes()
        network = models.from_linen(Mlp(num_classes=3, widths=(8,)), (4, 4, 1))
        like = train.Weights(*network.init(0))
        found = (checkpoints.restore(home / "scratch/0/weights", like) for home in (workdir, whole))
        assert len({checkpoints.digest_tree(one.tree) for one in found}) == 1

    def test_a_robustness_file_of_the_same_name_is_computed_again(self, copied, distilled):
        workdir, npz, arms = copied
        before = results.read(workdir / "results.json")["robustness"]
        shutil.copy(workdir / "robustness/kd/0.json", workdir / "robustness/kd/1.json")
        again, said = distilled(workdir, npz, "--robustness")
        assert again == arms
        assert results.read(workdir / "results.json")["robustness"] == before
        assert any("robustness/kd/1.json was written by another run" in message for message in said)

    @pytest.mark.parametrize(
        ("target", "source"),
        [
            ("kd/1", "kd/0"),  # another seed
            ("teacher/0/checkpoints", "kd/0/checkpoints"),  # another arm
        ],
    )
    def test_a_folder_of_another_run_is_refused_and_the_advice_works(self, copied, distilled, target, source):
        workdir, npz, arms = copied
        shutil.rmtree(workdir / target)
        shutil.copytree(workdir / source, workdir / target)
        said = r"checkpoints.*was written by another run \(.* there and .* here"
        with pytest.raises(ValueError, match=said):
            distilled(workdir, npz, "--robustness")
        folder = workdir / target
        shutil.rmtree(folder if folder.name == "checkpoints" else folder / "checkpoints")
        assert distilled(workdir, npz, "--robustness")[0] == arms


def test_a_run_that_goes_on_on_other_devices_says_so_in_its_result(distilled, tmp_path, monkeypatch):
    npz, run = write_npz(tmp_path / "data.npz"), tmp_path / "run"
    asked = ("--arms=scratch", "--epochs=4", "--save_every_s=0")
    save = checkpoints.save

    def save_and_be_told_to_stop(*args, **options):
        save(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoints, "save", save_and_be_told_to_stop)
    with pytest.raises(interrupts.Stopped, match="143"):
        distilled(run, npz, *asked, "--devices=2")
    monkeypatch.undo()
    distilled(run, npz, *asked, "--devices=1")
    notes = results.read(run / "results.json")["notes"]
    (note,) = (note for note in notes if "not bitwise" in note)
    assert note.startswith("teacher, seed 0: the run was resumed by other means (devices 2 there and 1 here)")
