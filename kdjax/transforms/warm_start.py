"""Move the parameters to a region before training starts."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kdjax.curvature.vectors import widen
from kdjax.transforms._utils import (
    check_like,
    check_params,
    check_positive,
    nan,
    require_params,
    stored,
    transformation,
    zero_count,
)
from kdjax.types import Params, Scalar


class ApproachState(NamedTuple):
    """State of :func:`approach_region`."""

    count: jax.Array  # int32[], steps made towards the region
    region: Params  # float32, like the parameters
    distance: jax.Array  # float32[], ||S - T||_2 before the latest update; NaN before the first
    arrived: jax.Array  # bool[], whether updates now pass through


def approach_region(
    region: Params,
    *,
    form: Literal["smooth", "published"] = "smooth",
    half_life: Scalar = 10.0,
    epsilon: Scalar = 0.1,
    max_steps: int | Array = 200,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates by steps towards a region until it is reached, then passes them through.

    With the parameters S, the region T and t = 1, 2, ...:

    * ``"smooth"``: :math:`S \leftarrow S + (1 - 2^{-1/\tau}) (T - S)`, which halves the distance every τ steps.
    * ``"published"``, the 2-norm transformation: :math:`S \leftarrow S \odot (l \, T \oslash S) = l \, T` with
      :math:`l = 1 - 2^{-t/\tau}` and τ = 10. The first step discards S, since l is near zero, and the norm then
      grows to that of T. Computed as l T, which divides by no zero of S.

    Put it last in a chain. The state holds the region, so that the compiled program does not hold it as a constant.

    Args:
      region: T, like the parameters, such as those of ``kdjax.saddles.select_weights``.
      form: one of the two above.
      half_life: τ.
      epsilon: the region is reached at :math:`\lVert S - T \rVert_2 \le \epsilon`; .1 in the paper, .001 in its code.
      max_steps: after which the region counts as reached; rounding may keep bfloat16 parameters from it.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: if an option is out of range, the region is not like the parameters, or ``update`` is called without
        parameters.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    if form not in ("smooth", "published"):
        raise ValueError(f"form must be 'smooth' or 'published', got {form!r}.")
    check_positive("approach_region", half_life=half_life)
    check_positive("approach_region", zero=True, epsilon=epsilon, max_steps=max_steps)

    def init(params: Params) -> ApproachState:
        check_params("approach_region", params)
        check_like("approach_region", params, region=region)
        return ApproachState(zero_count(), stored(params, region), nan(), jnp.asarray(False))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        params = require_params("approach_region", params)
        gap = jax.tree.map(lambda t, p: t - p, state.region, widen(params))
        distance = optax.tree.norm(gap).astype(jnp.float32)
        arrived = state.arrived | (distance <= epsilon) | (state.count >= max_steps)
        count = jnp.where(arrived, state.count, optax.safe_increment(state.count))
        if form == "smooth":
            share = 1 - 0.5 ** (1 / jnp.asarray(half_life, jnp.float32))
            steps = jax.tree.map(lambda d: share * d, gap)
        else:
            remaining = 0.5 ** (count / jnp.asarray(half_life, jnp.float32))
            steps = jax.tree.map(lambda t, d: d - remaining * t, state.region, gap)  # l T - S
        updates = jax.tree.map(lambda u, s: jnp.where(arrived, u, s.astype(u.dtype)), updates, steps)
        return updates, ApproachState(count, state.region, distance, arrived)

    return transformation(init, update)
