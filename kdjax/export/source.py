"""What every format is made from: a student as one function of pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from kdjax import data
from kdjax.models import Network
from kdjax.teacher import TrainedNetwork
from kdjax.types import Normalisation, Weights

NORMALISE = "normalise"
"""The scope in which pixels are normalised, which int8 quantisation leaves in float."""


class Source(NamedTuple):
    """A student to be written in some format.

    Attributes:
      function: ``uint8[batch, height, width, channels]`` pixels → float32 logits; its weights are constants.
      image_shape: height, width and channels.
      batch_size: images per call; None for any number.
      calibration: training images, by which int8 activations are given their ranges.
    """

    function: Callable[[Any], Any]
    image_shape: tuple[int, ...]
    batch_size: int | None
    calibration: UInt8[np.ndarray, "n height width channels"] | None = None

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """Of one call with a fixed number of images."""
        return jax.ShapeDtypeStruct((self.batch_size, *self.image_shape), jnp.uint8)


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
    """:func:`logits_of` of images alone, with the student's weights as constants."""
    weights = jax.tree.map(np.asarray, student.weights)
    return lambda images: logits_of(student.network, student.normalisation, weights, images)
