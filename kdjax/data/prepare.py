"""Turns official raw files on disk into a prepared TFDS data set, without network and TensorFlow.

The builders, their checksums and the stored format are those of TFDS, so any other TFDS program can read the result.
Beside the records are written: the id of every example in stored order (TFDS shuffles by a hash of the builder's key,
and does not store the key), and digests of the raw files and of the records.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.data import tfds_cache

_CIFAR10_FILES = {f"data_batch_{k}.bin": 30_730_000 for k in range(1, 6)} | {"test_batch.bin": 30_730_000}
_CIFAR100_FILES = {"train.bin": 153_700_000, "test.bin": 30_740_000}
_CIFAR100_LABELS = {"coarse_label_names.txt": 20, "fine_label_names.txt": 100}
_CELL_FOLDERS = ("Parasitized", "Uninfected")


class Prepared(NamedTuple):
    """What :func:`prepare` left on disk."""

    path: Path  # the TFDS version directory
    kind: str  # "archives" (SHA-256 checked), "extracted" (layout checked), or "unknown" (not made here)
    examples: dict[str, int]  # per split
    fresh: bool  # False when a finished data set was already there


class _Raw(NamedTuple):
    kind: str
    folder: Path  # holds the archives, or the extracted folder
    files: dict[str, dict[str, Any]]  # what was checked: sizes and digests

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(entry["bytes"] for entry in self.files.values())


class _Extracted(NamedTuple):
    """An archive unpacked by hand: its folder and what can be checked without the archive's checksum."""

    folder: str
    files: dict[str, int]  # exact size in bytes
    labels: dict[str, int]  # file of class names → classes; one leading byte per record each, in this order


EXTRACTED = {
    "cifar10": _Extracted("cifar-10-batches-bin", _CIFAR10_FILES, {"batches.meta.txt": 10}),
    "cifar100": _Extracted("cifar-100-binary", _CIFAR100_FILES, _CIFAR100_LABELS),
    "malaria": _Extracted("cell_images", {}, {}),
}


def prepare(name: str, *, raw_dir: str | os.PathLike[str], data_dir: str | os.PathLike[str]) -> Prepared:
    """Prepares a TFDS data set from official raw files on disk.

    Everything is written into a hidden directory, read back, checked, and then renamed into place: a killed process
    leaves nothing that could be read later, and a second call starts again. A finished set is not touched.

    Args:
      name: one of :data:`kdjax.data.tfds_cache.OFFICIAL`.
      raw_dir: holds the official archives, or a folder of the data set's name with them, or for CIFAR and
        malaria the extracted official folder. Archives are preferred, because TFDS knows their SHA-256.
      data_dir: root of the prepared TFDS data sets; created if missing.

    Returns:
      Where the data set is, which kind of raw files it came from, and its size.

    Raises:
      ValueError: if the name is unknown, raw files are missing, damaged or not the official ones, the disk has too
        little space, or another process prepares the same set.
      OSError: if the disk is not writable, or fills up.
    """
    if name not in tfds_cache.OFFICIAL:
        raise ValueError(
            f"no recipe to prepare {name!r} from raw files; known: {', '.join(tfds_cache.OFFICIAL)}."
            f"{tfds_cache.did_you_mean(name, tfds_cache.OFFICIAL)}"
        )
    data_dir = Path(data_dir)
    finished = tfds_cache.find_finished(name, data_dir)
    if finished is not None:
        return _describe(finished, fresh=False)
    import tensorflow_datasets as tfds

    builder_class: Any = tfds.builder_cls(name)
    raw = _find_raw(name, Path(raw_dir), builder_class.url_infos)
    data_dir.mkdir(parents=True, exist_ok=True)
    # Unpacked, stored as PNG records, and decoded: each about as large as the raw files; MNIST, to 140 MB.
    tfds_cache.check_room(data_dir, 3 * raw.size + 150_000_000, f"preparing {name}")
    final = data_dir / name / str(builder_class.VERSION)
    staging = tfds_cache.staging_of(name, data_dir)
    with tfds_cache.lock(data_dir / f".{name}.lock", wait=False, task=f"preparing {name} in {data_dir}"):
        if final.exists():
            raise ValueError(f"{final} exists, but holds no finished data set: delete it and start again.")
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        try:
            made = _build(builder_class, raw, staging)
            tfds_cache.read(made, name)  # checks the records against their digests, and caches the images
            final.parent.mkdir(parents=True, exist_ok=True)
            os.rename(made, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return _describe(final, fresh=True)


def _describe(path: Path, *, fresh: bool) -> Prepared:
    preparation = tfds_cache.read_preparation(path)
    if preparation is None:
        return Prepared(path, "unknown", {}, fresh)
    examples = {split: entry["examples"] for split, entry in preparation["splits"].items()}
    return Prepared(path, preparation["kind"], examples, fresh)


# Raw files are found and checked first, so that TFDS never downloads.


def _find_raw(name: str, raw_dir: Path, url_infos: dict[str, Any]) -> _Raw:
    needs = _needs(name, url_infos)
    if not raw_dir.is_dir():
        raise ValueError(f"raw_dir {raw_dir} is not a directory: name the one that holds {needs}.")
    wanted = [info.filename for info in url_infos.values()]
    present = {folder: [f for f in wanted if (folder / f).is_file()] for folder in (raw_dir, raw_dir / name)}
    for folder, found in present.items():
        if len(found) == len(wanted):
            return _check_archives(name, folder, url_infos)
    if name in EXTRACTED:
        unpacked = EXTRACTED[name].folder
        for folder in (raw_dir / unpacked, raw_dir / name / unpacked, raw_dir):
            if folder.name == unpacked and folder.is_dir():
                files = _check_cells(folder) if name == "malaria" else _check_batches(name, folder)
                return _Raw("extracted", folder.parent, files)
    folder, found = max(present.items(), key=lambda item: len(item[1]))
    missing = f"; only {', '.join(found)} found in {folder}" if found else ""
    raise ValueError(f"raw files of {name} are missing: put {needs} into {raw_dir}{missing}.")


def _needs(name: str, url_infos: dict[str, Any]) -> str:
    archives = ", ".join(f"{info.filename} ({int(info.size):,} bytes)" for info in url_infos.values())
    if name not in EXTRACTED:
        return archives
    layout = EXTRACTED[name]
    inside = [*layout.files, *layout.labels] or [f"{folder}/*.png" for folder in _CELL_FOLDERS]
    return f"{archives}, or the extracted folder {layout.folder}/ with {', '.join(inside)},"


def _check_archives(name: str, folder: Path, url_infos: dict[str, Any]) -> _Raw:
    files = {}
    for url, info in url_infos.items():
        path = folder / info.filename
        size = path.stat().st_size
        sha256 = tfds_cache.file_sha256(path)
        if (size, sha256) != (int(info.size), info.checksum):
            raise ValueError(
                f"{path} is not the official file of {name}: expected {int(info.size):,} bytes with SHA-256 "
                f"{info.checksum}, found {size:,} bytes with {sha256}; fetch it again from {url}."
            )
        files[info.filename] = {"bytes": size, "sha256": sha256}
    return _Raw("archives", folder, files)


def _check_batches(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    layout = EXTRACTED[name]
    paths = {file: folder / file for file in (*layout.files, *layout.labels)}
    if missing := [file for file, path in paths.items() if not path.is_file()]:
        raise ValueError(f"{folder} is not all of the archive of {name}: {', '.join(missing)} missing.")
    for file, classes in layout.labels.items():
        found = sum(bool(line) for line in paths[file].read_text().splitlines())
        if found != classes:
            raise ValueError(f"{paths[file]} must hold {classes} class names, one a line; it holds {found}.")
    for file, size in layout.files.items():
        path, found = paths[file], paths[file].stat().st_size
        if found != size:
            raise ValueError(f"{path} must have exactly {size:,} bytes, found {found:,}: copy it again.")
        records = np.memmap(path, np.uint8, "r").reshape(-1, len(layout.labels) + 3072)
        for column, classes in enumerate(layout.labels.values()):
            if (largest := int(records[:, column].max())) >= classes:
                raise ValueError(f"{path} has label {largest}, {name} has {classes} classes.")
    return {
        file: {"bytes": path.stat().st_size, "sha256": tfds_cache.file_sha256(path)}
        for file, path in paths.items()
    }


def _check_cells(folder: Path) -> dict[str, dict[str, Any]]:
    """Opens every PNG, whose chunks have checksums; one digest per class folder, over names and contents."""
    from PIL import Image

    files = {}
    for part in _CELL_FOLDERS:
        paths = sorted((folder / part).glob("*.png"))
        if not paths:
            raise ValueError(f"{folder / part} must hold the PNG images of that class; there are none.")
        digest, size = hashlib.sha256(), 0
        for path in tfds_cache.progress(paths, f"Checking {part}"):
            content = path.read_bytes()
            try:
                with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                    mode = image.mode
                    image.verify()
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
                raise ValueError(f"{path} is not a readable PNG ({error}): copy it again.") from error
            if mode != "RGB":
                raise ValueError(f"{path} must be an RGB image; its mode is {mode}.")
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
            size += len(content)
        files[f"{part}/*.png"] = {"count": len(paths), "bytes": size, "sha256": digest.hexdigest()}
    return files


# TFDS's own builders, run on what was found.


def _build(builder_class: Any, raw: _Raw, staging: Path) -> Path:
    """Runs the builder into ``staging`` and returns the version directory it made there."""
    import tensorflow_datasets as tfds

    builder = builder_class(data_dir=os.fspath(staging))
    if raw.kind == "extracted":  # each of these builders has exactly one archive
        unpacked = {"download_and_extract": lambda url: os.fspath(raw.folder), "downloaded_size": raw.size}
        builder._make_download_manager = lambda **_: types.SimpleNamespace(**unpacked)
    builder._log_download_bytes = builder._log_download_done = lambda: None  # they name the hidden directory
    records = _note_records(builder)
    config = tfds.download.DownloadConfig(
        manual_dir=os.fspath(raw.folder),
        extract_dir=os.fspath(staging / "extracted"),
        try_download_gcs=False,
        force_checksums_validation=True,
    )
    with _without_tensorflow(), _disk_errors(staging):
        builder.download_and_prepare(
            download_dir=os.fspath(staging / "downloads"), download_config=config, file_format="array_record"
        )
    made = Path(builder.data_dir)
    _write_preparation(made, builder, raw, records)
    return made


@contextlib.contextmanager
def _disk_errors(staging: Path) -> Iterator[None]:
    """Raises an OSError for a full disk, which TFDS's extractor and ArrayRecord's writer report otherwise."""
    from tensorflow_datasets.core.download import extractor

    try:
        yield
    except (extractor.ExtractError, RuntimeError) as error:
        cause = error.__cause__
        full = "No space left" in str(error) or (isinstance(cause, OSError) and cause.errno == errno.ENOSPC)
        if not full:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(staging.parent)) from error


class _Noted(NamedTuple):
    example_ids: list[str]
    digest: Any


def _note_records(builder: Any) -> dict[str, _Noted]:
    """Makes the builder record, per split and in stored order, each example's id and a digest of its record.

    The writer is TFDS's documented hook and gets the records in the order in which they will be read. It knows only the
    hash of a builder's key, so keys are recorded as they are generated.
    """
    from tensorflow_datasets.core import hashing

    generate, make_writer = builder._split_generators, builder._example_writer
    names: dict[int, tuple[str, str]] = {}
    noted: dict[str, _Noted] = {}

    def note_keys(split: str, examples: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        hasher = hashing.Hasher(split)
        for key, example in examples:
            names[hasher.hash_key(key)] = (split, _example_id(builder.name, split, key))
            yield key, example

    def split_generators(dl_manager: Any) -> dict[str, Iterator[tuple[Any, Any]]]:
        splits = generate(dl_manager)
        if isinstance(splits, list):
            splits = {split.name: builder._generate_examples(**split.gen_kwargs) for split in splits}
        return {str(split): note_keys(str(split), examples) for split, examples in splits.items()}

    def note_records(examples: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for hashed, record in examples:
            split, example_id = names[hashed]
            entry = noted.setdefault(split, _Noted([], hashlib.sha256()))
            entry.example_ids.append(example_id)
            tfds_cache.update_digest(entry.digest, record)
            yield hashed, record

    def example_writer() -> Any:
        writer = make_writer()
        write: Callable[..., Any] = writer.write
        writer.write = lambda path, examples: write(path, note_records(iter(examples)))
        return writer

    builder._split_generators, builder._example_writer = split_generators, example_writer
    return noted


def _example_id(name: str, split: str, key: Any) -> str:
    if name == "malaria":  # "Parasitized_C100P61….png": the folder and the official file name
        return str(key).replace("_", "/", 1)
    return f"{split}/{int(key):06d}"


def _write_preparation(made: Path, builder: Any, raw: _Raw, noted: dict[str, _Noted]) -> None:
    from importlib.metadata import version

    example_ids = {split: entry.example_ids for split, entry in noted.items()}
    (made / tfds_cache.KEYS_FILE).write_text(json.dumps(example_ids, indent=0) + "\n")
    splits = {
        split: {"examples": len(entry.example_ids), "records_sha256": entry.digest.hexdigest()}
        for split, entry in noted.items()
    }
    small = sorted(path for path in made.iterdir() if path.suffix in (".json", ".txt"))
    preparation = {
        "schema": 1,
        "name": builder.name,
        "kind": raw.kind,
        "raw": raw.files,
        "splits": splits,
        "files": {path.name: tfds_cache.file_sha256(path) for path in small},
        "tensorflow_datasets": version("tensorflow-datasets"),
    }
    tfds_cache.write_checked(made / tfds_cache.PREPARATION_FILE, preparation)


# The few names of TensorFlow that these builders use.


def _encode_png(image: np.ndarray) -> types.SimpleNamespace:
    from PIL import Image

    buffer, pixels = io.BytesIO(), image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image)
    Image.fromarray(pixels).save(buffer, "PNG")
    return types.SimpleNamespace(numpy=buffer.getvalue)


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Gives TFDS the file functions and the PNG encoder that its five builders take from TensorFlow.

    Used even where TensorFlow is installed: it saves an import of 16 s, and the stored bytes do not depend on what is
    installed. TFDS holds TensorFlow as one lazily imported module; only that reference is replaced, process-wide, and
    restored afterwards.
    """
    from tensorflow_datasets.core.utils import lazy_imports_utils

    space = types.SimpleNamespace
    gfile = space(GFile=open, exists=os.path.exists, listdir=os.listdir, remove=os.remove)
    standin = space(
        io=space(gfile=gfile),
        compat=space(as_text=lambda text: text.decode() if isinstance(text, bytes) else text),
        errors=space(ResourceExhaustedError=type("ResourceExhaustedError", (Exception,), {})),
        image=space(encode_png=_encode_png),
        executing_eagerly=lambda: True,
        Tensor=type("Tensor", (), {}),
        RaggedTensor=type("RaggedTensor", (), {}),
    )
    holder: dict[str, Any] = lazy_imports_utils.tensorflow.__dict__
    before = holder.get("_module")
    holder["_module"] = standin
    try:
        yield
    finally:
        if before is None:
            del holder["_module"]
        else:
            holder["_module"] = before
