"""data.split and from_arrays: which examples a run uses, and what identifies them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import data, files


def make_dataset(count=200, *, channels=1, name="arrays", **options):
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, channels), np.uint8)
    return data.from_arrays(images, np.arange(count) % 2, name=name, **options)


class TestFromArrays:
    def test_equals_the_same_arrays_in_a_file(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (20, 4, 4), np.uint8)
        labels, test_labels = np.array(["cat", "dog"] * 10), np.array(["dog", "cat"])
        given = {"images": images, "labels": labels, "test_images": images[:2], "test_labels": test_labels}
        np.savez(tmp_path / "x.npz", **given)
        stored = data.load(str(tmp_path / "x.npz"))
        found = data.from_arrays(images, labels, test_images=images[:2], test_labels=test_labels)
        assert data.digest(found) == data.digest(stored)
        assert (found.class_names, found.example_ids[-1]) == (("cat", "dog"), "test/000001")
        np.testing.assert_array_equal(found.official_split, stored.official_split)

    def test_names_classes_and_refuses_half_a_test_split(self):
        assert make_dataset(class_names=["off", "on"]).class_names == ("off", "on")
        with pytest.raises(ValueError, match="may hold test_images with test_labels"):
            make_dataset(test_images=np.zeros((2, 4, 4), np.uint8))


class TestSplit:
    def test_keeps_only_the_examples_used_and_normalises_by_the_training_images(self):
        whole, used = make_dataset(channels=3), data.split(make_dataset(channels=3), num_train=50)
        assert used.fingerprint["train"] == 50
        every = np.sort(np.concatenate(list(used.splits.values())))
        np.testing.assert_array_equal(every, np.arange(len(used.images)))
        train = used.images[used.splits["train"]] / 255
        np.testing.assert_allclose(used.normalisation.mean, train.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(used.normalisation.std, train.std((0, 1, 2)), rtol=1e-6)
        rows = {str(name): row for row, name in enumerate(whole.example_ids)}
        for name, image in zip(used.example_ids, used.images, strict=True):
            np.testing.assert_array_equal(image, whole.images[rows[str(name)]])

    def test_a_larger_sample_contains_a_smaller_one(self):
        def sample(size):
            found = data.split(make_dataset(), num_train=size)
            return set(found.example_ids[found.splits["train"]])

        assert sample(20) < sample(80) < sample(0)

    def test_refuses_more_examples_than_there_are_unless_clipped(self):
        with pytest.raises(ValueError, match=r"num_train=1000 is not between 1 and the \d+ examples"):
            data.split(make_dataset(), num_train=1000)
        clipped, whole = data.split(make_dataset(), num_train=1000, clip=True), data.split(make_dataset())
        assert clipped.fingerprint == whole.fingerprint

    def test_keeps_a_patient_in_one_split(self):
        images = np.random.default_rng(0).integers(0, 256, (300, 4, 4), np.uint8)
        cells = data.from_arrays(images, np.arange(300) % 2, name="malaria")
        names = np.array([f"Uninfected/C{i % 30}P1_cell_{i}.png" for i in range(300)])
        cells = cells._replace(example_ids=names)

        def shared(dataset):
            patients = data.groups_of(dataset, data.GROUP_PATTERNS["malaria"])
            return set(patients[dataset.splits["train"]]) & set(patients[dataset.splits["test"]])

        assert not shared(data.split(cells))
        assert shared(data.split(cells, by_group=False))

    def test_a_file_named_like_a_set_of_patients_has_none(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8)
        np.savez(tmp_path / "malaria.npz", images=images, labels=np.arange(60) % 2)
        assert len(data.split(data.load(str(tmp_path / "malaria.npz"))).labels) == 60

    def test_label_noise_is_of_training_examples_and_counted(self):
        clean, noisy = data.split(make_dataset()), data.split(make_dataset(), label_noise=0.5)
        train = clean.splits["train"]
        assert set(noisy.mislabelled) <= set(train)
        assert len(noisy.mislabelled) == round(0.5 * len(train))
        np.testing.assert_array_equal(np.flatnonzero(clean.labels != noisy.labels), noisy.mislabelled)
        assert noisy.notes == (
            *clean.notes,
            f"Training labels made wrong: {len(noisy.mislabelled)} of {len(train)}.",
        )

    @given(
        st.integers(1, 100), st.integers(1, 17), st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted)
    )
    @settings(max_examples=30, deadline=None)
    def test_every_sample_sees_the_same_wrong_labels(self, num_train, num_validation, fractions):
        dataset = make_dataset()
        true = dict(zip(dataset.example_ids, dataset.labels, strict=True))
        whole = data.split(dataset, label_noise=fractions[1])
        expected = dict(zip(whole.example_ids, whole.labels, strict=True))
        options = {"num_train": num_train, "num_validation": num_validation}
        part, less = (data.split(dataset, label_noise=fraction, **options) for fraction in fractions[::-1])
        wrong = set(part.example_ids[part.mislabelled])
        assert wrong == {name for name in part.example_ids if expected[name] != true[name]}
        assert set(less.example_ids[less.mislabelled]) <= wrong
        assert [expected[name] for name in part.example_ids] == part.labels.tolist()
        for split in ("validation", "test"):
            ids = part.splits[split]
            assert [true[name] for name in part.example_ids[ids]] == part.labels[ids].tolist()

    def test_notes_count_what_its_own_examples_hide_and_are_printed_once(self, capsys):
        images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
        given = {"test_images": images[:4], "test_labels": np.array([3, 3, 3, 3])}
        dataset = data.from_arrays(images, np.array([3, 8])[np.arange(40) % 2], **given)
        notes = data.split(dataset, label_noise=0.5).notes
        assert notes == (
            "The labels of the arrays are 3, 8: they are numbered 0 to 1, and their own numbers are the names of the "
            "classes.",
            "Classes without a test image: 1 of 2, 8.",
            "Images of test that are also in train, pixel for pixel: 4 of 4.",
            "Images that occur with more than one label: 2.",
            "Training labels made wrong: 17 of 34.",
        )
        data.split(dataset)
        assert capsys.readouterr().err == "".join(f"note: {note}\n" for note in notes)


class TestFingerprint:
    def test_tells_all_data_and_splits_apart_that_give_other_numbers(self):
        dataset = data.split(make_dataset(class_names=["off", "on"]))
        splits, labels, images = dataset.splits, dataset.labels.copy(), dataset.images.copy()
        labels[5] = 1 - labels[5]
        images[7, 0, 0, 0] ^= 1
        moved = {
            **splits,
            "train": splits["train"][1:],
            "test": np.append(splits["test"], splits["train"][0]),
        }
        changed = dataset._replace(content="")  # the digest of the whole, computed again where it is not kept
        found = [
            dataset.fingerprint,
            changed._replace(labels=labels).fingerprint,
            changed._replace(images=images).fingerprint,
            changed._replace(example_ids=dataset.example_ids[::-1]).fingerprint,
            data.split(make_dataset(class_names=["off", "on"]), label_noise=0.02).fingerprint,
            dataset._replace(splits=moved).fingerprint,
            dataset._replace(splits={**splits, "train": splits["train"][::-1]}).fingerprint,
            dataset._replace(class_names=dataset.class_names[::-1]).fingerprint,
        ]
        assert len({files.digest_json(one) for one in found}) == len(found)
        assert changed._replace(images=dataset.images.copy()).fingerprint == found[0]
        assert json.loads(json.dumps(found[0])) == found[0]

    def test_needs_splits(self):
        with pytest.raises(ValueError, match=r"once it is split: call kdjax\.data\.split"):
            _ = make_dataset().fingerprint
