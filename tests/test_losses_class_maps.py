"""Class maps: their laws, the authors' matrices, and an independent solver of the least squares."""

from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import optimize, special
from sklearn import metrics

from kdjax import losses

GOLDENS = np.load(Path(__file__).parent / "goldens" / "class_maps.npz", allow_pickle=False)
ANIMALS = {"cat": ["lion", "tiger"], "dog": ["wolf"], "fish": ["trout", "tiger"]}
TEACHER, CLASSES = ["trout", "wolf", "lion", "tiger", "cup"], ["cat", "dog", "fish"]
FITS = {
    "blm": lambda t, y, c: losses.bayesian_class_map(t, y, num_classes=c),
    "blm_plus": lambda t, y, c: losses.bayesian_class_map(t, y, num_classes=c, smoothing=0.0, top_k=2),
    "least_squares": lambda t, y, c: losses.least_squares_class_map(t, y, num_classes=c, steps=200),
}


def drawn(seed, examples=40, sources=6, classes=4):
    """Teacher logits that depend on the labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(examples) % classes
    shift = 2 * (np.arange(sources) % classes == labels[:, None])
    return (rng.normal(size=(examples, sources)) + shift).astype(np.float32), labels


class TestByNames:
    def test_a_teacher_class_is_divided_among_those_that_list_it(self):
        even = losses.class_map(ANIMALS, teacher_classes=TEACHER, classes=CLASSES)
        third = 1 / 3
        wanted = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0.5, 0, 0.5], [third, third, third]]
        np.testing.assert_allclose(even, wanted, rtol=1e-6)
        dropped = losses.class_map(ANIMALS, teacher_classes=TEACHER, classes=CLASSES, uncovered="drop")
        np.testing.assert_allclose(dropped, [*wanted[:4], [0, 0, 0]], rtol=1e-6)
        for matrix in (even, dropped):
            losses.check_class_map(matrix, num_teacher_classes=5, num_classes=3)

    def test_follows_the_order_of_the_names(self):
        rows, columns = np.array([4, 2, 0, 1, 3]), np.array([1, 2, 0])
        moved = losses.class_map(
            ANIMALS,
            teacher_classes=[TEACHER[i] for i in rows],
            classes=[CLASSES[i] for i in columns],
        )
        whole = losses.class_map(ANIMALS, teacher_classes=TEACHER, classes=CLASSES)
        np.testing.assert_array_equal(moved, whole[rows][:, columns])

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"teacher_classes_of": {**ANIMALS, "cow": ["cup"]}}, "needs student classes, got cow"),
            ({"teacher_classes_of": {**ANIMALS, "dog": ["fox"]}}, "needs teacher classes, got fox for dog"),
            ({"teacher_classes_of": {**ANIMALS, "dog": []}}, "every student class, got none for dog"),
            ({"classes": [*CLASSES, "cow"]}, "every student class, got none for cow"),
            ({"classes": [*CLASSES, "cat"]}, "distinct classes, got cat"),
            ({"teacher_classes": [*TEACHER, "cup"]}, "distinct teacher_classes, got cup"),
            ({"uncovered": "spread"}, "uncovered='even' or 'drop', got 'spread'"),
        ],
    )
    def test_names_that_do_not_fit_are_refused(self, changes, said):
        given = {"teacher_classes_of": ANIMALS, "teacher_classes": TEACHER, "classes": CLASSES, **changes}
        with pytest.raises(ValueError, match=said):
            losses.class_map(given.pop("teacher_classes_of"), **given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m[:4], r"needs 5 rows .* got \[4, 3\]"),
        (lambda m: 0.9 * m, "row 0 sums to 0.9"),
        (lambda m: m - np.array([[0.5, -0.5, 0]]), "least entry is -0.5"),
        (lambda m: m * np.array([[1, np.nan, 1]]), "row 0 sums to nan"),
        (lambda m: np.eye(5, 3) * [1, 1, 0], r"every student class, got none for \[2\]"),
    ],
)
def test_what_is_no_map_is_refused(change, said):
    matrix = losses.class_map(ANIMALS, teacher_classes=TEACHER, classes=CLASSES)
    with pytest.raises(ValueError, match=said):
        losses.check_class_map(change(matrix), num_teacher_classes=5, num_classes=3)


class TestMapping:
    @given(st.integers(0, 2**31), st.floats(0.5, 20))
    @settings(deadline=None, max_examples=10)
    def test_probabilities_are_sent_through_the_map(self, seed, temperature):
        logits, _ = drawn(seed)
        matrix = np.random.default_rng(seed).dirichlet(np.ones(3), size=6).astype(np.float32)
        mapped = losses.map_classes(logits, matrix, temperature=temperature)
        wanted = special.softmax(logits.astype(float) / temperature, axis=-1) @ matrix.astype(float)
        np.testing.assert_allclose(jax.nn.softmax(mapped / temperature), wanted, rtol=2e-4, atol=1e-6)

    def test_the_identity_changes_no_prediction(self):
        logits, _ = drawn(0)
        same = losses.map_classes(logits, np.eye(6, dtype=np.float32))
        np.testing.assert_allclose(jax.nn.softmax(same), jax.nn.softmax(logits), rtol=1e-5)

    def test_dropped_classes_leave_the_conditional_probability(self):
        logits, _ = drawn(1)
        matrix = np.eye(6, dtype=np.float32)[:, :4]  # the last two rows are zero
        p = jax.nn.softmax(losses.map_classes(logits, matrix))
        np.testing.assert_allclose(p, jax.nn.softmax(logits[:, :4]), rtol=1e-5)

    def test_an_example_without_a_covered_class_counts_nothing(self):
        logits = np.array([[0.0, -np.inf, -np.inf], [1, 2, 3]], np.float32)
        matrix = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
        student = jnp.array([[1.0, 2.0], [0.5, 0.1]])
        value = losses.soft_target_kl(student, losses.map_classes(logits, matrix))
        assert value[0] == 0
        assert value[1] > 0

    def test_no_gradient_reaches_teacher_or_map(self):
        logits, _ = drawn(2)
        matrix = jnp.full((6, 3), 1 / 3)
        gradients = jax.grad(lambda *x: jnp.sum(losses.map_classes(*x)), (0, 1))(jnp.asarray(logits), matrix)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0)


class TestLearnt:
    @pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
    @given(st.integers(0, 2**31))
    @settings(deadline=None, max_examples=5)
    def test_rows_are_probabilities_and_follow_the_classes(self, fit, seed):
        logits, labels = drawn(seed)
        matrix = fit(logits, labels, 4)
        losses.check_class_map(matrix, num_teacher_classes=6, num_classes=4)
        rng = np.random.default_rng(seed)
        rows, columns = rng.permutation(6), rng.permutation(4)
        moved = fit(logits[:, rows], np.argsort(columns)[labels], 4)
        np.testing.assert_allclose(moved, matrix[rows][:, columns], atol=2e-3)

    @pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
    def test_void_labels_are_left_out(self, fit):
        logits, labels = drawn(3)
        few = fit(logits[:30], labels[:30], 4)
        void = fit(logits, np.where(np.arange(40) < 30, labels, -1), 4)
        np.testing.assert_allclose(void, few, atol=1e-5)

    def test_counts_are_those_of_the_confusion_matrix(self):
        logits, labels = drawn(4)
        counts = metrics.confusion_matrix(logits.argmax(1), labels, labels=range(6))[:, :4]
        wanted = (counts + 0.5 / 4) / (counts.sum(1, keepdims=True) + 0.5)
        found = losses.bayesian_class_map(logits, labels, num_classes=4, smoothing=0.5)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)

    def test_a_class_that_is_never_predicted_is_divided_evenly(self):
        logits, labels = drawn(5)
        logits[:, 2] = -30
        for smoothing in (0.0, 1.0):
            found = losses.bayesian_class_map(logits, labels, num_classes=4, smoothing=smoothing)
            np.testing.assert_allclose(found[2], 1 / 4)

    @pytest.mark.parametrize(("name", "options"), [("blm", {}), ("blm_plus", {"smoothing": 0.0, "top_k": 3})])
    def test_weights_of_logits_are_the_authors(self, name, options):
        found = losses.bayesian_logit_weights(GOLDENS["logits"], GOLDENS["labels"], num_classes=4, **options)
        np.testing.assert_allclose(found, GOLDENS[name], rtol=1e-5, atol=1e-7)

    def test_least_squares_by_another_solver(self):
        logits, labels = drawn(6, sources=5, classes=3)
        p, y = special.softmax(logits.astype(float), axis=-1), np.eye(3)[labels]

        def loss(matrix):
            return np.mean(np.sum((p @ np.reshape(matrix, (5, 3)) - y) ** 2, axis=1))

        rows = {"type": "eq", "fun": lambda m: m.reshape(5, 3).sum(1) - 1}
        solved = optimize.minimize(
            loss, np.full(15, 1 / 3), bounds=[(0, 1)] * 15, constraints=rows, tol=1e-12
        )
        found = losses.least_squares_class_map(logits, labels, num_classes=3)
        np.testing.assert_allclose(found, solved.x.reshape(5, 3), atol=2e-3)
        assert loss(found) == pytest.approx(solved.fun, abs=1e-6)

    def test_top_k_beyond_the_teachers_classes_is_refused(self):
        logits, labels = drawn(7)
        with pytest.raises(ValueError, match="top_k from 1 to 6, the teacher's classes, got 9"):
            losses.bayesian_class_map(logits, labels, num_classes=4, top_k=9)
