"""Labelled images as arrays addressed by index, and splits that a hash of each example's key decides."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int8, Int32, UInt8

from kdjax.data import stored
from kdjax.extras import extra

GROUP_PATTERNS = {"malaria": r"C\d+(?:P\d+)?"}
"""For :func:`groups_of`: the part of a key that names the patient, of sets whose examples are not independent."""

_NPZ_ARRAYS = ("images", "labels", "test_images", "test_labels", "names")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_TEST_FOLDERS = ("test", "val", "validation")


class Source(NamedTuple):
    """Labelled images in memory; row ``i`` of every array is example ``i``. Constant by convention."""

    name: str
    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, " n"]
    keys: np.ndarray  # str[n]: ids that outlive a reordering, such as "train/000123" or a file name
    official: Int8[np.ndarray, " n"]  # 0 training, 1 official test split; -1 throughout where there is none
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, image_size: tuple[int, int] | None = None
) -> Source:
    """Loads a labelled image data set into memory.

    Args:
      name: one of

        - ``"digits"``: scikit-learn's 1,797 handwritten digits, 8x8 grey, no download;
        - a TFDS image-classification name, prepared under ``data_dir`` in the array_record format, for
          instance by :func:`kdjax.data.prepare`; decoded on the first load and cached beside the records,
          without TensorFlow;
        - a path ending in ``.npz`` with ``images`` and ``labels``, optionally ``test_images``,
          ``test_labels`` and ``names``; images are ``uint8``, or floats in [0, 1], shaped [n, height, width]
          or [n, height, width, channels];
        - ``"folder:PATH"``: a folder of images (png, jpg, bmp) per class, or ``train`` and ``test`` (or
          ``val``) folders of those.
      data_dir: root of the prepared TFDS sets; by default ``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      image_size: height and width to resize to (Lanczos), for TFDS sets and folders. Needed where images
        differ in size, except for ``malaria``, which becomes 32x32 unless told otherwise.

    Returns:
      The data set, each example with a stable key.

    Raises:
      ValueError: the name is unknown, or the data are missing, half-written, damaged or of a wrong kind.
    """
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f"image_size must be (height, width), both at least 1; got {image_size}.")
    if name == "digits" or name.endswith(".npz"):
        if image_size is not None:
            raise ValueError(f"image_size applies to TFDS sets and folders; {name} has one size already.")
        return _digits() if name == "digits" else _npz(Path(name))
    if name.startswith("folder:"):
        return _folder(Path(name.removeprefix("folder:")), image_size)
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    return Source(name, *stored.read(name, data_dir=root, image_size=image_size))


def _digits() -> Source:
    with extra("experiments"):
        from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = (digits.images.astype(np.int32) * 255 // 16).astype(np.uint8)[..., None]
    keys = np.array([f"digits/{i:06d}" for i in range(len(images))])
    official = np.full(len(images), -1, np.int8)
    return Source("digits", images, digits.target.astype(np.int32), keys, official, tuple("0123456789"))


# An .npz file.


def _npz(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: give the path of an .npz with the arrays images and labels."
        )
    arrays = _npz_arrays(path)
    parts = [("train", arrays["images"], arrays["labels"])]
    if "test_images" in arrays:
        parts.append(("test", arrays["test_images"], arrays["test_labels"]))
    images = [_as_uint8(images, f"{split} images of {path}") for split, images, _ in parts]
    if len({part.shape[1:] for part in images}) > 1:
        raise ValueError(
            f"images and test_images of {path} differ in shape: {images[0].shape}, {images[1].shape}."
        )
    labels = [_as_labels(part[2], len(part[1]), f"{part[0]} labels of {path}") for part in parts]
    highest = int(max(part.max() for part in labels))
    names = tuple(map(str, arrays["names"])) if "names" in arrays else tuple(map(str, range(highest + 1)))
    if highest >= len(names):
        raise ValueError(
            f"{path} names {len(names)} classes but has label {highest}: names needs one name a class."
        )
    keys = np.array([f"{split}/{i:06d}" for split, part, _ in parts for i in range(len(part))])
    official = [
        np.full(len(part), flag if len(parts) > 1 else -1, np.int8) for flag, part in enumerate(labels)
    ]
    return Source(
        path.stem, np.concatenate(images), np.concatenate(labels), keys, np.concatenate(official), names
    )


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no readable .npz of plain arrays ({error}); write it with numpy.savez."
        ) from error
    unknown = sorted(set(arrays) - set(_NPZ_ARRAYS))
    if (
        unknown
        or not {"images", "labels"} <= set(arrays)
        or ("test_images" in arrays) != ("test_labels" in arrays)
    ):
        raise ValueError(
            f"{path} must hold images and labels, and may hold test_images with test_labels, and names; "
            f"it holds {', '.join(sorted(arrays)) or 'nothing'}."
        )
    return arrays


def _as_uint8(images: np.ndarray, what: str) -> np.ndarray:
    if images.ndim not in (3, 4) or not len(images):
        raise ValueError(
            f"{what} must be shaped [n, height, width] or [n, height, width, channels]; got {images.shape}."
        )
    if images.dtype.kind == "f":
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(f"{what} are floats, which must lie in [0, 1]; they lie in [{low:g}, {high:g}].")
        images = np.round(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(
            f"{what} must be uint8, or floats in [0, 1]; got {images.dtype}: convert them first."
        )
    return images[..., None] if images.ndim == 3 else images


def _as_labels(labels: np.ndarray, count: int, what: str) -> np.ndarray:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{what} must be {count} integers; got {labels.dtype} of shape {labels.shape}.")
    if labels.min() < 0:
        raise ValueError(f"{what} must count from 0; the smallest is {labels.min()}.")
    return labels.astype(np.int32)


# A folder of class folders.


def _folder(root: Path, image_size: tuple[int, int] | None) -> Source:
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: give one that holds a folder of images for each class.")
    inside = _subfolders(root)
    tests = [name for name in _TEST_FOLDERS if name in inside]
    parts = {"": -1}
    if "train" in inside and tests:
        parts = {split: int(split == tests[0]) for split in ("train", *tests)}
    classes = {split: _subfolders(root / split) for split in parts}
    names = classes[next(iter(parts))]
    for split, found in classes.items():
        if found != names:
            raise ValueError(
                f"{root / split} has the classes {found}, {root / 'train'} has {names}: they must agree."
            )
    if len(names) < 2:
        raise ValueError(
            f"{root} must hold at least two class folders; it holds {', '.join(names) or 'none'}."
        )
    paths, labels, official = [], [], []
    for split, flag in parts.items():
        for label, name in enumerate(names):
            found = _image_files(root / split / name)
            paths += found
            labels += [label] * len(found)
            official += [flag] * len(found)
    keys = np.array([path.relative_to(root).as_posix() for path in paths])
    images = _read_images(paths, image_size)
    return Source(
        root.name, images, np.array(labels, np.int32), keys, np.array(official, np.int8), tuple(names)
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(
            f"{folder} holds no images: every class needs some, ending in {', '.join(_IMAGE_SUFFIXES)}."
        )
    return paths


def _read_images(paths: Sequence[Path], image_size: tuple[int, int] | None) -> np.ndarray:
    """Reads images of one size, or resized to one; grey if all of them are grey, else RGB."""
    from PIL import Image

    images, grey = [], True
    for path in stored.progress(paths, "Reading images"):
        try:
            with Image.open(path) as file:
                file.load()
                image = file.convert("L" if file.mode in ("L", "1") else "RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
            raise ValueError(f"{path} is not a readable image ({error}): replace or remove it.") from error
        if image_size is not None:
            image = image.resize((image_size[1], image_size[0]), Image.Resampling.LANCZOS)
        if images and image.size != images[0].size:
            raise ValueError(
                f"images differ in size: {paths[0]} is {images[0].size}, {path} is {image.size} (width, "
                "height); pass image_size=(height, width) to resize them."
            )
        grey = grey and image.mode == "L"
        images.append(image)
    stacked = np.stack([np.asarray(image if grey else image.convert("RGB")) for image in images])
    return stacked[..., None] if grey else stacked


# Functions of a source.


def groups_of(source: Source, pattern: str) -> np.ndarray:
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
    found = [re.search(pattern, key) for key in source.keys]
    for key, match in zip(source.keys, found, strict=True):
        if match is None:
            raise ValueError(
                f"pattern {pattern!r} matches nothing in the key {str(key)!r}: every example needs a group."
            )
    return np.array([match.group() for match in found if match is not None])


def split_ids(
    source: Source,
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
    has_test = bool(np.any(source.official == 1))
    test = 0.0 if has_test else test
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(
            f"validation and test must be >= 0 and sum to less than 1; got {validation} and {test}."
        )
    units = source.keys if groups is None else np.asarray(groups)
    if units.shape != source.labels.shape:
        raise ValueError(
            f"groups must name one group an example, {len(source.labels)} in all; got shape {units.shape}."
        )
    if groups is not None and has_test:
        shared = np.intersect1d(units[source.official == 1], units[source.official != 1])
        if len(shared):
            raise ValueError(
                f"group {str(shared[0])!r} has examples in the official training and test splits alike."
            )
    position = _hash_positions(units, salt)
    in_test = source.official == 1 if has_test else position < test
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
                f"{len(np.unique(units))} examples or groups: raise the fraction or pass another salt."
            )
    return ids


def _hash_positions(units: np.ndarray, salt: str) -> np.ndarray:
    """Maps each string to a uniform number in [0, 1)."""
    prefix = f"{salt}\0"
    digests = b"".join(
        hashlib.blake2b(f"{prefix}{unit}".encode(), digest_size=8).digest() for unit in units.tolist()
    )
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53


def take(source: Source, ids: Int[np.ndarray, " ids"]) -> Source:
    """Returns the examples ``ids``, keys included, as a data set of their own: its ``i`` is ``ids[i]``."""
    return source._replace(
        images=source.images[ids],
        labels=source.labels[ids],
        keys=source.keys[ids],
        official=source.official[ids],
    )


def with_label_noise(
    source: Source, ids: Int[np.ndarray, " ids"], *, fraction: float, seed: int
) -> tuple[Source, Int[np.ndarray, " perturbed"]]:
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


def digest(source: Source) -> str:
    """Returns one SHA-256 over images, labels and keys, with their shapes."""
    total = hashlib.sha256()
    arrays: dict[str, Any] = {"images": source.images, "labels": source.labels.astype("<i4")}
    for name, array in arrays.items():
        total.update(f"{name}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    for key in source.keys.tolist():
        stored.update_digest(total, key.encode())
    return total.hexdigest()
