"""What the curvature says of one point, and the rules by which that is a saddle."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kdjax.types import Scalar

Sums: TypeAlias = Literal["extreme", "density"]
"""Which sums a rule compares: of the few extreme eigenvalues, as published, or of the whole spectrum."""


class SaddleScore(NamedTuple):
    """What the curvature says of one point; see :func:`score_saddle`. NaN where it was not measured."""

    lambda_min: jax.Array  # float32[], as all of them: the smallest eigenvalue found
    residual: jax.Array  # ‖Hv - λv‖ of its pair: an eigenvalue lies that near
    lambda_max: jax.Array  # the largest
    extreme_negative: jax.Array  # sum of the negative ones among the few extreme eigenvalues, 0 or below
    extreme_positive: jax.Array  # sum of the positive ones among them
    density_negative: jax.Array  # sum of all negative eigenvalues, estimated from the density, 0 or below
    density_positive: jax.Array  # sum of all positive ones
    negative_share: jax.Array  # |negative| over |negative| + positive of the density, in [0, 1]
    strength: (
        jax.Array
    )  # |lambda_min| / lambda_max; 0 without a negative eigenvalue, infinite without a positive
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
    nodes: Float[Array | np.ndarray, "probes order"] | None = None,
    weights: Float[Array | np.ndarray, "probes order"] | None = None,
    num_parameters: int | None = None,
) -> SaddleScore:
    r"""Sums up the curvature at a point.

    Strength and negative share do not change with a factor on the loss or on the parameters. Both weigh an eigenvalue
    by its size. The share of eigenvalues below zero does not, and few Lanczos steps cannot tell it, since most
    eigenvalues of a network lie next to zero.

    Args:
      eigenvalues: from both ends of the Hessian's spectrum, in any order; the published code takes four.
      residuals: :math:`\lVert Hv - \lambda v \rVert_2` of each.
      gradient_norm: 2-norm of the gradient at the same parameters, on the same data.
      loss: there.
      nodes: of the quadrature of the eigenvalue density; without them the fields of the density are NaN.
      weights: of the nodes, of sum 1 for each probe.
      num_parameters: rows of the Hessian, which turn a mean over the spectrum into a sum.

    Returns:
      The score, in float32. May be used under ``jax.jit`` and ``jax.vmap``.

    Raises:
      ValueError: if there is no eigenvalue, or only a part of nodes, weights and num_parameters.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019, section 2, for nodes and weights.

    Examples:
      >>> score = score_saddle(jnp.array([-1.0, 4.0]), jnp.zeros(2), gradient_norm=0.0, loss=2.3)
      >>> float(score.strength)
      0.25
    """
    eigenvalues, residuals = _float32(eigenvalues), _float32(residuals)
    if not eigenvalues.size:
        raise ValueError("score_saddle needs at least one eigenvalue, got none: compute both ends.")
    given = [x is not None for x in (nodes, weights, num_parameters)]
    if any(given) and not all(given):
        raise ValueError(
            "score_saddle needs nodes, weights and num_parameters together: pass all three, or none of them."
        )
    first = jnp.argmin(eigenvalues)
    lowest, highest = eigenvalues[first], jnp.max(eigenvalues)
    if nodes is None or weights is None or num_parameters is None:
        negative = positive = share = jnp.full((), jnp.nan, jnp.float32)
    else:
        nodes, weights = _float32(nodes), _float32(weights)
        low, high = (jnp.mean(jnp.sum(weights * jnp.maximum(x, 0), -1)) for x in (-nodes, nodes))
        share = low / jnp.where(low + high > 0, low + high, 1)
        negative, positive = -low * num_parameters, high * num_parameters
    below = jnp.maximum(-lowest, 0)
    strength = jnp.where(highest > 0, below / jnp.where(highest > 0, highest, 1), jnp.inf)
    return SaddleScore(
        lambda_min=lowest,
        residual=residuals[first],
        lambda_max=highest,
        extreme_negative=jnp.sum(jnp.minimum(eigenvalues, 0)),
        extreme_positive=jnp.sum(jnp.maximum(eigenvalues, 0)),
        density_negative=negative,
        density_positive=positive,
        negative_share=share,
        # NaN stays NaN, as it does in the other fields.
        strength=jnp.where(below == 0, 0, jnp.where(jnp.isnan(lowest), lowest, strength)),
        gradient_norm=_float32(gradient_norm),
        loss=_float32(loss),
    )


def magnitude_rule(
    score: SaddleScore, *, beta: Scalar = 7.0, sums: Sums = "extreme"
) -> Bool[Array, "*batch"]:
    r"""Published: :math:`|\sum \lambda^-| \ge \beta`.

    It depends on the scale of the loss and of the parameters, and looks neither at the gradient nor at convergence.

    Args:
      score: of one point, or of several stacked.
      beta: threshold.
      sums: over the extreme eigenvalues, as published, or over all of them, from the density.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    return -_sums(score, sums)[0] >= beta


def ratio_rule(score: SaddleScore, *, alpha: Scalar = 0.4, sums: Sums = "extreme") -> Bool[Array, "*batch"]:
    r"""Published: :math:`|\sum \lambda^-| \ge \alpha \sum \lambda^+`, and some curvature is negative.

    Args:
      score: of one point, or of several stacked.
      alpha: threshold.
      sums: as in :func:`magnitude_rule`.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026. Without the second condition, a flat point would be a saddle.
    """
    negative, positive = _sums(score, sums)
    return (-negative >= alpha * positive) & (negative < 0)


def both_rule(
    score: SaddleScore, *, beta: Scalar = 7.0, alpha: Scalar = 0.4, sums: Sums = "extreme"
) -> Bool[Array, "*batch"]:
    """Published: :func:`magnitude_rule` and :func:`ratio_rule` at once."""
    return magnitude_rule(score, beta=beta, sums=sums) & ratio_rule(score, alpha=alpha, sums=sums)


def extreme_rule(score: SaddleScore, *, share: Scalar = 0.05) -> Bool[Array, "*batch"]:
    r"""Published: :math:`\lambda_{max} > 0` and :math:`\lambda_{min} < -0.05 \, \lambda_{max}`.

    Args:
      score: of one point, or of several stacked.
      share: of the largest eigenvalue, which the smallest must exceed in size.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    return (score.lambda_max > 0) & (score.lambda_min < -share * score.lambda_max)


def certified(score: SaddleScore) -> Bool[Array, "*batch"]:
    r"""Whether there is negative curvature for certain: :math:`\lambda_{min} + \lVert Hv - \lambda v \rVert_2 < 0`.

    A symmetric matrix has an eigenvalue within the residual of an approximate pair, so that one of them is negative
    even if Lanczos had not converged. Combine a published rule with it as ``ratio_rule(score) & certified(score)``. It
    speaks of the data of the Hessian only: negative curvature of a small batch need not be that of the whole set.

    Args:
      score: of one point, or of several stacked.

    References:
      Parlett, The Symmetric Eigenvalue Problem, 1998, theorem 4.5.1.
    """
    return score.lambda_min + score.residual < 0


def gated_rule(
    score: SaddleScore,
    *,
    min_strength: Scalar = 0.3,
    max_gradient_norm: Scalar = 0.02,
    lipschitz: Scalar | None = None,
) -> Bool[Array, "*batch"]:
    r"""A strong saddle as this library means it: strong, stationary and certified.

    * Strong: :math:`|\lambda_{min}| \ge s_0 \lambda_{max}`.
    * Stationary: curvature promises a larger decrease than the gradient,
      :math:`\frac{2}{3} |\lambda_{min}|^3 / \rho^2 > \lVert g \rVert^2 / (2 \lVert H \rVert_2)`, where the
      Hessian's Lipschitz constant :math:`\rho` is known, which changes with no scale; otherwise the gradient's norm is
      below a bound, which does.
    * Certified, as in :func:`certified`: a value that has not converged passes no rule.

    Args:
      score: of one point, or of several stacked.
      min_strength: :math:`s_0`.
      max_gradient_norm: bound of the gradient's norm, not used with lipschitz.
      lipschitz: :math:`\rho`, such as :math:`\lVert (H(\theta + hv) - H(\theta)) v \rVert_2 / h` along the eigenvector
        v of the smallest eigenvalue.

    References:
      Nesterov, Polyak, Cubic regularization of Newton method and its global performance, 2006, for the decrease along
      negative curvature; the bound .02 of the gradient is that of Dewan, SPRKD, arXiv 2607.23346, 2026.
    """
    if lipschitz is None:
        stationary = score.gradient_norm <= max_gradient_norm
    else:
        # The roots of both sides, multiplied out: no power overflows, and a quadratic, of constant 0, divides nothing.
        below = jnp.maximum(-score.lambda_min, 0)
        bend = jnp.sqrt(below) * jnp.sqrt(jnp.maximum(below, score.lambda_max))
        stationary = (2 / 3**0.5) * below * bend > score.gradient_norm * lipschitz
    return (score.strength >= min_strength) & stationary & certified(score)


def _float32(x: Any) -> Array:
    return jnp.asarray(x, jnp.float32)


def _sums(score: SaddleScore, sums: Sums) -> tuple[Array, Array]:
    if sums not in ("extreme", "density"):
        raise ValueError(f"sums must be 'extreme' or 'density', got {sums!r}.")
    if sums == "extreme":
        return score.extreme_negative, score.extreme_positive
    return score.density_negative, score.density_positive
