"""A recurrent network that reads images row by row."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.models import layers
from kdjax.types import Outputs


class RowGru(nn.Module):
    """A gated recurrent unit (GRU) that reads the rows of an image from top to bottom, and a dense layer.

    Parameters on 28x28x1 images and 10 classes: 82,210 with 150 units, 12,410 with 50.

    Features: ``stage1`` (the state after each row, ``[batch, height, units]``), ``embedding`` (the last of them).

    Attributes:
      num_classes: number of logits.
      units: of the state.
      dtype: of the computation; parameters and logits are float32.

    References:
      Cho et al., `Learning Phrase Representations using RNN Encoder-Decoder <https://arxiv.org/abs/1406.1078>`_, 2014,
      section 2.3.
    """

    num_classes: int
    units: int = 50
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.units < 1:
            raise ValueError(f"a RowGru needs at least one unit, got units={self.units}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], *, train: bool) -> Outputs:
        """Returns logits and features; training and evaluation do not differ."""
        del train
        rows = x.reshape(*x.shape[:2], -1)
        cell = nn.GRUCell(self.units, dtype=self.dtype)
        if layers.only_native():  # an export, whose formats know no loops
            state, found = jnp.zeros((rows.shape[0], self.units), self.dtype), []
            for number in range(rows.shape[1]):
                state, _ = cell(state, rows[:, number])
                found.append(state)
            states = jnp.stack(found, axis=1)
        else:
            states = jnp.asarray(nn.RNN(cell)(rows))
        features = {"stage1": states, "embedding": states[:, -1]}
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(features["embedding"])
        return Outputs(logits.astype(jnp.float32), features)
