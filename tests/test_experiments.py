"""Experiments as their users start them: from the command line, with good input and with bad."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import cli, distill
from experiments.cli import launching
from kdjax import data, methods, models, report, results, train
from kdjax.run import Trained
from kdjax.train import Fitted
from kdjax.types import Weights

ROOT = Path(__file__).resolve().parent.parent


def launch(*arguments, environment=None, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *map(str, arguments)], env=environment, **pipes, **options)


def outcome(process):
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


def small_run(workdir, *more):
    return ("experiments.distill", "--smoke", "--batch_size=16", f"--workdir={workdir}", *more)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The workdir of a distillation with feature maps, learnt heads and a memory; its result; what it printed."""
    workdir = tmp_path_factory.mktemp("distilled") / "run"
    options = ("--arms=scratch,kd,crd+hint", "--ema=0.9", "--padding=1", "--teacher_mode=views", "--views=2")
    code, output, errors = outcome(launch(*small_run(workdir, *options)))
    assert code == 0, errors
    return workdir, results.read(workdir / "results.json"), output


class TestDistill:
    def test_leaves_everything(self, distilled):
        workdir, found, output = distilled
        assert set(found["arms"]) == {"teacher", "scratch", "kd", "crd+hint"}
        assert {"accuracy", "best_accuracy", "f1", "ece", "agreement"} <= found["arms"]["kd"].keys()
        assert (found["seeds"], found["flags"]["ema"]) == ([0, 1], 0.9)
        for name in (
            "report.html",
            "figure.png",
            "teacher/0/network.json",
            "kd/1/summary_test.json",
            "teacher_answers/0/header.json",
        ):
            assert (workdir / name).stat().st_size > 0
        assert "kd" in output.splitlines()[-2]
        stored = np.load(next((workdir / "teacher_answers" / "0").glob("*.npz")))
        assert {"teacher_logits", "teacher_stage2", "teacher_embedding"} == set(stored.files)

    @pytest.mark.usefixtures("undrawn")
    def test_takes_up_a_teacher_and_asks_it_online(self, distilled, start, tmp_path):
        workdir, found, _ = distilled
        online = (
            "--teacher_mode=online",
            "--mixup=0.5",
            "--arms=kd",
            f"--teacher_dir={workdir / 'teacher/0'}",
        )
        online += ("--dtype=bfloat16", "--optimizer=sgd", "--schedule=step", "--accumulate=2")
        again = start(distill, *small_run(tmp_path / "online", *online, "--flip", "--seeds=0")[1:])
        there, here = (result["arms"]["teacher"]["accuracy"] for result in (found, again))
        assert here == pytest.approx(there, abs=0.02)  # bfloat16 here
        assert again["flags"]["teacher"] == "digits_teacher"  # as it was loaded
        assert again["flags"]["teacher_epochs"] is None
        assert not [*(tmp_path / "online" / "teacher_answers").rglob("*.npz")]

    @pytest.mark.once
    def test_killed_at_a_random_moment_it_ends_bitwise_equal(self, tmp_path):
        one = ("--save_every_s=0", "--seeds=0", "--arms=kd")
        code, _, errors = outcome(launch(*small_run(tmp_path / "whole", *one)))
        assert code == 0, errors
        rng, began = np.random.default_rng(), time.monotonic()
        for _ in range(2):
            process = launch(*small_run(tmp_path / "killed", *one))
            time.sleep(rng.uniform(1, 8))
            process.kill()
            process.communicate()
        code, _, errors = outcome(launch(*small_run(tmp_path / "killed", *one)))
        assert code == 0, errors
        for summary in sorted((tmp_path / "whole").rglob("summary_*.json")):
            other = tmp_path / "killed" / summary.relative_to(tmp_path / "whole")
            assert json.loads(other.read_text()) == json.loads(summary.read_text()), time.monotonic() - began

    def test_one_sentence_and_exit_code_2(self, tmp_path):
        command = ("experiments.distill", "--dataset=digitz", f"--workdir={tmp_path / 'x'}")
        code, output, errors = outcome(launch(*command))
        assert (code, output, errors.count("\n")) == (2, "", 1)
        assert errors.startswith("error: ")
        assert "digits" in errors
        assert not (tmp_path / "x").exists()

    @pytest.mark.once
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_stopped_in_training_it_says_what_is_kept_and_goes_on(self, tmp_path, number):
        command = small_run(tmp_path / "run", "--save_every_s=0", "--arms=kd")
        process = launch(*command[:1], *command[2:], "--epochs=5000")  # without --smoke
        end = time.monotonic() + 120
        while not [*(tmp_path / "run").rglob("checkpoints/*")]:
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(number)
        code, output, errors = outcome(process)
        assert (code, output) == (128 + number, "")
        assert errors.startswith("stopped by ")
        assert errors.endswith(" the same command continues.\n")
        assert errors.count("\n") == 1


MINE = """
import flax.linen as nn
from kdjax.types import Outputs


class Net(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, *, train):
        hidden = nn.relu(nn.Dense(64)(x.reshape((len(x), -1))))
        return Outputs(nn.Dense(self.num_classes)(hidden), {"embedding": hidden})


def build(num_classes):
    return Net(num_classes)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A directory with a network, images, and a teacher's answers of the user's."""
    home = tmp_path_factory.mktemp("mine")
    (home / "mine.py").write_text(MINE)
    labels = np.arange(96) % 3
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 120, (96, 4, 4, 1)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(home / "images.npz", images=images, labels=labels)
    ids = data.load(str(home / "images.npz")).example_ids
    logits = 4 * np.eye(3, dtype=np.float32)[labels] + rng.normal(size=(96, 3)).astype(np.float32)
    embedding = rng.normal(size=(96, 12)).astype(np.float32)
    np.savez(home / "answers.npz", logits=logits, embedding=embedding, example_ids=ids)
    return home


@pytest.fixture(scope="module")
def own_run(mine, start):
    """``own_run(workdir, *flags)`` in ``mine``; two epochs of one seed."""

    def run(workdir, *more):
        network = ("--student=mine.py:build", f"--dataset={mine / 'images.npz'}", f"--workdir={workdir}")
        small = ("--epochs=2", "--batch_size=16", "--seeds=0")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(mine)
            patch.setattr(report, "save_figure", lambda *_, **__: None)  # slow, as the page; others draw them
            patch.setattr(report, "page", lambda *_, **__: None)
            return start(distill, *network, *small, *more)

    return run


@pytest.fixture(scope="module")
def taught(own_run, mine):
    """A run with given answers, and its result."""
    options = ("--teacher_answers=answers.npz", "--arms=scratch,kd,crd", "--weights=crd=2")
    return mine / "run", own_run(mine / "run", *options)


class TestOnesOwn:
    """A data set, a network and a teacher's answers that kdjax does not have."""

    def test_answers_stand_in_for_a_teacher(self, taught):
        workdir, found = taught
        assert list(found["arms"]) == ["scratch", "kd", "crd"]
        assert "from answers.npz than from labels alone" in found["question"]
        assert found["flags"]["teacher"] is None
        assert "agreement" in found["arms"]["kd"]
        assert not (workdir / "teacher").exists()

    def test_other_answers_are_another_run(self, taught, own_run, mine):
        with np.load(mine / "answers.npz") as file:
            other = dict(file) | {"logits": -file["logits"]}
        np.savez(mine / "other.npz", **other)
        (mine / "answers.npz").rename(mine / "kept.npz")
        (mine / "other.npz").rename(mine / "answers.npz")
        options = ("--teacher_answers=answers.npz", "--arms=scratch,kd,crd", "--weights=crd=2")
        try:
            with pytest.raises(ValueError, match=r"holds another run \(answers\.answers"):
                own_run(mine / "run", *options)
        finally:
            (mine / "kept.npz").replace(mine / "answers.npz")

    def test_students_start_at_a_finished_run(self, taught, own_run, tmp_path):
        workdir, found = taught
        first, still = f"--init_from={workdir / 'kd' / '0'}", ("--learning_rate=1e-9", "--optimizer=sgd")
        options = ("--teacher_answers=answers.npz", "--arms=scratch,crd", first, *still)
        again = own_run(tmp_path / "run", *options)
        for arm in ("scratch", "crd"):  # with heads too
            for name in ("accuracy", "loss", "f1", "ece", "agreement"):
                there = found["arms"]["kd"][name]
                assert again["arms"][arm][name] == pytest.approx(there, abs=1e-6), name
        with pytest.raises(ValueError, match="init_from"):
            own_run(tmp_path / "run", *options[:2], f"--init_from={workdir / 'crd' / '0'}", *still)


def test_a_start_takes_the_statistics_of_the_student_and_leaves_the_heads():
    weights = train.Weights({"w": np.ones(2)}, {"mean": np.full(2, 3.0)})
    parts = (
        {"student": {"w": np.zeros(2)}, "heads": {"h": np.zeros(1)}},
        {"student": {"mean": np.zeros(2)}, "heads": {}},
    )
    state = train.TrainState(np.int32(0), *parts, (), np.uint32(0))
    found = methods.start_at(*weights)(0, state)
    assert jax.tree.map(np.sum, found.params) == {"student": {"w": 2}, "heads": {"h": 0}}
    assert jax.tree.map(np.sum, found.model_state) == {"student": {"mean": 6}, "heads": {}}


LOADED = functools.cache(data.load)  # the digits once for all cases


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset=digitz"], "digitz.*digits"),
        (["--student=resnet9"], "resnet9.*[Dd]id you mean"),
        (["--teacher=kears_teacher"], "kears_teacher.*keras_teacher"),
        (["--student={tmp}/mine.py:build"], r"there is no file .*/mine\.py"),
        (["--dataset=mnist", "--data_dir={tmp}/nowhere"], r"nowhere.*prepare_data"),
        (["--dataset={tmp}/missing.npz"], r"missing\.npz"),
        (["--dataset=folder:{tmp}/none"], "none"),
        (["--batch_size=65"], "65 does not divide over 2 devices; use 64 or 66"),
        (["--temperature=0"], r"temperature=0\.0 must be above 0"),
        (["--hard_weight=0", "--soft_weight=0"], "leave kd nothing to learn"),
        (["--arms=kd,kd"], "--arms=kd,kd must name one or more different arms"),
        (["--arms="], "--arms= must name one or more"),
        (["--arms=scratch,kdd"], "kdd: there is no method 'kdd'; did you mean kd"),
        (["--arms=contrastive+kd"], "there is no method 'contrastive'; did you mean .*crd"),
        (["--arms=kd,scratch+hint"], "scratch.hint: there is no method 'scratch'"),
        (["--arms=hint", "--weights=hint=big"], "--weights=hint=big: hint=big must be NAME=NUMBER"),
        (["--arms=hint", "--weights=hint=nan"], "must be NAME=NUMBER"),
        (["--arms=hint", "--weights=hint=-1"], "with a number from 0 on"),
        (["--arms=hint", "--weights=hint=1,hint=2"], "hint has two weights"),
        (["--arms=kd,rkd", "--weights=hint=3"], "hint is no method of an arm"),
        (["--arms=kd", "--weights=kd=3"], "kd has --soft_weight"),
        (["--smoke", "--accumulate=9"], "the students' whole training has, which is 4; use 4 or less"),
        (
            ["--epochs=3", "--teacher_num_train=64", "--accumulate=9"],
            "the teacher's whole training has, which is 3",
        ),
        (["--teacher_num_train=5000"], "num_train=5000 is not between 1 and the"),
        (["--num_train=5000"], "num_train=5000 is not between 1 and the"),
        (["--devices=3"], "3 devices were asked for, this process has 2"),
        (["--views=4"], "--views=4 would change nothing: --teacher_mode=centre caches no"),
        (["--mixup=0.2"], "--mixup=0.2 blends images.*--teacher_mode=online"),
        (["--arms=dkd", "--mixup=0.2", "--teacher_mode=online"], "this method reads one label per image"),
        (["--arms=attention_transfer", "--padding=1"], "compares the map .*online or for views"),
        (["--arms=hint", "--student=mlp"], "hint compares middle stage .*the student has none"),
        (["--arms=hint", "--student=keras_student"], "hint cannot compare these networks"),
        (["--teacher_dir={tmp}"], "holds no finished network"),
        (
            ["--teacher_label_noise=clean"],
            "--teacher_label_noise=clean would change nothing: --label_noise=0",
        ),
        (
            ["--label_noise=0.1", "--teacher_label_noise=clean", "--teacher_dir=b"],
            "--teacher_label_noise=clean would change nothing: --teacher_dir takes up",
        ),
        (
            ["--label_noise=0.1", "--teacher_label_noise=clean", "--teacher_answers=a.npz"],
            "--teacher_label_noise=clean would change nothing: --teacher_answers brings",
        ),
        (
            ["--teacher_dir={tmp}", "--teacher=resnet56", "--teacher_epochs=50"],
            "--teacher=resnet56 and --teacher_epochs=50 would change nothing: --teacher_dir takes up",
        ),
        (["--teacher_answers={tmp}/none.npz"], "none.npz is no readable .npz.*write it with numpy.savez"),
        (
            ["--teacher_answers=a.npz", "--teacher_dir=b", "--teacher_seeds=2"],
            "--teacher_dir=b and --teacher_seeds=2 would change nothing: --teacher_answers brings",
        ),
        (["--teacher_answers=a.npz", "--teacher_mode=online"], "--teacher_mode=online would change nothing"),
        (["--init_from={tmp}"], "holds no finished network"),
        (["--tensorboard"], "pip install 'kdjax.tensorboard.'"),
    ],
)
def test_bad_input_is_refused_before_any_work(start, tmp_path, monkeypatch, arguments, said):
    def work(*_, **__):
        raise AssertionError("training began")

    monkeypatch.setattr(train, "fit", work)
    monkeypatch.setattr(data, "load", LOADED)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # is not installed
    with pytest.raises(ValueError, match=said):
        start(distill, f"--workdir={tmp_path / 'run'}", *(a.format(tmp=tmp_path) for a in arguments))
    assert not (tmp_path / "run").exists()  # so the corrected command finds an empty place


def test_the_largest_seed_is_a_seed():
    (seed,) = cli.parse_seeds(["4294967295"])
    network = models.from_linen(models.build("digits_student", num_classes=10), (8, 8, 1))
    state = train.init_state(*network.init(seed), optax.sgd(0.1), seed=seed)
    assert int(state.seed) == 2**32 - 1
    feed = data.resident_feed((), np.arange(64), seed=seed, batch_size=8, steps_per_dispatch=8)
    assert sorted(feed.at(0)[1].ravel()) == list(range(64))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none_are_refused(start, tmp_path, monkeypatch, value):
    monkeypatch.setattr(distill, "main", lambda: launching.check_finite(flags.FLAGS))
    with pytest.raises(ValueError, match=f"--learning_rate={value} must be a finite number"):
        start(distill, f"--workdir={tmp_path}", f"--learning_rate={value}")


@pytest.mark.parametrize(
    "argument", ["--temperature=-1", "--weight_decay=-1", "--tempreture=3", "--learning_rate=0"]
)
def test_absl_refuses_values_out_of_range_and_unknown_flags(start, tmp_path, argument):
    with pytest.raises(flags.Error, match=argument.split("=")[0].strip("-")):
        start(distill, f"--workdir={tmp_path}", argument)


class TestDisk:
    def test_too_small_is_refused_before_any_work(self, start, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
        with pytest.raises(ValueError, match=r"needs about \d+ MiB .*has 0 MiB left; free some space"):
            start(distill, f"--workdir={tmp_path / 'run'}")
        assert not (tmp_path / "run").exists()

    @pytest.mark.once
    def test_that_fills_up_ends_in_a_sentence_and_can_go_on(self, mine, tmp_path):
        # No file may grow beyond 3,000 bytes: the operating system's error in the middle of a write is real.
        limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
        limited += "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
        options = (
            "--dataset=images.npz",
            "--student=mine.py:build",
            "--teacher_answers=answers.npz",
            "--seeds=0",
        )
        module, *arguments = small_run(tmp_path / "run", "--arms=scratch", *options)
        done = subprocess.run(
            [sys.executable, "-c", limited, module, *arguments],
            cwd=mine,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: could not save step 4 to ")
        assert "free some space" in done.stderr
        code, _, errors = outcome(launch(module, *arguments, cwd=mine))
        assert code == 0, errors


@pytest.fixture(scope="class")
def sprkd_malaria(alone):
    with alone("experiments.sprkd_malaria") as study:
        yield study


class TestSprkdMalaria:
    NETWORKS = ("--dataset=digits", "--teacher=digits_teacher", "--student=digits_student")

    @pytest.mark.once
    @pytest.mark.usefixtures("undrawn", "optimised")
    def test_counts_what_each_arm_costs(self, sprkd_malaria, start, tmp_path):
        small = (
            "--smoke",
            "--num_train=128",
            "--num_validation=64",
            "--weak_epochs=1",
            "--period=2",
            "--seeds=4,5",
        )
        arms = ("scratch", "kd_strong", "sprkd", "init_saddle")
        options = (f"--arms={','.join(arms)}", "--split=validation", f"--workdir={tmp_path / 'run'}")
        start(sprkd_malaria, *self.NETWORKS, *small, *options)
        found = results.read(tmp_path / "run" / "results.json")
        assert set(found["arms"]) == {*arms, "weak_teacher", "strong_teacher"}
        runs, steps = found["arms"]["sprkd"], 2 * (128 // 64)
        assert all(products % 16 in (0, 1) for products in runs["hvps"])  # and one to certify with
        spent = zip(runs["gradient_equivalents"], runs["hvps"], runs["evaluations"], strict=True)
        for paid, products, losses in spent:
            assert paid == pytest.approx(steps + 1.5 * products + losses / 3)
        assert found["arms"]["scratch"]["gradient_equivalents"] == [steps] * len(found["seeds"])
        assert set(found["flatness"]) == set(arms)
        assert any("McNemar" in note for note in found["notes"])

    def test_a_run_ends_where_its_loss_first_falls_below_the_target(self, sprkd_malaria, tmp_path):
        losses = [2.0, 0.4, 0.6, 0.3]

        def trained(losses):
            history = [{"epoch": float(k + 1), "loss": loss} for k, loss in enumerate(losses)]
            fitted = Fitted(Weights({}, {}), Weights({}, {}), 1, history)
            return Trained("scratch", 7, None, None, fitted, {}, {})

        def make(recipe, last=None):
            def train(seed, home, **more):
                assert (seed, home, more) == (7, tmp_path, {"arm": "scratch"})
                return trained([*losses[: recipe.epochs - 1], last or losses[recipe.epochs - 1]])

            return train

        flags.FLAGS(["test", "--workdir=unused", "--nosmoke"])
        whole, more = trained(losses), {"arm": "scratch"}
        for target, epochs in ((3.0, 1), (0.5, 2), (0.35, 4), (0.1, 4)):
            with flagsaver.flagsaver(until_loss=target):
                assert len(sprkd_malaria.stopped(whole, make, tmp_path, **more).history) == epochs
        other = functools.partial(make, last=0.2)
        with (
            flagsaver.flagsaver(until_loss=0.5),
            pytest.raises(ValueError, match="what is trained depends on the length of the run"),
        ):
            sprkd_malaria.stopped(whole, other, tmp_path, **more)

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("--arms=scratch,kd_strong", "kd_strong minimise another; leave them out of --arms"),
            ("--schedule=cosine", "--schedule=cosine would change"),
        ],
    )
    def test_an_equal_loss_is_refused_where_it_is_none(self, sprkd_malaria, start, tmp_path, argument, said):
        own = (f"--workdir={tmp_path / 'run'}", "--arms=scratch,init_only", "--until_loss=0.1", argument)
        with pytest.raises(ValueError, match=said):
            start(sprkd_malaria, *self.NETWORKS, *own)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("--arms=scratch,sprkdd", "no arm 'sprkdd'"),
            ("--arms=sprkd", "must include scratch, with which the others are compared"),
            ("--student=mlp", "layers"),
        ],
    )
    def test_bad_input_is_refused_before_any_work(self, sprkd_malaria, start, tmp_path, argument, said):
        with pytest.raises(ValueError, match=said):
            start(sprkd_malaria, *self.NETWORKS, f"--workdir={tmp_path / 'run'}", argument)
        assert not (tmp_path / "run").exists()


def test_escape_smoke_leaves_the_saddle(tmp_path):
    command = ("experiments.benchmarks.escape", "--smoke", f"--output={tmp_path / 'escape.json'}")
    code, _, errors = outcome(launch(*command))
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


@pytest.mark.once
def test_quickstart_smoke_in_a_relative_path_with_spaces(tmp_path):
    command = ("experiments.quickstart", "--smoke", "--workdir=a run")
    for_users = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # much is computed here
    code, output, errors = outcome(launch(*command, cwd=tmp_path, environment=for_users))
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
