"""Convolution and pooling in ``CHWN`` layout, with the batch last, for networks of few channels on a CPU.

A CPU computes with vectors of about eight numbers from the last axis. In ``NHWC`` these are channels: with two
channels most of each vector is empty, and patches for a matmul are copied number by number. In ``CHWN`` every vector is
full, and patches are copies of whole rows, made for one output row at a time so that they stay in the cache. (A sum of
shifted maps is faster still, but its Hessian compiles slowly.) A network keeps all its maps in this layout, since
transposing them costs as much as the layout gains.

On other platforms these are XLA's own operations, which choose their layout themselves. As in
:mod:`kdjax.models.layers`, the gradients of a convolution are ``custom_vjp`` rules that forward mode can differentiate
and that are as fast inside loops.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from kdjax.models.layers import by_form


class Conv(nn.Module):
    """Convolution of stride 1 without padding, with the parameters of ``flax.linen.Conv``: "kernel" and "bias".

    Attributes:
      features: output channels.
      kernel_size: height and width of the window.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: int
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "channels height width batch"]
    ) -> Float[Array, "features new_height new_width batch"]:
        """Convolves."""
        shape = (self.kernel_size, self.kernel_size, x.shape[0], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:], jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return conv(x, kernel) + bias[:, None, None, None]


def conv(
    x: Float[Array, "channels height width batch"],
    kernel: Float[Array, "kernel_height kernel_width channels features"],
) -> Float[Array, "features new_height new_width batch"]:
    """Convolution of stride 1 without padding.

    Args:
      x: images, ``CHWN``.
      kernel: weights, ``HWIO``.

    Raises:
      ValueError: if the kernel does not fit into the image.
    """
    (height, width), window = x.shape[1:3], kernel.shape[:2]
    if height < window[0] or width < window[1]:
        raise ValueError(
            f"a {window[0]}x{window[1]} window does not fit into a {height}x{width} map: "
            "use larger images or a smaller network."
        )
    return _conv(x, kernel)


def max_pool(
    x: Float[Array, "channels height width batch"], window: int
) -> Float[Array, "channels new_height new_width batch"]:
    """Largest value in each window; windows do not overlap, and equal values share the gradient."""
    height, width = x.shape[1] // window * window, x.shape[2] // window * window
    places = (x[:, i:height:window, j:width:window] for i in range(window) for j in range(window))
    return functools.reduce(jnp.maximum, places)


def _cpu_conv(x: Array, kernel: Array) -> Array:
    rows, columns, _, features = kernel.shape
    height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    matrix = kernel.reshape(-1, features).T.astype(jnp.float32)
    y = lax.map(lambda row: matrix @ _patches(x, row, kernel.shape[:2]), jnp.arange(height))
    return jnp.moveaxis(y.reshape(height, features, width, -1), 0, 1).astype(x.dtype)


def _cpu_conv_dx(x: Array, kernel: Array, dy: Array) -> Array:
    del x
    (rows, columns), turned = kernel.shape[:2], jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    edges = ((0, 0), (rows - 1, rows - 1), (columns - 1, columns - 1), (0, 0))
    return _cpu_conv(jnp.pad(dy, edges), turned)


def _cpu_conv_dw(x: Array, kernel: Array, dy: Array) -> Array:
    def add(total, row):
        line = lax.dynamic_index_in_dim(dy, row, 1, keepdims=False).reshape(dy.shape[0], -1)
        return total + _patches(x, row, kernel.shape[:2]) @ line.T.astype(jnp.float32), None

    zeros = jnp.zeros((kernel[..., 0].size, kernel.shape[-1]), jnp.float32)
    total, _ = lax.scan(add, zeros, jnp.arange(dy.shape[1]))
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _patches(x: Array, row: Array, window: tuple[int, ...]) -> Float[Array, "taps places"]:
    """Patches for one output row, in the order of a flattened ``HWI`` kernel; they fit the cache."""
    seen = lax.dynamic_slice_in_dim(x, row, window[0], 1).astype(jnp.float32)
    width = x.shape[2] - window[1] + 1
    parts = [seen[:, i, j : j + width] for i in range(window[0]) for j in range(window[1])]
    return jnp.concatenate(parts).reshape(window[0] * window[1] * x.shape[0], -1)


def _native_conv(x: Array, kernel: Array) -> Array:
    order = ("CHWN", "HWIO", "CHWN")
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=order)


_conv = by_form(_cpu_conv, _cpu_conv_dx, _cpu_conv_dw, native=_native_conv, options=0)
