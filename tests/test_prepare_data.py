"""Preparing TFDS data sets from official raw files: tiny ones of the same layouts, with the checksums made to match."""

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

prepare_module = import_module("kdjax.data.prepare")
tfds_cache = import_module("kdjax.data.tfds_cache")
datasets = import_module("kdjax.data.datasets")
prepare = prepare_module.prepare


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("tried the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# Raw files of the official layouts, a few examples each.


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.tobytes())


def write_mnist(folder, seed=0, train=30, test=12):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    written = {}
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
        written |= {f"{split}/{i:06d}": (images[i, ..., None], labels[i]) for i in range(count)}
    return written


def write_cifar(root, name, count=5):
    layout = prepare_module.EXTRACTED[name]
    rng = np.random.default_rng(1)
    folder = root / layout.folder
    folder.mkdir(parents=True)
    for file, classes in layout.labels.items():
        (folder / file).write_text("".join(f"class{i}\n" for i in range(classes)) + "\n")
    written, seen = {}, {"train": 0, "test": 0}
    for file in layout.files:
        split = "test" if file.startswith("test") else "train"
        labels = [rng.integers(0, classes, count) for classes in layout.labels.values()]
        labels = np.stack(labels, 1).astype(np.uint8)
        images = rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
        (folder / file).write_bytes(np.concatenate([labels, images.reshape(count, -1)], 1).tobytes())
        for image, label in zip(images.transpose(0, 2, 3, 1), labels[:, -1], strict=True):
            written[f"{split}/{seen[split]:06d}"] = (image, label)
            seen[split] += 1
    return written


def write_cells(root, count=8, size=(32, 32)):
    rng = np.random.default_rng(2)
    written = {}
    for label, part in enumerate(("Parasitized", "Uninfected")):
        folder = root / "cell_images" / part
        folder.mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 256, (*size, 3), np.uint8)
            name = f"C{100 + i}P{i}ThinF_IMG_1_cell_{i}.png"
            Image.fromarray(image).save(folder / name)
            written[f"{part}/{name}"] = (image, label)
        (folder / "Thumbs.db").write_bytes(b"as in the official archive")
    return written


def pack(root, name):
    """Packs an extracted folder as its official archive, and takes the folder away."""
    folder = root / prepare_module.EXTRACTED[name].folder
    if name == "malaria":
        with zipfile.ZipFile(root / "cell_images.zip", "w") as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(root))
    else:
        with tarfile.open(root / f"cifar-{name[5:]}-binary.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
    shutil.rmtree(folder)


def accept(monkeypatch, name, folder):
    """Makes TFDS take the archives in ``folder`` for the official ones."""
    builder = tfds.builder_cls(name)
    infos = {}
    for url, info in builder.url_infos.items():
        content = (folder / info.filename).read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        infos[url] = type(info)(size=len(content), checksum=checksum, filename=info.filename)
    monkeypatch.setattr(builder, "url_infos", infos)


def accept_tiny(monkeypatch, name, count=5):
    """Makes the layout check take batches of ``count`` records for whole ones."""
    layout = prepare_module.EXTRACTED[name]
    size = count * (len(layout.labels) + 3072)
    tiny = layout._replace(files=dict.fromkeys(layout.files, size))
    monkeypatch.setitem(prepare_module.EXTRACTED, name, tiny)


@pytest.fixture
def tiny_mnist(monkeypatch):
    from tensorflow_datasets.image_classification import mnist

    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 30)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 12)


def check_loaded(dataset, written):
    assert sorted(dataset.example_ids) == sorted(written)
    for key, image, label in zip(dataset.example_ids, dataset.images, dataset.labels, strict=True):
        assert np.array_equal(image, written[key][0]), key
        assert label == written[key][1], key


# All five, from archives and from extracted folders.


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_archives(name, tmp_path, monkeypatch, tiny_mnist):
    written = write_mnist(tmp_path / "raw" / name)
    accept(monkeypatch, name, tmp_path / "raw" / name)
    made = prepare(name, raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    assert made == (tmp_path / "data" / name / "3.0.1", "archives", {"train": 30, "test": 12}, True)
    dataset = datasets.load(name, data_dir=tmp_path / "data")
    check_loaded(dataset, written)
    assert [str(key).split("/")[0] == "test" for key in dataset.example_ids] == (
        dataset.official_split == 1
    ).tolist()
    assert dataset.class_names[-1] == ("9" if name == "mnist" else "Ankle boot")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archive_and_folder_give_the_same(name, tmp_path, monkeypatch):
    accept_tiny(monkeypatch, name)
    written = write_cifar(tmp_path / "raw", name)
    extracted = prepare(name, raw_dir=tmp_path / "raw", data_dir=tmp_path / "from_folder")
    assert extracted.kind == "extracted"
    pack(tmp_path / "raw", name)
    accept(monkeypatch, name, tmp_path / "raw")
    archived = prepare(name, raw_dir=tmp_path / "raw", data_dir=tmp_path / "from_archive")
    assert archived.kind == "archives"
    assert archived.examples == extracted.examples
    one, other = (datasets.load(name, data_dir=tmp_path / part) for part in ("from_folder", "from_archive"))
    check_loaded(one, written)
    assert datasets.digest(one) == datasets.digest(other)
    assert one.class_names == other.class_names == tuple(f"class{i}" for i in range(one.num_classes))
    for part in ("from_folder", "from_archive"):  # neither raw archives nor hidden directories are left
        left = {path.name for path in (tmp_path / part).iterdir()}
        assert left == {name, f".{name}.lock"}


def test_cells_keep_their_file_names(tmp_path, monkeypatch):
    written = write_cells(tmp_path / "raw")
    made = prepare("malaria", raw_dir=tmp_path / "raw" / "cell_images", data_dir=tmp_path / "data")
    assert (made.kind, made.examples) == ("extracted", {"train": 16})
    dataset = datasets.load("malaria", data_dir=tmp_path / "data")
    check_loaded(dataset, written)
    assert set(dataset.official_split) == {-1}
    assert dataset.class_names == ("parasitized", "uninfected")
    groups = datasets.groups_of(dataset, datasets.GROUP_PATTERNS["malaria"])
    assert sorted(set(groups)) == [f"C{100 + i}P{i}" for i in range(8)]

    pack(tmp_path / "raw", "malaria")
    accept(monkeypatch, "malaria", tmp_path / "raw")
    archived = prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "again")
    assert archived.kind == "archives"
    assert datasets.digest(datasets.load("malaria", data_dir=tmp_path / "again")) == datasets.digest(dataset)


def test_cells_of_any_size_are_resized(tmp_path):
    write_cells(tmp_path / "raw", count=3, size=(50, 40))
    write_cells(tmp_path / "more", count=2, size=(20, 30))
    for path in (tmp_path / "more").rglob("*.png"):
        path.rename(tmp_path / "raw" / "cell_images" / path.parent.name / f"other_{path.name}")
    prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    assert datasets.load("malaria", data_dir=tmp_path / "data").images.shape == (10, 32, 32, 3)
    larger = datasets.load("malaria", data_dir=tmp_path / "data", image_size=(48, 24))
    assert larger.images.shape == (10, 48, 24, 3)
    key = "Uninfected/C100P0ThinF_IMG_1_cell_0.png"
    with Image.open(tmp_path / "raw" / "cell_images" / key) as image:
        expected = np.asarray(image.resize((24, 48), Image.Resampling.LANCZOS))
    assert np.array_equal(larger.images[larger.example_ids == key][0], expected)


def test_what_is_written_beside_the_records(tmp_path):
    write_cells(tmp_path / "raw")
    made = prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    notes = json.loads((made.path / "kdjax_preparation.json").read_text())
    assert notes["kind"] == "extracted"
    assert notes["raw"]["Parasitized/*.png"]["count"] == 8
    assert set(notes["files"]) == {
        "dataset_info.json",
        "features.json",
        "kdjax_keys.json",
        "label.labels.txt",
    }
    assert len(notes["splits"]["train"]["records_sha256"]) == 64


def test_it_is_an_ordinary_tfds_data_set(tmp_path):
    written = write_cells(tmp_path / "raw")
    made = prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    examples = tfds.builder_from_directory(str(made.path)).as_data_source("train")
    keys = json.loads((made.path / "kdjax_keys.json").read_text())["train"]
    for key, example in zip(keys, examples, strict=True):  # TFDS's own decoding, in TFDS's own order
        assert np.array_equal(example["image"], written[key][0])
        assert example["label"] == written[key][1]


def test_tensorflow_is_neither_needed_nor_left_replaced(tmp_path):
    from tensorflow_datasets.core.utils import lazy_imports_utils

    write_cells(tmp_path / "raw")
    held = dict(lazy_imports_utils.tensorflow.__dict__)
    prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    assert lazy_imports_utils.tensorflow.__dict__ == held
    with pytest.raises(KeyError), prepare_module._without_tensorflow():
        raise KeyError
    assert lazy_imports_utils.tensorflow.__dict__ == held


def test_a_finished_data_set_is_left_alone(tmp_path):
    write_cells(tmp_path / "raw")
    first = prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    again = prepare("malaria", raw_dir=tmp_path / "nowhere", data_dir=tmp_path / "data")
    assert again == first._replace(fresh=False)
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before


def test_a_data_set_prepared_by_tfds_alone_has_positions_as_example_ids(tmp_path):
    class Shapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(4, 4, 1)),
                "label": tfds.features.ClassLabel(names=["a", "b"]),
                "note": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "validation": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": Image.new("L", (4, 4), 10 * i), "label": i % 2, "note": "x"}

    Shapes(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    dataset = datasets.load("shapes", data_dir=tmp_path)
    assert dataset.example_ids.tolist() == [f"train/{i:06d}" for i in range(6)] + [
        f"validation/{i:06d}" for i in range(3)
    ]
    assert dataset.official_split.tolist() == [0] * 6 + [1] * 3
    assert np.array_equal(dataset.images[:, 0, 0, 0] // 10 % 2, dataset.labels)
    assert datasets.load("shapes:1.2.0", data_dir=tmp_path, image_size=(2, 2)).images.shape == (9, 2, 2, 1)
    with pytest.raises(ValueError, match=r"holds version 1\.2\.0 of shapes, not shapes:9\.9\.9"):
        datasets.load("shapes:9.9.9", data_dir=tmp_path)


@pytest.mark.parametrize("shape", [(8, 8, 3), (None, None, 3), (None, None, 1)])
def test_jpegs_of_tfds_are_shown_as_a_viewer_does(tmp_path, shape):
    """Pixels of a fixed size are what the JPEG holds; photos are turned upright, and cut to the size asked for."""
    stripes = np.repeat(np.array([10, 130, 250], np.uint8), 16)[None].repeat(
        16, 0
    )  # three squares side by side
    grey = shape[2] == 1

    def encoded(pixels, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.fromarray(pixels).convert("L" if grey else "RGB").save(file, "JPEG", exif=exif, quality=95)
        return file.getvalue()

    rng = np.random.default_rng(0)
    plain = [encoded(rng.integers(0, 256, (8, 8, 3), np.uint8), 1) for _ in range(2)]
    photos = [encoded(stripes, 1), encoded(np.rot90(stripes).copy(), 6), encoded(stripes[:, ::-1].copy(), 2)]
    images = plain if shape[0] else photos

    class Shots(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape, encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["a", "b"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):
                yield i, {"image": io.BytesIO(image), "label": i % 2}

    Shots(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    if shape[0]:
        found = {image.tobytes() for image in datasets.load("shots", data_dir=tmp_path).images}
        assert found == {np.asarray(Image.open(io.BytesIO(image))).tobytes() for image in plain}
        return
    with pytest.raises(ValueError, match=r"differ in size: pass image_size=\(height, width\)"):
        datasets.load("shots", data_dir=tmp_path)
    dataset = datasets.load("shots", data_dir=tmp_path, image_size=(8, 8))
    assert dataset.images.shape == (3, 8, 8, shape[2])
    assert (
        np.abs(dataset.images[:, :, 1:-1].astype(int) - 130).max() <= 6
    )  # JPEG's errors; Lanczos sees the next stripe
    whole = datasets.load("shots", data_dir=tmp_path, image_size=(8, 24))
    assert np.all(
        np.diff(whole.images[:, 4, [3, 11, 19], 0].astype(int)) > 100
    )  # dark on the left in all of them


# Raw files that will not do.


def test_missing_raw_files_are_listed(tmp_path, tiny_mnist):
    with pytest.raises(ValueError, match="is not a directory: name the one that holds t10k-images"):
        prepare("mnist", raw_dir=tmp_path / "nowhere", data_dir=tmp_path / "data")
    names = ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"]
    raw = tmp_path / "raw"
    write_mnist(raw)
    (raw / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"missing: put .*28,881 bytes.*only .* found in .*raw") as caught:
        prepare("mnist", raw_dir=raw, data_dir=tmp_path / "data")
    assert all(name in str(caught.value) for name in (*names, "train-labels-idx1-ubyte.gz"))
    with pytest.raises(
        ValueError, match=r"cifar-10-binary\.tar\.gz .* or the extracted folder cifar-10-batches-bin/"
    ):
        prepare("cifar10", raw_dir=raw, data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_foreign_archives_are_refused(tmp_path, monkeypatch, tiny_mnist):
    write_mnist(tmp_path / "raw")
    with pytest.raises(
        ValueError, match=r"expected 1,648,877 bytes with SHA-256 8d42.*, found .* bytes with"
    ) as caught:
        prepare("mnist", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    assert "t10k-images-idx3-ubyte.gz is not the official file of mnist" in str(caught.value)
    accept(monkeypatch, "mnist", tmp_path / "raw")
    file = tmp_path / "raw" / "train-images-idx3-ubyte.gz"
    bad = bytearray(file.read_bytes())
    bad[len(bad) // 2] ^= 1
    file.write_bytes(bad)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not the official file"):
        prepare("mnist", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_archives_of_mnist_are_not_those_of_fashion_mnist(tmp_path, monkeypatch, tiny_mnist):
    write_mnist(tmp_path / "raw")
    fashion = tfds.builder_cls("fashion_mnist")
    monkeypatch.setattr(fashion, "url_infos", fashion.url_infos)  # else it would inherit what mnist is given
    accept(monkeypatch, "mnist", tmp_path / "raw")
    with pytest.raises(ValueError, match="is not the official file of fashion_mnist"):
        prepare("fashion_mnist", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")


def test_extracted_cifar_is_checked(tmp_path, monkeypatch):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            prepare("cifar10", raw_dir=tmp_path, data_dir=tmp_path / "data")
        assert not (tmp_path / "data").exists()

    write_cifar(tmp_path, "cifar10")
    folder = tmp_path / "cifar-10-batches-bin"
    refused("must have exactly 30,730,000 bytes, found 15,365")
    accept_tiny(monkeypatch, "cifar10")
    batch = folder / "data_batch_3.bin"
    good = batch.read_bytes()
    batch.write_bytes(bytes([77]) + good[1:])
    refused(r"data_batch_3\.bin has label 77, cifar10 has 10 classes")
    batch.unlink()
    refused(r"data_batch_3\.bin missing")
    batch.write_bytes(good)
    (folder / "batches.meta.txt").write_text("cat\ndog\n")
    refused("must hold 10 class names, one a line; it holds 2")


def test_extracted_cells_are_checked(tmp_path):
    write_cells(tmp_path)
    victim = tmp_path / "cell_images" / "Uninfected" / "C103P3ThinF_IMG_1_cell_3.png"
    good = victim.read_bytes()

    def refused(message):
        with pytest.raises(ValueError, match=message):
            prepare("malaria", raw_dir=tmp_path, data_dir=tmp_path / "data")
        assert not (tmp_path / "data").exists()

    for bad in (b"", good[:100], good[:-20], good[:200] + bytes([good[200] ^ 4]) + good[201:]):
        victim.write_bytes(bad)
        refused(r"C103P3ThinF_IMG_1_cell_3\.png is not a readable PNG")
    Image.new("L", (32, 32)).save(victim)
    refused("must be an RGB image; its mode is L")
    shutil.rmtree(victim.parent)
    refused("Uninfected must hold the PNG images of that class; there are none")


def test_unknown_names_have_a_suggestion(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe to prepare 'cifar'.*Did you mean 'cifar10'"):
        prepare("cifar", raw_dir=tmp_path, data_dir=tmp_path)


def test_too_little_room_is_said_first(tmp_path, monkeypatch):
    write_cells(tmp_path / "raw")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ValueError, match=r"not enough room in .*preparing malaria needs about 150 MB, 1 MB are free"
    ):
        prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")


@pytest.mark.parametrize("stage", ["extracting", "writing records", "writing the cache"])
def test_a_disk_that_fills_up_is_an_os_error_and_leaves_nothing(stage, tmp_path, monkeypatch):
    from tensorflow_datasets.core import writer
    from tensorflow_datasets.core.download import extractor

    write_cells(tmp_path / "raw")

    def raises(error):
        def fail(*_, **__):
            raise error

        return fail

    if stage == "extracting":
        pack(tmp_path / "raw", "malaria")
        accept(monkeypatch, "malaria", tmp_path / "raw")
    with monkeypatch.context() as patch:
        if stage == "extracting":
            patch.setattr(extractor, "_copy", raises(OSError(28, "No space left on device")))
        elif stage == "writing records":  # as ArrayRecord says it
            error = RuntimeError("write() failed: No space left on device; writing a shard")
            patch.setattr(writer.ExampleWriter, "write", raises(error))
        else:  # as NumPy says it
            patch.setattr(np, "save", raises(OSError("1000 requested and 20 written")))
        with pytest.raises(OSError, match=r"No space left|could not write the decoded images") as caught:
            prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    assert caught.value.errno == 28
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".malaria.lock"]
    assert prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data").fresh


def test_leftovers_of_something_else_are_not_overwritten(tmp_path):
    write_cells(tmp_path / "raw")
    (tmp_path / "data" / "malaria" / "1.0.0").mkdir(parents=True)
    with pytest.raises(ValueError, match="exists, but holds no finished data set"):
        prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")


def test_two_at_once_are_refused(tmp_path):
    write_cells(tmp_path / "raw")
    (tmp_path / "data").mkdir()
    with (
        tfds_cache.lock(tmp_path / "data" / ".malaria.lock", wait=False, task="testing"),
        pytest.raises(ValueError, match="another process is preparing malaria"),
    ):
        prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")


# Damage afterwards.


def test_damaged_records_are_refused_when_decoded(tmp_path):
    write_cells(tmp_path / "raw")
    made = prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    shutil.rmtree(made.path / "kdjax_decoded")
    files = [path for path in made.path.iterdir() if path.name != "dataset_info.json"]
    assert len(files) == 5
    for file in files:
        good = file.read_bytes()
        bad = bytearray(good)
        used = len(good.rstrip(b"\0"))  # ArrayRecord pads its shards
        bad[used // 2] ^= 1
        for content in (bytes(bad), good[: used // 2], None):
            file.write_bytes(content) if content is not None else file.unlink()
            with pytest.raises(ValueError, match=r"(damaged|missing).*delete"):
                datasets.load("malaria", data_dir=tmp_path / "data")
        file.write_bytes(good)
    assert len(datasets.load("malaria", data_dir=tmp_path / "data").labels) == 16


def test_records_of_another_preparation_are_noticed(tmp_path):
    write_cells(tmp_path / "raw")
    made = prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    cells = sorted((tmp_path / "raw" / "cell_images" / "Uninfected").glob("*.png"))
    cells[0].write_bytes(cells[1].read_bytes())
    other = prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "other")
    shard = next(other.path.glob("*array_record*"))
    shutil.copy(shard, made.path / shard.name)
    shutil.rmtree(made.path / "kdjax_decoded")
    with pytest.raises(ValueError, match="are not those that were prepared"):
        datasets.load("malaria", data_dir=tmp_path / "data")


def test_a_read_only_data_dir_is_decoded_with_a_warning(tmp_path, monkeypatch):
    written = write_cells(tmp_path / "raw")
    prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tfds_cache, "lock", refuse)
    with pytest.warns(UserWarning, match="decoded on every load"):
        dataset = datasets.load("malaria", data_dir=tmp_path / "data", image_size=(32, 30))
    assert dataset.images.shape == (len(written), 32, 30, 3)


# Killed on the way.

KILLED = """
import os, signal, sys
import numpy as np
from kdjax.data import tfds_cache
from importlib import import_module
prepare = import_module("kdjax.data.prepare")

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class Fifth:
    calls = 0
    def __init__(self, function):
        self.function = function
    def __call__(self, *args, **options):
        Fifth.calls += 1
        return kill() if Fifth.calls == 5 else self.function(*args, **options)

stage, raw_dir, data_dir = sys.argv[1:]
if stage == "generating":
    prepare._example_id = Fifth(prepare._example_id)
elif stage == "before the notes":
    prepare._write_preparation = kill
elif stage == "decoding":
    tfds_cache._pixels = Fifth(tfds_cache._pixels)
elif stage == "caching":
    save = np.save
    def half(path, array, **options):
        save(path, array[: len(array) // 2], **options)
        kill()
    np.save = half
elif stage == "before the last rename":
    rename = os.rename
    prepare.os.rename = lambda old, new: kill() if "malaria/1.0.0" in str(new) and ".incomplete" not in str(new) \
        else rename(old, new)
prepare.prepare("malaria", raw_dir=raw_dir, data_dir=data_dir)
"""


@pytest.mark.parametrize(
    "stage", ["generating", "before the notes", "decoding", "caching", "before the last rename"]
)
def test_killed_and_started_again(stage, tmp_path):
    written = write_cells(tmp_path / "raw")
    command = [sys.executable, "-c", KILLED, stage, str(tmp_path / "raw"), str(tmp_path / "data")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "data" / "malaria" / "1.0.0").exists()
    with pytest.raises(ValueError, match="half-written; prepare it again"):
        datasets.load("malaria", data_dir=tmp_path / "data")
    assert prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data").fresh
    check_loaded(datasets.load("malaria", data_dir=tmp_path / "data"), written)


def test_a_cache_cut_short_is_not_read(tmp_path, monkeypatch):
    """A load that dies while it writes its cache leaves a directory that no later load looks into."""
    written = write_cells(tmp_path / "raw")
    made = prepare("malaria", raw_dir=tmp_path / "raw", data_dir=tmp_path / "data")
    folder = made.path / "kdjax_decoded"
    shutil.move(folder / "32x32", folder / "32x32.incomplete")
    (folder / "32x32.incomplete" / "manifest.json").unlink()
    check_loaded(datasets.load("malaria", data_dir=tmp_path / "data"), written)
    assert sorted(path.name for path in folder.iterdir()) == ["32x32", "32x32.lock"]


# The command.


def run(*flags):
    command = [sys.executable, "-m", "experiments.prepare_data", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def test_the_command(tmp_path):
    write_cells(tmp_path / "raw")
    flags = ("--dataset=malaria", f"--raw_dir={tmp_path / 'raw'}", f"--data_dir={tmp_path / 'data'}")
    first = run(*flags)
    assert first.returncode == 0, first.stderr
    assert first.stdout == (
        "malaria prepared from extracted official files, layout checked: 16 train examples, in "
        f"{tmp_path / 'data' / 'malaria' / '1.0.0'}\n"
    )
    second = run(*flags)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("malaria was there already, prepared from extracted official files")


def test_the_command_refuses_in_one_sentence(tmp_path):
    failed = run("--dataset=mnist", f"--raw_dir={tmp_path}", f"--data_dir={tmp_path / 'data'}")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: raw files of mnist are missing: put t10k-images-idx3-ubyte.gz")
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""
    assert not (tmp_path / "data").exists()


# The real archives, where this machine has them.


def test_real_mnist_archives_are_accepted():
    if not (SHARED / "mnist").is_dir():
        pytest.skip("the real MNIST archives are not on this machine")
    builder = tfds.builder_cls("mnist")
    raw = prepare_module._find_raw("mnist", SHARED, builder.url_infos)
    assert raw.kind == "archives"
    assert raw.size == 11_594_722
    content = gzip.decompress((SHARED / "mnist" / "train-labels-idx1-ubyte.gz").read_bytes())
    assert len(io.BytesIO(content).read()) == 60_008
