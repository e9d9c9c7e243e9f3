"""Maps as columns of an experiment: whose they are, where they go with an image, what a control keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import common
from experiments.common import training
from kdjax import attributions, data, landscape, models, train


@pytest.fixture(scope="module")
def task():
    return common.make_task("digits", data_dir=None, num_train=24, num_validation=8)


@pytest.fixture(scope="module")
def teacher(task):
    network = models.build("digits_student", num_classes=10)
    params, state = models.init(network, task.source.images.shape[1:], seed=0)
    # Biases too: without them a ReLU network is linear along a path from zero.
    params = jax.tree.map(
        lambda p, x: p + 0.1 * x, params, landscape.random_direction(jax.random.key(0), params)
    )
    return common.Teacher(
        "digits_student", network, train.Weights(params, state), task.mean, task.std, {}, {}, []
    )


class TestExplained:
    def test_are_the_teachers_maps_of_the_training_images(self, task, teacher, tmp_path):
        found = common.explained_by(
            task, teacher, directory=tmp_path, stages=("stage1",), bound=0.02, most=64
        )
        ids = task.split["train"]
        rest = np.setdiff1d(np.arange(len(task.source.images)), ids)
        for rows in found.columns.values():
            assert len(rows) == len(task.source.images)
            assert not rows[rest].any()
            assert rows[ids].any(axis=tuple(range(1, rows.ndim))).all()

        x = data.normalise(jnp.asarray(task.source.images[ids]), mean=task.mean, std=task.std)
        apply_fn = models.apply_fn(teacher.module)

        def outputs(x):
            return apply_fn(*teacher.weights, x, train=False)[0]

        exact = attributions.integrated_gradients(
            attributions.class_score(lambda x: outputs(x).logits),
            x,
            targets=jnp.asarray(task.source.labels[ids].astype(np.int32)),
            num_steps=400,
        )
        maps = np.asarray(attributions.importance(exact.values))
        maps = 255 * maps / maps.max(axis=(1, 2, 3), keepdims=True)
        assert np.abs(found.columns["map"][ids, 0] - maps).mean() < 3
        assert len(found.nodes) == len(found.residual) == len(ids)
        assert np.all((found.residual <= 0.0201) | (found.nodes == 65))
        energy = np.mean(np.asarray(outputs(x).features["stage1"]) ** 2, axis=-1)
        energy /= np.linalg.norm(energy.reshape(len(ids), -1), axis=-1)[:, None, None]
        np.testing.assert_allclose(found.columns["attention_stage1"][ids, 0, :, :, 0], energy, atol=1e-3)

    def test_are_read_back_and_belong_to_their_labels(self, task, teacher, tmp_path):
        common.explained_by(task, teacher, directory=tmp_path)
        written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        common.explained_by(task, teacher, directory=tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
        turned = task._replace(source=task.source._replace(labels=(task.source.labels + 1) % 10))
        with pytest.raises(ValueError, match="labels"):
            common.explained_by(turned, teacher, directory=tmp_path)

    def test_pictures(self, task, teacher, tmp_path):
        explained = common.explained_by(task, teacher, directory=tmp_path)
        shown = common.pictures(task, explained, count=2)
        first = task.split["train"][0]
        np.testing.assert_array_equal(shown[0]["image"], task.source.images[first])
        assert np.max(shown[0]["map"]) == 1.0


class TestDisturbed:
    column = np.random.default_rng(0).normal(size=(10, 1, 3, 4, 1)).astype(np.float16)
    ids = np.asarray([1, 2, 4, 5, 7, 8, 9])

    def test_misaligned_rows_are_those_of_others(self):
        found = common.disturbed(self.column, self.ids, variant="misaligned", seed=0)
        rest = np.setdiff1d(np.arange(10), self.ids)
        np.testing.assert_array_equal(found[rest], self.column[rest])
        order = [
            int(np.flatnonzero((self.column == row).all(axis=(1, 2, 3, 4)))[0]) for row in found[self.ids]
        ]
        assert sorted(order) == self.ids.tolist()
        assert sum(a != b for a, b in zip(order, self.ids, strict=True)) > 3

    def test_noise_keeps_the_values_of_each_row(self):
        found = common.disturbed(self.column, self.ids, variant="noise", seed=0)
        flat, own = (x.reshape(10, -1) for x in (found, self.column))
        np.testing.assert_array_equal(np.sort(flat), np.sort(own))
        assert (flat != own).any(axis=1).sum() == len(self.ids)

    def test_aligned_is_the_column_and_nothing_is_written_into_it(self):
        before = self.column.copy()
        assert common.disturbed(self.column, self.ids, variant="aligned", seed=0) is self.column
        for variant in ("misaligned", "noise"):
            common.disturbed(self.column, self.ids, variant=variant, seed=0)
        np.testing.assert_array_equal(self.column, before)

    def test_refuses(self):
        with pytest.raises(ValueError, match="aligned, misaligned, noise, got 'shuffled'"):
            common.disturbed(self.column, self.ids, variant="shuffled", seed=0)


class TestBatches:
    """The marked pixel, through the batches that a trainer makes."""

    recipe = common.Recipe(1, 8, 1e-3, padding=2, flip=True)

    def batches(self, task, **more):
        """One batch of images with one white pixel each, whose maps have it too."""
        random = np.random.default_rng(0)
        images = np.zeros_like(task.source.images)
        for image, (row, column) in zip(images, random.integers(2, 6, (len(images), 2)), strict=True):
            image[row, column] = 255
        halved = images.reshape(len(images), 4, 2, 4, 2, 1).mean(axis=(2, 4)).astype(np.float16)
        columns = {"map": images[:, None], "half": halved[:, None]}
        own = task._replace(
            mean=(0.0,), std=(1.0,), arrays=dict(task.arrays) | {"image": jnp.asarray(images)}
        )
        taught = common.Taught(columns, **more)
        make, evaluate = training.make_batches(own, self.recipe, taught)
        index = jnp.asarray(task.split["train"][:16].astype(np.int32))
        resident = {"data": own.arrays, "columns": columns}
        return make(resident, index, jax.random.key(1)), evaluate(resident, index), images[np.asarray(index)]

    def test_a_map_goes_where_its_image_goes(self, task):
        batch, still, images = self.batches(task, maps=("teacher_map", "teacher_half"))
        np.testing.assert_allclose(batch["image"], batch["teacher_map"] / 255, atol=1e-6)
        assert (np.asarray(batch["teacher_map"]) != images).any(axis=(1, 2, 3)).sum() > 8
        # The pixel of a map of half the size is where it lies, or next to it, with parts of its weight.
        cells = np.asarray(batch["teacher_map"], np.float32).reshape(16, 4, 2, 4, 2, 1).mean(axis=(2, 4))
        np.testing.assert_allclose(
            np.asarray(batch["teacher_half"]).sum((1, 2, 3)), cells.sum((1, 2, 3)), rtol=1e-2
        )
        rows, columns = (np.arange(4).reshape(shape) + 0.5 for shape in ((1, 4, 1, 1), (1, 1, 4, 1)))
        for axis in (rows, columns):
            centre = (np.asarray(batch["teacher_half"]) * axis).sum((1, 2, 3)) / 63.75
            assert np.abs(centre - (cells * axis).sum((1, 2, 3)) / 63.75).max() <= 0.51
        np.testing.assert_allclose(still["image"], images / 255, atol=1e-6)
        np.testing.assert_array_equal(still["teacher_map"], images)

    def test_a_map_that_is_not_named_stays(self, task):
        batch, _, images = self.batches(task)
        np.testing.assert_array_equal(batch["teacher_map"], images)

    def test_blends_see_the_moved_map(self, task):
        batch, _, _ = self.batches(task, maps=("teacher_map",), blend=common.overlaid(probability=1.0))
        np.testing.assert_allclose(batch["image"], batch["teacher_map"] / 255, atol=1e-5)  # white on white

    def test_a_choice_of_keys_is_that_of_image_and_map(self, task):
        def other(batch, keys, move):
            assert move(batch["teacher_map"], keys).shape == batch["teacher_map"].shape
            return jax.vmap(lambda key: jax.random.fold_in(key, 9))(keys)

        plain, _, _ = self.batches(task, maps=("teacher_map",))
        batch, _, _ = self.batches(task, maps=("teacher_map",), choose=other)
        np.testing.assert_allclose(batch["image"], batch["teacher_map"] / 255, atol=1e-6)
        assert (np.asarray(batch["image"]) != np.asarray(plain["image"])).any()


@pytest.fixture(scope="module")
def module(alone):
    with alone("experiments.ig_cifar10") as module:
        flags.FLAGS(["test", "--workdir=unused"])
        yield module


class TestStudy:
    """The parts of experiments.ig_cifar10 that decide what a student learns from."""

    @pytest.fixture
    def study(self, module):
        with flagsaver.flagsaver():
            yield module

    def test_match_is_the_distance_of_the_maps_of_gradient_times_input(self, study, task, teacher):
        network, weights = teacher.module, teacher.weights
        apply_fn = study.with_pullback(models.apply_fn(network))
        x, labels = (
            jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 1)), jnp.float32),
            jnp.arange(6),
        )
        outputs, _ = apply_fn(*weights, x, train=True)
        maps = jnp.abs(jnp.asarray(np.random.default_rng(1).normal(size=(6, 8, 8, 1)), jnp.float32))
        batch = {"image": x, "label": labels, "teacher_map": maps, "teacher_logits": outputs.logits}
        terms = study.objective(study.TABLE["kd+match"], ())(outputs, batch)

        score = attributions.class_score(
            lambda x: models.apply_fn(network)(*weights, x, train=False)[0].logits
        )
        own = attributions.gradient_times_input(score, x, targets=labels)
        flat, theirs = (np.abs(np.asarray(a)).reshape(6, -1) for a in (own, maps))
        cosine = np.sum(flat * theirs, 1) / np.linalg.norm(flat, axis=1) / np.linalg.norm(theirs, axis=1)
        np.testing.assert_allclose(terms["match"], 0.8 * np.mean(2 - 2 * cosine), rtol=1e-4)
        np.testing.assert_allclose(terms["soft"], 0, atol=1e-6)  # the teacher says what the student says

        def loss(params):
            outputs, _ = apply_fn(params, weights.model_state, x, train=True)
            return study.objective(study.TABLE["kd+match"], ())(outputs, batch)["match"]

        assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss)(weights.params)))

    def test_what_differentiates_through_a_pullback_is_the_second_derivative(self, study, teacher):
        network, (params, state) = teacher.module, teacher.weights
        apply_fn = models.apply_fn(network)
        key, cotangent = jax.random.key(1), jax.nn.one_hot(jnp.arange(6), 10)
        x, weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8, 8, 1)), jnp.float32)

        def through_pullback(params):
            outputs, _ = study.with_pullback(apply_fn)(params, state, x, train=True, key=key)
            return jnp.sum(weight * outputs.features["pullback"](cotangent) ** 2)

        def twice_in_reverse(params):
            def score(x):
                return jnp.vdot(cotangent, apply_fn(params, state, x, train=True, key=key)[0].logits)

            return jnp.sum(weight * jax.grad(score)(x) ** 2)

        found, wanted = (jax.value_and_grad(f)(params) for f in (through_pullback, twice_in_reverse))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, wanted)

    def test_attentive_takes_the_crop_that_shows_more(self, study):
        maps = np.zeros((64, 8, 8, 1), np.uint8)
        maps[:, 0, 0] = 255  # in the corner, which half of the crops lose
        keys = data.example_keys(jax.random.key(0), jnp.arange(64))

        def move(images, keys):
            return data.crop_and_flip(images, keys, padding=4, flip=False)

        chosen = study.saliency_crop({"teacher_map": jnp.asarray(maps)}, keys, move)
        before, after = (
            np.asarray(move(jnp.asarray(maps), k)).any(axis=(1, 2, 3)).mean() for k in (keys, chosen)
        )
        assert after > before + 0.1

    def test_dimmed_pixels_are_those_where_the_map_is_low(self, study):
        flags.FLAGS.probability = 1.0
        maps = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2].set(1.0)
        keys = data.example_keys(jax.random.key(0), jnp.arange(1))
        found = study.saliency_dim({"image": jnp.full((1, 4, 4, 3), 100.0), "teacher_map": maps}, keys)
        wanted = np.full((1, 4, 4, 3), 50.0)
        wanted[0, 1, 2] = 100
        np.testing.assert_allclose(found, wanted)

    def test_each_factor_has_the_four_pairs_that_differ_in_it_alone(self, study):
        for field, (factor, pairs) in zip(("kd", "ig", "at"), study.FACTORS.items(), strict=True):
            assert field == factor
            assert len({name for pair in pairs for name in pair}) == 8
            for without, with_it in pairs:
                assert study.TABLE[with_it] == study.TABLE[without]._replace(**{field: "aligned"})

    def test_attention_needs_a_stage_in_common(self, study, task):
        flags.FLAGS.teacher = "resnet8"
        made = study.Study(task, task, None)
        made.check([("at", "resnet14"), ("student", "mlp")])
        with pytest.raises(ValueError, match=r"at draws .* mlp has no stage of the size of one of stage1"):
            made.check([("at", "mlp")])

    def test_arms_that_there_are_not(self, study):
        flags.FLAGS.arms = ["student", "ig+kd"]
        with pytest.raises(ValueError, match="there is no arm 'ig"):
            study.wanted_arms()
        flags.FLAGS.arms = ["kd", "student"]
        flags.FLAGS.sweep = ["resnet14"]
        assert study.wanted_arms() == [
            ("student", "resnet8"),
            ("kd", "resnet8"),
            ("student", "resnet14"),
            ("kd", "resnet14"),
            ("kd+ig", "resnet14"),
        ]
