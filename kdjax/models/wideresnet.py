"""Wide residual networks for 32x32 images."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from kdjax.models import layers
from kdjax.models.layers import Conv, batch_norm
from kdjax.types import Outputs


class WideResNet(nn.Module):
    """WRN-depth-width for CIFAR: a stem and three stages of (depth - 4) / 6 pre-activation blocks each.

    Parameters for 3 input channels, equal to RepDistiller's:

    ======== ========== ===========
    network  10 classes 100 classes
    ======== ========== ===========
    WRN-16-2    691,674     703,284
    WRN-40-1    563,930     569,780
    WRN-40-2  2,243,546   2,255,156
    ======== ========== ===========

    Features: ``stage0`` (stem); ``stage1`` to ``stage3`` (outputs of the stages, of either sign); ``preactivation1`` to
    ``3`` (the same after the next normalisation, before its ReLU); ``embedding`` (mean over the last map).

    Attributes:
      num_classes: number of logits.
      depth: 6n + 4 layers.
      width: factor on the 16, 32 and 64 channels of the stages.
      axis_name: mapped axis over which batch statistics are averaged; None keeps them per device.
      dtype: of the computation; parameters, batch statistics and logits are float32.

    References:
      Zagoruyko, Komodakis, `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_, 2016, section 2; Tian et al.,
      `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020 (RepDistiller).
    """

    takes_rows_first: ClassVar[bool] = True
    num_classes: int
    depth: int = 16
    width: int = 2
    axis_name: str | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6 or self.width < 1:
            raise ValueError(
                "a WideResNet has 6n + 4 layers and a width of at least 1, got depth "
                f"{self.depth} and width {self.width}: write 16 and 2, or 40 and 2."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: layers.Maps, *, train: bool) -> Outputs:
        """Returns logits and features; training normalises by the batch and updates "batch_stats"."""
        features = {}
        norm = batch_norm(self, train=train)
        conv = functools.partial(Conv, use_bias=False, dtype=self.dtype)
        features["stage0"] = x = conv(16, 3)(x)
        before = norm()(x)
        for stage in range(1, 4):
            channels = 16 * self.width * 2 ** (stage - 1)
            for block in range((self.depth - 4) // 6):
                name = f"stage{stage}_block{block + 1}"
                y = nn.relu(before)
                # A block that changes the channels has a shortcut that starts after the first ReLU.
                strides = 2 if stage > 1 and block == 0 else 1
                if layers.channels(x) != channels:
                    x = conv(channels, 1, strides=strides, name=f"{name}_shortcut")(y)
                y = nn.relu(
                    norm(name=f"{name}_norm")(conv(channels, 3, strides=strides, name=f"{name}_in")(y))
                )
                x = x + conv(channels, 3, name=f"{name}_out")(y)
                before = norm(name=f"{name}_next_norm")(x)
            features[f"stage{stage}"], features[f"preactivation{stage}"] = x, before
        features["embedding"] = x = layers.global_mean(nn.relu(before))
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return layers.outputs(logits, features)
