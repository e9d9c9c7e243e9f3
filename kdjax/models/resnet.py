"""Residual networks for 32x32 images."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from kdjax.models import layers
from kdjax.models.layers import Conv, batch_norm
from kdjax.types import Outputs


class ResNet(nn.Module):
    """ResNet for CIFAR: a stem and three stages of (depth - 2) / 6 basic blocks each.

    A block that changes the size or channels of the map has a projection shortcut (1x1 convolution and batch
    normalisation), as in RepDistiller. Parameters for 3 input channels, equal to RepDistiller's:

    ====== ========== ===========
    depth  10 classes 100 classes
    ====== ========== ===========
    8          78,042      83,892
    14        175,258     181,108
    20        272,474     278,324
    32        466,906     472,756
    56        855,770     861,620
    ====== ========== ===========

    Features: ``stage0`` (stem); ``stage1`` to ``stage3`` after, ``preactivation1`` to ``3`` before their last ReLU;
    ``embedding`` (mean over the last map).

    Attributes:
      num_classes: number of logits.
      depth: 6n + 2 layers.
      channels: of the stem and the three stages; (32, 64, 128, 256) for the "x4" variants.
      axis_name: mapped axis over which batch statistics are averaged; None keeps them per device.
      dtype: of the computation; parameters, batch statistics and logits are float32.

    References:
      He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_, 2016, section 4.2; Tian et al.,
      `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020 (RepDistiller).
    """

    takes_rows_first: ClassVar[bool] = True
    num_classes: int
    depth: int = 20
    channels: tuple[int, int, int, int] = (16, 16, 32, 64)
    axis_name: str | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(
                f"a ResNet for CIFAR has 6n + 2 layers, got {self.depth}: write 8, 14, 20, 32 or 56."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: layers.Maps, *, train: bool) -> Outputs:
        """Returns logits and features; training normalises by the batch and updates "batch_stats"."""
        features = {}
        norm = batch_norm(self, train=train)
        conv = functools.partial(Conv, use_bias=False, dtype=self.dtype)
        x = nn.relu(norm()(conv(self.channels[0], 3)(x)))
        features["stage0"] = x
        for stage, channels in enumerate(self.channels[1:], start=1):
            before = x
            for block in range((self.depth - 2) // 6):
                strides = 2 if stage > 1 and block == 0 else 1
                before = _Block(channels, strides, conv, norm, name=f"stage{stage}_block{block + 1}")(x)
                x = nn.relu(before)
            features[f"preactivation{stage}"], features[f"stage{stage}"] = before, x
        features["embedding"] = x = layers.global_mean(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return layers.outputs(logits, features)


class _Block(nn.Module):
    """Basic block without its last ReLU, which the caller applies."""

    channels: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.relu(self.norm()(self.conv(self.channels, 3, strides=self.strides)(x)))
        y = self.norm()(self.conv(self.channels, 3)(y))
        if x.shape != y.shape:
            x = self.norm(name="shortcut_norm")(
                self.conv(self.channels, 1, strides=self.strides, name="shortcut")(x)
            )
        return x + y
