"""Regression with noisy labels: the mixture that is learnt, and that the closed-form weights are the best ones."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kdjax import losses
from kdjax.losses import regression

S, T, Y = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)), jnp.float32)


class TestSquaredError:
    @given(st.floats(-1, 2))
    @settings(deadline=None, max_examples=15)
    def test_is_the_distance_to_the_mixture_and_what_no_student_can_change(self, a):
        value = regression.squared_error(S, T, Y, hard_weight=a)
        wanted = (S - a * Y - (1 - a) * T) ** 2 + a * (1 - a) * (Y - T) ** 2
        np.testing.assert_allclose(value, wanted.mean(-1), rtol=1e-4, atol=1e-5)

    def test_zero_where_all_agree(self):
        np.testing.assert_array_equal(regression.squared_error(S, S, S), 0)

    def test_no_gradient_reaches_the_teacher(self):
        gradient = jax.grad(lambda t: jnp.sum(regression.squared_error(S, t, Y)))(T)
        np.testing.assert_array_equal(gradient, 0)

    def test_weights_per_example_plain_vmapped_and_jitted(self):
        a = jnp.array([0.0, 1.0, 0.5, 0.2])
        plain = regression.squared_error(S, T, Y, hard_weight=a)
        np.testing.assert_allclose(plain[:2], [((S - T)[0] ** 2).mean(), ((S - Y)[1] ** 2).mean()], rtol=1e-5)

        def fn(s, t, y, a):
            return regression.squared_error(s, t, y, hard_weight=a)

        np.testing.assert_allclose(jax.vmap(fn)(S, T, Y, a), plain, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(fn)(S, T, Y, a), plain, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        value = regression.squared_error(*(x.astype(dtype) for x in (S, T, Y)))
        assert value.dtype == jnp.float32
        large = jnp.full((1, 1), 1e4, dtype)  # its square is beyond float16
        assert jnp.isfinite(regression.squared_error(large, -large, large)).all()


class TestBestHardWeight:
    @given(st.floats(0.1, 4), st.floats(0.1, 4), st.floats(-0.9, 0.9))
    @settings(deadline=None, max_examples=20)
    def test_no_other_weight_does_better(self, label_error, teacher_error, correlation):
        covariance = correlation * np.sqrt(label_error * teacher_error)

        def error(a):
            return a**2 * label_error + (1 - a) ** 2 * teacher_error + 2 * a * (1 - a) * covariance

        best = float(regression.best_hard_weight(label_error, teacher_error, covariance=covariance))
        others = best + np.linspace(-1, 1, 41)
        assert error(best) <= error(others).min() + 1e-5
        least = (label_error * teacher_error - covariance**2) / (label_error + teacher_error - 2 * covariance)
        np.testing.assert_allclose(error(best), least, rtol=1e-3)

    def test_ends(self):
        assert regression.best_hard_weight(1.0, 0.0) == 0  # a perfect teacher
        assert regression.best_hard_weight(0.0, 1.0) == 1  # perfect labels
        assert regression.best_hard_weight(1.0, 1.0) == 0.5
        assert (
            regression.best_hard_weight(1.0, 1.0, covariance=1.0) == 0.5
        )  # the same errors: any weight will do
        assert regression.best_hard_weight(4.0, 1.0, covariance=1.5) < 0

    def test_simulated_students_are_best_at_that_weight(self):
        """Least squares on mixed targets, 3,000 draws of the noise; the teacher is biased and shares some of it."""
        rng = np.random.default_rng(0)
        n, d, draws, sigma = 40, 5, 3000, 1.0
        x = rng.normal(size=(n, d))
        truth = x @ rng.normal(size=d)
        fit = x @ np.linalg.pinv(x)  # predictions of a least-squares student, given its targets
        noise = sigma * rng.normal(size=(draws, n))
        bias = 0.4 * rng.normal(size=d) @ x.T / np.sqrt(d)
        labels = truth + noise
        teacher = truth + bias + 0.3 * noise @ fit + 0.2 * rng.normal(size=(draws, n)) @ fit
        label_error = sigma**2 * d / n
        teacher_error = (0.3**2 * sigma**2 + 0.2**2) * d / n + np.mean(bias**2)
        covariance = 0.3 * sigma**2 * d / n
        best = float(regression.best_hard_weight(label_error, teacher_error, covariance=covariance))
        weights = best + np.linspace(-0.4, 0.4, 9)
        errors = [np.mean(((a * labels + (1 - a) * teacher) @ fit - truth) ** 2) for a in weights]
        assert np.argmin(errors) == 4
        least = (label_error * teacher_error - covariance**2) / (label_error + teacher_error - 2 * covariance)
        np.testing.assert_allclose(errors[4], least, rtol=0.03)
        # The student that descends the distillation loss is the one that is fitted on the mixture.
        y, t = (jnp.asarray(z[0][:, None], jnp.float32) for z in (labels, teacher))
        mixture = (best * labels[0] + (1 - best) * teacher[0]) @ fit
        gradient = jax.grad(
            lambda w: jnp.mean(
                regression.squared_error(jnp.asarray(x, jnp.float32) @ w, t, y, hard_weight=best)
            )
        )(jnp.asarray(np.linalg.pinv(x) @ mixture, jnp.float32)[:, None])
        np.testing.assert_allclose(gradient, 0, atol=1e-5)

    def test_simulated_stochastic_descent_is_best_at_that_weight(self):
        """Constant steps on one example at a time: the mean squared distance from the optimum once stationary."""
        rng = np.random.default_rng(0)
        n, d = 60, 4
        x = rng.normal(size=(n, d))
        y = x @ rng.normal(size=d) + rng.normal(size=n)
        optimum = np.linalg.lstsq(x, y, rcond=None)[0]
        teacher = optimum + 0.2 * rng.normal(size=d)

        def distance(a, runs=100, steps=800, rate=0.02):
            draws = np.random.default_rng(1)
            student, distances = np.tile(a * optimum + (1 - a) * teacher, (runs, 1)), []
            for _ in range(steps):
                i = draws.integers(0, n, runs)
                mixture = a * y[i] + (1 - a) * (x[i] @ teacher)
                student = student - rate * (np.sum(student * x[i], axis=1) - mixture)[:, None] * x[i]
                distances.append(np.mean(np.sum((student - optimum) ** 2, axis=1)))
            return np.mean(distances[steps // 4 :])

        alone, bias = distance(1.0), np.sum((teacher - optimum) ** 2)
        best = float(regression.best_hard_weight(alone, bias))
        assert 0.1 < best < 0.5
        np.testing.assert_allclose(distance(best), alone * bias / (alone + bias), rtol=0.05)
        assert distance(best) < min(distance(best - 0.1), distance(best + 0.1))


class TestOneShotHardWeight:
    @staticmethod
    def estimate(y, t, smoother, *, own):
        fits = (np.asarray(v, np.float64) for v in (y, t, smoother @ y, smoother @ t))
        options = {"own_freedom": np.trace(smoother @ smoother)} if own else {}
        arrays = (jnp.asarray(v, jnp.float32)[:, None] for v in fits)
        return float(losses.one_shot_hard_weight(*arrays, freedom=np.trace(smoother), **options))

    @pytest.mark.parametrize("own", [True, False])
    def test_equals_leaving_each_example_out_where_all_have_one_leverage(self, own):
        """Columns of a Fourier basis: the diagonal of the smoother is constant, so its mean loses nothing."""
        n, penalty, rng = 24, 0.7, np.random.default_rng(0)
        angle = 2 * np.pi * np.outer(np.arange(n), [1, 2, 4]) / n
        x = np.concatenate([np.cos(angle), 0.3 * np.sin(angle), 0.3 * np.cos(angle), np.sin(angle)], axis=1)
        y = x @ rng.normal(size=12) + rng.normal(size=n)
        given = np.sin(3 * np.arange(n))

        def fitted(x, y):
            return np.linalg.solve(x.T @ x + penalty * np.eye(12), x.T @ y)

        def left_out(i):
            kept = np.arange(n) != i
            of_labels = fitted(x[kept], y[kept])
            of_teacher = fitted(x[kept], x[kept] @ of_labels if own else given[kept])
            return y[i] - x[i] @ of_labels, y[i] - x[i] @ of_teacher

        e, t = np.array([left_out(i) for i in range(n)]).T
        wanted = t @ (t - e) / ((t - e) @ (t - e))
        smoother = x @ np.linalg.solve(x.T @ x + penalty * np.eye(12), x.T)
        np.testing.assert_allclose(np.diag(smoother), np.trace(smoother) / n)
        found = self.estimate(y, smoother @ y if own else given, smoother, own=own)
        assert found == pytest.approx(wanted, rel=1e-3)

    @pytest.mark.parametrize("penalty", [0.05, 0.3, 3.0])
    @pytest.mark.parametrize("own", [True, False])
    def test_is_near_the_best_weight_on_new_examples(self, penalty, own):
        """Ridge regression with half as many features as examples; the teacher is the student, or has seen others."""
        rng = np.random.default_rng(0)
        n, d, draws = 600, 300, 16
        estimated, measured = [], []
        for _ in range(draws):
            truth, (x, theirs) = rng.normal(size=d) / np.sqrt(d), rng.normal(size=(2, n, d))
            y, y_theirs = (each @ truth + rng.normal(size=n) for each in (x, theirs))
            fit, other = (
                np.linalg.solve(each.T @ each + n * penalty * np.eye(d), each.T) for each in (x, theirs)
            )
            teacher = fit @ y if own else other @ y_theirs
            estimated.append(self.estimate(y, x @ teacher, x @ fit, own=own))
            # Of new examples with unit covariance the error is the distance of the coefficients.
            e, t = fit @ y - truth, fit @ (x @ teacher) - truth
            measured.append((t @ t - e @ t) / ((e - t) @ (e - t)))
        apart = np.subtract(estimated, measured)
        assert abs(np.mean(apart)) < 3 * np.std(apart) / np.sqrt(draws) + 0.05
        if (
            own
        ):  # the sign of the teacher's weight tells a student that is penalised too little from one too much
            assert (np.mean(measured) > 1) == (penalty > 1)

    def test_needs_examples_that_are_not_used_up(self):
        r = jnp.ones((3, 1))
        with pytest.raises(ValueError, match="freedom below the 3 examples, got freedom=3"):
            losses.one_shot_hard_weight(r, r, 2 * r, 3 * r, freedom=3)

    def test_of_equal_students_is_any(self):
        r = jnp.ones((3, 1))
        assert losses.one_shot_hard_weight(r, r, 2 * r, 2 * r, freedom=1) == 0.5
