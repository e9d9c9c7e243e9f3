"""Which examples form which batch: pure functions of a seed and an epoch, so that a run's position is one number."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def epoch_index(ids: np.ndarray, *, seed: int, epoch: int, batch_size: int) -> np.ndarray:
    """The batches of one epoch: a seeded permutation of ``ids``, cut into full batches.

    The incomplete last batch is left out; since every epoch has another order, every example still takes part. A set
    smaller than a batch is repeated to fill one.

    Args:
      ids: int[n], the examples to draw from.
      seed: of the whole run.
      epoch: counted from 0.
      batch_size: examples per batch over all devices and hosts.

    Returns:
      int32[n // batch_size, batch_size] (one row at least).

    Raises:
      ValueError: if there are no ids or the batch size is not positive.
    """
    if len(ids) == 0:
        raise ValueError("epoch_index needs at least one id to draw from, got none.")
    if batch_size < 1:
        raise ValueError(f"epoch_index needs a batch size of 1 or more, got {batch_size}.")
    generator = np.random.Generator(np.random.Philox(key=(seed, epoch)))
    order = np.asarray(ids, np.int32)[generator.permutation(len(ids))]
    if len(order) < batch_size:
        order = np.resize(order, batch_size)
    steps = len(order) // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def evaluation_index(ids: np.ndarray, *, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every id once, in order, the last batch filled up with rows that do not count.

    Returns:
      int32[batches, batch_size] and the float32 mask of the same shape, 1 where the row counts.
    """
    if len(ids) == 0:
        raise ValueError("evaluation_index needs at least one id, got none; is this split empty?")
    padding = -len(ids) % batch_size
    index = np.concatenate([np.asarray(ids, np.int32), np.zeros(padding, np.int32)])
    valid = np.concatenate([np.ones(len(ids), np.float32), np.zeros(padding, np.float32)])
    return index.reshape(-1, batch_size), valid.reshape(-1, batch_size)


def gather(arrays: Mapping[str, Any], index: Int[Array, " batch"]) -> dict[str, jax.Array]:
    """Rows ``index`` of every array, and the index itself: a batch with all of its teacher's columns attached."""
    return {name: jnp.asarray(array)[index] for name, array in arrays.items()} | {"index": index}


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel on the scale [0, 1]; of the training split, to be honest about it.

    Args:
      images: uint8[n, height, width, channels].

    Returns:
      Two tuples of one float per channel. A channel that never varies gets a deviation of 1.
    """
    flat = images.reshape(-1, images.shape[-1])
    # Counting levels is exact and needs no float copy of the set, which may be large.
    levels = np.stack([np.bincount(flat[:, c], minlength=256) for c in range(flat.shape[1])]) / len(flat)
    values = np.arange(256) / 255
    mean = levels @ values
    variance = (levels * (values - mean[:, None]) ** 2).sum(1)
    std = np.where(variance > 0, np.sqrt(variance), 1)
    return tuple(mean.tolist()), tuple(std.tolist())


class Feed(NamedTuple):
    """The arguments of every dispatch of a training run, as a pure function of the step that it starts at."""

    steps_per_epoch: int
    at: Callable[[int], tuple[Any, ...]]


def resident_feed(
    arrays: Any,
    ids: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    steps_per_dispatch: int = 1,
    rows_of: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Feed:
    """Feeds arrays that stay on the device with the indices of each dispatch.

    Args:
      arrays: whatever the batch is made from, on the device: images, labels and teacher columns by index.
      ids: to draw from: the training split.
      seed: of the order.
      batch_size: examples per step over all devices and hosts.
      steps_per_dispatch: most steps that one call runs. Fewer are run where that cuts the epoch into equal parts, which
        saves compiling a second program for the rest.
      rows_of: this process's part of a global batch, :func:`kdjax.parallel.process_rows` where there are several.

    Returns:
      A feed whose arguments are ``(arrays, int32[batch, steps])``.
    """
    steps_per_epoch = max(len(ids) // batch_size, 1)
    most = min(steps_per_dispatch, steps_per_epoch)
    equal = max(k for k in range(1, most + 1) if steps_per_epoch % k == 0)
    steps = equal if 2 * equal >= most else most

    @functools.lru_cache(maxsize=1)
    def epoch(number: int) -> np.ndarray:
        return epoch_index(ids, seed=seed, epoch=number, batch_size=batch_size)

    def at(step: int) -> tuple[Any, ...]:
        number, start = divmod(step, steps_per_epoch)
        return arrays, rows_of(epoch(number)[start : start + steps].T)

    return Feed(steps_per_epoch, at)
