"""Maps and their distances, against the original authors' attention transfer and against their laws."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kdjax.losses import maps

GOLDENS = np.load(Path(__file__).parent / "goldens" / "loss_goldens.npz")
FEATURES = arrays.arrays(
    np.float32, (2, 2, 2, 3), elements=st.floats(-10, 10, width=32, allow_subnormal=False)
)


class Row(NamedTuple):
    """A function of features of both networks, per example, and whether a student's scale matters."""

    loss: object
    any_scale: bool = False


LOSSES = {
    "attention": Row(lambda s, t: maps.map_distance(maps.attention_map(s), maps.attention_map(t)), True),
    "attention_4": Row(
        lambda s, t: maps.map_distance(maps.attention_map(s, power=4.0), maps.attention_map(t, power=4.0)),
        True,
    ),
    "attribution": Row(
        lambda s, t: maps.map_distance(maps.attribution_map(s), maps.attribution_map(t)), True
    ),
    "min_max": Row(
        lambda s, t: maps.map_distance(
            maps.attribution_map(s, scale="min_max"), maps.attribution_map(t, scale="min_max")
        ),
        True,
    ),
    "pooled": Row(
        lambda s, t: maps.map_distance(
            maps.attribution_map(s), maps.attribution_map(jnp.repeat(jnp.repeat(t, 2, -2), 2, -3))
        ),
        True,
    ),
    "jacobian": Row(maps.gradient_match, True),
    "sobolev": Row(lambda s, t: maps.gradient_match(s, t, normalise=False)),
}


def pair(*shape, seed=0):
    student, teacher = (
        np.random.default_rng(seed).normal(size=(2, *(shape or (2, 2, 2, 3)))).astype(np.float32)
    )
    return jnp.asarray(student), jnp.asarray(teacher)


def layers(who):
    return [jnp.asarray(GOLDENS[f"features_{who}_{i}"]) for i in range(3)]


@cache
def compiled(name):
    """Values of a loss, and the gradients of their sum by student and by teacher, in one program per shape."""

    def total(student, teacher):
        values = LOSSES[name].loss(student, teacher)
        return jnp.sum(values), values

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    def run(student, teacher):
        (_, values), gradients = both(jnp.asarray(student), jnp.asarray(teacher))
        return values, gradients

    return run


class TestAttentionTransfer:
    def test_equals_the_authors(self):
        def loss(student):
            distances = [
                maps.map_distance(maps.attention_map(s), maps.attention_map(t))
                for s, t in zip(student, layers("teacher"), strict=True)
            ]
            return jnp.mean(sum(distances))

        value, gradient = jax.jit(jax.value_and_grad(loss))(layers("student"))
        np.testing.assert_allclose(value, GOLDENS["attention_transfer/loss"], rtol=1e-5)
        for i, got in enumerate(gradient):
            wanted = GOLDENS[f"attention_transfer/grad_{i}"]
            np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())

    def test_features_pooled_before_their_maps_equal_the_authors(self):
        student, teacher = layers("student")[0], layers("teacher")[1]
        pooled = student.reshape(6, 4, 2, 4, 2, 4).mean((2, 4))
        value = jnp.mean(maps.map_distance(maps.attention_map(pooled), maps.attention_map(teacher)))
        np.testing.assert_allclose(value, GOLDENS["attention_transfer_pooled_0_to_1/loss"], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
class TestLaws:
    @settings(deadline=None, max_examples=20)
    @given(student=FEATURES, teacher=FEATURES)
    def test_one_finite_value_per_example_not_negative(self, name, student, teacher):
        values, (gradient, _) = compiled(name)(student, teacher)
        assert values.shape == (2,)
        assert (values >= 0).all()
        assert np.isfinite(values).all()
        assert np.isfinite(gradient).all()

    def test_zero_at_equality(self, name):
        student, _ = pair()
        if name != "pooled":
            np.testing.assert_array_equal(LOSSES[name].loss(student, student), 0)

    def test_blind_to_the_students_scale_where_said(self, name):
        student, teacher = pair()
        loss, scaled = (compiled(name)(a * student, teacher)[0] for a in (1, 3))
        assert np.allclose(loss, scaled, rtol=1e-4) == LOSSES[name].any_scale

    def test_no_gradient_reaches_the_teacher(self, name):
        _, (_, gradient) = compiled(name)(*pair())
        np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_computed_in_float32(self, name, dtype):
        student, teacher = (x.astype(dtype) for x in pair())
        loss = LOSSES[name].loss(student, teacher)
        assert loss.dtype == jnp.float32
        wanted = LOSSES[name].loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
        np.testing.assert_array_equal(loss, wanted)

    def test_jitted_and_vmapped_equal_batched(self, name):
        loss = LOSSES[name].loss
        student, teacher = pair()
        np.testing.assert_allclose(
            jax.jit(jax.vmap(loss))(student, teacher), loss(student, teacher), rtol=1e-5
        )

    @pytest.mark.parametrize("fill", [0.0, 1e-20, 1.0, 1e4])
    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 3, 2)])
    def test_constant_features_are_finite(self, name, fill, shape):
        constant, other = jnp.full(shape, fill), pair(*shape)[0]
        for s, t in [(constant, other), (other, constant), (constant, constant)]:
            value, (gradient, _) = compiled(name)(s, t)
            assert np.isfinite(value).all()
            assert np.isfinite(gradient).all()


class TestMaps:
    def test_attention_is_the_normalised_energy_in_row_major_order(self):
        features = np.array([[[[3.0, -4.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]]], np.float32)
        energy = np.array([[25.0, 0, 1, 4]])
        got = maps.attention_map(jnp.asarray(features))
        np.testing.assert_allclose(got, energy / np.linalg.norm(energy), rtol=1e-6)

    def test_attribution_counts_both_signs(self):
        attributions = jnp.array([[[[1.0, -1.0], [0.0, 0.0]], [[0.0, -4.0], [1.0, 0.0]]]])
        total = np.array([[2.0, 0, 4, 1]])
        np.testing.assert_allclose(maps.attribution_map(attributions), total / np.sqrt(21), rtol=1e-6)
        np.testing.assert_allclose(maps.attribution_map(attributions, scale="min_max"), total / 4, rtol=1e-6)

    def test_the_power_may_be_traced(self):
        student, _ = pair()
        np.testing.assert_allclose(
            jax.jit(lambda p: maps.attention_map(student, power=p))(2.0),
            maps.attention_map(student),
            rtol=1e-5,
        )

    def test_refuses_what_it_cannot_use(self):
        student, _ = pair()
        with pytest.raises(ValueError, match=r"power of at least 1, got 0\.5"):
            maps.attention_map(student, power=0.5)
        with pytest.raises(ValueError, match="'unit_norm' or 'min_max', got 'sum'"):
            maps.attribution_map(student, scale="sum")
        with pytest.raises(ValueError, match="square maps, got 6 positions"):
            maps.map_distance(jnp.zeros((1, 6)), jnp.zeros((1, 4)))


class TestMapDistance:
    @pytest.mark.parametrize("larger_first", [True, False])
    def test_the_larger_is_averaged_over_bins_that_overlap_where_sizes_do_not_divide(self, larger_first):
        large, small = jnp.arange(9.0)[None], jnp.array([[1.0, 0, 0, 1]])
        pooled = np.array([[2.0, 3, 5, 6]])  # of [[0 1 2] [3 4 5] [6 7 8]], by windows of 2
        got = maps.map_distance(*((large, small) if larger_first else (small, large)))
        np.testing.assert_allclose(got, np.mean((pooled - small) ** 2, axis=1), rtol=1e-6)


class TestGradientMatch:
    def test_compares_directions_or_values(self):
        student, teacher = pair()
        s, t = (np.asarray(x, np.float64).reshape(2, -1) for x in (student, teacher))
        cosine = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
        np.testing.assert_allclose(maps.gradient_match(student, teacher), 2 - 2 * cosine, rtol=1e-5)
        np.testing.assert_allclose(
            maps.gradient_match(student, teacher, normalise=False), ((s - t) ** 2).sum(1), rtol=1e-5
        )

    def test_trains_through_a_gradient(self):
        images, teacher = pair()

        def loss(weight):
            gradient = jax.grad(lambda x: jnp.sum(jnp.tanh(x * weight)))(images)
            return jnp.mean(maps.gradient_match(gradient, teacher))

        assert jax.grad(loss)(1.0) != 0
