"""Means over the examples that count, correct also when a batch is sharded over devices or steps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.losses._checks import checked


@checked
def sum_and_count(
    values: Float[Array, "*batch"], where: Bool[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum and number of the values that count; both may be added over devices and steps, which means may not.

    Args:
      values: one per example, as most losses return them.
      where: which of them count, such as ``labels >= 0``; the others may be anything, NaN too.

    Returns:
      The sum and the count, float32.
    """
    kept = jnp.where(where, values, 0).astype(jnp.float32)
    return jnp.sum(kept), jnp.sum(where, dtype=jnp.float32)


@checked
def masked_mean(
    values: Float[Array, "*batch"], where: Bool[Array, "*batch"], *, axis_name: str | None = None
) -> Float[Array, ""]:
    """Mean of the values that count, such as those of labelled examples: ``masked_mean(loss, labels >= 0)``.

    With a sharded batch, the mean of the devices' means is wrong where their counts differ. With ``axis_name`` each
    device's sum is divided by the mean count instead. The mean over devices, which :func:`kdjax.train.make_train_step`
    takes of loss and gradients, is then the mean over all values that count.

    Args:
      values: one per example, as most losses return them.
      where: which of them count.
      axis_name: the mapped axis over which the batch is sharded.

    Returns:
      The mean; 0, with a gradient of zero, where nothing counts. With an axis name, a value whose mean over the devices
      is the mean of the whole batch.
    """
    total, count = sum_and_count(values, where)
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    return total / jnp.where(count > 0, count, 1)
