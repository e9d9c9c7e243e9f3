"""A network that computes as its int8 file will, to be trained so."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kdjax import parallel
from kdjax.models import Network, layers
from kdjax.quantisation import graph
from kdjax.quantisation.fake import fake_quantise, fake_quantise_kernel
from kdjax.types import ModelState, Outputs, Params, Weights

RANGES = "ranges"
"""Of activations, in the model state: smallest and largest value at each point."""


@dataclasses.dataclass(frozen=True, eq=False)
class Quantised(Network):
    """A network with fake quantisation; made by :func:`quantised`.

    Attributes:
      inner: the network without.
      weight_bits: of the integers of its kernels.
      points: what is rounded, in order; the model state has a range for each under "ranges".
    """

    inner: Network
    weight_bits: int
    points: tuple[str, ...]

    def calibrated(self, weights: Weights, images: Float[Array, "batch height width channels"]) -> Weights:
        """Weights of the inner network with ranges: the smallest and largest activations on some images.

        Args:
          weights: trained in float.
          images: normalised, from the training split.
        """
        ranges = _extremes_at_points(self.inner, self.weight_bits, weights, images)
        return Weights(weights.params, {**weights.model_state, RANGES: ranges})

    def without_ranges(self, weights: Weights) -> Weights:
        """Those of the inner network."""
        state = {name: value for name, value in weights.model_state.items() if name != RANGES}
        return Weights(weights.params, state)


def quantised(network: Network, *, weight_bits: int = 8, momentum: float = 0.99) -> Quantised:
    """A network that rounds kernels and activations as an integer runtime does, for quantisation-aware training.

    Batch normalisation is folded into the kernels before they are rounded, with its statistics as they are, and dropout
    is off: train a float network first, and this one from its weights, for few epochs and at a low rate. Parameters are
    those of the network. Gradients pass the rounding as if it were not there. In training, ranges of activations follow
    those of the batches by a moving average, over all devices; in evaluation they stay as they are.

    It returns logits alone, so methods that compare features don't apply.

    Args:
      network: of kdjax's layers, or another whose convolutions are in NHWC and followed by batch normalisation, not
        preceded.
      weight_bits: of the integers of the kernels. Depthwise kernels have 8 in any case, as LiteRT has none of fewer;
        activations have 8.
      momentum: of the ranges: how much of the former stays at each step.

    Raises:
      ValueError: if an operation has no counterpart in integers.

    References:
      Jacob et al., `Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
      <https://arxiv.org/abs/1712.05877>`_, 2018, section 3; the statistics are frozen from the start here.
    """
    if not (2 <= weight_bits <= 8 and 0 <= momentum < 1):
        raise ValueError(f"weight_bits={weight_bits} must be from 2 to 8, and momentum={momentum} in [0, 1).")
    points = _graph(network, 2).points

    def apply(
        params: Params,
        model_state: ModelState,
        inputs: Any,
        *,
        train: bool,
        key: jax.Array | None = None,
    ) -> tuple[Outputs, ModelState]:
        del key
        inner = {name: value for name, value in model_state.items() if name != RANGES}
        observe = functools.partial(_observed, model_state[RANGES], momentum=momentum) if train else None
        logits, ranges = _run(
            network, Weights(params, inner), inputs, model_state[RANGES], weight_bits, observe
        )
        return Outputs(logits, {}), {**inner, RANGES: ranges}

    def init(seed: int) -> tuple[Params, ModelState]:
        params, model_state = network.init(seed)
        return params, {**model_state, RANGES: {"low": -jnp.ones(len(points)), "high": jnp.ones(len(points))}}

    shape, inner = jax.ShapeDtypeStruct((len(points),), jnp.float32), network.weight_shapes
    options = {"weight_bits": weight_bits, "momentum": momentum}
    return Quantised(
        init,
        apply,
        network.image_shape,
        {"class": "Quantised", "network": dict(network.description), **options},
        f"{network.name}_w{weight_bits}",
        Weights(inner.params, {**inner.model_state, RANGES: {"low": shape, "high": shape}}),
        inner=network,
        weight_bits=weight_bits,
        points=points,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _extremes_at_points(network: Network, weight_bits: int, weights: Weights, images: Array) -> Any:
    """The smallest and largest activation at each point, where kernels alone are rounded."""
    return _run(network, weights, images, None, weight_bits, lambda point, values: _extremes(values))[1]


def _run(
    network: Network,
    weights: Weights,
    images: Array,
    ranges: Mapping[str, Array] | None,
    weight_bits: int,
    observe: Any,
) -> tuple[Array, Any]:
    """Logits, and the ranges that activations were rounded to, or that they had if there are none."""
    traced = _graph(network, len(images))
    found: list[tuple[Array, Array]] = []

    def rounded(values: Array) -> Array:
        point = len(found)
        if observe is None:
            assert ranges is not None
            low, high = ranges["low"][point], ranges["high"][point]
        else:
            low, high = observe(point, values)
        found.append((low, high))
        return values if ranges is None else fake_quantise(values, low, high)

    known = dict(zip(traced.weights, jax.tree.leaves(weights), strict=True))

    def read(place: Any) -> Any:
        return place.value if isinstance(place, graph.Constant) else known[place]

    for node in traced.constants:
        known |= dict(zip(node.outputs, node([read(place) for place in node.inputs]), strict=True))
    known[traced.images] = rounded(jnp.asarray(images, jnp.float32))
    for step in traced.steps:
        arguments = [read(place) for place in step.node.inputs]
        if step.kind == "move":
            known[step.output] = _moved(step.node, arguments)
            continue
        affine = [(name, read(place), first) for name, place, first in step.affine]
        values = _computed(step, arguments, affine, weight_bits)
        if step.limits is not None:
            low, high = step.limits
            values = jax.nn.relu(values) if np.isinf(high) else jnp.clip(values, low, high)
        known[step.output] = rounded(values)
    lows, highs = zip(*found, strict=True)
    return known[traced.output], {"low": jnp.stack(lows), "high": jnp.stack(highs)}


def _computed(step: graph.Step, arguments: Any, affine: Any, weight_bits: int) -> Array:
    """What a step computes before its activation."""
    factor, offset = graph.folded(affine)
    if step.kind == "add":
        return arguments[0] + arguments[1]
    if step.kind == "mean":
        return step.node(arguments)[0] * factor[None]
    x, kernel = arguments
    kernel = fake_quantise_kernel(
        kernel * factor.reshape((1,) * (kernel.ndim - 1) + (-1,)),
        bits=8 if step.kind == "depthwise" else weight_bits,
    )
    if step.kind == "dense":
        y = x @ kernel
    else:  # by the forms that are fast inside a loop, too
        options = step.node.eqn.params
        pads = tuple(map(tuple, options["padding"]))
        form = layers.padded_conv if options["feature_group_count"] == 1 else layers.padded_depthwise_conv
        y = form(x, kernel, tuple(options["window_strides"]), pads)
    return y + offset.reshape((1,) * (y.ndim - 1) + (-1,))


def _moved(node: graph.Node, arguments: Any) -> Array:
    if node.name == "reduce_window_max":
        options = node.eqn.params
        (_, *window, _), (_, *strides, _) = options["window_dimensions"], options["window_strides"]
        return layers.padded_max_pool(
            arguments[0], tuple(window), tuple(strides), tuple(options["padding"][1:3])
        )
    return node(arguments)[0]


def _extremes(values: Array) -> tuple[Array, Array]:
    return jnp.min(values), jnp.max(values)


def _observed(
    ranges: Mapping[str, Array], point: int, values: Array, *, momentum: float
) -> tuple[Array, Array]:
    """A range after this batch, of which every device has seen a part."""
    low, high = jax.lax.stop_gradient(_extremes(values))
    low, high = jax.lax.pmin(low, parallel.AXIS), jax.lax.pmax(high, parallel.AXIS)
    former = ranges["low"][point], ranges["high"][point]
    low, high = (momentum * a + (1 - momentum) * b for a, b in zip(former, (low, high), strict=True))
    return low, high


@functools.lru_cache(maxsize=64)
def _graph(network: Network, batch_size: int) -> graph.Graph:
    images = jax.ShapeDtypeStruct((batch_size, *network.image_shape), jnp.float32)
    apply: Any = network.apply
    with layers.native_forms():
        return graph.trace(lambda w, x: apply(*w, x, train=False)[0].logits, network.weight_shapes, images)
