"""Watching the curvature along a training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kdjax import curvature
from kdjax.curvature.krylov import ritz
from kdjax.curvature.vectors import size_of, widen
from kdjax.saddles import SaddleScore, score_saddle
from kdjax.transforms._utils import (
    Draws,
    check_moved,
    check_period,
    counter,
    hessian_at,
    matvecs,
    mean_over,
    needed,
    sizes,
    transformation,
    unmeasured,
)
from kdjax.types import Params

_EACH_END = 2  # eigenvalues; four in all, as published


class TrackState(NamedTuple):
    """State of :func:`track_saddles`."""

    count: jax.Array  # int32[], updates seen
    key: jax.Array  # uint32[...], raw
    score: SaddleScore  # of float32[], where it last looked; NaN before
    probes: jax.Array  # int32[], how often it looked
    hvps: jax.Array  # int32[], Hessian-vector products spent


def track_saddles(
    *,
    period: int | Array,
    key: Array | int,
    num_matvecs: int | Array | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Records a ``kdjax.saddles.SaddleScore`` every so many steps; passes the updates through unchanged.

    The score is that of ``params``, on the batch of ``value_fn``, from a single run of Lanczos' method: two eigenvalues
    of either end, and the density seen from its random start. Read it back with ``optax.tree.get(opt_state, "score")``
    and hand it to a rule of :mod:`kdjax.saddles`.

    Args:
      period: steps from one look to the next, the first of them at the first update.
      key: of Lanczos' starts.
      num_matvecs: Hessian-vector products of a look, at most the number of parameters, by default that or 16.
      axis_name: of the mapped axis whose devices hold parts of the batch; loss and derivatives are averaged over it.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``value_fn``. A look costs ``num_matvecs`` products and two
      gradients.

    Raises:
      ValueError: if the period is below 1, ``num_matvecs`` not from 1 to the number of parameters, parameters are not
        floating, or ``update`` lacks what it needs.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019, section 2, for the density.
    """
    [num_matvecs] = sizes("track_saddles", num_matvecs=num_matvecs)
    check_period("track_saddles", period)
    draws = Draws(key)

    def init(params: Params) -> TrackState:
        check_moved("track_saddles", params, num_matvecs)
        score = SaddleScore(*(unmeasured() for _ in SaddleScore._fields))
        return TrackState(counter(), draws.init(), score, counter(), counter())

    def update(updates, state, params=None, *, value_fn=None, **extra_args):
        del extra_args
        params, value_fn = needed("track_saddles", params, value_fn)
        products = matvecs(num_matvecs, params)

        def look():
            start = curvature.random_like(draws.draw(state.key, state.probes), params)
            return _score(value_fn, widen(params), start, products, axis_name)

        due = state.count % period == 0
        score = jax.lax.cond(due, look, lambda: state.score)
        count = jnp.asarray(optax.safe_increment(state.count))
        looked = due.astype(jnp.int32)
        probes, hvps = state.probes + looked, state.hvps + looked * products
        return updates, TrackState(count, state.key, score, probes, hvps)

    return transformation(init, update)


def _score(value_fn, params, start, num_matvecs, axis_name) -> SaddleScore:
    value, slope = mean_over(axis_name, jax.value_and_grad(value_fn)(params))
    operator = hessian_at(value_fn, params, axis_name)
    found = curvature.lanczos(operator, start, num_matvecs=num_matvecs)
    values, vectors, reached = ritz(found.alphas, found.betas)
    place = jnp.arange(num_matvecs)
    there = place < reached
    nodes, weights = jnp.where(there, values, 0), jnp.where(there, vectors[0] ** 2, 0)
    residuals = found.betas[-1] * jnp.abs(vectors[-1]) + found.rounding
    score = score_saddle(
        jnp.where(
            there, values, values[0]
        ),  # no pair behind a breakdown: the first one again, once summed up below
        jnp.where(there, residuals, residuals[0]),
        gradient_norm=optax.tree.norm(slope).astype(jnp.float32),
        loss=value.astype(jnp.float32),
        nodes=nodes[None],
        weights=weights[None],
        num_parameters=size_of(params),
    )
    extreme = jnp.where(there & ((place < _EACH_END) | (place >= reached - _EACH_END)), values, 0)
    negative, positive = jnp.sum(jnp.minimum(extreme, 0)), jnp.sum(jnp.maximum(extreme, 0))
    return jax.tree.map(
        lambda x: x.astype(jnp.float32), score._replace(extreme_negative=negative, extreme_positive=positive)
    )
