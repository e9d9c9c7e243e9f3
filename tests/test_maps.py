"""A teacher's cached maps: what they are, where they go with an image, what a student makes of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import attributions, data, landscape, methods, models, pipeline, run, saliency, study, train
from kdjax import teacher as teachers
from kdjax.recipe import Recipe
from kdjax.types import Normalisation, Outputs, Weights


def trained(network, dataset, weights=None):
    weights = Weights(*network.init(0)) if weights is None else weights
    fitted = train.Fitted(weights, weights, 0, [])
    return run.Trained("teacher", 0, network, dataset.normalisation, fitted, {}, {})


@pytest.fixture(scope="module")
def digits():
    return data.split(data.load("digits"), num_train=24, num_validation=8)


@pytest.fixture(scope="module")
def teacher(digits):
    network = models.from_linen(models.build("digits_student", num_classes=10), digits.image_shape)
    params, state = network.init(0)
    # Biases too: without them a ReLU network is linear along a path from zero.
    noise = landscape.random_direction(jax.random.key(0), params)
    return trained(network, digits, Weights(jax.tree.map(lambda p, x: p + 0.1 * x, params, noise), state))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("maps")


@pytest.fixture(scope="module")
def explained(digits, teacher, directory):
    return teachers.explain(teacher, digits, directory=directory, stages=("stage1",), tolerance=0.02)


class TestExplain:
    def test_are_the_integrated_gradients_of_the_training_images(self, digits, teacher, explained):
        ids = digits.splits["train"]
        rest = np.setdiff1d(np.arange(len(digits.images)), ids)
        for rows in explained.answers.values():
            assert len(rows) == len(digits.images)
            assert not rows[rest].any()
            assert rows[ids].any(axis=tuple(range(1, rows.ndim))).all()

        x = data.normalise(jnp.asarray(digits.images[ids]), **digits.normalisation._asdict())

        def outputs(x):
            return teacher.network.apply(*teacher.weights, x, train=False)[0]

        exact = attributions.integrated_gradients(
            attributions.class_score(lambda x: outputs(x).logits),
            x,
            targets=jnp.asarray(digits.labels[ids].astype(np.int32)),
            num_steps=400,
        )
        maps = np.asarray(attributions.importance(exact.values))
        maps = 255 * maps / maps.max(axis=(1, 2, 3), keepdims=True)
        assert np.abs(explained.answers["map"][ids, 0] - maps).mean() < 3
        assert np.all((explained.residual <= 0.0201) | (explained.nodes == 257))
        energy = np.mean(np.asarray(outputs(x).features["stage1"]) ** 2, axis=-1)
        energy /= np.linalg.norm(energy.reshape(len(ids), -1), axis=-1)[:, None, None]
        np.testing.assert_allclose(explained.answers["attention_stage1"][ids, 0, :, :, 0], energy, atol=1e-3)

    def test_note(self, explained):
        said = f"{explained.nodes.mean():.1f} gradients each on average ({explained.nodes.min()} to "
        assert said in explained.note
        assert explained.note.endswith("at nine tenths of 24 images.")

    def test_are_read_back_and_belong_to_their_labels(self, digits, teacher, directory, explained):
        asked = {"directory": directory, "stages": ("stage1",), "tolerance": 0.02}
        written = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
        found = teachers.explain(teacher, digits, **asked)
        np.testing.assert_array_equal(found.answers["map"], explained.answers["map"])
        assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == written
        with pytest.raises(ValueError, match="labels"):
            teachers.explain(teacher, digits._replace(labels=(digits.labels + 1) % 10), **asked)

    def test_pictures(self, digits, explained):
        first, _ = study.pictures(digits, explained.answers["map"], count=2)
        np.testing.assert_array_equal(first["image"], digits.images[digits.splits["train"][0]])
        assert np.max(first["map"]) == 1.0


class TestSignal:
    """Of ten examples with a map and logits, seven are for training."""

    ids = np.asarray([1, 2, 4, 5, 7, 8, 9])
    rest = np.asarray([0, 3, 6])
    map_, logits = (
        np.random.default_rng(0).normal(size=shape).astype(np.float16)
        for shape in ((10, 1, 3, 4, 1), (10, 1, 6))
    )

    @pytest.fixture
    def dataset(self, digits):
        return digits._replace(splits={**digits.splits, "train": self.ids})

    @pytest.fixture
    def signal(self):
        logits = teachers.TeacherSignal({"logits": self.logits}, Outputs(jnp.zeros((2, 6)), {}))
        found = teachers.Explanations(
            {"map": self.map_, "attention_a": self.map_, "attention_b": self.map_}, *2 * [self.ids]
        )
        return teachers.with_maps(logits, found, ("map", "attention_a"))

    def test_maps_are_added_by_name_and_move(self, signal):
        assert set(signal.answers) == {"logits", "map", "attention_a"}
        assert signal.maps == ("map", "attention_a")

    def test_misaligned_rows_are_those_of_others(self, dataset, signal):
        found = teachers.perturb(signal, dataset, {"map": "misaligned", "attention_a": "misaligned"})
        changed = found.answers["map"]
        np.testing.assert_array_equal(changed[self.rest], self.map_[self.rest])
        same = (self.map_[:, None] == changed[None]).all(axis=(2, 3, 4, 5))
        order = same.argmax(axis=0)[self.ids]
        assert sorted(order) == self.ids.tolist()
        assert sum(order != self.ids) > 3
        np.testing.assert_array_equal(found.answers["attention_a"], changed)  # of the same other images
        assert found.maps == ()

    def test_noise_keeps_the_values_of_each_row(self, dataset, signal):
        found = teachers.perturb(signal, dataset, {"logits": "noise"})
        np.testing.assert_array_equal(np.sort(found.answers["logits"]), np.sort(self.logits))
        assert (found.answers["logits"] != self.logits).any(axis=(1, 2)).sum() == len(self.ids)
        assert found.maps == signal.maps

    def test_nothing_is_written_into_the_signal(self, dataset, signal):
        before = {name: rows.copy() for name, rows in signal.answers.items()}
        changed = teachers.perturb(signal, dataset, {"logits": "misaligned", "map": "noise"})
        for name, rows in before.items():
            np.testing.assert_array_equal(signal.answers[name], rows)
        assert changed.identity != signal.identity
        assert teachers.perturb(signal, dataset, {}).answers == signal.answers

    def test_refuses(self, dataset, signal):
        with pytest.raises(ValueError, match="misaligned, noise, got 'shuffled'"):
            teachers.perturb(signal, dataset, {"map": "shuffled"})


class TestBatches:
    """Images with one white pixel, whose maps have it too, through the batches that a run is made of."""

    def batches(self, digits, method=None, maps=("map", "half")):
        random = np.random.default_rng(0)
        images = np.zeros_like(digits.images)
        for image, (row, column) in zip(images, random.integers(2, 6, (len(images), 2)), strict=True):
            image[row, column] = 255
        halved = images.reshape(len(images), 4, 2, 4, 2, 1).mean(axis=(2, 4)).astype(np.float16)
        answers = {"map": images[:, None], "half": halved[:, None]}
        signal = teachers.TeacherSignal(answers, Outputs(jnp.zeros((2, 10)), {}), maps=maps)
        dataset = digits._replace(images=images, normalisation=Normalisation((0.0,), (1.0,)))
        recipe = Recipe(epochs=1, batch_size=8, padding=2, flip=True)
        make, evaluate = pipeline.make_batches(dataset, recipe, method or methods.labels(), signal)
        index = jnp.asarray(digits.splits["train"][:16].astype(np.int32))
        resident = pipeline.resident(dataset, signal)
        return make(resident, index, jax.random.key(1)), evaluate(resident, index), images[np.asarray(index)]

    def test_a_map_goes_where_its_image_goes(self, digits):
        batch, still, images = self.batches(digits)
        np.testing.assert_allclose(batch["image"], batch["teacher_map"] / 255, atol=1e-6)
        assert (np.asarray(batch["teacher_map"]) != images).any(axis=(1, 2, 3)).sum() > 8
        # The pixel of a map of half the size is where it lies, or next to it, with parts of its weight.
        cells = np.asarray(batch["teacher_map"], np.float32).reshape(16, 4, 2, 4, 2, 1).mean(axis=(2, 4))
        half = np.asarray(batch["teacher_half"])
        np.testing.assert_allclose(half.sum((1, 2, 3)), cells.sum((1, 2, 3)), rtol=1e-2)
        for axis in (np.arange(4).reshape(1, 4, 1, 1), np.arange(4).reshape(1, 1, 4, 1)):
            assert np.abs(((half - cells) * axis).sum((1, 2, 3)) / 63.75).max() <= 0.51
        np.testing.assert_allclose(still["image"], images / 255, atol=1e-6)
        np.testing.assert_array_equal(still["teacher_map"], images)

    def test_a_map_that_is_not_named_stays(self, digits):
        batch, _, images = self.batches(digits, maps=())
        np.testing.assert_array_equal(batch["teacher_map"], images)

    def test_an_overlay_is_of_the_moved_map(self, digits):
        batch, _, _ = self.batches(digits, methods.ig_overlay(probability=1.0))
        np.testing.assert_allclose(batch["image"], batch["teacher_map"] / 255, atol=1e-5)  # white on white

    def test_a_chosen_crop_is_that_of_image_and_map(self, digits):
        def other(batch, keys, move):
            assert move(batch["teacher_map"], keys).shape == batch["teacher_map"].shape
            return jax.vmap(lambda key: jax.random.fold_in(key, 9))(keys)

        plain, _, _ = self.batches(digits)
        batch, _, _ = self.batches(digits, methods.Method(crop=other))
        np.testing.assert_allclose(batch["image"], batch["teacher_map"] / 255, atol=1e-6)
        assert (np.asarray(batch["image"]) != np.asarray(plain["image"])).any()


def two_minus_two_cosines(own, theirs):
    own, theirs = (np.asarray(a).reshape(len(a), -1) for a in (own, theirs))
    norms = np.linalg.norm(own, axis=1) * np.linalg.norm(theirs, axis=1)
    return np.mean(2 - 2 * np.sum(own * theirs, 1) / norms)


class TestMethods:
    def test_map_matching_is_the_distance_from_gradient_times_input(self, teacher):
        method, (params, state) = methods.map_matching(0.3), teacher.weights
        (objective,) = method.objectives
        apply_fn = method.student(teacher.network.apply)
        random = np.random.default_rng(0)
        x = jnp.asarray(random.normal(size=(6, 8, 8, 1)), jnp.float32)
        maps = random.integers(0, 256, (6, 8, 8, 1), np.uint8)  # as they are cached
        batch = {"image": x, "label": jnp.arange(6), "teacher_map": jnp.asarray(maps)}

        def loss(params):
            return objective(apply_fn(params, state, x, train=True)[0], batch)["match"]

        def score(x):
            logits = teacher.network.apply(params, state, x, train=False)[0].logits
            return jnp.sum(logits[jnp.arange(6), jnp.arange(6)])

        own = np.abs(jax.grad(score)(x) * x)
        value, gradient = jax.value_and_grad(loss)(params)
        np.testing.assert_allclose(
            value, 0.3 * two_minus_two_cosines(own, maps.astype(np.float32)), rtol=1e-4
        )
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
        assert "pullback" not in apply_fn(params, state, x, train=False)[0].features

    def test_what_differentiates_through_a_pullback_is_the_second_derivative(self, teacher):
        (params, state), apply_fn = teacher.weights, teacher.network.apply
        key, cotangent = jax.random.key(1), jax.nn.one_hot(jnp.arange(6), 10)
        x, weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8, 8, 1)), jnp.float32)

        def through_pullback(params):
            student = methods.map_matching().student(apply_fn)
            outputs, _ = student(params, state, x, train=True, key=key)
            return jnp.sum(weight * outputs.features["pullback"](cotangent) ** 2)

        def twice_in_reverse(params):
            def score(x):
                return jnp.vdot(cotangent, apply_fn(params, state, x, train=True, key=key)[0].logits)

            return jnp.sum(weight * jax.grad(score)(x) ** 2)

        found, wanted = (jax.value_and_grad(f)(params) for f in (through_pullback, twice_in_reverse))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, wanted)

    def test_attention_matching_is_the_mean_distance_over_stages(self):
        random = np.random.default_rng(0)
        features = {
            name: jnp.asarray(random.normal(size=(3, 4, 4, 5)), jnp.float32) for name in ("stage1", "stage2")
        }
        cached = {
            f"teacher_attention_{name}": jnp.asarray(random.random((3, 4, 4, 1)), jnp.float32)
            for name in features
        }
        method = methods.attention_matching(("stage1", "stage2"), weight=0.5)
        found = method.objectives[0](Outputs(jnp.zeros((3, 2)), features), cached)["attention"]
        each = [
            two_minus_two_cosines(np.mean(x**2, axis=-1), cached[f"teacher_attention_{name}"])
            for name, x in features.items()
        ]
        np.testing.assert_allclose(found, 0.5 * np.mean(each), rtol=1e-5)
        assert method.teacher_features == ("attention_stage1", "attention_stage2")

    def test_attention_matching_needs_a_stage_of_one_size(self):
        def features(name):
            network = models.from_linen(models.build(name, num_classes=10), (32, 32, 3))
            return network.output_shapes.features

        assert methods.common_stages(features("resnet14"), features("resnet8")) == (
            "stage1",
            "stage2",
            "stage3",
        )
        assert methods.common_stages(features("mlp"), features("resnet8")) == ()
        with pytest.raises(ValueError, match="no stage of which student and teacher have maps of one size"):
            methods.attention_matching(())

    def test_saliency_crop_takes_the_crop_with_more_of_the_map(self):
        maps = np.zeros((64, 8, 8, 1), np.uint8)
        maps[:, 0, 0] = 255  # in the corner, which half of the crops lose
        keys = data.example_keys(jax.random.key(0), jnp.arange(64))

        def move(images, keys):
            return data.crop_and_flip(images, keys, padding=4, flip=False)

        chosen = methods.saliency_crop().crop({"teacher_map": jnp.asarray(maps)}, keys, move)
        before, after = (
            np.asarray(move(jnp.asarray(maps), k)).any(axis=(1, 2, 3)).mean() for k in (keys, chosen)
        )
        assert after > before + 0.1

    def test_saliency_dim_dims_where_the_map_is_low(self):
        maps = jnp.zeros((1, 4, 4, 1), jnp.uint8).at[0, 1, 2].set(255)
        keys = data.example_keys(jax.random.key(0), jnp.arange(1))
        batch = {"image": jnp.full((1, 4, 4, 3), 100.0), "teacher_map": maps}
        wanted = np.full((1, 4, 4, 3), 60.0)
        wanted[0, 1, 2] = 100
        found = methods.saliency_dim(probability=1.0, strength=0.4).blend(batch, keys)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        never = methods.saliency_dim(probability=0.0).blend(batch, keys)
        np.testing.assert_array_equal(never, batch["image"])


class OnePixel(nn.Module):
    """Logits that depend on one pixel alone: label + 1 times its value."""

    row: int
    column: int

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, ())
        return scale * x[:, self.row, self.column] * jnp.arange(1.0, 11.0)[None]


class TestSaliency:
    def measured(self, digits, pixel):
        teacher, student = (
            trained(models.from_linen(OnePixel(*place), digits.image_shape), digits)
            for place in ((3, 3), pixel)
        )
        return saliency.make_measure(digits, teacher, num_images=5)(student)

    def test_of_a_network_that_sees_one_pixel(self, digits):
        found = self.measured(digits, (3, 3))
        ids = digits.splits["test"][:5]
        pixel = (digits.images[ids, 3, 3] / 255 - digits.normalisation.mean) / digits.normalisation.std
        likely = jax.nn.softmax(pixel * np.arange(1.0, 11.0))[np.arange(5), digits.labels[ids]]
        # Of 17 points all but the first are without the pixel, of which zero makes all classes equally likely.
        assert found["deletion"] == pytest.approx(float(np.mean((likely + 1.6) / 17)), rel=1e-4)
        assert found["insertion"] == pytest.approx(float(np.mean((0.1 + 16 * likely) / 17)), rel=1e-4)
        assert found["map_correlation"] == pytest.approx(1.0)

    def test_networks_that_see_different_pixels_agree_less(self, digits):
        first, second = np.zeros((2, 64))
        first[3 * 8 + 3], second[7] = 1, 1
        ranks = [np.argsort(np.argsort(m, kind="stable")) for m in (first, second)]
        wanted = np.corrcoef(*ranks)[0, 1]
        assert self.measured(digits, (0, 7))["map_correlation"] == pytest.approx(wanted, abs=1e-5)

    def test_of_every_run_is_kept_and_joins_its_metrics(self, digits, tmp_path, monkeypatch):
        teacher = trained(models.from_linen(OnePixel(3, 3), digits.image_shape), digits)
        arms = {"a": [teacher._replace(metrics={"accuracy": 0.5})]}
        options = {"teacher_of": {0: teacher}, "num_images": 5}
        found = study.saliency_of(digits, arms, tmp_path, **options)
        (run_,) = study.with_metrics(arms, found)["a"]
        assert run_.metrics == {"accuracy": 0.5, **{name: values[0] for name, values in found["a"].items()}}
        monkeypatch.setattr(saliency, "_explainer", None)
        assert study.saliency_of(digits, arms, tmp_path, **options) == found

    def test_every_run_is_measured_with_the_teacher_of_its_seed(self, digits, tmp_path):
        one, other = (
            trained(models.from_linen(OnePixel(*pixel), digits.image_shape), digits)
            for pixel in ((3, 3), (0, 7))
        )
        arms = {"a": [one, one._replace(seed=1)]}
        found = study.saliency_of(digits, arms, tmp_path, teacher_of={0: one, 1: other}, num_images=5)
        same, apart = found["a"]["map_correlation"]
        assert same == pytest.approx(1.0)
        assert apart < 0.9
        assert apart == pytest.approx(self.measured(digits, (0, 7))["map_correlation"])  # it is symmetric


def test_comparison_notes_are_of_arms_with_three_runs(digits):
    one = trained(models.from_linen(OnePixel(3, 3), digits.image_shape), digits)
    runs = [one._replace(metrics={"accuracy": a}, seed=seed) for seed, a in enumerate((0.5, 0.6, 0.7))]
    others = [run_._replace(metrics={"accuracy": a}) for run_, a in zip(runs, (0.6, 0.5, 0.7), strict=True)]
    arms = {"a": runs, "b": others, "c": runs[:2]}
    notes = study.comparison_notes(
        arms,
        pairs=[("a", "b"), ("a", "c"), ("a", "d")],
        factors={"x": [("a", "b")], "y": [("a", "b"), ("a", "c")]},
    )
    assert [note.partition(":")[0] for note in notes] == [
        "a against b",
        "Main effect of x over 1 pairs of arms",
    ]
