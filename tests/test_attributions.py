"""Attributions against calculus, against captum's values, and against the axioms that they are derived from."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kdjax import attributions, data, parallel, teacher
from kdjax.attributions import integrated
from kdjax.models import layers

GOLDENS = np.load(Path(__file__).parent / "goldens" / "attributions_goldens.npz")
RULES = ("midpoint", "gauss_legendre", "trapezoid")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def network(x):
    """The golden network, with the library's convolutions."""
    for layer, activation in enumerate((jax.nn.relu, jax.nn.gelu)):
        kernel, bias = jnp.asarray(GOLDENS[f"kernel_{layer}"]), jnp.asarray(GOLDENS[f"bias_{layer}"])
        x = activation(layers.conv(x, kernel, padding="VALID") + bias[None, None, None])
    return x.reshape(len(x), -1) @ GOLDENS["kernel_2"] + GOLDENS["bias_2"][None]


def perceptron(activation, *, sizes=(12, 16, 16, 3), seed=0):
    """With biases: without them a ReLU network is linear along a path from zero, and every rule exact."""
    weights = [normal(*pair, seed=seed + i) for i, pair in enumerate(itertools.pairwise(sizes))]
    biases = [normal(size, seed=seed + 10 + i) for i, size in enumerate(sizes[1:])]

    def logits(x):
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = activation(x @ (weight / np.sqrt(len(weight))) + bias[None])
        return x @ (weights[-1] / np.sqrt(len(weights[-1]))) + biases[-1][None]

    return logits


def smooth(x):
    return perceptron(jax.nn.gelu)(x)[:, 0]


def kinked(x):
    return perceptron(jax.nn.relu)(x)[:, 0]


class TestQuadrature:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("steps", [2, 3, 16, 50])
    def test_weights_add_up_to_one(self, rule, steps):
        nodes, weights = attributions.quadrature(steps, rule)
        assert len(nodes) == len(weights) == steps
        assert np.all((nodes >= 0) & (nodes <= 1))
        assert np.all(np.diff(nodes) > 0)
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)

    @pytest.mark.parametrize(("rule", "degree"), [("midpoint", 1), ("trapezoid", 1), ("gauss_legendre", 9)])
    def test_integrates_polynomials_up_to_its_degree(self, rule, degree):
        nodes, weights = attributions.quadrature(5, rule)
        for power in range(degree + 1):
            np.testing.assert_allclose(weights @ nodes**power, 1 / (power + 1), rtol=1e-12)
        assert abs(weights @ nodes ** (degree + 1) - 1 / (degree + 2)) > 1e-7

    def test_refuses(self):
        with pytest.raises(ValueError, match="num_steps of 1 or more, got 0"):
            attributions.quadrature(0, "midpoint")
        with pytest.raises(ValueError, match="num_steps of 2 or more, got 1"):
            attributions.quadrature(1, "trapezoid")
        with pytest.raises(ValueError, match="got 'simpson'"):
            attributions.quadrature(5, "simpson")


class TestIntegratedGradients:
    @pytest.mark.parametrize("rule", RULES)
    def test_is_exact_for_linear_scores(self, rule):
        weight, x, start = normal(12), normal(4, 12, seed=1), normal(4, 12, seed=2)
        found = attributions.integrated_gradients(lambda x: x @ weight + 3, x, start, num_steps=3, rule=rule)
        np.testing.assert_allclose(found.values, weight[None] * (x - start), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.residual, 0, atol=1e-5)

    @pytest.mark.parametrize("rule", RULES)
    def test_is_exact_for_quadratic_scores(self, rule):
        form, x, start = normal(12, 12), normal(4, 12, seed=1), normal(4, 12, seed=2)
        found = attributions.integrated_gradients(
            lambda x: jnp.sum((x @ form) * x, -1), x, start, num_steps=2, rule=rule
        )
        wanted = (x - start) * ((x + start) / 2 @ (form + form.T))
        np.testing.assert_allclose(found.values, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("rule", "method"), [("gauss_legendre", "gausslegendre"), ("midpoint", "riemann_middle")]
    )
    @pytest.mark.parametrize("steps", [5, 20])
    def test_equals_captum(self, rule, method, steps):
        found = attributions.integrated_gradients(
            attributions.class_score(network),
            jnp.asarray(GOLDENS["inputs"]),
            jnp.asarray(GOLDENS["baselines"]),
            targets=jnp.asarray(GOLDENS["labels"]),
            num_steps=steps,
            rule=rule,
        )
        wanted = GOLDENS[f"{method}_{steps}"]
        np.testing.assert_allclose(found.values, wanted, atol=2e-5 * np.abs(wanted).max())

    @pytest.mark.parametrize("rule", RULES)
    def test_is_complete_where_the_score_is_smooth(self, rule):
        found = attributions.integrated_gradients(
            smooth, normal(16, 12), normal(16, 12, seed=1), num_steps=50, rule=rule
        )
        scale = np.abs(found.difference).max()
        np.testing.assert_allclose(found.values.sum(-1), found.difference, atol=1e-3 * scale)
        assert np.median(found.relative_residual) < 1e-3

    @pytest.mark.parametrize("rule", RULES)
    def test_the_residual_falls_like_one_over_the_nodes_at_kinks(self, rule):
        def residual(steps):
            found = attributions.integrated_gradients(kinked, normal(64, 12), num_steps=steps, rule=rule)
            return float(jnp.mean(jnp.abs(found.residual)))

        assert residual(320) < residual(20) / 5
        assert residual(20) > 1e-3  # so there was something to fall

    def test_the_residual_is_what_it_says(self):
        x = normal(4, 12)
        found = attributions.integrated_gradients(kinked, x, num_steps=3)
        np.testing.assert_allclose(found.difference, kinked(x) - kinked(0 * x), rtol=1e-5)
        np.testing.assert_allclose(found.residual, found.values.sum(-1) - found.difference, atol=1e-6)
        np.testing.assert_array_equal(found.nodes, 3)

    def test_sensitivity(self):
        found = attributions.integrated_gradients(lambda x: smooth(x.at[:, 5].set(0)), normal(4, 12))
        np.testing.assert_array_equal(found.values[:, 5], 0)
        one = normal(1, 12)
        other = one.at[0, 2].add(3.0)  # differs in one input, and in its score: all is due to that input
        found = attributions.integrated_gradients(smooth, one, other)
        assert abs(float(found.difference[0])) > 1e-2
        np.testing.assert_allclose(found.values[0, 2], found.difference[0], rtol=1e-3)

    def test_implementation_invariance(self):
        def otherwise(x):  # the same function, by other means
            weight, bias = normal(12, 8), normal(8, seed=1)
            hidden = (x[..., ::-1] @ weight[::-1]) + bias[None]
            return jnp.sum((hidden + jnp.abs(hidden)) / 2, -1)

        def plainly(x):
            return jnp.sum(jax.nn.relu(x @ normal(12, 8) + normal(8, seed=1)[None]), -1)

        x = normal(4, 12, seed=3)
        a, b = (attributions.integrated_gradients(f, x, num_steps=20) for f in (otherwise, plainly))
        np.testing.assert_allclose(a.values, b.values, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("steps", "chunk"), [(5, 2), (7, 7), (12, 15)])
    def test_nodes_at_once_change_nothing(self, steps, chunk, monkeypatch):
        x = normal(3, 12)
        one = attributions.integrated_gradients(kinked, x, num_steps=steps, rule="gauss_legendre")
        monkeypatch.setitem(integrated._NODES_AT_ONCE, jax.default_backend(), chunk)
        several = attributions.integrated_gradients(kinked, x, num_steps=steps, rule="gauss_legendre")
        np.testing.assert_allclose(several.values, one.values, rtol=1e-4, atol=1e-5)

    def test_several_baselines_are_averaged(self):
        x, starts = normal(4, 12), normal(3, 4, 12, seed=1)
        found = attributions.integrated_gradients(kinked, x, starts, num_steps=7)
        each = [attributions.integrated_gradients(kinked, x, start, num_steps=7) for start in starts]
        np.testing.assert_allclose(
            found.values, np.mean([one.values for one in each], 0), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(found.values.sum(-1) - found.difference, found.residual, atol=1e-5)
        np.testing.assert_array_equal(found.nodes, 21)

    def test_on_two_devices(self):
        x, labels = normal(2, 3, 12), jnp.asarray([[0, 1, 2], [2, 2, 0]])

        def explain(x, labels):
            score = attributions.class_score(perceptron(jax.nn.relu))
            return attributions.integrated_gradients(score, x, targets=labels, num_steps=5)

        several = jax.pmap(explain)(x, labels)
        one = jax.jit(explain)(x.reshape(6, 12), labels.reshape(6))
        np.testing.assert_allclose(several.values.reshape(6, 12), one.values, rtol=1e-4, atol=1e-6)

    def test_refuses(self):
        x = normal(4, 12)
        for bad in (jnp.arange(4), jnp.zeros((4, 2), jnp.uint8)):
            with pytest.raises(ValueError, match="need a batch of floating-point inputs"):
                attributions.integrated_gradients(lambda x: x, bad)
        for bad in (normal(12), normal(3, 12), normal(1, 1, 4, 12)):
            with pytest.raises(ValueError, match="need the shape of the inputs"):
                attributions.integrated_gradients(kinked, x, bad)
        for score in (perceptron(jax.nn.relu), jnp.sum, lambda x: jnp.argmax(x, -1)):
            with pytest.raises(ValueError, match="one floating-point number per example"):
                attributions.integrated_gradients(score, x)
        with pytest.raises(ValueError, match="num_steps of 1"):
            attributions.integrated_gradients(kinked, x, num_steps=0)
        with pytest.raises(ValueError, match="at index"):
            attributions.integrated_gradients(lambda x: jnp.log(x[:, 0]) + jnp.nan, x)


class TestAdaptive:
    @pytest.fixture(autouse=True)
    def unit(self, monkeypatch):
        """Several units, of which examples fill parts."""
        return functools.partial(monkeypatch.setitem, integrated.UNIT, jax.default_backend())

    def adaptive(self, score, x, start=None, **settings):
        run = functools.partial(attributions.adaptive_integrated_gradients, score, **settings)
        return jax.jit(run)(x, start)

    def test_equals_the_trapezoid_rule_of_the_nodes_it_used(self, unit):
        unit(7)
        x, start = normal(20, 12), normal(20, 12, seed=5)
        found = self.adaptive(kinked, x, start, tolerance=0.01, min_nodes=4, max_nodes=64)
        assert len(set(found.nodes.tolist())) > 2  # else this tests little
        for nodes in set(found.nodes.tolist()):
            fixed = functools.partial(
                attributions.integrated_gradients, kinked, num_steps=nodes, rule="trapezoid"
            )
            wanted, rows = jax.jit(fixed)(x, start), np.asarray(found.nodes) == nodes
            np.testing.assert_allclose(found.values[rows], wanted.values[rows], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found.residual[rows], wanted.residual[rows], atol=1e-4)

    def test_stops_as_soon_as_it_may(self):
        x = normal(32, 12)
        found = self.adaptive(kinked, x, tolerance=0.01, min_nodes=4, max_nodes=64)
        fewer = self.adaptive(kinked, x, tolerance=0.01, min_nodes=4, max_nodes=32)
        under = np.asarray(found.relative_residual) <= 0.01
        assert under.any()
        assert np.all(under | (found.nodes == 65))
        np.testing.assert_array_equal(np.minimum(found.nodes, 33), fewer.nodes)
        later = np.asarray(found.nodes) == 65
        assert later.any()
        assert np.all(np.asarray(fewer.relative_residual)[later] > 0.01)

    def test_the_unit_changes_nothing(self, unit):
        x, found = normal(5, 12), []
        for size in (3, 8, 100):
            unit(size)
            found.append(self.adaptive(kinked, x, tolerance=0.02, min_nodes=2, max_nodes=16))
        for other in found[1:]:
            np.testing.assert_array_equal(other.nodes, found[0].nodes)
            np.testing.assert_allclose(other.values, found[0].values, rtol=1e-4, atol=1e-4)

    def test_targets_stay_with_their_examples(self, unit):
        unit(4)
        x, labels = normal(9, 12), jnp.asarray([0, 1, 2] * 3)
        score = attributions.class_score(perceptron(jax.nn.relu))
        found = attributions.adaptive_integrated_gradients(
            score, x, targets=labels, tolerance=0.01, min_nodes=4, max_nodes=64
        )
        wanted = score(x, labels) - score(0 * x, labels)
        np.testing.assert_allclose(found.difference, wanted, rtol=1e-4, atol=1e-5)
        assert np.all((np.asarray(found.relative_residual) <= 0.01) | (found.nodes == 65))

    def test_a_linear_score_takes_the_first_steps_only(self):
        found = self.adaptive(
            lambda x: x @ normal(12), normal(4, 12), tolerance=1e-4, min_nodes=4, max_nodes=64
        )
        np.testing.assert_array_equal(found.nodes, 5)

    def test_refuses(self):
        x = normal(4, 12)
        for settings_ in (
            {"tolerance": -1.0},
            {"min_nodes": 0},
            {"max_nodes": 8},
            {"min_nodes": 16, "max_nodes": 48},
        ):
            with pytest.raises(ValueError, match="min_nodes times a power of two"):
                self.adaptive(kinked, x, **settings_)
        with pytest.raises(ValueError, match="one baseline per input"):
            self.adaptive(kinked, x, normal(2, 4, 12))
        with pytest.raises(ValueError, match="one floating-point number per example"):
            self.adaptive(perceptron(jax.nn.relu), x)


def tree_of(x):
    """An input in three parts, of other shapes."""
    return {"image": x[:, :6].reshape(-1, 2, 3), "rest": (x[:, 6:10], x[:, 10:])}


def array_of(tree):
    return jnp.concatenate([part.reshape(len(part), -1) for part in jax.tree.leaves(tree)], axis=-1)


def of_tree(score):
    return lambda tree, *targets: score(array_of(tree), *targets)


class TestPytrees:
    """Whatever is attributed to an array is attributed to its parts where it comes in parts."""

    x, start = normal(4, 12), normal(4, 12, seed=1)

    def same(self, parts, whole):
        assert jax.tree.structure(parts) == jax.tree.structure(tree_of(self.x))
        np.testing.assert_allclose(array_of(parts), whole, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("several", "chunk"), [(False, 3), (True, 1)])
    def test_integrated(self, several, chunk, monkeypatch):
        monkeypatch.setitem(integrated._NODES_AT_ONCE, jax.default_backend(), chunk)
        start = jnp.stack([self.start, -self.start]) if several else self.start
        starts = jax.tree.map(lambda *parts: jnp.stack(parts), *map(tree_of, start)) if several else None
        options = {"num_steps": 5}
        whole = attributions.integrated_gradients(kinked, self.x, start, **options)
        parts = attributions.integrated_gradients(
            of_tree(kinked), tree_of(self.x), starts if several else tree_of(start), **options
        )
        self.same(parts.values, whole.values)
        sums = sum(v.sum(tuple(range(1, v.ndim))) for v in jax.tree.leaves(parts.values))
        np.testing.assert_allclose(sums - parts.difference, parts.residual, atol=1e-5)
        np.testing.assert_allclose(parts.residual, whole.residual, rtol=1e-3, atol=1e-5)

    def test_adaptive_with_labels(self, monkeypatch):
        monkeypatch.setitem(integrated.UNIT, jax.default_backend(), 7)
        logits, labels = perceptron(jax.nn.relu), jnp.asarray([0, 2, 1, 2])
        options = {"targets": labels, "tolerance": 0.02, "min_nodes": 4, "max_nodes": 32}
        explain = attributions.adaptive_integrated_gradients
        whole = explain(attributions.class_score(logits), self.x, self.start, **options)
        parts = explain(
            attributions.class_score(of_tree(logits)), tree_of(self.x), tree_of(self.start), **options
        )
        assert len(set(whole.nodes.tolist())) > 1
        np.testing.assert_array_equal(parts.nodes, whole.nodes)
        self.same(parts.values, whole.values)

    def test_gradients(self):
        def weighted(scale, x):
            return scale * smooth(array_of(x))

        def size(scale):
            found = attributions.trainable_input_gradients(weighted, scale, tree_of(self.x))
            return jnp.sum(array_of(found) ** 2)

        plain = jnp.sum(jax.grad(lambda x: jnp.sum(smooth(x)))(self.x) ** 2)
        np.testing.assert_allclose(jax.jit(jax.grad(size))(3.0), 6 * plain, rtol=1e-4)

    def test_baselines(self):
        half = attributions.integrated_gradients(smooth, self.x, 0.5 * jnp.ones_like(self.x), num_steps=3)
        for baseline in (0.5, jnp.float32(0.5)):
            self.same(
                attributions.integrated_gradients(
                    of_tree(smooth), tree_of(self.x), baseline, num_steps=3
                ).values,
                half.values,
            )
        mixed = tree_of(0.5 * jnp.ones_like(self.x)) | {"image": 0.5}
        found = attributions.integrated_gradients(of_tree(smooth), tree_of(self.x), mixed, num_steps=3)
        self.same(found.values, half.values)

    def test_refuse(self):
        x = tree_of(self.x)

        def explain(x, *baselines):
            return attributions.integrated_gradients(of_tree(kinked), x, *baselines, num_steps=2)

        with pytest.raises(ValueError, match=r"got inputs\['image'\] of uint8\[4,2,3\]|uint8\[4, 2, 3\]"):
            explain(x | {"image": jnp.zeros((4, 2, 3), jnp.uint8)})
        with pytest.raises(
            ValueError, match=r"equally many examples in each array, got 4 and, in inputs\['rest'\]\[1\], 3"
        ):
            explain(x | {"rest": (x["rest"][0], x["rest"][1][:3])})
        with pytest.raises(ValueError, match="at least one example"):
            explain({})
        with pytest.raises(ValueError, match="structure of the inputs"):
            explain(x, self.start)
        with pytest.raises(
            ValueError, match=r"baselines\['rest'\]\[0\] need the shape of the inputs, \[4, 4\]"
        ):
            explain(x, x | {"rest": (x["rest"][0][:1], x["rest"][1])})
        for several in (0, 3):  # none, and three of one against two of another
            more = jax.tree.map(lambda v: jnp.stack([v, v]), x)
            with pytest.raises(ValueError, match="need the shape of the inputs"):
                explain(x, more | {"image": jnp.zeros((several, 4, 2, 3))})


class TestLabels:
    logits = staticmethod(perceptron(jax.nn.relu))
    x = normal(3, 12)
    methods = (
        functools.partial(attributions.integrated_gradients, num_steps=4),
        functools.partial(attributions.adaptive_integrated_gradients, min_nodes=4, max_nodes=8),
    )

    @pytest.mark.parametrize("method", methods)
    def test_a_negative_one_is_void(self, method):
        score = attributions.class_score(self.logits)
        found, whole = (method(score, self.x, targets=jnp.asarray(y)) for y in ([1, -1, 2], [1, 0, 2]))
        np.testing.assert_array_equal(found.difference[1], 0)
        np.testing.assert_array_equal(found.relative_residual[1], 0)
        found, whole = found.values, whole.values
        np.testing.assert_array_equal(found[1], 0)
        np.testing.assert_allclose(found[::2], whole[::2], rtol=1e-5, atol=1e-6)
        assert np.abs(whole[1]).max() > 1e-3

    @pytest.mark.parametrize("method", methods)
    def test_others_are_refused(self, method):
        score = attributions.class_score(self.logits)
        for labels, message in (
            (jnp.asarray([0, 3, 1]), "below 3, the number of logits, got 3"),
            (np.asarray([0, 100, -100]), "below 3, the number of logits, got 100"),
            (jnp.asarray([0.0, 1.0, 2.0]), r"integers \[3\], one per example, got float32"),
            (jnp.asarray([True, False, True]), "integers"),
            (jnp.asarray([[0], [1], [2]]), r"got int32\[3, 1\].*labels\[:, 0\]"),
        ):
            with pytest.raises(ValueError, match=message):
                method(score, self.x, targets=labels)

    def test_logits_are_expected(self):
        for bad in (lambda x: x[:, 0], lambda x: {"logits": x}, lambda x: x[:2]):
            with pytest.raises(ValueError, match=r"logits_fn needs to return \[batch, classes\]"):
                attributions.integrated_gradients(
                    attributions.class_score(bad), self.x, targets=jnp.arange(3)
                )


class TestBatches:
    @pytest.mark.parametrize("shape", [(0, 12), (0,), ()])
    def test_without_examples_are_refused(self, shape):
        x = jnp.zeros(shape)
        for method in (
            attributions.integrated_gradients,
            attributions.adaptive_integrated_gradients,
            lambda f, x: attributions.trainable_input_gradients(lambda p, x: f(x), {}, x),
        ):
            with pytest.raises(ValueError, match="at least one example"):
                method(kinked, x)

    def test_targets_have_a_row_for_each(self):
        with pytest.raises(ValueError, match=r"targets\['weight'\] with a row for each of 3 inputs"):
            attributions.adaptive_integrated_gradients(
                lambda x, targets: jnp.sum(x * targets["weight"], -1),
                normal(3, 12),
                targets={"weight": normal(1, 12)},
            )


def test_what_is_not_finite_is_named():
    x = jnp.abs(normal(3, 12)).at[1, 5].set(0)

    def explain(score, x):
        return attributions.integrated_gradients(score, x, num_steps=2, rule="trapezoid")

    def root(x):
        return jnp.sum(jnp.sqrt(x), -1)

    for score, inputs, message in (
        (kinked, x.at[2, 0].set(jnp.nan), r"1 of 3 .* index \(2,\): its input holds a NaN or an infinity"),
        (lambda x: jnp.sum(jnp.log(x), -1), x, r"3 of 3 .* index \(0,\): the score of it or of its baseline"),
        (root, x, r"3 of 3 .* its scores are finite, but a gradient between them is not"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(score, inputs)


class TestGradients:
    def test_equal_captum(self):
        x, labels = jnp.asarray(GOLDENS["inputs"]), jnp.asarray(GOLDENS["labels"])
        found = attributions.trainable_input_gradients(
            lambda _, x: attributions.class_score(network)(x, labels), {}, x
        )
        np.testing.assert_allclose(found, GOLDENS["gradient"], atol=2e-5 * np.abs(GOLDENS["gradient"]).max())

    def test_trainable_ones_have_the_second_derivatives_of_reverse_over_reverse(self):
        x, labels, weight = normal(4, 6, 6, 2), jnp.arange(4) % 3, normal(4, 6, 6, 2, seed=1)
        params = {"conv": 0.3 * normal(3, 3, 2, 4, seed=2), "dense": 0.3 * normal(144, 3, seed=3)}

        def score(params, x, labels):
            hidden = jax.nn.gelu(layers.conv(x, params["conv"]))
            return jnp.take_along_axis(hidden.reshape(4, -1) @ params["dense"], labels[:, None], axis=-1)

        def loss(params, x, *, slope):
            return jnp.sum(weight * (x * slope(params, x)) ** 2)

        def ours(params, x):
            return attributions.trainable_input_gradients(score, params, x, labels)

        def twice_in_reverse(params, x):
            return jax.grad(lambda x: jnp.sum(score(params, x, labels)))(x)

        found, wanted = (
            jax.jit(jax.value_and_grad(functools.partial(loss, slope=slope), (0, 1)))(params, x)
            for slope in (ours, twice_in_reverse)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, wanted)


class TestOverlay:
    def test_is_the_published_blend(self):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
        maps = np.random.default_rng(1).uniform(1, 9, (2, 4, 4, 1)).astype(np.float32)
        found = attributions.overlay(jnp.asarray(pixels), jnp.asarray(maps), opacity=0.5, exponent=1.7)
        raised = maps**1.7
        low, high = (f(axis=(1, 2, 3), keepdims=True) for f in (raised.min, raised.max))
        wanted = 0.5 * pixels + 0.5 * 255 * (raised - low) / (high - low)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-2)

    def test_neither_scale_nor_storage_of_a_map_matters(self):
        pixels, maps = jnp.zeros((3, 8, 8, 1)), jnp.abs(normal(3, 8, 8, 1))
        found = attributions.overlay(pixels, maps, exponent=2.0)
        for scale in (1e-30, 1e30):
            np.testing.assert_allclose(
                attributions.overlay(pixels, scale * maps, exponent=2.0), found, rtol=1e-3, atol=1e-2
            )
        stored = attributions.quantised(maps)
        assert stored["map"].dtype == jnp.uint8
        np.testing.assert_allclose(stored["map_peak"], maps.max((1, 2, 3)))
        np.testing.assert_allclose(attributions.overlay(pixels, stored["map"], exponent=2.0), found, atol=1.0)

    def test_constant_maps_and_no_opacity(self):
        pixels = jnp.full((1, 4, 4, 3), 100, jnp.uint8)
        np.testing.assert_array_equal(attributions.overlay(pixels, jnp.zeros((1, 4, 4, 1))), 50)
        np.testing.assert_array_equal(attributions.overlay(pixels, jnp.ones((1, 4, 4, 1))), 50)
        marked = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2].set(1.0)
        np.testing.assert_array_equal(attributions.overlay(pixels, marked, opacity=0.0), 100)

    def test_a_map_follows_its_image(self):
        """A pixel marked in both is in the same place after any crop and flip, in every example of a batch."""
        rng = np.random.default_rng(0)
        places = rng.integers(4, 12, (64, 2))
        pixels = np.zeros((64, 16, 16, 3), np.uint8)
        maps = np.zeros((64, 16, 16, 1), np.uint8)
        for i, (row, column) in enumerate(places):
            pixels[i, row, column], maps[i, row, column] = 255, 255
        keys = data.example_keys(jax.random.key(0), jnp.arange(64))
        moved, followed = (
            data.crop_and_flip(jnp.asarray(x), keys, padding=4, flip=True) for x in (pixels, maps)
        )
        np.testing.assert_array_equal(moved[..., :1], followed)
        assert (np.asarray(moved) != pixels).any(axis=(1, 2, 3)).sum() > 50
        blended = attributions.random_overlay(moved, followed, keys, probability=1.0)
        np.testing.assert_allclose(blended, moved)  # white on white

    def test_random_overlay(self):
        pixels, maps = (
            jnp.full((4000, 2, 2, 1), 100.0),
            jnp.tile(jnp.asarray([[0.0, 0.5], [0.5, 1.0]]), (4000, 1, 1)),
        )
        keys = data.example_keys(jax.random.key(0), jnp.arange(4000))
        found = attributions.random_overlay(
            pixels, maps[..., None], keys, probability=0.3, exponents=(1.0, 2.0)
        )
        touched = np.asarray(found != pixels).any(axis=(1, 2, 3))
        assert scipy.stats.binomtest(int(touched.sum()), 4000, 0.3).pvalue > 1e-4
        exponent = np.log((np.asarray(found)[touched, 0, 1, 0] - 50) / 127.5) / np.log(0.5)
        assert exponent.min() >= 0.99
        assert exponent.max() <= 2.01
        assert scipy.stats.kstest(np.log2(exponent.clip(1, 2)), "uniform").pvalue > 1e-4
        again = attributions.random_overlay(pixels[7:9], maps[7:9, ..., None], keys[7:9], probability=0.3)
        np.testing.assert_allclose(again, found[7:9], rtol=1e-5)

    def test_refuses(self):
        pixels, maps = jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 1))
        for bad in (maps[:, :3], maps[:1], jnp.zeros((2, 4, 4, 3))):
            with pytest.raises(ValueError, match="overlay needs maps"):
                attributions.overlay(pixels, bad)
        with pytest.raises(ValueError, match="quantised needs maps"):
            attributions.quantised(pixels)
        with pytest.raises(ValueError, match="importance needs attributions"):
            attributions.importance(jnp.zeros((4, 4)))
        one, several = pixels[:1], jnp.full(2, 0.5)
        for option in ({"opacity": several}, {"exponent": several}):
            with pytest.raises(ValueError, match=r"for all images or 1 of them, got \[2\]"):
                attributions.overlay(one, maps[:1], **option)
        with pytest.raises(ValueError, match=r"keys for all images or 2 of them, got \[1\]"):
            attributions.random_overlay(pixels, maps, data.example_keys(jax.random.key(0), jnp.arange(1)))
        with pytest.raises(ValueError, match="opacity from 0 to 1, got 2"):
            attributions.overlay(pixels, maps, opacity=2.0)
        with pytest.raises(ValueError, match="exponent above 0, got 0"):
            attributions.overlay(pixels, maps, exponent=0.0)
        keys = data.example_keys(jax.random.key(0), jnp.arange(2))
        for settings_ in ({"probability": 1.5}, {"exponents": (2.0, 1.0)}, {"exponents": (0.0, 1.0)}):
            with pytest.raises(ValueError, match="probability from 0 to 1 and exponents"):
                attributions.random_overlay(pixels, maps, keys, **settings_)


class TestJudging:
    def test_removal_of_a_linear_score_is_known(self):
        weight = jnp.asarray([5.0, 1.0, 3.0, 2.0]).reshape(1, 2, 2, 1)
        x = jnp.ones((1, 2, 2, 1))

        def score(x):
            return jnp.sum(weight * x, axis=(1, 2, 3))

        def curve(kind, maps):
            return attributions.deletion_insertion(score, x, maps, 0 * x, kind=kind, num_steps=4)[:, 0]

        np.testing.assert_allclose(curve("deletion", weight), [11, 6, 3, 1, 0])
        np.testing.assert_allclose(curve("insertion", weight), [0, 5, 8, 10, 11])
        np.testing.assert_allclose(curve("deletion", -weight), [11, 10, 8, 5, 0])

    def test_a_true_map_lets_the_score_fall_faster_than_a_random_one(self):
        x, start = (jnp.asarray(GOLDENS[name]) for name in ("inputs", "baselines"))
        labels = jnp.asarray(GOLDENS["labels"])
        score = attributions.class_score(network)
        found = attributions.integrated_gradients(score, x, start, targets=labels)
        signed = jnp.sum(found.values, -1, keepdims=True)

        def area(maps):
            curve = attributions.deletion_insertion(score, x, maps, start, kind="deletion", targets=labels)
            np.testing.assert_allclose(curve[0], score(x, labels), rtol=1e-5)
            np.testing.assert_allclose(curve[-1], score(start, labels), rtol=1e-5)
            return np.asarray(jnp.mean(curve, axis=0))

        assert np.all(area(signed) < area(jnp.asarray(normal(*signed.shape))))

    def test_a_known_object_is_found(self):
        """A score that reads a patch and nothing else: maps of it lie there, and point there."""
        masks = np.zeros((8, 12, 12, 1), bool)
        for i in range(8):
            masks[i, i : i + 4, 8 - i : 12 - i] = True
        x = normal(8, 12, 12, 3)

        def score(x, masks):
            return jnp.sum(jnp.tanh(x) * masks, axis=(1, 2, 3))

        found = attributions.integrated_gradients(score, x, targets=jnp.asarray(masks))
        maps = attributions.importance(found.values)
        assert np.all(attributions.pointing_game(maps, jnp.asarray(masks)))
        np.testing.assert_allclose(attributions.relevance_mass(maps, jnp.asarray(masks)), 1, rtol=1e-5)
        even = jnp.ones_like(maps)
        np.testing.assert_allclose(attributions.relevance_mass(even, jnp.asarray(masks)), 16 / 144, rtol=1e-5)
        assert not np.any(attributions.pointing_game(jnp.where(masks, 0, even), jnp.asarray(masks)))
        np.testing.assert_array_equal(attributions.relevance_mass(0 * maps, jnp.asarray(masks)), 0)

    def test_rank_correlation_equals_scipy(self):
        a, b = normal(5, 6, 6, 1), normal(5, 6, 6, 1, seed=1) + normal(5, 6, 6, 1)
        found = attributions.rank_correlation(a, b)
        wanted = [
            scipy.stats.spearmanr(x.ravel(), y.ravel()).statistic
            for x, y in zip(np.asarray(a), np.asarray(b), strict=True)
        ]
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
        np.testing.assert_allclose(attributions.rank_correlation(a, jnp.exp(a)), 1, rtol=1e-5)

    def test_refuse(self):
        x, maps = normal(2, 4, 4, 3), normal(2, 4, 4, 1)

        def score(x):
            return jnp.sum(x, axis=(1, 2, 3))

        with pytest.raises(ValueError, match="got 'removal'"):
            attributions.deletion_insertion(score, x, maps, x, kind="removal")
        with pytest.raises(ValueError, match="num_steps of 1 or more"):
            attributions.deletion_insertion(score, x, maps, x, kind="deletion", num_steps=0)
        with pytest.raises(ValueError, match="of their own shape"):
            attributions.deletion_insertion(score, x, x, x, kind="deletion")
        for judge in (attributions.pointing_game, attributions.relevance_mass, attributions.rank_correlation):
            with pytest.raises(ValueError, match="maps of two equal shapes"):
                judge(maps, x)
        for judge in (attributions.pointing_game, attributions.relevance_mass):
            with pytest.raises(ValueError, match="masks must be boolean"):
                judge(maps, maps)
        with pytest.raises(ValueError, match="of their own shape"):
            attributions.deletion_insertion(score, x[..., 0], maps, x[..., 0], kind="deletion")

    def test_of_no_maps_there_are_no_numbers(self):
        none = jnp.zeros((0, 4, 4, 1))
        assert attributions.pointing_game(none, none > 0).shape == (0,)
        for judge, other in (
            (attributions.relevance_mass, none > 0),
            (attributions.rank_correlation, none),
        ):
            assert judge(none, other).shape == (0,)
        assert attributions.overlay(none, none).shape == (0, 4, 4, 1)

    def test_stored_maps_and_integer_masks_are_what_they_stand_for(self):
        x, maps = normal(2, 4, 4, 3), jnp.abs(normal(2, 4, 4, 1))
        stored = attributions.quantised(maps)["map"]

        def score(x):
            return jnp.sum(x, axis=(1, 2, 3))

        stored_curve, curve = (
            attributions.deletion_insertion(score, x, m, 0 * x, kind="deletion", num_steps=4)
            for m in (stored, stored.astype(jnp.float32))
        )
        np.testing.assert_array_equal(stored_curve, curve)
        inside = maps > 0.5
        for judge in (attributions.pointing_game, attributions.relevance_mass):
            np.testing.assert_array_equal(judge(maps, 255 * inside.astype(jnp.uint8)), judge(maps, inside))


class TestCachedMaps:
    """Maps as cached answers beside logits."""

    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    labels = np.random.default_rng(1).integers(0, 3, 20).astype(np.int32)

    @staticmethod
    def tell(scale, batch):
        """What a teacher stores, of a batch with labels."""

        def logits(x):
            return scale * network(x)

        x = data.normalise(batch["image"], mean=(0.5,) * 3, std=(0.5,) * 3)
        found = attributions.adaptive_integrated_gradients(
            attributions.class_score(logits), x, targets=batch["label"], min_nodes=4, max_nodes=16
        )
        maps = attributions.importance(found.values)
        return {"logits": logits(x), "nodes": found.nodes} | attributions.quantised(maps)

    def with_labels(self, images, index, view):
        del view
        return {"image": images, "label": jnp.asarray(self.labels)[index]}

    def precompute(self, directory, scale=1.0, **more):
        settings = {"labels": "true"}
        scale = jnp.float32(scale)
        return teacher.precompute(
            directory,
            self.tell,
            scale,
            self.images,
            settings=settings,
            view_fn=self.with_labels,
            batch_size=4,
            chunk_size=8,
            **more,
        )

    def test_are_filled_resumed_and_verified(self, tmp_path):
        cached = self.precompute(tmp_path)
        assert cached.arrays["map"].shape == (20, 1, 8, 8, 1)
        assert cached.arrays["map"].dtype == np.uint8
        assert set(np.unique(cached.arrays["nodes"])) <= {5, 9, 17}
        one = jax.jit(self.tell)(1.0, {"image": jnp.asarray(self.images), "label": jnp.asarray(self.labels)})
        np.testing.assert_allclose(cached.arrays["map"][:, 0], one["map"], atol=1)
        teacher.verify(
            cached, self.tell, jnp.float32(1), self.images, view_fn=self.with_labels, num_samples=8
        )
        turned = {name: np.roll(array, 1, axis=0) for name, array in cached.arrays.items()}
        with pytest.raises(ValueError, match="not this teacher's output"):
            teacher.verify(
                cached._replace(arrays=turned),
                self.tell,
                jnp.float32(1),
                self.images,
                view_fn=self.with_labels,
            )
        chunk = sorted(tmp_path.glob("*.npz"))[1]
        chunk.write_bytes(chunk.read_bytes()[:-7])  # as a kill in a bad moment might leave it
        with pytest.raises(ValueError, match="damaged"):
            teacher.load(tmp_path, header={})
        with pytest.warns(UserWarning, match="computed again"):
            again = self.precompute(tmp_path)
        np.testing.assert_array_equal(again.arrays["map"], cached.arrays["map"])

    def test_of_a_diverged_teacher_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="at index 0"):
            self.precompute(tmp_path, scale=np.nan)
        assert not list(tmp_path.glob("*.npz"))


def test_devices():
    assert len(parallel.local_devices(None)) >= 2  # test_on_two_devices needs them
