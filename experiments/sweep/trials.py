"""The trials of a sweep in Optuna's journal: drawn, reported on, taken up again, and read."""

import json
import os
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from experiments.sweep import spaces
from kdjax import files
from kdjax.callbacks import Callback, RunId

OUTCOMES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
SEED_STEPS = 10**6  # Optuna's step is the epoch, and this much more for each seed: above any number of epochs


class Journal(BaseJournalBackend):
    """Optuna's journal, each line with a digest of the sweep, of all lines before it, and of its own content.

    So a line that was changed, moved, left out, or written by another sweep is noticed when the file is read.

    Args:
      path: of the file, which any number of processes may have open.
      sweep: digest of the sweep's settings.
    """

    def __init__(self, path: Path, sweep: str):
        self._path, self._digest = path, sweep  # of the lines read so far
        self._logs: list[dict[str, Any]] = []
        self._end = 0  # of those lines in the file
        self._lock = JournalFileOpenLock(str(path.absolute()))
        path.touch()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yields the logs from a number on; a ValueError names the first line that does not fit."""
        with open(self._path, "rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):  # another process is writing it
                    break
                self._logs.append(self._checked(line))
                self._end += len(line)
        return iter(self._logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds lines, in place of one that a killed process has left unfinished."""
        self._lock.acquire()
        try:
            self.read_logs(0)
            digest, lines = self._digest, b""
            for log in map(files.json_ready, logs):
                digest = files.digest_json([digest, log])
                lines += json.dumps({"sha256": digest, "log": log}).encode() + b"\n"
            with open(self._path, "r+b") as file:
                file.truncate(self._end)
                file.seek(self._end)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._lock.release()

    def _checked(self, line: bytes) -> dict[str, Any]:
        try:
            content = json.loads(line)
            digest = files.digest_json([self._digest, content["log"]])
            intact = digest == content["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            intact = False
        if not intact:
            raise ValueError(
                f"{self._path}, line {len(self._logs) + 1}, was changed or is of another sweep. Delete that file and "
                f"{self._path.parent / 'trials'}/, then start the same command again; teachers and cached "
                "answers in shared/ are kept."
            )
        self._digest = digest
        return content["log"]


def open_study(
    workdir: Path, settings: Mapping[str, Any], *, random_trials: int, pruner_warmup: int
) -> optuna.Study:
    """The study of a sweep with these settings, which any number of processes may have open.

    Until ``random_trials`` have finished, and for the first ``pruner_warmup`` epochs of a trial, none is pruned.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = Journal(workdir / "journal.log", files.digest_json(dict(settings)))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(random_trials, n_warmup_steps=pruner_warmup),
    )


def unlock_journal(workdir: Path) -> None:
    """Removes the lock that a killed process may have left, while no other process has the study open."""
    Path(f"{workdir / 'journal.log'}.lock").unlink(missing_ok=True)


def next_trial(
    study: optuna.Study,
    space: spaces.Space,
    *,
    unfinished: list[int],
    num_trials: int,
    random_trials: int,
    seed: int,
    lock: Path,
) -> optuna.Trial | None:
    """A trial that was left unfinished, with the values it had; else a new one; None when there are enough.

    Args:
      study: of the sweep.
      space: to draw from.
      unfinished: numbers of the trials to take up first; the one taken is removed.
      num_trials: in total.
      random_trials: the first ones, drawn at random.
      seed: of all draws.
      lock: file by which workers wait for each other, so that no two draw the same, or one trial too many.
    """
    with files.lock(lock):
        there = study.trials
        number = unfinished.pop(0) if unfinished else len(there)
        if number == len(there) >= num_trials:
            return None
        # Seeded by the number, so that a sweep that was stopped draws what it would have drawn.
        own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=random_trials, seed=own_seed)
        trial = optuna.Trial(study, there[number]._trial_id) if number < len(there) else study.ask()
        spaces.draw(trial, space)
        return trial


class Reporter(Callback):
    """A callback that reports every epoch of the tuned arm to Optuna, and ends the trial if Optuna prunes it.

    Reported is the mean, over the seeds so far, of the newest validation metric: at the end, the trial's value.

    Args:
      trial: under way.
      arm: whose trainings count.
      metric: on validation.
      known: what another process has reported of this trial before, by step.
    """

    def __init__(self, trial: optuna.Trial, arm: str, metric: str, known: Mapping[int, float]):
        self._trial, self._arm, self._metric, self._known = trial, arm, metric, known
        self._newest: dict[int, float] = {}  # seed → metric

    def on_epoch(self, run: RunId, record: Mapping[str, Any]) -> None:
        """Reports the record of an epoch."""
        if run.arm != self._arm or self._metric not in record:
            return
        self._newest[run.seed] = record[self._metric]
        step = (len(self._newest) - 1) * SEED_STEPS + int(record["epoch"])
        if step not in self._known:
            self._trial.report(statistics.fmean(self._newest.values()), step)
        if self._trial.should_prune():
            raise optuna.TrialPruned


def unfinished(study: optuna.Study) -> list[int]:
    """Numbers of the trials that have not ended."""
    return [trial.number for trial in study.trials if not trial.state.is_finished()]


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have ended, in that order."""
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
    """One line on a trial, for the terminal."""
    said = trial.user_attrs.get("reason") or f"validation {trial.value or 0:.2%}"
    name = f"trial {trial.number} ({spaces.in_words(trial.params)})"
    return f"{name}: {OUTCOMES[trial.state]}, {said} ({trial.user_attrs['seconds']:.0f} s)"


def as_record(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as results have it."""
    return {
        "number": trial.number,
        "settings": {name: spaces.as_setting(name, value) for name, value in trial.params.items()},
        "outcome": OUTCOMES[trial.state],
        "value": trial.value,
        "seconds": trial.user_attrs["seconds"],
    }
