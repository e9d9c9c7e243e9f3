"""Convolution and pooling on a CPU, with the maps of a network laid out rows first and images last.

A map that a user knows as ``[batch, height, width, channels]`` is ``[groups, height, channels, width, images]`` here:
the batch is cut into groups of about :data:`IMAGES` images, which are the last axis. Four facts decide for it:

- A CPU computes with vectors of 8 or 16 numbers from the last axis. With images there, every vector is full however
  few channels a network has, and a shift along the width is a shift of whole vectors.
- A row of all channels is contiguous, and so are the rows under a window. Hence an output row needs one matmul: of
  ``[kernel width x features, kernel height x channels]`` by the rows as they lie. Its parts are shifted along the width
  and added. No patches are built, and the matmul runs near the core's peak from 16 channels on.
- What one row of a group needs fits into the second-level cache.
- XLA's own gradients of a convolution are 5 to 80 times slower inside ``scan``, ``while`` or ``cond`` than at top
  level, because the rewrite that makes them fast applies to the entry computation only. Matmuls are as fast in either.

A stride along the width is folded into the channels: columns that lie a stride apart become neighbours, and the
convolution is one of stride 1 with more channels and a narrower kernel.

Convolution is bilinear and is differentiated as such: by a ``custom_vjp`` rule of three forms (output, gradient by the
input, gradient by the kernel), each with a ``custom_jvp`` rule that uses the form itself. So a Hessian-vector product
consists of the same fast loops. :func:`kdjax.models.apply_fn` chooses the layout of a whole network, since turning maps
around costs as much as the layout gains.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

IMAGES = 32
"""Images of a group, for second-level caches of one or two megabytes."""

Pair: TypeAlias = tuple[int, int]
Pads: TypeAlias = tuple[Pair, Pair]
Maps: TypeAlias = Float[Array, "groups height channels width images"]


def images_per_group(batch: int) -> int | None:
    """How a batch is cut: its divisor between 8 and 128 that is nearest to :data:`IMAGES`; None if it has none."""
    divisors = [n for n in range(8, 129) if batch % n == 0]
    return min(divisors, key=lambda n: (max(n, IMAGES) / min(n, IMAGES), n), default=None)


def suits(x: Any) -> bool:
    """Whether images are of a number for which this layout is faster."""
    return getattr(x, "ndim", 0) == 4 and images_per_group(len(x)) is not None


def from_nhwc(x: Float[Array, "batch height width channels"]) -> Maps:
    """Images or maps in the layout of this module.

    Raises:
      ValueError: if the batch has no divisor between 8 and 128; ask :func:`images_per_group` first.
    """
    images = images_per_group(len(x))
    if images is None:
        raise ValueError(f"a batch of {len(x)} can't be cut into groups of 8 to 128 images.")
    return jnp.transpose(x.reshape(-1, images, *x.shape[1:]), (0, 2, 4, 3, 1))


def to_nhwc(x: Maps) -> Float[Array, "batch height width channels"]:
    """The inverse of :func:`from_nhwc`."""
    x = jnp.transpose(x, (0, 4, 1, 3, 2))
    return x.reshape(-1, *x.shape[2:])


# Convolution


def _by_linearity(form: Callable[..., Array]) -> Callable[..., Array]:
    """A bilinear ``form(a, b, options)`` whose tangent is the form itself of a tangent and an argument."""
    # Layers of one shape share the traced form.
    function = jax.custom_jvp(jax.jit(form, static_argnums=2), nondiff_argnums=(2,))

    def rule(options, primals, tangents):
        (a, b), (da, db) = primals, tangents
        y = function(a, b, options)
        parts = [] if isinstance(da, SymbolicZero) else [function(da, b, options)]
        parts += [] if isinstance(db, SymbolicZero) else [function(a, db, options)]
        return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)

    function.defjvp(rule, symbolic_zeros=True)
    return function


def _with_gradients(
    forward: Callable[..., Array], dx: Callable[..., Array], dk: Callable[..., Array]
) -> Callable[..., Array]:
    """``(x, kernel, options)`` with its gradients ``dx(kernel, dy, options)`` and ``dk(x, dy, options)``."""
    forward, dx, dk = _by_linearity(forward), _by_linearity(dx), _by_linearity(dk)
    function = jax.custom_vjp(forward, nondiff_argnums=(2,))

    def saving(x, kernel, options):
        return forward(x, kernel, options), (x, kernel)

    def backward(options, saved, dy):
        x, kernel = saved
        return dx(kernel, dy, options), dk(x, dy, options)

    function.defvjp(saving, backward)
    return function


@dataclasses.dataclass(frozen=True)
class _Window:
    """Sizes of a convolution or pooling, which its three forms share."""

    height: int
    width: int
    rows: int
    columns: int
    down: int
    right: int
    top: int
    left: int
    new_height: int
    new_width: int

    @property
    def folds(self) -> int:
        """How many columns become channels of one."""
        return min(self.right, self.columns)

    @property
    def taps(self) -> int:
        """Width of the kernel once its columns are folded."""
        return -(-self.columns // self.right)

    def turned(self) -> "_Window":
        """Of the convolution that is the gradient by the input, for strides of 1."""
        top, left = self.rows - 1 - self.top, self.columns - 1 - self.left
        size = {"height": self.new_height, "width": self.new_width, "new_height": self.height}
        return dataclasses.replace(self, **size, new_width=self.width, top=top, left=left)


def _window(x: Array, window: Pair, strides: Pair, pads: Pads) -> _Window:
    height, width = x.shape[1], x.shape[3]
    new_height = (height + sum(pads[0]) - window[0]) // strides[0] + 1
    new_width = (width + sum(pads[1]) - window[1]) // strides[1] + 1
    rows, columns, down, right, top, left = *window, *strides, pads[0][0], pads[1][0]
    return _Window(height, width, rows, columns, down, right, top, left, new_height, new_width)


def conv(
    x: Maps, kernel: Array, strides: Pair, pads: Pads
) -> Float[Array, "groups new_height features new_width images"]:
    """Convolution with a kernel in ``HWIO``; padding before and after, by axis, as in ``lax.conv_general_dilated``."""
    return _conv(x, kernel, _window(x, (kernel.shape[0], kernel.shape[1]), strides, pads))


def _padded(x: Array, top: int, height: int, left: int, width: int) -> Array:
    """The map moved by rows and columns into one of the given size, zeros around it; negative numbers crop.

    By concatenation, which copies whole lines; ``lax.pad`` asks for each number whether it is inside.
    """
    for axis, before, size in ((1, top, height), (3, left, width)):
        after = size - before - x.shape[axis]
        x = lax.slice_in_dim(x, max(-before, 0), x.shape[axis] + min(after, 0), axis=axis)
        zeros = [
            jnp.zeros((*x.shape[:axis], max(n, 0), *x.shape[axis + 1 :]), x.dtype) for n in (before, after)
        ]
        if zeros[0].size or zeros[1].size:
            x = jnp.concatenate([zeros[0], x, zeros[1]], axis)
    return x


def _folded_rows(x: Array, w: _Window) -> tuple[Array, int]:
    """``[rows x folds x channels, columns x images]`` of all groups, zeros around them; and the rows of one group."""
    height, columns = (w.new_height - 1) * w.down + w.rows, w.new_width + w.taps - 1
    x = _padded(x, w.top, height, w.left, columns * w.right)
    if w.right > 1:
        x = jnp.stack([x[:, :, :, fold :: w.right] for fold in range(w.folds)], 2)
    return x.reshape(-1, columns * x.shape[-1]), height


def _folded_kernel(kernel: Array, w: _Window) -> Array:
    """``[kernel rows, taps, folds, channels, features]``."""
    kernel = jnp.pad(kernel, ((0, 0), (0, w.taps * w.right - w.columns), (0, 0), (0, 0)))
    return kernel.reshape(w.rows, w.taps, w.right, *kernel.shape[2:])[:, :, : w.folds]


def _sum_of_shifts(parts: Array, images: int, width: int) -> Array:
    """``[taps, features, columns x images]``, each shifted by one more column, to ``[features, width x images]``."""
    return functools.reduce(
        jnp.add, (part[:, tap * images : (tap + width) * images] for tap, part in enumerate(parts))
    )


def _accumulated(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=_accumulated(a.dtype))


def _dot_transposed(a: Array, b: Array) -> Array:
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=_accumulated(a.dtype))


def _forward(x: Array, kernel: Array, w: _Window) -> Array:
    groups, channels, images, features = x.shape[0], x.shape[2], x.shape[4], kernel.shape[3]
    rows, height = _folded_rows(x, w)
    lines, depth = w.folds * channels, w.rows * w.folds * channels
    matrix = jnp.transpose(_folded_kernel(kernel, w), (1, 4, 0, 2, 3)).reshape(w.taps * features, depth)

    def row(out, place):
        group, line = place // w.new_height, place % w.new_height
        start = (group * height + line * w.down) * lines
        # The barrier keeps XLA from merging the slice with the slices and changes of shape after it.
        seen = lax.optimization_barrier(lax.dynamic_slice_in_dim(rows, start, depth))
        parts = _dot(matrix, seen).reshape(w.taps, features, -1)
        y = _sum_of_shifts(parts, images, w.new_width).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(out, y[None], place, 0), None

    out = jnp.zeros((groups * w.new_height, features, w.new_width * images), x.dtype)
    out, _ = lax.scan(row, out, jnp.arange(len(out)))
    return out.reshape(groups, w.new_height, features, w.new_width, images)


def _row(rows: Array, place: Array) -> Array:
    return lax.dynamic_index_in_dim(rows, place, 0, keepdims=False)


def _conv_dx(kernel: Array, dy: Array, w: _Window) -> Array:
    if w.down == w.right == 1:
        return _forward(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), w.turned())
    groups, images, (channels, features) = dy.shape[0], dy.shape[4], kernel.shape[2:]
    # Input rows down * u + phase get the kernel's rows phase, phase + down, ... of dy's rows u, u - 1, ...
    first, last = w.top // w.down, -(-(w.top + w.height) // w.down)
    begin, end = w.left // w.right, -(-(w.left + w.width) // w.right)
    reach, wide = -(-w.rows // w.down), end - begin
    height, columns = last - first + reach - 1, wide + w.taps - 1
    rows = _padded(dy, reach - 1 - first, height, w.taps - 1 - begin, columns).reshape(-1, columns * images)
    folded = _folded_kernel(kernel, w)[:, ::-1]
    phases = [folded[phase :: w.down][::-1] for phase in range(w.down)]  # the latest row of dy comes last
    matrices = [
        jnp.transpose(part, (1, 2, 3, 0, 4)).reshape(w.taps * w.folds * channels, -1) for part in phases
    ]

    def some(out, place):
        group, line = place // (last - first), place % (last - first)
        for phase, matrix in enumerate(matrices):
            depth = matrix.shape[1]
            if not depth:
                continue
            start = (group * height + line + reach) * features - depth
            seen = lax.optimization_barrier(lax.dynamic_slice_in_dim(rows, start, depth))
            parts = _dot(matrix, seen).reshape(w.taps, w.folds * channels, -1)
            y = _sum_of_shifts(parts, images, wide).reshape(w.folds, channels, wide, images)
            y = jnp.pad(y, ((0, w.right - w.folds), (0, 0), (0, 0), (0, 0)))
            y = jnp.transpose(y, (1, 2, 0, 3)).reshape(1, channels, -1).astype(dy.dtype)
            out = lax.dynamic_update_slice_in_dim(out, y, place * w.down + phase, 0)
        return out, None

    out = jnp.zeros((groups * (last - first) * w.down, channels, wide * w.right * images), dy.dtype)
    out, _ = lax.scan(some, out, jnp.arange(groups * (last - first)))
    out = out.reshape(groups, -1, channels, wide * w.right, images)
    return _padded(out, first * w.down - w.top, w.height, begin * w.right - w.left, w.width)


def _conv_dk(x: Array, dy: Array, w: _Window) -> Array:
    channels, images, features = x.shape[2], x.shape[4], dy.shape[2]
    rows, height = _folded_rows(x, w)
    lines, depth = w.folds * channels, w.rows * w.folds * channels
    dys = dy.reshape(-1, features, w.new_width * images)

    def add(totals, place):
        group, line = place // w.new_height, place % w.new_height
        start = (group * height + line * w.down) * lines
        seen = lax.optimization_barrier(lax.dynamic_slice_in_dim(rows, start, depth))
        line = _row(dys, place)
        shifts = (seen[:, tap * images : (tap + w.new_width) * images] for tap in range(w.taps))
        return tuple(
            total + _dot_transposed(shift, line) for total, shift in zip(totals, shifts, strict=True)
        ), None

    zeros = tuple(jnp.zeros((depth, features), _accumulated(x.dtype)) for _ in range(w.taps))
    totals, _ = lax.scan(add, zeros, jnp.arange(len(dys)))
    dk = jnp.stack(totals).reshape(w.taps, w.rows, w.folds, channels, features)
    dk = jnp.pad(jnp.swapaxes(dk, 0, 1), ((0, 0), (0, 0), (0, w.right - w.folds), (0, 0), (0, 0)))
    return dk.reshape(w.rows, -1, channels, features)[:, : w.columns].astype(x.dtype)


_conv = _with_gradients(_forward, _conv_dx, _conv_dk)


# Pooling, mean and normalisation


def _windows(x: Array, w: _Window, fill: float = 0.0) -> list[Array]:
    """One strided slice of the padded maps per offset in the window, in row-major order."""
    height, width = (w.new_height - 1) * w.down + w.rows, (w.new_width - 1) * w.right + w.columns
    edges = [(0, 0, 0)] * 5
    edges[1] = (w.top, height - w.top - x.shape[1], 0)
    edges[3] = (w.left, width - w.left - x.shape[3], 0)
    # The barrier keeps XLA from padding for each offset anew.
    x = lax.optimization_barrier(lax.pad(x, jnp.asarray(fill, x.dtype), edges))
    down, right = (w.new_height - 1) * w.down + 1, (w.new_width - 1) * w.right + 1
    return [
        x[:, i : i + down : w.down, :, j : j + right : w.right]
        for i in range(w.rows)
        for j in range(w.columns)
    ]


def max_pool(
    x: Maps, window: Pair, strides: Pair, pads: Pads
) -> Float[Array, "groups new_height channels new_width images"]:
    """Largest value in each window; the gradient goes to its first occurrence in row-major order."""
    return _max_pool(x, _window(x, window, strides, pads))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(x: Array, w: _Window) -> Array:
    return functools.reduce(jnp.maximum, _windows(x, w, -jnp.inf))


@_max_pool.defjvp
def _max_pool_jvp(w, primals, tangents):
    (x,), (dx,) = primals, tangents
    y = _max_pool(x, w)
    return y, at_first_maximum(_windows(x, w, -jnp.inf), y, _windows(dx, w))


def at_first_maximum(seen: Sequence[Array], largest: Array, values: Sequence[Array]) -> Array:
    """Of the values at each offset in a window, those where the map first has its largest value."""
    first = jnp.full(largest.shape, len(seen), jnp.int32 if len(seen) > 255 else jnp.uint8)
    for place in reversed(range(len(seen))):
        first = jnp.where(seen[place] == largest, place, first).astype(first.dtype)
    return functools.reduce(
        jnp.add, (jnp.where(first == place, part, 0) for place, part in enumerate(values))
    )


def channel_mean(x: Maps) -> Float[Array, " channels"]:
    """Mean over images and positions; the last sum is a product with ones, which XLA does not do number by number."""
    sums = jnp.sum(x, (0, 1, 3))
    return sums @ jnp.full(sums.shape[1], sums.shape[0] / x.size, x.dtype)


def position_mean(x: Maps) -> Float[Array, "batch channels"]:
    """Mean over the positions of each map."""
    means = jnp.mean(x, (1, 3))
    return jnp.swapaxes(means, 1, 2).reshape(-1, x.shape[2])
