"""Labelled images as arrays addressed by index, and splits that a hash of each example's key decides."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int8, Int32, UInt8

from kdjax.data import arrays, folders, tfds_cache
from kdjax.data.tfds_cache import first_ten
from kdjax.extras import extra

GROUP_PATTERNS = {"malaria": r"C\d+(?:P\d+)?"}
"""For :func:`groups_of`: the part of a key that names the patient, of sets whose examples are not independent."""


class Dataset(NamedTuple):
    """Labelled images in memory; row ``i`` of every array is example ``i``. Constant by convention."""

    name: str
    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, " n"]
    example_ids: np.ndarray  # str[n]: ids that outlive a reordering, such as "train/000123" or a file name
    official_split: Int8[
        np.ndarray, " n"
    ]  # 0 training, 1 official test split; -1 throughout where there is none
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()  # sentences on how the data were read, for the reader of a result

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
    skip_broken: bool = False,
) -> Dataset:
    """Loads a labelled image data set into memory.

    Args:
      name: one of

        - ``"digits"``: scikit-learn's 1,797 handwritten digits, 8x8 grey, no download;
        - a TFDS image-classification name, prepared under ``data_dir`` in the array_record format, for
          instance by :func:`kdjax.data.prepare`; decoded on the first load and cached beside the records,
          without TensorFlow;
        - a path ending in ``.npz`` with ``images`` and ``labels``, optionally ``test_images``,
          ``test_labels`` and ``names``. Images are ``uint8``, or floats in [0, 1], shaped [n, height, width]
          or [n, height, width, channels]. Labels are integers or text. Text, and integers that leave gaps, are
          numbered in their order and become the names of the classes, if ``names`` does not give others;
        - ``"folder:PATH"``: a folder of images per class, or ``train`` and ``test`` (or ``val``) folders of
          those. Folders inside a class folder belong to the class. Images are read as a viewer shows them:
          see :mod:`kdjax.data.photos`.
      data_dir: root of the prepared TFDS sets; by default ``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      image_size: height and width, for TFDS sets and folders; needed where images differ in size. An image is
        resized (Lanczos) until it just covers them, and what is left over is cut off evenly. Only ``malaria`` is
        stretched instead, to 32x32 unless told otherwise, since its published results are of stretched cells.
      skip_broken: for folders: leave out image files that cannot be read, with a note, instead of raising.

    Returns:
      The data set, each example with a stable key, and notes on what was left out or decided.

    Raises:
      ValueError: the name is unknown, or the data are missing, half-written, damaged or of a wrong kind.
      ImportError: a package is missing that this data set needs.
    """
    if image_size is not None and (
        len(image_size) != 2
        or not all(isinstance(side, (int, np.integer)) and side > 0 for side in image_size)
    ):
        raise ValueError(f"image_size must be (height, width), two integers above 0; got {image_size}.")
    if skip_broken and not name.startswith("folder:"):
        raise ValueError(f"skip_broken applies to folders of image files; {name} is none.")
    with extra("experiments"):
        return _load(name, data_dir, image_size, skip_broken)


def _load(
    name: str, data_dir: str | os.PathLike[str] | None, image_size: tuple[int, int] | None, skip_broken: bool
) -> Dataset:
    if name.startswith("folder:"):
        root = Path(name.removeprefix("folder:")).expanduser()
        return Dataset(
            root.resolve().name, *folders.read(root, image_size=image_size, skip_broken=skip_broken)
        )
    if name == "digits" or name.lower().endswith(".npz"):
        if image_size is not None:
            raise ValueError(f"image_size applies to TFDS sets and folders; {name} has one size already.")
        return (
            _digits() if name == "digits" else Dataset(Path(name).stem, *arrays.read(Path(name).expanduser()))
        )
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    return Dataset(name, *tfds_cache.read(name, data_dir=root, image_size=image_size))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = (digits.images.astype(np.int32) * 255 // 16).astype(np.uint8)[..., None]
    keys = np.array([f"digits/{i:06d}" for i in range(len(images))])
    official_split = np.full(len(images), -1, np.int8)
    return Dataset(
        "digits", images, digits.target.astype(np.int32), keys, official_split, tuple("0123456789")
    )


# Functions of a source.


def groups_of(source: Dataset, pattern: str) -> np.ndarray:
    """Returns the part of each key that names its group, for :func:`split_ids`.

    The patients of the malaria set are ``groups_of(source, GROUP_PATTERNS["malaria"])``.

    Args:
      source: the data set.
      pattern: a regular expression; its first match in a key is the group.

    Returns:
      str[n], one group an example.

    Raises:
      ValueError: a key has no match.
    """
    found = [re.search(pattern, key) for key in source.example_ids]
    for key, match in zip(source.example_ids, found, strict=True):
        if match is None:
            raise ValueError(
                f"pattern {pattern!r} matches nothing in the key {str(key)!r}: every example needs a group."
            )
    return np.array([match.group() for match in found if match is not None])


def split_ids(
    source: Dataset,
    *,
    validation: float = 0.1,
    test: float = 0.2,
    groups: np.ndarray | None = None,
    salt: str = "",
) -> dict[str, Int[np.ndarray, " ids"]]:
    """Splits a data set by a hash of each example's key.

    Where an example falls depends on its key alone: not on the order, nor on which other examples are there.
    Test takes the hashes from 0 and validation those up to 1, so changing one fraction moves no example into
    or out of the other. The sizes are binomial around the fractions asked for.

    Args:
      source: the data set.
      validation: expected fraction for validation; of the training split where there is an official test.
      test: expected fraction for test; ignored where there is an official test split, which is used.
      groups: str[n], for instance patients, whose examples stay together; hashed in place of the keys.
      salt: another string gives another, independent split.

    Returns:
      Sorted ``int64`` ids under "train", "validation" and "test".

    Raises:
      ValueError: the fractions leave nothing for training, a split asked for is empty, or a group lies on
        both sides of the official split.
    """
    has_test = bool(np.any(source.official_split == 1))
    test = 0.0 if has_test else test
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(
            f"validation and test must be >= 0 and sum to less than 1; got {validation} and {test}."
        )
    units = source.example_ids if groups is None else np.asarray(groups)
    if units.shape != source.labels.shape:
        raise ValueError(
            f"groups must name one group an example, {len(source.labels)} in all; got shape {units.shape}."
        )
    if groups is not None and has_test:
        shared = np.intersect1d(units[source.official_split == 1], units[source.official_split != 1])
        if len(shared):
            raise ValueError(
                f"group {str(shared[0])!r} has examples in the official training and test splits alike."
            )
    position = _hash_positions(units, salt)
    in_test = source.official_split == 1 if has_test else position < test
    in_validation = ~in_test & (position >= 1 - validation)
    ids = {
        "train": np.flatnonzero(~in_test & ~in_validation),
        "validation": np.flatnonzero(in_validation),
        "test": np.flatnonzero(in_test),
    }
    for name, fraction in (("train", 1.0), ("validation", validation), ("test", test)):
        if fraction > 0 and not len(ids[name]):
            raise ValueError(
                f"nothing falls into {name} for validation={validation} and test={test}, out of "
                f"{len(np.unique(units))} examples or groups: add examples, or give split_ids a larger "
                f"{name if fraction < 1 else 'rest'} fraction or another salt."
            )
    return ids


def _hash_positions(units: np.ndarray, salt: str) -> np.ndarray:
    """Maps each string to a uniform number in [0, 1)."""
    prefix = f"{salt}\0"
    digests = b"".join(
        hashlib.blake2b(f"{prefix}{unit}".encode(), digest_size=8).digest() for unit in units.tolist()
    )
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53


def split_notes(source: Dataset, split: Mapping[str, Int[np.ndarray, " _"]]) -> tuple[str, ...]:
    """Says what in a split makes its numbers mean less than they seem, each with counts; nothing if all is well.

    Images are compared byte by byte (by their digests), so that a copy which was compressed anew is not found.

    Args:
      source: the data set, with its labels as they came, before any noise.
      split: the ids of each split, as :func:`split_ids` returns them.

    Returns:
      Sentences: classes without an example in a split; images that lie in two splits, that bear two labels, or that
      are of one colour throughout; class names that differ in case alone.
    """
    return tuple(_split_notes(source, split))


def _split_notes(source: Dataset, split: Mapping[str, np.ndarray]) -> Iterator[str]:
    spellings = defaultdict(list)
    for name in source.class_names:
        spellings[unicodedata.normalize("NFKC", name).casefold().strip()].append(name)
    if alike := [" and ".join(names) for names in spellings.values() if len(names) > 1]:
        yield f"The names of these classes differ in case, accents or spaces alone: {first_ten(alike)}."
    for name, ids in split.items():
        counts = np.bincount(source.labels[ids], minlength=source.num_classes)
        if len(ids) and (missing := np.flatnonzero(counts == 0)).size:
            lacking = first_ten(source.class_names[i] for i in missing)
            yield f"Classes without a {name} image: {len(missing):,} of {source.num_classes:,}, {lacking}."
    digests = np.frombuffer(
        b"".join(hashlib.blake2b(image, digest_size=8).digest() for image in source.images), "<u8"
    )
    sides = list(split)
    for i, name in enumerate(sides):
        for other in sides[i + 1 :]:
            if copies := int(np.isin(digests[split[other]], digests[split[name]]).sum()):
                total = len(split[other])
                yield f"Images of {other} that are also in {name}, pixel for pixel: {copies:,} of {total:,}."
    _, image_of = np.unique(digests, return_inverse=True)
    pairs = np.unique(np.stack([image_of, source.labels]), axis=1)
    if contradicted := int((np.bincount(pairs[0]) > 1).sum()):
        yield f"Images that occur with more than one label: {contradicted:,}."
    flat = (source.images.min((1, 2)) == source.images.max((1, 2))).all(-1)
    if flat.any():
        yield f"Images of a single colour: {int(flat.sum()):,} of {len(flat):,}."


def subset(source: Dataset, ids: Int[np.ndarray, " ids"]) -> Dataset:
    """Returns the examples ``ids``, keys included, as a data set of their own: its ``i`` is ``ids[i]``."""
    return source._replace(
        images=source.images[ids],
        labels=source.labels[ids],
        example_ids=source.example_ids[ids],
        official_split=source.official_split[ids],
    )


def with_label_noise(
    source: Dataset, ids: Int[np.ndarray, " ids"], *, fraction: float, seed: int
) -> tuple[Dataset, Int[np.ndarray, " perturbed"]]:
    """Gives exactly ``round(fraction * len(ids))`` examples a wrong label, uniform over the wrong classes.

    Args:
      source: the data set; it is left as it is.
      ids: the examples that may be perturbed, usually the training ids; their order does not matter.
      fraction: share of ``ids`` to perturb, in [0, 1].
      seed: which examples and which labels.

    Returns:
      The data set with the new labels, and the perturbed ids, sorted.

    Raises:
      ValueError: ``fraction`` outside [0, 1]; ids repeated or out of range; a single class.
    """
    ids = np.sort(np.asarray(ids))
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1]; got {fraction}.")
    if source.num_classes < 2:
        raise ValueError(f"label noise needs at least two classes; {source.name} has {source.num_classes}.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or np.any(ids[1:] == ids[:-1]):
        raise ValueError(
            f"ids must be distinct example indices; got {ids.dtype} of shape {ids.shape}, perhaps repeated."
        )
    if len(ids) and (ids[0] < 0 or ids[-1] >= len(source.labels)):
        raise ValueError(f"ids must be in [0, {len(source.labels)}); got {ids[0]} to {ids[-1]}.")
    rng = np.random.default_rng(seed)
    perturbed = np.sort(rng.choice(ids, round(fraction * len(ids)), replace=False))
    shift = rng.integers(1, source.num_classes, len(perturbed), dtype=np.int32)
    labels = source.labels.copy()
    labels[perturbed] = (labels[perturbed] + shift) % source.num_classes
    return source._replace(labels=labels), perturbed.astype(np.int64)


def digest(source: Dataset) -> str:
    """Returns one SHA-256 over images, labels and keys, with their shapes."""
    total = hashlib.sha256()
    for name, array in (("images", source.images), ("labels", source.labels.astype("<i4"))):
        total.update(f"{name}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    for key in source.example_ids.tolist():
        tfds_cache.update_digest(total, key.encode())
    return total.hexdigest()
