"""The train step, and the loop around it.

The step is a function of a state and a batch and knows no loss, network or optimizer: it is handed an objective, an
apply function and a transformation. Wrap it yourself (``jax.jit``), or let :func:`make_run` and
:func:`kdjax.parallel.data_parallel` put data selection in front of it and devices around it. :func:`fit` repeats it
until the epochs are done, and can be killed at any moment and started again without a bit of difference.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, UInt32

from kdjax import checkpoints
from kdjax.data.batches import Feed
from kdjax.types import ApplyFn, Batch, Metrics, ModelState, Params

_DATA, _NETWORK = 0, 1  # what a step's key is folded with for either use


class TrainState(NamedTuple):
    """All that a run consists of; its randomness is ``step`` folded into ``seed``."""

    step: Int[Array, ""]
    params: Params
    model_state: ModelState
    opt_state: optax.OptState
    seed: UInt32[Array, ""]


Objective = Callable[[Any, Batch], Mapping[str, jax.Array]]
"""``(outputs, batch) -> {name: scalar}``, weights included: the loss is the sum of the terms."""


def init_state(
    params: Params, model_state: ModelState, tx: optax.GradientTransformation, *, seed: int
) -> TrainState:
    """The state before the first step, as fresh arrays that may be donated."""
    params, model_state = jax.tree.map(jnp.array, (params, dict(model_state)))
    return TrainState(
        jnp.zeros((), jnp.int32), params, model_state, tx.init(params), jnp.asarray(seed, jnp.uint32)
    )


def make_train_step(
    apply_fn: ApplyFn,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    companions: ApplyFn | None = None,
    record: Callable[[Any, Any], Mapping[str, Array]] = lambda before, after: {},
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds ``(state, batch) -> (state, metrics)``; jit or pmap it yourself.

    Args:
      apply_fn: the student.
      objective: the terms of the loss from the student's outputs and the batch. ``batch["step"]``, which is added
        here, counts the steps done, for weights that follow a schedule.
      tx: updates the parameters; receives optax's extra arguments ``value``, ``grad`` and ``value_fn``, and
        ``certify_fn``, the loss on ``batch["second"]``, where there is such a batch.
      companions: further terms, that have parameters or a state of their own (:mod:`kdjax.models.companions`): called
        with ``(outputs, batch)`` as inputs, it returns terms in place of outputs. The state's ``params`` and
        ``model_state`` are then ``{"student": ..., "companions": ...}``; :func:`student_of` takes the student out.
      record: further metrics, from the optimizer's state before and after the step.
      axis_name: of the mapped axis whose devices hold parts of the batch; gradients, metrics and statistics are
        averaged over it.

    Returns:
      The step. Its metrics are the objective's terms, their sum ``loss``, and ``grad_norm``.
    """
    tx = optax.with_extra_args_support(tx)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = _step_key(state, _NETWORK)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        second: Any = batch.get("second")
        batch = {name: value for name, value in batch.items() if name != "second"} | {"step": state.step}

        def loss(params, batch=batch):
            if companions is None:
                outputs, model_state = apply_fn(
                    params, state.model_state, batch["image"], train=True, key=key
                )
                terms = dict(objective(outputs, batch))
            else:
                model_state = dict(state.model_state)
                outputs, model_state["student"] = apply_fn(
                    params["student"], model_state["student"], batch["image"], train=True, key=key
                )
                more, model_state["companions"] = companions(
                    params["companions"],
                    model_state["companions"],
                    (outputs, batch),
                    train=True,
                    key=jax.random.fold_in(key, 1),
                )
                terms = {**objective(outputs, batch), **more}
            return sum(terms.values()), (terms, model_state)

        (value, (terms, model_state)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        if axis_name is not None:
            grads, value, terms, model_state = jax.lax.pmean((grads, value, terms, model_state), axis_name)
        extra = {"value": value, "grad": grads, "value_fn": lambda params: loss(params)[0]}
        if second is not None:
            extra["certify_fn"] = lambda params: loss(params, {**second, "step": state.step})[0]
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        metrics = {**terms, "loss": value, "grad_norm": optax.tree.norm(grads)}
        metrics |= record(state.opt_state, opt_state)
        return TrainState(state.step + 1, params, model_state, opt_state, state.seed), metrics

    return train_step


def make_run(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    make_batch: Callable[[Any, Array, jax.Array], Batch],
    *,
    second: bool = False,
) -> Callable[[TrainState, Any, Array], tuple[TrainState, Metrics]]:
    """Puts the choice and augmentation of a batch in front of the step, for one or many steps in one dispatch.

    Args:
      train_step: as built by :func:`make_train_step`.
      make_batch: ``(arrays, index, key) -> batch``: picks rows of the resident arrays and augments them.
      second: whether each batch also holds that of the next step, as ``batch["second"]``, on which a transformation
        may certify what it found on the first. The last step of a dispatch has that of the first.

    Returns:
      ``(state, arrays, index[batch, steps]) -> (state, metrics)`` with one metric per step. With ``second`` it raises a
      ValueError for a dispatch of one step.
    """

    def run(state, arrays, index):
        if second and index.shape[1] == 1:
            raise ValueError("a second batch is that of another step: use two steps per dispatch, or more.")

        def step(state, rows):
            key = _step_key(state, _DATA)
            batch = make_batch(arrays, rows[0], key)
            if second:
                batch = {**batch, "second": make_batch(arrays, rows[1], jax.random.fold_in(key, 1))}
            return train_step(state, batch)

        rows = jnp.stack([index.T, jnp.roll(index.T, -1, 0)] if second else [index.T], 1)
        if index.shape[1] == 1:  # no loop around a single step: XLA's CPU convolutions are slow inside one
            state, metrics = step(state, rows[0])
            return state, jax.tree.map(lambda m: m[None], metrics)
        return jax.lax.scan(step, state, rows)

    return run


def _step_key(state: TrainState, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.step), purpose)


class Weights(NamedTuple):
    """What is evaluated and exported: parameters and statistics, without the optimizer."""

    params: Params
    model_state: ModelState


def weights_of(state: TrainState) -> Weights:
    """The weights of a student that is trained alone."""
    return Weights(state.params, state.model_state)


def student_of(state: TrainState) -> Weights:
    """The weights of a student that is trained with companions."""
    return Weights(state.params["student"], state.model_state["student"])


class Fitted(NamedTuple):
    """Outcome of :func:`fit`."""

    last: Weights
    best: Weights
    best_epoch: int
    history: list[
        dict[str, float]
    ]  # one record per epoch: mean training terms, and what was evaluated after it


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite; the message says when, and what to do."""


class _Position(NamedTuple):
    """The host's side of a run: everything beside the arrays that a resumed run continues from.

    Its numbers are lists with one per training where :mod:`kdjax.many` runs several at once.
    """

    history: list[dict[str, float]]
    sums: dict[str, Any]  # of the unfinished epoch's metrics
    best_value: Any  # None before the first evaluation
    best_epoch: Any


def fit(
    run: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    feed: Feed,
    *,
    epochs: int,
    evaluate: Callable[[Params, ModelState], dict[str, float]] | None = None,
    evaluate_every: int = 1,
    monitor: str = "accuracy",
    weights_of: Callable[[TrainState], Weights] = weights_of,
    directory: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    save_every_s: float = 60.0,
    between: Callable[[TrainState, int], TrainState] = lambda state, step: state,
    progress: Callable[[int, Mapping[str, float]], None] = lambda steps, record: None,
) -> Fitted:
    """Trains for a number of epochs, keeping the last weights and the best by validation.

    Metrics are read one dispatch late, so that the device never waits for the host.

    Args:
      run: ``(state, *feed.at(step)) -> (state, metrics)`` with metrics stacked over the steps of the dispatch. It may
        donate the state. For several trainings at once, whose metrics are ``[steps, trainings]``, call
        :func:`kdjax.many.fit` instead.
      state: to start from, if ``directory`` holds nothing newer.
      feed: the arguments of every dispatch as a function of the step that it starts at.
      epochs: to train in total, those before a resumption included.
      evaluate: called with the parameters and statistics on the validation split; larger ``monitor`` is better.
      evaluate_every: epochs between evaluations; the last epoch always has one.
      monitor: the metric that chooses the best weights; the first of equals stays. Without ``evaluate`` the best
        weights are the last.
      weights_of: what of the state to evaluate and keep, such as :func:`student_of`, or an average that the optimizer
        keeps.
      directory: of this run's checkpoints; None keeps nothing on disk. A run killed at any moment and started again
        with the same arguments ends bitwise equal to one that was not.
      identity: what the run is made from and which one it is, as JSON: data (:func:`kdjax.data.fingerprint`),
        settings, arm, seed. Checkpoints in ``directory`` of another identity are refused.
      save_every_s: least seconds between two checkpoints; one is also written at the end and on SIGTERM.
      between: called after each dispatch with the state and the steps done, returns the state to go on with. What is
        slow inside compiled loops, such as convolutions in ``jax.lax.cond`` on a CPU, is done here now and then.
      progress: called after each dispatch with the number of its steps and the newest epoch's record.

    Returns:
      The last and the best weights, and one record per epoch.

    Raises:
      NonFiniteLoss: if a loss is NaN or infinite, before anything of it is saved.
      SystemExit: with code 0, after saving, if the process received SIGTERM.
    """
    best = _copy(weights_of(state))
    position = _Position([], {}, None, 0)
    if directory is not None:
        state, best, position = _restored(directory, state, best, position, identity)
    step, end, last_save = int(np.ravel(state.step)[0]), epochs * feed.steps_per_epoch, time.monotonic()
    unread: tuple[int, Metrics] | None = None  # of the newest dispatch: the step after it, and its metrics

    with _sigterm() as stop_requested:
        while step < end:
            state, metrics = run(state, *feed.at(step))
            state = between(state, step + len(metrics["loss"]))
            position, unread = _read(position, unread), (step + len(metrics["loss"]), metrics)
            steps, step = unread[0] - step, unread[0]
            epoch, rest = divmod(step, feed.steps_per_epoch)
            if rest == 0:
                position, unread = _read(position, unread), None
                record = {
                    name: _number(np.asarray(total) / feed.steps_per_epoch)
                    for name, total in position.sums.items()
                }
                if evaluate is not None and (epoch % evaluate_every == 0 or step == end):
                    weights = weights_of(state)
                    scores = evaluate(*weights)
                    record |= {f"validation_{name}": _number(value) for name, value in scores.items()}
                    position, best = _with_best(position, best, weights, scores[monitor], epoch)
                history = [*position.history, {"epoch": float(epoch), **record}]
                position = position._replace(history=history, sums={})
            progress(steps, position.history[-1] if position.history else {})
            stop = stop_requested(step)
            if directory is not None and (stop or step == end or time.monotonic() - last_save > save_every_s):
                position, unread = _read(position, unread), None
                checkpoints.save(
                    directory,
                    step,
                    {"state": state, "best": best},
                    meta=position._asdict(),
                    identity=identity,
                )
                last_save = time.monotonic()
            if stop:
                raise SystemExit(0)
    last = weights_of(state)
    best_epoch = epochs if evaluate is None else position.best_epoch
    return Fitted(last, last if evaluate is None else best, best_epoch, position.history)


def _read(position: _Position, unread: tuple[int, Metrics] | None) -> _Position:
    """Adds a dispatch's metrics to the sums of its epoch; this is where the host waits for the device."""
    if unread is None:
        return position
    step, metrics = unread
    values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    bad = ~np.isfinite(values["loss"])
    if bad.any(axis=0).all():  # of several trainings none is left
        first = tuple(np.argwhere(bad)[0])
        at = step - len(bad) + int(first[0])
        terms = ", ".join(f"{name} {value[first]:.4g}" for name, value in sorted(values.items()))
        raise NonFiniteLoss(
            f"the loss is not finite at step {at} ({terms}); lower the learning rate, clip the gradients "
            "(optax.clip_by_global_norm), or look for NaN in the inputs. Nothing after the last checkpoint was kept."
        )
    sums = {
        name: _number(np.add(position.sums.get(name, 0.0), _total(value))) for name, value in values.items()
    }
    return position._replace(sums=sums)


def _total(values: np.ndarray) -> Any:
    if values.ndim == 1:
        return math.fsum(values)
    with np.errstate(invalid="ignore"):  # of a training that has diverged
        return values.sum(axis=0)


def _number(value: Any) -> Any:
    """A float, or a list with one per training: what JSON can hold."""
    return np.asarray(value).tolist()


def _with_best(
    position: _Position, best: Weights, weights: Weights, score: Any, epoch: int
) -> tuple[_Position, Weights]:
    """Takes over the weights if they are better; of several trainings, each by itself."""
    score = np.asarray(score)
    held = score if position.best_value is None else np.asarray(position.best_value)
    better = np.full(score.shape, True) if position.best_value is None else score > held
    if better.all():
        best = _copy(weights)
    elif better.any():

        def choose(new, old):
            return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        best = jax.tree.map(choose, weights, best)
    return position._replace(
        best_value=_number(np.where(better, score, held)),
        best_epoch=_number(np.where(better, epoch, position.best_epoch)),
    ), best


def _copy(weights: Weights) -> Weights:
    return jax.tree.map(jnp.copy, weights)  # since the state's own arrays may be donated to the next step


def _restored(directory, state, best, position, identity):
    found = checkpoints.restore(directory, {"state": state, "best": best}, identity=identity)
    if found is None:
        return state, best, position
    return found.tree["state"], found.tree["best"], _Position(**found.meta)


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields a function that tells, after each dispatch, whether to save and stop.

    With several processes JAX's own preemption service decides, so that all of them stop at the same step even if
    only one was told to.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may handle signals; its own handler stays in charge
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        yield lambda step: requested.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
