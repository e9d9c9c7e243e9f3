"""The train step, and the loop around it.

The step is a function of a state and a batch and knows no loss, network or optimizer: it is handed an objective, an
apply function and a transformation. Wrap it yourself (``jax.jit``), or let :func:`make_run` and
:func:`kdjax.parallel.data_parallel` put data selection in front of it and devices around it. :func:`fit` repeats it
until the epochs are done, and can be killed at any moment and started again without a bit of difference. It keeps
nothing that is not finite.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, UInt32

from kdjax import checkpoints, files
from kdjax.data.batches import Feed, check_seed
from kdjax.interrupts import Stopped as Stopped
from kdjax.interrupts import stop_requests
from kdjax.types import ApplyFn, Batch, Metrics, ModelState, Params
from kdjax.types import Weights as Weights

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
    """The state before the first step, as fresh arrays that may be donated.

    Raises:
      ValueError: if the seed is not a whole number of 32 bits.
    """
    seed = check_seed("init_state", seed)
    params, model_state = jax.tree.map(jnp.array, (params, dict(model_state)))
    return TrainState(
        jnp.zeros((), jnp.int32), params, model_state, tx.init(params), jnp.asarray(seed, jnp.uint32)
    )


def make_train_step(
    apply_fn: ApplyFn,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    heads: ApplyFn | None = None,
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
      heads: further terms, that have parameters or a state of their own (:mod:`kdjax.models.heads`): called
        with ``(outputs, batch)`` as inputs, it returns terms in place of outputs. The state's ``params`` and
        ``model_state`` are then ``{"student": ..., "heads": ...}``; :func:`student_of` takes the student out.
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
            if heads is None:
                outputs, model_state = apply_fn(
                    params, state.model_state, batch["image"], train=True, key=key
                )
                terms = dict(objective(outputs, batch))
            else:
                model_state = dict(state.model_state)
                outputs, model_state["student"] = apply_fn(
                    params["student"], model_state["student"], batch["image"], train=True, key=key
                )
                arguments = params["heads"], model_state["heads"], (outputs, batch)
                more, model_state["heads"] = heads(*arguments, train=True, key=jax.random.fold_in(key, 1))
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
        metrics = {**terms, "loss": value, "grad_norm": _norm(grads)}
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


def _norm(grads: Params) -> Array:
    """The norm of all gradients together, in float32 or better; infinite or NaN only if a gradient is."""
    grads = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
    norm = optax.tree.norm(grads)

    def scaled():  # from 2^64 on squares overflow, though the gradients are numbers
        largest = optax.tree.norm(grads, ord=jnp.inf)
        relative = largest * optax.tree.norm(jax.tree.map(lambda g: g / largest, grads))
        return jnp.where(jnp.isfinite(largest), relative, largest)

    return jax.lax.cond(jnp.isfinite(norm), lambda: norm, scaled)


def _step_key(state: TrainState, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.step), purpose)


def weights_of(state: TrainState) -> Weights:
    """The weights of a student that is trained alone."""
    return Weights(state.params, state.model_state)


def student_of(state: TrainState) -> Weights:
    """The weights of a student that is trained with heads."""
    return Weights(state.params["student"], state.model_state["student"])


class Fitted(NamedTuple):
    """Outcome of :func:`fit`."""

    last: Weights
    best: Weights
    best_epoch: int
    history: list[dict[str, float]]  # per epoch: mean training terms, and what was evaluated after it
    notes: tuple[str, ...] = ()  # what a reader of the numbers should know about how they came about


class NonFiniteLoss(FloatingPointError):
    """A loss, parameter, statistic or moment became NaN or infinite; the message says which, when, and what to do."""


class _Position(NamedTuple):
    """The host's side of a run: everything beside the arrays that a resumed run continues from.

    Its numbers are lists with one per training where :mod:`kdjax.vmapped` runs several at once.
    """

    epochs: int  # that were asked for
    monitor: str | None  # None without an evaluation
    hyperparameters: dict[str, Any]  # the injected ones, as they were asked for: a run may change its own
    machine: dict[str, Any]  # that computed the steps before the newest checkpoint
    history: list[dict[str, float]]
    sums: dict[str, Any]  # of the unfinished epoch's metrics
    skipped: Any  # steps whose gradient was not finite, which the optimizer left out
    best_value: Any  # None before the first evaluation
    best_epoch: Any
    notes: list[str]


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

    A run is resumed as it was begun. What decides the meaning of a step cannot change: the identity of the feed (its
    seed, batch size and examples), the steps of an epoch, the state's seed, ``monitor`` and ``identity``. The number of
    epochs, the steps of a dispatch and the machine may. Hyperparameters are those that are asked for now, whether the
    optimizer closes over them or keeps them in its state (``optax.inject_hyperparams``), unless the run itself changed
    them meanwhile. ``notes`` tells what changed.

    Args:
      run: ``(state, *feed.at(step)) -> (state, metrics)`` with metrics stacked over the steps of the dispatch. It may
        donate the state. For several trainings at once, whose metrics are ``[steps, trainings]``, call
        :func:`kdjax.vmapped.fit` instead.
      state: to start from, if ``directory`` holds nothing newer.
      feed: the arguments of every dispatch as a function of the step that it starts at.
      epochs: to train in total, those before a resumption included.
      evaluate: called with the parameters and statistics on the validation split; larger ``monitor`` is better. Its
        scores stand in the records as ``validation_NAME``; those named ``test_...``, which choose nothing, as they are.
      evaluate_every: epochs between evaluations; the last epoch always has one.
      monitor: the metric that chooses the best weights; the first of equals stays, and any number is better than NaN.
        Without ``evaluate`` the best weights are the last.
      weights_of: what of the state to evaluate and keep, such as :func:`student_of`, or an average that the optimizer
        keeps.
      directory: of this run's checkpoints; None keeps nothing on disk. A run killed at any moment and started again
        with the same arguments ends bitwise equal to one that was not.
      identity: what the run is made from and which one it is, as JSON: data (:func:`kdjax.data.fingerprint`),
        settings, arm, seed. Checkpoints in ``directory`` of another identity are refused.
      save_every_s: least seconds between two checkpoints, which several processes write only between epochs; one is
        also written at the end and on SIGTERM or Ctrl-C.
      between: called after each dispatch with the state and the steps done, returns the state to go on with. What is
        slow inside compiled loops, such as convolutions in ``jax.lax.cond`` on a CPU, is done here now and then.
      progress: called after each dispatch with the number of its steps and the newest epoch's record.

    Returns:
      The last and the best weights, one record per epoch, and notes.

    Raises:
      NonFiniteLoss: if a loss, parameter, statistic or moment of the optimizer becomes NaN or infinite, before anything
        of it is saved. A gradient that is not finite is none of these where the optimizer leaves it out, as
        ``optax.apply_if_finite`` does.
      ValueError: if the arguments cannot make a run, or ``directory`` holds another one.
      Stopped: with code 143 or 130, after saving, if the process received SIGTERM or Ctrl-C.
    """
    _check_options(feed, epochs=epochs, evaluate_every=evaluate_every, save_every_s=save_every_s)
    identity = _identity(state, feed, identity)
    asked = (epochs, monitor if evaluate else None, _hyperparameters(state.opt_state))
    position = _Position(*asked, {}, [], {}, 0, None, 0, [])
    best, finite_before = _copy(weights_of(state)), _finite(state)
    if directory is not None:
        state, best, position = _restored(directory, state, best, position, identity)
    step, end, last_save = int(np.ravel(state.step)[0]), epochs * feed.steps_per_epoch, time.monotonic()
    if step > end:
        raise ValueError(
            f"{directory or 'the state'} is at step {step} already, and epochs={epochs} are {end} steps: use epochs="
            f"{-(-step // feed.steps_per_epoch)} or more, or start anew."
        )
    unread: tuple[int, Metrics] | None = None  # of the newest dispatch: the step after it, and its metrics

    def read() -> _Position:
        return _read(position, unread, state, finite_before)

    with stop_requests() as stop_requested:
        while step < end:
            state, metrics = run(state, *feed.at(step))
            steps = len(metrics["loss"])
            state = between(state, step + steps)
            position, step = read(), step + steps
            unread = step, metrics
            epoch, rest = divmod(step, feed.steps_per_epoch)
            if rest == 0:
                position, unread = read(), None
                lost = _check_finite(state, finite_before, step)
                position = _with_record(position, lost, epoch, feed.steps_per_epoch)
                if evaluate is not None and (epoch % evaluate_every == 0 or step == end):
                    position, best = _evaluated(evaluate, weights_of(state), epoch, position, best)
            progress(steps, position.history[-1] if position.history else {})
            stop = stop_requested(step)
            if directory is not None and (stop or step == end or _is_due(last_save + save_every_s, rest)):
                position, unread = read(), None
                if rest:  # else it has just been done
                    _check_finite(state, finite_before, step)
                position, tree = _on_machine(position, state), {"state": state, "best": best}
                checkpoints.save(directory, step, tree, meta=position._asdict(), identity=identity)
                last_save = time.monotonic()
            if stop:
                kept = f"saved at step {step}; the same command continues."
                none = "nothing was saved, because the run has no directory."
                raise Stopped(stop, kept if directory is not None else none, step=step)
    if evaluate is not None and not _is_evaluated(position):  # a longer run was stopped here between two
        position, best = _evaluated(evaluate, weights_of(state), epochs, position, best)
    last = weights_of(state)
    if evaluate is None:
        best, position = last, position._replace(best_epoch=epochs)
    notes = (*position.notes, *_closing_notes(position, state, end))
    return Fitted(last, best, position.best_epoch, position.history, notes)


def _check_options(feed: Feed, *, save_every_s: float, **whole: int) -> None:
    """Raises a ValueError for what cannot make a run, before any of it is compiled."""
    for name, value in {**whole, "feed.steps_per_epoch": feed.steps_per_epoch}.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"fit needs {name} to be a whole number of 1 or more, got {value!r}.")
    if not save_every_s >= 0:
        raise ValueError(f"fit needs save_every_s to be 0 seconds or more, got {save_every_s}.")


def _is_due(moment: float, rest: int) -> bool:
    """Whether it is time to save. A pod goes by the clock of its first process, and looks at it between epochs only."""
    due = time.monotonic() > moment
    if jax.process_count() == 1:
        return due
    if rest:  # asking makes the host wait for the device, as the end of an epoch does anyway
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))


# What must be finite


def _finite(state: TrainState) -> dict[str, np.ndarray]:
    """Whether each array is finite throughout, by its name: a boolean, or one per training.

    Of the optimizer's state those arrays that are shaped like a parameter. Its scalars may be infinite or NaN by right,
    such as the best loss so far, or a curvature that has not been measured yet. Arrays that are split over processes
    are left out: no process could tell alone.
    """
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(state.params)} - {np.shape(state.step)}
    groups = {"parameter": state.params, "statistic": state.model_state, "optimizer state": state.opt_state}
    arrays = {
        f"{group} {_path(path)}": leaf
        for group, tree in groups.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        and (group != "optimizer state" or np.shape(leaf) in shapes)
        and (not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated)
    }
    # On the host: compiling a reduction per array takes seconds, and this milliseconds.
    leading = np.ndim(state.step)
    return {
        name: np.asarray(np.isfinite(array).all(axis=tuple(range(leading, np.ndim(array)))))
        for name, array in jax.device_get(arrays).items()
    }


def _broken(state: TrainState, finite_before: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Which trainings hold an array that was finite when the run began and is not now, and the first such array."""
    broken = {name: finite_before[name] & ~finite for name, finite in _finite(state).items()}
    first = next((name for name, bad in broken.items() if bad.any()), "")
    return np.asarray(np.any([*broken.values()], axis=0)), first


def _check_finite(state: TrainState, finite_before: Mapping[str, np.ndarray], step: int) -> np.ndarray:
    """Which trainings hold numbers that are not finite; a NonFiniteLoss if all do."""
    lost, name = _broken(state, finite_before)
    if lost.all():
        when = f"after step {step - 1} (counted from 0; the losses and gradients before are finite)"
        raise _diverged(name, when)
    return lost


def _diverged(what: str, when: str) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"{what} is not finite {when}: lower the learning rate, clip the gradients (optax.clip_by_global_norm), or "
        "look for NaN in the inputs. Nothing of it was saved; what was saved before is whole, and the corrected "
        "command goes on from there."
    )


# What is counted along the way


def _read(
    position: _Position,
    unread: tuple[int, Metrics] | None,
    state: TrainState,
    finite_before: Mapping[str, np.ndarray],
) -> _Position:
    """Adds a dispatch's metrics to the sums of its epoch; this is where the host waits for the device."""
    if unread is None:
        return position
    step, metrics = unread
    values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    bad_loss = ~np.isfinite(values["loss"])
    bad_gradient = ~np.isfinite(values.get("grad_norm", values["loss"]))
    # Of several trainings some may be lost. A gradient is a fault only if the optimizer let it into the state.
    if bad_loss.any(axis=0).all() or (
        bad_gradient.any(axis=0).all() and _broken(state, finite_before)[0].all()
    ):
        raise _first_fault(step - len(bad_loss), values, bad_loss, bad_gradient)
    old = position.sums
    sums = {name: _number(np.add(old.get(name, 0.0), _total(value))) for name, value in values.items()}
    skipped = _number(np.add(position.skipped, bad_gradient.sum(axis=0)))
    return position._replace(sums=sums, skipped=skipped)


def _first_fault(
    start: int, values: Mapping[str, np.ndarray], bad_loss: np.ndarray, bad_gradient: np.ndarray
) -> NonFiniteLoss:
    """The error for the step that began it: the first loss, or the gradients that led to it."""
    at = tuple(np.argwhere(bad_loss if bad_loss.any() else bad_gradient)[0])
    while at[0] and bad_gradient[(at[0] - 1, *at[1:])]:
        at = (at[0] - 1, *at[1:])
    there = {name: value[at] for name, value in sorted(values.items())}
    bad = [name for name, value in there.items() if not math.isfinite(value)]
    terms = ", ".join(name for name in bad if name not in ("loss", "grad_norm")) or "the loss"
    what = terms if "loss" in bad else "grad_norm"
    said = ", ".join(f"{name} {value:.4g}" for name, value in there.items())
    return _diverged(what, f"at step {start + int(at[0])} (counted from 0; {said})")


def _total(values: np.ndarray) -> Any:
    if values.ndim == 1 and np.isfinite(values).all():
        return math.fsum(values)
    with np.errstate(invalid="ignore"):  # of a training that has diverged
        return values.sum(axis=0)


def _number(value: Any) -> Any:
    """A number, or a list with one per training: what JSON can hold."""
    return np.asarray(value).tolist()


def _with_record(position: _Position, lost: np.ndarray, epoch: int, steps: int) -> _Position:
    """Closes an epoch: its sums become the means of its record, NaN for a training that is lost."""
    sums = {name: np.asarray(total) for name, total in position.sums.items()}
    means = {name: _number(np.where(lost, np.nan, total / steps)) for name, total in sums.items()}
    return position._replace(history=[*position.history, {"epoch": float(epoch), **means}], sums={})


def _evaluated(
    evaluate: Callable[..., Mapping[str, Any]],
    weights: Weights,
    epoch: int,
    position: _Position,
    best: Weights,
) -> tuple[_Position, Weights]:
    """Adds scores to the newest record and takes over the weights if they are the best; each training by itself."""
    scores, monitor = evaluate(*weights), str(position.monitor)
    if monitor not in scores:
        raise ValueError(
            f"fit chooses the best weights by monitor={monitor!r}, and evaluate returned only "
            f"{', '.join(sorted(scores))}: name one of these."
        )
    newest = position.history[-1] if position.history else {"epoch": float(epoch)}
    lost = ~np.isfinite(newest.get("loss", 0.0))  # the argmax of NaN is a class too, and may be right
    scores = {name: np.where(lost, np.nan, value) for name, value in scores.items()}
    record = {
        name if name.startswith("test_") else f"validation_{name}": _number(value)
        for name, value in scores.items()
    }
    score = scores[monitor]
    held = np.asarray(np.nan if position.best_value is None else position.best_value)
    better = np.isnan(held) | (score > held)
    if better.all():
        best = _copy(weights)
    elif better.any():

        def choose(new, old):
            return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        best = jax.tree.map(choose, weights, best)
    return position._replace(
        history=[*position.history[:-1], {**newest, **record}],
        best_value=_number(np.where(better, score, held)),
        best_epoch=_number(np.where(better, epoch, position.best_epoch)),
    ), best


def _is_evaluated(position: _Position) -> bool:
    return any(name.startswith("validation_") for record in position.history[-1:] for name in record)


def _copy(weights: Weights) -> Weights:
    return jax.tree.map(jnp.copy, weights)  # since the state's own arrays may be donated to the next step


# What a resumed run has in common with what was saved


def _identity(state: TrainState, feed: Feed, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What decides the meaning of a step: no run goes on from a checkpoint that differs in it."""
    batches = {**feed.identity, "steps_per_epoch": feed.steps_per_epoch}
    return {**(given or {}), "batches": batches, "state": {"seed": _number(state.seed)}}


def _restored(
    directory: Path, state: TrainState, best: Weights, asked: _Position, identity: Mapping[str, Any]
) -> tuple[TrainState, Weights, _Position]:
    """The newest checkpoint; what may differ from it is as it is asked for now, and noted."""
    found = checkpoints.restore(directory, {"state": state, "best": best}, identity=identity)
    if found is None:
        return state, best, asked
    there, restored, best = _Position(**found.meta), found.tree["state"], found.tree["best"]
    if None not in (there.monitor, asked.monitor) and there.monitor != asked.monitor:
        raise ValueError(
            f"the best weights in {directory} were chosen by monitor={there.monitor!r}, which cannot be compared with "
            f"{asked.monitor!r}: use that, or choose another directory."
        )
    before, after = there.hyperparameters, asked.hyperparameters
    changed = [name for name in after if after[name] != before.get(name)]
    opt_state = jax.tree_util.tree_map_with_path(
        lambda path, old, new: new if _path(path) in changed else old, restored.opt_state, state.opt_state
    )
    notes = there.notes + [
        f"{name} was {_brief(before.get(name))} up to step {found.step} and is {_brief(after[name])} from there on"
        for name in changed
    ]
    if there.epochs != asked.epochs:
        notes.append(
            f"up to step {found.step} the run was to have {there.epochs} epochs, and now has {asked.epochs}: a "
            "schedule that depends on the length took another course than in one run of this length"
        )
    position = there._replace(epochs=asked.epochs, hyperparameters=after, notes=notes)
    position = position._replace(monitor=asked.monitor or there.monitor)
    return restored._replace(opt_state=opt_state), best, position


def _hyperparameters(opt_state: optax.OptState) -> dict[str, Any]:
    """The values that ``optax.inject_hyperparams`` keeps in the state, by their path in it."""
    return {
        _path(path): np.asarray(leaf, np.float32).tolist()
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
        if any(getattr(key, "name", None) == "hyperparams" for key in path)
    }


def _brief(value: Any) -> str:
    return str(np.asarray(value, np.float32))  # .1, where a float64 of it has 17 digits


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _on_machine(position: _Position, state: TrainState) -> _Position:
    """Notes if the steps since the last checkpoint were computed by other means than those before it."""
    devices = jnp.asarray(state.step).devices()
    kind, processes = next(iter(devices)).device_kind, jax.process_count()
    machine = {"kind": kind, "devices": len(devices), "processes": processes, "jax": jax.__version__}
    if kind == "cpu" and processes == 1:  # XLA cuts sums by cores there; hosts of a pod may differ in them
        machine["cores"] = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )
    notes = list(position.notes)
    if position.machine and (moved := files.differences(position.machine, machine)):
        notes.append(
            f"the run was resumed by other means ({moved}): its numbers are not bitwise those of an unbroken run"
        )
        warnings.warn(notes[-1], stacklevel=3)
    return position._replace(machine=machine, notes=notes)


def _closing_notes(position: _Position, state: TrainState, steps: int) -> list[str]:
    """What the end of a run tells about it, with a warning of what cannot have been meant."""
    serious = []
    if position.best_value is not None and np.all(np.isnan(position.best_value)):
        serious.append(f"{position.monitor} was NaN in every evaluation, so the best weights are the last")
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    updates = [leaf for path, leaf in leaves if path and getattr(path[-1], "name", None) == "gradient_step"]
    if updates and not np.any(updates):
        serious.append(
            f"nothing was trained: optax.MultiSteps gathers more gradients for its first update than the {steps} of "
            "this run"
        )
    for note in serious:
        warnings.warn(note, stacklevel=3)
    if np.ndim(position.skipped) or not position.skipped:
        return serious
    left_out = (
        f"the gradient was not finite in {position.skipped} of {steps} steps; the optimizer left it out"
    )
    return [*serious, left_out]
