"""REFILLED against its authors' values, against loops over all triplets, its laws, and with the batch cut in two."""

from functools import cache, partial
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from scipy import special

from kdjax import losses, methods, parallel
from kdjax.losses import refilled
from kdjax.types import Outputs

GOLDENS = np.load(Path(__file__).parent / "goldens" / "refilled.npz", allow_pickle=False)
ROWS, CLASSES = 8, 4
SEEDS = st.integers(0, 2**31)
TWO_DEVICES = pytest.mark.skipif(
    jax.device_count() < 2, reason="needs two devices; conftest.py simulates them"
)


def drawn(seed, rows=ROWS):
    """Embeddings of student and teacher around their classes, and labels; the last is void."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, size=rows)
    student, teacher = (
        (rng.normal(size=(rows, width)) + rng.normal(size=(3, width))[labels]).astype(np.float32)
        for width in (3, 5)
    )
    labels[-1] = -1
    return student, teacher, labels


def in_loops(student, teacher, labels, temperature=4.0, margin=0.2):
    """The mean over the semi-hard triplets, how many there are, and how near the next is to being another."""

    def distances(rows):
        unit = rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
        return np.linalg.norm(unit[:, None] - unit, axis=-1)

    ours, theirs = distances(student), distances(teacher)
    values, nearest = [], np.inf
    for a in range(len(labels)):
        for p in range(len(labels)):
            for n in range(len(labels)):
                if a == p or min(labels[[a, p, n]]) < 0 or not labels[a] == labels[p] != labels[n]:
                    continue
                gap = ours[a, n] - ours[a, p]
                nearest = min(nearest, abs(gap), abs(gap - margin))
                if 0 < gap <= margin:
                    both = np.array([[theirs[a, n] - theirs[a, p]], [gap]]) / temperature * [1, -1]
                    values.append(special.rel_entr(*special.expit(both)).sum())
    return np.mean(values) if values else 0.0, len(values), nearest


@cache
def compiled(argnums=0):
    """Value and gradient of the triplets' loss; hypothesis and tests of one shape share the program."""

    def loss(student, teacher, labels, temperature, margin):
        return losses.triplet_relations(student, teacher, labels, temperature=temperature, margin=margin)

    return jax.jit(jax.value_and_grad(loss, argnums=argnums))


def triplets(student, teacher, labels, temperature=4.0, margin=0.2, argnums=0):
    return compiled(argnums)(student, teacher, labels, temperature, margin)


@cache
def local(temperature=2.0):
    """The mean of local distillation and its gradient."""

    def loss(student, teacher, labels):
        values = losses.local_kl(student, teacher, labels, temperature=temperature)
        return jnp.mean(values), values

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


class TestAuthors:
    def test_triplets(self):
        arguments = [GOLDENS[name] for name in ("student_embedding", "teacher_embedding", "labels")]
        assert in_loops(*arguments)[1] > 20
        value, gradient = triplets(*arguments)
        np.testing.assert_allclose(500 * value, GOLDENS["triplets/loss"], rtol=1e-4)
        wanted = GOLDENS["triplets/grad"]
        np.testing.assert_allclose(500 * gradient, wanted, atol=1e-4 * np.abs(wanted).max())

    def test_centres_of_the_training_set(self):
        found = losses.class_centres(GOLDENS["teacher_embedding"], GOLDENS["labels"], num_classes=6)
        np.testing.assert_allclose(found, GOLDENS["centres"], rtol=1e-5, atol=1e-7)

    def test_local_distillation_beside_the_labels(self):
        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def step(logits, embedding, labels):
            hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            soft = losses.local_kl(logits, losses.centre_logits(embedding, GOLDENS["centres"]), labels)
            terms = jnp.mean(hard), 25 * jnp.mean(soft)
            return sum(terms), terms

        found, gradients = [], []
        for batch in np.split(np.arange(12), 2):
            names = ("student_logits", "teacher_embedding", "labels")
            (_, values), gradient = step(*(GOLDENS[name][batch] for name in names))
            found.append(values)
            gradients.append(gradient)
        wanted = GOLDENS["local/hard"], GOLDENS["local/soft"]
        np.testing.assert_allclose(np.mean(found, axis=0), wanted, rtol=1e-5)
        np.testing.assert_allclose(np.concatenate(gradients), GOLDENS["local/grad"], rtol=1e-4, atol=1e-5)


class TestTriplets:
    @settings(deadline=None, max_examples=25)
    @given(SEEDS, st.floats(0.01, 10), st.floats(0.01, 2))
    def test_equal_a_loop_over_all(self, seed, temperature, margin):
        arguments = drawn(seed)
        wanted, _, nearest = in_loops(*arguments, temperature, margin)
        assume(nearest > 1e-5)
        value, gradient = triplets(*arguments, temperature, margin)
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-7)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[-1], 0)  # void

    @settings(deadline=None, max_examples=10)
    @given(SEEDS, st.permutations(range(ROWS)), st.permutations(range(3)))
    def test_blind_to_the_order_the_scale_and_the_names_of_the_classes(self, seed, order, classes):
        student, teacher, labels = drawn(seed)
        assume(in_loops(student, teacher, labels)[2] > 1e-5)
        value, gradient = triplets(student, teacher, labels)
        order, classes = np.array(order), np.array(classes)
        scale = np.exp(np.random.default_rng(seed).normal(size=(2, ROWS, 1))).astype(np.float32)
        again, other = triplets(
            (scale[0] * student)[order],
            (scale[1] * teacher)[order],
            np.where(labels < 0, -7, classes[labels])[order],
        )
        np.testing.assert_allclose(again, value, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(other * scale[0][order], gradient[order], rtol=1e-2, atol=1e-5)

    @settings(deadline=None, max_examples=10)
    @given(SEEDS)
    def test_least_where_the_networks_agree(self, seed):
        student, _, labels = drawn(seed)
        rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 3)))[0].T.astype(np.float32)
        value, gradient = triplets(student, student @ rotation, labels)
        np.testing.assert_allclose(value, 0, atol=1e-9)
        np.testing.assert_allclose(gradient, 0, atol=1e-5)
        assert triplets(*drawn(seed))[0] >= 0

    @pytest.mark.parametrize("labels", [np.zeros(ROWS, int), np.arange(ROWS), np.full(ROWS, -1)])
    def test_without_any_zero_and_without_gradient(self, labels):
        value, gradient = triplets(*drawn(0)[:2], labels)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)

    def test_void_examples_count_nothing_whatever_they_hold(self):
        student, teacher, labels = drawn(1)
        few, of_few = triplets(student[:-1], teacher[:-1], labels[:-1], margin=1.0)
        student[-1], teacher[-1] = np.nan, np.inf
        value, gradient = triplets(student, teacher, labels, margin=1.0)
        assert few > 0
        np.testing.assert_allclose(value, few, rtol=1e-4)
        np.testing.assert_allclose(gradient[:-1], of_few, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(gradient[-1], 0)
        assert np.isnan(triplets(student, teacher, np.arange(ROWS) % 3, margin=1.0)[0])  # not void: seen

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: 0 * x,
            lambda x: 0 * x + 1e4,
            lambda x: np.concatenate([x[:1], x[:1], 0 * x[:1], x[3:]]),
            lambda x: np.concatenate([x[:4], x[:4]]),
            lambda x: 1e4 * np.sign(x),
            lambda x: 1e-15 * x,
        ],
        ids=["zero", "equal", "some zero and equal", "pairs of equals", "saturated", "tiny"],
    )
    def test_degenerate_batches_are_finite(self, change):
        student, teacher, _ = drawn(2)
        labels = np.arange(ROWS) % 3
        odd = [change(x).astype(np.float32) for x in (student, teacher)]
        for pair in ((odd[0], teacher), (student, odd[1]), odd):
            value, gradient = triplets(*pair, labels, margin=1.0)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()
            assert np.abs(gradient[np.any(pair[0] > 1e-6, axis=1)]).max(initial=0) < 10

    def test_an_embedding_of_zero_is_as_a_void_label(self):
        student, teacher, labels = drawn(3)
        labels[-1] = 0
        for who in (0, 1):
            pair = [student.copy(), teacher.copy()]
            pair[who][-1] = 0
            value, gradient = triplets(*pair, labels, margin=1.0)
            void, of_void = triplets(*pair, np.where(np.arange(ROWS) < ROWS - 1, labels, -1), margin=1.0)
            assert value == void > 0
            np.testing.assert_array_equal(gradient, of_void)

    def test_no_gradient_reaches_the_teacher(self):
        _, (ours, theirs) = triplets(*drawn(4), margin=1.0, argnums=(0, 1))
        assert np.any(ours)
        np.testing.assert_array_equal(theirs, 0)

    @pytest.mark.parametrize("at_once", [1, 3])
    def test_anchors_a_few_at_a_time_change_nothing(self, monkeypatch, at_once):
        arguments = drawn(5)
        wanted = triplets(*arguments, margin=1.0)
        monkeypatch.setattr(refilled, "_TRIPLETS_AT_ONCE", at_once * ROWS**2)
        got = jax.jit(jax.value_and_grad(partial(losses.triplet_relations, margin=1.0)))(*arguments)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, wanted)

    def test_a_large_batch_does_not_store_all(self):
        shapes = [jax.ShapeDtypeStruct((256, 64), jnp.float32)] * 2 + [
            jax.ShapeDtypeStruct((256,), jnp.int32)
        ]
        program = jax.jit(jax.grad(losses.triplet_relations)).lower(*shapes).compile()
        assert program.memory_analysis().temp_size_in_bytes < 4 * 256**3

    def test_the_divergence_of_two_events_is_precise_near_equality_and_finite_far_off(self):
        a, change = np.meshgrid([-90.0, -20, -1, 0, 0.3, 20, 90], [0, 1e-3, -0.02, 0.9, -1.1, 30, -200])
        a, b = a.ravel().astype(np.float32), (a + change).ravel().astype(np.float32)
        p, q = (special.expit(np.array([x, -x], float)) for x in (a, b))
        first = jax.grad(refilled._binary_divergence, 1)
        each = jax.jit(
            lambda *x: [jax.vmap(f)(*x) for f in (refilled._binary_divergence, first, jax.grad(first, 1))]
        )
        value, slope, curvature = each(a, b)
        wanted = special.rel_entr(p, q).sum(0)
        np.testing.assert_allclose(value, wanted, rtol=2e-3, atol=2e-5)
        near = (abs(b - a) < 1) & (abs(a) < 2)
        np.testing.assert_allclose(value[near], wanted[near], rtol=2e-3, atol=1e-12)
        np.testing.assert_allclose(slope, q[0] - p[0], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(curvature, q[0] * q[1], rtol=1e-5, atol=1e-7)

    @TWO_DEVICES
    def test_cut_over_two_devices_all_is_as_of_the_whole(self):
        student, teacher, labels = drawn(6)
        mapped = jax.value_and_grad(partial(losses.triplet_relations, margin=1.0, axis_name=parallel.AXIS))
        halves = [x.reshape(2, ROWS // 2, *x.shape[1:]) for x in (student, teacher, labels)]
        values, gradients = jax.pmap(mapped, parallel.AXIS, devices=jax.devices()[:2])(*halves)
        value, gradient = triplets(student, teacher, labels, margin=1.0)
        assert value > 0
        np.testing.assert_allclose(values, [value, value], rtol=1e-4)
        np.testing.assert_allclose(gradients.reshape(ROWS, -1) / 2, gradient, rtol=1e-3, atol=1e-6)


class TestCentres:
    @settings(deadline=None, max_examples=10)
    @given(SEEDS, st.permutations(range(CLASSES)))
    def test_are_unit_means_and_follow_the_classes(self, seed, classes):
        _, teacher, labels = drawn(seed)
        found = losses.class_centres(teacher, labels, num_classes=CLASSES)
        for c in range(CLASSES):
            mean = teacher[labels == c].astype(float).mean(0) if c in labels else np.zeros(5)
            np.testing.assert_allclose(found[c], mean / (np.linalg.norm(mean) or 1), atol=1e-5)
        classes = np.array(classes)
        moved = losses.class_centres(
            3 * teacher, np.where(labels < 0, -7, classes[labels]), num_classes=CLASSES
        )
        np.testing.assert_allclose(moved[classes], found, atol=1e-5)

    def test_void_examples_count_nothing_whatever_they_hold(self):
        _, teacher, labels = drawn(0)
        few = losses.class_centres(teacher[:-1], labels[:-1], num_classes=CLASSES)
        teacher[-1] = np.nan
        found = losses.class_centres(teacher, labels, num_classes=CLASSES)
        np.testing.assert_allclose(found, few, rtol=1e-6)

    def test_logits_are_products_and_masked_without_a_centre(self):
        _, teacher, labels = drawn(1)
        centres = losses.class_centres(teacher, labels, num_classes=CLASSES)
        logits = losses.centre_logits(teacher, centres)
        wanted = np.where(np.isin(np.arange(CLASSES), labels), teacher @ np.array(centres).T, -np.inf)
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-6)
        assert np.isneginf(logits[:, 3]).all()

    def test_no_gradient_reaches_the_teacher(self):
        _, teacher, labels = drawn(2)

        def total(embedding):
            centres = losses.class_centres(embedding, labels, num_classes=3)
            return jnp.sum(losses.centre_logits(embedding, centres))

        np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(teacher)), 0)

    @TWO_DEVICES
    def test_cut_over_two_devices_are_those_of_the_whole(self):
        _, teacher, labels = drawn(3)
        mapped = partial(losses.class_centres, num_classes=CLASSES, axis_name=parallel.AXIS)
        halves = teacher.reshape(2, -1, 5), labels.reshape(2, -1)
        found = jax.pmap(mapped, parallel.AXIS, devices=jax.devices()[:2])(*halves)
        wanted = losses.class_centres(teacher, labels, num_classes=CLASSES)
        for each in found:
            np.testing.assert_allclose(each, wanted, rtol=1e-5, atol=1e-6)


class TestLocalKl:
    def logits(self, seed, rows=ROWS, classes=5):
        """Of both networks, and labels of which the last is void."""
        rng = np.random.default_rng(seed)
        student, teacher = 2 * rng.normal(size=(2, rows, classes)).astype(np.float32)
        labels = rng.choice(rng.permutation(classes)[:3], size=rows)
        labels[-1] = -1
        return student, teacher, labels

    @settings(deadline=None, max_examples=10)
    @given(SEEDS)
    def test_is_the_divergence_over_the_classes_of_the_batch(self, seed):
        student, teacher, labels = self.logits(seed)
        present = np.unique(labels[:-1])
        (_, values), gradient = local()(student, teacher, labels)
        q, p = (special.softmax(x[:-1, present].astype(float) / 2, axis=1) for x in (student, teacher))
        np.testing.assert_allclose(values[:-1], 4 * special.rel_entr(p, q).sum(1), rtol=1e-3, atol=1e-6)
        assert values[-1] == 0
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[-1], 0)
        np.testing.assert_array_equal(np.delete(gradient, present, axis=1), 0)

    @settings(deadline=None, max_examples=10)
    @given(SEEDS, st.permutations(range(ROWS)), st.permutations(range(5)))
    def test_follows_the_order_of_examples_and_classes(self, seed, order, classes):
        student, teacher, labels = self.logits(seed)
        order, classes = np.array(order), np.array(classes)
        (_, values), gradient = local()(student, teacher, labels)
        place = np.argsort(classes)
        (_, again), other = local()(
            student[order][:, classes],
            teacher[order][:, classes],
            np.where(labels < 0, -1, place[labels])[order],
        )
        np.testing.assert_allclose(again, values[order], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(other, gradient[order][:, classes], rtol=1e-3, atol=1e-6)

    def test_least_where_they_agree_on_the_classes_of_the_batch(self):
        student, teacher, labels = self.logits(0)
        present = np.isin(np.arange(5), labels)
        agreeing = np.where(present, teacher + np.arange(ROWS, dtype=np.float32)[:, None], student)
        (value, _), gradient = local()(agreeing, teacher, labels)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
        (other, _), _ = local()(student, teacher, labels)
        assert other > 0.1

    def test_with_all_classes_is_soft_target_kl(self):
        student, teacher, _ = self.logits(1)
        labels = np.arange(ROWS) % 5
        (_, values), _ = local(4.0)(student, teacher, labels)
        wanted = losses.soft_target_kl(student, teacher, temperature=4.0)
        np.testing.assert_allclose(values, wanted, rtol=1e-6)

    @pytest.mark.parametrize("label", [-1, 3])
    def test_of_one_class_or_none_zero_and_without_gradient(self, label):
        student, teacher, _ = self.logits(2)
        (_, values), gradient = local()(student, teacher, np.full(ROWS, label))
        np.testing.assert_array_equal(values, 0)
        np.testing.assert_array_equal(gradient, 0)

    def test_of_an_unknown_class_is_nan(self):
        student, teacher, labels = self.logits(3)
        labels[0] = 5
        (_, values), _ = local()(student, teacher, labels)
        assert np.isnan(values[0])
        assert np.isfinite(values[1:]).all()

    @TWO_DEVICES
    def test_cut_over_two_devices_compares_the_classes_of_both(self):
        student, teacher, _ = self.logits(4)
        labels = np.repeat([0, 2, 3, 4], 2)
        mapped = partial(losses.local_kl, axis_name=parallel.AXIS)
        halves = student.reshape(2, -1, 5), teacher.reshape(2, -1, 5), labels.reshape(2, -1)
        found = jax.pmap(mapped, parallel.AXIS, devices=jax.devices()[:2])(*halves)
        np.testing.assert_allclose(found.reshape(-1), losses.local_kl(student, teacher, labels), rtol=1e-5)


class TestMethod:
    @pytest.fixture(scope="class")
    @classmethod
    def terms(cls):
        """``step -> terms`` of a teacher of 9 classes, whose logits no batch holds; and what goes in."""
        ours, theirs, labels = drawn(7)
        labels[-1] = 1
        logits = np.random.default_rng(0).normal(size=(ROWS, CLASSES)).astype(np.float32)
        student = Outputs(jnp.asarray(logits), {"embedding": jnp.asarray(ours)})
        teacher = Outputs(jnp.zeros((ROWS, 9)), {"embedding": jnp.asarray(theirs)})
        method = methods.refilled()
        bound = methods.bind(method, student, teacher, steps=240, labels=labels)
        assert bound.teacher_features == ("embedding",)
        assert (method.reads_labels, method.hard_weight, bound.heads) == (True, 1.0, None)

        def objective(step):
            batch = {"label": jnp.asarray(labels)[None], "teacher_embedding": jnp.asarray(theirs)[None]}
            run = jax.vmap(lambda s, b: bound.objective(s, b | {"step": step}), axis_name=parallel.AXIS)
            return jax.tree.map(lambda x: x[0], run(jax.tree.map(lambda x: x[None], student), batch))

        return jax.jit(objective), (logits, ours, theirs, labels)

    def test_has_triplets_alone_and_then_the_rest(self, terms):
        found, (logits, ours, theirs, labels) = terms
        first, later = found(29), found(30)
        relations, _ = triplets(ours, theirs, labels)
        target = losses.centre_logits(theirs, losses.class_centres(theirs, labels, num_classes=CLASSES))
        (local_value, _), _ = local()(logits, target, labels)
        assert min(relations, local_value) > 0
        np.testing.assert_allclose(first["refilled_triplets"], 500 * relations, rtol=1e-4)
        np.testing.assert_allclose(later["refilled"], 25 * local_value, rtol=1e-4)
        assert first["hard"] == first["refilled"] == later["refilled_triplets"] == 0
        assert later["hard"] > 0

    def test_weights_decide_the_description(self):
        whole = methods.refilled(10.0, triplet_weight=100.0).description
        assert whole == {
            "hard_weight": 1.0,
            "refilled": {"weight": 10.0},
            "refilled_triplets": {"weight": 100.0},
        }
