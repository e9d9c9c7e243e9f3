"""How a teacher reaches the student: cached answers of each image or view, or online; or a file of any framework."""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import data, methods, models, pipeline
from kdjax import teacher as teachers
from kdjax.models.mlp import Mlp
from kdjax.recipe import Recipe
from kdjax.types import Normalisation, Outputs, Weights

SHAPE, MOVE = (8, 8, 1), {"padding": 2, "flip": True}


class Teacher(NamedTuple):
    network: models.Network
    weights: Weights
    normalisation: Normalisation

    def logits(self, pixels):
        """Its answer to pixels in [0, 255], from the formula."""
        mean, std = (np.asarray(values, np.float32) for values in self.normalisation)
        inputs = (np.asarray(pixels, np.float32) / 255 - mean) / std
        return self.network.apply(*self.weights, jnp.asarray(inputs), train=False)[0].logits


@pytest.fixture(scope="module")
def loaded():
    images = np.random.default_rng(0).integers(0, 256, (60, *SHAPE), np.uint8)
    return data.from_arrays(images, np.arange(60) % 3)


@pytest.fixture(scope="module")
def dataset(loaded):
    return data.split(loaded, num_train=20)


@pytest.fixture(scope="module")
def teacher():
    """Trained under other statistics than those of the data set."""
    network = models.from_linen(Mlp(num_classes=3, widths=(8,)), SHAPE)
    return Teacher(network, Weights(*network.init(0)), Normalisation((0.9,), (0.1,)))


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)


class TestAnswers:
    def test_of_the_unaugmented_images(self, teacher, dataset, tmp_path):
        signal = teachers.answers(teacher, dataset, directory=tmp_path)
        assert (signal.views, signal.online, list(signal.answers)) == (1, None, ["logits"])
        close(signal.answers["logits"][:, 0], teacher.logits(dataset.images))

    def test_of_stored_views(self, teacher, dataset, tmp_path):
        signal = teachers.answers(teacher, dataset, mode="views", views=3, move=MOVE, directory=tmp_path)
        assert signal.answers["logits"].shape == (len(dataset.images), 3, 3)
        index = jnp.arange(len(dataset.images), dtype=jnp.int32)
        stored = jax.jit(lambda *args: data.stored_view(*args, seed=teachers.VIEW_SEED, **MOVE))
        for view in range(3):
            close(signal.answers["logits"][:, view], teacher.logits(stored(dataset.images, index, view)))

    def test_online(self, teacher, dataset):
        signal = teachers.answers(teacher, dataset, mode="online")
        batch = {"image": jnp.asarray(dataset.images[:5])}
        assert teachers.attach(signal, None, batch, 0) == batch

        def total(weights, image):
            return jnp.sum(teachers.attach_online(signal, weights, {"image": image})["teacher_logits"] ** 2)

        found = teachers.attach_online(signal, signal.weights, batch)
        close(found["teacher_logits"], teacher.logits(dataset.images[:5]))
        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(
            signal.weights, batch["image"].astype(jnp.float32)
        )
        assert all(not np.any(gradient) for gradient in jax.tree.leaves(gradients))

    def test_online_sees_the_augmented_pixels_normalised_once_with_its_own_statistics(self, teacher, dataset):
        signal = teachers.answers(teacher, dataset, mode="online")
        recipe, key, index = Recipe(**MOVE), jax.random.key(3), jnp.array([0, 7, 30, 7])
        train_batch, _ = pipeline.make_batches(dataset, recipe, methods.kd(), signal)
        batch = jax.jit(train_batch)(pipeline.resident(dataset, signal), index, key)
        keys = data.example_keys(jax.random.split(key)[0], index)
        pixels = jax.jit(lambda *args: data.crop_and_flip(*args, **MOVE))(
            dataset.images[np.asarray(index)], keys
        )
        close(batch["teacher_logits"], teacher.logits(pixels))
        close(batch["image"], data.normalise(pixels, **dataset.normalisation._asdict()))

    def test_features_are_half_precision(self, teacher, dataset, tmp_path):
        signal = teachers.answers(teacher, dataset, features=["embedding"], directory=tmp_path)
        assert {name: rows.shape[1:] for name, rows in signal.answers.items()} == {
            "logits": (1, 3),
            "embedding": (1, 8),
        }
        assert signal.answers["embedding"].dtype == np.float16

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "center"}, "one of the modes centre, views, online, got 'center'"),
            ({"features": ["stage9"]}, "has no feature stage9; it has embedding, stage1"),
            ({"mode": "views"}, "pass directory=, or use mode='online'"),
        ],
    )
    def test_what_is_refused(self, teacher, dataset, options, message):
        with pytest.raises(ValueError, match=message):
            teachers.answers(teacher, dataset, **options)

    def test_a_directory_of_another_normalisation_is_refused(self, teacher, dataset, tmp_path):
        teachers.answers(teacher, dataset, directory=tmp_path)
        other = teacher._replace(normalisation=dataset.normalisation)
        with pytest.raises(ValueError, match="computed from something else"):
            teachers.answers(other, dataset, directory=tmp_path)


def test_attach_selects_the_view_of_each_example(dataset):
    rows = np.arange(len(dataset.images) * 2 * 3, dtype=np.float32).reshape(-1, 2, 3)
    shapes = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    signal = teachers.TeacherSignal({"logits": rows}, Outputs(shapes, {}), views=2)
    batch = {"index": jnp.array([4, 0, 4])}
    found = jax.jit(lambda view: teachers.attach(signal, signal.answers, batch, view))(jnp.array([0, 1, 1]))
    np.testing.assert_array_equal(found["teacher_logits"], rows[[4, 0, 4], [0, 1, 1]])


class TestFromFile:
    def write(self, path, loaded, order=None, **changes):
        """Logits and an embedding per loaded image; the first logit is the image's number."""
        order = np.arange(len(loaded.images)) if order is None else order
        logits = np.stack([order, -order, 0 * order], axis=1).astype(np.float32)
        arrays = {"logits": logits, "embedding": np.tile(logits, 2), "example_ids": loaded.example_ids[order]}
        arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
        np.savez(path, **arrays)
        return path

    def numbers(self, loaded, dataset):
        """The number among the loaded images of each image of the data set."""
        row = {str(name): i for i, name in enumerate(loaded.example_ids)}
        return [row[str(name)] for name in dataset.example_ids]

    def test_ids_in_any_order_find_their_rows(self, loaded, dataset, tmp_path):
        order = np.random.default_rng(0).permutation(len(loaded.images))
        signal = teachers.from_file(self.write(tmp_path / "a.npz", loaded, order), dataset, loaded=loaded)
        expected = self.numbers(loaded, dataset)
        np.testing.assert_array_equal(signal.answers["logits"][:, 0, 0], expected)
        np.testing.assert_array_equal(signal.answers["embedding"][:, 0, 3], expected)
        assert signal.shapes.logits.shape == (2, 3)
        assert signal.shapes.features["embedding"].shape == (2, 6)

    def test_a_digest_of_the_images_stands_in_for_ids(self, loaded, dataset, tmp_path):
        digest = hashlib.sha256(loaded.images.tobytes()).hexdigest()
        path = self.write(tmp_path / "a.npz", loaded, example_ids=None, images_sha256=np.array(digest))
        signal = teachers.from_file(path, dataset, loaded=loaded)
        np.testing.assert_array_equal(signal.answers["logits"][:, 0, 0], self.numbers(loaded, dataset))
        with pytest.raises(ValueError, match="other images than arrays, or in another order"):
            teachers.from_file(path, dataset, loaded=loaded._replace(images=loaded.images[::-1]))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"example_ids": None},
                "must hold logits, and example_ids or images_sha256.*holds embedding, logits",
            ),
            ({"logits": None}, "must hold logits"),
            ({"example_ids": np.array([f"train/{i + 9:06d}" for i in range(60)])}, "no answers for [1-9]"),
            ({"logits": np.zeros((60, 4), np.float32)}, r"must be \[n, 3\], got \[60, 4\]"),
            ({"embedding": np.zeros((59, 6), np.float32)}, "embedding of .* has 59 rows for 60 examples"),
            ({"embedding": np.full((60, 6), np.nan, np.float32)}, "embedding of .* must be finite floats"),
            ({"logits": np.zeros((60, 3), np.int32)}, "logits of .* must be finite floats, got int32"),
        ],
    )
    def test_what_is_refused(self, loaded, dataset, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            teachers.from_file(self.write(tmp_path / "a.npz", loaded, **changes), dataset, loaded=loaded)

    def test_a_file_that_is_no_npz_is_refused(self, loaded, dataset, tmp_path):
        (tmp_path / "a.npz").write_bytes(b"PK")
        with pytest.raises(ValueError, match=r"is no readable \.npz of plain arrays"):
            teachers.from_file(tmp_path / "a.npz", dataset, loaded=loaded)
