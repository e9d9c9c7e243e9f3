"""The trials of a sweep in Optuna's journal: drawn, reported on, taken up again, and read.

Not imported by ``experiments.common``, so that only a sweep needs Optuna.
"""

import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from experiments.common import spaces
from experiments.common.launching import alone

OUTCOMES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
SEED_STEPS = 10**6  # Optuna's step is the epoch, and this much more for each seed: above any number of epochs


def open_study(workdir: Path, *, random_trials: int, spared_epochs: int) -> optuna.Study:
    """The study of a sweep, which any number of processes may have open.

    Args:
      workdir: of the sweep.
      random_trials: finished trials that pruning needs to compare with.
      spared_epochs: epochs before which no trial is pruned.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = str((workdir / "journal.log").absolute())
    backend = JournalFileBackend(path, lock_obj=JournalFileOpenLock(path))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(random_trials, n_warmup_steps=spared_epochs),
    )


def mend_journal(workdir: Path) -> None:
    """Removes what a killed process may have left of a write, while no other process has the study open."""
    path = workdir / "journal.log"
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def next_trial(
    study: optuna.Study,
    space: spaces.Space,
    *,
    num_trials: int,
    random_trials: int,
    seed: int,
    unfinished: list[int],
    lock: Path,
) -> optuna.Trial | None:
    """A trial that was left unfinished, with the values it had; else a new one; None when there are enough.

    Args:
      study: of the sweep.
      space: to draw from.
      num_trials: trials in total.
      random_trials: the first ones, drawn without regard to others.
      seed: of all draws.
      unfinished: numbers of trials to take up first; the one taken is removed.
      lock: file by which workers wait for each other, so that none draws as another, or one trial too many.
    """
    with alone(lock):
        there = study.trials
        number = unfinished.pop(0) if unfinished else len(there)
        if number == len(there) >= num_trials:
            return None
        # Seeded by the number, so that a sweep which was stopped draws what it would have drawn.
        own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=random_trials, seed=own_seed)
        trial = optuna.Trial(study, there[number]._trial_id) if number < len(there) else study.ask()
        spaces.draw(trial, space)
        return trial


def reporter(
    trial: optuna.Trial, arm: str, metric: str, known: Mapping[int, float]
) -> Callable[[str, Mapping[str, float]], None]:
    """A watcher of training that tells Optuna of every epoch, and ends the trial if Optuna says it leads nowhere.

    What is told is the mean, over the seeds so far, of the newest validation metric: at the end, the trial's value.

    Args:
      trial: under way.
      arm: whose trainings count.
      metric: on validation.
      known: what another process has told of this trial before, by step.
    """
    newest: dict[str, float] = {}

    def watch(label: str, record: Mapping[str, float]) -> None:
        if not label.startswith(f"{arm}, seed ") or metric not in record:
            return
        newest[label] = record[metric]
        step = (len(newest) - 1) * SEED_STEPS + int(record["epoch"])
        if step not in known:
            trial.report(statistics.fmean(newest.values()), step)
        if trial.should_prune():
            raise optuna.TrialPruned

    return watch


def unfinished(study: optuna.Study) -> list[int]:
    """Numbers of the trials that are not over."""
    return [trial.number for trial in study.trials if not trial.state.is_finished()]


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that are over, in the order in which they ended."""
    over = [trial for trial in study.trials if trial.state.is_finished()]
    return sorted(over, key=lambda trial: (trial.datetime_complete, trial.number))


def best_of(study: optuna.Study) -> FrozenTrial:
    """The finished trial with the largest value; the first of equals."""
    finished = study.get_trials(states=(TrialState.COMPLETE,))
    if not finished:
        reasons = [trial.user_attrs["reason"] for trial in study.trials if "reason" in trial.user_attrs]
        raise ValueError(f"no trial finished, so there is nothing to choose; narrow --space: {reasons[0]}")
    return max(finished, key=lambda trial: (trial.value, -trial.number))


def in_a_line(trial: FrozenTrial) -> str:
    """What came of a trial, for the terminal."""
    outcome, attributes = OUTCOMES[trial.state], trial.user_attrs
    said = attributes.get("reason") or f"validation {trial.value or 0:.2%}"
    settings = spaces.in_words(trial.params)
    return f"trial {trial.number} ({settings}): {outcome}, {said} ({attributes['seconds']:.0f} s)"


def as_record(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as results have it."""
    return {
        "number": trial.number,
        "settings": {name: spaces.as_setting(name, value) for name, value in trial.params.items()},
        "outcome": OUTCOMES[trial.state],
        "value": trial.value,
        "seconds": trial.user_attrs["seconds"],
    }
