"""Keeping a step only if it is a better one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.transforms._utils import (
    ValueFn,
    chosen,
    counter,
    finite_or_infinite,
    mean_over,
    needed,
    transformation,
)
from kdjax.types import Params


class AcceptState(NamedTuple):
    """State of :func:`accept_if_better`."""

    inner: optax.OptState
    accepted: jax.Array  # int32[], steps of the inner transformation that were kept
    rejected: jax.Array  # int32[], and that were not
    evaluations: jax.Array  # int32[], losses computed


def accept_if_better(
    inner: optax.GradientTransformation, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps what a transformation makes of the updates only if the loss falls; otherwise the updates as they came.

    "Falls" is meant strictly, below the loss at the parameters and below that after the updates as they came. They are
    given back bit for bit. Where the inner transformation changed nothing, no loss is computed, so that one which acts
    now and then costs nothing in between. Its state advances whether its step is kept or not.

    ::

        tx = optax.chain(
            optax.adam(1e-3),
            accept_if_better(optax.chain(
                negative_eigenstep(period=20, key=jax.random.key(0)),
                perturb(period=20, sigma=0.1**0.5, key=jax.random.key(1)),
            )),
        )  # the published escape

    Args:
      inner: the transformation on trial.
      axis_name: of the mapped axis to average losses over.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``value_fn``; three losses for each change.

    Raises:
      ValueError: if ``update`` lacks what it needs.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> AcceptState:
        return AcceptState(inner.init(params), counter(), counter(), counter())

    def update(updates, state, params=None, *, value_fn: ValueFn | None = None, **extra_args):
        params, value_fn = needed("accept_if_better", params, value_fn)
        proposed, inner_state = inner.update(updates, state.inner, params, value_fn=value_fn, **extra_args)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(proposed), strict=True)
        changed = jnp.any(jnp.stack([jnp.any(a != b) for a, b in pairs]))

        def judge():
            def value(kind):
                candidate = jax.tree.map(
                    lambda a, b: jnp.where(kind == 0, jnp.zeros_like(a), jnp.where(kind == 1, a, b)),
                    updates,
                    proposed,
                )
                return mean_over(axis_name, value_fn(optax.apply_updates(params, candidate)))

            values = finite_or_infinite(jax.lax.map(value, jnp.arange(3)))
            better = values[2] < jnp.minimum(values[0], values[1])
            kept = better.astype(jnp.int32)
            return chosen(better, proposed, updates), (kept, 1 - kept, jnp.full((), 3, jnp.int32))

        kept, spent = jax.lax.cond(changed, judge, lambda: (updates, (counter(), counter(), counter())))
        counts = (a + b for a, b in zip(state[1:], spent, strict=True))
        return kept, AcceptState(inner_state, *counts)

    return transformation(init, update)
