"""Multi-layer perceptrons, including those of Hinton's MNIST study."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.types import Outputs


class Mlp(nn.Module):
    """Dense ReLU layers on flattened images.

    Parameters on 28x28x1 images and 10 classes: 2,395,210 with widths (1200, 1200), 1,276,810 with (800, 800).

    Features: ``stage1``, ``stage2``, ... (each hidden layer after its ReLU), ``embedding`` (the last of them).

    Attributes:
      num_classes: number of logits.
      widths: units of each hidden layer; at least one layer.
      dropout: rate after each hidden layer.
      input_dropout: rate on the pixels.
      dtype: of the computation; parameters and logits are float32.

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015,
      section 3; the teacher's dropout is from `Improving neural networks by preventing co-adaptation
      <https://arxiv.org/abs/1207.0580>`_, 2012: half of the hidden units and a fifth of the pixels.
    """

    num_classes: int
    widths: Sequence[int] = (128, 128)
    dropout: float = 0.0
    input_dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("an Mlp needs at least one hidden layer, got widths=(): write widths=(128,).")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], *, train: bool) -> Outputs:
        """Returns logits and features; training draws dropout from the stream "dropout"."""
        features = {}
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
        for layer, width in enumerate(self.widths, start=1):
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
            features[f"stage{layer}"] = features["embedding"] = x
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return Outputs(logits.astype(jnp.float32), features)
