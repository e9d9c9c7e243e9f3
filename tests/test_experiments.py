"""Experiments as their users start them: from the command line, with good input and with bad."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optax
import pytest
from absl import flags

from experiments import common, distill
from experiments.common import launching
from kdjax import data, files, models, results, train

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *map(str, arguments)], env=environment, **pipes, **options)


def run(*arguments, **options):
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def flags_set(*arguments):
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS.flags_by_module_dict()["experiments.distill"]:
        name.unparse()
    flags.FLAGS(["distill", *map(str, arguments)])


def small_run(workdir, *more):
    return ("experiments.distill", "--smoke", "--batch_size=16", f"--workdir={workdir}", *more)


METHODS = "--method=scratch,kd,crd+hint"  # with maps, learnt heads and a memory


class TestDistill:
    def test_leaves_everything_and_is_read_back(self, tmp_path):
        code, output, errors = run(
            *small_run(tmp_path / "run", "--ema=0.9", "--padding=1", "--teacher_mode=views", METHODS)
        )
        assert code == 0, errors
        found = results.read(tmp_path / "run" / "results.json")
        assert set(found["arms"]) == {"teacher", "scratch", "kd", "crd+hint"}
        assert {"accuracy", "best_accuracy", "f1", "ece", "agreement"} <= found["arms"]["kd"].keys()
        assert found["seeds"] == [0, 1]
        assert found["flags"]["ema"] == 0.9
        for name in (
            "report.html",
            "figure.png",
            "teacher/0/network.json",
            "kd/1/summary_test.json",
            "columns/0/header.json",
        ):
            assert (tmp_path / "run" / name).stat().st_size > 0
        assert "kd" in output.splitlines()[-2]
        stored = np.load(next((tmp_path / "run" / "columns" / "0").glob("*.npz")))
        assert {"teacher_logits", "teacher_stage2", "teacher_embedding"} == set(stored.files)
        summary = tmp_path / "run" / "kd" / "1" / "summary_test.json"
        summary.write_text(summary.read_text().replace('"accuracy": 0.', '"accuracy": 0.9', 1))
        code, _, errors = run(
            *small_run(tmp_path / "run", "--ema=0.9", "--padding=1", "--teacher_mode=views", METHODS)
        )
        assert code == 0, errors
        assert f"{summary} is damaged" in errors
        assert results.read(tmp_path / "run" / "results.json")["arms"] == found["arms"]
        assert "robustness" not in found

        # Another command takes up the teacher; its answers are the same, so online kd sees the same teacher.
        teacher_dir = tmp_path / "run" / "teacher" / "0"
        online = ("--teacher_mode=online", "--mixup=0.5", "--method=kd", f"--teacher_dir={teacher_dir}")
        online += (
            "--robustness",
            "--dtype=bfloat16",
            "--optimizer=sgd",
            "--schedule=step",
            "--accumulate=2",
            "--flip",
        )
        code, _, errors = run(*small_run(tmp_path / "online", *online))
        assert code == 0, errors
        again = results.read(tmp_path / "online" / "results.json")
        there, here = (r["arms"]["teacher"]["accuracy"] for r in (found, again))
        assert here == pytest.approx(there, abs=0.02)  # bfloat16 here
        assert again["flags"]["teacher"] == "digits_teacher"  # as it was loaded
        assert again["flags"]["teacher_epochs"] is None
        assert again["robustness"]["teacher"]["clean"] == [pytest.approx(h) for h in here]

    @pytest.mark.once
    def test_killed_at_a_random_moment_it_ends_bitwise_equal(self, tmp_path):
        code, _, errors = run(*small_run(tmp_path / "whole", "--save_every_s=0"))
        assert code == 0, errors
        rng, began = np.random.default_rng(), time.monotonic()
        for _ in range(2):
            process = start(*small_run(tmp_path / "killed", "--save_every_s=0"))
            time.sleep(rng.uniform(1, 8))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        code, _, errors = run(*small_run(tmp_path / "killed", "--save_every_s=0"))
        assert code == 0, errors
        for summary in sorted((tmp_path / "whole").rglob("summary_*.json")):
            other = tmp_path / "killed" / summary.relative_to(tmp_path / "whole")
            assert json.loads(other.read_text()) == json.loads(summary.read_text()), time.monotonic() - began

    def test_one_sentence_and_exit_code_2(self, tmp_path):
        code, output, errors = run("experiments.distill", "--dataset=digitz", f"--workdir={tmp_path / 'x'}")
        assert code == 2
        assert output == ""
        assert errors.count("\n") == 1
        assert errors.startswith("error: ")
        assert "digits" in errors
        assert not (tmp_path / "x").exists()


@pytest.mark.once
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_training_it_says_what_is_kept_and_goes_on(tmp_path, number):
    command = small_run(tmp_path / "run", "--save_every_s=0", "--method=kd")
    process = start(*command[:1], *command[2:], "--epochs=5000")  # without --smoke
    end = time.monotonic() + 120
    while not [*(tmp_path / "run").rglob("checkpoints/*")]:
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (128 + number, "")
    assert errors.startswith("stopped by ")
    assert errors.endswith(" the same command continues.\n")
    assert errors.count("\n") == 1


def bad_npz(path, classes):
    images = np.zeros((60, 8, 8, 1), np.uint8)
    np.savez(path, images=images, labels=np.arange(60) % classes)
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset=digitz"], "digitz.*digits"),
        (["--student=resnet9"], "resnet9.*[Dd]id you mean"),
        (["--teacher=kears_teacher"], "kears_teacher.*keras_teacher"),
        (["--dataset=mnist", "--data_dir={tmp}/nowhere"], r"nowhere.*prepare_data"),
        (["--dataset={tmp}/missing.npz"], r"missing\.npz"),
        (["--batch_size=65"], "65 does not divide over 2 devices; use 64 or 66"),
        (["--temperature=0"], "--temperature=0.0 must be above 0"),
        (["--method=scratch,kdd"], "--method=kdd: there is no arm kdd; did you mean kd"),
        (["--method=kd,kd"], "--method=kd,kd must name one or more different arms"),
        (["--method="], "--method= must name one or more"),
        (["--hard_weight=0", "--soft_weight=0"], "leave kd nothing to learn"),
        (["--ema=1"], "--ema=1 would keep the first weights"),
        (
            ["--smoke", "--accumulate=9"],
            "than the students' whole training has, which is 4; use --accumulate=4",
        ),
        (
            ["--epochs=3", "--teacher_num_train=64", "--accumulate=9"],
            "than the teacher's whole training has, which is 3",
        ),
        (["--teacher_num_train=5000"], "--num_train=5000 is not between 1 and the"),
        (["--views=4"], "--views=4 would change nothing: --teacher_mode=centre stores no"),
        (
            ["--teacher_dir={tmp}", "--teacher=resnet56", "--teacher_epochs=50"],
            "--teacher=resnet56 and --teacher_epochs=50 would change nothing: --teacher_dir takes up",
        ),
        (["--seeds=0,one"], "--seeds=0,one must be whole numbers"),
        (["--seeds=1,1"], "must be different numbers"),
        (["--seeds="], "--seeds= must be different numbers"),
        (["--seeds=-1"], "must be different numbers from 0"),
        (["--seeds=4294967296"], "must be different numbers from 0 to 4294967295"),
        (["--num_train=5000"], "--num_train=5000 is not between 1 and the"),
        (["--devices=3"], "3 devices were asked for, this process has 2"),
        (["--mixup=0.2"], "--teacher_mode=online"),
        (["--method=kd,scratch+hint"], "--method=scratch.hint: there is no arm scratch"),
        (["--method=hint", "--weights=hint=big"], "--weights=hint=big must be NAME=NUMBER"),
        (["--method=hint", "--weights=hint=nan"], "--weights=hint=nan must be NAME=NUMBER"),
        (["--method=hint", "--weights=hint=-1"], "with a number from 0 on"),
        (["--method=hint", "--weights=hint=1,hint=2"], "--weights=hint=1,hint=2 has two weights of hint"),
        (["--method=hint", "--weights=hnit=3"], "there is no method hnit"),
        (["--method=kd,rkd", "--weights=hint=3"], "--weights=hint=3: no arm of --method=kd,rkd has hint"),
        (
            ["--method=attention_transfer", "--padding=1"],
            "--method=attention_transfer compares maps.*online or views",
        ),
        (["--method=hint", "--student=mlp"], "--method=hint compares middle of both.*the student has none"),
        (["--method=hint", "--student=keras_student"], "--method=hint cannot compare these networks"),
        (
            ["--method=dkd", "--mixup=0.2", "--teacher_mode=online"],
            "--method=dkd reads one label per image",
        ),
        (["--teacher_dir={tmp}"], "holds no finished network"),
        (["--student=keras_student", "--dataset=folder:{tmp}/none"], "none"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, monkeypatch, arguments, said):
    def work(*_, **__):
        raise AssertionError("training began")

    monkeypatch.setattr(train, "fit", work)
    flags_set(f"--workdir={tmp_path / 'run'}", *(a.format(tmp=tmp_path) for a in arguments))
    with pytest.raises(ValueError, match=said):
        distill.main()
    assert not (tmp_path / "run").exists()  # so the corrected command finds an empty place


def test_the_largest_seed_is_a_seed():
    (seed,) = common.seeds_of(["4294967295"])
    params, model_state = models.init(models.build("digits_student", num_classes=10), (8, 8, 1), seed=seed)
    assert int(train.init_state(params, model_state, optax.sgd(0.1), seed=seed).seed) == 2**32 - 1
    feed = data.resident_feed((), np.arange(64), seed=seed, batch_size=8, steps_per_dispatch=8)
    assert sorted(feed.at(0)[1].ravel()) == list(range(64))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none_are_refused(tmp_path, value):
    flags_set(f"--workdir={tmp_path}", f"--learning_rate={value}")
    with pytest.raises(ValueError, match=f"--learning_rate={value} must be a finite number"):
        launching.check_finite(flags.FLAGS)


@pytest.mark.parametrize(
    "argument",
    ["--hard_weight=-0.1", "--soft_weight=-1", "--epochs=0", "--tempreture=3", "--learning_rate=0"],
)
def test_absl_refuses_values_out_of_range_and_unknown_flags(tmp_path, argument):
    with pytest.raises(flags.Error, match=argument.split("=")[0].strip("-")):
        flags_set(f"--workdir={tmp_path}", argument)


def test_a_teacher_of_other_classes_or_images_is_refused(tmp_path):
    task = common.make_task("digits", data_dir=None)
    names = list(task.source.class_names)
    description = {"class_names": names, "image_shape": [8, 8, 1], "mean": [0.3], "std": [0.4]}
    description["network"] = models.describe(models.build("digits_teacher", num_classes=10))
    for change, said in (
        ({"class_names": [*names, "ten"]}, "11 classes apart, digits has 10"),
        ({"image_shape": [28, 28, 1]}, "28"),
        ({"network": {"class": "Transformer"}}, "Transformer, which is not one of kdjax.models"),
    ):
        files.write_sealed(tmp_path / "network.json", description | change)
        with pytest.raises(ValueError, match=said):
            common.load_teacher(task, str(tmp_path))


class TestWorkdir:
    def test_is_taken_up_again_by_the_same_run_only(self, tmp_path):
        settings = {"temperature": 3.0, "method": ("scratch", "kd")}
        workdir = common.claim_workdir(str(tmp_path / "run"), settings)
        launching._locks.pop().close()
        assert common.claim_workdir(str(tmp_path / "run"), settings) == workdir
        launching._locks.pop().close()
        (workdir / "kd").mkdir()
        (workdir / "kd" / "summary_test.json").write_text(
            "{}"
        )  # work, which another run must not mix with its own
        with pytest.raises(ValueError, match=r"holds another run \(temperature 3.0 there and 4.0 here\)"):
            common.claim_workdir(str(workdir), settings | {"temperature": 4.0})

    def test_in_use_by_another_process_is_refused(self, tmp_path):
        holder = "import sys, time; from experiments import common; "
        holder += f"common.claim_workdir({str(tmp_path / 'run')!r}, {{}}); print('held', flush=True); time.sleep(60)"
        process = subprocess.Popen(
            [sys.executable, "-c", holder],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match="in use by another process"):
                common.claim_workdir(str(tmp_path / "run"), {})
        finally:
            process.kill()
            process.communicate()
        common.claim_workdir(str(tmp_path / "run"), {})  # the lock goes with the process
        launching._locks.pop().close()

    def test_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("draft")
        with pytest.raises(ValueError, match="files of something else"):
            common.claim_workdir(str(tmp_path), {})
        with pytest.raises(ValueError, match="is a file"):
            common.claim_workdir(str(tmp_path / "thesis.tex"), {})
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_disk_too_small_is_refused_before_any_work(self, tmp_path, monkeypatch):
        task = common.make_task("digits", data_dir=None)
        network = common.build("digits_teacher", task)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
        with pytest.raises(ValueError, match=r"needs about \d+ MiB .*has 0 MiB left"):
            common.check_disk(task, tmp_path, {network: 3}, column_bytes=10**6)

    @pytest.mark.once
    def test_a_disk_that_fills_up_ends_in_a_sentence_and_can_go_on(self, tmp_path):
        # No file may grow beyond 3,000 bytes: the operating system's error in the middle of a write is real.
        limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
        limited += "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
        module, *arguments = small_run(tmp_path / "run")
        done = subprocess.run(
            [sys.executable, "-c", limited, module, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
        code, _, errors = run(module, *arguments)
        assert code == 0, errors


def test_escape_smoke_leaves_the_saddle(tmp_path):
    code, _, errors = run("experiments.benchmarks.escape", "--smoke", f"--output={tmp_path / 'escape.json'}")
    assert code == 0, errors
    found = results.read(tmp_path / "escape.json")["arms"]
    assert found["SGD"]["strict_saddle_reached"] == [0, 0]
    assert "strict_saddle_steps" not in found["SGD"]
    ours = found["sprkd(SGD)"]
    assert ours["strict_saddle_reached"] == [1, 1]
    assert ours["least_squares_steps"] == found["SGD"]["least_squares_steps"]
    assert ours["least_squares_escapes"] == [0, 0]
    # Every tenth step four products, and what is linearised before them.
    looks = [1 + (steps - 1) // 10 for steps in ours["least_squares_steps"]]
    spent = [s + 1.5 * 5 * k for s, k in zip(ours["least_squares_steps"], looks, strict=True)]
    np.testing.assert_allclose(ours["least_squares_gradients"], spent)


def test_quickstart_smoke_in_a_relative_path_with_spaces(tmp_path):
    code, output, errors = run("experiments.quickstart", "--smoke", "--workdir=a run", cwd=tmp_path)
    assert code == 0, errors
    assert "kd" in output
    assert (tmp_path / "a run" / "report.html").exists()
    found = results.read(tmp_path / "a run" / "results.json")
    for arm, metrics in found["arms"].items():
        n = len(metrics["accuracy"])
        disturbed = found["robustness"][arm]
        assert all(len(values) == n for values in disturbed.values())
        assert disturbed["clean"] == pytest.approx(metrics["accuracy"])
        # Counts over the bins and over the confusion matrix are those of all its runs.
        assert sum(found["calibration"][arm]["count"]) == np.sum(found["confusion"][arm]) == n * 369
        hits = np.trace(np.array(found["confusion"][arm]))
        assert hits / (n * 369) == pytest.approx(np.mean(metrics["accuracy"]))
    assert found["costs"]["teacher"]["parameters"] == 29_066
    assert found["costs"]["kd"]["parameters"] == 1_626
    assert min(found["costs"]["kd"]["latency_ms"]) > 0
    for field in ("flatness", "densities", "surfaces"):
        assert found[field].keys() == {"scratch", "kd", "kd+ig", "sprkd+kd"}
    assert all(len(measures["loss"]) == 3 for measures in found["flatness"].values())
