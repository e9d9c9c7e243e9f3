"""Attention and attribution maps over the positions of an image, and distances between them.

A map is flat, row-major, with one non-negative number per position:
``map_distance(attention_map(s), attention_map(t))`` or ``map_distance(attribution_map(g), attribution_map(h))``. Every
function returns one map or value per example and computes in float32; a zero map stays zero, with a zero gradient.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kdjax.losses._checks import Exponent, checked


@checked
def attention_map(
    features: Float[Array, "*batch height width channels"], *, power: Exponent = 2.0
) -> Float[Array, "*batch positions"]:
    r"""Attention map (AT): energy of a feature map at every position, scaled to unit 2-norm.

    .. math:: q / \|q\|_2, \qquad q_i = \frac{1}{C} \sum_c |f_{ic}|^p

    Average-pool features of different sizes before taking their maps, not after: pooling changes the norm.

    Args:
      features: activations, NHWC; signs do not matter.
      power: exponent p ≥ 1; larger values give more weight to the strongest activations.

    Returns:
      One map per example, of non-negative values, differentiable with respect to the features.

    Raises:
      ValueError: if the power is below 1, where the gradient at zero is infinite.

    References:
      Zagoruyko, Komodakis, `Paying More Attention to Attention <https://arxiv.org/abs/1612.03928>`_, 2017, section
      3.1, as in the authors' code. Default there: p 2.
    """
    energy = jnp.mean(jnp.abs(features.astype(jnp.float32)) ** power, axis=-1)
    return _unit(energy.reshape(*energy.shape[:-2], -1))


@checked
def attribution_map(
    attributions: Float[Array, "*batch height width channels"], *, scale: str = "unit_norm"
) -> Float[Array, "*batch positions"]:
    r"""Attribution map: importance of every position, from signed attributions of every input value.

    .. math:: m_i = \sum_c |a_{ic}|, \qquad \text{then } \frac{m}{\|m\|_2}
              \text{ or } \frac{m - \min m}{\max m - \min m}

    Args:
      attributions: integrated gradients or input gradients, say; ``[..., None]`` if channels are already summed.
      scale: ``"unit_norm"``, comparable with an :func:`attention_map`, or ``"min_max"``, from 0 to 1. A constant map
        has min–max values of zero.

    Returns:
      One map per example, of non-negative values.

    Raises:
      ValueError: if the scale has another name.

    References:
      Hernandez, Chang, Nordling, `Knowledge Distillation: Enhancing Neural Network Compression with Integrated
      Gradients <https://arxiv.org/abs/2503.13008>`_, 2025. Default there: min–max.
    """
    if scale == "unit_norm":
        return attention_map(attributions, power=1.0)
    if scale != "min_max":
        raise ValueError(f"attribution_map needs a scale of 'unit_norm' or 'min_max', got {scale!r}.")
    total = jnp.sum(jnp.abs(attributions.astype(jnp.float32)), axis=-1)
    flat = total.reshape(*total.shape[:-2], -1)
    low = jnp.min(flat, axis=-1, keepdims=True)
    span = jnp.max(flat, axis=-1, keepdims=True) - low
    return jnp.where(span == 0, 0, (flat - low) / jnp.where(span == 0, 1, span))


@checked
def map_distance(
    student_map: Float[Array, "*batch student_positions"],
    teacher_map: Float[Array, "*batch teacher_positions"],
) -> Float[Array, "*batch"]:
    r"""Mean squared difference of two maps.

    .. math:: \frac{1}{N} \sum_i (s_i - t_i)^2

    Maps of different sizes must be square; the larger is average-pooled to the smaller. This suits min–max maps.
    Pooling changes the norm of unit-norm maps: pool the features or attributions instead.

    Args:
      student_map: from :func:`attention_map` or :func:`attribution_map`.
      teacher_map: the same of the teacher; constant under differentiation.

    Returns:
      One non-negative value per example; zero where the maps agree. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the sizes differ and a map is not square.

    References:
      Zagoruyko, Komodakis, `Paying More Attention to Attention <https://arxiv.org/abs/1612.03928>`_, 2017, equation
      2, with the mean of the authors' code. Default weight there: 1000 on the sum over layers.
    """
    student = student_map.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_map).astype(jnp.float32)
    if student.shape[-1] != teacher.shape[-1]:
        side = min(_side(student), _side(teacher))
        student, teacher = _pooled(student, side), _pooled(teacher, side)
    return jnp.mean((student - teacher) ** 2, axis=-1)


@checked
def gradient_match(
    student_gradient: Float[Array, "*batch height width channels"],
    teacher_gradient: Float[Array, "*batch height width channels"],
    *,
    normalise: bool = True,
) -> Float[Array, "*batch"]:
    r"""Jacobian matching or Sobolev training: squared distance between two input gradients.

    .. math:: \left\| \frac{g_s}{\|g_s\|_2} - \frac{g_t}{\|g_t\|_2} \right\|_2^2 = 2 - 2 \cos(g_s, g_t)
              \qquad \text{or} \qquad \|g_s - g_t\|_2^2

    Compute the student's gradient inside the objective, in inference mode, with ``jax.grad`` of one logit summed over
    the batch, so that training differentiates through it. The teacher's may be cached.

    Args:
      student_gradient: of a logit with respect to the input, usually that of the label or of the teacher's prediction.
      teacher_gradient: of the same logit of the teacher; constant under differentiation.
      normalise: compare directions (Jacobian matching) rather than values (Sobolev training).

    Returns:
      One non-negative value per example, at most 4 if normalised; zero where the gradients agree. A zero gradient
      has no direction and is at squared distance 1 from any other. Reduce with ``jnp.mean``.

    References:
      Srinivas, Fleuret, `Knowledge Transfer with Jacobian Matching <https://arxiv.org/abs/1803.00443>`_, 2018,
      sections 3 and 4. Czarnecki et al., `Sobolev Training for Neural Networks <https://arxiv.org/abs/1706.04859>`_,
      2017, section 2. Both add it to a loss between the outputs.
    """
    student = student_gradient.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_gradient).astype(jnp.float32)
    student, teacher = (g.reshape(*g.shape[:-3], -1) for g in (student, teacher))
    if normalise:
        student, teacher = _unit(student), _unit(teacher)
    return jnp.sum((student - teacher) ** 2, axis=-1)


def _unit(flat: Float[Array, "*batch positions"]) -> Float[Array, "*batch positions"]:
    """Unit 2-norm; norms below 1e-12 count as 1e-12, so no square root is differentiated at zero."""
    return flat * jax.lax.rsqrt(jnp.maximum(jnp.sum(flat**2, axis=-1, keepdims=True), 1e-24))


def _side(flat: Float[Array, "*batch positions"]) -> int:
    side = math.isqrt(flat.shape[-1])
    if side * side != flat.shape[-1]:
        raise ValueError(
            f"map_distance can only pool square maps, got {flat.shape[-1]} positions; average-pool the features or "
            "attributions to one height and width before taking their maps."
        )
    return side


def _pooled(flat: Float[Array, "*batch positions"], side: int) -> Float[Array, "*batch pooled"]:
    """Average-pools to ``side`` × ``side`` bins, which overlap where the sizes do not divide."""
    size = _side(flat)
    if size == side:
        return flat
    if size % side == 0:
        cells = flat.reshape(*flat.shape[:-1], side, size // side, side, size // side)
        return jnp.mean(cells, axis=(-3, -1)).reshape(*flat.shape[:-1], -1)
    start, end = np.arange(side) * size // side, -(-np.arange(1, side + 1) * size // side)
    inside = (np.arange(size) >= start[:, None]) & (np.arange(size) < end[:, None])
    bins = jnp.asarray(inside / inside.sum(1, keepdims=True), jnp.float32)
    square = flat.reshape(*flat.shape[:-1], size, size)
    pooled = jnp.einsum("...hw,ih,jw->...ij", square, bins, bins, precision="highest")
    return pooled.reshape(*flat.shape[:-1], -1)
