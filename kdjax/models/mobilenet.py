"""Mobile networks of inverted residual blocks for 32x32 images."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.models.layers import Conv, DepthwiseConv, batch_norm
from kdjax.types import Outputs

ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""The paper's table 2 with a stride of 1 in its second row: expansion, channels, blocks, stride of the first block."""


class MobileNetV2(nn.Module):
    """MobileNetV2 for 32x32 images: no stride before the 32 channels, so that the last map is 4x4.

    A student keeps the first ``19 - removed`` of the 19 parts: the stem, seventeen blocks and the head (a 1x1
    convolution to 1280 channels); then come global average pooling and the classifier. The parts that are kept have the
    same names and shapes as in the whole network. Parameters for 3 input channels, 10 classes and width 1:

    ======= ==========
    removed parameters
    ======= ==========
    0        2,236,682
    3        1,019,402
    5          543,498
    7          306,954
    9          185,738
    11          77,194
    13          40,970
    15          16,042
    17           1,994
    ======= ==========

    Strided convolutions pad both sides of the map with zeros, as in PyTorch; "SAME" would pad one side only. There is
    no dropout, which torchvision has before its last layer.

    Features: ``stage0`` (stem, after its ReLU), ``stage1`` to ``stage4`` (output of the last block of each resolution,
    of either sign; only those that are kept); ``preactivation1`` to ``4`` are the same maps, since no ReLU follows
    them, as in RepDistiller; ``embedding`` (mean over the last map).

    Attributes:
      num_classes: number of logits.
      width: factor on the channels, which are rounded to multiples of 8 as in torchvision; the head has at least 1280.
      removed: number of parts left out at the end, 0 to 17.
      axis_name: mapped axis over which batch statistics are averaged; None keeps them per device.
      dtype: of the computation; parameters, batch statistics and logits are float32.

    References:
      Sandler et al., `MobileNetV2 <https://arxiv.org/abs/1801.04381>`_, 2018, table 2; Hernandez, Chang, Nordling,
      `Knowledge Distillation with Integrated Gradients <https://arxiv.org/abs/2503.13008>`_, 2025, for the students.
    """

    num_classes: int
    width: float = 1.0
    removed: int = 0
    axis_name: str | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if not 0 <= self.removed <= 17:
            raise ValueError(
                "a MobileNetV2 keeps at least the stem and the first block of its 19 parts, "
                f"got removed={self.removed}: write 0 to 17, such as 5."
            )
        if not self.width > 0:
            raise ValueError(
                f"the width of a MobileNetV2 needs to be a positive factor, got {self.width}: write 1 or 0.25."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], *, train: bool) -> Outputs:
        """Returns logits and features; training normalises by the batch and updates "batch_stats"."""
        features = {}
        norm = batch_norm(self, train=train)
        conv = functools.partial(Conv, use_bias=False, dtype=self.dtype)
        depthwise = functools.partial(DepthwiseConv, 3, use_bias=False, dtype=self.dtype)
        features["stage0"] = x = nn.relu6(norm()(conv(_rounded(32 * self.width), 3)(x)))
        blocks = [
            (expansion, _rounded(channels * self.width), strides if first else 1)
            for expansion, channels, number, strides in ROWS
            for first in (True, *[False] * (number - 1))
        ]
        stage, block = 1, 0
        for expansion, channels, strides in blocks[: 18 - self.removed]:
            stage, block = (stage, block + 1) if strides == 1 else (stage + 1, 1)
            name = f"stage{stage}_block{block}"
            x = _Block(expansion, channels, strides, conv, depthwise, norm, name=name)(x)
            features[f"stage{stage}"] = features[f"preactivation{stage}"] = x
        if not self.removed:
            x = nn.relu6(norm()(conv(_rounded(1280 * max(1, self.width)), 1)(x)))
        features["embedding"] = x = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return Outputs(logits.astype(jnp.float32), features)


class _Block(nn.Module):
    """Inverted residual block: expansion, depthwise convolution, linear projection."""

    expansion: int
    channels: int
    strides: int
    conv: Any
    depthwise: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = x
        if self.expansion > 1:
            y = nn.relu6(self.norm()(self.conv(self.expansion * x.shape[-1], 1)(y)))
        if self.strides > 1:  # "SAME" would not be symmetric
            y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        padding = "VALID" if self.strides > 1 else "SAME"
        y = nn.relu6(self.norm()(self.depthwise(strides=self.strides, padding=padding)(y)))
        y = self.norm()(self.conv(self.channels, 1)(y))
        return x + y if x.shape == y.shape else y


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8; the next larger where the nearest would lose more than a tenth."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
