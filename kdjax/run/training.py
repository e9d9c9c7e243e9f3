"""One training per call: its loop, its callbacks, its metrics, and what it leaves on disk."""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import checkpoints, data, evaluate, files, parallel
from kdjax import train as train_loop
from kdjax.callbacks import Callback, RunId
from kdjax.methods import Method
from kdjax.models import Network
from kdjax.recipe import Machine, Recipe
from kdjax.run import plan as plans
from kdjax.run.finished import HERE, Trained, metrics_of, save
from kdjax.teacher import TeacherSignal, TrainedNetwork

Init = Callable[[int, train_loop.TrainState], train_loop.TrainState]
"""``(seed, state) -> state`` that a run starts from."""


def train(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    *,
    teacher: TrainedNetwork | TeacherSignal | None = None,
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Trains a network and measures it on the test split.

    Args:
      network: of :func:`kdjax.models.from_linen`, ``from_nnx`` or ``from_equinox``.
      method: what it minimises; see :mod:`kdjax.methods`.
      dataset: after :func:`kdjax.data.split`.
      recipe: how it is trained.
      teacher: a trained network. It is asked in the step where the recipe augments images or there is no directory;
        otherwise once, and its answers are cached in the directory. Or a signal, of :func:`kdjax.teacher.answers`.
      seed: of initialisation and order.
      directory: of checkpoints and the finished network; None keeps nothing on disk.
      callbacks: what happens meanwhile; see :mod:`kdjax.callbacks`.

    Raises:
      ValueError: if these do not fit together, or the directory holds another run.
      kdjax.train.NonFiniteLoss: if a loss or weight becomes NaN or infinite.
    """
    signal = plans.signal_of(teacher, network, method, dataset, recipe, directory)
    trainer = make_trainer(network, method, dataset, recipe, teacher=signal)
    return trainer(seed, directory, callbacks=callbacks)


def make_trainer(
    network: Network,
    method: Method,
    dataset: data.Dataset,
    recipe: Recipe,
    *,
    teacher: TeacherSignal | None = None,
    machine: Machine = HERE,
    split: str = "test",
) -> Callable[..., Trained]:
    """Builds a function that trains one seed; its programs are compiled once for all seeds.

    Args:
      network: what to train.
      method: what it minimises.
      dataset: after :func:`kdjax.data.split`.
      recipe: how it is trained.
      teacher: of :func:`kdjax.teacher.answers`.
      machine: devices, steps per dispatch, and time between checkpoints.
      split: that the final metrics are measured on; with "validation" the test split is never read.

    Returns:
      ``(seed, directory=None, *, arm="student", callbacks=(), settings={}, init=None) -> Trained``. The directory ends
      with ``checkpoints/``, ``summary_SPLIT.json``, ``weights/`` and ``network.json``. A finished run is read back if
      these are whole and were written for the same arm, seed, network, method, recipe, data, teacher and ``settings``,
      which is whatever else decides its numbers, such as what ``init``, ``(seed, state) -> state``, starts it from.
    """
    plan = plans.make_plan(network, method, dataset, recipe, teacher, machine)
    program = _Program(
        plan,
        split,
        run=plans.compiled(plan, plans.make_run(plan)),
        initialise=plans.make_initialiser(plan),
        sums_on={name: plans.evaluator(plan, name) for name in {"validation", split}},
    )

    def trainer(
        seed: int,
        directory: str | os.PathLike[str] | None = None,
        *,
        arm: str = "student",
        callbacks: Sequence[Callback] = (),
        settings: Mapping[str, Any] | None = None,
        init: Init | None = None,
    ) -> Trained:
        start = time.monotonic()
        home = None if directory is None else Path(directory)
        identity = {"arm": arm, "seed": seed, **plan.identity, "settings": dict(settings or {})}
        state = program.initialise(seed) if init is None else init(seed, program.initialise(seed))
        fitted = _fit(program, RunId(arm, seed), state, home, identity, callbacks)
        found = _measured(program, fitted, home, identity)
        if home is not None:
            save(home, network, dataset, fitted.last, step=plan.steps, summary=found, identity=identity)
        sums = {name: np.asarray(value) for name, value in found["sums"].items()}
        return Trained(
            *(arm, seed, network, dataset.normalisation, fitted, found["metrics"], sums),
            seconds=time.monotonic() - start,
        )

    return trainer


class _Program(NamedTuple):
    """A plan and its compiled functions."""

    plan: plans.Plan
    split: str  # of the final metrics
    run: Callable[..., Any]
    initialise: Callable[[int], train_loop.TrainState]
    sums_on: Mapping[str, Callable[..., dict[str, Any]]]  # by split


def _fit(
    program: _Program,
    run: RunId,
    state: train_loop.TrainState,
    home: Path | None,
    identity: Mapping[str, Any],
    callbacks: Sequence[Callback],
) -> train_loop.Fitted:
    """Trains one seed, or reads it back, and calls its callbacks."""
    plan, feed = program.plan, plans.feed(program.plan, run.seed)
    watch, last = _Watch(run, callbacks, feed.steps_per_epoch), {}

    def validate(params, model_state):
        scores = evaluate.summarise(program.sums_on["validation"](params, model_state))
        return {name: scores[name] for name in ("accuracy", "loss")}

    for callback in callbacks:
        callback.on_start(run, plan.steps)
    try:
        fitted = train_loop.fit(
            program.run,
            parallel.replicate(state, plan.devices),
            feed,
            epochs=plan.recipe.epochs,
            evaluate=validate,
            evaluate_every=plan.recipe.evaluate_every,
            weights_of=functools.partial(plans.weights_of, plan),
            directory=None if home is None else home / "checkpoints",
            identity=identity,
            save_every_s=plan.machine.save_every_s,
            between=watch.between,
            progress=watch.progress,
        )
        last = fitted.history[-1]
        watch.epoch(last)
    finally:
        for callback in callbacks:
            callback.on_end(run, last)
    return fitted


class _Watch:
    """Calls the callbacks of a run after each dispatch, and once after each epoch."""

    def __init__(self, run: RunId, callbacks: Sequence[Callback], steps_per_epoch: int):
        self._run, self._callbacks, self._steps_per_epoch = run, callbacks, steps_per_epoch
        self._newest = 0.0  # epoch that was seen

    def between(self, state: train_loop.TrainState, step: int) -> train_loop.TrainState:
        for callback in self._callbacks:
            state = callback.on_dispatch(self._run, state, step)
        return state

    def progress(self, done: int, record: Mapping[str, Any]) -> None:
        for callback in self._callbacks:
            callback.on_progress(self._run, done, record)
        self.epoch(record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        if record and record["epoch"] > self._newest:
            self._newest = record["epoch"]
            for callback in self._callbacks:
                callback.on_epoch(self._run, {**record, "step": self._newest * self._steps_per_epoch})


def _measured(
    program: _Program, fitted: train_loop.Fitted, home: Path | None, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Totals and metrics of a fitted network, which are read back where they were measured before."""
    split = program.split

    def measure() -> dict[str, Any]:
        sums, best = (program.sums_on[split](*weights) for weights in (fitted.last, fitted.best))
        return {
            "split": split,
            "metrics": metrics_of(sums, best),
            "sums": {name: np.asarray(value).tolist() for name, value in sums.items()},
            "best_epoch": fitted.best_epoch,
            "history": fitted.history,
        }

    if home is None:
        return measure()
    return files.cached(
        home / f"summary_{split}.json",  # a sweep measures one teacher on both splits
        measure,
        identity={**identity, "split": split, "weights": checkpoints.digest_tree(fitted.last)},
        writes=jax.process_index() == 0,
    )
