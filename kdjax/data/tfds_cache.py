"""Prepared TFDS data sets on disk: found, decoded once into checked ``.npy`` files, and read back fast.

Needs TFDS only to decode; the second read of a data set needs NumPy alone.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax import files
from kdjax.data import photos

OFFICIAL = ("mnist", "fashion_mnist", "cifar10", "cifar100", "malaria")
"""Data sets that :func:`kdjax.data.prepare` makes from official raw files."""

DEFAULT_SIZES = {"malaria": (32, 32)}
"""Default image sizes of data sets whose stored images differ in size.

Images of these sets are stretched to the size, as in their published results; images of other sets are cropped to it.
"""

PREPARATION_FILE = "kdjax_preparation.json"
KEYS_FILE = "kdjax_keys.json"
_CACHE = "kdjax_decoded"
_MANIFEST = "manifest.json"
_ARRAYS = ("images", "labels", "example_ids", "official_split")
_CHUNK = 512
_PREPARE_AGAIN = "delete {} and prepare the data set again."
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels


class Arrays(NamedTuple):
    """A decoded data set; the fields of :class:`kdjax.data.Dataset` after its name."""

    images: np.ndarray
    labels: np.ndarray
    example_ids: np.ndarray
    official_split: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


# Finding.


def first_ten(names: Iterable[object]) -> str:
    """Returns "a, b, c": ten at most, and how many more there are."""
    every = [str(name) for name in names]
    return ", ".join(every[:10]) + (f" and {len(every) - 10:,} more" if len(every) > 10 else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest known name, or nothing."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def staging_of(name: str, data_dir: Path) -> Path:
    """Returns the hidden directory in which a data set grows until it is finished."""
    return data_dir / f".{name}.incomplete"


def find_finished(name: str, data_dir: Path) -> Path | None:
    """Returns the newest finished version directory of ``"set"``, ``"set/config"`` or ``"set:version"``, or None.

    Raises:
      ValueError: there are several configurations and the name gives none.
    """
    base, _, version = name.partition(":")
    infos = [file for depth in ("*", "*/*") for file in (data_dir / base).glob(f"{depth}/dataset_info.json")]
    found = [info.parent for info in infos]
    paths = [path for path in found if _version(path.name) and version in ("", path.name)]
    configs = sorted({path.parent.name for path in paths})
    if len(configs) > 1:
        raise ValueError(f"{name} in {data_dir} has several configurations: write {base}/ one of {configs}.")
    return max(paths, key=lambda path: _version(path.name), default=None)


def _version(name: str) -> tuple[int, ...]:
    parts = name.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def find(name: str, data_dir: Path) -> Path:
    """Returns the directory of a prepared data set; the error says what is wrong and which command mends it.

    Raises:
      ValueError: ``name`` is unknown, or the data set is missing or half-written.
    """
    path = find_finished(name, data_dir) if re.fullmatch(r"\w+(/[\w.+-]+)?(:[\d.]+)?", name) else None
    if path is not None:
        return path
    unversioned = name.partition(":")[0]
    base = unversioned.partition("/")[0]
    if base and ":" in name and (other := find_finished(unversioned, data_dir)) is not None:
        raise ValueError(f"{data_dir} holds version {other.name} of {base}, not {name}: ask for that one.")
    if base not in OFFICIAL:
        _check_known(name, base)
    command = (
        f"kdjax.data.prepare({base!r}, raw_dir=RAW, data_dir={str(data_dir)!r})` in Python, or in a clone of the "
        f"repository `python -m experiments.prepare_data --dataset={base} --raw_dir=RAW --data_dir={data_dir}"
        if base in OFFICIAL
        else f"tfds build {name} --data_dir={data_dir} --file_format=array_record"
    )
    if not data_dir.is_dir():
        raise ValueError(f"data_dir {data_dir} does not exist; to prepare {name} there run `{command}`.")
    if staging_of(base, data_dir).exists() or (data_dir / base).exists():
        raise ValueError(f"{name} in {data_dir} is half-written; prepare it again: `{command}`.")
    raise ValueError(f"data_dir {data_dir} holds no prepared {name}; run `{command}`.")


def _check_known(name: str, base: str) -> None:
    known = {"digits", *OFFICIAL}
    with contextlib.suppress(ImportError):
        import tensorflow_datasets as tfds

        known.update(tfds.list_builders(with_community_datasets=False))
    if base not in known:
        raise ValueError(
            f"unknown data set {name!r}; known are digits, {', '.join(OFFICIAL)}, any image-classification "
            f"set of TFDS, a path ending in .npz, and folder:PATH.{did_you_mean(base, known)}"
        )


# Digests and locks.


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def update_digest(digest: Any, record: bytes) -> None:
    """Adds one record, with its length so that no two sequences share a digest."""
    digest.update(len(record).to_bytes(8, "little"))
    digest.update(record)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool, task: str) -> Iterator[None]:
    """Holds a lock on a file, which is left there; the system releases it however the process ends.

    Raises:
      ValueError: if another process holds the lock and ``wait`` is false.
    """
    with path.open("a") as file:
        if not files.lock_file(file, wait=wait):
            raise ValueError(f"another process is {task}: wait for it, or stop it.")
        yield


def check_room(folder: Path, needed: int, task: str) -> None:
    """Raises a ValueError if fewer than ``needed`` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"not enough room in {folder}: {task} needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB "
            "are free; free some or use another data_dir."
        )


def write_checked(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON that carries its own digest."""
    file.write_text(json.dumps({**content, "sha256": files.digest_json(content)}, indent=2) + "\n")


def _read_checked(file: Path, advice: str) -> dict[str, Any] | None:
    """Reads what :func:`write_checked` wrote, None if there is no file; a ValueError if it is damaged."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        intact = content.pop("sha256") == files.digest_json(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{file} is damaged: it is not JSON with the digest of its content; {advice}")
    return content


def progress(items: Any, description: str) -> Any:
    """Wraps an iterable in a progress bar, shown on a terminal only."""
    from tqdm import tqdm

    return tqdm(items, desc=description, disable=None, leave=False, mininterval=0.5)


# Reading.


def read_preparation(path: Path) -> dict[str, Any] | None:
    """Returns what :func:`kdjax.data.prepare` wrote beside the records, or None if TFDS alone made them."""
    advice = _PREPARE_AGAIN.format(path)
    preparation = _read_checked(path / PREPARATION_FILE, advice)
    if preparation is None and (path / KEYS_FILE).exists():
        raise ValueError(f"{path / PREPARATION_FILE} is missing; {advice}")
    return preparation


def read(path: Path, name: str, image_size: tuple[int, int] | None = None) -> Arrays:
    """Returns a prepared TFDS data set as arrays, decoded on the first call and cached beside its records.

    Args:
      path: its directory, from :func:`find`.
      name: a TFDS name.
      image_size: height and width to resize and cut to; by default the stored size, or that in :data:`DEFAULT_SIZES`.

    Raises:
      ValueError: the data set is damaged, or no image classification.
    """
    base = name.partition(":")[0]
    size = image_size or DEFAULT_SIZES.get(base)
    resize, fitted = (photos.stretch, "") if base in DEFAULT_SIZES else (photos.fit, "-cut")
    cache = path / _CACHE / ("native" if size is None else f"{size[0]}x{size[1]}{fitted}")
    arrays = _read_cache(cache, path)
    if arrays is not None:
        return arrays
    try:
        cache.parent.mkdir(exist_ok=True)
        with lock(cache.with_suffix(".lock"), wait=True, task=f"decoding {name}"):
            arrays = _read_cache(cache, path)  # perhaps another process has just finished it
            if arrays is None:
                arrays = _decode(path, size, resize, cache.parent)
                _write_cache(cache, path, arrays)
        return arrays
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        warnings.warn(f"{path} cannot be written, so {name} is decoded on every load.", stacklevel=2)
        return _decode(path, size, resize, None)


def _read_cache(cache: Path, path: Path) -> Arrays | None:
    advice = f"delete {cache} and load again; it is then decoded from the records."
    manifest = _read_checked(cache / _MANIFEST, advice)
    if manifest is None or manifest["dataset_info"] != file_sha256(path / "dataset_info.json"):
        return None  # never decoded, or decoded from records that have since been replaced
    if set(manifest["files"]) != set(_ARRAYS):
        return None  # written by another version of kdjax
    arrays = {}
    for array in _ARRAYS:
        file = cache / f"{array}.npy"
        if not file.exists() or file_sha256(file) != manifest["files"][array]:
            raise ValueError(f"{file} is damaged: it has not the SHA-256 that it was written with; {advice}")
        arrays[array] = np.load(file, allow_pickle=False)
    return Arrays(**arrays, class_names=tuple(manifest["class_names"]))


def _write_cache(cache: Path, path: Path, arrays: Arrays) -> None:
    """Writes the arrays, then the manifest, then renames the directory: a cache is whole or absent."""
    growing = cache.with_suffix(".incomplete")
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir()
    try:
        for array in _ARRAYS:
            np.save(growing / f"{array}.npy", getattr(arrays, array), allow_pickle=False)
        manifest = {
            "schema": 1,
            "class_names": list(arrays.class_names),
            "dataset_info": file_sha256(path / "dataset_info.json"),
            "files": {array: file_sha256(growing / f"{array}.npy") for array in _ARRAYS},
        }
        write_checked(growing / _MANIFEST, manifest)
        shutil.rmtree(cache, ignore_errors=True)
        os.rename(growing, cache)
    except OSError as error:
        code = error.errno or errno.ENOSPC  # NumPy says only that fewer bytes than asked for were written
        raise OSError(code, "could not write the decoded images", os.fspath(cache)) from error
    finally:
        shutil.rmtree(growing, ignore_errors=True)


# Decoding.


def _decode(path: Path, size: tuple[int, int] | None, resize: Callable, cache: Path | None) -> Arrays:
    import tensorflow_datasets as tfds

    preparation = read_preparation(path) or {"files": {}}
    for file, sha256 in preparation["files"].items():
        if not (path / file).is_file() or file_sha256(path / file) != sha256:
            raise ValueError(f"{path / file} is missing or damaged; {_PREPARE_AGAIN.format(path)}")
    builder: Any = tfds.builder_from_directory(os.fspath(path))
    image_key, label_key = _supervised(builder.info)
    shape = builder.info.features[image_key].shape
    height, width = size or shape[:2]
    if height is None or width is None:
        raise ValueError(
            f"images of {builder.info.name} differ in size: pass image_size=(height, width) to resize and cut them to "
            "one (on the command line --image_size=32,32)."
        )
    splits = _official_splits(builder.info)
    total = sum(builder.info.splits[split].num_examples for split in splits)
    images = np.empty((total, height, width, shape[2]), np.uint8)
    if cache is not None:
        check_room(cache, images.nbytes, f"keeping {builder.info.name} decoded")
    labels = np.empty(total, np.int32)
    ids, official_split, start = [], np.empty(total, np.int8), 0
    names = json.loads((path / KEYS_FILE).read_text()) if KEYS_FILE in preparation["files"] else {}
    for split, flag in splits.items():
        stop = start + builder.info.splits[split].num_examples
        official_split[start:stop] = flag
        ids += names[split] if names else [f"{split}/{i:06d}" for i in range(stop - start)]
        for row, example in enumerate(_examples(builder, split, path), start):
            encoded = example.features.feature[image_key].bytes_list.value[0]
            images[row] = _pixels(encoded, (height, width), shape[2], resize)
            labels[row] = example.features.feature[label_key].int64_list.value[0]
        start = stop
    if labels.min() < 0:
        raise ValueError(f"{builder.info.name} has examples without a label (-1), so it cannot be used.")
    class_names = tuple(builder.info.features[label_key].names)
    return Arrays(images, labels, np.array(ids), official_split, class_names)


def _supervised(info: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    features = dict(info.features.items())
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    keys = info.supervised_keys or (images + labels if len(images) == len(labels) == 1 else ())
    plain = [k for k in images if features[k].np_dtype == np.uint8 and features[k].shape[-1] in _MODES]
    if len(keys) != 2 or keys[0] not in plain or keys[1] not in labels:
        found = ", ".join(f"{key}: {type(feature).__name__}" for key, feature in features.items())
        raise ValueError(
            f"{info.name} is not an image classification data set, which has one uint8 Image and one ClassLabel: "
            f"it has {found}."
        )
    return keys[0], keys[1]


def _official_splits(info: Any) -> dict[str, int]:
    """Maps the splits to use to 0 (training), 1 (official test) or -1 (there is no official test split)."""
    present = [split for split in ("train", "test", "validation") if split in info.splits]
    if "train" not in present:
        raise ValueError(f"{info.name} has no split 'train'; it has {', '.join(info.splits)}.")
    if present == ["train"]:
        return {"train": -1}
    tests = "test" if "test" in present else "validation"
    return {split: int(split == tests) for split in present}


def _examples(builder: Any, split: str, path: Path) -> Iterator[Any]:
    """Yields a split's stored examples as protocol messages, checked against the digest noted at preparation.

    TFDS's own decoding of whole examples takes several times as long as the PNG inside them.
    """
    from tensorflow_datasets.core import decode
    from tensorflow_datasets.proto import tf_example_pb2

    parse: Any = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
    advice = _PREPARE_AGAIN.format(path)
    digest = hashlib.sha256()
    try:
        source = builder.as_data_source(split, deserialize_method=decode.DeserializeMethod.RAW_BYTES)
        for start in progress(range(0, len(source), _CHUNK), f"Decoding {builder.info.name} {split}"):
            for record in source.__getitems__(range(start, min(start + _CHUNK, len(source)))):
                update_digest(digest, record)
                yield parse(record)
    except NotImplementedError as error:
        raise ValueError(
            f"{path} is stored as {builder.info.file_format}, which cannot be read by index: prepare it with "
            "file_format='array_record' in another data_dir."
        ) from error
    except RuntimeError as error:  # ArrayRecord's checksums, and shards that are gone
        raise ValueError(
            f"the records of {split} in {path} are missing or damaged ({error}); {advice}"
        ) from error
    preparation = read_preparation(path)
    if preparation is not None and preparation["splits"][split]["records_sha256"] != digest.hexdigest():
        raise ValueError(f"the records of {split} in {path} are not those that were prepared; {advice}")


def _pixels(encoded: bytes, size: tuple[int, int], channels: int, resize: Callable[..., Any]) -> np.ndarray:
    from PIL import Image, ImageOps

    mode = _MODES[channels]
    with Image.open(io.BytesIO(encoded)) as image:
        # A data set with an alpha channel keeps it; images of others are read as a viewer shows them.
        upright = ImageOps.exif_transpose(image) if mode == "RGBA" else photos.as_shown(image)
        return np.asarray(resize(upright.convert(mode), size)).reshape(*size, channels)
