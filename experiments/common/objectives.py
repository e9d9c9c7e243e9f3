"""The two objectives that every study has: the labels alone, and Hinton's distillation."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from kdjax import losses, train
from kdjax.types import Batch, Outputs


def scratch(outputs: Outputs, batch: Batch) -> Mapping[str, jax.Array]:
    """The labels alone."""
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
    return {"hard": jnp.mean(hard)}


def kd(*, hard_weight: float, soft_weight: float, temperature: float) -> train.Objective:
    """The labels, and what the teacher says of every class; a ValueError if both weights are 0."""
    if hard_weight == soft_weight == 0:
        raise ValueError(
            "--hard_weight=0 and --soft_weight=0 leave kd nothing to learn; one must be above 0."
        )

    def objective(outputs: Outputs, batch: Batch) -> Mapping[str, jax.Array]:
        soft = losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=temperature)
        return {"hard": hard_weight * scratch(outputs, batch)["hard"], "soft": soft_weight * jnp.mean(soft)}

    return objective
