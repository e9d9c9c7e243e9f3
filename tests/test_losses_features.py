"""Losses between feature maps: against the original authors' values, and against their own laws."""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import special

from kdjax.losses import features

GOLDENS = dict(np.load(Path(__file__).parent / "goldens" / "loss_goldens.npz"))
STUDENT = [GOLDENS[f"features_student_{layer}"] for layer in range(3)]
TEACHER = [GOLDENS[f"features_teacher_{layer}"] for layer in range(3)]
SHAPE = (3, 4, 4, 2)
# Subnormal numbers are zeros to XLA and none to NumPy.
MAPS = arrays.arrays(np.float32, SHAPE, elements=st.floats(-30, 30, width=32, allow_subnormal=False))


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def flow(student, teacher):
    return features.fsp((student, student[..., ::2, ::2, :1]), (teacher, teacher[..., ::2, ::2, :1]))


def ofd(student, teacher):
    return features.ofd(student, teacher, margin=jnp.array([-0.5, -0.1]))


def information(student, teacher):
    return features.vid(student, teacher, log_scale=jnp.array([5.0, -3.0]))


class Row(NamedTuple):
    loss: Any
    zero_at_equality: bool = True
    non_negative: bool = True


# Every loss as a function of the student's and the teacher's map, and which laws are not its own.
LOSSES = {
    "hint": Row(features.hint),
    "attention_transfer": Row(features.attention_transfer),
    "factor_transfer": Row(features.factor_transfer),
    "nst": Row(features.nst),
    "fsp": Row(flow),
    "activation_boundary": Row(features.activation_boundary, zero_at_equality=False),
    "ofd": Row(ofd),
    "reviewkd": Row(features.reviewkd),
    "vid": Row(information, zero_at_equality=False, non_negative=False),
    "mgd": Row(features.mgd),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@functools.cache
def compiled(name):
    """Per-example values, and the gradients of their sum by student and by teacher."""

    def total(student, teacher):
        values = LOSSES[name].loss(student, teacher)
        return jnp.sum(values), values

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    def run(student, teacher):
        (_, values), gradients = both(jnp.asarray(student), jnp.asarray(teacher))
        return np.asarray(values), *map(np.asarray, gradients)

    return run


def layers_mean(loss):
    return lambda student, teacher: sum(jnp.mean(loss(s, t)) for s, t in zip(student, teacher, strict=True))


def vid_golden(student, teacher):
    for layer in (0, 2, 4):
        student = student @ GOLDENS[f"vid_weight_{layer}"].T
        student = jax.nn.relu(student) if layer < 4 else student
    return features.vid(student, teacher, log_scale=jnp.asarray(GOLDENS["vid_log_scale"]))


def flow_golden(student, teacher):
    return sum(jnp.mean(features.fsp(student[i : i + 2], teacher[i : i + 2])) for i in range(2))


def boundary_golden(student, teacher):
    values = [jnp.mean(features.activation_boundary(s, t)) for s, t in zip(student, teacher, strict=True)]
    return sum(0.003 * 2 ** (layer - 2) * value for layer, value in enumerate(values))


def overhaul_golden(student, teacher):
    return features.ofd(student, teacher, margin=jnp.asarray(GOLDENS["overhaul_margin"]))


# The loss of the batch and the layers of student and teacher that it takes.
AUTHORS = {
    "hint_last": (layers_mean(features.hint), [2], [2]),
    "attention_transfer": (layers_mean(features.attention_transfer), [0, 1, 2], [0, 1, 2]),
    "attention_transfer_pooled_0_to_1": (layers_mean(features.attention_transfer), [0], [1]),
    "factor_transfer_last": (layers_mean(features.factor_transfer), [2], [2]),
    "nst": (layers_mean(features.nst), [0, 1, 2], [0, 1, 2]),
    "fsp": (flow_golden, [0, 1, 2], [0, 1, 2]),
    "activation_boundary": (boundary_golden, [0, 1, 2], [0, 1, 2]),
    "overhaul_last": (layers_mean(overhaul_golden), [2], [2]),
    "review_hcl": (layers_mean(features.reviewkd), [0, 1, 2], [0, 1, 2]),
    "vid_last": (layers_mean(vid_golden), [2], [2]),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_equals_the_authors(name):
    loss, student, teacher = AUTHORS[name]
    student, teacher = tuple(STUDENT[i] for i in student), tuple(TEACHER[i] for i in teacher)
    with jax.default_matmul_precision("highest"):
        value, gradients = jax.jit(jax.value_and_grad(loss))(student, teacher)
    np.testing.assert_allclose(value, GOLDENS[f"{name}/loss"], rtol=1e-5)
    for layer, gradient in enumerate(gradients):
        wanted = GOLDENS[f"{name}/grad_{layer}"]
        np.testing.assert_allclose(gradient, wanted, atol=2e-4 * np.abs(wanted).max())


class TestEveryLoss:
    @every_loss
    def test_one_value_per_example_plain_jitted_and_vmapped(self, name):
        student, teacher = random(*SHAPE), random(*SHAPE, seed=1)
        values, _, _ = compiled(name)(student, teacher)
        assert values.shape == SHAPE[:1]
        loss = LOSSES[name].loss
        np.testing.assert_allclose(loss(jnp.asarray(student), jnp.asarray(teacher)), values, rtol=1e-5)
        np.testing.assert_allclose(jax.vmap(loss)(student, teacher), values, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(loss(student[:1], teacher[:1]), values[:1], rtol=1e-5, atol=1e-7)

    @every_loss
    def test_only_the_student_receives_a_gradient(self, name):
        _, to_student, to_teacher = compiled(name)(random(*SHAPE), random(*SHAPE, seed=1))
        np.testing.assert_array_equal(to_teacher, 0)
        assert np.abs(to_student).max() > 0

    @pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.zero_at_equality])
    @settings(deadline=None, max_examples=10)
    @given(x=MAPS)
    def test_zero_at_equality(self, name, x):
        values, gradient, _ = compiled(name)(x, x)
        np.testing.assert_allclose(values, 0, atol=1e-6)
        assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.non_negative])
    @settings(deadline=None, max_examples=10)
    @given(student=MAPS, teacher=MAPS)
    def test_never_negative_and_finite(self, name, student, teacher):
        values, gradient, _ = compiled(name)(student, teacher)
        assert (values >= -1e-6).all()  # nst is a difference of means and may round below zero
        assert np.isfinite(values).all()
        assert np.isfinite(gradient).all()

    @every_loss
    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_computed_in_float32(self, name, dtype):
        student, teacher = jnp.asarray(random(*SHAPE), dtype), jnp.asarray(random(*SHAPE, seed=1), dtype)
        values, gradient, _ = compiled(name)(student, teacher)
        assert values.dtype == jnp.float32
        assert gradient.dtype == dtype
        wanted, _, _ = compiled(name)(student.astype(jnp.float32), teacher.astype(jnp.float32))
        np.testing.assert_allclose(values, wanted, rtol=1e-5)

    @every_loss
    @pytest.mark.parametrize("student", ["zero", "tiny", "huge", "dead channel", "flat"])
    @pytest.mark.parametrize("teacher", ["zero", "huge", "random"])
    def test_degenerate_maps_have_finite_values_and_gradients(self, name, student, teacher):
        x = random(*SHAPE)
        kinds = {
            "zero": 0 * x,
            "tiny": 1e-20 * x,
            "huge": jnp.where(x > 0, 1e4, -1e4),
            "dead channel": x.at[..., 1].set(0),
            "flat": jnp.ones_like(x),
            "random": random(*SHAPE, seed=1),
        }
        values, gradient, _ = compiled(name)(kinds[student], kinds[teacher])
        assert np.isfinite(values).all()
        assert np.isfinite(gradient).all()


class TestAttention:
    @pytest.mark.parametrize("loss", [features.attention_transfer, features.factor_transfer])
    def test_neither_scale_nor_sign_nor_order_of_channels_counts(self, loss):
        student, teacher = random(2, 4, 4, 3), random(2, 4, 4, 5, seed=1)
        wanted = loss(student, teacher)
        np.testing.assert_allclose(loss(-7 * student[..., ::-1], 0.3 * teacher), wanted, rtol=1e-5)

    def test_pools_the_larger_map_whichever_it_is(self):
        large, small = random(2, 8, 4, 3), random(2, 4, 4, 3, seed=1)
        pooled = large.reshape(2, 4, 2, 4, 3).mean(2)
        wanted = features.attention_transfer(pooled, small)
        np.testing.assert_allclose(features.attention_transfer(large, small), wanted, rtol=1e-5)
        np.testing.assert_allclose(features.attention_transfer(small, large), wanted, rtol=1e-5)

    def test_never_above_two_positions_worth(self):
        here, there = np.zeros((2, 1, 2, 2, 1), np.float32)
        here[0, 0, 0], there[0, 1, 1] = 1, 1
        here, there = jnp.asarray(here), jnp.asarray(there)
        np.testing.assert_allclose(features.attention_transfer(here, there), [2 / 4], rtol=1e-6)
        np.testing.assert_allclose(features.factor_transfer(here, there), [2 / 4], rtol=1e-6)

    def test_a_schedule_may_set_the_power(self):
        student, teacher = random(2, 4, 4, 3), random(2, 4, 4, 3, seed=1)
        run = jax.jit(lambda power: features.attention_transfer(student, teacher, power=power))
        np.testing.assert_allclose(
            run(3.0), features.attention_transfer(student, teacher, power=3), rtol=1e-5
        )
        with pytest.raises(ValueError, match="power"):
            features.attention_transfer(student, teacher, power=0)


class TestNeuronSelectivity:
    @pytest.mark.parametrize("shape", [(2, 3, 3, 5, 12), (2, 4, 5, 6, 3), (2, 2, 2, 4, 4)])
    def test_is_the_discrepancy_of_the_kernel_over_channels_or_positions(self, shape):
        *size, ours, theirs = shape
        student, teacher = random(*size, ours), random(*size, theirs, seed=1)

        def unit(x):
            x = np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
            return x / np.linalg.norm(x, axis=1, keepdims=True)

        def kernel(a, b):
            return ((np.swapaxes(unit(a), 1, 2) @ unit(b)) ** 2).mean((1, 2))

        wanted = kernel(student, student) + kernel(teacher, teacher) - 2 * kernel(student, teacher)
        np.testing.assert_allclose(features.nst(student, teacher), wanted, rtol=1e-5, atol=1e-7)

    def test_the_order_and_the_scale_of_channels_do_not_count(self):
        student, teacher = random(2, 3, 3, 12), random(2, 3, 3, 12, seed=1)
        moved = teacher[..., np.random.default_rng(0).permutation(12)] * 5
        wanted = features.nst(student, teacher)
        np.testing.assert_allclose(features.nst(student, moved), wanted, rtol=1e-5)
        np.testing.assert_allclose(features.nst(moved, teacher), 0, atol=1e-6)

    @pytest.mark.parametrize("shape", [(2, 4, 4, 32), (2, 8, 8, 16)])
    def test_nothing_larger_than_a_gram_matrix_is_stored(self, shape):
        x = jnp.zeros(shape)
        run = jax.make_jaxpr(jax.grad(lambda s, t: jnp.sum(features.nst(s, t))))(x, x)
        largest = max(v.aval.size for e in run.jaxpr.eqns for v in e.outvars)
        assert largest <= max(x.size, shape[0] * shape[-1] ** 2)


class TestSolutionFlow:
    def test_is_the_mean_outer_product_at_the_smaller_size(self):
        student, teacher = (
            (random(2, 4, 4, 3), random(2, 2, 2, 5, seed=1)),
            (
                random(2, 4, 4, 3, seed=2),
                random(2, 4, 4, 5, seed=3),
            ),
        )
        pooled = student[0].reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
        ours = np.einsum("bhwi,bhwj->bij", pooled, student[1]) / 4
        theirs = np.einsum("bhwi,bhwj->bij", *teacher) / 16
        np.testing.assert_allclose(
            features.fsp(student, teacher), ((ours - theirs) ** 2).mean((1, 2)), rtol=1e-4
        )


class TestActivationBoundary:
    def test_only_the_sign_of_the_teacher_counts(self):
        student, teacher = random(*SHAPE), random(*SHAPE, seed=1)
        np.testing.assert_array_equal(
            features.activation_boundary(student, teacher), features.activation_boundary(student, 9 * teacher)
        )

    def test_beyond_the_margin_on_the_right_side_nothing_is_lost(self):
        teacher = random(*SHAPE)
        right = jnp.where(teacher > 0, 1.5, -1.5)
        np.testing.assert_array_equal(features.activation_boundary(right, teacher, margin=1.5), 0)
        lost = features.activation_boundary(-right, teacher, margin=1.5)
        np.testing.assert_allclose(lost, 9 * right[0].size, rtol=1e-6)
        with pytest.raises(ValueError, match="margin of at least 0, got -1"):
            features.activation_boundary(right, teacher, margin=-1)


class TestOverhaul:
    @settings(deadline=None, max_examples=10)
    @given(MAPS, MAPS)
    def test_is_the_three_cases_of_the_paper(self, s, t):
        m = np.array([-0.5, -0.1], np.float32)
        below, between, above = t <= m, (t > m) & (t <= 0), t > 0
        terms = ((s - m) ** 2 * (below & (s > m))) + (s - t) ** 2 * ((between & (s > t)) | above)
        values, _, _ = compiled("ofd")(s, t)
        np.testing.assert_allclose(values, terms.sum((1, 2, 3)), rtol=1e-5)

    def test_margin_is_the_mean_of_the_negative_values(self):
        scale, bias = np.array([1.0, -2.0, 0.5, 0.1]), np.array([0.0, 1.0, -3.0, -5.0])
        draws = bias + scale * np.random.default_rng(0).normal(size=(400_000, 4))
        wanted = [column[column < 0].mean() for column in draws.T]
        margin = features.ofd_margin(jnp.asarray(scale), jnp.asarray(bias))
        np.testing.assert_allclose(margin, wanted, rtol=0.01)
        np.testing.assert_allclose(margin[0], -math.sqrt(2 / math.pi), rtol=1e-6)

    def test_margin_of_channels_that_are_hardly_ever_negative(self):
        margin = features.ofd_margin(jnp.array([1.0, -0.1, 0.0, 0.0]), jnp.array([3.5, 9.0, 1.0, -1.0]))
        np.testing.assert_allclose(margin, [-3, -0.3, 0, -1], atol=1e-6)


class TestReview:
    @pytest.mark.parametrize("side", [1, 2, 4, 7, 8])
    def test_a_constant_difference_counts_alike_on_every_level(self, side):
        teacher = random(2, side, side, 3)
        np.testing.assert_allclose(features.reviewkd(teacher + 2, teacher), 4, rtol=1e-5)

    @pytest.mark.parametrize(("height", "width"), [(7, 7), (5, 9), (8, 6)])
    def test_cells_overlap_where_sides_do_not_divide(self, height, width):
        d = random(2, height, width, 3)

        def cell(i, n, old):
            return slice(i * old // n, math.ceil((i + 1) * old / n))

        def pooled(n):
            rows = [
                [d[:, cell(i, n, height), cell(j, n, width)].mean((1, 2)) for j in range(n)] for i in range(n)
            ]
            return np.array(rows)

        terms = [(d**2).mean((1, 2, 3)), *((pooled(n) ** 2).mean((0, 1, 3)) for n in (4, 2, 1))]
        wanted = np.average(terms, axis=0, weights=[1, 1 / 2, 1 / 4, 1 / 8])
        np.testing.assert_allclose(features.reviewkd(d, 0 * d), wanted, rtol=1e-5)


class TestVariationalInformation:
    def test_the_best_variance_is_the_mean_squared_error(self):
        teacher, mean = random(2, 3, 3, 2), random(2, 3, 3, 2, seed=1)
        best = np.log(np.expm1(((mean - teacher) ** 2).mean((0, 1, 2)) - 1e-5))

        def loss(log_scale):
            return jnp.mean(features.vid(mean, teacher, log_scale=log_scale))

        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(best)), 0, atol=1e-6)
        assert np.abs(jax.grad(loss)(jnp.asarray(best + 1))).min() > 0.01

    def test_a_scale_that_shrinks_or_grows_without_end_stays_finite(self):
        x = random(*SHAPE)
        for start in (-1e4, 1e4):
            value, gradient = jax.value_and_grad(lambda a: jnp.sum(features.vid(x, 0 * x, log_scale=a)))(
                jnp.full(2, start)
            )
            assert jnp.isfinite(value)
            assert jnp.isfinite(gradient).all()


class TestMasks:
    @pytest.mark.parametrize(
        ("mask", "axes"), [(features.mask_positions, (3,)), (features.mask_channels, (1, 2))]
    )
    def test_whole_positions_or_channels_go_and_the_rest_is_untouched(self, mask, axes):
        x = jnp.ones((16, 16, 16, 16), jnp.bfloat16)
        kept = mask(jax.random.key(0), x, fraction=0.25)
        assert kept.dtype == x.dtype
        assert set(np.unique(kept.astype(jnp.float32))) == {0, 1}
        np.testing.assert_array_equal(kept.min(axes), kept.max(axes))
        assert abs(float(jnp.mean(kept.astype(jnp.float32))) - 0.75) < 0.1
        np.testing.assert_array_equal(mask(jax.random.key(0), x, fraction=0), x)

    @pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
    def test_refuses_a_fraction_that_leaves_nothing(self, fraction):
        with pytest.raises(ValueError, match=f"below 1, got {fraction}"):
            features.mask_channels(jax.random.key(0), jnp.ones((1, 2, 2, 3)), fraction=fraction)


class TestVkd:
    @given(arrays.arrays(np.float32, (2, 3, 5), elements=st.floats(-30, 30, width=32, allow_subnormal=False)))
    @settings(deadline=None, max_examples=15)
    def test_is_hubers_distance_from_the_normalised_teacher(self, pair):
        student, teacher = pair.astype(float)
        normalised = (teacher - teacher.mean(-1, keepdims=True)) / np.sqrt(
            teacher.var(-1, keepdims=True) + 1e-5
        )
        wanted = special.huber(1, student - normalised).mean(-1)
        np.testing.assert_allclose(features.vkd(*pair), wanted, rtol=1e-3, atol=1e-4)

    def test_no_gradient_reaches_the_teacher_whose_scale_counts_nothing(self):
        student, teacher = random(3, 5), random(3, 5, seed=1)
        value = features.vkd(student, teacher)
        np.testing.assert_allclose(features.vkd(student, 50 * teacher + 7), value, rtol=1e-3)
        gradient = jax.grad(lambda t: jnp.sum(features.vkd(student, t)))(teacher)
        np.testing.assert_array_equal(gradient, 0)
