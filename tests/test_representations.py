"""Representations: by brute force, closed forms and integrals; a probe against scikit-learn, and as a network."""

import itertools
import json
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kdjax import data, evaluate, methods, models, parallel, run
from kdjax import representations as rep
from kdjax import teacher as teachers
from kdjax.models.mlp import Mlp
from kdjax.recipe import Machine, Recipe
from kdjax.types import Normalisation, Weights

SEEDS = st.integers(0, 2**32 - 1)


def blobs(n=60, width=4, classes=3, *, seed=0, apart=1.0):
    rng = np.random.default_rng(seed)
    labels = np.append(np.arange(classes), rng.integers(0, classes, n - classes))
    centres = apart * rng.normal(size=(classes, width))
    return (rng.normal(size=(n, width)) + centres[labels]) * 3.0 + 5.0, labels


class TestClassSeparation:
    @given(seed=SEEDS, classes=st.integers(2, 5))
    @settings(deadline=None, max_examples=25)
    def test_is_that_of_all_pairs(self, seed, classes):
        x, labels = blobs(30, classes=classes, seed=seed)
        units = x / np.linalg.norm(x, axis=1, keepdims=True)
        distance = 1 - units @ units.T
        groups = [np.flatnonzero(labels == k) for k in range(classes)]
        within = np.mean([distance[np.ix_(group, group)].mean() for group in groups])
        total = np.mean([distance[np.ix_(a, b)].mean() for a, b in itertools.product(groups, repeat=2)])
        found = rep.class_separation(x, labels)
        assert found == pytest.approx(1 - within / total, abs=1e-9)
        assert 0 <= found <= 1

    @given(seed=SEEDS)
    @settings(deadline=None, max_examples=25)
    def test_neither_lengths_nor_rotation_nor_names_of_classes_matter(self, seed):
        x, labels = blobs(seed=seed)
        rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        moved = rng.uniform(0.01, 100, (len(x), 1)) * x @ rotation
        again = rep.class_separation(moved, np.array([9, -1, 4])[labels])
        assert again == pytest.approx(rep.class_separation(x, labels), abs=1e-9)

    def test_how_many_examples_a_class_has_does_not_matter(self):
        x, labels = blobs()
        more = np.concatenate([np.arange(len(x)), np.flatnonzero(labels == 1), np.flatnonzero(labels == 1)])
        assert rep.class_separation(x[more], labels[more]) == pytest.approx(rep.class_separation(x, labels))

    @pytest.mark.parametrize("angle", [0.3, 1e-6])
    def test_of_two_antipodal_clusters(self, angle):
        # Each has two points at ±angle from its axis: its mean direction has length cos(angle), so the mean distance
        # within is sin(angle)^2, and that of any two examples is 1.
        turns = np.array([angle, -angle, np.pi + angle, np.pi - angle])
        found = rep.class_separation(np.stack([np.cos(turns), np.sin(turns)], 1), np.array([0, 0, 1, 1]))
        assert 1 - found == pytest.approx(np.sin(angle) ** 2, rel=1e-6)  # with all its digits
        assert rep.class_separation(np.array([[1.0, 0], [-3.0, 0]]), np.array([0, 1])) == 1

    def test_of_random_directions(self):
        rng = np.random.default_rng(0)
        found = [rep.class_separation(rng.normal(size=(400, 16)), np.arange(400) % 4) for _ in range(50)]
        assert np.mean(found) == pytest.approx((1 - 1 / 4) / 100, rel=0.1)

    def test_takes_arrays_of_jax(self):
        x, labels = blobs()
        found = rep.class_separation(jnp.asarray(x, jnp.float32), jnp.asarray(labels))
        assert found == pytest.approx(rep.class_separation(x, labels), rel=1e-5)

    @pytest.mark.parametrize(
        ("x", "labels", "message"),
        [
            (np.zeros((0, 2)), np.zeros(0, int), r"at least one example, got embeddings of shape \(0, 2\)"),
            (np.ones((3, 2)), np.array([0, 1]), r"got shapes \(3, 2\) and \(2,\)"),
            (np.ones((2, 2)), np.array([0.0, 1.0]), "integer labels .* of float64"),
            (np.ones((2, 2, 1)), np.array([0, 1]), r"needs embeddings \[examples, width\]"),
            (np.ones((2, 2)), np.array([3, 3]), "at least two classes, got only 3"),
            (np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([0, 1]), "1 embeddings are zero or not finite"),
            (np.array([[1.0, np.nan], [0.0, 1.0]]), np.array([0, 1]), "1 embeddings are zero or not finite"),
            (np.array([[0.1, 0.3], [0.2, 0.6], [0.7, 2.1]]), np.array([0, 0, 1]), "point in one direction"),
        ],
    )
    def test_refuses(self, x, labels, message):
        with pytest.raises(ValueError, match=message):
            rep.class_separation(x, labels)


def gaussian_values(means, deviation=1.0, augmentations=8, seed=0):
    noise = np.random.default_rng(seed).normal(size=(len(means), augmentations))
    return np.asarray(means)[:, None] + deviation * noise


class TestMutualInformation:
    @given(seed=SEEDS)
    @settings(deadline=None, max_examples=25)
    def test_is_the_formula_of_the_paper(self, seed):
        rng = np.random.default_rng(seed)
        x = gaussian_values(rng.normal(size=7) * 2, augmentations=5, seed=seed)
        means = x.mean(1)
        deviation = np.sqrt(np.square(x - means[:, None]).sum() / x.size)
        terms = [
            stats.norm.logpdf(x[i, j], means[i], deviation)
            - special.logsumexp(stats.norm.logpdf(x[i, j], means, deviation), b=1 / 7)
            for i, j in np.ndindex(x.shape)
        ]
        assert rep.mutual_information(x) == pytest.approx(np.mean(terms), abs=1e-9)

    @pytest.mark.parametrize("means", [(0.0, 1.0), (0.0, 0.5, 4.0), (-1.0, 0.0, 1.0, 9.0)])
    def test_of_many_augmentations_is_the_integral(self, means):
        def integrand(x, mean):
            mixture = np.mean(stats.norm.pdf(x, means))
            return stats.norm.pdf(x, mean) * (stats.norm.logpdf(x, mean) - np.log(mixture))

        exact = np.mean([integrate.quad(integrand, m - 8, m + 8, args=(m,))[0] for m in means])
        assert rep.mutual_information(gaussian_values(means, augmentations=20_000)) == pytest.approx(
            exact, abs=0.01
        )

    def test_few_augmentations_overestimate(self):
        rng = np.random.default_rng(0)
        few = np.mean([rep.mutual_information(rng.normal(size=(50, 3))) for _ in range(20)])
        many = rep.mutual_information(rng.normal(size=(50, 1000)))
        assert many < 0.01 < 0.1 < few  # the truth is 0

    @pytest.mark.parametrize("deviation", [0.0, 1e-9, 1e-3])
    def test_images_that_every_value_tells_apart(self, deviation):
        x = gaussian_values(np.arange(10.0), deviation)
        assert rep.mutual_information(x) == pytest.approx(np.log(10), abs=1e-12)

    @pytest.mark.parametrize("deviation", [0.0, 1e-3])
    def test_images_of_two_classes_that_collapse(self, deviation):
        noise = deviation * np.array([1.0, -1.0, 1.0, -1.0])
        x = np.repeat([0.0, 5.0], 6)[:, None] + noise
        assert rep.mutual_information(x) == pytest.approx(np.log(2), abs=1e-12)

    @pytest.mark.parametrize("value", [0.0, 0.1, -7e5])
    def test_images_that_are_equal(self, value):
        assert rep.mutual_information(np.full((6, 3), value)) == pytest.approx(0, abs=1e-12)
        same = np.tile([value, value + 1, value + 3], (6, 1))
        assert rep.mutual_information(same) == pytest.approx(0, abs=1e-9)

    @given(seed=SEEDS, spread=st.floats(0, 100), augmentations=st.integers(2, 6))
    @settings(deadline=None, max_examples=25)
    def test_is_within_its_bounds(self, seed, spread, augmentations):
        rng = np.random.default_rng(seed)
        x = gaussian_values(spread * rng.normal(size=12), augmentations=augmentations, seed=seed + 1)
        assert 0 <= rep.mutual_information(x) <= np.log(12) + 1e-12

    def test_values_far_from_gaussian_can_bring_it_below_zero(self):
        x = np.zeros((40, 2))
        x[0, 1] = -2.0
        assert -0.5 < rep.mutual_information(x) < -0.1

    @given(seed=SEEDS, scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
    @settings(deadline=None, max_examples=25)
    def test_neither_scale_nor_shift_nor_order_matter(self, seed, scale, shift):
        rng = np.random.default_rng(seed)
        x = gaussian_values(rng.normal(size=9), seed=seed)
        moved = rng.permuted(rng.permutation(x), axis=1) * -scale + shift
        assert rep.mutual_information(moved) == pytest.approx(rep.mutual_information(x), abs=1e-8)

    def test_blocks_do_not_matter(self, monkeypatch):
        x = gaussian_values(np.arange(11) / 3)
        whole = rep.mutual_information(x)
        for block in (1, 3 * x.size):
            monkeypatch.setattr(rep, "BLOCK", block)
            assert rep.mutual_information(jnp.asarray(x)) == pytest.approx(whole, rel=1e-5)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (np.zeros(3), r"at least two augmentations, got shape \(3,\)\."),
            (np.zeros((3, 1)), r"got shape \(3, 1\)\."),
            (np.zeros((0, 2)), r"got shape \(0, 2\)\."),
            (np.array([[0.0, np.nan]]), r"got shape \(1, 2\) with NaN or infinity\."),
        ],
    )
    def test_refuses(self, x, message):
        with pytest.raises(ValueError, match=message):
            rep.mutual_information(x)


class TestLinearProbe:
    @pytest.mark.parametrize("classes", [2, 3])
    def test_agrees_with_a_pipeline_of_sklearn(self, classes):
        x, labels = blobs(80, classes=classes)
        x[:, 3] = 0.1  # a unit that is dead
        held, truth = blobs(50, classes=classes, seed=1)
        strength = 0.01
        # Of two classes sklearn penalises the difference of the columns, half of whose square is theirs.
        c = {2: 2, 3: 1}[classes] / (strength * len(x))
        wanted = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8)).fit(x, labels)
        options = {"num_classes": classes, "validation": (held, truth)}
        probe = rep.linear_probe(x, labels, strengths=[strength], **options)
        logits = held.astype(np.float32) @ probe.kernel + probe.bias
        np.testing.assert_array_equal(logits.argmax(1), wanted.predict(held))
        np.testing.assert_allclose(special.softmax(logits, 1), wanted.predict_proba(held), atol=5e-3)
        assert (probe.kernel.dtype, probe.bias.dtype, probe.strength) == (np.float32, np.float32, strength)
        assert probe.kernel.shape == (4, classes)
        assert probe.validation_accuracy == pytest.approx((logits.argmax(1) == truth).mean())

    @pytest.mark.parametrize("classes", [2, 3])
    def test_minimises_what_it_says(self, classes):
        x, labels = blobs(80, classes=classes)
        options = {"num_classes": classes, "validation": (x, labels), "strengths": [0.1]}
        probe = rep.linear_probe(x, labels, **options)
        standard = (x - x.mean(0)) / x.std(0)

        def objective(kernel, bias):
            logits = standard @ kernel + bias
            return (
                special.logsumexp(logits, 1).mean()
                - logits[np.arange(80), labels].mean()
                + 0.05 * np.sum(kernel**2)
            )

        kernel = probe.kernel * x.std(0)[:, None]
        bias = probe.bias + x.mean(0) @ probe.kernel
        best = objective(kernel, bias)
        for size in (0.02, -0.02):
            assert all(
                objective(kernel + size * step.reshape(4, classes), bias) > best
                for step in np.eye(4 * classes)
            )
        assert objective(1.02 * kernel, bias) > best < objective(0.98 * kernel, bias)

    def test_the_strength_is_that_of_the_best_validation_accuracy(self):
        rng = np.random.default_rng(0)
        x, labels = rng.normal(size=(30, 25)), np.arange(30) % 2
        x[:, 0] += 1.5 * labels  # one useful feature among many
        held, truth = rng.normal(size=(400, 25)), np.arange(400) % 2
        held[:, 0] += 1.5 * truth
        options = {"num_classes": 2, "validation": (held, truth)}
        single = [rep.linear_probe(x, labels, strengths=[s], **options) for s in (1e-4, 0.1, 1e4)]
        assert single[1].validation_accuracy > single[0].validation_accuracy
        found = rep.linear_probe(x, labels, strengths=(1e-4, 0.1), **options)
        assert found.strength == 0.1
        # Of equal ones the strongest.
        easy = (1000.0 * np.eye(2)[labels], labels)
        assert rep.linear_probe(*easy, num_classes=2, validation=easy).strength == 1.0

    def test_neither_scale_nor_shift_of_a_feature_matters(self):
        x, labels = blobs(60)
        held, truth = blobs(40, seed=1)
        scale, shift = np.array([1e-3, 1.0, 50.0, 2.0]), np.array([0.0, 3.0, -9.0, 1.0])
        options = {"num_classes": 3, "strengths": [0.1]}
        probe = rep.linear_probe(x, labels, validation=(held, truth), **options)
        moved = rep.linear_probe(
            scale * x + shift, labels, validation=(scale * held + shift, truth), **options
        )
        np.testing.assert_allclose(
            (scale * held + shift) @ moved.kernel + moved.bias, held @ probe.kernel + probe.bias, atol=1e-3
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_classes": 5}, r"every class, got none of \[3, 4\]"),
            ({"num_classes": 2}, "labels from 0 to 2, and 2 classes are numbered from 0"),
            ({"labels": np.arange(60) % 3 - 1}, "labels from -1 to 1"),
            ({"labels": np.arange(59) % 3}, r"got shapes \(60, 4\) and \(59,\)"),
            ({"strengths": ()}, r"got num_classes=3 and strengths=\(\)"),
            ({"strengths": (0.0, 1.0)}, "one positive strength"),
            ({"labels": np.zeros(60, int), "num_classes": 1}, "at least two classes"),
            ({"validation": (np.ones((2, 3)), np.array([0, 1]))}, "as wide as those of training, 4, got 3"),
            ({"validation": (np.ones((2, 4)), np.array([0, 3]))}, "validation has labels from 0 to 3"),
            ({"validation": (np.ones((0, 4)), np.zeros(0, int))}, "validation needs at least one example"),
        ],
    )
    def test_refuses(self, change, message):
        x, labels = blobs()
        options = {"labels": labels, "num_classes": 3, "validation": (x, np.arange(60) % 2)} | change
        with pytest.raises(ValueError, match=message):
            rep.linear_probe(x, options.pop("labels"), **options)

    def test_a_missing_sklearn_is_named_with_its_extra(self, monkeypatch):
        for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModuleNotFoundError, match=r"sklearn is not installed.*'kdjax\[data\]'"):
            rep.linear_probe(*blobs(), num_classes=3, validation=blobs())


class Teacher(NamedTuple):
    network: models.Network
    weights: Weights
    normalisation: Normalisation


SHAPE, CLASSES = (4, 4, 1), 3


@pytest.fixture(scope="module")
def dataset():
    labels = np.arange(48) % CLASSES
    images = np.random.default_rng(0).integers(0, 100, (48, *SHAPE)) + 70 * labels[:, None, None, None]
    return data.split(data.from_arrays(images.astype(np.uint8), labels), num_train=24)


@pytest.fixture(scope="module")
def plain():
    """A network of two classes, as one that has been trained for another task."""
    network = models.from_linen(Mlp(num_classes=2, widths=(8,), dropout=0.5), SHAPE)
    return network, Weights(*network.init(0))


def inputs_of(dataset, split):
    return data.normalise(
        jnp.asarray(dataset.images[dataset.splits[split]]), **dataset.normalisation._asdict()
    )


def embeddings_of(plain, dataset, split):
    outputs, _ = plain[0].apply(*plain[1], inputs_of(dataset, split), train=False)
    return outputs.features["embedding"], dataset.labels[dataset.splits[split]]


@pytest.fixture(scope="module")
def probe(plain, dataset):
    validation = embeddings_of(plain, dataset, "validation")
    return rep.linear_probe(
        *embeddings_of(plain, dataset, "train"), num_classes=CLASSES, validation=validation
    )


@pytest.fixture(scope="module")
def probed(plain, probe):
    return models.probed(*plain, probe)


class TestProbed:
    def test_its_logits_are_those_of_the_probe(self, plain, probe, probed, dataset):
        network, weights = probed
        x = inputs_of(dataset, "test")
        outputs, model_state = network.apply(*weights, x, train=False)
        before, _ = plain[0].apply(*plain[1], x, train=False)
        wanted = np.asarray(before.features["embedding"]) @ probe.kernel + probe.bias
        np.testing.assert_allclose(outputs.logits, wanted, rtol=1e-5, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, outputs.features, before.features)
        assert model_state == weights.model_state
        compiled = jax.jit(lambda w, x: network.apply(*w, x, train=False)[0].logits)
        np.testing.assert_allclose(compiled(weights, x), wanted, rtol=1e-5, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, weights.params["network"], plain[1].params)
        np.testing.assert_array_equal(weights.params["probe"]["kernel"], probe.kernel)

    def test_its_dropout_is_that_of_the_network(self, plain, probe, probed, dataset):
        network, weights = probed
        x, key = inputs_of(dataset, "test"), jax.random.key(0)
        outputs, _ = network.apply(*weights, x, train=True, key=key)
        before, _ = plain[0].apply(*plain[1], x, train=True, key=key)
        jax.tree.map(np.testing.assert_array_equal, outputs.features, before.features)

    def test_says_what_it_is(self, plain, probed):
        network, weights = probed
        assert network.output_shapes.logits.shape == (2, CLASSES)
        assert network.output_shapes.features.keys() == plain[0].output_shapes.features.keys()
        assert network.num_parameters == plain[0].num_parameters + 8 * CLASSES + CLASSES
        fresh = Weights(*network.init(0))
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (fresh, weights)]
        assert shapes == [jax.tree.map(lambda leaf: leaf.shape, network.weight_shapes)] * 2
        assert jax.tree.structure(fresh) == jax.tree.structure(weights)
        assert json.loads(json.dumps(network.description)) == {
            "class": "Probed",
            "network": plain[0].description,
            "num_classes": CLASSES,
        }

    def test_is_evaluated_like_any_network(self, probed, dataset):
        network, weights = probed
        devices = parallel.local_devices(2)
        found = evaluate.make_evaluator(
            network.apply,
            lambda arrays, index: {"image": arrays["x"][index], "label": arrays["label"][index]},
            parallel.replicate(
                {"x": inputs_of(dataset, "test"), "label": dataset.labels[dataset.splits["test"]]}, devices
            ),
            np.arange(len(dataset.splits["test"])),
            batch_size=4,
            devices=devices,
        )
        logits = network.apply(*weights, inputs_of(dataset, "test"), train=False)[0].logits
        accuracy = np.mean(np.argmax(logits, 1) == dataset.labels[dataset.splits["test"]])
        summary = evaluate.summarise(found(*parallel.replicate(weights, devices)))
        assert summary["accuracy"] == pytest.approx(accuracy)

    def test_is_asked_and_kept_like_any_network(self, plain, probe, probed, dataset, tmp_path):
        network, weights = probed
        teacher = Teacher(network, weights, dataset.normalisation)
        signal = teachers.answers(teacher, dataset, features=["embedding"], directory=tmp_path / "answers")
        test = dataset.splits["test"]
        logits = network.apply(*weights, inputs_of(dataset, "test"), train=False)[0].logits
        np.testing.assert_allclose(signal.answers["logits"][test, 0], logits, rtol=1e-2, atol=1e-2)
        summary, identity = {"split": "test", "metrics": {}}, {"arm": "probed", "seed": 0}
        run.save(tmp_path, network, dataset, weights, step=1, summary=summary, identity=identity)
        machine = Machine(devices=1)
        found = run.load(tmp_path, dataset, network=models.probed(*plain, probe)[0], machine=machine)
        jax.tree.map(np.testing.assert_array_equal, found.weights, weights)
        accuracy = np.mean(np.argmax(logits, 1) == dataset.labels[test])
        assert found.metrics["accuracy"] == pytest.approx(accuracy)
        with pytest.raises(ValueError, match="weights of another network"):
            run.load(tmp_path, dataset, network=plain[0])

    def test_teaches(self, probed, dataset):
        teacher = Teacher(*probed, dataset.normalisation)
        student = models.from_linen(Mlp(num_classes=CLASSES, widths=(4,)), SHAPE)
        recipe = Recipe(epochs=1, batch_size=8)
        trained = run.train(student, methods.kd(), dataset, recipe, teacher=teacher)
        assert np.isfinite(trained.metrics["loss"])

    def test_refuses_a_probe_of_another_embedding(self, plain, probe):
        with pytest.raises(ValueError, match=r"embeddings of width 7, .*'embedding': \(8,\)"):
            models.probed(*plain, probe._replace(kernel=np.zeros((7, CLASSES), np.float32)))
