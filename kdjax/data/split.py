"""Prepares a loaded data set for a run: selects examples, splits them, computes the normalisation."""

import functools
import sys

import jax
import numpy as np

from kdjax.data import datasets
from kdjax.data.batches import channel_statistics
from kdjax.data.datasets import Dataset
from kdjax.types import Normalisation


def split(
    dataset: Dataset,
    *,
    num_train: int = 0,
    num_validation: int = 0,
    by_group: bool = True,
    label_noise: float = 0.0,
    clip: bool = False,
) -> Dataset:
    """Splits a data set by its example ids, and keeps the examples that a run uses.

    Warnings about the data are printed once to stderr, and added to the notes.

    Args:
      dataset: as loaded.
      num_train: training examples to keep, 0 for all; a larger sample contains a smaller one.
      num_validation: validation examples to keep, 0 for all (a tenth of the training split).
      by_group: keep all images of a patient in one split, where example ids name patients.
      label_noise: share of the labels of the whole training split to make wrong, by :func:`with_label_noise`;
        ``num_train`` of its examples have about that share, and an example has one label in samples of every size. A
        note counts the wrong ones. Validation and test keep their labels.
      clip: take all examples where there are fewer than asked for, instead of raising.

    Returns:
      The data set with ``splits``, ``normalisation`` (from its training images), ``mislabelled``, ``true_labels`` and
      ``content``.

    Raises:
      ValueError: if a split would be empty, or has fewer examples than asked for.
    """
    pattern = datasets.GROUP_PATTERNS.get(dataset.name.partition(":")[0]) if by_group else None
    splits = datasets.split_ids(dataset, groups=datasets.groups_of(dataset, pattern) if pattern else None)
    labels = dataset.labels
    if label_noise:  # before sampling: an example has the same label in every sample
        dataset = datasets.with_label_noise(dataset, splits["train"], fraction=label_noise, seed=0)
    splits["train"] = _sample(splits["train"], num_train, "num_train", clip)
    splits["validation"] = _sample(splits["validation"], num_validation, "num_validation", clip)
    used = np.sort(np.concatenate(list(splits.values())))
    dataset = datasets.subset(dataset, used)
    splits = {name: np.searchsorted(used, ids) for name, ids in splits.items()}
    loaded = dataset._replace(labels=labels[used])  # noise would be noted as copies with two labels
    notes = (*dataset.notes, *datasets.split_notes(loaded, splits))
    if label_noise:
        number = f"{len(dataset.mislabelled):,} of {len(splits['train']):,}"
        notes = (*notes, f"Training labels made wrong: {number}.")
    for note in notes:
        _print_once(note)
    return dataset._replace(
        splits=splits,
        normalisation=Normalisation(*channel_statistics(dataset.images[splits["train"]])),
        content=datasets.digest(dataset),
        notes=notes,
    )


def _sample(ids: np.ndarray, count: int, option: str, clip: bool) -> np.ndarray:
    """A fixed sample of ``count`` ids."""
    if not count or (clip and count > len(ids)):
        return ids
    if not 1 <= count <= len(ids):
        raise ValueError(f"{option}={count} is not between 1 and the {len(ids)} examples of that split.")
    return np.sort(np.random.default_rng(0).permutation(ids)[:count])


@functools.cache  # an experiment may split the same data several times
def _print_once(note: str) -> None:
    if jax.process_index() == 0:
        print(f"note: {note}", file=sys.stderr, flush=True)
