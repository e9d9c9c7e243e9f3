"""Losses on logits against the original authors' values, against double precision, and against their own laws."""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings

from kdjax.losses import logits as losses

GOLDENS = np.load(Path(__file__).parent / "goldens" / "loss_goldens.npz")
LOGITS = arrays.arrays(np.float32, (3, 5), elements=st.floats(-30, 30, width=32, allow_subnormal=False))
LABELS = jnp.array([0, 4, 2])
few = partial(settings, deadline=None)


def top_k(student, teacher, labels, *, k=3, temperature=2.0):
    p, classes = jax.lax.top_k(
        jax.nn.softmax(teacher.astype(jnp.float32) / temperature), min(k, teacher.shape[-1])
    )
    return losses.top_k_kl(student, p, classes, temperature=temperature)


class Row(NamedTuple):
    """A loss as a function of student, teacher and labels, and the laws that hold of it."""

    fn: Callable
    teacher: bool = True  # takes one
    zero: bool = False  # where the student equals the teacher
    non_negative: bool = True
    shift: bool = True  # adding a constant to all scores of an example changes nothing
    per_example: bool = True


ROWS = {
    "soft_target_kl": Row(lambda s, t, y: losses.soft_target_kl(s, t, temperature=3.0), zero=True),
    "soft_target_cross_entropy": Row(lambda s, t, y: losses.soft_target_cross_entropy(s, t, temperature=3.0)),
    "squared_logits": Row(lambda s, t, y: losses.squared_logits(s, t), zero=True, shift=False),
    "dkd": Row(losses.dkd, zero=True),
    "dist": Row(lambda s, t, y: losses.dist(s, t, temperature=2.0), per_example=False),
    "logit_standardised_kl": Row(lambda s, t, y: losses.logit_standardised_kl(s, t), zero=True),
    "wttm": Row(lambda s, t, y: losses.wttm(s, t, temperature=3.0)),
    "confidence_penalty": Row(
        lambda s, t, y: losses.confidence_penalty(s), teacher=False, non_negative=False
    ),
    "teacher_free_kl": Row(lambda s, t, y: losses.teacher_free_kl(s, y), teacher=False),
    "jensen_shannon": Row(lambda s, t, y: losses.jensen_shannon(s, t, temperature=3.0), zero=True),
    "top_k_kl": Row(top_k, zero=True),
    "label_smoothing_cross_entropy": Row(
        lambda s, t, y: losses.label_smoothing_cross_entropy(s, y), teacher=False
    ),
}
every = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))


@cache
def compiled(fn):
    """The values of a loss, and the gradients of their sum by student and by teacher, in one program per shape."""

    def total(s, t, y):
        values = fn(s, t, y)
        return jnp.sum(values), values

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    def run(s, t, y):
        (_, values), gradients = both(jnp.asarray(s), jnp.asarray(t), y)
        return values, gradients

    return run


def those(law):
    rows = {name: row for name, row in ROWS.items() if getattr(row, law)}
    return pytest.mark.parametrize("row", rows.values(), ids=list(rows))


def pair(seed=0, shape=(3, 5), scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(2, *shape)), jnp.float32)


def log_softmax(x, temperature=1.0):
    x = np.asarray(x, np.float64) / temperature
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(student, teacher, temperature=1.0):
    return losses.soft_target_kl(jnp.asarray(student), jnp.asarray(teacher), temperature=temperature)


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("kd_T1", lambda s, t, y: losses.soft_target_kl(s, t, temperature=1.0)),
        ("kd_T4", lambda s, t, y: losses.soft_target_kl(s, t, temperature=4.0)),
        ("dkd_alpha1_beta8_T4", lambda s, t, y: losses.dkd(s, t, y)),
        ("dist_tau1", lambda s, t, y: losses.dist(s, t, temperature=1.0)),
        ("dist_tau4", lambda s, t, y: losses.dist(s, t, temperature=4.0)),
        # The reference is without the factor T².
        ("logit_standardised_kd_T2", lambda s, t, y: losses.logit_standardised_kl(s, t) / 2.0**2),
    ],
)
def test_equals_the_authors(name, fn):
    def mean(student):
        return jnp.mean(fn(student, jnp.asarray(GOLDENS["logits_teacher"]), jnp.asarray(GOLDENS["labels"])))

    with jax.default_matmul_precision("highest"):
        value, gradient = jax.jit(jax.value_and_grad(mean))(jnp.asarray(GOLDENS["logits_student"]))
    np.testing.assert_allclose(value, GOLDENS[f"{name}/loss"], rtol=1e-5)
    wanted = GOLDENS[f"{name}/grad_0"]
    np.testing.assert_allclose(gradient, wanted, atol=2e-4 * np.abs(wanted).max())


class TestEveryLoss:
    @every
    def test_shape_and_gradient(self, row):
        s, t = pair()
        fn = jax.jit(row.fn)
        assert fn(s, t, LABELS).shape == ((3,) if row.per_example else ())
        jax.test_util.check_grads(
            lambda x: fn(jnp.asarray(x), t, LABELS),
            (s,),
            order=1,
            modes=["rev"],
            eps=1e-2,
            rtol=2e-2,
            atol=2e-2,
        )

    @those("teacher")
    def test_no_gradient_reaches_the_teacher(self, row):
        _, (_, gradient) = compiled(row.fn)(*pair(), LABELS)
        np.testing.assert_array_equal(gradient, 0)

    @those("zero")
    @given(LOGITS)
    @few(max_examples=10)
    def test_zero_at_equality(self, row, x):
        # Stored probabilities come from a softmax, the student's from a log-softmax: equal up to rounding.
        value, _ = compiled(row.fn)(x, x, LABELS)
        np.testing.assert_allclose(value, 0, atol=1e-5 if row is ROWS["top_k_kl"] else 1e-12)

    @those("non_negative")
    @given(LOGITS, LOGITS)
    @few(max_examples=10)
    def test_is_never_negative(self, row, s, t):
        value, _ = compiled(row.fn)(s, t, LABELS)
        assert (value >= -1e-6 * (row is ROWS["dist"])).all()

    @those("shift")
    @given(LOGITS, LOGITS, st.floats(-5, 5))
    @few(max_examples=10)
    def test_shifting_all_scores_of_an_example_changes_nothing(self, row, s, t, shift):
        (shifted, _), (plain, _) = (
            compiled(row.fn)(s + x, t - x, LABELS) for x in (np.float32(shift), np.float32(0))
        )
        np.testing.assert_allclose(shifted, plain, rtol=1e-3, atol=1e-3)

    @every
    def test_order_of_examples_and_classes_is_free(self, row):
        s, t = pair()
        rows, columns = jnp.array([2, 0, 1]), jnp.array([3, 1, 4, 0, 2])
        # The class that was labels[i] stands where columns holds it.
        labels = jnp.argsort(columns)[LABELS[rows]]
        plain, _ = compiled(row.fn)(s, t, LABELS)
        moved, _ = compiled(row.fn)(s[rows][:, columns], t[rows][:, columns], labels)
        np.testing.assert_allclose(moved, plain[rows] if row.per_example else plain, rtol=1e-5)

    @every
    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_computed_in_float32(self, row, dtype):
        s, t = pair().astype(dtype)
        value = row.fn(s, t, LABELS)
        assert value.dtype == jnp.float32
        wanted = row.fn(s.astype(jnp.float32), t.astype(jnp.float32), LABELS)
        np.testing.assert_array_equal(value, wanted)

    @every
    def test_jitted_and_vmapped_equal_plain(self, row):
        arrays = (*pair(), LABELS)
        plain = row.fn(*arrays)
        np.testing.assert_allclose(compiled(row.fn)(*arrays)[0], plain, rtol=1e-4)
        if row.per_example:
            np.testing.assert_allclose(jax.jit(jax.vmap(row.fn))(*arrays), plain, rtol=1e-4)
            dense, _ = compiled(row.fn)(*(x[:, None, None] for x in arrays))
            np.testing.assert_allclose(dense[:, 0, 0], plain, rtol=1e-4)

    @every
    @pytest.mark.parametrize(
        ("s", "t"),
        {
            "opposed; sure of the label; sure against it; student knows nothing; both know nothing": (
                [[1e4, -1e4, 0], [1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0], [1e4, 1e4, 1e4]],
                [[-1e4, 1e4, 0], [1e4, 0, -1e4], [-1e4, 0, 1e4], [1, 2, 3], [0.1, 0.1, 0.1]],
            ),
            "nothing to tell apart": ([[0, 0, 0]] * 2, [[0, 0, 0]] * 2),
            "batch of one": ([[1, 2, 3]], [[3, 1, 2]]),
            "two classes": ([[2, 1e4]], [[1, 1]]),
        }.values(),
    )
    def test_degenerate_logits_stay_finite(self, row, s, t):
        s, t = jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32)
        labels = jnp.zeros(len(s), int)
        value, (gradient, _) = compiled(row.fn)(s, t, labels)
        assert jnp.isfinite(value).all()
        assert jnp.isfinite(gradient).all()
        assert jnp.abs(gradient).max() < 1e5

    @pytest.mark.parametrize("temperature", [0, -1.0])
    @pytest.mark.parametrize(
        "name",
        [
            "soft_target_kl",
            "soft_target_cross_entropy",
            "dkd",
            "dist",
            "logit_standardised_kl",
            "wttm",
            "jensen_shannon",
            "teacher_free_kl",
            "top_k_kl",
        ],
    )
    def test_refuses_a_temperature_that_is_not_positive(self, name, temperature):
        s, y = jnp.zeros((1, 2)), jnp.zeros(1, int)
        rest = {"dkd": (s, y), "teacher_free_kl": (y,), "top_k_kl": (s[:, :1], y[:, None])}.get(name, (s,))
        with pytest.raises(ValueError, match=f"{name} needs a temperature above 0, got {temperature}"):
            getattr(losses, name)(s, *rest, temperature=temperature)


class TestSoftTargetKl:
    @few(max_examples=50)
    @given(LOGITS, LOGITS, st.floats(0.5, 20))
    def test_is_the_divergence_in_double_precision(self, student, teacher, temperature):
        s, t = log_softmax(student, temperature), log_softmax(teacher, temperature)
        wanted = temperature**2 * (np.exp(t) * (t - s)).sum(-1)
        np.testing.assert_allclose(
            kl(student, teacher, temperature), wanted, rtol=1e-4, atol=1e-4 * temperature**2
        )

    @few(max_examples=50)
    @given(LOGITS, st.floats(-0.01, 0.01), st.floats(1, 100))
    def test_is_never_negative_however_near(self, logits, nudge, temperature):
        assert (kl(logits * np.float32(1 + nudge), logits, temperature) >= 0).all()

    def test_a_class_that_the_teacher_rules_out_counts_nothing(self):
        s, t = np.array([[1.0, 2.0, 3.0]], np.float32), np.array([[2.0, 1.0, -np.inf]], np.float32)
        p, log_q = np.exp(log_softmax(t)), log_softmax(s)
        np.testing.assert_allclose(
            kl(s, t), [(p[0, :2] * (np.log(p[0, :2]) - log_q[0, :2])).sum()], rtol=1e-5
        )

    def test_tends_to_half_the_squared_difference_of_centred_logits(self):
        s, t = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
        centred = (s - s.mean(1, keepdims=True)) - (t - t.mean(1, keepdims=True))
        np.testing.assert_allclose(kl(s, t, 300.0), 0.5 * (centred**2).mean(1), rtol=0.01)

    def test_the_temperature_may_be_traced(self):
        s, t = pair()
        np.testing.assert_allclose(jax.jit(kl)(s, t, 2.0), kl(s, t, 2.0), rtol=1e-5)


def test_cross_entropy_is_the_divergence_plus_the_entropy_of_the_teacher():
    s, t = pair()
    log_p = log_softmax(t, 3.0)
    value = losses.soft_target_cross_entropy(s, t, temperature=3.0)
    np.testing.assert_allclose(value, kl(s, t, 3.0) - 9 * (np.exp(log_p) * log_p).sum(-1), rtol=1e-5)
    one, other = (
        jax.jit(jax.grad(lambda x, fn=fn: jnp.sum(fn(x, t, temperature=3.0))))(s)
        for fn in (losses.soft_target_cross_entropy, losses.soft_target_kl)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_squared_logits_is_a_mean_over_classes():
    s, t = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
    np.testing.assert_allclose(losses.squared_logits(s, t), [2.5])


class TestDecoupledKl:
    @few(max_examples=25)
    @given(LOGITS, LOGITS, st.floats(0.5, 8))
    def test_weighted_by_the_teachers_doubt_it_is_distillation(self, s, t, temperature):
        (decoupled, one), (plain, other) = self.weighted_by_doubt_and_plain(s, t, temperature)
        np.testing.assert_allclose(decoupled, plain, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one, other, atol=1e-4 * temperature)

    @staticmethod
    @jax.jit
    def weighted_by_doubt_and_plain(s, t, temperature):
        doubt = 1 - jnp.take_along_axis(jax.nn.softmax(t / temperature), LABELS[:, None], 1)[:, 0]

        def decoupled(x):
            weights = {"target_weight": 1, "non_target_weight": doubt}
            return losses.dkd(x, t, LABELS, temperature=temperature, **weights)

        def values_and_gradient(fn):
            values, pull = jax.vjp(fn, s)
            return values, pull(jnp.ones(3))[0]

        return values_and_gradient(decoupled), values_and_gradient(lambda x: kl(x, t, temperature))

    def test_two_classes_leave_nothing_but_the_target(self):
        s, t = pair(shape=(3, 2))
        weights = {"target_weight": 1, "non_target_weight": 100, "temperature": 2.0}
        np.testing.assert_allclose(
            losses.dkd(s, t, jnp.array([0, 1, 1]), **weights), kl(s, t, 2.0), rtol=1e-5
        )

    def test_a_weight_made_from_the_teacher_lets_no_gradient_through(self):
        s, t = pair()
        gradient = jax.jit(
            jax.grad(lambda x: jnp.sum(losses.dkd(s, x, LABELS, non_target_weight=jnp.max(x, axis=-1))))
        )(t)
        np.testing.assert_array_equal(gradient, 0)


class TestDist:
    @given(LOGITS)
    @few(max_examples=10)
    def test_nearly_zero_at_equality_where_everything_varies(self, x):
        x = pair()[0] + jnp.asarray(x) / 30
        assert losses.dist(x, x) < 1e-3

    def test_each_part_alone(self):
        s, t = pair()
        p, q = np.exp(log_softmax(s)), np.exp(log_softmax(t))
        rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
        columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
        np.testing.assert_allclose(losses.dist(s, t, intra_weight=0.0), rows, rtol=1e-4)
        np.testing.assert_allclose(losses.dist(s, t, inter_weight=0.0), columns, rtol=1e-4)

    def test_shards_that_are_gathered_are_one_batch(self):
        s, t = pair(shape=(6, 5))
        value, gradient = jax.jit(jax.value_and_grad(lambda x: losses.dist(x, t, temperature=2.0)))(s)

        def shard(x, t, axis_name):
            return jax.value_and_grad(lambda x: losses.dist(x, t, temperature=2.0, axis_name=axis_name))(x)

        halves = s.reshape(2, 3, 5), t.reshape(2, 3, 5)
        values, gradients = jax.pmap(partial(shard, axis_name="batch"), axis_name="batch")(*halves)
        np.testing.assert_allclose(values, jnp.stack([value, value]), rtol=1e-5)
        # A step takes the mean over the devices of the parameters' gradients, hence half of each device's share.
        np.testing.assert_allclose(gradients.reshape(6, 5) / 2, gradient, rtol=1e-4, atol=1e-6)
        alone, _ = jax.pmap(partial(shard, axis_name=None))(*halves)
        assert abs(float(jnp.mean(alone)) - float(value)) > 0.01


@given(LOGITS, LOGITS, st.floats(0.2, 5), st.floats(-5, 5))
@few(max_examples=10)
def test_standardised_logits_forget_scale_and_shift(s, t, scale, shift):
    s, t = (jnp.asarray(x + 5 * np.eye(3, 5, dtype=np.float32)) for x in (s, t))
    plain = losses.logit_standardised_kl(s, t)
    np.testing.assert_allclose(
        losses.logit_standardised_kl(scale * s + shift, t), plain, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 10.0])
def test_wttm_equals_the_authors(temperature):
    found = np.load(Path(__file__).parent / "goldens" / "wttm.npz")
    student, teacher = (jnp.asarray(GOLDENS[f"logits_{who}"]) for who in ("student", "teacher"))

    def mean(student):
        return jnp.mean(losses.wttm(student, teacher, temperature=temperature))

    value, gradient = jax.jit(jax.value_and_grad(mean))(student)
    np.testing.assert_allclose(value, found[f"{temperature:g}/loss"], rtol=1e-5)
    wanted = found[f"{temperature:g}/gradient"]
    np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max())


def test_wttm_weighs_a_doubtful_teacher_by_the_number_of_classes_and_a_certain_one_by_one():
    s, _ = pair(shape=(1, 5))
    certain, doubtful = jnp.asarray([[100.0, 0, 0, 0, 0]]), jnp.zeros((1, 5))
    np.testing.assert_allclose(losses.wttm(s, certain), kl(s, certain / 5.0), rtol=1e-5)
    np.testing.assert_allclose(losses.wttm(s, doubtful), 5 ** (1 - 1 / 5) * kl(s, doubtful), rtol=1e-5)


def test_confidence_penalty_is_the_divergence_from_uniform_less_log_classes():
    s, _ = pair()
    log_p = log_softmax(s)
    np.testing.assert_allclose(losses.confidence_penalty(s), (np.exp(log_p) * log_p).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(losses.confidence_penalty(jnp.zeros((1, 5))), [-np.log(5)], rtol=1e-6)


class TestTeacherFreeKl:
    def test_is_distillation_from_the_virtual_teacher(self):
        s, _ = pair()
        u = np.full((3, 5), 0.1 / 4, np.float32)
        u[np.arange(3), LABELS] = 0.9
        value = losses.teacher_free_kl(s, LABELS, correct_probability=0.9, temperature=2.0)
        np.testing.assert_allclose(value, kl(s, np.log(u), 2.0), rtol=1e-5)
        np.testing.assert_allclose(
            losses.teacher_free_kl(jnp.asarray(np.log(u)), LABELS, correct_probability=0.9), 0, atol=1e-5
        )

    @pytest.mark.parametrize("probability", [0, 1.0])
    def test_refuses_a_virtual_teacher_without_doubt(self, probability):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {probability}"):
            losses.teacher_free_kl(jnp.zeros((1, 2)), jnp.zeros(1, int), correct_probability=probability)


class TestJensenShannon:
    @given(LOGITS, LOGITS)
    @few(max_examples=20)
    def test_is_symmetric_bounded_and_right(self, s, t):
        value = losses.jensen_shannon(jnp.asarray(s), jnp.asarray(t))
        np.testing.assert_allclose(
            losses.jensen_shannon(jnp.asarray(t), jnp.asarray(s)), value, rtol=1e-4, atol=1e-6
        )
        assert (value <= np.log(2) + 1e-5).all()
        p, q = log_softmax(s), log_softmax(t)
        m = np.logaddexp(p, q) - np.log(2)
        wanted = 0.5 * (np.exp(p) * (p - m) + np.exp(q) * (q - m)).sum(-1)
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-5)

    def test_tends_to_an_eighth_of_the_squared_difference_of_centred_logits(self):
        s, t = pair(scale=1.0)
        centred = (s - s.mean(1, keepdims=True)) - (t - t.mean(1, keepdims=True))
        value = losses.jensen_shannon(s, t, temperature=300.0)
        np.testing.assert_allclose(value, (centred**2).mean(1) / 8, rtol=0.01)


class TestTopKKl:
    @given(LOGITS, LOGITS)
    @few(max_examples=15)
    def test_grows_with_k_to_the_whole_divergence(self, s, t):
        s, t = jnp.asarray(s), jnp.asarray(t)
        values = [top_k(s, t, None, k=k, temperature=4.0) for k in (1, 2, 3, 4, 5)]
        for less, more in pairwise(values):
            assert (less <= more * (1 + 1e-4) + 1e-4).all()
        np.testing.assert_allclose(values[-1], kl(s, t, 4.0), rtol=1e-3, atol=1e-4)

    def test_the_rest_is_one_event(self):
        s = jnp.array([[1.0, 0.0, 2.0, 0.5]])
        value = losses.top_k_kl(s, jnp.array([[0.5, 0.2]]), jnp.array([[2, 0]]))
        q = np.exp(log_softmax(s))[0]
        grouped = np.array([q[2], q[0], q[1] + q[3]])
        p = np.array([0.5, 0.2, 0.3])
        np.testing.assert_allclose(value, [(p * np.log(p / grouped)).sum()], rtol=1e-5)

    def test_half_precision_sums_above_one_leave_no_residual(self):
        value = losses.top_k_kl(
            jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[0.7, 0.301]], jnp.float16), jnp.array([[2, 0]])
        )
        assert 0 < value[0] < 1

    def test_refuses_more_than_there_are(self):
        with pytest.raises(ValueError, match="at most 2, the number of classes, got 3"):
            losses.top_k_kl(jnp.zeros((1, 2)), jnp.zeros((1, 3)), jnp.zeros((1, 3), int))


class TestLabelSmoothingCrossEntropy:
    def test_is_the_mixture_of_two_cross_entropies(self):
        s, _ = pair()
        log_p = log_softmax(s)
        wanted = -0.8 * log_p[np.arange(3), LABELS] - 0.2 * log_p.mean(-1)
        np.testing.assert_allclose(
            losses.label_smoothing_cross_entropy(s, LABELS, smoothing=0.2), wanted, rtol=1e-5
        )

    @pytest.mark.parametrize("smoothing", [-0.1, 2])
    def test_refuses_what_is_no_share(self, smoothing):
        with pytest.raises(ValueError, match=f"from 0 to 1, got {smoothing}"):
            losses.label_smoothing_cross_entropy(jnp.zeros((1, 2)), jnp.zeros(1, int), smoothing=smoothing)
