"""The trials of a sweep in Optuna's journal: drawn, reported on, taken up again, and read.

Not imported by ``experiments.common``, so that only a sweep needs Optuna.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from experiments.common import spaces
from experiments.common.launching import alone
from kdjax import files

OUTCOMES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
SEED_STEPS = 10**6  # Optuna's step is the epoch, and this much more for each seed: above any number of epochs


class Journal(BaseJournalBackend):
    """Optuna's journal as lines that each hold a digest of the sweep, of all lines before, and of their own content.

    A line that was changed, moved or left out, or is another sweep's, is thus noticed whenever the file is read.

    Args:
      path: of the file, which any number of processes may have open.
      sweep: digest of what is swept.
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
            digest, intact = "", False
        if not intact:
            raise ValueError(
                f"{self._path}, line {len(self._logs) + 1}, was changed or is of another sweep. Delete that file and "
                f"{self._path.parent / 'trials'}/, then start the same command again; teachers and columns in "
                "shared/ are kept."
            )
        self._digest = digest
        return content["log"]


def open_study(
    workdir: Path, settings: Mapping[str, Any], *, random_trials: int, spared_epochs: int
) -> optuna.Study:
    """The study of a sweep, which any number of processes may have open.

    Args:
      workdir: of the sweep.
      settings: of the sweep, to which its journal belongs.
      random_trials: finished trials that pruning needs to compare with.
      spared_epochs: epochs before which no trial is pruned.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = Journal(workdir / "journal.log", files.digest_json(dict(settings)))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(random_trials, n_warmup_steps=spared_epochs),
    )


def unlock_journal(workdir: Path) -> None:
    """Removes the lock that a killed process may have left, while no other process has the study open."""
    Path(f"{workdir / 'journal.log'}.lock").unlink(missing_ok=True)


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
