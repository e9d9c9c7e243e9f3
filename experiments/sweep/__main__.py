r"""Which settings suit a method best, and how much of the gain is left on the test split?

    python -m experiments.sweep --experiment=distill --space=temperature=1:20:log,hard_weight=0:1 --num_trials=30 \
        --workdir=runs/sweep --dataset=digits --num_train=100 --epochs=60 --batch_size=20 --teacher_num_train=0 \
        --teacher_epochs=30 --arms=scratch,kd

Flags that are not the sweep's own (--help) are the experiment's (--helpfull) and mean what they mean there. --space
varies flags by name=low:high, name=low:high:log or name=a|b|c. A trial runs the experiment with drawn values for one
arm (--arm; the last of --arms) and measures it on the validation split. Optuna's TPE draws; a trial whose validation
accuracy falls below the median of the finished ones is pruned (--pruner_warmup). The best trial, by the mean over
--seeds of the last validation accuracy, is then run beside the settings of the command line, both on --final_seeds,
which no trial had: only there is the test split read.

Any experiment can be swept that has --workdir, --seeds and --split, and whose main(callbacks) passes the callbacks to
its trainings and returns its result. Teachers and cached answers that trials have in common are computed once
(--shared_cache). --workers runs trials side by side.

The workdir receives trials/ and final/ with one run each, Optuna's journal, results.json, figure.png and report.html.
The same command started again continues: finished trials stay, interrupted ones go on from their own checkpoints.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optuna
from absl import flags
from optuna.trial import FrozenTrial, TrialState

from experiments import cli
from experiments.sweep import spaces, trials
from kdjax import report, results, train
from kdjax.callbacks import Callback, bar
from kdjax.data.tfds_cache import did_you_mean
from kdjax.study import TABLE, publish

EXPERIMENT = flags.DEFINE_string("experiment", "distill", "One of experiments/, or a module: package.name.")
SPACE = flags.DEFINE_list("space", [], "What is varied: name=low:high, name=low:high:log, name=a|b|c.")
NUM_TRIALS = flags.DEFINE_integer("num_trials", 30, "Trials, pruned and failed ones included.", lower_bound=1)
ARM = flags.DEFINE_string("arm", None, "The arm that is tuned; the last of --arms by default.")
FINAL_SEEDS = flags.DEFINE_list(
    "final_seeds",
    [],
    "Seeds of the comparison on the test split; as many as --seeds, from 100 on, by default.",
)
RANDOM_TRIALS = flags.DEFINE_integer(
    "random_trials", 10, "First trials, drawn at random; none is pruned before so many.", lower_bound=1
)
PRUNER_WARMUP = flags.DEFINE_integer(
    "pruner_warmup",
    None,
    "Epochs of its first seed before a trial can be pruned; half of --epochs by default, since the best settings are "
    "often slow at first.",
    lower_bound=0,
)
SWEEP_SEED = flags.DEFINE_integer("sweep_seed", 0, "Seed of the draws.", lower_bound=0)
WORKERS = cli.may_change(flags.DEFINE_integer("workers", 1, "Processes that run trials.", lower_bound=1))
GPUS = cli.may_change(flags.DEFINE_list("gpus", [], "One per worker, as in 0,1; all see all by default."))

METRIC = "accuracy"  # larger is better
SET_BY_SWEEP = ("workdir", "seeds", "split")


class Sweep(NamedTuple):
    """What is swept."""

    experiment: Any  # the module
    space: spaces.Space
    arm: str
    workdir: Path
    settings: dict[str, Any]

    def study(self) -> optuna.Study:
        """The trials, as every process sees them."""
        warmup = PRUNER_WARMUP.value
        if warmup is None:  # the whole first seed where no flag says how many epochs it has
            warmup = -(-flags.FLAGS.epochs // 2) if "epochs" in flags.FLAGS else trials.SEED_STEPS
        pruning = {"random_trials": RANDOM_TRIALS.value, "pruner_warmup": warmup}
        return trials.open_study(self.workdir, self.settings, **pruning)


def main() -> dict[str, Any] | None:
    """Checks the flags, runs the trials that are missing, and measures the best settings beside the default."""
    start = time.monotonic()
    sweep = checked_flags()
    task = cli.my_task("experiments.sweep")
    if task is not None:
        return conclude(sweep, start) if task == "conclude" else search(sweep, task)
    if WORKERS.value > 1:
        jax.config.update("jax_platforms", "cpu")  # the devices are for the workers
    elif GPUS.value:
        os.environ["CUDA_VISIBLE_DEVICES"] = GPUS.value[0]
    cli.claim_workdir(str(sweep.workdir), sweep.settings | data_of(sweep.experiment))
    trials.unlock_journal(sweep.workdir)
    study = sweep.study()
    left = trials.unfinished(study)
    if WORKERS.value == 1:
        search(sweep, left)
        return conclude(sweep, start)
    side_by_side(sweep, study, [left[k :: WORKERS.value] for k in range(WORKERS.value)])
    cli.in_children("experiments.sweep", ["conclude"], gpus=GPUS.value)
    return None


# What is swept.


def import_experiment(argv: Sequence[str]) -> None:
    """Imports the experiment that the arguments name, before they are parsed, since it defines flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--experiment", "-experiment", default=EXPERIMENT.default)
    load(parser.parse_known_args(list(argv[1:]))[0].experiment)


def load(name: str) -> Any:
    """The experiment's module."""
    module = name if "." in name else f"experiments.{name}"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        known = [path.stem for path in Path(__file__).parent.parent.glob("[a-z]*.py")]
        raise ValueError(f"--experiment={name}: there is no module {module}.{did_you_mean(name, known)}")
    try:
        return importlib.import_module(module)
    except flags.DuplicateFlagError as error:
        raise ValueError(f"--experiment={name} and the sweep have a flag in common: {error}") from error


def checked_flags() -> Sweep:
    """What is swept, once all flags make sense together, for every bound and choice of the space."""
    name, given = EXPERIMENT.value, flags.FLAGS
    experiment = load(name)
    its = cli.flags_of(experiment.__name__)
    if missing := [f"--{flag}" for flag in SET_BY_SWEEP if flag not in its]:
        raise ValueError(f"--experiment={name} has no {' and no '.join(missing)}, which a sweep sets.")
    for flag, instead in (("split", "trials are measured on validation"), ("pod", "use --workers")):
        if flag in its and not given[flag].using_default_value:
            raise ValueError(f"--{flag} is not for a sweep: {instead}.")
    if common := sorted(set(final_seeds()) & set(given.seeds)):
        raise ValueError(
            f"--final_seeds and --seeds have some in common ({', '.join(common)}); what was chosen on a seed looks too "
            "good on it."
        )
    if GPUS.value and len(GPUS.value) != WORKERS.value:
        raise ValueError(f"--gpus={','.join(GPUS.value)} must be one for each of --workers={WORKERS.value}.")
    cli.parse_seeds(final_seeds(), "final_seeds")
    check(experiment)
    settings = cli.settings(experiment.__name__)
    space = spaces.read(SPACE.value, settings.keys() - {*SET_BY_SWEEP, "arms"})
    arm = tuned_arm()
    with spaces.flags_set({"arms": arm} if "arms" in its else {}):  # as trials are run
        check(experiment)
        spaces.check(space, lambda: check(experiment))
    settings |= cli.settings(__name__) | ({"arms": given.arms} if "arms" in its else {})
    return Sweep(experiment, space, arm, Path(given.workdir), settings)


def check(experiment: Any) -> None:
    """Raises what the experiment says against its flags: its dataclasses, and ``checked_flags`` if it has that."""
    for holder in vars(experiment).values():
        if isinstance(holder, cli.Flags):
            _ = holder.value
    getattr(experiment, "checked_flags", lambda: None)()


def tuned_arm() -> str:
    """The arm of --arm, or the last of --arms."""
    arms = list(flags.FLAGS.arms) if "arms" in flags.FLAGS else []
    arm = ARM.value or (arms[-1] if arms else None)
    if arm is None or (arms and arm not in arms):
        raise ValueError(f"--arm={arm} must be one of {', '.join(arms) or 'those that the experiment runs'}.")
    return arm


def final_seeds() -> list[str]:
    """Seeds of the comparison on the test split."""
    return FINAL_SEEDS.value or [str(100 + k) for k in range(len(flags.FLAGS.seeds))]


def data_of(experiment: Any) -> dict[str, Any]:
    """The fingerprint of all the data that trials draw from, so that a sweep does not go on with others."""
    for holder in vars(experiment).values():
        if isinstance(holder, cli.Flags) and issubclass(holder.kind, cli.Data):
            return {"data": holder.value.load(num_train=0).fingerprint}
    return {}


# Trials, and the end.


def run(
    sweep: Sweep,
    name: str,
    values: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    *,
    all_arms: bool = False,
) -> dict[str, Any]:
    """Runs the tuned arm, or ``all_arms``, in ``workdir/name`` with these flags; its output goes into a log beside."""
    directory, its = sweep.workdir / name, cli.flags_of(sweep.experiment.__name__)
    more: dict[str, Any] = {"workdir": directory}
    if "arms" in its and not all_arms:
        more["arms"] = sweep.arm
    if "shared_cache" in its and flags.FLAGS.shared_cache is None:
        more["shared_cache"] = sweep.workdir / "shared"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        spaces.flags_set({**values, **more}),
        cli.released(),
        open(f"{directory}.log", "a", encoding="utf-8", errors="replace") as log,
        contextlib.redirect_stdout(log),
    ):
        try:
            return sweep.experiment.main(callbacks=callbacks)
        except train.NonFiniteLoss as error:
            raise train.NonFiniteLoss(f"{name}: {error}") from error
        finally:
            jax.clear_caches()  # 11 MiB of programs that no other run can use; those on disk stay


def search(sweep: Sweep, unfinished: Sequence[int]) -> None:
    """Runs trials until there are as many as were asked for, the unfinished ones first."""
    study, first = sweep.study(), list(unfinished)
    draws: dict[str, Any] = {"num_trials": NUM_TRIALS.value, "random_trials": RANDOM_TRIALS.value}
    draws |= {"seed": SWEEP_SEED.value, "lock": sweep.workdir / "next.lock"}
    while (trial := trials.next_trial(study, sweep.space, unfinished=first, **draws)) is not None:
        attempt(sweep, study, trial)
        cli.say(trials.in_a_line(study.trials[trial.number]))


def attempt(sweep: Sweep, study: optuna.Study, trial: optuna.Trial) -> None:
    """Runs one trial to its end: finished, pruned, or failed by a loss that is not finite."""
    values, start = spaces.draw(trial, sweep.space), time.monotonic()
    known = study.trials[trial.number].intermediate_values
    reporter = trials.Reporter(trial, sweep.arm, f"validation_{METRIC}", known)
    value, state = None, TrialState.COMPLETE
    try:
        result = run(sweep, f"trials/{trial.number}", {**values, "split": "validation"}, callbacks=[reporter])
        if sweep.arm not in result["arms"]:
            raise ValueError(f"the run has no --arm={sweep.arm}, but {', '.join(result['arms'])}.")
        value = statistics.fmean(result["arms"][sweep.arm][METRIC])
        trial.set_user_attr("seeds", result["seeds"])
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except train.NonFiniteLoss as error:
        state = TrialState.FAIL
        trial.set_user_attr("reason", str(error))
    except ValueError as error:
        raise ValueError(f"trial {trial.number} ({spaces.in_words(values)}): {error}") from error
    trial.set_user_attr("seconds", round(time.monotonic() - start, 1))
    study.tell(trial, value, state)


def side_by_side(sweep: Sweep, study: optuna.Study, tasks: Sequence[list[int]]) -> None:
    """Lets one worker per task run trials, and shows on the terminal which have ended."""
    logs = [sweep.workdir / f"worker_{number}.log" for number in range(len(tasks))]
    with bar("trials", total=NUM_TRIALS.value, unit="trial") as meter:
        shown = trials.ended(study)
        meter.update(len(shown))

        def show() -> None:
            for trial in trials.ended(study)[len(shown) :]:
                cli.say(trials.in_a_line(trial))
                shown.append(trial)
                meter.update()

        cli.in_children("experiments.sweep", tasks, gpus=GPUS.value, logs=logs, meanwhile=show)
        show()


def conclude(sweep: Sweep, start: float) -> dict[str, Any]:
    """Runs the best settings and the default ones on new seeds and the test split, and writes the result."""
    study = sweep.study()
    best = trials.best_of(study)
    words = spaces.in_words(best.params)
    cli.say(f"Best by validation is trial {best.number} ({words}); now it and the default on the test split.")
    final = {"split": "test", "seeds": ",".join(final_seeds())}
    runs = {
        "default": run(sweep, "final/default", final),
        "chosen": run(sweep, "final/chosen", {**best.params, **final}, all_arms=True),
    }
    arms = {name: found["arms"][sweep.arm] for name, found in runs.items()}
    seeds = {name: found["seeds"] for name, found in runs.items()}
    stored = {name: found.get("correct", {}) for name, found in runs.items()}
    answers = {name: own["arms"][sweep.arm] for name, own in stored.items() if own}
    correct = {"correct": {**stored["chosen"], "arms": answers}} if len(answers) == len(arms) else {}
    default = spaces.in_words({name: sweep.settings[name] for name in sweep.space})
    result = results.make(
        "sweep",
        question=f"Is {sweep.arm} in {EXPERIMENT.value} better with settings chosen on validation than with {default}?",
        flags=sweep.settings | as_run(sweep, runs["default"]),
        seeds=seeds["default"],
        arm_seeds={} if seeds["chosen"] == seeds["default"] else {"chosen": seeds["chosen"]},
        arms=arms,
        curves={name: found["curves"][sweep.arm] for name, found in runs.items() if found.get("curves")},
        examples=runs["chosen"].get("examples", {}),
        **correct,
        trials=[trials.as_record(trial) for trial in study.trials],
        trials_metric=f"validation_{METRIC}",
        notes=notes(study, best, seeds["default"])
        + [note for note in runs["default"].get("notes", []) if note in runs["chosen"].get("notes", [])],
        wall_clock_s=time.monotonic() - start,
        scaled_down=runs["chosen"]["scaled_down"],
    )
    if (test := report.compare(result, METRIC, "chosen", "default")) is not None:
        result["comparisons"] = [{"metric": METRIC, "a": "chosen", "b": "default", **test._asdict()}]
    publish(sweep.workdir, result, metrics=[metric for metric in TABLE if metric in arms["default"]])
    cli.say(f"results.json, figure.png and report.html are in {sweep.workdir}/, both runs in its final/.")
    return result


def as_run(sweep: Sweep, result: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment's flags as one of its runs records them, such as the network of a teacher that it loads."""
    chosen = {"arms", *SET_BY_SWEEP}
    return {k: v for k, v in result.get("flags", {}).items() if k in sweep.settings.keys() - chosen}


def notes(study: optuna.Study, best: FrozenTrial, seeds: Sequence[int]) -> list[str]:
    """How the choice was made, for the reader of the report."""
    outcomes = [trials.OUTCOMES[trial.state] for trial in study.trials]
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    return [
        f"Selection was on validation alone: trial {best.number} ({spaces.in_words(best.params)}) has the largest mean "
        f"{METRIC} there, {best.value or 0:.2%}, over seeds {', '.join(map(str, best.user_attrs['seeds']))}. The test "
        f"split was read once, after that, with seeds {', '.join(map(str, seeds))}.",
        f"{len(outcomes)} trials: {', '.join(f'{outcomes.count(o)} {o}' for o in trials.OUTCOMES.values())}.",
        *(f"Trial {trial.number} failed: {trial.user_attrs['reason']}" for trial in failed),
    ]


if __name__ == "__main__":
    cli.launch(main, before=import_experiment)
