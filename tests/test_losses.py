"""Losses against the original authors' values, and against their own laws."""

from pathlib import Path

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kdjax import losses

GOLDENS = np.load(Path(__file__).parent / "goldens" / "loss_goldens.npz")
LOGITS = arrays.arrays(np.float32, (3, 5), elements=st.floats(-30, 30, width=32))


def kl(student, teacher, temperature=1.0):
    return losses.soft_target_kl(jnp.asarray(student), jnp.asarray(teacher), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_target_kl_equals_the_authors(temperature):
    def mean(student):
        return jnp.mean(kl(student, GOLDENS["logits_teacher"], temperature))

    value, gradient = jax.value_and_grad(mean)(GOLDENS["logits_student"])
    name = f"kd_T{temperature:.0f}"
    np.testing.assert_allclose(value, GOLDENS[f"{name}/loss"], rtol=1e-5)
    wanted = GOLDENS[f"{name}/grad_0"]
    np.testing.assert_allclose(gradient, wanted, atol=2e-4 * np.abs(wanted).max())


class TestSoftTargetKl:
    @settings(deadline=None, max_examples=50)
    @given(LOGITS, LOGITS, st.floats(0.5, 20))
    def test_is_the_divergence_in_double_precision(self, student, teacher, temperature):
        def log_softmax(x):
            x = x.astype(np.float64) / temperature
            x = x - x.max(-1, keepdims=True)
            return x - np.log(np.exp(x).sum(-1, keepdims=True))

        s, t = log_softmax(student), log_softmax(teacher)
        wanted = temperature**2 * (np.exp(t) * (t - s)).sum(-1)
        np.testing.assert_allclose(
            kl(student, teacher, temperature), wanted, rtol=1e-4, atol=1e-4 * temperature**2
        )

    @settings(deadline=None, max_examples=30)
    @given(LOGITS, LOGITS, st.floats(-5, 5))
    def test_shifting_all_scores_of_an_example_changes_nothing(self, student, teacher, shift):
        np.testing.assert_allclose(
            kl(student + np.float32(shift), teacher, 2.0), kl(student, teacher, 2.0), rtol=1e-4, atol=1e-4
        )

    @settings(deadline=None, max_examples=50)
    @given(LOGITS, st.floats(-0.01, 0.01), st.floats(1, 100))
    def test_is_never_negative(self, logits, nudge, temperature):
        assert (kl(logits * np.float32(1 + nudge), logits, temperature) >= 0).all()

    def test_a_class_that_the_teacher_rules_out_counts_nothing(self):
        s, t = np.array([[1.0, 2.0, 3.0]], np.float32), np.array([[2.0, 1.0, -np.inf]], np.float32)
        p = np.exp(t.astype(np.float64)) / np.exp(t.astype(np.float64)).sum()
        log_q = s - np.log(np.exp(s.astype(np.float64)).sum())
        np.testing.assert_allclose(
            kl(s, t), [(p[0, :2] * (np.log(p[0, :2]) - log_q[0, :2])).sum()], rtol=1e-5
        )

    @given(LOGITS)
    @settings(deadline=None, max_examples=20)
    def test_zero_at_equality(self, logits):
        np.testing.assert_array_equal(kl(logits, logits, 3.0), np.zeros(3))

    def test_tends_to_half_the_squared_difference_of_centred_logits(self):
        s, t = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
        centred = (s - s.mean(1, keepdims=True)) - (t - t.mean(1, keepdims=True))
        np.testing.assert_allclose(kl(s, t, 300.0), 0.5 * (centred**2).mean(1), rtol=0.01)

    def test_no_gradient_reaches_the_teacher(self):
        s, t = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
        gradient = jax.grad(lambda teacher: jnp.sum(losses.soft_target_kl(jnp.asarray(s), teacher)))(
            jnp.asarray(t)
        )
        np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        s, t = np.random.default_rng(0).normal(size=(2, 4, 6))
        s, t = jnp.asarray(s, dtype), jnp.asarray(t, dtype)
        value = kl(s, t, 4.0)
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, kl(s.astype(jnp.float32), t.astype(jnp.float32), 4.0))

    def test_saturated_logits_have_finite_values_and_gradients(self):
        s, t = jnp.array([[1e4, -1e4, 0.0]]), jnp.array([[-1e4, 1e4, 0.0]])
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(kl(x, t)))(s)
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()

    def test_batched_equals_vmapped_equals_jitted(self):
        s, t = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
        batched = kl(s, t, 2.0)
        np.testing.assert_allclose(jax.vmap(lambda a, b: kl(a, b, 2.0))(s, t), batched, rtol=1e-6)
        # The temperature may be traced, so that a schedule can set it.
        np.testing.assert_allclose(jax.jit(kl)(s, t, 2.0), batched, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [0, -1.0])
    def test_refuses_a_temperature_that_is_not_positive(self, temperature):
        with pytest.raises(ValueError, match=f"temperature above 0, got {temperature}"):
            kl(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), temperature)
