"""Sources: what may be loaded and what is refused, splits by hash, label noise, and the checked cache."""

import hashlib
import random
import time
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

stored = import_module("kdjax.data.stored")
sources = import_module("kdjax.data.sources")


def make_source(n=20_000, classes=10, *, keys=None, official=None):
    keys = np.array([f"train/{i:06d}" for i in range(n)]) if keys is None else keys
    labels = (np.arange(n) % classes).astype(np.int32)
    official = np.full(n, -1, np.int8) if official is None else official
    return sources.Source(
        "made", np.zeros((n, 1, 1, 1), np.uint8), labels, keys, official, tuple(map(str, range(classes)))
    )


def write_images(folder, colours, size=(4, 3), suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(colours):
        mode = "L" if isinstance(colour, int) else "RGB"
        Image.new(mode, size, colour).save(folder / f"{i}.{suffix}")


# Splits.


def test_digits_are_scaled_and_split():
    source = sources.load("digits")
    assert source.images.shape == (1797, 8, 8, 1)
    assert source.images.dtype == np.uint8
    assert source.images.max() == 255
    assert source.num_classes == 10
    assert len(np.unique(source.keys)) == 1797
    assert set(source.official) == {-1}
    ids = sources.split_ids(source)
    assert np.array_equal(np.sort(np.concatenate(list(ids.values()))), np.arange(1797))


def test_split_fractions_are_binomial():
    n = 20_000
    ids = sources.split_ids(make_source(n), validation=0.1, test=0.2)
    for name, p in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert abs(len(ids[name]) - n * p) < 4.5 * np.sqrt(n * p * (1 - p))
        assert np.all(np.diff(ids[name]) > 0)
        assert ids[name].dtype == np.int64


def members(source, **options):
    return {name: set(source.keys[ids]) for name, ids in sources.split_ids(source, **options).items()}


def test_split_does_not_depend_on_order():
    source = make_source(3000)
    shuffled = source._replace(keys=np.random.default_rng(0).permutation(source.keys))
    assert members(source) == members(shuffled)


def test_split_does_not_depend_on_other_examples():
    few, many = members(make_source(1000)), members(make_source(3000))
    for name in few:
        assert few[name] <= many[name]


def test_changing_one_fraction_leaves_the_other_split():
    source = make_source(3000)
    assert members(source, test=0.2)["validation"] == members(source, test=0.3)["validation"]
    assert members(source, validation=0.1)["test"] == members(source, validation=0.3)["test"]


def test_salt_gives_an_independent_split():
    source = make_source()
    first, second = members(source)["test"], members(source, salt="other")["test"]
    expected = 0.2 * 0.2 * len(source.labels)
    assert abs(len(first & second) - expected) < 5 * np.sqrt(expected)


def test_groups_stay_whole():
    source = make_source(2000)
    groups = np.array([f"patient{i % 97}" for i in range(2000)])
    ids = sources.split_ids(source, groups=groups)
    parts = [set(groups[part]) for part in ids.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 97


def test_groups_of_malaria_names():
    keys = np.array(
        ["Uninfected/C100P61ThinF_IMG_1.png", "Parasitized/C1_thinF_IMG_2.png", "x/C47P8thinO.png"]
    )
    groups = sources.groups_of(make_source(3, keys=keys), sources.GROUP_PATTERNS["malaria"])
    assert groups.tolist() == ["C100P61", "C1", "C47P8"]
    with pytest.raises(ValueError, match=r"matches nothing in the key 'train/000000'"):
        sources.groups_of(make_source(3), r"C\d+")


def test_official_test_split_is_used():
    official = np.repeat(np.array([0, 1], np.int8), 500)
    source = make_source(1000, official=official)
    ids = sources.split_ids(source, validation=0.2, test=0.9)
    assert np.array_equal(ids["test"], np.arange(500, 1000))
    assert ids["validation"].max() < 500
    assert len(ids["validation"]) + len(ids["train"]) == 500
    with pytest.raises(ValueError, match="official training and test splits alike"):
        sources.split_ids(source, groups=np.full(1000, "one patient"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": -0.1}, "must be >= 0"),
        ({"validation": 0.5, "test": 0.5}, "sum to less than 1"),
        ({"groups": np.array(["a", "b"])}, "one group an example, 100 in all"),
        ({"groups": np.full(100, "a")}, "raise the fraction or pass another salt"),
    ],
)
def test_split_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        sources.split_ids(make_source(100), **options)


def test_a_split_that_is_not_asked_for_may_be_empty():
    ids = sources.split_ids(make_source(100), validation=0.0, test=0.0)
    assert [len(part) for part in ids.values()] == [100, 0, 0]


def test_splitting_is_quick():
    source = make_source(70_000)
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process alone, however busy the machine is
        sources.split_ids(source)
        times.append(time.process_time() - start)
    assert min(times) < 0.5


# Label noise, taking, digests.


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.333, 1.0])
def test_label_noise_perturbs_exactly(fraction):
    source = make_source(1000)
    before = source.labels.copy()
    ids = np.arange(100, 900)
    noisy, perturbed = sources.with_label_noise(source, ids, fraction=fraction, seed=3)
    assert np.array_equal(source.labels, before)
    assert np.array_equal(perturbed, np.flatnonzero(noisy.labels != before))
    assert len(perturbed) == round(fraction * 800)
    assert np.isin(perturbed, ids).all()
    assert noisy.labels.dtype == np.int32
    assert noisy.labels.min() >= 0
    assert noisy.labels.max() < 10
    again, _ = sources.with_label_noise(source, ids[::-1], fraction=fraction, seed=3)
    assert np.array_equal(again.labels, noisy.labels)


def test_label_noise_is_uniform_over_wrong_classes():
    source = make_source(18_000)
    noisy, perturbed = sources.with_label_noise(source, np.arange(18_000), fraction=1.0, seed=0)
    counts = np.bincount((noisy.labels - source.labels)[perturbed] % 10, minlength=10)
    assert counts[0] == 0
    assert np.sum((counts[1:] - 2000) ** 2 / 2000) < 26.1  # chi-squared, 8 degrees of freedom, p = .001
    other, _ = sources.with_label_noise(source, np.arange(18_000), fraction=1.0, seed=1)
    assert np.any(other.labels != noisy.labels)


@pytest.mark.parametrize(
    ("ids", "fraction", "message"),
    [
        ([0, 1], 1.5, r"fraction must be in \[0, 1\]"),
        ([1, 1], 0.5, "distinct example indices"),
        ([0.5], 0.5, "distinct example indices"),
        ([0, 100], 0.5, r"must be in \[0, 100\)"),
        ([-1, 3], 0.5, r"must be in \[0, 100\)"),
    ],
)
def test_label_noise_refuses(ids, fraction, message):
    # the typing hook of the tests would catch float ids first, so the plain function is called
    noise = getattr(sources.with_label_noise, "__wrapped__", sources.with_label_noise)
    with pytest.raises(ValueError, match=message):
        noise(make_source(100), np.array(ids), fraction=fraction, seed=0)


def test_label_noise_needs_two_classes():
    with pytest.raises(ValueError, match="at least two classes"):
        sources.with_label_noise(make_source(10, 1), np.arange(10), fraction=0.5, seed=0)


def test_take_keeps_keys_and_classes():
    source = make_source(50)
    part = sources.take(source, np.array([7, 3, 41]))
    assert part.keys.tolist() == ["train/000007", "train/000003", "train/000041"]
    assert part.labels.tolist() == [7, 3, 1]
    assert part.num_classes == 10


def test_digest_sees_every_array():
    source = make_source(50)
    digests = {sources.digest(source)}
    for field, change in (
        ("images", source.images + 1),
        ("labels", source.labels[::-1]),
        ("keys", source.keys[::-1]),
    ):
        digests.add(sources.digest(source._replace(**{field: change})))
    digests.add(sources.digest(source._replace(images=source.images.reshape(25, 2, 1, 1))))
    assert len(digests) == 5
    assert sources.digest(source) == sources.digest(make_source(50))


# .npz files.


def test_npz_of_bytes_and_of_floats_agree(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 4), np.uint8)
    labels = np.arange(12) % 3
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez_compressed(tmp_path / "b.npz", images=(images / 255)[..., None], labels=labels.astype(np.uint8))
    a, b = sources.load(str(tmp_path / "a.npz")), sources.load(str(tmp_path / "b.npz"))
    assert a.images.shape == (12, 5, 4, 1)
    assert sources.digest(a) == sources.digest(b)
    assert a.name == "a"
    assert a.class_names == ("0", "1", "2")
    assert set(a.official) == {-1}


def test_npz_with_test_split_and_names(tmp_path):
    images = np.zeros((6, 2, 2, 3), np.uint8)
    np.savez(
        tmp_path / "a.npz",
        images=images,
        labels=np.zeros(6, int),
        test_images=images[:2],
        test_labels=np.ones(2, int),
        names=np.array(["cat", "dog", "cow"]),
    )
    source = sources.load(str(tmp_path / "a.npz"))
    assert source.official.tolist() == [0] * 6 + [1] * 2
    assert source.keys[[0, 6]].tolist() == ["train/000000", "test/000000"]
    assert source.class_names == ("cat", "dog", "cow")


GREY = np.zeros((4, 2, 2), np.uint8)
FOUR = np.arange(4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GREY}, "must hold images and labels"),
        ({"images": GREY, "labels": FOUR, "test_images": GREY}, "test_images with test_labels"),
        ({"images": GREY, "labels": FOUR, "lables": FOUR}, "it holds images, labels, lables"),
        ({"images": GREY.astype(int), "labels": FOUR}, "must be uint8, or floats"),
        ({"images": GREY + 2.0, "labels": FOUR}, r"must lie in \[0, 1\]; they lie in \[2, 2\]"),
        ({"images": GREY + np.nan, "labels": FOUR}, r"must lie in \[0, 1\]"),
        ({"images": GREY[0], "labels": FOUR}, r"shaped \[n, height, width\]"),
        ({"images": GREY, "labels": FOUR[:3]}, "must be 4 integers"),
        ({"images": GREY, "labels": FOUR + 0.5}, "must be 4 integers"),
        ({"images": GREY, "labels": FOUR - 1}, "count from 0; the smallest is -1"),
        ({"images": GREY, "labels": FOUR, "names": np.array(["a", "b"])}, "names 2 classes but has label 3"),
        ({"images": GREY, "labels": np.array([None] * 4)}, "no readable .npz of plain arrays"),
        (
            {"images": GREY, "labels": FOUR, "test_images": GREY[:, :1], "test_labels": FOUR},
            "differ in shape",
        ),
    ],
)
def test_npz_refuses(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        sources.load(str(tmp_path / "a.npz"))


def test_npz_missing_or_not_one(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        sources.load(str(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no readable"):
        sources.load(str(tmp_path / "a.npz"))


# Folders.


def test_folder_of_class_folders(tmp_path):
    write_images(tmp_path / "cats", [(255, 0, 0), (250, 0, 0)])
    write_images(tmp_path / "ants", [(0, 0, 255)], suffix="bmp")
    (tmp_path / "cats" / "notes.txt").write_text("not an image")
    source = sources.load(f"folder:{tmp_path}")
    assert source.class_names == ("ants", "cats")
    assert source.images.shape == (3, 3, 4, 3)
    assert source.keys.tolist() == ["ants/0.bmp", "cats/0.png", "cats/1.png"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.images[:, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0], [250, 0, 0]]
    assert source.official.tolist() == [-1, -1, -1]


def test_folder_is_grey_only_if_every_image_is(tmp_path):
    write_images(tmp_path / "a", [7])
    write_images(tmp_path / "b", [9])
    assert sources.load(f"folder:{tmp_path}").images[:, 0, 0, 0].tolist() == [7, 9]
    write_images(tmp_path / "b", [9, (1, 2, 3)])
    assert sources.load(f"folder:{tmp_path}").images[:, 0, 0].tolist() == [[7] * 3, [9] * 3, [1, 2, 3]]


def test_folder_with_official_split(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            write_images(tmp_path / split / name, [1])
    source = sources.load(f"folder:{tmp_path}")
    assert dict(zip(source.keys.tolist(), source.official.tolist(), strict=True)) == {
        f"{split}/{name}/0.png": int(split == "test") for split in ("train", "val", "test") for name in "ab"
    }
    write_images(tmp_path / "test" / "c", [1])
    with pytest.raises(ValueError, match="they must agree"):
        sources.load(f"folder:{tmp_path}")


def test_folder_sizes_that_differ_need_a_size(tmp_path):
    write_images(tmp_path / "a", [1])
    write_images(tmp_path / "b", [1], size=(6, 6))
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(6, 6\).*image_size"):
        sources.load(f"folder:{tmp_path}")
    assert sources.load(f"folder:{tmp_path}", image_size=(5, 2)).images.shape == (2, 5, 2, 1)


def test_folder_refuses(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        sources.load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="at least two class folders; it holds none"):
        sources.load(f"folder:{tmp_path}")
    write_images(tmp_path / "a", [1])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        sources.load(f"folder:{tmp_path}")
    (tmp_path / "b" / "0.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="not a readable image"):
        sources.load(f"folder:{tmp_path}")


# Names and directories.


@pytest.mark.parametrize(
    ("name", "suggestion"), [("minst", "'mnist'"), ("digit", "'digits'"), ("cifar-10", "'cifar10'")]
)
def test_unknown_name_has_a_suggestion(tmp_path, name, suggestion):
    with pytest.raises(ValueError, match=rf"unknown data set '{name}'.*Did you mean {suggestion}"):
        sources.load(name, data_dir=tmp_path)


@pytest.mark.parametrize("name", ["", "../mnist", "/etc", "qqqqqqqq"])
def test_odd_names_are_unknown(tmp_path, name):
    with pytest.raises(ValueError, match=r"^unknown data set"):
        sources.load(name, data_dir=tmp_path)


def test_directories_that_cannot_be_read_name_the_command(tmp_path):
    command = "python -m experiments.prepare_data --dataset=mnist"
    with pytest.raises(ValueError, match=f"does not exist.*{command}"):
        sources.load("mnist", data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"holds no prepared mnist.*{command}"):
        sources.load("mnist", data_dir=tmp_path)
    (tmp_path / ".mnist.incomplete").mkdir()
    with pytest.raises(ValueError, match=f"half-written.*{command}"):
        sources.load("mnist", data_dir=tmp_path)
    (tmp_path / "cifar10" / "incomplete.ABC_3.0.2").mkdir(parents=True)  # as TFDS leaves it
    with pytest.raises(ValueError, match=r"cifar10 in .* is half-written"):
        sources.load("cifar10", data_dir=tmp_path)
    with pytest.raises(ValueError, match="tfds build kmnist"):
        sources.load("kmnist", data_dir=tmp_path)


def test_data_dir_defaults_to_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    with pytest.raises(ValueError, match="there does not exist"):
        sources.load("mnist")


@pytest.mark.parametrize(("name", "size"), [("digits", (8, 8)), ("mnist", (0, 8))])
def test_image_size_is_checked(name, size):
    with pytest.raises(ValueError, match="image_size"):
        sources.load(name, image_size=size)


# The cache of decoded images, written without TFDS.


@pytest.fixture
def cached(tmp_path):
    path = tmp_path / "mnist" / "3.0.1"
    path.mkdir(parents=True)
    (path / "dataset_info.json").write_text("{}")
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
    source = make_source(20)
    arrays = stored.Arrays(images, source.labels, source.keys, source.official, source.class_names)
    (path / "kdjax_decoded").mkdir()
    stored._write_cache(path / "kdjax_decoded" / "native", path, arrays)
    return tmp_path


def test_cache_is_read_without_tfds(cached, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    source = sources.load("mnist", data_dir=cached)
    assert source.name == "mnist"
    assert source.images.shape == (20, 4, 4, 1)
    assert source.class_names == tuple("0123456789")


def test_a_flipped_byte_in_the_cache_is_refused_every_time(cached):
    folder = cached / "mnist" / "3.0.1" / "kdjax_decoded" / "native"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        "images.npy",
        "keys.npy",
        "labels.npy",
        "manifest.json",
        "official.npy",
    ]
    rng, refused = random.Random(0), 0
    for trial in range(100):
        file = files[trial % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"is damaged.*delete"):
            sources.load("mnist", data_dir=cached)
        refused += 1
        file.write_bytes(good)
    assert refused == 100
    assert len(sources.load("mnist", data_dir=cached).labels) == 20


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "manifest.json"])
def test_a_truncated_file_in_the_cache_is_refused(cached, file):
    path = cached / "mnist" / "3.0.1" / "kdjax_decoded" / "native" / file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        sources.load("mnist", data_dir=cached)


def test_digests_of_digits_do_not_drift():
    # derived here from scikit-learn's own values, so that a change of scaling or order is noticed
    from sklearn.datasets import load_digits

    digits = load_digits()
    expected = hashlib.sha256((digits.images * 255 // 16).astype(np.uint8).tobytes()).hexdigest()
    assert hashlib.sha256(sources.load("digits").images.tobytes()).hexdigest() == expected
