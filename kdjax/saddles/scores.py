"""Saddle scores: a few numbers that summarise the curvature at a point, and rules that say what is a strong saddle."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kdjax.types import Scalar


class SaddleScore(NamedTuple):
    """The curvature at one point, float32 scalars; see :func:`score_saddle`."""

    lambda_min: jax.Array  # smallest eigenvalue found
    residual: jax.Array  # ‖Hv - λv‖ of its pair: an eigenvalue lies within this distance
    lambda_max: jax.Array  # largest eigenvalue found
    negative_sum: jax.Array  # sum of the negative ones among the given eigenvalues, 0 or below
    positive_sum: jax.Array  # sum of the positive ones
    negative_curvature_ratio: jax.Array  # |λ_min| / λ_max; 0 if λ_min ≥ 0, infinite if only λ_max ≤ 0
    gradient_norm: jax.Array
    loss: jax.Array


Rule: TypeAlias = Callable[[SaddleScore], Array]
"""Whether a score is that of a strong saddle, elementwise."""


def score_saddle(
    eigenvalues: Float[Array | np.ndarray, " pairs"],
    residuals: Float[Array | np.ndarray, " pairs"],
    *,
    gradient_norm: Scalar,
    loss: Scalar,
) -> SaddleScore:
    r"""Summarises the curvature at a point.

    The negative curvature ratio does not change when the loss or the parameters are scaled.

    Args:
      eigenvalues: from both ends of the Hessian's spectrum, in any order; the published code takes four.
      residuals: :math:`\lVert Hv - \lambda v \rVert_2` of each.
      gradient_norm: 2-norm of the gradient at the same parameters, on the same data.
      loss: at the same parameters, on the same data.

    Returns:
      The score, in float32. Works under ``jax.jit`` and ``jax.vmap``.

    Raises:
      ValueError: if there is no eigenvalue.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.

    Examples:
      >>> score = score_saddle(jnp.array([-1.0, 4.0]), jnp.zeros(2), gradient_norm=0.0, loss=2.3)
      >>> float(score.negative_curvature_ratio)
      0.25
    """
    eigenvalues, residuals = _float32(eigenvalues), _float32(residuals)
    if not eigenvalues.size:
        raise ValueError("score_saddle needs at least one eigenvalue, got none: compute both ends.")
    first = jnp.argmin(eigenvalues)
    lowest, highest = eigenvalues[first], jnp.max(eigenvalues)
    below = jnp.maximum(-lowest, 0)
    ratio = jnp.where(highest > 0, below / jnp.where(highest > 0, highest, 1), jnp.inf)
    return SaddleScore(
        lambda_min=lowest,
        residual=residuals[first],
        lambda_max=highest,
        negative_sum=jnp.sum(jnp.minimum(eigenvalues, 0)),
        positive_sum=jnp.sum(jnp.maximum(eigenvalues, 0)),
        # NaN stays NaN, as in the other fields.
        negative_curvature_ratio=jnp.where(below == 0, 0, jnp.where(jnp.isnan(lowest), lowest, ratio)),
        gradient_norm=_float32(gradient_norm),
        loss=_float32(loss),
    )


def magnitude_rule(score: SaddleScore, *, beta: Scalar = 7.0) -> Bool[Array, "*batch"]:
    r"""Published: :math:`|\sum \lambda^-| \ge \beta`.

    It depends on the scale of the loss and of the parameters, and uses neither the gradient nor the residuals.

    Args:
      score: of one point, or of several stacked.
      beta: threshold.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    return -score.negative_sum >= beta


def ratio_rule(score: SaddleScore, *, alpha: Scalar = 0.4) -> Bool[Array, "*batch"]:
    r"""Published: :math:`|\sum \lambda^-| \ge \alpha \sum \lambda^+`, with some negative eigenvalue.

    Args:
      score: of one point, or of several stacked.
      alpha: threshold.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. Without the second condition, a flat point would be a saddle.
    """
    return (-score.negative_sum >= alpha * score.positive_sum) & (score.negative_sum < 0)


def both_rule(score: SaddleScore) -> Bool[Array, "*batch"]:
    """Published: :func:`magnitude_rule` and :func:`ratio_rule`, at their published thresholds."""
    return magnitude_rule(score) & ratio_rule(score)


def extreme_rule(score: SaddleScore) -> Bool[Array, "*batch"]:
    r"""Published: :math:`\lambda_{max} > 0` and :math:`\lambda_{min} < -0.05 \, \lambda_{max}`.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    return (score.lambda_max > 0) & (score.lambda_min < -0.05 * score.lambda_max)


def certified(score: SaddleScore) -> Bool[Array, "*batch"]:
    r"""Whether negative curvature is certain: :math:`\lambda_{min} + \lVert Hv - \lambda v \rVert_2 < 0`.

    A symmetric matrix has an eigenvalue within the residual of an approximate pair, so one of them is negative even if
    Lanczos' method has not converged. Combine a published rule with it as ``ratio_rule(score) & certified(score)``. It
    holds for the data of this Hessian only: negative curvature on a small batch may be absent on the whole set.

    Args:
      score: of one point, or of several stacked.

    References:
      Parlett, The Symmetric Eigenvalue Problem, 1998, theorem 4.5.1.
    """
    return score.lambda_min + score.residual < 0


def gated_rule(score: SaddleScore, *, max_gradient_norm: Scalar = 0.02) -> Bool[Array, "*batch"]:
    r"""The recommended rule: a strong, stationary and certified saddle.

    * Strong: :math:`|\lambda_{min}| \ge 0.3 \, \lambda_{max}`.
    * Stationary: the norm of the gradient is at most ``max_gradient_norm``, which depends on the scale of the loss.
    * Certified, as in :func:`certified`: an eigenvalue that has not converged passes no rule.

    Args:
      score: of one point, or of several stacked.
      max_gradient_norm: bound of the gradient's norm; infinity for none.

    References:
      The bound .02 of the gradient is that of Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    stationary = score.gradient_norm <= max_gradient_norm
    return (score.negative_curvature_ratio >= 0.3) & stationary & certified(score)


def _float32(x: Any) -> Array:
    return jnp.asarray(x, jnp.float32)
