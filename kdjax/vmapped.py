"""Many trainings in one compiled program: seeds and settings side by side, each as if it ran alone.

::

    run = jax.jit(vmapped.make_run(train.make_run(train_step, make_batch)))
    states = vmapped.stack([train.init_state(*weights_of_seed, tx, seed=seed) for seed in seeds])
    arrays = {**arrays, "settings": {"hard_weight": jnp.linspace(0, 1, len(seeds))}}
    feed = vmapped.feed([data.resident_feed(arrays, ids, seed=seed, batch_size=64) for seed in seeds])
    for fitted in vmapped.fit(run, states, feed, epochs=20): ...  # one train.Fitted per training

Whatever differs between the trainings has a leading axis with one entry for each: every array of the state, and every
array under ``arrays["settings"]``, which ``make_batch`` finds there without that axis and hands on, usually as
``batch["settings"]``, for the objective to read. Everything else is shared. What the optimizer is built from, such as
the learning rate, is a setting only under ``optax.inject_hyperparams``.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from kdjax import train
from kdjax.data.batches import Feed
from kdjax.train import TrainState
from kdjax.types import Metrics

MAPPINGS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "vmap": jax.vmap,
    "map": lambda function: lambda *arguments: jax.lax.map(lambda one: function(*one), arguments),
}
"""How a function runs for all trainings: side by side in wider operations, or one after the other in a loop."""


def make_run(
    run: Callable[[TrainState, Any, Array], tuple[TrainState, Metrics]], *, mapping: str = "vmap"
) -> Callable[[TrainState, Mapping[str, Any], Array], tuple[TrainState, Metrics]]:
    """Turns the run of one training into one of many at once.

    Args:
      run: of one training, as built by :func:`kdjax.train.make_run`.
      mapping: "vmap" is faster where a step is too small to fill the machine, needs memory for the activations of all
        trainings, and computes both branches of every ``lax.cond``. "map" needs the memory of one training, and each
        comes out bitwise as alone if calls have more than one step.

    Returns:
      ``(states, arrays, index[batch, steps, trainings]) -> (states, metrics)`` with metrics ``[steps, trainings]``. The
      batch comes first, so that :func:`kdjax.parallel.data_parallel` cuts it as it does for one training.

    Raises:
      ValueError: if there is no such mapping; when called, if states, settings and index are not of one number.
    """
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping must be one of {', '.join(MAPPINGS)}, got {mapping!r}.")
    mapped = MAPPINGS[mapping]

    def run_many(states, arrays, index):
        settings = arrays.get("settings", {})
        _check_count(len(states.step), settings, index)

        def one(state, settings, index):
            return run(state, {**arrays, "settings": settings}, index)

        states, metrics = mapped(one)(states, settings, jnp.moveaxis(index, -1, 0))
        return states, jax.tree.map(jnp.transpose, metrics)

    return run_many


def over_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function ``(params, model_state, *shared)`` take stacked weights, and return stacked results.

    As ``transform`` of :func:`kdjax.evaluate.make_evaluator` it evaluates many students at once; :func:`unstack` gives
    the sums of each. They come one after the other, since batches of an evaluation are large.
    """

    def many(params, model_state, *shared):
        return jax.lax.map(lambda weights: function(*weights, *shared), (params, model_state))

    return many


def stack(trees: Sequence[PyTree]) -> PyTree:
    """One tree of the same structure, whose arrays have a leading axis over the trees."""
    if not trees:
        raise ValueError("stack needs at least one tree, got none.")
    # On the host: one transfer per array, where jnp.stack would dispatch one operation per array and tree.
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack([np.asarray(x) for x in leaves])), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """The trees that were stacked, as NumPy arrays."""
    host = jax.tree.map(np.asarray, tree)
    count = len(jax.tree.leaves(host)[0])
    return [jax.tree.map(lambda x, k=k: x[k], host) for k in range(count)]


def feed(feeds: Sequence[Feed]) -> Feed:
    """The feeds of single trainings, as of :func:`kdjax.data.resident_feed`, as one for all of them.

    They share the arrays of the first. Trainings of one seed may share a feed.

    Raises:
      ValueError: if there are none, or their epochs have different numbers of steps.
    """
    steps = sorted({one.steps_per_epoch for one in feeds})
    if len(steps) != 1:
        raise ValueError(
            f"trainings that run at once need epochs of one length, got {len(feeds)} feeds of {steps} steps; give them "
            "as many examples and the same batch size."
        )

    def at(step: int) -> tuple[Any, ...]:
        arguments = [one.at(step) for one in feeds]
        return arguments[0][0], np.stack([index for _, index in arguments], axis=-1)

    identity = {name: [one.identity.get(name) for one in feeds] for name in feeds[0].identity}
    return Feed(steps[0], at, identity)


def fit(run: Callable[..., Any], states: TrainState, feed: Feed, **options: Any) -> list[train.Fitted]:
    """:func:`kdjax.train.fit` for many trainings: one checkpoint of all, each with its own best epoch and history.

    A training whose loss or weights become NaN or infinite does not stop the others, nor change them. Its records are
    NaN from that epoch on, and its best weights are from before. A warning and its ``notes`` name it at the end, and
    :func:`diverged_at` finds the epoch.

    Args:
      run: by :func:`make_run`, compiled.
      states: by :func:`stack`.
      feed: by :func:`feed`.
      **options: as of :func:`kdjax.train.fit`. ``evaluate`` and ``weights_of`` are given stacked weights and states;
        ``evaluate`` returns, and ``progress`` receives, lists with one number per training.

    Returns:
      One outcome per training, with its weights as NumPy arrays.

    Raises:
      NonFiniteLoss: once no training is left that is finite.
      Stopped: with code 143 or 130, after saving, if the process received SIGTERM or Ctrl-C.
    """
    count = len(states.step)
    whole = train.fit(run, states, feed, **options)
    best_epochs = np.broadcast_to(whole.best_epoch, count).tolist()
    histories = [
        [
            {name: np.broadcast_to(value, count)[k].item() for name, value in record.items()}
            for record in whole.history
        ]
        for k in range(count)
    ]
    weights = (unstack(whole.last), unstack(whole.best))
    found = [
        train.Fitted(*parts, whole.notes) for parts in zip(*weights, best_epochs, histories, strict=True)
    ]
    bad = {k: epoch for k, fitted in enumerate(found) if (epoch := diverged_at(fitted)) is not None}
    for k, epoch in bad.items():
        note = f"diverged in epoch {epoch}: its loss or weights are not finite"
        found[k] = found[k]._replace(notes=(*whole.notes, note))
    if bad:
        named = ", ".join(f"{k} in epoch {epoch}" for k, epoch in bad.items())
        warnings.warn(
            f"{len(bad)} of {count} trainings diverged, counted from 0: {named}. Their loss or weights are not finite; "
            "lower the learning rate or clip the gradients (optax.clip_by_global_norm). The others are not affected.",
            stacklevel=2,
        )
    return found


def diverged_at(fitted: train.Fitted) -> int | None:
    """The epoch in which its loss or weights became NaN or infinite, None if there is none."""
    return next((int(r["epoch"]) for r in fitted.history if not math.isfinite(r["loss"])), None)


def _check_count(count: int, settings: PyTree, index: Any) -> None:
    """Raises a ValueError unless states, settings and index are of as many trainings."""
    if index.ndim != 3 or index.shape[-1] != count:
        raise ValueError(
            f"the index of {count} trainings is [batch, steps, {count}], got shape {index.shape}; "
            "kdjax.vmapped.feed makes it."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(settings):
        if jnp.shape(leaf)[:1] != (count,):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"the setting {name!r} needs one value for each of {count} trainings, got shape {jnp.shape(leaf)}."
            )
