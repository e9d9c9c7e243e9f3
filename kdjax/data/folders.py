"""Reads one folder of images per class, or such folders for each split; counts what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdjax.data import photos, tfds_cache
from kdjax.data.tfds_cache import first_ten

_TRAINING = ("train", "training")
# The first of these that is there is the official test split.
_TESTS = ("test", "testing", "val", "valid", "validation")


class _File(NamedTuple):
    path: Path
    example_id: str
    label: int
    official_split: int


def read(root: Path, *, image_size: tuple[int, int] | None, skip_broken: bool) -> tfds_cache.Arrays:
    """Reads a folder of class folders, in the order of splits, classes and paths; arguments as for `kdjax.data.load`.

    Raises:
      ValueError: if it holds fewer than two classes, a class has no images, images cannot be read, or sizes differ.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: give one that holds a folder of images for each class.")
    splits, names = _classes(root)
    files, others = [], _beside(root, splits, names)
    for split, flag in splits.items():
        for label, name in enumerate(names):
            found, rest = _walk(root / split / name)
            files += [_File(path, _example_id(root, path), label, flag) for path in found]
            others += rest
    _check_filled(root, splits, names, files, others)
    pixels, broken, decisions = _read_images(files, image_size)
    if broken and not skip_broken:
        raise ValueError(
            f"{len(broken):,} of the {len(files):,} image files in {root} cannot be read: {_reasons(broken)}. Replace "
            "or remove them, or leave them out with skip_broken=True (--skip_broken on the command line)."
        )
    files = [file for file in files if file.example_id not in broken]
    _check_filled(root, splits, names, files, others)
    return tfds_cache.Arrays(
        pixels,
        np.array([file.label for file in files], np.int32),
        np.array([file.example_id for file in files]),
        np.array([file.official_split for file in files], np.int8),
        tuple(map(_printable, names)),
        tuple(_notes(root, splits, files, others, broken, decisions)),
    )


def _notes(
    root: Path,
    splits: dict[str, int],
    files: Sequence[_File],
    others: Sequence[Path],
    broken: dict[str, str],
    decisions: Counter[str],
) -> Iterator[str]:
    """Sentences for the reader of a result: what was left out, and what was decided."""
    if broken:
        total = len(files) + len(broken)
        yield f"Image files of {root} left out as broken: {len(broken):,} of {total:,}, {_reasons(broken)}."
    if others:
        left = first_ten(_example_id(root, path) for path in sorted(others))
        yield f"Left out of {root}, since their names are not those of images: {len(others):,}, {left}."
    deepest = 2 if len(splits) > 1 else 1
    if nested := sum(file.example_id.count("/") > deepest for file in files):
        yield f"Images in folders inside the class folders of {root}, which belong to those classes: {nested:,}."
    for what, count in decisions.items():
        yield f"Images of {root} with {what}: {count:,}."
    for split, flag in splits.items():
        if flag == 0 and split.lower() in _TESTS:
            yield f"{root / split} is used as training data; the validation split is drawn from all training data."


def _example_id(root: Path, path: Path) -> str:
    return _printable(path.relative_to(root).as_posix())


def _printable(name: str) -> str:
    """A file name as valid UTF-8; on Linux a file name may be any bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _reasons(broken: dict[str, str]) -> str:
    return first_ten(f"{name} ({reason})" for name, reason in broken.items())


# Finding files.


def _classes(root: Path) -> tuple[dict[str, int], list[str]]:
    """The folder of each split with its official_split flag, and the class names that all of them have."""
    splits = _splits(root)
    classes = {split: _subfolders(root / split) for split in splits}
    first, names = next(iter(classes.items()))
    for split, found in classes.items():
        if found != names:
            only = [first_ten(sorted({*a} - {*b})) or "nothing" for a, b in ((names, found), (found, names))]
            raise ValueError(
                f"{root / first} and {root / split} hold folders of other classes: only the first has {only[0]}, only "
                f"the second {only[1]}; they must agree."
            )
    if len(names) < 2:
        inside = f"{names[0]}; if the classes lie in it, give {root / first / names[0]}" if names else "none"
        raise ValueError(f"{root / first} must hold at least two class folders; it holds {inside}.")
    return splits, names


def _splits(root: Path) -> dict[str, int]:
    spelled = {name.lower(): name for name in _subfolders(root)}
    training, tests = ([spelled[name] for name in names if name in spelled] for names in (_TRAINING, _TESTS))
    if len(training) == 1 and tests:
        return {training[0]: 0} | {name: int(name == tests[0]) for name in tests}
    for name in (*training, *tests):  # a class may have this name, but then it holds images
        has_images = any(_is_image(path.name) for path in (root / name).iterdir() if not path.is_dir())
        if len(_subfolders(root / name)) > 1 and not has_images:
            raise ValueError(
                f"{root / name} holds folders and looks like one split of several, but {root} has no pair of train and "
                f"test (or val) folders: add the other, or give {root / name} alone."
            )
    return {"": -1}


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in photos.suffixes()


def _beside(root: Path, splits: dict[str, int], names: list[str]) -> list[Path]:
    """Everything beside the folders of splits and classes."""
    taken = {root / split / name for split in splits for name in ("", *names)}
    folders = {root, *(root / split for split in splits)}
    return [path for folder in folders for path in folder.iterdir() if path not in taken]


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images under a folder at any depth, and all other files; follows links, to each folder once."""
    found, others = [], []
    seen = {folder.resolve(), *folder.resolve().parents}
    for here, below, files in os.walk(folder, followlinks=True, onerror=_refuse):
        entered = []
        for path in sorted(Path(here, name) for name in below):
            if path.name.startswith(".") or path.resolve() in seen:
                others.append(path)
            else:
                seen.add(path.resolve())
                entered.append(path.name)
        below[:] = entered
        for name in files:
            (found if _is_image(name) else others).append(Path(here, name))
    return sorted(found), others


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be read ({error.strerror}): change its permissions."
    ) from error


def _check_filled(
    root: Path, splits: dict[str, int], names: list[str], files: list[_File], others: list[Path]
) -> None:
    filled = {(file.official_split, file.label) for file in files}
    empty = [
        root / split / name
        for split, flag in splits.items()
        for label, name in enumerate(names)
        if (flag, label) not in filled
    ]
    if empty:
        there = [path.name for path in others if any(path.is_relative_to(folder) for folder in empty)]
        raise ValueError(
            f"a class folder holds no images: {first_ten(empty)}. Every class needs some that Pillow reads, "
            "such as .jpg, .png, .webp or .tif" + (f"; these are not: {first_ten(there)}." if there else ".")
        )


# Reading.


def _read_images(
    files: Sequence[_File], image_size: tuple[int, int] | None
) -> tuple[np.ndarray, dict[str, str], Counter[str]]:
    """Images of one size, grey if all are; file → reason of those that cannot be read; counts of decisions."""
    images, broken, decisions = [], {}, Counter()
    first = None
    for file in tfds_cache.progress(files, "Reading images"):
        try:
            image, decided = photos.read(file.path)
        except ValueError as error:
            broken[file.example_id] = str(error)
            continue
        decisions.update(decided)
        first = first or (file.path, image.size)
        if image_size is not None:
            image = photos.fit(image, image_size)
        elif image.size != first[1]:
            raise ValueError(
                f"images differ in size: {first[0]} is {first[1]}, {file.path} is {image.size} (width, height); pass "
                "image_size=(height, width) to resize and cut them to one (on the command line --image_size=32,32)."
            )
        images.append(image)
    grey = all(image.mode == "L" for image in images)
    if not images:
        return np.zeros((0, 0, 0, 1), np.uint8), broken, decisions
    stacked = np.stack([np.asarray(image if grey else image.convert("RGB")) for image in images])
    return stacked[..., None] if grey else stacked, broken, decisions
