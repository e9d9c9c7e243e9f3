"""Fake quantisation: values of a grid of integers, in float32, with straight-through gradients.

The grids are LiteRT's: activations have one scale and zero point, chosen so that zero is a value; kernels are
symmetric, with one scale per output channel.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.types import Scalar

LEAST = 1e-9
"""Width of a range of equal values, so that its scale isn't zero."""


def fake_quantise(x: Float[Array, "..."], low: Scalar, high: Scalar, *, bits: int = 8) -> Float[Array, "..."]:
    """Rounds activations to the ``2**bits`` values of a range.

    The gradient is 1 where the input lies in the range and 0 elsewhere; none reaches the range itself.

    Args:
      x: activations.
      low: smallest value to represent; 0 is representable in any case.
      high: largest.
      bits: of the integers.

    References:
      Jacob et al., `Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
      <https://arxiv.org/abs/1712.05877>`_, 2018, section 3.
    """
    scale, zero = grid(low, high, bits=bits)
    least, most = -zero * scale, (2**bits - 1 - zero) * scale
    inside = jnp.clip(x, least, most)
    rounded = (jnp.clip(jnp.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return inside + jax.lax.stop_gradient(rounded - inside)


def grid(low: Scalar, high: Scalar, *, bits: int = 8) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Step of the grid of a range, and the place of zero on it, counted from its smallest value."""
    low, high = (jax.lax.stop_gradient(jnp.asarray(edge, jnp.float32)) for edge in (low, high))
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = jnp.maximum(high - low, LEAST) / (2**bits - 1)
    return scale, jnp.round(-low / scale)


def fake_quantise_kernel(
    kernel: Float[Array, "*inputs features"], *, bits: int = 8
) -> Float[Array, "*inputs features"]:
    """Rounds a kernel to integers of one scale per output channel, the last axis.

    The largest magnitude of a channel becomes the largest integer. With 8 bits and more the smallest integer is not
    used, so that the grid is symmetric. The gradient is 1 everywhere.

    Args:
      kernel: weights; the bias is not quantised, since it is added to a 32-bit sum.
      bits: of the integers.
    """
    most = 2 ** (bits - 1) - 1
    bound = jnp.max(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    scale = jax.lax.stop_gradient(jnp.maximum(bound, LEAST) / most)
    rounded = jnp.clip(jnp.round(kernel / scale), -most if bits >= 8 else -most - 1, most) * scale
    return kernel + jax.lax.stop_gradient(rounded - kernel)
