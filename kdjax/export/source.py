"""What every format is made from: a student as one function of pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from kdjax import data
from kdjax.models import Network
from kdjax.quantisation import RANGES, Quantised
from kdjax.teacher import TrainedNetwork
from kdjax.types import Normalisation, Weights

NORMALISE = "normalise"
"""The scope in which pixels are normalised, which int8 quantisation leaves in float."""


class Ranges(NamedTuple):
    """What a student with fake quantisation has learnt to round to.

    Attributes:
      points: what is rounded, in order; see :class:`kdjax.quantisation.Quantised`.
      low: smallest value at each point.
      high: largest.
      weight_bits: of the integers of the kernels.
    """

    points: tuple[str, ...]
    low: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]
    weight_bits: int


class Source(NamedTuple):
    """A student to be written in some format.

    Attributes:
      function: ``uint8[batch, height, width, channels]`` pixels → float32 logits; its weights are constants.
      image_shape: height, width and channels.
      batch_size: images per call; None for any number.
      calibration: training images, by which int8 activations are given their ranges.
      ranges: in place of those, if the student has learnt them.
    """

    function: Callable[[Any], Any]
    image_shape: tuple[int, ...]
    batch_size: int | None
    calibration: UInt8[np.ndarray, "n height width channels"] | None = None
    ranges: Ranges | None = None

    def images(self, batch_size: Any = None) -> jax.ShapeDtypeStruct:
        """Of one call; with another number of images, which may be symbolic, where the source has none."""
        batch_size = self.batch_size if self.batch_size is not None else batch_size
        return jax.ShapeDtypeStruct((batch_size, *self.image_shape), jnp.uint8)


def logits_of(
    network: Network,
    normalisation: Normalisation,
    weights: Weights,
    images: UInt8[jax.Array, "batch height width channels"],
) -> Float[jax.Array, "batch classes"]:
    """Logits of pixels, which are normalised here."""
    with jax.named_scope(NORMALISE):
        pixels = data.normalise(images, **normalisation._asdict())
    return network.apply(*weights, pixels, train=False)[0].logits


def function_of(student: TrainedNetwork) -> Callable[[Any], Any]:
    """:func:`logits_of` of images alone, with the student's weights as constants and without fake quantisation."""
    network, weights = student.network, jax.tree.map(np.asarray, student.weights)
    if isinstance(network, Quantised):
        network, weights = network.inner, network.without_ranges(weights)
    return lambda images: logits_of(network, student.normalisation, weights, images)


def ranges_of(student: TrainedNetwork) -> Ranges | None:
    """The ranges that a student with fake quantisation has learnt."""
    if not isinstance(student.network, Quantised):
        return None
    learnt = jax.tree.map(np.asarray, student.weights.model_state[RANGES])
    return Ranges(student.network.points, learnt["low"], learnt["high"], student.network.weight_bits)
