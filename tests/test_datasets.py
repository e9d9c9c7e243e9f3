"""Sources: what may be loaded and what is refused, splits by hash, label noise, and the checked cache."""

import hashlib
import os
import random
import time
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

tfds_cache = import_module("kdjax.data.tfds_cache")
datasets = import_module("kdjax.data.datasets")


def make_dataset(n=20_000, classes=10, *, example_ids=None, official_split=None):
    example_ids = np.array([f"train/{i:06d}" for i in range(n)]) if example_ids is None else example_ids
    labels = (np.arange(n) % classes).astype(np.int32)
    official_split = np.full(n, -1, np.int8) if official_split is None else official_split
    return datasets.Dataset(
        "made",
        np.zeros((n, 1, 1, 1), np.uint8),
        labels,
        example_ids,
        official_split,
        tuple(map(str, range(classes))),
    )


def write_images(folder, colours, size=(4, 3), suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(colours):
        mode = "L" if isinstance(colour, int) else "RGB"
        Image.new(mode, size, colour).save(folder / f"{i}.{suffix}")


# Splits.


def test_digits_are_scaled_and_split():
    dataset = datasets.load("digits")
    assert dataset.images.shape == (1797, 8, 8, 1)
    assert dataset.images.dtype == np.uint8
    assert dataset.images.max() == 255
    assert dataset.num_classes == 10
    assert len(np.unique(dataset.example_ids)) == 1797
    assert set(dataset.official_split) == {-1}
    ids = datasets.split_ids(dataset)
    assert np.array_equal(np.sort(np.concatenate(list(ids.values()))), np.arange(1797))


def test_split_fractions_are_binomial():
    n = 20_000
    ids = datasets.split_ids(make_dataset(n), validation=0.1, test=0.2)
    for name, p in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert abs(len(ids[name]) - n * p) < 4.5 * np.sqrt(n * p * (1 - p))
        assert np.all(np.diff(ids[name]) > 0)
        assert ids[name].dtype == np.int64


def members(dataset, **options):
    return {
        name: set(dataset.example_ids[ids]) for name, ids in datasets.split_ids(dataset, **options).items()
    }


def test_split_does_not_depend_on_order():
    dataset = make_dataset(3000)
    shuffled = dataset._replace(example_ids=np.random.default_rng(0).permutation(dataset.example_ids))
    assert members(dataset) == members(shuffled)


def test_split_does_not_depend_on_other_examples():
    few, many = members(make_dataset(1000)), members(make_dataset(3000))
    for name in few:
        assert few[name] <= many[name]


def test_changing_one_fraction_leaves_the_other_split():
    dataset = make_dataset(3000)
    assert members(dataset, test=0.2)["validation"] == members(dataset, test=0.3)["validation"]
    assert members(dataset, validation=0.1)["test"] == members(dataset, validation=0.3)["test"]


def test_groups_stay_whole():
    dataset = make_dataset(2000)
    groups = np.array([f"patient{i % 97}" for i in range(2000)])
    ids = datasets.split_ids(dataset, groups=groups)
    parts = [set(groups[part]) for part in ids.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 97


def test_groups_of_malaria_names():
    keys = np.array(
        ["Uninfected/C100P61ThinF_IMG_1.png", "Parasitized/C1_thinF_IMG_2.png", "x/C47P8thinO.png"]
    )
    groups = datasets.groups_of(make_dataset(3, example_ids=keys), datasets.GROUP_PATTERNS["malaria"])
    assert groups.tolist() == ["C100P61", "C1", "C47P8"]
    with pytest.raises(ValueError, match=r"matches nothing in the example id 'train/000000'"):
        datasets.groups_of(make_dataset(3), r"C\d+")


def test_official_test_split_is_used():
    official_split = np.repeat(np.array([0, 1], np.int8), 500)
    dataset = make_dataset(1000, official_split=official_split)
    ids = datasets.split_ids(dataset, validation=0.2, test=0.9)
    assert np.array_equal(ids["test"], np.arange(500, 1000))
    assert ids["validation"].max() < 500
    assert len(ids["validation"]) + len(ids["train"]) == 500
    with pytest.raises(ValueError, match="in both official splits, training and test"):
        datasets.split_ids(dataset, groups=np.full(1000, "one patient"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": -0.1}, "must be >= 0"),
        ({"validation": 0.5, "test": 0.5}, "sum to less than 1"),
        ({"groups": np.array(["a", "b"])}, "one group per example, 100 in all"),
        ({"groups": np.full(100, "a")}, "add examples, or give split_ids a larger validation fraction"),
    ],
)
def test_split_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        datasets.split_ids(make_dataset(100), **options)


def test_a_split_that_is_not_asked_for_may_be_empty():
    ids = datasets.split_ids(make_dataset(100), validation=0.0, test=0.0)
    assert [len(part) for part in ids.values()] == [100, 0, 0]


def test_splitting_is_quick():
    dataset = make_dataset(70_000)
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process alone, however busy the machine is
        datasets.split_ids(dataset)
        times.append(time.process_time() - start)
    assert min(times) < 0.5


# Label noise, taking, digests.


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.333, 1.0])
def test_label_noise_perturbs_exactly(fraction):
    dataset = make_dataset(1000)
    before = dataset.labels.copy()
    ids = np.arange(100, 900)
    noisy = datasets.with_label_noise(dataset, ids, fraction=fraction, seed=3)
    perturbed = noisy.mislabelled
    assert np.array_equal(dataset.labels, before)
    assert np.array_equal(perturbed, np.flatnonzero(noisy.labels != before))
    assert len(perturbed) == round(fraction * 800)
    assert np.array_equal(noisy.true_labels, before[perturbed])
    assert np.isin(perturbed, ids).all()
    assert noisy.labels.dtype == np.int32
    assert noisy.labels.min() >= 0
    assert noisy.labels.max() < 10
    again = datasets.with_label_noise(dataset, ids[::-1], fraction=fraction, seed=3)
    assert np.array_equal(again.labels, noisy.labels)


@given(st.data(), st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_label_noise_is_nested_and_keyed_by_example_id(drawn, fractions, classes):
    dataset, ids = make_dataset(120, classes), np.arange(10, 110)
    small, large = (
        datasets.with_label_noise(dataset, ids, fraction=fraction, seed=3) for fraction in fractions
    )
    assert set(small.mislabelled) <= set(large.mislabelled)
    agreed = small.mislabelled
    assert np.array_equal(small.labels[agreed], large.labels[agreed])
    assert np.all(large.labels[large.mislabelled] != dataset.labels[large.mislabelled])

    rows = np.array(drawn.draw(st.lists(st.integers(0, 119), unique=True, min_size=1)))
    part = datasets.subset(large, rows)
    assert set(rows[part.mislabelled]) == set(large.mislabelled) & set(rows)
    assert np.array_equal(part.true_labels, dataset.labels[rows[part.mislabelled]])
    order = np.array(drawn.draw(st.permutations(range(120))))
    place = np.argsort(order)  # of each example in the other order
    moved = datasets.with_label_noise(
        datasets.subset(dataset, order), place[ids], fraction=fractions[1], seed=3
    )
    assert np.array_equal(moved.labels[place], large.labels)


def test_label_noise_is_uniform_over_wrong_classes():
    dataset = make_dataset(18_000)
    noisy = datasets.with_label_noise(dataset, np.arange(18_000), fraction=1.0, seed=0)
    counts = np.bincount((noisy.labels - dataset.labels) % 10, minlength=10)
    assert counts[0] == 0
    assert np.sum((counts[1:] - 2000) ** 2 / 2000) < 26.1  # chi-squared, 8 degrees of freedom, p = .001
    other = datasets.with_label_noise(dataset, np.arange(18_000), fraction=1.0, seed=1)
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
    noise = getattr(datasets.with_label_noise, "__wrapped__", datasets.with_label_noise)
    with pytest.raises(ValueError, match=message):
        noise(make_dataset(100), np.array(ids), fraction=fraction, seed=0)


def test_label_noise_needs_two_classes():
    with pytest.raises(ValueError, match="at least two classes"):
        datasets.with_label_noise(make_dataset(10, 1), np.arange(10), fraction=0.5, seed=0)


def test_a_subset_keeps_ids_and_classes():
    dataset = make_dataset(50)
    part = datasets.subset(dataset, np.array([7, 3, 41]))
    assert part.example_ids.tolist() == ["train/000007", "train/000003", "train/000041"]
    assert part.labels.tolist() == [7, 3, 1]
    assert part.num_classes == 10


def test_digest_sees_every_array():
    dataset = make_dataset(50)
    digests = {datasets.digest(dataset)}
    for field, change in (
        ("images", dataset.images + 1),
        ("labels", dataset.labels[::-1]),
        ("example_ids", dataset.example_ids[::-1]),
    ):
        digests.add(datasets.digest(dataset._replace(**{field: change})))
    digests.add(datasets.digest(dataset._replace(images=dataset.images.reshape(25, 2, 1, 1))))
    assert len(digests) == 5
    assert datasets.digest(dataset) == datasets.digest(make_dataset(50))


# .npz files.


def test_npz_of_bytes_and_of_floats_agree(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 4), np.uint8)
    labels = np.arange(12) % 3
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez_compressed(tmp_path / "b.npz", images=(images / 255)[..., None], labels=labels.astype(np.uint8))
    a, b = datasets.load(str(tmp_path / "a.npz")), datasets.load(str(tmp_path / "b.npz"))
    assert a.images.shape == (12, 5, 4, 1)
    assert datasets.digest(a) == datasets.digest(b)
    assert a.name == "a.npz"
    assert a.class_names == ("0", "1", "2")
    assert set(a.official_split) == {-1}


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
    dataset = datasets.load(str(tmp_path / "a.npz"))
    assert dataset.official_split.tolist() == [0] * 6 + [1] * 2
    assert dataset.example_ids[[0, 6]].tolist() == ["train/000000", "test/000000"]
    assert dataset.class_names == ("cat", "dog", "cow")


GREY = np.zeros((4, 2, 2), np.uint8)
FOUR = np.arange(4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GREY}, "must hold images and labels"),
        ({"images": GREY, "labels": FOUR, "test_images": GREY}, "test_images with test_labels"),
        ({"images": GREY, "labels": FOUR, "lables": FOUR}, "it holds images, labels, lables"),
        ({"images": GREY.astype(int), "labels": FOUR}, r"must be uint8.*images.astype\(np.uint8\)"),
        (
            {"images": GREY.astype(np.uint16) + 999, "labels": FOUR},
            r"got uint16: write \(images / 257",
        ),
        ({"images": GREY.astype(str), "labels": FOUR}, r"or floats in \[0, 1\]; got <U3\."),
        ({"images": GREY > 0, "labels": FOUR}, r"got bool.*astype\(np.uint8\) \* 255"),
        ({"images": GREY + 2.0, "labels": FOUR}, r"must be floats in \[0, 1\]; they lie in \[2, 2\]"),
        ({"images": GREY + np.nan, "labels": FOUR}, r"must be floats in \[0, 1\].*leave out NaN"),
        (
            {"images": GREY - np.inf, "labels": FOUR},
            r"must be floats in \[0, 1\].*leave out NaN and infinite",
        ),
        ({"images": GREY + 1.0025, "labels": FOUR}, r"they lie in \[1.0025, 1.0025\]: write np.clip"),
        ({"images": GREY - 1.5, "labels": FOUR}, "undo their normalisation"),
        ({"images": GREY + 1 / 255, "labels": FOUR}, "divided by 255 twice"),
        (
            {"images": GREY, "labels": FOUR, "test_images": GREY + 1 / 255, "test_labels": FOUR},
            "test_images of .* divided by 255 twice",
        ),
        ({"images": GREY[:, :0], "labels": FOUR}, r"shaped \[n, height, width\(, channels\)\]"),
        ({"images": GREY[0], "labels": FOUR}, r"shaped \[n, height, width\(, channels\)\]"),
        ({"images": GREY, "labels": FOUR[:3]}, "must be 4 integers"),
        ({"images": GREY, "labels": FOUR + 0.5}, r"must be 4 integers.*float64.*labels.astype\(int\)"),
        ({"images": GREY, "labels": FOUR > 1}, r"must be 4 integers.*bool.*labels.astype\(int\)"),
        ({"images": GREY, "labels": FOUR[:, None]}, r"write labels\[:, 0\]"),
        (
            {"images": GREY, "labels": np.eye(4, dtype=int)},
            r"write labels.argmax\(axis=1\) if they are one-hot",
        ),
        ({"images": GREY, "labels": FOUR * 0 + 7}, "at least two classes; all of its labels are 7"),
        ({"images": GREY, "labels": np.full(4, "cat")}, "at least two classes; all of its labels are 'cat'"),
        (
            {"images": GREY, "labels": FOUR, "test_images": GREY, "test_labels": np.array(list("abcd"))},
            "must both be integers or both text",
        ),
        ({"images": GREY, "labels": FOUR % 2, "names": np.array(["a", "a"])}, "one list of different names"),
        ({"images": GREY, "labels": np.array(list("abca")), "names": np.array(["a", "b"])}, "has label c"),
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
        datasets.load(str(tmp_path / "a.npz"))


def load_npz(tmp_path, **arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    return datasets.load(str(tmp_path / "x.npz"))


SIX = np.arange(6) % 3
NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1, 2, 3]),
        np.array([0, 7, 100_000]),
        np.array([0, 1, 2**32 + 1]),
        np.array([0, 2**31, 2**64 - 1], np.uint64),
    ],
)
def test_npz_labels_with_gaps_are_numbered_and_keep_their_ids_as_names(tmp_path, ids):
    dataset = load_npz(
        tmp_path, images=NOISE, labels=ids[SIX], test_images=NOISE[:2], test_labels=ids[[2, 0]]
    )
    assert dataset.labels.tolist() == [*SIX.tolist(), 2, 0]
    assert dataset.class_names == tuple(map(str, ids.tolist()))
    assert len(dataset.notes) == 1
    assert f"are {', '.join(map(str, ids.tolist()))}: they are numbered 0 to 2" in dataset.notes[0]


def test_npz_labels_of_two_integer_types_keep_every_bit(tmp_path):
    """Of int64 and uint64 together NumPy makes float64, which would take 2**62 + 1 for 2**62."""
    labels = np.array([2**62, 2**62 + 1, 5])[SIX]
    other = np.array([2**62 + 1, 5], np.uint64)
    dataset = load_npz(tmp_path, images=NOISE, labels=labels, test_images=NOISE[:2], test_labels=other)
    assert dataset.class_names == ("5", str(2**62), str(2**62 + 1))
    assert dataset.labels.tolist() == [1, 2, 0, 1, 2, 0, 2, 0]


@pytest.mark.parametrize("kind", [str, bytes])
def test_npz_text_labels_are_class_names(tmp_path, kind):
    words = np.array(["dog", "cat", "sea lion"]).astype("S8" if kind is bytes else "U8")
    dataset = load_npz(tmp_path, images=NOISE, labels=words[SIX])
    assert dataset.class_names == ("cat", "dog", "sea lion")
    assert dataset.labels.tolist() == [1, 0, 2, 1, 0, 2]
    ordered = load_npz(
        tmp_path, images=NOISE, labels=words[SIX], names=np.array(["sea lion", "dog", "cat", "cow"])
    )
    assert ordered.class_names == ("sea lion", "dog", "cat", "cow")
    assert ordered.labels.tolist() == [1, 2, 0, 1, 2, 0]
    assert dataset.notes == ordered.notes == ()


@pytest.mark.parametrize(
    "shape", [(6, 3, 8, 8), (6, 1, 28, 28), (6, 3, 32, 4), (6, 16, 32, 32), (6, 5, 16, 16), (6, 4, 8, 8)]
)
def test_npz_channels_first_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"write images.transpose\(0, 2, 3, 1\)"):
        load_npz(tmp_path, images=np.zeros(shape, np.uint8), labels=SIX)


@pytest.mark.parametrize("shape", [(6, 8, 9, 1), (6, 8, 9, 3), (6, 8, 9, 4), (6, 64, 64, 13), (6, 3, 3, 3)])
def test_npz_channels_last_are_read(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    dataset = load_npz(tmp_path, images=images, labels=SIX)
    assert np.array_equal(dataset.images, images)
    assert [f"{shape[3]} channels" in note for note in dataset.notes] == [True] * (shape[3] not in (1, 3))


def test_npz_floats_a_little_outside_are_rounded_not_clipped(tmp_path):
    images = np.linspace(0, 1, 6 * 64).astype(np.float32).reshape(6, 8, 8)
    images[0, 0, :2] = -1e-7, 1.0000001
    dataset = load_npz(tmp_path, images=images, labels=SIX)
    assert np.array_equal(dataset.images[..., 0], np.round(np.clip(images.astype(float), 0, 1) * 255))
    half = load_npz(tmp_path, images=images.astype(np.float16), labels=SIX)
    assert np.abs(half.images.astype(int) - dataset.images).max() <= 1


def test_npz_nearly_black_or_mixed_images_are_noted(tmp_path):
    assert "above 1 of 255" in load_npz(tmp_path, images=NOISE % 2, labels=SIX).notes[0]
    mixed = load_npz(tmp_path, images=NOISE, labels=SIX, test_images=NOISE / 255, test_labels=SIX)
    assert np.array_equal(mixed.images[:6], mixed.images[6:])
    assert "one is uint8 and one floats" in mixed.notes[0]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_a_flipped_bit_is_refused_or_the_same(tmp_path, save):
    """NumPy alone reads a flip in a shape as another shape: 12 rows of 32x32 where there were 32."""
    path = tmp_path / "x.npz"
    save(path, images=NOISE.repeat(4, 1).repeat(4, 2), labels=SIX)
    good, expected = path.read_bytes(), datasets.load(str(path))
    rng, refusals = random.Random(0), []
    # every bit of the two arrays' .npy headers where they are not compressed, and anything anywhere
    header = [8 * (good.find(b"\x93NUMPY") + i) + bit for i in range(128) for bit in range(8)]
    places = header if save is np.savez else []
    for at in places + [rng.randrange(8 * len(good)) for _ in range(300)]:
        bad = bytearray(good)
        bad[at // 8] ^= 1 << at % 8
        path.write_bytes(bad)
        try:
            assert datasets.digest(datasets.load(str(path))) == datasets.digest(expected)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 250
    assert all(str(path) in refusal for refusal in refusals)


def test_npz_missing_or_not_one(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        datasets.load(str(tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no readable"):
        datasets.load(str(tmp_path / "a.npz"))


# Folders.


def test_folder_of_class_folders(tmp_path):
    write_images(tmp_path / "cats", [(255, 0, 0), (250, 0, 0)])
    write_images(tmp_path / "ants", [(0, 0, 255)], suffix="bmp")
    dataset = datasets.load(f"folder:{tmp_path}")
    assert dataset.notes == ()
    assert dataset.class_names == ("ants", "cats")
    assert dataset.images.shape == (3, 3, 4, 3)
    assert dataset.example_ids.tolist() == ["ants/0.bmp", "cats/0.png", "cats/1.png"]
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.images[:, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0], [250, 0, 0]]
    assert dataset.official_split.tolist() == [-1, -1, -1]


def test_folder_is_grey_only_if_every_image_is(tmp_path):
    write_images(tmp_path / "a", [7])
    write_images(tmp_path / "b", [9])
    assert datasets.load(f"folder:{tmp_path}").images[:, 0, 0, 0].tolist() == [7, 9]
    write_images(tmp_path / "b", [9, (1, 2, 3)])
    assert datasets.load(f"folder:{tmp_path}").images[:, 0, 0].tolist() == [[7] * 3, [9] * 3, [1, 2, 3]]


def test_folder_with_official_split(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            write_images(tmp_path / split / name, [1])
    dataset = datasets.load(f"folder:{tmp_path}")
    assert dict(zip(dataset.example_ids.tolist(), dataset.official_split.tolist(), strict=True)) == {
        f"{split}/{name}/0.png": int(split == "test") for split in ("train", "val", "test") for name in "ab"
    }
    write_images(tmp_path / "test" / "c", [1])
    with pytest.raises(ValueError, match="they must agree"):
        datasets.load(f"folder:{tmp_path}")


def test_folder_sizes_that_differ_need_a_size(tmp_path):
    write_images(tmp_path / "a", [1])
    write_images(tmp_path / "b", [1], size=(6, 6))
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(6, 6\).*image_size"):
        datasets.load(f"folder:{tmp_path}")
    assert datasets.load(f"folder:{tmp_path}", image_size=(5, 2)).images.shape == (2, 5, 2, 1)


def test_folder_refuses(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        datasets.load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="at least two class folders; it holds none"):
        datasets.load(f"folder:{tmp_path}")
    write_images(tmp_path / "a", [1])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        datasets.load(f"folder:{tmp_path}")
    (tmp_path / "b" / "0.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1 of the 2 image files.*cannot be read: b/0.png \("):
        datasets.load(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match=r"holds no images: .*/b\. Every class needs some"):
        datasets.load(f"folder:{tmp_path}", skip_broken=True)
    with pytest.raises(ValueError, match="skip_broken applies to folders"):
        datasets.load("digits", skip_broken=True)


def test_folder_formats_depths_and_links(tmp_path):
    shades = iter(range(0, 250, 10))
    for place, suffix in (
        ("a", "webp"),
        ("a", "TIF"),
        ("a/inside/deeper", "gif"),
        ("a/inside", "jpeg"),
        ("b", "ppm"),
        ("elsewhere", "png"),
    ):
        write_images(tmp_path / "data" / place, [next(shades)], suffix=suffix)
    (tmp_path / "data" / "elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "one.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "data" / "a" / "inside" / "back").symlink_to(tmp_path / "data")  # would make b's images a's
    (tmp_path / "data" / "a" / "round").symlink_to(tmp_path / "data" / "a" / "round")
    dataset = datasets.load(f"folder:{tmp_path / 'data'}")
    assert dataset.example_ids.tolist() == [
        "a/0.TIF",
        "a/0.webp",
        "a/inside/0.jpeg",
        "a/inside/deeper/0.gif",
        "b/0.ppm",
        "b/link/0.png",
        "b/one.png",
    ]
    assert dataset.images[:, 0, 0, 0].tolist() == [10, 0, 30, 20, 40, 50, 50]
    assert dataset.notes[0].endswith("names are not those of images: 2, a/inside/back, a/round.")
    assert dataset.notes[1].endswith("which belong to those classes: 3.")


def test_folder_names_and_counts_what_is_left_out(tmp_path):
    for name in "ab":
        write_images(tmp_path / name, [1, 2])
    for name in (
        "a/Thumbs.db",
        "a/.hidden.png",
        "b/notes.txt",
        "b/x.heic",
        "b/film.mpg",
        "b/plot.eps",
        "README.md",
    ):
        (tmp_path / name).write_bytes(b"x")
    write_images(tmp_path / ".cache", [1])
    dataset = datasets.load(f"folder:{tmp_path}")
    assert len(dataset.labels) == 4
    assert len(dataset.notes) == 1
    assert dataset.notes[0].startswith(
        f"Left out of {tmp_path}, since their names are not those of images: 8, "
    )
    assert dataset.notes[0].endswith(
        ".cache, README.md, a/.hidden.png, a/Thumbs.db, b/film.mpg, b/notes.txt, b/plot.eps, b/x.heic."
    )
    assert datasets.subset(dataset, np.arange(2)).notes == dataset.notes


def test_folder_broken_files_are_named_at_once_or_left_out(tmp_path):
    write_images(tmp_path / "a", list(range(20)))
    write_images(tmp_path / "b", list(range(3)))
    for i in range(12):
        path = tmp_path / "a" / f"{i}.png"
        path.write_bytes(b"" if i == 0 else path.read_bytes()[: 20 + i])
    with pytest.raises(ValueError, match=r"^12 of the 23 image files in .*skip_broken=True") as caught:
        datasets.load(f"folder:{tmp_path}")
    assert "a/0.png (empty)" in str(caught.value)
    assert str(caught.value).count(".png (") == 10
    assert " and 2 more." in str(caught.value)
    dataset = datasets.load(f"folder:{tmp_path}", skip_broken=True)
    assert dataset.images[:, 0, 0, 0].tolist() == [*range(12, 20), 0, 1, 2]
    assert dataset.labels.tolist() == [0] * 8 + [1] * 3
    assert len(dataset.example_ids) == len(dataset.official_split) == 11
    assert "left out as broken: 12 of 23, a/0.png (empty)" in dataset.notes[0]


def test_folder_decisions_are_counted(tmp_path):
    write_images(tmp_path / "a", [1])
    write_images(tmp_path / "b", [1])
    for i, alpha in enumerate((0, 128, 255)):  # the last is opaque
        Image.new("LA", (4, 3), (0, alpha)).save(tmp_path / "b" / f"clear{i}.png")
    dataset = datasets.load(f"folder:{tmp_path}")
    assert dataset.notes == (f"Images of {tmp_path} with transparency, which was composited on white: 2.",)
    assert dataset.images[2:, 0, 0, 0].tolist() == [255, 127, 0]


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("training", "testing"), ("TRAIN", "val"), ("train", "valid")]
)
def test_folder_splits_are_known_however_they_are_spelled(tmp_path, names):
    for split in names:
        for name in "ab":
            write_images(tmp_path / split / name, [1])
    dataset = datasets.load(f"folder:{tmp_path}")
    assert dataset.class_names == ("a", "b")
    assert dataset.official_split.tolist() == [0, 0, 1, 1]


def test_folder_splits_without_their_pair_are_not_taken_for_classes(tmp_path):
    for place in ("Train/a", "Train/b", "unlabelled"):
        write_images(tmp_path / place, [1])
    with pytest.raises(
        ValueError, match=r"Train holds folders and looks like one split.*no pair of train and test"
    ):
        datasets.load(f"folder:{tmp_path}")
    assert datasets.load(f"folder:{tmp_path / 'Train'}").class_names == ("a", "b")
    for name in ("valid", "invalid"):  # classes that only sound like splits
        write_images(tmp_path / "quality" / name, [1])
    assert datasets.load(f"folder:{tmp_path / 'quality'}").class_names == ("invalid", "valid")
    (tmp_path / "one").mkdir()
    (tmp_path / "quality").rename(tmp_path / "one" / "quality")
    with pytest.raises(ValueError, match=r"it holds quality; if the classes lie in it, give .*/quality"):
        datasets.load(f"folder:{tmp_path / 'one'}")


def test_folder_third_split_is_noted_as_training(tmp_path):
    for split in ("train", "val", "test"):
        for name in "ab":
            write_images(tmp_path / split / name, [1])
    assert datasets.load(f"folder:{tmp_path}").notes == (
        f"{tmp_path / 'val'} is used as training data; the validation split is drawn from all training data.",
    )


def test_folder_of_photos_is_cut_to_one_size(tmp_path):
    stripes = np.repeat(np.array([10, 20, 30], np.uint8), 8)[None].repeat(8, 0)
    for name, pixels in (("a", stripes), ("b", stripes.T)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name / "0.png")
    dataset = datasets.load(f"folder:{tmp_path}", image_size=(4, 4))
    assert dataset.images.shape == (2, 4, 4, 1)
    assert np.abs(dataset.images.astype(int) - 20).max() <= 1  # Lanczos looks a little beyond the cut


def test_folder_names_of_any_bytes(tmp_path):
    for name in (b"caf\xe9", b"b"):  # Latin-1, as old archives unpack
        write_images(tmp_path / os.fsdecode(name), [1, 2, 3])
    dataset = datasets.load(f"folder:{tmp_path}")
    assert dataset.class_names == ("b", r"caf\xe9")
    assert len(datasets.digest(dataset)) == 64
    assert len(datasets.split_ids(dataset, validation=0, test=0)["train"]) == 6


# What a split may hide.


def test_split_notes_count_what_is_missing_twice_or_blank():
    dataset = make_dataset(100, 4)
    noise = np.random.default_rng(0).integers(0, 256, (100, 2, 2, 1), np.uint8)
    dataset = dataset._replace(images=noise, class_names=("cat", "dog", "Cow", "cow"))
    split = {"train": np.arange(60), "validation": np.arange(60, 80), "test": np.arange(80, 100)}
    case_alone = "Names of classes that differ only in case, accents or spaces: Cow and cow."
    assert datasets.split_notes(dataset, split) == (case_alone,)
    noise[[80, 81, 82]] = noise[[0, 1, 1]]  # labels 0, 1, 2 beside 0, 1, 1
    noise[61] = noise[3]  # label 1 beside 3
    noise[[5, 9]] = np.array([7, 8], np.uint8).reshape(2, 1, 1, 1)
    split["validation"] = np.array([61, 65, 64])  # labels 1, 1 and 0
    assert datasets.split_notes(dataset, split) == (
        case_alone,
        "Classes without a validation image: 2 of 4, Cow, cow.",
        "Images of validation that are also in train, pixel for pixel: 1 of 3.",
        "Images of test that are also in train, pixel for pixel: 3 of 20.",
        "Images that occur with more than one label: 2.",
        "Images of a single colour: 2 of 100.",
    )


def test_split_notes_are_quick():
    dataset = make_dataset(60_000)
    dataset = dataset._replace(
        images=np.random.default_rng(0).integers(0, 256, (60_000, 28, 28, 1), np.uint8)
    )
    split = datasets.split_ids(dataset)
    start = time.process_time()
    assert datasets.split_notes(dataset, split) == ()
    assert time.process_time() - start < 3  # 0.4 s on an idle core


# Names and directories.


@pytest.mark.parametrize(
    ("name", "suggestion"), [("minst", "'mnist'"), ("digit", "'digits'"), ("cifar-10", "'cifar10'")]
)
def test_unknown_name_has_a_suggestion(tmp_path, name, suggestion):
    with pytest.raises(ValueError, match=rf"unknown data set '{name}'.*Did you mean {suggestion}"):
        datasets.load(name, data_dir=tmp_path)


@pytest.mark.parametrize("name", ["", "../mnist", "/etc", "qqqqqqqq"])
def test_odd_names_are_unknown(tmp_path, name):
    with pytest.raises(ValueError, match=r"^unknown data set"):
        datasets.load(name, data_dir=tmp_path)


def test_directories_that_cannot_be_read_name_the_command(tmp_path):
    command = "python -m experiments.prepare_data --dataset=mnist"
    with pytest.raises(ValueError, match=f"does not exist.*{command}"):
        datasets.load("mnist", data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"holds no prepared mnist.*{command}"):
        datasets.load("mnist", data_dir=tmp_path)
    (tmp_path / ".mnist.incomplete").mkdir()
    with pytest.raises(ValueError, match=f"half-written.*{command}"):
        datasets.load("mnist", data_dir=tmp_path)
    (tmp_path / "cifar10" / "incomplete.ABC_3.0.2").mkdir(parents=True)  # as TFDS leaves it
    with pytest.raises(ValueError, match=r"cifar10 in .* is half-written"):
        datasets.load("cifar10", data_dir=tmp_path)
    with pytest.raises(ValueError, match="tfds build kmnist"):
        datasets.load("kmnist", data_dir=tmp_path)


def test_data_dir_defaults_to_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "there"))
    with pytest.raises(ValueError, match="there does not exist"):
        datasets.load("mnist")


@pytest.mark.parametrize(("name", "size"), [("digits", (8, 8)), ("mnist", (0, 8))])
def test_image_size_is_checked(name, size):
    with pytest.raises(ValueError, match="image_size"):
        datasets.load(name, image_size=size)


# The cache of decoded images, written without TFDS.


@pytest.fixture
def cached(tmp_path):
    path = tmp_path / "mnist" / "3.0.1"
    path.mkdir(parents=True)
    (path / "dataset_info.json").write_text("{}")
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
    dataset = make_dataset(20)
    arrays = tfds_cache.Arrays(
        images, dataset.labels, dataset.example_ids, dataset.official_split, dataset.class_names
    )
    (path / "kdjax_decoded").mkdir()
    tfds_cache._write_cache(path / "kdjax_decoded" / "native", path, arrays)
    return tmp_path


def test_cache_is_read_without_tfds(cached, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    dataset = datasets.load("mnist", data_dir=cached)
    assert dataset.name == "mnist"
    assert dataset.images.shape == (20, 4, 4, 1)
    assert dataset.class_names == tuple("0123456789")


def test_a_flipped_byte_in_the_cache_is_refused_every_time(cached):
    folder = cached / "mnist" / "3.0.1" / "kdjax_decoded" / "native"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        "example_ids.npy",
        "images.npy",
        "labels.npy",
        "manifest.json",
        "official_split.npy",
    ]
    rng, refused = random.Random(0), 0
    for trial in range(100):
        file = files[trial % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"is damaged.*delete"):
            datasets.load("mnist", data_dir=cached)
        refused += 1
        file.write_bytes(good)
    assert refused == 100
    assert len(datasets.load("mnist", data_dir=cached).labels) == 20


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "manifest.json"])
def test_a_truncated_file_in_the_cache_is_refused(cached, file):
    path = cached / "mnist" / "3.0.1" / "kdjax_decoded" / "native" / file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        datasets.load("mnist", data_dir=cached)


def test_digests_of_digits_do_not_drift():
    # derived here from scikit-learn's own values, so that a change of scaling or order is noticed
    from sklearn.datasets import load_digits

    digits = load_digits()
    expected = hashlib.sha256((digits.images * 255 // 16).astype(np.uint8).tobytes()).hexdigest()
    assert hashlib.sha256(datasets.load("digits").images.tobytes()).hexdigest() == expected
