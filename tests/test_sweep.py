"""A sweep chooses on validation alone, prunes, goes on where it was killed, and does every trial once."""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import pytest
from absl import flags
from hypothesis import strategies as st

optuna = pytest.importorskip("optuna", reason="needs the extra [experiments]")

from experiments import common, distill, sweep  # noqa: E402
from experiments.common import launching, spaces, teachers, training  # noqa: E402
from kdjax import files, report, results, train  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def flags_set(*arguments):
    flags.FLAGS.unparse_flags()
    for module in ("experiments.distill", "experiments.sweep"):
        for flag in flags.FLAGS.flags_by_module_dict()[module]:
            flag.unparse()
    flags.FLAGS(["sweep", *map(str, arguments)])


@pytest.fixture
def swept(tmp_path):
    """Runs a sweep in this process, as ``main`` would be run in a fresh one."""

    def run(*arguments):
        flags_set(f"--workdir={tmp_path / 'sweep'}", *arguments)
        with common.released():
            return sweep.main()

    flags_set(f"--workdir={tmp_path}")
    return run


class TestSpace:
    @pytest.fixture(autouse=True)
    def _parsed(self, tmp_path):
        flags_set(f"--workdir={tmp_path}")

    @pytest.mark.parametrize(
        ("part", "expected"),
        [
            ("temperature=1:20:log", optuna.distributions.FloatDistribution(1, 20, log=True)),
            ("hard_weight=0:1", optuna.distributions.FloatDistribution(0, 1)),
            ("learning_rate=1e-4:1e-2:log", optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)),
            ("epochs=5:60", optuna.distributions.IntDistribution(5, 60)),
            ("batch_size=8:64:log", optuna.distributions.IntDistribution(8, 64, log=True)),
            ("batch_size=16|32", optuna.distributions.CategoricalDistribution(["16", "32"])),
            ("optimizer=adam|sgd", optuna.distributions.CategoricalDistribution(["adam", "sgd"])),
            (
                "weights=hint=50|hint=100",
                optuna.distributions.CategoricalDistribution(["hint=50", "hint=100"]),
            ),
        ],
    )
    def test_is_read(self, part, expected):
        assert spaces.read([part], sweep.flags_of(distill)) == {part.split("=")[0]: expected}

    @hypothesis.given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.booleans())
    def test_any_two_numbers_in_order_are_a_range(self, low, high, log):
        part = f"temperature={low!r}:{high!r}{':log' * log}"
        if low < high:
            found = spaces.read([part], ["temperature"])["temperature"]
            assert found == optuna.distributions.FloatDistribution(low, high, log=log)
        else:
            with pytest.raises(ValueError, match="the lower one first"):
                spaces.read([part], ["temperature"])

    def test_drawn_values_reach_the_flags_exactly(self):
        with spaces.flags_set({"temperature": 0.1 + 0.2, "epochs": 7, "flip": "true", "weights": "hint=50"}):
            assert (distill.TEMPERATURE.value, distill.EPOCHS.value) == (0.1 + 0.2, 7)
            assert (distill.FLIP.value, distill.WEIGHTS.value) == (True, ["hint=50"])
        assert distill.TEMPERATURE.value == 3.0
        assert spaces.as_setting("batch_size", "16") == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--space is empty"),
        (["--space=temperature"], "must be NAME=LOW:HIGH"),
        (["--space=tempreture=1:20"], "no flag --tempreture to vary. Did you mean 'temperature'"),
        (["--space=seeds=1|2"], "no flag --seeds to vary"),
        (["--space=temperature=20:1"], "the lower one first"),
        (["--space=temperature=1:inf"], "needs two numbers"),
        (["--space=temperature=1:2:lgo"], "must be temperature=LOW:HIGH"),
        (["--space=temperature=1:two"], "--temperature refuses a bound"),
        (["--space=temperature=1:2,temperature=1:3"], "names temperature twice"),
        (["--space=hard_weight=-1:1"], "--hard_weight refuses a bound.*number"),
        (["--space=hard_weight=0:1:log"], "begins above 0"),
        (["--space=epochs=1.5:3"], "--epochs refuses a bound"),
        (["--space=student=1:3"], "--student is no number; list its values"),
        (["--space=optimizer=adam|adam"], "must name different values"),
        (["--space=optimizer=adam|sdg"], "reaches optimizer=sdg.*should be one of"),
        (["--space=temperature=0:3"], "reaches temperature=0.0: --temperature=0.0 must be above 0"),
        (["--space=mixup=0:1"], "reaches mixup=1.0.*--teacher_mode=online"),
        (["--space=epochs=1:3", "--arm=hint"], "--arm=hint must be one of scratch, kd"),
        (["--space=epochs=1:3", "--method=kdd"], "there is no arm kdd"),
        (["--space=epochs=1:3", "--split=validation"], "--split is not for a sweep"),
        (["--space=epochs=1:3", "--pod"], "--pod is not for a sweep: use --workers"),
        (["--space=epochs=1:3", "--final_seeds=4,5"], "have some in common"),
        (["--space=epochs=1:3", "--final_seeds=one"], "must be whole numbers"),
        (["--space=epochs=1:3", "--gpus=0,1"], "one for each of --workers=1"),
        (["--space=epochs=1:3", "--method=hint,kd", "--weights=hint=2"], "no arm of --method=kd has hint"),
        (["--space=epochs=1:3", "--final_seeds=4294967296"], "from 0 to 4294967295"),
        (
            ["--space=epochs=1:3", "--experiment=distil"],
            "no module experiments.distil. Did you mean 'distill'",
        ),
        (["--space=epochs=1:3", "--experiment=prepare_data"], "has no --workdir and no --seeds"),
    ],
)
def test_bad_input_is_refused_before_any_work(swept, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(distill, "main", lambda: pytest.fail("a trial began"))
    if "prepare_data" in str(arguments):  # its flags and those of distill are not for one process
        monkeypatch.setattr(sweep, "load", lambda name: common)
    with pytest.raises(ValueError, match=said):
        swept(*arguments)
    assert not (tmp_path / "sweep").exists()


def fake_main(curve, *, epochs=6):
    """An experiment that learns nothing: ``curve(temperature, seed, epoch, split)`` is its accuracy."""
    FLAGS = flags.FLAGS

    def main():
        seeds = [int(seed) for seed in FLAGS.seeds]
        arms = {}
        for arm in FLAGS.method:
            finals = []
            for seed in seeds:
                for epoch in range(1, epochs + 1):
                    record = {"epoch": float(epoch)}
                    record["validation_accuracy"] = curve(FLAGS.temperature, seed, epoch, "validation")
                    for watcher in list(training._watchers):
                        watcher(f"{arm}, seed {seed}", record)
                finals.append(curve(FLAGS.temperature, seed, epochs, FLAGS.split))
            arms[arm] = {"accuracy": finals}
        return {"arms": arms, "seeds": seeds, "scaled_down": ""}

    return main


def rising(temperature, seed, epoch, split):
    """Best at temperature 4 on validation, and on the test split at 16."""
    at = 4 if split == "validation" else 16
    return 0.9 - 0.1 * abs(np.log2(temperature / at)) - 0.3 / epoch + 1e-4 * (seed % 7)


FAKE = ("--space=temperature=1:20:log", "--seeds=0,1,2", "--random_trials=3", "--spared_epochs=2")


class TestSearch:
    def test_prunes_and_chooses_by_validation_even_if_the_test_split_disagrees(
        self, swept, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(distill, "main", fake_main(rising))
        result = swept(*FAKE, "--num_trials=14")
        trials = result["trials"]
        finished = [t for t in trials if t["outcome"] == "finished"]
        pruned = [t for t in trials if t["outcome"] == "pruned"]
        assert [t["number"] for t in trials] == list(range(14))
        assert len(finished) >= 3
        assert pruned
        best = max(finished, key=lambda t: t["value"])
        settings = best["settings"]["temperature"]
        assert best["value"] == pytest.approx(
            np.mean([rising(settings, s, 6, "validation") for s in range(3)])
        )
        # No pruned trial would have been the best, and the best by the test split was another.
        assert all(
            abs(np.log2(t["settings"]["temperature"] / 4)) > abs(np.log2(settings / 4)) for t in pruned
        )
        by_test = max(trials, key=lambda t: rising(t["settings"]["temperature"], 0, 6, "test"))
        assert by_test["number"] != best["number"]
        assert result["arms"]["chosen"]["accuracy"] == [
            rising(settings, s, 6, "test") for s in (100, 101, 102)
        ]
        assert result["arms"]["default"]["accuracy"] == [rising(3.0, s, 6, "test") for s in (100, 101, 102)]
        assert result["trials_metric"] == "validation_accuracy"
        assert result["comparisons"][0]["a"] == "chosen"
        assert f"trial {best['number']} (temperature" in result["notes"][0]
        assert f"14 trials: {len(finished)} finished, {len(pruned)} pruned, 0 failed" in result["notes"][1]
        assert results.read(tmp_path / "sweep" / "results.json")["trials"] == trials
        assert (tmp_path / "sweep" / "report.html").stat().st_size > 0

    def test_a_trial_is_the_mean_over_seeds_of_the_newest(self):
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
        trial = study.ask()
        watch = sweep.trials.reporter(trial, "kd", "validation_accuracy", {1: 0.5})
        watch("scratch, seed 0", {"epoch": 1.0, "validation_accuracy": 0.9})
        watch("kd, seed 0", {"epoch": 1.0, "validation_accuracy": 0.5})  # known already
        watch("kd, seed 0", {"epoch": 2.0, "loss": 1.0})
        watch("kd, seed 0", {"epoch": 3.0, "validation_accuracy": 0.7})
        watch("kd, seed 5", {"epoch": 1.0, "validation_accuracy": 0.3})
        step = sweep.trials.SEED_STEPS
        assert study.trials[0].intermediate_values == pytest.approx({3: 0.7, step + 1: 0.5})

    def test_a_loss_that_is_not_finite_ends_its_trial_alone(self, swept, monkeypatch, capsys):
        curve, default_fails = fake_main(rising), 0

        def main():
            if flags.FLAGS.temperature < (2.5 if flags.FLAGS.split == "validation" else default_fails):
                raise train.NonFiniteLoss("the loss is not finite at step 3.")
            return curve()

        monkeypatch.setattr(distill, "main", main)
        result = swept(*FAKE, "--num_trials=8")
        failed = [t for t in result["trials"] if t["outcome"] == "failed"]
        assert {t["number"] for t in failed} == {
            t["number"] for t in result["trials"] if t["settings"]["temperature"] < 2.5
        }
        assert 0 < len(failed) < 8 == len(result["trials"])
        assert failed[0]["value"] is None
        assert "failed, " in capsys.readouterr().out
        assert "not finite at step 3" in result["notes"][2]
        default_fails = 3.5
        with pytest.raises(train.NonFiniteLoss, match="final/default: the loss is not finite"):
            swept(*FAKE, "--num_trials=8")

    def test_none_finished_is_a_sentence(self, swept, monkeypatch):
        def main():
            raise train.NonFiniteLoss("the loss is not finite at step 3.")

        monkeypatch.setattr(distill, "main", main)
        with pytest.raises(ValueError, match=r"no trial finished.*not finite at step 3"):
            swept(*FAKE, "--num_trials=2")

    def test_refused_settings_end_the_sweep_with_the_trial_named(self, swept, monkeypatch):
        def main():
            raise ValueError("--student=mlp has no stages.")

        monkeypatch.setattr(distill, "main", main)
        with pytest.raises(ValueError, match=r"trial 0 \(temperature .*\): --student=mlp has no stages"):
            swept(*FAKE, "--num_trials=2")

    def test_interrupted_anywhere_it_ends_as_if_it_had_not_been(self, swept, tmp_path, monkeypatch):
        monkeypatch.setattr(distill, "main", fake_main(rising))
        whole = swept(*FAKE, "--num_trials=9")
        (tmp_path / "sweep").rename(tmp_path / "whole")
        calls = {"count": 0, "directories": []}

        def interrupted(temperature, seed, epoch, split):
            if (epoch, seed, split) == (1, 0, "validation"):
                calls["directories"].append(Path(flags.FLAGS.workdir).name)
            calls["count"] += 1
            if calls["count"] in (1, 30, 55):
                raise KeyboardInterrupt
            return rising(temperature, seed, epoch, split)

        monkeypatch.setattr(distill, "main", fake_main(interrupted))
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                swept(*FAKE, "--num_trials=9")
        with (tmp_path / "sweep" / "journal.log").open("a") as journal:
            journal.write('{"half a li')
        again = swept(*FAKE, "--num_trials=9")
        assert len(calls["directories"]) == 9 + 3
        assert calls["directories"][:2] == ["0", "0"]
        for key in ("arms", "notes"):
            assert again[key] == whole[key]
        for a, b in zip(again["trials"], whole["trials"], strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}

    @pytest.mark.parametrize("damage", ["digit", "digest", "moved", "left out", "another sweep's"])
    def test_a_journal_that_was_changed_is_refused_and_its_advice_helps(
        self, swept, tmp_path, monkeypatch, damage
    ):
        monkeypatch.setattr(distill, "main", fake_main(rising))
        whole = swept(*FAKE, "--num_trials=4")
        journal = tmp_path / "sweep" / "journal.log"
        lines = journal.read_bytes().splitlines(keepends=True)
        at = next(i for i, line in enumerate(lines) if b'"values": [0.' in line)
        if damage == "digit":
            lines[at] = lines[at].replace(b'"values": [0.', b'"values": [9.')
        elif damage == "digest":
            lines[at] = lines[at].replace(b'"sha256": "', b'"sha256": "0')
        elif damage == "moved":
            lines[at : at + 2] = reversed(lines[at : at + 2])
        elif damage == "left out":
            del lines[at]
        else:
            (tmp_path / "sweep").rename(tmp_path / "first")
            swept(*FAKE, "--num_trials=4", "--sweep_seed=1")
            at = 0
        journal.write_bytes(b"".join(lines))
        refused = rf"journal\.log, line {at + 1}, was changed or is of another sweep\. Delete that file and"
        again = ("--sweep_seed=1",) if damage == "another sweep's" else ()
        with pytest.raises(ValueError, match=refused):
            swept(*FAKE, "--num_trials=4", *again)
        journal.unlink()
        shutil.rmtree(tmp_path / "sweep" / "trials")
        found = swept(*FAKE, "--num_trials=4", *again)
        assert again or found["arms"] == whole["arms"]

    def test_data_that_changed_need_another_workdir(self, swept, tmp_path, monkeypatch):
        monkeypatch.setattr(distill, "main", fake_main(rising))
        images, labels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8), np.arange(60) % 3
        data = tmp_path / "data.npz"
        np.savez(data, images=images, labels=labels)
        swept(*FAKE, f"--dataset={data}", "--num_trials=2")
        np.savez(data, images=255 - images, labels=labels)
        with pytest.raises(ValueError, match=r"holds another run \(data"):
            swept(*FAKE, f"--dataset={data}", "--num_trials=3")

    def test_another_space_needs_another_workdir(self, swept, monkeypatch):
        monkeypatch.setattr(distill, "main", fake_main(rising))
        swept(*FAKE, "--num_trials=2")
        with pytest.raises(ValueError, match="holds another run"):
            swept(*FAKE[1:], "--space=temperature=1:10", "--num_trials=2")


EXPERIMENT = """
import os, time
from absl import flags
from experiments import common
from experiments.common import training

WORKDIR = flags.DEFINE_string("workdir", None, "")
SEEDS = flags.DEFINE_list("seeds", ["0"], "")
SPLIT = flags.DEFINE_string("split", "test", "")
RATE = flags.DEFINE_float("rate", 0.5, "")
LOG = flags.DEFINE_string("log", None, "")
PAUSE = flags.DEFINE_float("pause", 0.0, "")
TOGETHER = flags.DEFINE_integer("together", 1, "")
BAD = flags.DEFINE_bool("bad", False, "")
MACHINE = ("workdir", "pause", "together", "bad")


def main():
    common.claim_workdir(WORKDIR.value, {"rate": RATE.value})
    with open(LOG.value, "a") as log:
        log.write(f"{WORKDIR.value} {RATE.value!r} {os.getpid()}\\n")
    if BAD.value:
        raise ValueError("--bad is set.")
    end = time.monotonic() + 60
    while SPLIT.value == "validation" and time.monotonic() < end:
        if len({line.split()[2] for line in open(LOG.value)}) >= TOGETHER.value:
            break
        time.sleep(0.05)
    time.sleep(PAUSE.value)
    for watcher in list(training._watchers):
        watcher("one, seed 0", {"epoch": 1.0, "validation_accuracy": RATE.value})
    return {"arms": {"one": {"accuracy": [RATE.value]}}, "seeds": [int(SEEDS.value[0])], "scaled_down": ""}
"""


@pytest.mark.once
class TestProcesses:
    """From the command line, with an experiment of one's own."""

    @pytest.fixture
    def start(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "__init__.py").touch()
        (tmp_path / "mine" / "one.py").write_text(EXPERIMENT)
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "experiments.sweep", "--experiment=mine.one", "--space=rate=0:1"]
        command += ["--arm=one", f"--workdir={tmp_path / 'sweep'}", f"--log={tmp_path / 'log'}"]
        started = []

        def start(*arguments):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([*command, *arguments], env=environment, **pipes))
            return started[-1]

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def lines(self, tmp_path, at_least=0, within=60.0):
        end = time.monotonic() + within
        while True:
            text = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
            found = [line.split() for line in text.splitlines()]
            if len(found) >= at_least:
                return [
                    (Path(where).parent.name, Path(where).name, rate, int(pid)) for where, rate, pid in found
                ]
            assert time.monotonic() < end, f"only {found} after {within} s"
            time.sleep(0.05)

    def test_killed_with_its_workers_it_goes_on_and_does_every_trial_once(self, start, tmp_path):
        process = start("--num_trials=5", "--workers=2", "--together=2", "--pause=600")
        before = self.lines(tmp_path, at_least=2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        end = time.monotonic() + 30
        while any(is_alive(pid) for *_, pid in before):  # nobody tells them but the pipe
            assert time.monotonic() < end, "a worker outlived its parent"
            time.sleep(0.1)
        process = start("--num_trials=5", "--workers=2", "--together=3")  # one pid more than those before
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        after = self.lines(tmp_path)[len(before) :]
        runs = [line for line in after if line[0] == "trials"]
        assert sorted(number for _, number, *_ in runs) == ["0", "1", "2", "3", "4"]
        assert {line[1:3] for line in before} <= {
            line[1:3] for line in runs
        }  # the same settings, the same place
        assert len({rate for _, _, rate, _ in runs}) == 5
        assert [line[1] for line in after if line[0] == "final"] == ["default", "chosen"]
        assert after[-1][2] == max((line[2] for line in runs), key=float)
        found = results.read(tmp_path / "sweep" / "results.json")
        assert [t["outcome"] for t in found["trials"]] == ["finished"] * 5
        assert found["command"].startswith("python -m experiments.sweep --experiment=mine.one")
        assert output.count("finished, validation") == 5
        assert "report.html are in" in output

    def test_a_worker_that_fails_ends_all_with_its_sentence(self, start, tmp_path):
        process = start("--num_trials=4", "--workers=2", "--bad")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert errors.splitlines()[-1].startswith("error: worker ")
        assert "(rate 0." in errors
        assert "--bad is set. Its output is in" in errors

    @pytest.mark.parametrize(
        ("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGTERM, 1)]
    )
    def test_stopped_it_says_so_and_succeeds_no_more(self, start, tmp_path, number, workers):
        process = start("--num_trials=5", f"--workers={workers}", f"--together={workers}", "--pause=600")
        before = self.lines(tmp_path, at_least=workers)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 128 + number
        assert errors.splitlines()[-1].startswith("stopped")
        assert errors.splitlines()[-1].endswith("the same command continues.")
        assert "Traceback" not in errors
        assert not any(is_alive(pid) for *_, pid in before)

    def test_a_misspelt_experiment_is_one_sentence(self, start):
        process = start("--experiment=distil")
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (2, "")
        assert errors.startswith("error: --experiment=distil: there is no module")
        assert errors.count("\n") == 1


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


DIGITS = ("--smoke", "--batch_size=16", "--num_train=48", "--num_validation=40", "--method=scratch,kd")


def test_the_digits_with_one_teacher_and_no_look_at_the_test_split(swept, tmp_path, monkeypatch):
    splits, fitted, real, fit = [], [], training.make_evaluator, train.fit

    def spy(task, apply_fn, evaluation_batch, resident, split):
        evaluate = real(task, apply_fn, evaluation_batch, resident, split)

        def spied(*weights):
            splits.append((Path(flags.FLAGS.workdir).parent.name, split))
            return evaluate(*weights)

        return spied

    def spied_fit(*arguments, directory, **options):
        fitted.append(directory.relative_to(tmp_path / "sweep").parts[:-1])
        return fit(*arguments, directory=directory, **options)

    for module in (training, teachers):
        monkeypatch.setattr(module, "make_evaluator", spy)
    for name in ("save_figure", "page"):  # slow, and of other tests
        monkeypatch.setattr(report, name, lambda *_, **__: None)
    monkeypatch.setattr(train, "fit", spied_fit)
    result = swept(*DIGITS, "--space=temperature=1:20:log,soft_weight=0.5|0.9", "--num_trials=2", "--seeds=0")
    assert {split for where, split in splits if where == "trials"} == {"validation"}
    assert ("final", "test") in splits
    first = next(n for n, (_, split) in enumerate(splits) if split == "test")
    assert {where for where, _ in splits[first:]} == {"final"}
    # The teacher was trained by the first trial and read back by the others; what is not tuned ran once, at the end.
    homes = {parts[1] for parts in fitted if parts[0] == "shared"}
    assert len(homes) == 1
    assert (
        len([*(tmp_path / "sweep" / "shared").glob("*/header.json")]) == 1
    )  # and its columns were filled once
    trained = [parts for parts in fitted if parts[0] != "shared"]
    runs = [("trials", "0"), ("trials", "1"), ("final", "default"), ("final", "chosen")]
    expected = [(*run, "kd", "0") for run in runs[:2]]
    expected += [(*runs[2], "kd", "100"), (*runs[3], "scratch", "100"), (*runs[3], "kd", "100")]
    assert trained == expected
    trial = results.read(tmp_path / "sweep" / "trials" / "0" / "results.json")
    assert trial["flags"]["split"] == "validation"
    assert "validation split" in trial["notes"][0]
    assert result["trials"][0]["value"] == pytest.approx(statistics.fmean(trial["arms"]["kd"]["accuracy"]))
    histories = trial["curves"]["kd"]["validation_accuracy"]
    assert trial["arms"]["kd"]["accuracy"] == [history[-1] for history in histories]
    assert result["trials"][0]["settings"]["soft_weight"] in (0.5, 0.9)
    final = results.read(tmp_path / "sweep" / "final" / "chosen" / "results.json")
    assert final["flags"]["split"] == "test"
    assert final["arms"]["kd"] == result["arms"]["chosen"]
    assert final["seeds"] == result["seeds"] == [100]


def events(directory):
    """(tag, step) → values in the event files of a run, those left out that a later file voids."""
    from tensorboardX.proto import event_pb2

    points = []
    for path in sorted(directory.iterdir()):  # as TensorBoard does
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == 1:  # START
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points


class TestTensorBoard:
    RUN = (*DIGITS[1:], "--seeds=3", "--epochs=3", "--save_every_s=0", "--tensorboard")

    def test_has_every_epoch_once_after_a_run_that_was_interrupted(self, tmp_path, monkeypatch):
        writer = pytest.importorskip("tensorboardX.event_file_writer")
        monkeypatch.setattr(writer, "time", mock.Mock(time=lambda: 1.7e9))  # all within a second

        def stop(label, record):
            if label == "kd, seed 3" and record["epoch"] == 2:
                raise KeyboardInterrupt

        def run():
            flags_set(f"--workdir={tmp_path / 'run'}", *self.RUN)
            with common.released():
                return distill.main()

        with pytest.raises(KeyboardInterrupt), common.watched(stop):
            run()
        run()
        for arm, seed in (("teacher", 0), ("scratch", 3), ("kd", 3)):
            points = events(tmp_path / "run" / "tensorboard" / arm / str(seed))
            assert len({point[:2] for point in points}) == len(points)
            summary = files.read_sealed(tmp_path / "run" / arm / str(seed) / "summary_test.json")
            assert {step for _, step, _ in points} == {3, 6, 9}  # 48 images in batches of 16
            for tag, step, value in points:
                name = tag.replace("training/", "").replace("/", "_")
                assert value == pytest.approx(summary["history"][step // 3 - 1][name], rel=1e-6)
        assert {"training/soft", "training/grad_norm", "validation/accuracy"} <= {tag for tag, *_ in points}

    def test_without_the_package_is_one_sentence(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        flags_set(f"--workdir={tmp_path / 'run'}", *self.RUN)
        with pytest.raises(ValueError, match=r"pip install 'kdjax\[tensorboard\]'"):
            distill.main()
        assert not (tmp_path / "run").exists()


def test_workdirs_claimed_within_are_given_back(tmp_path):
    held = len(launching._locks)
    with common.released():
        common.claim_workdir(str(tmp_path / "one"), {})
    assert len(launching._locks) == held


@pytest.mark.once
def test_of_an_experiment_that_has_jobs_of_its_own(tmp_path):
    command = [
        *(
            sys.executable,
            "-m",
            "experiments.sweep",
            "--experiment=ig_cifar10",
            f"--workdir={tmp_path / 'run'}",
        ),
        *("--dataset=digits", "--teacher=digits_teacher", "--student=digits_student", "--smoke", "--seeds=0"),
        *("--arms=student,kd+ig", "--space=strength=0.2|0.8", "--num_trials=2", "--random_trials=1"),
        *("--workers=2", "--final_seeds=1,2,3"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = results.read(tmp_path / "run" / "results.json")
    assert [trial["outcome"] for trial in found["trials"]] == ["finished"] * 2
    assert len(set(found["arms"]["chosen"]["accuracy"])) > 1
    # A teacher, its maps and its answers, whichever split a run measures.
    assert len([path for path in (tmp_path / "run" / "shared").iterdir() if path.is_dir()]) == 3
    chosen = results.read(tmp_path / "run" / "final" / "chosen" / "results.json")
    assert set(chosen["arms"]) == {"teacher", "student", "kd+ig"}
    for arm in ("student", "kd+ig"):
        assert all(-1 <= value <= 1 for value in chosen["arms"][arm]["map_correlation"])
