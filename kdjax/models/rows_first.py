"""Convolution and pooling on a CPU, with the maps of a network laid out rows first and images last.

A map that a user knows as ``[batch, height, width, channels]`` is ``[groups, height, channels, width, images]`` here:
the batch is cut into groups of about :data:`IMAGES` images, which are the last axis. Four facts decide for it:

- A CPU computes with vectors of 8 or 16 numbers from the last axis. With images there, every vector is full however
  few channels a network has, and a shift along the width is a shift of whole vectors.
- So a row of the output is a few matmuls of ``[kernel width x features, channels]`` by rows of the input as they lie,
  whose parts are shifted along the width and added. No patches are built, no borders added, and the matmuls run near
  the core's peak from 16 channels on. What they read and write stays in the caches.
- Rows as the unit suit Winograd's minimal filtering along the height: four rows of a 3 x 3 kernel at stride 1 need 6
  products instead of 12, of sums of rows. (In both directions it would save more and round worse.)
- XLA's own gradients of a convolution are 5 to 80 times slower inside ``scan``, ``while`` or ``cond`` than at top
  level, because the rewrite that makes them fast applies to the entry computation only. Matmuls are as fast in either.

A stride along the width deals the columns out: those that lie a stride apart meet the same columns of the kernel, and
each such phase is a convolution of stride 1. The gradient by the input is dealt back the same way.

Convolution is bilinear and is differentiated as such: by a ``custom_vjp`` rule of three forms (output, gradient by the
input, gradient by the kernel), each with a ``custom_jvp`` rule that uses the form itself. So a Hessian-vector product
consists of the same fast loops. :func:`kdjax.models.apply_fn` chooses the layout of a whole network, since turning maps
around costs as much as the layout gains.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

IMAGES = 32
"""Images of a group: from 8 to 32 a form takes about as long, with more its rows leave the second-level cache."""

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
    # In a loop, which XLA does not fuse with what reads the maps: a change of layout inside another expression is slow.
    return lax.map(lambda group: jnp.transpose(group, (1, 3, 2, 0)), x.reshape(-1, images, *x.shape[1:]))


def to_nhwc(x: Maps) -> Float[Array, "batch height width channels"]:
    """The inverse of :func:`from_nhwc`."""
    x = lax.map(lambda group: jnp.transpose(group, (3, 0, 2, 1)), x)
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
    """Sizes of a convolution or pooling, which its forms share."""

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

    def turned(self) -> "_Window":
        """Of the convolution that is the gradient by the input, for strides of 1."""
        top, left = self.rows - 1 - self.top, self.columns - 1 - self.left
        size = {"height": self.new_height, "width": self.new_width, "new_height": self.height}
        return dataclasses.replace(self, **size, new_width=self.width, top=top, left=left)

    def tile(self, channels: int, dtype: Any) -> int:
        """How many output rows are made at once: 2 or 4 by Winograd's algorithm where it applies and pays, else 1."""
        if (self.rows, self.down) != (3, 1) or channels < 8 or jnp.finfo(dtype).bits < 32:
            return 1
        return min(_WINOGRAD, key=lambda rows: (-(-self.new_height // rows) * (rows + 2), rows))

    def row_phases(self) -> "_Phases":
        """Of the rows of the input."""
        return _phases(self.rows, self.down, self.top)

    def column_phases(self) -> "_Phases":
        """Of the columns of the input."""
        return _phases(self.columns, self.right, self.left)


_Phases: TypeAlias = dict[int, list[tuple[int, int]]]
"""Place within a stride -> the kernel's places that meet the inputs there, and by how many strides those are ahead."""


def _phases(size: int, stride: int, before: int) -> _Phases:
    found: _Phases = {}
    for place in range(size):
        ahead, phase = divmod(place - before, stride)
        found.setdefault(phase, []).append((place, ahead))
    return found


_WINOGRAD = {
    2: (
        ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    4: (
        (
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        (
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}
"""Output rows of a tile -> weights of its input rows, kernel rows and products (Lavin and Gray, CVPR 2016)."""


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


def _accumulated(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _weighted(weights: Sequence[float], terms: Sequence[Array]) -> Array:
    """Sum of the terms whose weight isn't zero."""
    pairs = zip(weights, terms, strict=True)
    scaled = (
        term if weight == 1 else -term if weight == -1 else weight * term for weight, term in pairs if weight
    )
    return functools.reduce(lax.add, scaled)


def _put(buffer: Array, values: Array, *place: Any) -> Array:
    """The buffer with these values from a place on; in place, inside a loop."""
    values = lax.expand_dims(values, range(buffer.ndim - values.ndim))
    return lax.dynamic_update_slice(buffer, values, place, allow_negative_indices=False)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=_accumulated(a.dtype))


def _dot_transposed(a: Array, b: Array) -> Array:
    last, batch = (a.ndim - 1,), tuple(range(a.ndim - 2))
    dimensions = ((last, last), (batch, batch))
    return lax.dot_general(a, b, dimensions, preferred_element_type=_accumulated(a.dtype))


def _mixed(weights: np.ndarray, x: Array) -> Array:
    """``weights @ x`` over the first axis, which is short."""
    columns = weights.astype(x.dtype).T.reshape(len(x), -1, *(1,) * (x.ndim - 1))
    return functools.reduce(jnp.add, (column * part[None] for column, part in zip(columns, x, strict=True)))


def _combined_rows(weights: np.ndarray, x: Array, group: Array, first: Array) -> Array:
    """Weighted sums of rows of a group from the first on, ``[sums, channels, columns x images]``; zeros outside of it.

    As a matmul of rows as they lie: where some are outside, others are read and their weights moved.
    """
    count = weights.shape[1]
    matrix = jnp.asarray(np.pad(weights, ((0, 0), (count, count))), x.dtype)
    start = jnp.clip(first, 0, x.shape[1] - count)
    moved = count + jnp.clip(start - first, -count, count)
    place = group * x.shape[1] + start
    rows = x.reshape(-1, x.shape[2] * x.shape[3] * x.shape[4])
    rows = lax.dynamic_slice_in_dim(rows, place, count, allow_negative_indices=False)
    # The barrier keeps XLA from merging the slice with changes of shape.
    sums = _dot(lax.dynamic_slice_in_dim(matrix, moved, count, axis=1), lax.optimization_barrier(rows))
    return sums.astype(x.dtype).reshape(-1, x.shape[2], x.shape[3] * x.shape[4])


def _at_least(x: Array, rows: int) -> Array:
    """The maps, with rows of zeros below if they have fewer."""
    missing = rows - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0))) if missing > 0 else x


def _span(ahead: int, columns: int, width: int) -> Pair:
    """From which to which of ``width`` places there is a column so many further on."""
    return max(0, -ahead), min(width, columns - ahead)


def _sums_of_shifts(
    parts: Sequence[Array], ahead: Sequence[int], images: int, width: int
) -> list[tuple[int, Array]]:
    """Sum of ``[..., columns x images]``, each read from so many columns further on, where they have them.

    In pieces with their first column, within each of which the same parts take part: no number is asked whether it is
    inside, and each is written once.
    """
    pairs = zip(parts, ahead, strict=True)
    spans = [_span(shift, part.shape[-1] // images, width) for part, shift in pairs]
    pieces = []
    for begin, end in itertools.pairwise(sorted({edge for span in spans for edge in span})):
        seen = [
            lax.slice_in_dim(part, (begin + shift) * images, (end + shift) * images, axis=-1)
            for part, shift, span in zip(parts, ahead, spans, strict=True)
            if span[0] <= begin and end <= span[1]
        ]
        if seen:
            pieces.append((begin, functools.reduce(lax.add, seen)))
    return pieces


def _columns(lines: Array, phase: int, stride: int, images: int) -> Array:
    """Of ``[..., columns x images]``, every column a stride apart."""
    if stride == 1:
        return lines
    dealt = lines.reshape(*lines.shape[:-1], -1, stride, images)
    return lax.index_in_dim(dealt, phase, -2, keepdims=False).reshape(*lines.shape[:-1], -1)


def _reader(x: Array, w: _Window, size: int) -> Callable[[Array, Array], dict[int, Array]]:
    """A function of a group and a tile that reads what a loop computes ``size`` output rows from.

    For each phase of the columns it returns what a matmul takes: the rows under the kernel, ``[rows x channels, columns
    x images]``, or for Winograd's algorithm sums of rows, ``[sums, channels, columns x images]``.
    """
    images, missing = x.shape[4], -w.width % w.right
    weights = np.eye(w.rows) if size == 1 else np.array(_WINOGRAD[size][0])
    if missing:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
    x = _at_least(x, weights.shape[1])

    def read(group, tile):
        lines = _combined_rows(weights, x, group, tile * (size * w.down) - w.top)
        seen = {phase: _columns(lines, phase, w.right, images) for phase in w.column_phases()}
        return {phase: y.reshape(-1, y.shape[2]) for phase, y in seen.items()} if size == 1 else seen

    return read


# Jitted here too: the gradient by the input of a layer with as many features as channels is the same program.
@functools.partial(jax.jit, static_argnums=2)
def _forward(x: Array, kernel: Array, w: _Window) -> Array:
    groups, channels, images, features = x.shape[0], x.shape[2], x.shape[4], kernel.shape[3]
    size, phases = w.tile(channels, x.dtype), w.column_phases()
    tiles = -(-w.new_height // size)
    matrices = {}
    for phase, taps in phases.items():
        seen = jnp.stack([kernel[:, column] for column, _ in taps], 1)
        if size == 1:
            matrices[phase] = jnp.transpose(seen, (1, 3, 0, 2)).reshape(len(taps) * features, -1)
        else:
            seen = jnp.swapaxes(_mixed(np.array(_WINOGRAD[size][1]), seen), 2, 3)
            matrices[phase] = seen.reshape(len(seen), -1, channels)
    read = _reader(x, w, size)

    def tile(carry, step):
        out, products = carry
        lines = read(step // tiles, step % tiles)
        parts, ahead = [], []
        for phase, taps in phases.items():
            found = _dot(matrices[phase], lines[phase])
            found = found.reshape(*found.shape[:-2], len(taps), features, -1)
            parts += [lax.index_in_dim(found, place, -3, keepdims=False) for place in range(len(taps))]
            ahead += [further for _, further in taps]
        for begin, y in _sums_of_shifts(parts, ahead, images, w.new_width):
            if size == 1:
                out = _put(out, y.astype(out.dtype), step, 0, begin * images)
            else:
                products = _put(products, y, 0, 0, begin * images)
        if size > 1:
            terms = [lax.index_in_dim(products, i, keepdims=False) for i in range(size + 2)]
            for place, weights in enumerate(_WINOGRAD[size][2]):
                out = _put(out, _weighted(weights, terms), step * size + place, 0, 0)
        return (out, products), None

    out = jnp.zeros((groups * tiles * size, features, w.new_width * images), x.dtype)
    products = jnp.zeros((0 if size == 1 else size + 2, features, w.new_width * images), x.dtype)
    (out, _), _ = lax.scan(tile, (out, products), jnp.arange(groups * tiles))
    return out.reshape(groups, -1, features, w.new_width, images)[:, : w.new_height]


def _conv_dx(kernel: Array, dy: Array, w: _Window) -> Array:
    if w.down == w.right == 1:
        return _forward(dy, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), w.turned())
    groups, images, channels = dy.shape[0], dy.shape[4], kernel.shape[2]
    tall, wide = -(-w.height // w.down), -(-w.width // w.right)
    # What the forward pass reads from ahead of an output, the gradient adds from behind an input.
    column_phases = w.column_phases()
    row_phases = {phase: taps[::-1] for phase, taps in w.row_phases().items()}  # in the order of dy's rows
    matrices = {
        phase: jnp.stack([kernel[row] for row, _ in taps], 2).reshape(w.columns * channels, -1)
        for phase, taps in row_phases.items()
    }
    dy = _at_least(dy, max(map(len, row_phases.values())))

    def strip(out, step):
        group, line = step // tall, step % tall
        for down, taps in row_phases.items():
            lines = _combined_rows(np.eye(len(taps)), dy, group, line - taps[0][1])
            found = _dot(matrices[down], lines.reshape(-1, lines.shape[2])).reshape(w.columns, channels, -1)
            for right, taps in column_phases.items():
                parts = [lax.index_in_dim(found, column, keepdims=False) for column, _ in taps]
                behind = [-ahead for _, ahead in taps]
                for begin, y in _sums_of_shifts(parts, behind, images, wide):
                    y = y.astype(dy.dtype).reshape(channels, -1, 1, images)
                    out = _put(out, y, step * w.down + down, 0, begin, right, 0)
        return out, None

    out = jnp.zeros((groups * tall * w.down, channels, wide, w.right, images), dy.dtype)
    out, _ = lax.scan(strip, out, jnp.arange(groups * tall))
    out = out.reshape(groups, tall * w.down, channels, wide * w.right, images)
    return out[:, : w.height, :, : w.width]


def _conv_dk(x: Array, dy: Array, w: _Window) -> Array:
    groups, channels, images, features = x.shape[0], x.shape[2], x.shape[4], dy.shape[2]
    size, phases = w.tile(channels, x.dtype), w.column_phases()
    tiles, columns = -(-w.new_height // size), -(-w.width // w.right)
    read, dy = _reader(x, w, size), _at_least(dy, size)
    weights = np.eye(1) if size == 1 else np.transpose(_WINOGRAD[size][2])

    def tile(totals, step):
        group, place = step // tiles, step % tiles
        lines, totals = read(group, place), dict(totals)
        dline = _combined_rows(weights, dy, group, place * size)
        dline = dline[0] if size == 1 else dline
        for phase, taps in phases.items():
            for column, ahead in taps:
                begin, end = _span(ahead, columns, w.new_width)
                if begin < end:
                    seen, met = (
                        lax.slice_in_dim(values, (begin + moved) * images, (end + moved) * images, axis=-1)
                        for values, moved in ((lines[phase], ahead), (dline, 0))
                    )
                    totals[column] += _dot_transposed(seen, met)
        return totals, None

    shape = (w.rows * channels, features) if size == 1 else (size + 2, channels, features)
    totals = dict.fromkeys(range(w.columns), jnp.zeros(shape, _accumulated(x.dtype)))
    totals, _ = lax.scan(tile, totals, jnp.arange(groups * tiles))
    dk = jnp.stack([totals[column].reshape(-1, channels, features) for column in range(w.columns)], 1)
    if size > 1:
        dk = _mixed(np.transpose(_WINOGRAD[size][1]), dk)
    return dk.astype(x.dtype)


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
