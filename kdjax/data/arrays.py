"""Images and labels from an ``.npz`` file, checked for mistakes that would train on the wrong thing."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kdjax.data import tfds_cache
from kdjax.data.tfds_cache import first_ten

_NAMES = {"images", "labels", "test_images", "test_labels", "names"}
_TOLERANCE = 0.49 / 255  # below half a level of uint8: values so little outside [0, 1] round into it


def read(path: Path) -> tfds_cache.Arrays:
    """Reads an ``.npz``, training examples first; :func:`kdjax.data.load` says what it may hold.

    Raises:
      ValueError: if the file is missing or damaged, or its arrays are not images and labels.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give an .npz with the arrays images and labels.")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if damaged := file.zip.testzip():  # NumPy checks only the bytes that an array's header announces
                raise zipfile.BadZipFile(f"bad CRC-32 of {damaged}")
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # a flipped bit raises nearly anything, zlib.error for one
        raise ValueError(
            f"{path} is no readable .npz of plain arrays ({error}): write it again with numpy.savez."
        ) from error
    return checked(arrays, str(path))


def checked(arrays: Mapping[str, np.ndarray], where: str) -> tfds_cache.Arrays:
    """Checks the arrays of an ``.npz``, or the same in memory; ``where`` names them in errors and notes."""
    paired = ("test_images" in arrays) == ("test_labels" in arrays)
    if not (paired and {"images", "labels"} <= arrays.keys() <= _NAMES):
        raise ValueError(
            f"{where} must hold images and labels, and may hold test_images with test_labels, and names; "
            f"it holds {', '.join(sorted(arrays)) or 'nothing'}."
        )
    splits = {"train": "", "test": "test_"} if "test_images" in arrays else {"train": ""}
    images, given = [], []
    for start in splits.values():
        images.append(_as_uint8(arrays[f"{start}images"], f"{start}images of {where}"))
        given.append(_checked_labels(arrays[f"{start}labels"], len(images[-1]), f"{start}labels of {where}"))
    if len({part.shape[1:] for part in images}) > 1:
        shapes = f"{images[0].shape}, {images[1].shape}"
        raise ValueError(f"images and test_images of {where} differ in shape: {shapes}.")
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


# Images.


def _as_uint8(images: np.ndarray, what: str) -> np.ndarray:
    if images.ndim not in (3, 4) or not images.size:
        raise ValueError(f"{what} must be shaped [n, height, width(, channels)]; got {images.shape}.")
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
        }.get(images.dtype.kind, "")
        raise ValueError(f"{what} must be uint8, or floats in [0, 1]; got {images.dtype}{advice}.")
    return images


def _check_channels_last(shape: tuple[int, ...], what: str) -> None:
    """Refuses channels first, and ambiguous shapes; many channels are accepted below the height and the width."""
    _, height, width, channels = shape
    usual = channels in (1, 3) or (channels in (2, 4) and height not in (1, 3))
    if not (usual or 4 < channels < min(height, width)):
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
        raise ValueError(f"{what} must be floats in [0, 1]; they lie in [{low:.9g}, {high:.9g}]: {advice}.")
    if 0 < high <= 1.001 / 255:
        raise ValueError(
            f"{what} must be floats in [0, 1]; the largest is {high:.9g}, a 255th. Were they divided by 255 twice? "
            "Multiply them by 255."
        )


def _notes(images: np.ndarray, where: str) -> Iterator[str]:
    if images.max() <= 1:
        yield f"No pixel of {where} is above 1 of 255, so its images are nearly black: should 1 be white?"
    if images.shape[-1] not in (1, 3):
        yield f"The images of {where} have {images.shape[-1]} channels, which are used as they are."


# Labels.


def _checked_labels(labels: np.ndarray, count: int, what: str) -> np.ndarray:
    """Returns labels as integers or text, one per example."""
    if labels.ndim == 2:
        one_hot = ": write labels.argmax(axis=1) if they are one-hot"
        advice = ": write labels[:, 0]" if labels.shape[1] == 1 else one_hot
    else:
        numbers = ": write labels.astype(int) if they are the numbers of classes"
        advice = numbers if labels.dtype.kind in "bf" else ""
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
    found = {value for part in given for value in np.unique(part).tolist()}
    if len(set(map(type, found))) > 1:
        raise ValueError(f"labels and test_labels of {where} must both be integers or both text.")
    values = sorted(found)
    if len(values) < 2:
        raise ValueError(f"{where} needs at least two classes; all of its labels are {values[0]!r}.")
    notes = []
    if names is not None:
        class_names = tuple(map(str, names.ravel()))
        if names.ndim != 1 or len(set(class_names)) < len(class_names):
            got = f"{first_ten(class_names)} of shape {names.shape}"
            raise ValueError(f"names of {where} must be one list of different names; got {got}.")
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
    labels = [np.array([number[value] for value in part.tolist()], np.int32) for part in given]
    return labels, class_names, notes
