"""Targets made from labels and several teachers, and the dense losses, against their formulas and laws."""

import functools

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from kdjax.losses import logits, targets

LABELS, PARTNER = jnp.array([0, 2, 1]), jnp.array([1, 2, 0])
TEACHERS = jnp.asarray(
    np.random.default_rng(0).normal(size=(4, 3, 5)) * 2, jnp.float32
)  # teachers, batch, classes
STUDENT = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)), jnp.float32)
MAPS = arrays.arrays(np.int64, (2, 3, 4), elements=st.integers(0, 2))


def certain(labels, classes=3):
    """Scores that predict these labels and nothing else."""
    return 1e4 * jax.nn.one_hot(jnp.asarray(labels), classes)


class TestBlendedLabels:
    @given(st.floats(0, 1))
    @settings(deadline=None, max_examples=10)
    def test_their_cross_entropy_is_the_mixture_of_the_two(self, share):
        rows = targets.mixup_targets(LABELS, PARTNER, jnp.float32(share), num_classes=5)
        np.testing.assert_allclose(rows.sum(-1), 1, rtol=1e-6)
        one, other = (
            optax.losses.softmax_cross_entropy_with_integer_labels(STUDENT, y)
            for y in (LABELS, LABELS[PARTNER])
        )
        value = optax.losses.softmax_cross_entropy(STUDENT, rows)
        np.testing.assert_allclose(value, share * one + (1 - share) * other, rtol=1e-5)

    def test_a_share_per_example(self):
        rows = targets.mixup_targets(LABELS, PARTNER, jnp.array([1.0, 0.5, 0.25]), num_classes=3)
        np.testing.assert_allclose(rows, [[1, 0, 0], [0, 0.5, 0.5], [0.75, 0.25, 0]])

    def test_equal_labels_stay_one_label(self):
        rows = targets.mixup_targets(jnp.array([1, 1]), jnp.array([1, 0]), jnp.float32(0.3), num_classes=2)
        np.testing.assert_allclose(rows, [[0, 1], [0, 1]], rtol=1e-6)

    def test_cutmix_counts_what_was_kept(self):
        kept = jnp.ones((4, 4), bool).at[:2, 3:].set(False)  # a box that the border cut down to two positions
        rows = targets.cutmix_targets(LABELS, PARTNER, kept, num_classes=3)
        np.testing.assert_allclose(rows, [[0.875, 0, 0.125], [0, 0.125, 0.875], [0.125, 0.875, 0]])
        each = targets.cutmix_targets(LABELS, PARTNER, jnp.stack([kept] * 3), num_classes=3)
        np.testing.assert_array_equal(each, rows)


class TestNoisyTeacher:
    def test_factors_have_mean_one_and_the_deviation_asked_for(self):
        noisy = targets.noisy_teacher(jnp.full((200, 50), -3.0), jax.random.key(0), deviation=0.2)
        np.testing.assert_allclose(jnp.mean(noisy), -3, rtol=0.01)
        np.testing.assert_allclose(jnp.std(noisy), 0.6, rtol=0.03)

    def test_perturbs_whole_examples_with_the_probability_asked_for(self):
        x = jnp.ones((2000, 3))
        changed = targets.noisy_teacher(x, jax.random.key(1), deviation=0.5, probability=0.3) != x
        np.testing.assert_array_equal(changed.any(-1), changed.all(-1))
        np.testing.assert_allclose(changed.mean(), 0.3, atol=0.04)

    def test_is_a_function_of_its_key(self):
        first, again, other = (
            targets.noisy_teacher(STUDENT, jax.random.key(seed), deviation=0.1) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        np.testing.assert_array_equal(
            targets.noisy_teacher(STUDENT, jax.random.key(0), deviation=0.0), STUDENT
        )

    @pytest.mark.parametrize(
        "options",
        [{"deviation": -1.0}, {"deviation": 0.1, "probability": 2}],
        ids=["deviation", "probability"],
    )
    def test_refuses_what_is_out_of_range(self, options):
        with pytest.raises(ValueError, match=f"noisy_teacher needs a {list(options)[-1]}"):
            targets.noisy_teacher(STUDENT, jax.random.key(0), **options)


class TestSeveralTeachers:
    def test_equal_teachers_average_to_themselves(self):
        same = jnp.stack([TEACHERS[0]] * 3)
        np.testing.assert_allclose(targets.average_logits(same), TEACHERS[0], rtol=1e-5)
        np.testing.assert_allclose(
            jax.nn.softmax(targets.average_probabilities(same, temperature=4.0) / 4),
            jax.nn.softmax(TEACHERS[0] / 4),
            rtol=1e-5,
        )

    def test_averages_are_the_arithmetic_and_the_geometric_mean_of_probabilities(self):
        p = np.asarray(jax.nn.softmax(TEACHERS), np.float64)
        np.testing.assert_allclose(jnp.exp(targets.average_probabilities(TEACHERS)), p.mean(0), rtol=1e-5)
        geometric = np.exp(np.log(p).mean(0))
        np.testing.assert_allclose(
            jax.nn.softmax(targets.average_logits(TEACHERS)),
            geometric / geometric.sum(-1, keepdims=True),
            rtol=1e-5,
        )

    @pytest.mark.parametrize("average", [targets.average_logits, targets.average_probabilities])
    def test_weights_per_teacher_or_per_example(self, average):
        weights = jnp.array([0.0, 3.0, 0.0, 0.0])
        np.testing.assert_allclose(
            jax.nn.softmax(average(TEACHERS, weights=weights)), jax.nn.softmax(TEACHERS[1]), rtol=1e-5
        )
        each = jnp.zeros((4, 3)).at[jnp.array([2, 0, 3]), jnp.arange(3)].set(1.0)
        chosen = TEACHERS[jnp.array([2, 0, 3]), jnp.arange(3)]
        np.testing.assert_allclose(
            jax.nn.softmax(average(TEACHERS, weights=each)), jax.nn.softmax(chosen), rtol=1e-5
        )

    def test_imitating_the_average_is_imitating_each_by_its_weight(self):
        weights = targets.confidence_weights(TEACHERS, LABELS)

        def together(s):
            average = targets.average_probabilities(TEACHERS, weights=weights, temperature=3.0)
            return jnp.sum(logits.soft_target_kl(s, average, temperature=3.0))

        def one_by_one(s):
            each = jax.vmap(lambda t: logits.soft_target_kl(s, t, temperature=3.0))(TEACHERS)
            return jnp.sum(weights * each)

        (value, gradient), (larger, wanted) = (
            jax.jit(jax.value_and_grad(loss))(STUDENT) for loss in (together, one_by_one)
        )
        np.testing.assert_allclose(gradient, wanted, atol=1e-5)
        assert value <= larger  # by convexity

    def test_confidence_is_lowest_for_the_teacher_with_the_largest_error(self):
        weights = targets.confidence_weights(TEACHERS, LABELS)
        np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-5)
        error = np.asarray(
            jax.vmap(lambda t: optax.losses.softmax_cross_entropy_with_integer_labels(t, LABELS))(TEACHERS)
        )
        wanted = (1 - np.exp(error) / np.exp(error).sum(0)) / 3
        np.testing.assert_allclose(weights, wanted, rtol=1e-4)
        np.testing.assert_array_equal(targets.confidence_weights(TEACHERS[:1], LABELS), 1)

    def test_sure_and_wrong_teachers_leave_everything_finite(self):
        wrong = jnp.stack([certain([1, 0, 0], 5), TEACHERS[0], certain([1, 0, 0], 5)])
        weights = targets.confidence_weights(wrong, LABELS)
        np.testing.assert_allclose(weights, [[0.25] * 3, [0.5] * 3, [0.25] * 3], rtol=1e-5)
        value, gradient = jax.jit(
            jax.value_and_grad(
                lambda s: jnp.sum(
                    logits.soft_target_kl(s, targets.average_probabilities(wrong, weights=weights))
                )
            )
        )(STUDENT)
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    @pytest.mark.parametrize("average", [targets.average_logits, targets.average_probabilities])
    def test_half_precision_is_computed_in_float32(self, average, dtype):
        x = TEACHERS.astype(dtype)
        assert average(x).dtype == jnp.float32
        np.testing.assert_array_equal(average(x), average(x.astype(jnp.float32)))


class TestSpreadTopK:
    def test_holds_what_was_stored_and_shares_the_rest_evenly(self):
        scores = targets.spread_top_k(
            jnp.array([[0.5, 0.2]]), jnp.array([[3, 0]]), num_classes=5, temperature=2.0
        )
        np.testing.assert_allclose(jax.nn.softmax(scores / 2), [[0.2, 0.1, 0.1, 0.5, 0.1]], rtol=1e-5)

    def test_never_asks_less_than_the_grouped_residual(self):
        p, classes = jax.lax.top_k(jax.nn.softmax(TEACHERS[0]), 2)
        dense = targets.spread_top_k(p, classes, num_classes=5)
        grouped = logits.top_k_kl(STUDENT, p, classes)
        assert (logits.soft_target_kl(STUDENT, dense) >= grouped).all()

    def test_nothing_missing_leaves_everything_finite(self):
        dense = targets.spread_top_k(jnp.array([[1.0, 0.0]]), jnp.array([[2, 0]]), num_classes=4)
        value, gradient = jax.jit(jax.value_and_grad(lambda s: jnp.sum(logits.soft_target_kl(s, dense))))(
            STUDENT[:1, :4]
        )
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda t: targets.noisy_teacher(t[0], jax.random.key(0), deviation=0.3),
        targets.average_logits,
        lambda t: targets.average_logits(t, weights=jnp.abs(t[:, 0, 0])),
        lambda t: targets.average_probabilities(t, weights=targets.confidence_weights(t, LABELS)),
        lambda t: targets.confidence_weights(t, LABELS),
        lambda t: targets.spread_top_k(*jax.lax.top_k(jax.nn.softmax(t[0]), 2), num_classes=5),
        lambda t: targets.privileged(STUDENT, t[0], LABELS),
        lambda t: targets.dice(STUDENT[:, None, None], jax.nn.softmax(t[0])[:, None, None]),
    ],
)
def test_no_gradient_reaches_a_teacher(make):
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda t: jnp.sum(make(t))))(TEACHERS), 0)


class TestPrivileged:
    def test_mixes_the_labels_and_the_softened_teacher(self):
        hard, soft = (
            targets.privileged(STUDENT, TEACHERS[0], LABELS, soft_weight=w, temperature=5.0) for w in (0, 1)
        )
        np.testing.assert_allclose(
            hard, optax.losses.softmax_cross_entropy_with_integer_labels(STUDENT, LABELS), rtol=1e-5
        )
        p = jax.nn.softmax(TEACHERS[0] / 5)
        np.testing.assert_allclose(soft, optax.losses.softmax_cross_entropy(STUDENT, p), rtol=1e-5)
        mixed = jax.jit(
            lambda w: targets.privileged(STUDENT, TEACHERS[0], LABELS, soft_weight=w, temperature=5.0)
        )
        np.testing.assert_allclose(mixed(0.3), 0.7 * hard + 0.3 * soft, rtol=1e-5)

    def test_saturated_logits_and_half_precision(self):
        s = certain([1, 0, 2]).astype(jnp.float16)
        value, gradient = jax.jit(
            jax.value_and_grad(lambda s: jnp.sum(targets.privileged(s, certain([0, 0, 0]), LABELS)))
        )(s)
        assert value.dtype == jnp.float32
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()

    @pytest.mark.parametrize(("option", "value"), [("soft_weight", 1.5), ("temperature", 0)])
    def test_refuses_what_is_out_of_range(self, option, value):
        with pytest.raises(ValueError, match=f"privileged needs a {option} .*got {value}"):
            targets.privileged(STUDENT, STUDENT, LABELS, **{option: value})


DENSE = {
    "dice": lambda s, y: targets.dice(s, jax.nn.one_hot(y, s.shape[-1])),
    "lovasz": targets.lovasz,
}


@functools.cache
def compiled(loss):
    """Values per image, and the gradient of their sum by the scores, in one program per shape."""

    def total(s, y):
        values = loss(s, y)
        return jnp.sum(values), values

    both = jax.jit(jax.value_and_grad(total, has_aux=True))

    def run(s, y):
        (_, values), gradient = both(s, jnp.asarray(y))
        return values, gradient

    return run


@pytest.mark.parametrize("loss", DENSE.values(), ids=list(DENSE))
class TestDenseLosses:
    @given(MAPS, st.integers(0, 100))
    @settings(deadline=None, max_examples=10)
    def test_lies_between_zero_and_one_with_finite_gradients(self, loss, labels, seed):
        s = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3, 4, 3)), jnp.float32)
        value, gradient = compiled(loss)(s, labels)
        assert ((value >= 0) & (value <= 1)).all()
        assert jnp.isfinite(gradient).all()

    @given(MAPS)
    @settings(deadline=None, max_examples=10)
    def test_zero_where_all_is_right(self, loss, labels):
        np.testing.assert_array_equal(compiled(loss)(certain(labels), labels)[0], [0, 0])

    @pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 4, 2), (2, 3, 4, 3)])
    def test_degenerate_scores_stay_finite(self, loss, shape):
        y = jnp.zeros(shape[:-1], int)
        for s in (jnp.zeros(shape), -certain(y, shape[-1]), certain(y, shape[-1])):
            value, gradient = compiled(loss)(s, y)
            assert jnp.isfinite(value).all()
            assert jnp.isfinite(gradient).all()

    def test_one_value_per_image_plain_vmapped_jitted_and_in_half_precision(self, loss):
        rng = np.random.default_rng(0)
        s = jnp.asarray(rng.normal(size=(2, 3, 4, 3)), jnp.bfloat16)
        y = jnp.asarray(rng.integers(0, 3, (2, 3, 4)))
        plain = loss(s, y)
        assert plain.shape == (2,)
        assert plain.dtype == jnp.float32
        np.testing.assert_allclose(jax.vmap(loss)(s, y), plain, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(loss)(s, y), plain, rtol=1e-5)
        np.testing.assert_allclose(loss(s.astype(jnp.float32), y), plain, rtol=1e-6)
        # Where a position is does not matter.
        np.testing.assert_allclose(loss(s[:, ::-1, ::-1], y[:, ::-1, ::-1]), plain, rtol=1e-5)


class TestDice:
    def test_is_one_minus_the_overlap(self):
        s = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 3)), jnp.float32)
        g = np.asarray(jax.nn.softmax(3 * s[::-1]), np.float64)
        p = np.asarray(jax.nn.softmax(s), np.float64)
        overlap = (2 * (p * g).sum((1, 2)) + 1) / ((p**2).sum((1, 2)) + (g**2).sum((1, 2)) + 1)
        np.testing.assert_allclose(
            targets.dice(s, jnp.asarray(g, jnp.float32)), (1 - overlap).mean(-1), rtol=1e-5
        )

    def test_zero_where_the_student_equals_a_soft_teacher(self):
        s = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 3)), jnp.float32)
        np.testing.assert_array_equal(targets.dice(s, jax.nn.softmax(s)), [0, 0])


SORTED_STEPS, SEARCHED_STEPS = jax.jit(targets._sorted_steps), jax.jit(targets._searched_steps)


class TestLovasz:
    @given(MAPS, MAPS)
    @settings(deadline=None, max_examples=20)
    def test_of_certain_predictions_is_the_jaccard_loss(self, predicted, labels):
        value, _ = compiled(targets.lovasz)(certain(predicted), labels)
        for got, p, y in zip(value, predicted, labels, strict=True):
            wanted = [1 - ((p == c) & (y == c)).sum() / ((p == c) | (y == c)).sum() for c in np.unique(y)]
            np.testing.assert_allclose(got, np.mean(wanted), atol=1e-6)

    def test_of_soft_predictions_is_the_integral_over_thresholds(self):
        """The Lovász extension of a set function F at m is the integral over θ from 0 to 1 of F({m >= θ})."""
        rng = np.random.default_rng(0)
        s, y = rng.normal(size=(1, 2, 3, 3)), rng.integers(0, 3, (1, 2, 3))
        p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        thresholds = (np.arange(20000) + 0.5) / 20000
        each = []
        for c in np.unique(y):
            fg = (y == c).ravel()
            error = np.where(fg, 1 - p[..., c].ravel(), p[..., c].ravel())
            wrong = error[None] >= thresholds[:, None]
            each.append((wrong.sum(1) / (fg | wrong).sum(1)).mean())
        value = targets.lovasz(jnp.asarray(s, jnp.float32), jnp.asarray(y))
        np.testing.assert_allclose(value, [np.mean(each)], rtol=1e-4)

    def test_gradient_is_that_of_finite_differences(self):
        rng = np.random.default_rng(0)
        s = jnp.asarray(rng.normal(size=(1, 2, 3, 3)), jnp.float32)
        y = jnp.asarray(rng.integers(0, 3, (1, 2, 3)))
        lovasz = jax.jit(targets.lovasz)
        jax.test_util.check_grads(
            lambda s: lovasz(jnp.asarray(s), y), (s,), order=1, modes=["rev"], eps=3e-3, rtol=2e-2
        )

    def test_void_positions_count_nothing(self):
        rng = np.random.default_rng(0)
        s = jnp.asarray(rng.normal(size=(1, 2, 3, 3)), jnp.float32)
        y = jnp.asarray(rng.integers(0, 3, (1, 2, 3)))
        more = jnp.concatenate([s, s[:, :1]], axis=1)
        void = jnp.concatenate([y, jnp.full((1, 1, 3), -100)], axis=1)
        np.testing.assert_allclose(targets.lovasz(more, void), targets.lovasz(s, y), rtol=1e-6)
        np.testing.assert_array_equal(targets.lovasz(s, jnp.full((1, 2, 3), -1)), [0])

    @given(
        arrays.arrays(np.float32, (2, 12), elements=st.floats(0, 1, width=16, allow_subnormal=False)),
        st.integers(0, 2**12 - 1),
    )
    @settings(deadline=None, max_examples=20)
    def test_every_backends_form_gives_one_loss(self, error, mask):
        # CPUs search for the places of sorted numbers, others sort the places along; only one of them runs here
        truth = jnp.asarray([[mask >> i & 1 for i in range(12)]] * 2, jnp.float32)
        sorted_, searched = (f(jnp.asarray(error), truth) for f in (SORTED_STEPS, SEARCHED_STEPS))
        np.testing.assert_allclose(jnp.sum(error * sorted_, -1), jnp.sum(error * searched, -1), atol=2e-6)
        apart = jnp.asarray(np.argsort(np.argsort(error, axis=1), axis=1), jnp.float32)  # no two are equal
        np.testing.assert_allclose(SORTED_STEPS(apart, truth), SEARCHED_STEPS(apart, truth), atol=1e-6)
