"""Labelled images as arrays addressed by index, and splits by a hash of each example's id."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int8, Int32, UInt8

from kdjax.data import arrays, folders, tfds_cache
from kdjax.data.tfds_cache import first_ten
from kdjax.extras import extra
from kdjax.types import Normalisation

GROUP_PATTERNS = {"malaria": r"C\d+(?:P\d+)?"}
"""For :func:`groups_of`: the part of an example id that names the patient, where examples are not independent."""


class Dataset(NamedTuple):
    """Labelled images in memory; row ``i`` of every array is example ``i``. Constant by convention.

    :func:`load` and :func:`from_arrays` leave the last five fields empty; :func:`kdjax.data.split` fills them.
    """

    name: str
    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, " n"]
    example_ids: np.ndarray  # str[n], stable under reordering, such as "train/000123" or a file name
    official_split: Int8[np.ndarray, " n"]  # 0 train, 1 test; -1 throughout where there is no official split
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()  # for the reader of a result: what was left out, odd or decided
    splits: Mapping[str, np.ndarray] = {}  # ids under "train", "validation" and "test"
    normalisation: Normalisation = Normalisation((), ())  # of the training images
    mislabelled: np.ndarray = np.zeros(0, np.int64)  # ids of training examples that were given a wrong label
    true_labels: np.ndarray = np.zeros(0, np.int32)  # of the mislabelled examples, in their order
    content: str = ""  # :func:`digest`, kept because it takes a third of a second for CIFAR

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return self.images.shape[1:]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identifies the data and their splits, as plain JSON: counts, and digests of 64 bits.

        It is stored with everything that a run writes, and compared before anything is read back: a changed label or
        another split is refused (:func:`kdjax.files.read_sealed`, :func:`kdjax.checkpoints.restore`).
        """
        if not self.splits:
            raise ValueError("a Dataset has a fingerprint once it is split: call kdjax.data.split(dataset).")
        splits = {name: np.asarray(ids, "<i8").tobytes() for name, ids in sorted(self.splits.items())}
        ids = b"".join(f"{name} {len(rows) // 8} ".encode() + rows for name, rows in splits.items())
        return {
            "shape": list(self.images.shape),
            "classes": self.num_classes,
            "content": (self.content or digest(self))[:16],
            "class_names": hashlib.sha256("\0".join(self.class_names).encode()).hexdigest()[:16],
            "splits": hashlib.sha256(ids).hexdigest()[:16],
            **{name: len(rows) // 8 for name, rows in splits.items()},
        }


@extra("data")
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
          or [n, height, width, channels]. Labels are integers or text. Text, and integers with gaps, are
          numbered in sorted order and become the class names, unless ``names`` gives others;
        - ``"folder:PATH"``: one folder of images per class, or ``train`` and ``test`` (or ``val``) folders that
          hold such class folders. Folders inside a class folder belong to the class. :mod:`kdjax.data.photos` says
          how images are read.
      data_dir: root of the prepared TFDS sets; by default ``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      image_size: height and width, for TFDS sets and folders; required where images differ in size. An image is
        resized (Lanczos) to cover them, and cropped at its centre. Only ``malaria`` is stretched instead, to 32x32 by
        default, since its published results are of stretched cells.
      skip_broken: for folders: leave out image files that cannot be read, with a note, instead of raising.

    Returns:
      The data set; every example has a stable id. Its notes say what was left out or decided.

    Raises:
      ValueError: if the name is unknown, or the data are missing, half-written, damaged or of the wrong kind.
      ImportError: if a package that this data set needs is missing.
    """
    if image_size is not None and (
        len(image_size) != 2
        or not all(isinstance(side, (int, np.integer)) and side > 0 for side in image_size)
    ):
        raise ValueError(f"image_size={image_size} must be height and width, two integers above 0.")
    if name.startswith("folder:"):
        root = Path(name.removeprefix("folder:")).expanduser()
        found = folders.read(root, image_size=image_size, skip_broken=skip_broken)
        return Dataset(root.resolve().name, *found)
    if skip_broken:
        raise ValueError(f"skip_broken applies to folders of image files; {name} is not one.")
    if name == "digits" or name.lower().endswith(".npz"):
        if image_size is not None:
            raise ValueError(f"image_size applies to TFDS sets and folders; {name} has one size already.")
        if name == "digits":
            return _digits()
        return Dataset(Path(name).name, *arrays.read(Path(name).expanduser()))
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    return Dataset(name, *tfds_cache.read(tfds_cache.find(name, root), name, image_size))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = (digits.images.astype(np.int32) * 255 // 16).astype(np.uint8)[..., None]
    ids = np.array([f"digits/{i:06d}" for i in range(len(images))])
    official_split = np.full(len(images), -1, np.int8)
    return Dataset("digits", images, digits.target.astype(np.int32), ids, official_split, tuple("0123456789"))


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    name: str = "arrays",
) -> Dataset:
    """Makes a data set from arrays in memory.

    Args:
      images: uint8, or floats in [0, 1]; [n, height, width] or [n, height, width, channels].
      labels: integers or text, one per image. Text, and integers with gaps, are numbered in sorted order.
      class_names: one per class; the labels themselves by default.
      test_images: an official test split, if there is one.
      test_labels: its labels.
      name: of the data set, for results.

    Raises:
      ValueError: if the arrays do not match each other, or are not images and labels.
    """
    given = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    given |= {"names": None if class_names is None else np.asarray(class_names)}
    found = {key: np.asarray(value) for key, value in given.items() if value is not None}
    return Dataset(name, *arrays.checked(found, "the arrays"))


# Functions of a data set.


def groups_of(dataset: Dataset, pattern: str) -> np.ndarray:
    """Returns str[n], the first match of a regular expression in each example id, for :func:`split_ids`.

    The patients of the malaria set are ``groups_of(dataset, GROUP_PATTERNS["malaria"])``.

    Raises:
      ValueError: if an id has no match.
    """
    groups = []
    for name in dataset.example_ids:
        if (match := re.search(pattern, name)) is None:
            raise ValueError(f"pattern {pattern!r} matches nothing in the example id {str(name)!r}.")
        groups.append(match.group())
    return np.array(groups)


def split_ids(
    dataset: Dataset, *, validation: float = 0.1, test: float = 0.2, groups: np.ndarray | None = None
) -> dict[str, Int[np.ndarray, " ids"]]:
    """Splits a data set by a hash of each example's id.

    The split of an example depends on its id alone, not on the order or on the other examples. Hashes are uniform in
    [0, 1); test takes the lowest and validation the highest, so changing one fraction leaves the other split as it is.
    Sizes are binomial around the fractions.

    Args:
      dataset: the data set.
      validation: expected fraction for validation; of the training split where there is an official test.
      test: expected fraction for test; ignored where there is an official test split, which is used.
      groups: str[n], such as patients, whose examples stay together; hashed in place of the ids.

    Returns:
      Sorted ``int64`` ids under "train", "validation" and "test".

    Raises:
      ValueError: if the fractions leave nothing for training, a split with a fraction above 0 is empty, or a group is
        in both official splits.
    """
    has_test = bool(np.any(dataset.official_split == 1))
    test = 0.0 if has_test else test
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(f"validation={validation} and test={test} must be >= 0 and sum to less than 1.")
    units = dataset.example_ids if groups is None else np.asarray(groups)
    if units.shape != dataset.labels.shape:
        n = len(dataset.labels)
        raise ValueError(f"groups must have one group per example, {n} in all; got shape {units.shape}.")
    position = _hash_positions(units)
    in_test = dataset.official_split == 1 if has_test else position < test
    in_validation = ~in_test & (position >= 1 - validation)
    if groups is not None and has_test and len(shared := np.intersect1d(units[in_test], units[~in_test])):
        raise ValueError(f"group {str(shared[0])!r} has examples in both official splits, training and test.")
    masks = {"train": ~in_test & ~in_validation, "validation": in_validation, "test": in_test}
    ids = {name: np.flatnonzero(mask) for name, mask in masks.items()}
    for name, fraction in (("train", 1.0), ("validation", validation), ("test", test)):
        if fraction > 0 and not len(ids[name]):
            raise ValueError(
                f"nothing falls into {name} for validation={validation} and test={test}, out of "
                f"{len(np.unique(units))} examples or groups: add examples, or give split_ids a larger "
                f"{name if fraction < 1 else 'rest'} fraction."
            )
    return ids


def _hash_positions(units: np.ndarray, salt: str = "") -> np.ndarray:
    """Maps each string to a uniform number in [0, 1), independent of those with another salt."""
    return (_hashes(f"{salt}\0{unit}".encode() for unit in units.tolist()) >> np.uint64(11)) * 2.0**-53


def _hashes(contents: Iterable[Any]) -> np.ndarray:
    """A hash of 64 bits of each buffer."""
    return np.frombuffer(b"".join(hashlib.blake2b(c, digest_size=8).digest() for c in contents), "<u8")


def split_notes(dataset: Dataset, split: Mapping[str, Int[np.ndarray, " _"]]) -> tuple[str, ...]:
    """Warns of what makes the numbers of a split less meaningful, with counts; nothing if all is well.

    Images are compared by digests of their bytes, so a recompressed copy is not found. The notes are about classes
    without an example in a split; images in two splits, with two labels, or of a single colour; class names that differ
    only in case.
    """
    notes, spellings = [], defaultdict(list)
    for name in dataset.class_names:
        spellings[unicodedata.normalize("NFKC", name).casefold().strip()].append(name)
    if alike := [" and ".join(names) for names in spellings.values() if len(names) > 1]:
        notes.append(f"Names of classes that differ only in case, accents or spaces: {first_ten(alike)}.")
    for name, ids in split.items():
        counts = np.bincount(dataset.labels[ids], minlength=dataset.num_classes)
        if len(ids) and (missing := np.flatnonzero(counts == 0)).size:
            lacking = first_ten(dataset.class_names[i] for i in missing)
            number = f"{len(missing):,} of {dataset.num_classes:,}"
            notes.append(f"Classes without a {name} image: {number}, {lacking}.")
    digests = _hashes(dataset.images)
    for name, other in itertools.combinations(split, 2):
        if copies := int(np.isin(digests[split[other]], digests[split[name]]).sum()):
            number = f"{copies:,} of {len(split[other]):,}"
            notes.append(f"Images of {other} that are also in {name}, pixel for pixel: {number}.")
    _, image_of = np.unique(digests, return_inverse=True)
    pairs = np.unique(np.stack([image_of, dataset.labels]), axis=1)
    if contradicted := int((np.bincount(pairs[0]) > 1).sum()):
        notes.append(f"Images that occur with more than one label: {contradicted:,}.")
    flat = (dataset.images.min((1, 2)) == dataset.images.max((1, 2))).all(-1)
    if flat.any():
        notes.append(f"Images of a single colour: {int(flat.sum()):,} of {len(flat):,}.")
    return tuple(notes)


def subset(dataset: Dataset, ids: Int[np.ndarray, " ids"]) -> Dataset:
    """Returns a data set of some examples: example ``i`` of the result is example ``ids[i]`` of the data set."""
    rows = ("images", "labels", "example_ids", "official_split")
    fields = {name: getattr(dataset, name)[ids] for name in rows}
    mislabelled = np.flatnonzero(np.isin(ids, dataset.mislabelled))
    true_labels = dataset.true_labels[np.searchsorted(dataset.mislabelled, np.asarray(ids)[mislabelled])]
    return dataset._replace(**fields, splits={}, mislabelled=mislabelled, true_labels=true_labels, content="")


def with_label_noise(
    dataset: Dataset, ids: Int[np.ndarray, " ids"], *, fraction: float, seed: int
) -> Dataset:
    """Gives exactly ``round(fraction * len(ids))`` examples a wrong label, uniform over the wrong classes.

    Hashes of the example ids decide: the examples with the lowest become wrong, so a larger fraction adds to a smaller
    one, and an example's wrong label is the same for every fraction and whatever the other examples are. Which examples
    are lowest depends on ``ids``: give the whole training split and take a :func:`subset` afterwards, and all subsets
    agree.

    Args:
      dataset: the data set; it is not changed.
      ids: of the examples to choose from, in any order.
      fraction: share of ``ids`` to mislabel, in [0, 1].
      seed: of the choice of examples and labels.

    Returns:
      The data set with the new labels, with the sorted ids of the mislabelled examples as ``mislabelled``, and with
      their labels before as ``true_labels``.

    Raises:
      ValueError: if ``fraction`` is outside [0, 1], ids are repeated or out of range, or there is a single class.
    """
    ids = np.sort(np.asarray(ids))
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1]; got {fraction}.")
    if dataset.num_classes < 2:
        raise ValueError(f"label noise needs at least two classes; {dataset.name} has {dataset.num_classes}.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or np.any(ids[1:] == ids[:-1]):
        raise ValueError(f"ids must be distinct example indices; got {ids.dtype} of shape {ids.shape}.")
    if len(ids) and (ids[0] < 0 or ids[-1] >= len(dataset.labels)):
        raise ValueError(f"ids must be in [0, {len(dataset.labels)}); got {ids[0]} to {ids[-1]}.")
    order = np.argsort(_hash_positions(dataset.example_ids[ids], f"mislabelled {seed}"), kind="stable")
    mislabelled = ids[np.sort(order[: round(fraction * len(ids))])].astype(np.int64)
    which = _hash_positions(dataset.example_ids[mislabelled], f"wrong label {seed}")
    shift = 1 + (which * (dataset.num_classes - 1)).astype(np.int32)
    labels = dataset.labels.copy()
    labels[mislabelled] = (labels[mislabelled] + shift) % dataset.num_classes
    return dataset._replace(
        labels=labels, mislabelled=mislabelled, true_labels=dataset.labels[mislabelled], content=""
    )


def digest(dataset: Dataset) -> str:
    """Returns one SHA-256 over images, labels and example ids, with their shapes."""
    total = hashlib.sha256()
    for name, array in (("images", dataset.images), ("labels", dataset.labels.astype("<i4"))):
        total.update(f"{name}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    for name in dataset.example_ids.tolist():
        tfds_cache.update_digest(total, name.encode())
    return total.hexdigest()
