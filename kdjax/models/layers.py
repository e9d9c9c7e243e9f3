"""Convolution, pooling and normalisation in the fastest form for each platform.

Maps are ``[batch, height, width, channels]`` everywhere but in a network compiled for a CPU, whose maps may be rows
first: :mod:`kdjax.models.rows_first` says why, and every function here takes either. On a GPU or TPU all are XLA's own
operations. On a CPU those in NHWC, of a few images or in a network of one's own, have the same value and gradient in
forms that XLA compiles to faster code:

- XLA's gradients of a convolution are slow inside ``scan``, ``while`` or ``cond``; a *forward* convolution is as fast
  in a loop. So the input gradient is a forward convolution or a matmul, and the weight gradient is a matmul on patches.
- A buffer of patches beyond a few megabytes costs more in page faults than the matmul that reads it. So the batch is
  processed in chunks of :data:`CHUNK_BYTES`.
- The gradient of ``reduce_window`` (max-pooling) and grouped (depthwise) convolutions are ten times slower than shifted
  slices.

The gradients of convolutions are ``custom_vjp`` rules. So ``jax.jvp`` of a network raises an error, but ``jax.jvp`` or
``jax.linearize`` of its ``jax.grad`` works, as Hessian-vector products need, and so does reverse over reverse.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from kdjax.models import rows_first
from kdjax.types import Outputs

CHUNK_BYTES = 4 * 2**20
"""Size of the patches of one matmul. The time is equal from 1 to 4 MiB, and up to 1.4 times longer at 16 MiB."""

NATIVE_CHANNELS = range(16, 65)
"""Input channels for which XLA's forward convolution, at stride 1, beats patches × matmul on a CPU.

Patches took .6 of its time at 8 channels and 1.1 to 1.6 at 16 to 64. From 96 to 256 channels they took 1.05 to 1.2 at
stride 1 but .75 to .85 at stride 2, and .34 in the Keras teacher (256 to 512 channels, 256 images).
"""

Pair: TypeAlias = tuple[int, int]
Pads: TypeAlias = tuple[Pair, Pair]

Maps: TypeAlias = Float[Array, "..."]
"""Images or maps: ``[batch, height, width, channels]``, or rows first as in :mod:`kdjax.models.rows_first`."""


def conv(
    x: Maps,
    kernel: Float[Array, "kernel_height kernel_width channels features"],
    *,
    strides: int | Sequence[int] = 1,
    padding: str = "SAME",
) -> Maps:
    """Convolution of images with a kernel, as ``lax.conv_general_dilated`` defines it.

    Args:
      x: images, channels last.
      kernel: weights, ``HWIO``.
      strides: step of the window, one number or one per axis.
      padding: "SAME" or "VALID".

    Raises:
      ValueError: if the kernel does not fit into the image.
    """
    strides = _pair(strides)
    pads = _pads(x, _pair(kernel.shape[:2]), strides, padding)
    return (rows_first.conv if x.ndim == 5 else padded_conv)(x, kernel, strides, pads)


def depthwise_conv(
    x: Maps,
    kernel: Float[Array, "kernel_height kernel_width 1 channels"],
    *,
    strides: int | Sequence[int] = 1,
    padding: str = "SAME",
) -> Maps:
    """Convolution of every channel with its own kernel (``feature_group_count`` equal to the channels).

    Args:
      x: images, channels last.
      kernel: weights, ``HWIO`` with one input channel.
      strides: step of the window, one number or one per axis.
      padding: "SAME" or "VALID".

    Raises:
      ValueError: if the kernel does not fit into the image.
    """
    strides = _pair(strides)
    pads = _pads(x, _pair(kernel.shape[:2]), strides, padding)
    if x.ndim == 5:  # measured: no faster rows first
        return rows_first.from_nhwc(padded_depthwise_conv(rows_first.to_nhwc(x), kernel, strides, pads))
    return padded_depthwise_conv(x, kernel, strides, pads)


def max_pool(
    x: Maps,
    window_shape: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str = "VALID",
) -> Maps:
    """Largest value in each window; the gradient goes to its first occurrence in row-major order.

    Args:
      x: images, channels last.
      window_shape: one number or one per axis.
      strides: step of the window; 1 by default, as in ``flax.linen.max_pool``.
      padding: "SAME" or "VALID"; padding is never the maximum.

    Raises:
      ValueError: if the window does not fit into the image.
    """
    window, strides = _pair(window_shape), _pair(1 if strides is None else strides)
    pads = _pads(x, window, strides, padding)
    return (rows_first.max_pool if x.ndim == 5 else padded_max_pool)(x, window, strides, pads)


class Conv(nn.Module):
    """Convolution with the parameters of ``flax.linen.Conv``: "kernel" (``HWIO``) and optionally "bias".

    Attributes:
      features: output channels.
      kernel_size: height and width of the window.
      strides: step of the window, one number or one per axis.
      padding: "SAME" or "VALID".
      use_bias: whether to add a bias per output channel.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str = "SAME"
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Convolves."""
        shape = (*_pair(self.kernel_size), channels(x), self.features)
        return _with_bias(self, x, shape, functools.partial(conv, strides=self.strides, padding=self.padding))


class DepthwiseConv(nn.Module):
    """Depthwise convolution with the parameters of ``flax.linen.Conv`` with one group per channel.

    Attributes:
      kernel_size: height and width of the window.
      strides: step of the window, one number or one per axis.
      padding: "SAME" or "VALID".
      use_bias: whether to add a bias per channel.
      dtype: of the computation; parameters are float32.
    """

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str = "SAME"
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Convolves each channel."""
        shape = (*_pair(self.kernel_size), 1, channels(x))
        form = functools.partial(depthwise_conv, strides=self.strides, padding=self.padding)
        return _with_bias(self, x, shape, form)


class BatchNorm(nn.Module):
    """Batch normalisation of maps in either layout, with the parameters and statistics of ``flax.linen.BatchNorm``.

    It is computed as one product and one sum per number, whose gradient needs no other map than the input: two passes
    over memory less than with the differences from the mean.

    Attributes:
      use_running_average: whether to normalise by the kept statistics, not by the batch's.
      momentum: how much of the kept statistics stays at each update.
      epsilon: added to the variance.
      axis_name: mapped axis over which the batch's statistics are averaged; None keeps them per device.
      dtype: of the result; sums, parameters and statistics are at least float32.
    """

    use_running_average: bool
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Normalises."""
        shape = (channels(x),)
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        kept_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        kept_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if self.use_running_average:
            mean, var = kept_mean.value, kept_var.value
        else:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            moments = channel_mean(wide), channel_mean(wide * wide)
            if self.axis_name is not None and not self.is_initializing():
                moments = lax.pmean(moments, self.axis_name)
            mean, var = moments[0], jnp.maximum(moments[1] - moments[0] ** 2, 0)
            if not self.is_initializing():
                kept_mean.value = self.momentum * kept_mean.value + (1 - self.momentum) * mean
                kept_var.value = self.momentum * kept_var.value + (1 - self.momentum) * var
        factor = scale * lax.rsqrt(var + self.epsilon)
        y = x * per_channel(factor, x) + per_channel(bias - mean * factor, x)
        return y.astype(self.dtype or x.dtype)


def batch_norm(module: Any, *, train: bool) -> Callable[..., nn.Module]:
    """Linen's BatchNorm with momentum 0.9, in the module's ``dtype``, over its ``axis_name``."""
    return functools.partial(
        BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        axis_name=module.axis_name,
        dtype=module.dtype,
    )


def channels(x: Array) -> int:
    """Number of channels of maps in either layout."""
    return x.shape[2] if x.ndim == 5 else x.shape[-1]


def size(x: Array) -> Pair:
    """Height and width of maps in either layout."""
    return (x.shape[1], x.shape[3]) if x.ndim == 5 else (x.shape[1], x.shape[2])


def per_channel(values: Array, x: Array) -> Array:
    """One value per channel, shaped to be broadcast with maps in either layout."""
    return values.reshape((1, 1, -1, 1, 1) if x.ndim == 5 else (1, 1, 1, -1))


def channel_mean(x: Array) -> Float[Array, " channels"]:
    """Mean over the images and positions of maps in either layout."""
    return rows_first.channel_mean(x) if x.ndim == 5 else jnp.mean(x, axis=(0, 1, 2))


def global_mean(x: Array) -> Float[Array, "batch channels"]:
    """Mean over the positions of maps in either layout."""
    return rows_first.position_mean(x) if x.ndim == 5 else jnp.mean(x, axis=(1, 2))


def as_nhwc(x: Array) -> Array:
    """Maps as a user knows them; vectors as they are."""
    return rows_first.to_nhwc(x) if x.ndim == 5 else x


def flattened(x: Array) -> Float[Array, "batch features"]:
    """Maps as one vector per image, in the order of height, width, channels."""
    x = as_nhwc(x)
    return x.reshape(x.shape[0], -1)


def outputs(logits: Array, features: Mapping[str, Array]) -> Outputs:
    """What a network returns: float32 logits, and features as a user knows them."""
    return Outputs(logits.astype(jnp.float32), {name: as_nhwc(x) for name, x in features.items()})


def _with_bias(module: Any, x: Array, shape: tuple[int, ...], form: Callable[[Array, Array], Array]) -> Array:
    kernel = module.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = None
    if module.use_bias:
        bias = module.param("bias", nn.initializers.zeros_init(), shape[-1:], jnp.float32)
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=module.dtype)
    y = form(x, kernel)
    return y if bias is None else y + per_channel(bias, y)


def _pair(value: int | Sequence[int]) -> Pair:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _pads(x: Array, window: Pair, strides: Pair, padding: str) -> Pads:
    """Padding before and after, per axis; checks that at least one window fits."""
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding needs to be 'SAME' or 'VALID', got {padding!r}.")
    height, width = size(x)
    if padding == "VALID" and (height < window[0] or width < window[1]):
        raise ValueError(
            f"a {window[0]}x{window[1]} window does not fit into a {height}x{width} map: "
            "use larger images or a smaller network."
        )
    (top, bottom), (left, right) = lax.padtype_to_pads((height, width), window, strides, padding)
    return (top, bottom), (left, right)


def _new_shape(x: Array, window: Pair, strides: Pair, pads: Pads) -> Pair:
    height, width = (
        (size + sum(pad) - one) // step + 1
        for size, pad, one, step in zip(x.shape[1:3], pads, window, strides, strict=True)
    )
    return height, width


def _windows(x: Array, window: Pair, strides: Pair, pads: Pads, fill: float = 0.0) -> list[Array]:
    """One strided slice of the padded map per offset in the window, in row-major order."""
    batch, _, _, channels = x.shape
    height, width = _new_shape(x, window, strides, pads)
    x = lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0)))
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + (height - 1) * strides[0] + 1, j + (width - 1) * strides[1] + 1, channels),
            (1, *strides, 1),
        )
        for i in range(window[0])
        for j in range(window[1])
    ]


def _unwindow(
    part: Callable[[int, Pair], Array], shape: tuple[int, ...], window: Pair, strides: Pair, pads: Pads
) -> Array:
    """Transpose of :func:`_windows`: adds the slices of all offsets at their positions in the map.

    ``part(place, shift)`` is the slice of one offset, shifted by rows and columns, on a map of :func:`_every` size.
    Slices with equal positions modulo the stride are added first and the sums interleaved once at the end; dilating
    every slice with zeros would move far more memory.
    """
    rows, columns = _every(strides, shape[1:3])
    sums: dict[Pair, Array] = {}  # by position modulo the stride
    for place in range(window[0] * window[1]):
        (down, i), (right, j) = (
            divmod(start - pad[0], step)
            for start, pad, step in zip(divmod(place, window[1]), pads, strides, strict=True)
        )
        moved = part(place, (down, right))
        sums[i, j] = sums[i, j] + moved if (i, j) in sums else moved
    if strides == (1, 1):
        return sums[0, 0]
    zeros = jnp.zeros_like(next(iter(sums.values())))
    lines = [[sums.get((i, j), zeros) for j in range(strides[1])] for i in range(strides[0])]
    whole = jnp.stack([jnp.stack(line, 3) for line in lines], 2)
    whole = whole.reshape(shape[0], rows * strides[0], columns * strides[1], shape[3])
    return whole[:, : shape[1], : shape[2]]


def _every(strides: Pair, size: Sequence[int]) -> Pair:
    """Height and width of a map subsampled by the strides, from its first row and column."""
    height, width = (-(-whole // step) for whole, step in zip(size, strides, strict=True))
    return height, width


def _moved(x: Array, by: Pair, size: Pair) -> Array:
    """Images padded with zeros to a size, shifted by rows and columns."""
    edges = [(b, n - b - now, 0) for b, n, now in zip(by, size, x.shape[1:3], strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def _num_chunks(batch: int, bytes_per_example: int) -> int:
    """Smallest number of equal chunks of a batch that stay within CHUNK_BYTES; at most one per example."""
    needed = -(-batch * bytes_per_example // CHUNK_BYTES)
    return next((n for n in range(max(needed, 1), batch) if batch % n == 0), max(batch, 1))


def _split(x: Array, chunks: int) -> Array:
    return x.reshape(chunks, -1, *x.shape[1:])


def _in_chunks(function: Callable[[Array], Array], x: Array, chunks: int) -> Array:
    if chunks == 1:
        return function(x)
    y = lax.map(function, _split(x, chunks))
    return y.reshape(-1, *y.shape[2:])


def _patch_bytes(x: Array, window: Pair, strides: Pair, pads: Pads) -> int:
    """Bytes of one example's patches; 0 for a 1x1 window, which needs no copy of the image."""
    height, width = _new_shape(x, window, strides, pads)
    return 0 if window == (1, 1) else height * width * window[0] * window[1] * x.shape[-1] * x.dtype.itemsize


def _patches(x: Array, window: Pair, strides: Pair, pads: Pads) -> Array:
    """One row per window, in the order of a flattened ``HWI`` kernel.

    Built along the width first, then along the height: copying runs of pixels is two to four times faster than copying
    single pixels.
    """
    rows = jnp.concatenate(_windows(x, (1, window[1]), (1, strides[1]), (pads[0], pads[1])), axis=-1)
    patches = jnp.concatenate(_windows(rows, (window[0], 1), (strides[0], 1), ((0, 0), (0, 0))), axis=-1)
    return patches.reshape(-1, patches.shape[-1])


_native_only = contextvars.ContextVar("native_only", default=False)


@contextlib.contextmanager
def native_forms() -> Iterator[None]:
    """Within, networks are traced as XLA's own operations in NHWC whatever the platform, for other programs to read."""
    before = _native_only.set(True)
    try:
        yield
    finally:
        _native_only.reset(before)


def only_native() -> bool:
    """Whether a network is being traced within :func:`native_forms`."""
    return _native_only.get()


def by_platform(
    *arrays: Array, cpu: Callable[..., Array], native: Callable[..., Array], options: Any
) -> Array:
    """Chooses the form when the program is compiled for a platform."""
    if _native_only.get():
        return native(*arrays, *options)
    forms = {"cpu": cpu, "default": native}
    bound = {name: lambda *arrays, form=form: form(*arrays, *options) for name, form in forms.items()}
    return lax.platform_dependent(*arrays, **bound)


def by_form(
    cpu: Callable[..., Array],
    cpu_dx: Callable[..., Array],
    cpu_dw: Callable[..., Array],
    *,
    native: Callable[..., Array],
    options: int,
) -> Callable[..., Array]:
    """A bilinear ``(x, kernel, *options)`` with its gradients: the forms given on a CPU, XLA's own elsewhere."""

    def here(x, kernel, *options):
        return by_platform(x, kernel, cpu=cpu, native=native, options=options)

    def forward(x, kernel, *options):
        return here(x, kernel, *options), (x, kernel)

    def native_dx(x, kernel, dy, *options):
        return jax.linear_transpose(lambda x: native(x, kernel, *options), x)(dy)[0]

    def native_dw(x, kernel, dy, *options):
        return jax.linear_transpose(lambda kernel: native(x, kernel, *options), kernel)(dy)[0]

    def backward(*arguments):
        *options, saved, dy = arguments
        forms = ((cpu_dx, native_dx), (cpu_dw, native_dw))
        return tuple(by_platform(*saved, dy, cpu=own, native=other, options=options) for own, other in forms)

    # The rules must not call the function itself, or forward mode could not differentiate its gradient.
    function = jax.custom_vjp(here, nondiff_argnums=tuple(range(2, 2 + options)))
    function.defvjp(forward, backward)
    return function


# Convolution


def _native_conv(x: Array, kernel: Array, strides: Pair, pads: Pads, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _cpu_conv(x: Array, kernel: Array, strides: Pair, pads: Pads) -> Array:
    window, features = _pair(kernel.shape[:2]), kernel.shape[-1]
    if x.shape[-1] == 1:  # too thin for a matmul
        return _cpu_depthwise(x, kernel, strides, pads)
    if x.shape[-1] in NATIVE_CHANNELS and window != (1, 1) and strides == (1, 1):
        return _native_conv(x, kernel, strides, pads)
    matrix = kernel.reshape(-1, features)

    def some(x):
        return (_patches(x, window, strides, pads) @ matrix).reshape(x.shape[0], *shape, features)

    shape = _new_shape(x, window, strides, pads)
    return _in_chunks(some, x, _num_chunks(x.shape[0], _patch_bytes(x, window, strides, pads)))


def _cpu_conv_dx(x: Array, kernel: Array, dy: Array, strides: Pair, pads: Pads) -> Array:
    (*window, channels, features) = kernel.shape
    if strides == (1, 1):  # a convolution of dy with the kernel turned by half a turn
        turned = jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))
        (top, bottom), (left, right) = (
            (size - 1 - pad[0], size - 1 - pad[1]) for size, pad in zip(window, pads, strict=True)
        )
        return _cpu_conv(dy, turned, (1, 1), ((top, bottom), (left, right)))
    matrix, size = kernel.reshape(-1, features).T, _every(strides, x.shape[1:3])

    def some(dy):
        parts = (dy.reshape(-1, features) @ matrix).reshape(*dy.shape[:3], -1, channels)

        def part(place, by):
            return _moved(parts[..., place, :], by, size)

        return _unwindow(part, (dy.shape[0], *x.shape[1:]), _pair(window), strides, pads)

    chunks = _num_chunks(x.shape[0], _patch_bytes(x, _pair(window), strides, pads))
    return _in_chunks(some, dy, chunks)


def _cpu_conv_dw(x: Array, kernel: Array, dy: Array, strides: Pair, pads: Pads) -> Array:
    window = _pair(kernel.shape[:2])

    def some(x, dy):
        patches = _patches(x, window, strides, pads)
        return lax.dot(patches.T, dy.reshape(-1, dy.shape[-1]), preferred_element_type=jnp.float32)

    chunks = _num_chunks(x.shape[0], _patch_bytes(x, window, strides, pads))
    if chunks == 1:
        total = some(x, dy)
    else:
        zeros = jnp.zeros((x.shape[-1] * window[0] * window[1], kernel.shape[-1]))
        pieces = (_split(x, chunks), _split(dy, chunks))
        total, _ = lax.scan(lambda total, piece: (total + some(*piece), None), zeros, pieces)
    return total.reshape(kernel.shape).astype(kernel.dtype)


padded_conv = by_form(_cpu_conv, _cpu_conv_dx, _cpu_conv_dw, native=_native_conv, options=2)
""":func:`conv` in NHWC: ``(x, kernel, strides, pads)`` with the padding before and after each axis."""


# Depthwise convolution


def _cpu_depthwise(x: Array, kernel: Array, strides: Pair, pads: Pads) -> Array:
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    places = zip(_windows(x, _pair(kernel.shape[:2]), strides, pads), weights, strict=True)
    return functools.reduce(jnp.add, (seen * weight for seen, weight in places))


def _cpu_depthwise_dx(x: Array, kernel: Array, dy: Array, strides: Pair, pads: Pads) -> Array:
    """Gradient by the input; pads ``dy`` once and slices it.

    Padding each slice instead fuses with the gradients of the ReLU and batch norm around it and runs several times
    slower.
    """
    window, weights = _pair(kernel.shape[:2]), kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    height, width = _every(strides, x.shape[1:3])
    least, most = (
        [(start - pad[0]) // step for start, pad, step in zip(places, pads, strides, strict=True)]
        for places in ((0, 0), (window[0] - 1, window[1] - 1))
    )
    wide = _moved(dy, _pair(most), (height + most[0] - least[0], width + most[1] - least[1]))

    def part(place, by):
        top, left = most[0] - by[0], most[1] - by[1]
        return wide[:, top : top + height, left : left + width] * weights[place]

    return _unwindow(part, x.shape, window, strides, pads)


def _cpu_depthwise_dw(x: Array, kernel: Array, dy: Array, strides: Pair, pads: Pads) -> Array:
    """Gradient by the kernel; sums over the batch in a scan, since XLA reduces slowly over leading axes."""
    window = _pair(kernel.shape[:2])

    def add(total, example):
        x, dy = example
        seen = jnp.concatenate(_windows(x[None], window, strides, pads))
        return total + seen.astype(jnp.float32) * dy[None], None

    total, _ = lax.scan(add, jnp.zeros((window[0] * window[1], *dy.shape[1:])), (x, dy))
    return jnp.sum(total, axis=(1, 2)).reshape(kernel.shape).astype(kernel.dtype)


def _native_depthwise(x: Array, kernel: Array, strides: Pair, pads: Pads) -> Array:
    return _native_conv(x, kernel, strides, pads, groups=x.shape[-1])


padded_depthwise_conv = by_form(
    _cpu_depthwise, _cpu_depthwise_dx, _cpu_depthwise_dw, native=_native_depthwise, options=2
)
""":func:`depthwise_conv` in NHWC: ``(x, kernel, strides, pads)``."""


# Max-pooling


def _native_max_pool(x: Array, window: Pair, strides: Pair, pads: Pads) -> Array:
    padding: Any = pads  # which is annotated as text, and may be pairs
    for name in ("VALID", "SAME"):  # by which jax2onnx knows it: it takes pairs for VALID
        if list(pads) == [tuple(p) for p in lax.padtype_to_pads(size(x), window, strides, name)]:
            padding = name
    return nn.max_pool(x, window_shape=window, strides=strides, padding=padding)


def _cpu_max_pool(x: Array, window: Pair, strides: Pair, pads: Pads) -> Array:
    if strides == (1, 1):  # where slices are up to five times slower
        return _native_max_pool(x, window, strides, pads)
    return functools.reduce(jnp.maximum, _windows(x, window, strides, pads, -jnp.inf))


def _cpu_max_pool_tangent(x: Array, y: Array, dx: Array, window: Pair, strides: Pair, pads: Pads) -> Array:
    """The tangent at the first occurrence of the maximum; reverse mode transposes it."""
    seen, moved = _windows(x, window, strides, pads, -jnp.inf), _windows(dx, window, strides, pads)
    return rows_first.at_first_maximum(seen, y, moved)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def padded_max_pool(x: Array, window: Pair, strides: Pair, pads: Pads) -> Array:
    """:func:`max_pool` in NHWC, with the padding before and after each axis."""
    return by_platform(x, cpu=_cpu_max_pool, native=_native_max_pool, options=(window, strides, pads))


@padded_max_pool.defjvp
def _max_pool_jvp(window, strides, pads, primals, tangents):
    options = (window, strides, pads)
    (x,), (dx,) = primals, tangents
    y = padded_max_pool(x, *options)

    def native(x, y, dx, *options):
        del y
        return jax.jvp(lambda x: _native_max_pool(x, *options), (x,), (dx,))[1]

    return y, by_platform(x, y, dx, cpu=_cpu_max_pool_tangent, native=native, options=options)
