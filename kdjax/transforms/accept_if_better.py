"""Keep a step only if it lowers the loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.transforms._utils import (
    ValueFn,
    finite_or_infinite,
    mean_over,
    require_loss,
    transformation,
    where,
    zero_count,
)
from kdjax.types import Params


class AcceptState(NamedTuple):
    """State of :func:`accept_if_better`."""

    inner: optax.OptState
    accepted: jax.Array  # int32[], steps of the inner transformation that were kept
    rejected: jax.Array  # int32[], steps that were reverted
    evaluations: jax.Array  # int32[], losses computed


def accept_if_better(
    inner: optax.GradientTransformation, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Applies an inner transformation to the updates and keeps its result only if the loss falls.

    Its result must have a strictly lower loss than both the current parameters and the incoming updates. Otherwise the
    incoming updates are returned bit for bit. Where the inner transformation changes nothing, no loss is computed, so
    one that acts every so many steps costs nothing in between. Its state advances whether its step is kept or not.

    ::

        tx = optax.chain(
            optax.adam(1e-3),
            accept_if_better(optax.chain(
                negative_eigenstep(period=20, key=jax.random.key(0)),
                perturb(period=20, sigma=0.1**0.5, key=jax.random.key(1)),
            )),
        )  # the published escape

    Args:
      inner: the transformation to test.
      axis_name: mapped axis to average losses over.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``value_fn``; each change costs three losses.

    Raises:
      ValueError: if ``update`` lacks an argument.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> AcceptState:
        return AcceptState(inner.init(params), zero_count(), zero_count(), zero_count())

    def update(updates, state, params=None, *, value_fn: ValueFn | None = None, **extra_args):
        params, value_fn = require_loss("accept_if_better", params, value_fn)
        proposed, inner_state = inner.update(updates, state.inner, params, value_fn=value_fn, **extra_args)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(proposed), strict=True)
        changed = jnp.any(jnp.stack([jnp.any(a != b) for a, b in pairs]))

        def compare():
            def value(kind):
                candidate = jax.tree.map(
                    lambda a, b: jnp.where(kind == 0, jnp.zeros_like(a), jnp.where(kind == 1, a, b)),
                    updates,
                    proposed,
                )
                return mean_over(axis_name, value_fn(optax.apply_updates(params, candidate)))

            values = finite_or_infinite(jax.lax.map(value, jnp.arange(3)))
            better = values[2] < jnp.minimum(values[0], values[1])
            accepted = better.astype(jnp.int32)
            return where(better, proposed, updates), (accepted, 1 - accepted, jnp.full((), 3, jnp.int32))

        updates, spent = jax.lax.cond(
            changed, compare, lambda: (updates, (zero_count(), zero_count(), zero_count()))
        )
        counts = (a + b for a, b in zip(state[1:], spent, strict=True))
        return updates, AcceptState(inner_state, *counts)

    return transformation(init, update)
