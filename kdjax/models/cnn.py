"""Small convolutional networks: teacher and student of the Keras tutorial, of the malaria study and for 8x8 digits."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.models import layers
from kdjax.models.layers import Conv, max_pool
from kdjax.types import Outputs


class KerasCnn(nn.Module):
    """Network of the Keras tutorial on distillation: two convolutions of stride 2, no hidden dense layer.

    Parameters on 28x28x1 images and 10 classes: 1,433,610 with the teacher's widths, 20,490 with the student's.

    Features: ``stage1`` (after pooling), ``stage2``, ``embedding`` (``stage2`` flattened).

    Attributes:
      num_classes: number of logits.
      widths: channels of the two convolutions.
      dtype: of the computation; parameters and logits are float32.

    References:
      Borup, `Knowledge Distillation <https://keras.io/examples/vision/knowledge_distillation/>`_, 2020.
    """

    num_classes: int
    widths: tuple[int, int] = (16, 32)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], *, train: bool) -> Outputs:
        """Returns logits and features; training and evaluation do not differ."""
        del train
        features = {}
        x = nn.leaky_relu(Conv(self.widths[0], 3, strides=2, dtype=self.dtype)(x), 0.2)
        features["stage1"] = x = max_pool(x, 2, strides=1, padding="SAME")
        features["stage2"] = x = Conv(self.widths[1], 3, strides=2, dtype=self.dtype)(x)
        features["embedding"] = x = layers.flattened(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return layers.outputs(logits, features)


class MalariaCnn(nn.Module):
    """Network of the SPRKD malaria study on 32x32 images: two convolutions without padding, one hidden dense layer.

    Parameters on 32x32x3 images and 2 classes: 25,546 with the teacher's widths, 6,430 with the student's.

    Features: ``stage1``, ``stage2`` (after pooling), ``embedding`` (the hidden layer).

    Attributes:
      num_classes: number of logits.
      widths: channels of the two convolutions.
      hidden: units of the hidden dense layer.
      dropout: rates after the convolutions and after the hidden layer.
      dtype: of the computation; parameters and logits are float32.

    References:
      Dewan, SPRKD, arXiv 2607.23346, 2026.
    """

    takes_rows_first: ClassVar[bool] = True
    num_classes: int
    widths: tuple[int, int] = (2, 4)
    hidden: int = 8
    dropout: tuple[float, float] = (0.1, 0.2)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: layers.Maps, *, train: bool) -> Outputs:
        """Returns logits and features; training draws dropout from the stream "dropout"."""
        features = {}
        conv = functools.partial(Conv, kernel_size=3, padding="VALID", dtype=self.dtype)
        features["stage1"] = x = nn.relu(conv(self.widths[0])(x))
        features["stage2"] = x = max_pool(nn.relu(conv(self.widths[1])(x)), 2, strides=2)
        x = nn.Dropout(self.dropout[0], deterministic=not train)(layers.flattened(x))
        features["embedding"] = x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout[1], deterministic=not train)(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return layers.outputs(logits, features)


class DigitsCnn(nn.Module):
    """Two convolutions and one dense layer, for images as small as scikit-learn's 8x8 digits.

    Parameters on 8x8x1 images and 10 classes: 29,066 at width 32, 1,626 at width 4.

    Features: ``stage1``, ``stage2``, ``embedding`` (``stage2`` flattened).

    Attributes:
      num_classes: number of logits.
      width: channels of the first convolution; the second, of stride 2, has twice as many.
      dropout: rate before the last layer.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    width: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], *, train: bool) -> Outputs:
        """Returns logits and features; training draws dropout from the stream "dropout"."""
        features = {}
        features["stage1"] = x = nn.relu(Conv(self.width, 3, dtype=self.dtype)(x))
        features["stage2"] = x = nn.relu(Conv(2 * self.width, 3, strides=2, dtype=self.dtype)(x))
        features["embedding"] = x = layers.flattened(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return layers.outputs(logits, features)
