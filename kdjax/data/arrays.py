"""Images and labels from an ``.npz`` file, checked for mistakes that would train on the wrong thing."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kdjax.data import tfds_cache
from kdjax.data.tfds_cache import first_ten

_NAMES = ("images", "labels", "test_images", "test_labels", "names")
_TOLERANCE = 0.49 / 255  # below half a level of uint8: values so little outside [0, 1] round into it


def read(path: Path) -> tfds_cache.Arrays:
    """Reads an ``.npz``; :func:`kdjax.data.load` says what it may hold.

    Args:
      path: of the file.

    Returns:
      The data set, training examples first.

    Raises:
      ValueError: if the file is missing or damaged, or its arrays are not images and labels.
    """
    return checked(_arrays(path), str(path))


def checked(arrays: Mapping[str, np.ndarray], where: str) -> tfds_cache.Arrays:
    """Checks the arrays of an ``.npz``, or the same in memory; ``where`` names them in errors and notes."""
    splits = {"train": "", "test": "test_"} if "test_images" in arrays else {"train": ""}
    images, given = [], []
    for start in splits.values():
        images.append(_as_uint8(arrays[f"{start}images"], f"{start}images of {where}"))
        given.append(_checked_labels(arrays[f"{start}labels"], len(images[-1]), f"{start}labels of {where}"))
    if len({part.shape[1:] for part in images}) > 1:
        raise ValueError(
            f"images and test_images of {where} differ in shape: {images[0].shape}, {images[1].shape}."
        )
    labels, class_names, notes = _classes(given, arrays.get("names"), where)
    if len({arrays[f"{start}images"].dtype.kind for start in splits.values()}) > 1:
        notes.append(f"Of images and test_images in {where} one is uint8 and one floats; both are now uint8.")
    every = np.concatenate(images)
    counts = [len(part) for part in images]
    return tfds_cache.Arrays(
        every,
        np.concatenate(labels),
        np.array([f"{split}/{i:06d}" for split, n in zip(splits, counts, strict=True) for i in range(n)]),
        np.repeat(np.array([0, 1] if len(splits) > 1 else [-1], np.int8), counts),
        class_names,
        (*notes, *_notes(every, where)),
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: give the path of an .npz with the arrays images and labels."
        )
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if damaged := file.zip.testzip():  # NumPy checks only the bytes that an array's header announces
                raise zipfile.BadZipFile(f"bad CRC-32 of {damaged}")
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # a flipped bit raises nearly anything, zlib.error for one
        raise ValueError(
            f"{path} is no readable .npz of plain arrays ({error}): write it again with numpy.savez."
        ) from error
    known = set(arrays) <= set(_NAMES)
    if not (
        known
        and {"images", "labels"} <= arrays.keys()
        and ("test_images" in arrays) == ("test_labels" in arrays)
    ):
        raise ValueError(
            f"{path} must hold images and labels, and may hold test_images with test_labels, and names; "
            f"it holds {', '.join(sorted(arrays)) or 'nothing'}."
        )
    return arrays


# Images.


def _as_uint8(images: np.ndarray, what: str) -> np.ndarray:
    if images.ndim not in (3, 4) or not images.size:
        raise ValueError(
            f"{what} must be shaped [n, height, width] or [n, height, width, channels]; got {images.shape}."
        )
    images = images[..., None] if images.ndim == 3 else images
    _check_channels_last(images.shape, what)
    if images.dtype.kind == "f":
        _check_range(images, what)
        return np.round(images * np.float32(255)).astype(np.uint8)
    if images.dtype != np.uint8:
        advice = {
            "b": ": write images.astype(np.uint8) * 255",
            "u": ": write (images / 257).round().astype(np.uint8) if 65535 is white",
            "i": ": write images.astype(np.uint8) if they lie in [0, 255]",
        }
        raise ValueError(
            f"{what} must be uint8, or floats in [0, 1]; got {images.dtype}{advice.get(images.dtype.kind, '')}."
        )
    return images


def _check_channels_last(shape: tuple[int, ...], what: str) -> None:
    """Refuses channels first, and ambiguous shapes; many channels are accepted below the height and the width."""
    _, height, width, channels = shape
    usual = channels in (1, 3) or (channels in (2, 4) and height not in (1, 3))
    many = 4 < channels < min(height, width)
    if not (usual or (many and height > 4)):
        raise ValueError(
            f"{what} are shaped {shape}, which reads as {channels} channels of {height}x{width} pixels. Channels come "
            "last, 1 of grey or 3 of colour: if they come first here, write images.transpose(0, 2, 3, 1)."
        )


def _check_range(images: np.ndarray, what: str) -> None:
    low, high = float(images.min()), float(images.max())
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # also refuses NaN
        if not np.isfinite(low + high):
            advice = "leave out NaN and infinite values"
        elif low >= -0.2 and high <= 1.2:
            advice = "write np.clip(images, 0, 1) if resizing made them overshoot"
        else:
            advice = "undo their normalisation" if low < 0 else "divide them by what is white, such as 255"
        raise ValueError(
            f"{what} are floats, which must lie in [0, 1]; they lie in [{low:.9g}, {high:.9g}]: {advice}."
        )
    if 0 < high <= 1.001 / 255:
        raise ValueError(
            f"{what} are floats, which must lie in [0, 1] and end here at {high:.9g}, a 255th: were they divided by "
            "255 twice? Multiply them by 255."
        )


def _notes(images: np.ndarray, where: str) -> Iterator[str]:
    if images.max() <= 1:
        yield f"No pixel of {where} is above 1 of 255, so its images are nearly black: should 1 be white?"
    if images.shape[-1] not in (1, 3):
        yield f"The images of {where} have {images.shape[-1]} channels, which are used as they are."


# Labels.


def _checked_labels(labels: np.ndarray, count: int, what: str) -> np.ndarray:
    """Returns labels as integers or text, one per example."""
    advice = ""
    if labels.ndim == 2 and labels.shape[1] == 1:
        advice = ": write labels[:, 0]"
    elif labels.ndim == 2:
        advice = ": write labels.argmax(axis=1) if they are one-hot"
    elif labels.dtype.kind in "bf":
        advice = ": write labels.astype(int) if they are the numbers of classes"
    if labels.shape != (count,) or labels.dtype.kind not in "iuUS":
        raise ValueError(
            f"{what} must be {count} integers or strings, one per image; got {labels.dtype} of shape "
            f"{labels.shape}{advice}."
        )
    if labels.dtype.kind == "S":
        return np.char.decode(labels, "utf-8", "backslashreplace")
    if labels.dtype.kind in "iu" and labels.min() < 0:
        raise ValueError(
            f"{what} must count from 0; the smallest is {labels.min()}, and {np.sum(labels < 0):,} are negative: leave "
            "out the examples without a label."
        )
    return labels


def _classes(
    given: Sequence[np.ndarray], names: np.ndarray | None, where: str
) -> tuple[list[np.ndarray], tuple[str, ...], list[str]]:
    """Numbers classes from 0; returns the labels, the class names, and a note if the labels changed."""
    found = [part.tolist() for part in map(np.unique, given)]
    values = sorted(
        {value for part in found for value in part}, key=lambda value: (isinstance(value, str), value)
    )
    if len({type(value) for value in values}) > 1:
        raise ValueError(f"labels and test_labels of {where} must both be integers or both text.")
    if len(values) < 2:
        raise ValueError(f"{where} needs at least two classes; all of its labels are {values[0]!r}.")
    notes = []
    if names is not None:
        class_names = _checked_names(names, where)
        order = list(class_names) if isinstance(values[0], str) else list(range(len(class_names)))
        if unnamed := sorted({*values} - {*order}):
            raise ValueError(
                f"{where} names {len(class_names)} classes but has label {unnamed[-1]}: names needs one name for "
                "each class, in the order of the labels."
            )
    else:
        order, class_names = values, tuple(map(str, values))
        if values != list(range(len(values))) and not isinstance(values[0], str):
            notes = [
                f"The labels of {where} are {first_ten(values)}: they are numbered 0 to {len(values) - 1}, and their "
                "own numbers are the names of the classes."
            ]
    number = {value: i for i, value in enumerate(order)}
    labels = []
    for part in given:
        unique, inverse = np.unique(part, return_inverse=True)
        labels.append(np.array([number[value] for value in unique.tolist()], np.int32)[inverse])
    return labels, class_names, notes


def _checked_names(names: np.ndarray, where: str) -> tuple[str, ...]:
    found = tuple(map(str, names.ravel()))
    if names.ndim != 1 or len(set(found)) < len(found):
        raise ValueError(
            f"names of {where} must be one list of different names; got {first_ten(found)} of shape {names.shape}."
        )
    return found
