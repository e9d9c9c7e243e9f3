"""A sweep chooses on validation alone, prunes, goes on where it was killed, and does every trial once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from absl import flags
from hypothesis import strategies as st

optuna = pytest.importorskip("optuna", reason="needs the extra [experiments]")

from experiments import cli  # noqa: E402
from experiments.sweep import __main__ as sweep  # noqa: E402
from experiments.sweep import spaces, trials  # noqa: E402
from kdjax import files, results, train  # noqa: E402
from kdjax.callbacks import RunId  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SWEEP = "experiments.sweep.__main__"

TUNED = """
import dataclasses, pathlib, types
from absl import flags
from experiments import cli
from kdjax.recipe import Machine, Recipe


@dataclasses.dataclass(frozen=True)
class Data(cli.Data):
    def load(self, **changes):
        content = "" if self.dataset == "digits" else pathlib.Path(self.dataset).read_text()
        return types.SimpleNamespace(fingerprint={"content": content})


DATA = cli.define(Data(), only=("dataset",))
RECIPE = cli.define(Recipe())
MACHINE = cli.define(Machine())
LAUNCH = cli.define(cli.Launch())
SEEDS = cli.define_seeds()
ARMS = cli.define_arms(default=("scratch", "kd"))
STUDENT = flags.DEFINE_string("student", "digits_student", "")
TEMPERATURE = flags.DEFINE_float("temperature", 3.0, "")
HARD_WEIGHT = flags.DEFINE_float("hard_weight", 0.1, "", lower_bound=0.0)
WEIGHTS = flags.DEFINE_list("weights", [], "")


def checked_flags():
    if unknown := set(ARMS.value) - {"scratch", "kd", "hint"}:
        raise ValueError(f"--arms={','.join(ARMS.value)}: there is no arm {unknown.pop()!r}.")
    if TEMPERATURE.value <= 0:
        raise ValueError(f"--temperature={TEMPERATURE.value} must be above 0.")
    if WEIGHTS.value and "hint" not in ARMS.value:
        raise ValueError(f"no arm of --arms={','.join(ARMS.value)} has hint.")


def main(callbacks=()):
    raise NotImplementedError
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, alone):
    """An experiment that can be swept, with no other experiment's flags in the process."""
    directory = tmp_path_factory.mktemp("tuned")
    (directory / "studies").mkdir()
    (directory / "studies" / "__init__.py").touch()
    (directory / "studies" / "tuned.py").write_text(TUNED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        with alone("studies.tuned", keep=(SWEEP,)) as module:
            yield module


def flags_set(experiment, *arguments):
    flags.FLAGS.unparse_flags()
    for module in (experiment, SWEEP):
        for flag in cli.flags_of(module).values():
            flag.unparse()
    flags.FLAGS(["sweep", f"--experiment={experiment}", *map(str, arguments)])


@pytest.fixture
def swept(tuned, tmp_path):
    """Runs a sweep in this process, as ``main`` would be run in a fresh one."""

    def run(*arguments):
        flags_set("studies.tuned", f"--workdir={tmp_path / 'sweep'}", *arguments)
        with cli.released():
            return sweep.main()

    flags_set("studies.tuned", f"--workdir={tmp_path}")
    return run


class TestSpace:
    @pytest.fixture(autouse=True)
    def _parsed(self, swept):
        pass

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
        assert spaces.read([part], cli.flags_of("studies.tuned")) == {part.split("=")[0]: expected}

    @hypothesis.given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.booleans())
    def test_any_two_numbers_in_order_are_a_range(self, low, high, log):
        part = f"temperature={low!r}:{high!r}{':log' * log}"
        if low < high:
            found = spaces.read([part], ["temperature"])["temperature"]
            assert found == optuna.distributions.FloatDistribution(low, high, log=log)
        else:
            with pytest.raises(ValueError, match="the lower one first"):
                spaces.read([part], ["temperature"])

    def test_drawn_values_reach_the_flags_exactly(self, tuned):
        with spaces.flags_set({"temperature": 0.1 + 0.2, "epochs": 7, "flip": "true", "weights": "hint=50"}):
            assert (tuned.TEMPERATURE.value, tuned.RECIPE.value.epochs) == (0.1 + 0.2, 7)
            assert (tuned.RECIPE.value.flip, tuned.WEIGHTS.value) == (True, ["hint=50"])
        assert tuned.TEMPERATURE.value == 3.0
        assert spaces.as_setting("batch_size", "16") == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--space is empty"),
        (["--space=temperature"], "must be NAME=LOW:HIGH"),
        (["--space=tempreture=1:20"], "no flag --tempreture to vary. Did you mean 'temperature'"),
        (["--space=seeds=1|2"], "no flag --seeds to vary"),
        (["--space=save_every_s=1:2"], "no flag --save_every_s to vary"),
        (["--space=temperature=20:1"], "the lower one first"),
        (["--space=temperature=1:inf"], "needs two numbers"),
        (["--space=temperature=1:2:lgo"], "must be temperature=LOW:HIGH"),
        (["--space=temperature=1:two"], "--temperature refuses a bound"),
        (["--space=temperature=1:2,temperature=1:3"], "names temperature twice"),
        (["--space=weight_decay=-1:1"], "--weight_decay refuses a bound.*number"),
        (["--space=hard_weight=0:1:log"], "begins above 0"),
        (["--space=epochs=1.5:3"], "--epochs refuses a bound"),
        (["--space=student=1:3"], "--student is no number; list its values"),
        (["--space=optimizer=adam|adam"], "must name different values"),
        (["--space=optimizer=adam|sdg"], "reaches optimizer=sdg.*should be one of"),
        (["--space=temperature=0:3"], "reaches temperature=0.0: --temperature=0.0 must be above 0"),
        (["--space=ema=0.5:1"], "reaches ema=1.0: --ema=1 would keep the first weights"),
        (["--space=epochs=1:3", "--arm=hint"], "--arm=hint must be one of scratch, kd"),
        (["--space=epochs=1:3", "--arms=kdd"], "there is no arm 'kdd'"),
        (["--space=epochs=1:3", "--split=validation"], "--split is not for a sweep"),
        (["--space=epochs=1:3", "--pod"], "--pod is not for a sweep: use --workers"),
        (["--space=epochs=1:3", "--final_seeds=4,5"], "have some in common"),
        (["--space=epochs=1:3", "--final_seeds=one"], "--final_seeds=one must be whole numbers"),
        (["--space=epochs=1:3", "--gpus=0,1"], "one for each of --workers=1"),
        (["--space=epochs=1:3", "--arms=hint,kd", "--weights=hint=2"], "no arm of --arms=kd has hint"),
        (["--space=epochs=1:3", "--final_seeds=4294967296"], "from 0 to 4294967295"),
        (
            ["--space=epochs=1:3", "--experiment=distil"],
            "no module experiments.distil. Did you mean 'distill'",
        ),
        (["--space=epochs=1:3", "--experiment=experiments.cli"], "has no --workdir and no --seeds"),
    ],
)
def test_bad_input_is_refused_before_any_work(swept, tuned, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(tuned, "main", lambda callbacks: pytest.fail("a trial began"))
    with pytest.raises(ValueError, match=said):
        swept(*arguments)
    assert not (tmp_path / "sweep").exists()


def test_a_misspelt_experiment_is_noticed_before_the_flags_are_parsed():
    with pytest.raises(ValueError, match="--experiment=distil: there is no module"):
        sweep.import_experiment(["sweep", "--epochs=3", "--experiment=distil"])


def fake_main(curve, *, epochs=6):
    """An experiment that learns nothing: ``curve(temperature, seed, epoch, split)`` is its accuracy."""
    FLAGS = flags.FLAGS

    def main(callbacks=()):
        seeds = [int(seed) for seed in FLAGS.seeds]
        arms = {}
        for arm in FLAGS.arms:
            finals = []
            for seed in seeds:
                for epoch in range(1, epochs + 1):
                    record = {"epoch": float(epoch)}
                    record["validation_accuracy"] = curve(FLAGS.temperature, seed, epoch, "validation")
                    for callback in callbacks:
                        callback.on_epoch(RunId(arm, seed), record)
                finals.append(curve(FLAGS.temperature, seed, epochs, FLAGS.split))
            arms[arm] = {"accuracy": finals}
        return {"arms": arms, "seeds": seeds, "scaled_down": ""}

    return main


def rising(temperature, seed, epoch, split):
    """Best at temperature 4 on validation, and on the test split at 16."""
    at = 4 if split == "validation" else 16
    return 0.9 - 0.1 * abs(np.log2(temperature / at)) - 0.3 / epoch + 1e-4 * (seed % 7)


FAKE = ("--space=temperature=1:20:log", "--seeds=0,1,2", "--random_trials=3", "--pruner_warmup=2")


@pytest.mark.usefixtures("undrawn")
class TestSearch:
    def test_prunes_and_chooses_by_validation_even_if_the_test_split_disagrees(
        self, swept, tuned, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(tuned, "main", fake_main(rising))
        result = swept(*FAKE, "--num_trials=14")
        tried = result["trials"]
        finished = [t for t in tried if t["outcome"] == "finished"]
        pruned = [t for t in tried if t["outcome"] == "pruned"]
        assert [t["number"] for t in tried] == list(range(14))
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
        by_test = max(tried, key=lambda t: rising(t["settings"]["temperature"], 0, 6, "test"))
        assert by_test["number"] != best["number"]
        assert result["arms"]["chosen"]["accuracy"] == [
            rising(settings, s, 6, "test") for s in (100, 101, 102)
        ]
        assert result["arms"]["default"]["accuracy"] == [rising(3.0, s, 6, "test") for s in (100, 101, 102)]
        assert result["trials_metric"] == "validation_accuracy"
        assert result["comparisons"][0]["a"] == "chosen"
        assert f"trial {best['number']} (temperature" in result["notes"][0]
        assert f"14 trials: {len(finished)} finished, {len(pruned)} pruned, 0 failed" in result["notes"][1]
        assert results.read(tmp_path / "sweep" / "results.json")["trials"] == tried

    def test_a_trial_is_the_mean_over_seeds_of_the_newest(self):
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
        trial = study.ask()
        reporter = trials.Reporter(trial, "kd", "validation_accuracy", {1: 0.5})
        for arm, seed, record in (
            ("scratch", 0, {"epoch": 1.0, "validation_accuracy": 0.9}),
            ("kd", 0, {"epoch": 1.0, "validation_accuracy": 0.5}),  # known already
            ("kd", 0, {"epoch": 2.0, "loss": 1.0}),
            ("kd", 0, {"epoch": 3.0, "validation_accuracy": 0.7}),
            ("kd", 5, {"epoch": 1.0, "validation_accuracy": 0.3}),
        ):
            reporter.on_epoch(RunId(arm, seed), record)
        found = study.trials[0].intermediate_values
        assert found == pytest.approx({3: 0.7, trials.SEED_STEPS + 1: 0.5})

    def test_a_loss_that_is_not_finite_ends_its_trial_alone(self, swept, tuned, monkeypatch, capsys):
        curve, default_fails = fake_main(rising), 0

        def main(callbacks=()):
            if flags.FLAGS.temperature < (2.5 if flags.FLAGS.split == "validation" else default_fails):
                raise train.NonFiniteLoss("the loss is not finite at step 3.")
            return curve(callbacks)

        monkeypatch.setattr(tuned, "main", main)
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

    def test_none_finished_is_a_sentence(self, swept, tuned, monkeypatch):
        def main(callbacks=()):
            raise train.NonFiniteLoss("the loss is not finite at step 3.")

        monkeypatch.setattr(tuned, "main", main)
        with pytest.raises(ValueError, match=r"no trial finished.*not finite at step 3"):
            swept(*FAKE, "--num_trials=2")

    def test_refused_settings_end_the_sweep_with_the_trial_named(self, swept, tuned, monkeypatch):
        def main(callbacks=()):
            raise ValueError("--student=mlp has no stages.")

        monkeypatch.setattr(tuned, "main", main)
        with pytest.raises(ValueError, match=r"trial 0 \(temperature .*\): --student=mlp has no stages"):
            swept(*FAKE, "--num_trials=2")

    def test_interrupted_anywhere_it_ends_as_if_it_had_not_been(self, swept, tuned, tmp_path, monkeypatch):
        monkeypatch.setattr(tuned, "main", fake_main(rising))
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

        monkeypatch.setattr(tuned, "main", fake_main(interrupted))
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
        self, swept, tuned, tmp_path, monkeypatch, damage
    ):
        monkeypatch.setattr(tuned, "main", fake_main(rising))
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

    def test_data_that_changed_need_another_workdir(self, swept, tuned, tmp_path, monkeypatch):
        monkeypatch.setattr(tuned, "main", fake_main(rising))
        (tmp_path / "data").write_text("some")
        swept(*FAKE, f"--dataset={tmp_path / 'data'}", "--num_trials=2")
        (tmp_path / "data").write_text("others")
        with pytest.raises(ValueError, match=r"holds another run \(data"):
            swept(*FAKE, f"--dataset={tmp_path / 'data'}", "--num_trials=3")

    def test_another_space_needs_another_workdir(self, swept, tuned, monkeypatch):
        monkeypatch.setattr(tuned, "main", fake_main(rising))
        swept(*FAKE, "--num_trials=2")
        with pytest.raises(ValueError, match="holds another run"):
            swept(*FAKE[1:], "--space=temperature=1:10", "--num_trials=2")


EXPERIMENT = """
import os, time
from absl import flags
from experiments import cli
from kdjax.callbacks import RunId

LAUNCH = cli.define(cli.Launch(), only=("workdir", "split"))
SEEDS = cli.define_seeds("0")
RATE = flags.DEFINE_float("rate", 0.5, "")
LOG = flags.DEFINE_string("log", None, "")
PAUSE = cli.may_change(flags.DEFINE_float("pause", 0.0, ""))
TOGETHER = cli.may_change(flags.DEFINE_integer("together", 1, ""))
BAD = cli.may_change(flags.DEFINE_bool("bad", False, ""))


def main(callbacks=()):
    launch = LAUNCH.value
    cli.claim_workdir(launch.workdir, {"rate": RATE.value})
    with open(LOG.value, "a") as log:
        log.write(f"{launch.workdir} {RATE.value!r} {os.getpid()}\\n")
    if BAD.value:
        raise ValueError("--bad is set.")
    end = time.monotonic() + 60
    while launch.split == "validation" and time.monotonic() < end:
        if len({line.split()[2] for line in open(LOG.value)}) >= TOGETHER.value:
            break
        time.sleep(0.05)
    time.sleep(PAUSE.value)
    for callback in callbacks:
        callback.on_epoch(RunId("one", 0), {"epoch": 1.0, "validation_accuracy": RATE.value})
    return {"arms": {"one": {"accuracy": [RATE.value]}}, "seeds": SEEDS.value, "scaled_down": ""}
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
        assert (tmp_path / "sweep" / "report.html").stat().st_size > 0

    def test_a_worker_that_fails_ends_all_with_its_sentence(self, start, tmp_path):
        process = start("--num_trials=4", "--workers=2", "--bad")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert errors.splitlines()[-1].startswith("error: worker ")
        assert "(rate 0." in errors
        assert "--bad is set. Its output is in" in errors

    @pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
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


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


DISTILLATION = """
from pathlib import Path

from absl import flags
from experiments import cli
from kdjax import checkpoints, methods, run, teacher
from kdjax.recipe import Recipe

LAUNCH = cli.define(cli.Launch(), only=("workdir", "split", "shared_cache"))
DATA = cli.define(cli.Data(num_train=48, num_validation=40))
RECIPE = cli.define(Recipe(epochs=2, batch_size=16))
SEEDS = cli.define_seeds("0")
ARMS = cli.define_arms(default=("scratch", "kd"))
TEMPERATURE = flags.DEFINE_float("temperature", 3.0, "")
TABLE = {"scratch": methods.labels, "kd": lambda: methods.kd(temperature=TEMPERATURE.value)}


def main(callbacks=()):
    launch, dataset, recipe = LAUNCH.value, DATA.value.load(), RECIPE.value
    settings = cli.settings(__name__)
    workdir = cli.claim_workdir(launch.workdir, settings | {"data": dataset.fingerprint})
    large, small = (cli.network("mlp", dataset, widths=(width,)) for width in (16, 4))
    with cli.shared_cache(launch.shared_cache, workdir / "teacher", dataset.fingerprint) as home:
        own = Recipe(epochs=2, batch_size=16)  # the teacher's; were it drawn too, it would decide the directory
        train = run.make_trainer(large, methods.labels(), dataset, own, split=launch.split)
        taught_by = train(0, home / "0", arm="teacher", callbacks=callbacks)
    digest = checkpoints.digest_tree(taught_by.weights)
    with cli.shared_cache(launch.shared_cache, workdir / "answers", dataset.fingerprint, of=digest) as home:
        signal = teacher.answers(taught_by, dataset, directory=home)
    found = {}
    for arm in ARMS.value:
        train = run.make_trainer(small, TABLE[arm](), dataset, recipe, teacher=signal, split=launch.split)
        options = {"arm": arm, "callbacks": callbacks, "settings": settings}
        found[arm] = [train(seed, workdir / arm / str(seed), **options) for seed in SEEDS.value]
    return {
        "arms": {arm: {"accuracy": [one.metrics["accuracy"] for one in own]} for arm, own in found.items()},
        "seeds": SEEDS.value,
        "flags": settings,
        "scaled_down": "",
    }
"""


@pytest.mark.once
def test_the_digits_with_one_teacher_and_no_look_at_the_test_split(alone, tmp_path, monkeypatch, undrawn):
    (tmp_path / "distillation.py").write_text(DISTILLATION)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sweep, "load", lambda name: sys.modules[name])
    workdir = tmp_path / "sweep"
    with alone("distillation", keep=(SWEEP,)), cli.released():
        space = "--space=temperature=1:20:log,batch_size=12|16"
        flags_set("distillation", f"--workdir={workdir}", space, "--num_trials=2", "--seeds=0")
        result = sweep.main()
    # The teacher depends on the data alone: the first trial trained it, and the others read it and its answers back.
    networks = {str(path.parent.relative_to(workdir)) for path in workdir.rglob("network.json")}
    (of_teacher,) = (where for where in networks if where.startswith("shared/"))
    assert len([*workdir.glob("shared/*/header.json")]) == 1
    # Only the tuned arm is run, but for the end.
    expected = {"trials/0/kd/0", "trials/1/kd/0", "final/default/kd/100"}
    expected |= {"final/chosen/kd/100", "final/chosen/scratch/100"}
    assert networks - {of_teacher} == expected
    # Trials read the validation split alone; the teacher was measured on the test split after them.
    summaries = [path.relative_to(workdir) for path in workdir.rglob("summary_test.json")]
    assert {path.parts[0] for path in summaries} == {"final", "shared"}
    of_trials = [path.stat().st_mtime_ns for path in workdir.glob("trials/*/kd/0/summary_validation.json")]
    assert len(of_trials) == 2
    assert max(of_trials) < (workdir / of_teacher / "summary_test.json").stat().st_mtime_ns
    for trial in result["trials"]:
        summary = files.read_sealed(workdir / f"trials/{trial['number']}/kd/0/summary_validation.json")
        assert (
            trial["value"] == summary["metrics"]["accuracy"] == summary["history"][-1]["validation_accuracy"]
        )
        assert trial["settings"]["batch_size"] in (12, 16)
    chosen = files.read_sealed(workdir / "final/chosen/kd/100/summary_test.json")
    assert result["arms"]["chosen"]["accuracy"] == [chosen["metrics"]["accuracy"]]
    assert result["seeds"] == [100]
