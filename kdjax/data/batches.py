"""The examples of each batch, as pure functions of seed and epoch: a run's position is one number, its step."""

import functools
import hashlib
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

MAX_SEED = 2**32 - 1  # a run keeps its seed as uint32


def epoch_index(ids: np.ndarray, *, seed: int, epoch: int, batch_size: int) -> np.ndarray:
    """The batches of one epoch: a seeded permutation of ``ids``, cut into full batches.

    The incomplete last batch is dropped; every epoch has another order, so no example is always left out. A set smaller
    than a batch is repeated to fill one.

    Args:
      ids: int[n], the examples to draw from.
      seed: of the whole run.
      epoch: counted from 0.
      batch_size: over all devices and hosts.

    Returns:
      int32[n // batch_size, batch_size] (one row at least).

    Raises:
      ValueError: if there are no ids, they are not row numbers, the batch size is not positive, or the seed is not a
        32-bit number.
    """
    ids = _checked_ids("epoch_index", ids, batch_size)
    generator = np.random.Generator(np.random.Philox(key=(check_seed("epoch_index", seed), epoch)))
    order = ids[generator.permutation(len(ids))]
    if len(order) < batch_size:
        order = np.resize(order, batch_size)
    steps = len(order) // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def evaluation_index(ids: np.ndarray, *, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every id once, in order; the last batch is padded with rows that do not count.

    Returns:
      int32[batches, batch_size] and the float32 mask of the same shape, 1 where the row counts.

    Raises:
      ValueError: if there are no ids, they are not row numbers, or the batch size is not positive.
    """
    ids = _checked_ids("evaluation_index", ids, batch_size)
    padding = -len(ids) % batch_size
    valid = np.pad(np.ones(len(ids), np.float32), (0, padding))
    return np.pad(ids, (0, padding)).reshape(-1, batch_size), valid.reshape(-1, batch_size)


def check_seed(what: str, seed: Any) -> int:
    """Returns the seed as an int; a ValueError unless it fits into 32 bits, as a run stores it."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_SEED:
        raise ValueError(f"{what} needs a seed that is a whole number from 0 to {MAX_SEED}, got {seed!r}.")
    return number


def _checked_ids(what: str, ids: Any, batch_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        raise ValueError(f"{what} needs at least one id, got none; is this split empty?")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(
            f"{what} needs ids that are a list of row numbers below {2**31}, got {ids.dtype.name}{list(ids.shape)}; "
            "a mask becomes row numbers by np.flatnonzero(mask)."
        )
    if batch_size < 1:
        raise ValueError(f"{what} needs a batch size of 1 or more, got {batch_size}.")
    return ids.astype(np.int32)


def gather(arrays: Mapping[str, Any], index: Int[Array, " batch"]) -> dict[str, jax.Array]:
    """Gathers the rows ``index`` of every array, and adds the index itself."""
    return {name: jnp.asarray(array)[index] for name, array in arrays.items()} | {"index": index}


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images scaled to [0, 1]; pass the training images alone.

    A constant channel gets a standard deviation of 1.
    """
    flat = images.reshape(-1, images.shape[-1])
    # Counting levels is exact, and needs no float copy of a large set.
    levels = np.stack([np.bincount(flat[:, c], minlength=256) for c in range(flat.shape[1])]) / len(flat)
    values = np.arange(256) / 255
    mean = levels @ values
    variance = (levels * (values - mean[:, None]) ** 2).sum(1)
    std = np.where(variance > 0, np.sqrt(variance), 1)
    return tuple(mean.tolist()), tuple(std.tolist())


class Feed(NamedTuple):
    """The arguments of every dispatch of a run, as a pure function of its first step.

    ``identity`` is plain JSON and determines the examples of every step; checkpoints of a run with another identity are
    not resumed.
    """

    steps_per_epoch: int
    at: Callable[[int], tuple[Any, ...]]
    identity: Mapping[str, Any] = {}


def resident_feed(
    arrays: Any,
    ids: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    steps_per_dispatch: int = 1,
    rows_of: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Feed:
    """A feed of the indices of each dispatch, for arrays that stay on the device.

    Args:
      arrays: on the device, addressed by index: images, labels, the teacher's answers.
      ids: of the examples to draw, the training split.
      seed: of the order.
      batch_size: over all devices and hosts.
      steps_per_dispatch: most steps per call. Fewer are run where that divides the epoch into equal parts, so that no
        second program is compiled for the rest.
      rows_of: this process's rows of a global batch; with several processes :func:`kdjax.parallel.process_rows`.

    Returns:
      A feed whose arguments are ``(arrays, int32[batch, steps])``. Its identity has seed, batch size, number of
      examples and a digest of their ids, but not ``steps_per_dispatch``.

    Raises:
      ValueError: as :func:`epoch_index` does, or if ``steps_per_dispatch`` is not positive.
    """
    ids, seed = _checked_ids("resident_feed", ids, batch_size), check_seed("resident_feed", seed)
    if steps_per_dispatch < 1:
        raise ValueError(f"resident_feed needs steps_per_dispatch of 1 or more, got {steps_per_dispatch}.")
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

    digest = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    identity = {"seed": seed, "batch_size": batch_size, "examples": len(ids), "ids": digest}
    return Feed(steps_per_epoch, at, identity)
