"""What identifies the data of a run, so that nothing made from other data is ever taken for its own."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from kdjax.data.datasets import Dataset, digest


def fingerprint(
    source: Dataset, split: Mapping[str, Int[np.ndarray, " ids"]], *, source_digest: str | None = None
) -> dict[str, Any]:
    """Everything about the data that decides a run's numbers, as plain JSON.

    Kept with what a run writes, and compared before anything is read back (:func:`kdjax.files.read_sealed`,
    :func:`kdjax.checkpoints.restore`), it tells a file of these data from one of others. It has counts, for the reader
    of a message, and digests.

    Args:
      source: the data set as it is learnt from: with its label noise, and without the examples that are not used.
      split: its ids by the name of the split.
      source_digest: of the source, by :func:`kdjax.data.digest`, where it is known already: hashing CIFAR takes a
        third of a second.

    Returns:
      ``shape`` of the images, number of ``classes``, size of each split; as digests ``content`` (images, labels, keys),
      ``class_names`` and ``splits``.
    """
    ids = b"".join(f"{name} {len(split[name])} ".encode() + _bytes(split[name]) for name in sorted(split))
    return {
        "shape": list(source.images.shape),
        "classes": source.num_classes,
        "content": (source_digest or digest(source))[:_LENGTH],
        "class_names": hashlib.sha256("\0".join(source.class_names).encode()).hexdigest()[:_LENGTH],
        "splits": hashlib.sha256(ids).hexdigest()[:_LENGTH],
        **{name: len(split[name]) for name in sorted(split)},
    }


_LENGTH = 16  # 64 bits tell accidents apart, and leave a message readable


def _bytes(ids: np.ndarray) -> bytes:
    return np.asarray(ids, "<i8").tobytes()
