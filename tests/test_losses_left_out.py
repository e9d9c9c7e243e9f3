"""Void labels and masked classes: what a loss leaves out changes nothing, in the value and in the gradient."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

LOWEST = float(jnp.finfo(jnp.float32).min)
RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 3, 6)) * 2
LABELS = np.array([1, 0, 3])
LIVE = np.array([True, True, False, True, True, False])
RENUMBERED = np.cumsum(LIVE) - 1  # the class among those that are live


def log_softmax(x, temperature=1.0):
    x = x / temperature
    with np.errstate(divide="ignore"):
        return (
            x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        )


def kl(log_p, log_q):
    """In float64; a class without probability adds nothing."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def cross_entropy(log_p, log_q):
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return -np.where(p > 0, p * log_q, 0).sum(-1)


def pearson(a, b):
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def standardised(x):
    live = np.isfinite(x)
    rows = []
    for row, keep in zip(x, live, strict=True):
        rows.append(np.where(keep, (row - row[keep].mean()) / row[keep].std(ddof=1), -np.inf))
    return np.array(rows)


def decoupled(s, t, y):
    log_q, log_p = log_softmax(s, 4.0), log_softmax(t, 4.0)
    rows = np.arange(len(y))
    pairs = (np.stack([x[rows, y], np.log1p(-np.exp(x[rows, y]))], -1) for x in (log_p, log_q))
    rest = np.arange(s.shape[1])[None] != y[:, None]
    others = (log_softmax(np.where(rest, x, -np.inf)) for x in (log_p, log_q))
    return 16 * (kl(*pairs) + 8 * kl(*others))


def jensen_shannon(s, t):
    log_q, log_p = log_softmax(s), log_softmax(t)
    middle = np.log((np.exp(log_p) + np.exp(log_q)) / 2)
    return (kl(log_p, middle) + kl(log_q, middle)) / 2


def teacher_free(s, t, y):
    u = np.full(s.shape, 0.1 / (s.shape[1] - 1))
    u[np.arange(len(y)), y] = 0.9
    return 4 * kl(log_softmax(np.log(u), 2.0), log_softmax(s, 2.0))


def smoothed(s, t, y):
    return -0.9 * log_softmax(s)[np.arange(len(y)), y] - 0.1 * log_softmax(s).mean(-1)


def top_three(s, t):
    log_p = log_softmax(t)
    order = np.argsort(-log_p, axis=-1)[:, :3]
    kept = [np.take_along_axis(x, order, -1) for x in (log_p, log_softmax(s))]
    rest = [np.log1p(-np.exp(x).sum(-1, keepdims=True)) for x in kept]
    return kl(*(np.concatenate(pair, -1) for pair in zip(kept, rest, strict=True)))


def soft_ranks(x):
    return np.tanh((x[:, :, None] - x[:, None, :]) / 2).sum(-1)


def dist(s, t):
    p, q = np.exp(log_softmax(s)), np.exp(log_softmax(t))
    columns = np.nan_to_num(pearson(p.T, q.T))  # one that does not vary is uncorrelated
    return np.atleast_1d(2 - pearson(p, q).mean() - columns.mean())


class Case(NamedTuple):
    """A loss of student, teacher and labels, and the same in float64 with NumPy, which knows no masks."""

    loss: Callable
    wanted: Callable
    labelled: bool = False


def stored_top_three(s, t, y):
    return losses.top_k_kl(s, *jax.lax.top_k(jnp.nan_to_num(jax.nn.softmax(t)), 3))


CASES = {
    "soft_target_kl": Case(
        lambda s, t, y: losses.soft_target_kl(s, t, temperature=2.0),
        lambda s, t, y: 4 * kl(log_softmax(t, 2.0), log_softmax(s, 2.0)),
    ),
    "soft_target_cross_entropy": Case(
        lambda s, t, y: losses.soft_target_cross_entropy(s, t),
        lambda s, t, y: cross_entropy(log_softmax(t), log_softmax(s)),
    ),
    "squared_logits": Case(
        lambda s, t, y: losses.squared_logits(s, t), lambda s, t, y: ((s - t) ** 2).mean(-1)
    ),
    "dkd": Case(losses.dkd, decoupled, labelled=True),
    "dist": Case(lambda s, t, y: losses.dist(s, t)[None], lambda s, t, y: dist(s, t)),
    "logit_standardised_kl": Case(
        lambda s, t, y: losses.logit_standardised_kl(s, t),
        lambda s, t, y: 4 * kl(*(log_softmax(standardised(x), 2.0) for x in (t, s))),
    ),
    "wttm": Case(
        lambda s, t, y: losses.wttm(s, t, temperature=2.0),
        lambda s, t, y: np.exp(log_softmax(t) / 2.0).sum(-1) * kl(log_softmax(t, 2.0), log_softmax(s)),
    ),
    "confidence_penalty": Case(
        lambda s, t, y: losses.confidence_penalty(s),
        lambda s, t, y: -cross_entropy(log_softmax(s), log_softmax(s)),
    ),
    "teacher_free_kl": Case(
        lambda s, t, y: losses.teacher_free_kl(s, y, correct_probability=0.9, temperature=2.0),
        teacher_free,
        labelled=True,
    ),
    "jensen_shannon": Case(lambda s, t, y: losses.jensen_shannon(s, t), lambda s, t, y: jensen_shannon(s, t)),
    "top_k_kl": Case(stored_top_three, lambda s, t, y: top_three(s, t)),
    "label_smoothing_cross_entropy": Case(
        lambda s, t, y: losses.label_smoothing_cross_entropy(s, y), smoothed, labelled=True
    ),
    "privileged": Case(
        lambda s, t, y: losses.privileged(s, t, y),
        lambda s, t, y: (
            -log_softmax(s)[np.arange(len(y)), y] / 2 + cross_entropy(log_softmax(t), log_softmax(s)) / 2
        ),
        labelled=True,
    ),
    "correlation_distance": Case(
        lambda s, t, y: losses.correlation_distance(s, t, rank_weight=0.5),
        lambda s, t, y: (
            1.5
            - pearson(np.exp(log_softmax(s)), np.exp(log_softmax(t)))
            - pearson(soft_ranks(s), soft_ranks(t)) / 2
        ),
    ),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
LABELLED = {name: case for name, case in CASES.items() if case.labelled}


@functools.cache
def compiled(case):
    def total(s, t, y):
        values = case.loss(s, t, y)
        return jnp.sum(values), values

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def measured(case, student, teacher, labels):
    """Values and gradient, under jit."""
    arrays = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32), jnp.asarray(labels)
    (_, values), gradient = compiled(case)(*arrays)
    return np.asarray(values), np.asarray(gradient)


def masked(x, by=-np.inf, live=LIVE):
    return np.where(live, x, by)


@every
class TestMaskedClasses:
    @pytest.mark.parametrize("by", [(-np.inf, -np.inf), (LOWEST, LOWEST), (-np.inf, LOWEST)])
    def test_value_and_gradient_are_those_of_the_others(self, case, by):
        values, gradient = measured(case, masked(STUDENT, by[0]), masked(TEACHER, by[1]), LABELS)
        few = STUDENT[:, LIVE], TEACHER[:, LIVE], RENUMBERED[LABELS]
        np.testing.assert_allclose(values, case.wanted(*few), rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(gradient[:, LIVE], measured(case, *few)[1], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(gradient[:, ~LIVE], 0)

    def test_what_the_student_alone_masks_is_so_for_the_teacher(self, case):
        if case is CASES["top_k_kl"]:
            pytest.skip("what is stored of the teacher does not say what else it holds: see below")
        alone = measured(case, masked(STUDENT), TEACHER, LABELS)
        both = measured(case, masked(STUDENT), masked(TEACHER), LABELS)
        for got, wanted in zip(alone, both, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)

    def test_an_example_without_a_class_costs_nothing(self, case):
        one = np.array([[True], [False], [True]])
        for by in (-np.inf, LOWEST):
            for s, t in (
                (masked(STUDENT, by, one), masked(TEACHER, by, one)),
                (masked(STUDENT, by, one), TEACHER),
                (STUDENT, masked(TEACHER, by, one)),
                (masked(STUDENT, by), masked(TEACHER, by, ~LIVE)),  # no class in common
            ):
                values, gradient = measured(case, s, t, LABELS)
                assert np.isfinite(gradient).all()
                assert np.isfinite(values).all()
        values, gradient = measured(case, masked(STUDENT, live=one), masked(TEACHER, live=one), [1, -1, 3])
        np.testing.assert_array_equal(gradient[1], 0)
        if len(values) == 3:
            assert values[1] == 0

    def test_nan_is_no_mask(self, case):
        student = STUDENT.copy()
        student[1, 2] = np.nan
        values, _ = measured(case, student, TEACHER, LABELS)
        assert np.isnan(values[-1] if len(values) == 1 else values[1])


class TestMaskedByOneAlone:
    """A class that only the teacher rules out has no probability there, and no score."""

    @pytest.mark.parametrize(
        "name",
        [
            "soft_target_kl",
            "soft_target_cross_entropy",
            "jensen_shannon",
            "dist",
            "logit_standardised_kl",
            "wttm",
            "privileged",
        ],
    )
    def test_predictions_are_compared_with_probability_zero(self, name):
        teacher = masked(TEACHER)
        values, gradient = measured(CASES[name], STUDENT, teacher, LABELS)
        with np.errstate(all="ignore"):
            wanted = CASES[name].wanted(STUDENT, teacher, LABELS)
        np.testing.assert_allclose(values, wanted, rtol=2e-4)
        # The score of a class is lowered wherever the teacher rules it out, unless examples are compared.
        assert (gradient[:, ~LIVE] > 0).all() or name == "dist"

    def test_scores_are_compared_where_both_have_one(self):
        values, gradient = measured(CASES["squared_logits"], STUDENT, masked(TEACHER), LABELS)
        wanted = ((STUDENT - TEACHER)[:, LIVE] ** 2).mean(-1)
        np.testing.assert_allclose(values, wanted, rtol=1e-5)
        np.testing.assert_array_equal(gradient[:, ~LIVE], 0)

    def test_ranks_are_among_the_classes_that_both_have(self):
        ranks, without = (
            losses.correlation_distance(
                jnp.asarray(STUDENT), jnp.asarray(masked(TEACHER)), rank_weight=weight
            )
            for weight in (1.0, 0.0)
        )
        wanted = 1 - pearson(soft_ranks(STUDENT[:, LIVE]), soft_ranks(TEACHER[:, LIVE]))
        np.testing.assert_allclose(ranks - without, wanted, rtol=1e-4)

    def test_stored_classes_that_the_student_masks_are_left_out(self):
        p, classes = jnp.array([[0.5, 0.3]]), jnp.array([[1, 3]])
        student = jnp.array([[1.0, 2.0, 0.5, -jnp.inf]])
        value = losses.top_k_kl(student, p, classes)
        q = np.exp(log_softmax(np.array([[1.0, 2.0, 0.5]])))[0]
        wanted = kl(np.log([5 / 7, 2 / 7]), np.log([q[1], q[0] + q[2]]))
        np.testing.assert_allclose(value, [wanted], rtol=1e-5)

    def test_only_the_target_is_left(self):
        alone = jnp.array([[1.0, -jnp.inf, -jnp.inf]])
        value_and_grad = jax.jit(jax.value_and_grad(lambda s: jnp.sum(losses.dkd(s, alone, jnp.array([0])))))
        value, gradient = value_and_grad(alone)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("name", ["teacher_free_kl", "label_smoothing_cross_entropy", "privileged"])
    def test_a_label_that_the_student_rules_out_is_infinitely_wrong(self, name):
        values, _ = measured(CASES[name], masked(STUDENT), TEACHER, [1, 2, 3])
        np.testing.assert_array_equal(np.isposinf(values), [False, True, False])

    def test_a_teacher_of_few_stored_classes_is_no_uniform_one(self):
        spread = losses.spread_top_k(jnp.array([[0.6, 0.4]]), jnp.array([[0, 2]]), num_classes=4)
        student = jnp.array([[1.0, 0.0, 0.5, -1.0]])
        z = standardised(np.asarray(student, np.float64))
        t = standardised(
            np.log([[0.6, 0, 0.4, 0]], where=[[True, False, True, False]], out=np.full((1, 4), -np.inf))
        )
        value = losses.logit_standardised_kl(student, spread)
        np.testing.assert_allclose(value, 4 * kl(log_softmax(t, 2.0), log_softmax(z, 2.0)), rtol=1e-4)


class TestTeachersThatMask:
    def test_means_of_teachers(self):
        teachers = jnp.asarray(np.stack([masked(STUDENT), TEACHER]), jnp.float32)
        p = [np.exp(log_softmax(x)) for x in (masked(STUDENT), TEACHER)]
        mean = losses.average_probabilities(teachers)
        np.testing.assert_allclose(jax.nn.softmax(mean), (p[0] + p[1]) / 2, rtol=1e-5)
        np.testing.assert_array_equal(np.isneginf(losses.average_logits(teachers)), np.tile(~LIVE, (3, 1)))
        ignored = losses.average_logits(teachers, weights=jnp.array([0.0, 1.0]))
        np.testing.assert_allclose(ignored, TEACHER, rtol=1e-6)

    def test_trust_in_teachers_that_mask_the_label(self):
        logits = np.stack([masked(STUDENT), TEACHER, masked(TEACHER)])
        weights = losses.confidence_weights(jnp.asarray(logits, jnp.float32), jnp.array([2, 1, 0]))
        np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-6)
        np.testing.assert_allclose(weights[:, 0], [0.25, 0.5, 0.25], rtol=1e-6)

    def test_noise_leaves_a_mask_alone(self):
        noisy = losses.noisy_teacher(jnp.asarray(masked(TEACHER)), jax.random.key(0), deviation=5.0)
        np.testing.assert_array_equal(np.isneginf(noisy), np.tile(~LIVE, (3, 1)))
        assert np.isfinite(np.asarray(noisy)[:, LIVE]).all()


class TestVoidLabels:
    @pytest.mark.parametrize("void", [-1, -100])
    @pytest.mark.parametrize("name", LABELLED)
    def test_cost_nothing_and_move_nothing_whatever_the_logits_hold(self, name, void):
        plain = measured(LABELLED[name], STUDENT, TEACHER, LABELS)
        student, teacher = STUDENT.copy(), TEACHER.copy()
        student[1], teacher[1] = np.nan, np.inf
        for s, t in ((STUDENT, TEACHER), (student, teacher)):
            values, gradient = measured(LABELLED[name], s, t, [1, void, 3])
            np.testing.assert_allclose(values, plain[0] * [1, 0, 1], rtol=1e-5)
            np.testing.assert_allclose(gradient, plain[1] * [[1], [0], [1]], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("name", LABELLED)
    def test_traced_labels_beyond_the_classes_are_nan(self, name):
        def values(labels):
            return LABELLED[name].loss(jnp.asarray(STUDENT), jnp.asarray(TEACHER), labels)

        np.testing.assert_array_equal(np.isnan(jax.jit(values)(jnp.array([1, 6, 3]))), [False, True, False])

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
    def test_any_integers_are_labels(self, dtype):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 300)), jnp.float32)
        got = losses.label_smoothing_cross_entropy(logits, np.array([5, 44], dtype), smoothing=0.0)
        np.testing.assert_allclose(
            got, -log_softmax(np.asarray(logits, np.float64))[[0, 1], [5, 44]], rtol=1e-5
        )

    def test_blends_hold_the_share_of_the_labelled(self):
        labels, partner = jnp.array([1, -100, 0]), jnp.array([1, 2, 0])
        rows = losses.mixup_targets(labels, partner, 0.25, num_classes=3)
        np.testing.assert_allclose(rows, [[0, 0.25, 0], [0.75, 0, 0], [0.25, 0.75, 0]])

    def test_trust_is_equal(self):
        teachers = jnp.asarray(np.stack([STUDENT, TEACHER, STUDENT]), jnp.float32)
        weights = losses.confidence_weights(teachers, jnp.array([-100, 1, -1]))
        np.testing.assert_allclose(weights[:, [0, 2]], 1 / 3, rtol=1e-6)

    @pytest.mark.parametrize("name", ["lovasz", "dice"])
    def test_positions_count_nothing(self, name):
        rng = np.random.default_rng(0)
        scores, labels = rng.normal(size=(2, 3, 4, 3)), rng.integers(0, 3, (2, 3, 4))

        def loss(scores, labels):
            target = labels if name == "lovasz" else jax.nn.one_hot(labels, 3)
            return getattr(losses, name)(scores, target)

        @jax.jit
        @jax.value_and_grad
        def total(scores, labels):
            return jnp.sum(loss(scores, labels))

        void = labels.copy()
        void[:, 2] = -1
        wild = scores.copy()
        wild[:, 2] = np.nan
        whole = total(jnp.asarray(scores[:, :2]), jnp.asarray(labels[:, :2]))
        value, gradient = total(jnp.asarray(wild), jnp.asarray(void))
        np.testing.assert_allclose(value, whole[0], rtol=1e-5)
        np.testing.assert_allclose(gradient[:, :2], whole[1], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(gradient[:, 2], 0)

    def test_are_nobodys_negatives(self):
        labels, index = jnp.array([2, -1, 1, -100, 2, 1]), jnp.array([0, 1, 2, 3])
        drawn = losses.crd_candidates(jax.random.key(0), index, negatives=300, examples=6, labels=labels)
        allowed = [{2, 5}, {0, 2, 4, 5}, {0, 4}, {0, 2, 4, 5}]
        assert [set(row[1:].tolist()) for row in drawn] == allowed


class TestMaskedMean:
    def test_is_the_mean_of_what_counts(self):
        values, where = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
        assert losses.sum_and_count(values, where) == (4, 2)
        assert losses.masked_mean(values, where) == 2
        value, gradient = jax.value_and_grad(losses.masked_mean)(values, jnp.zeros(3, bool))
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("labels", [[[0, 1, 2], [-1, -1, 2]], [[-1, -1, -1], [4, -1, 2]], [[-1] * 3] * 2])
    def test_over_two_devices_is_that_of_the_whole_batch(self, labels):
        """The train step takes the mean over devices of values and gradients, whatever each of them counts."""
        labels = jnp.asarray(labels)
        inputs, weights = jax.random.normal(jax.random.key(0), (2, 3, 4)), jnp.tile(jnp.arange(6.0), (4, 1))

        def loss(weights, inputs, labels, axis_name=None):
            each = losses.label_smoothing_cross_entropy(inputs @ weights, labels)
            return losses.masked_mean(each, labels >= 0, axis_name=axis_name)

        def on_one(weights, inputs, labels):
            mine = jax.value_and_grad(loss)(weights, inputs, labels, axis_name="batch")
            return jax.lax.pmean(mine, "batch")

        got = jax.pmap(on_one, axis_name="batch", in_axes=(None, 0, 0), out_axes=None)(
            weights, inputs, labels
        )
        wanted = jax.jit(jax.value_and_grad(loss))(weights, inputs.reshape(6, 4), labels.reshape(6))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, wanted)
