"""Measures of flatness are those of the dense Hessian, and the filter-normalised ones depend on the function alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from kdjax import data, flatness, landscape, models, run
from kdjax.train import Fitted
from kdjax.types import Weights

IMAGES, SHAPE, CLASSES, NORMALISED = 48, (4, 4, 1), 3, "/filter_normalised"


class Net(nn.Module):
    """ReLU between two layers, so that its weights can be rescaled."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(6)(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES)(hidden)


NETWORK = models.from_linen(Net(), SHAPE)


@pytest.fixture(scope="module")
def dataset():
    labels = np.arange(96) % CLASSES
    images = np.random.default_rng(0).integers(0, 256, (96, *SHAPE))
    whole = data.from_arrays(images.astype(np.uint8), labels, class_names=("a", "b", "c"))
    return data.split(whole, num_train=IMAGES)


@pytest.fixture(scope="module")
def trained(dataset):
    """As if trained: the measures read the weights alone."""
    params, state = NETWORK.init(0)
    noise = landscape.random_direction(jax.random.key(0), params)  # biases start at zero
    return made(dataset, jax.tree.map(lambda p, x: p + 0.2 * x, params, noise), state)


def made(dataset, params, state=None):
    weights = Weights(params, state or {})
    return run.Trained("a", 0, NETWORK, dataset.normalisation, Fitted(weights, weights, 1, []), {}, {})


def rescaled(dataset, trained, factor):
    """The same function with other weights: ReLU passes a positive factor on."""
    first, second = trained.weights.params["Dense_0"], trained.weights.params["Dense_1"]
    first = {name: factor * value for name, value in first.items()}
    return made(dataset, {"Dense_0": first, "Dense_1": {**second, "kernel": second["kernel"] / factor}})


@pytest.fixture(scope="module")
def loss(dataset):
    """The cross-entropy of parameters on the training images."""
    ids, (mean, std) = dataset.splits["train"], dataset.normalisation
    pixels = jnp.asarray((dataset.images[ids] / 255.0 - np.float32(mean)) / np.float32(std), jnp.float32)
    labels = dataset.labels[ids]

    def loss(params):
        logits = NETWORK.apply(params, {}, pixels, train=False)[0].logits
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(IMAGES), labels])

    return jax.jit(loss)


@pytest.fixture(scope="module")
def dense(loss, trained):
    """Flat parameters and their loss, the Hessian, and the norm of each parameter's filter."""
    flat, unravel = ravel_pytree(trained.weights.params)

    def norm(x):
        x = np.asarray(x)
        return np.broadcast_to(np.linalg.norm(x.reshape(-1, x.shape[-1]), axis=0) * (x.ndim > 1), x.shape)

    norms = np.asarray(ravel_pytree(jax.tree.map(norm, trained.weights.params))[0])
    of_flat = jax.jit(lambda x: loss(unravel(x)))
    return flat, of_flat, np.asarray(jax.jit(jax.hessian(of_flat))(flat), np.float64), norms


@pytest.fixture(scope="module")
def measure(dataset):
    return flatness.make_measure(dataset, num_matvecs=40)


@pytest.fixture(scope="module")
def measured(dataset, measure, trained):
    """Of the network, and of the same function with other weights."""
    return measure(trained), measure(rescaled(dataset, trained, 4.0))


class TestMeasure:
    @pytest.mark.parametrize("kind", ["", NORMALISED])
    def test_eigenvalues_and_trace_are_those_of_the_dense_hessian(self, measured, dense, kind):
        _, _, hessian, norms = dense
        found, scaled = measured[0], norms[:, None] * hessian * norms if kind else hessian
        values = np.linalg.eigvalsh(scaled)
        for name, value in (("lambda_max", values[-1]), ("lambda_min", values[0])):
            error = found[f"{name}_residual{kind}"] + 1e-4 * values[-1]
            assert found[name + kind] == pytest.approx(value, abs=error)
        error = 4 * found["trace_error" + kind] + 1e-4 * values[-1]
        assert found["trace" + kind] == pytest.approx(np.trace(scaled), abs=error)

    def test_loss_and_gradient_are_of_the_same_images(self, measured, dense):
        flat, loss, _, _ = dense
        value, slope = jax.value_and_grad(loss)(flat)
        assert measured[0]["loss"] == pytest.approx(float(value), rel=1e-5)
        assert measured[0]["gradient_norm"] == pytest.approx(float(jnp.linalg.norm(slope)), rel=1e-4)

    @pytest.mark.parametrize("kind", ["", NORMALISED])
    def test_no_other_point_at_this_distance_is_higher_than_the_sharpness(self, measured, dense, kind):
        flat, loss, _, norms = dense
        scales = norms if kind else np.ones_like(norms)
        slope = scales * jax.grad(loss)(flat)
        others = jnp.stack([slope, *jax.random.normal(jax.random.key(0), (20, len(flat)))])
        others = others / jnp.linalg.norm(others, axis=1, keepdims=True)
        rises = jax.vmap(lambda d: loss(flat + 0.05 * scales * d) - loss(flat))(others)
        assert measured[0]["sharpness" + kind] >= float(rises.max()) > 0

    def test_only_filter_normalised_measures_belong_to_the_function(self, measured):
        first, second = measured
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        for name in ("lambda_max", "trace", "sharpness"):
            error = 4 * sum(m["trace_error" + NORMALISED] for m in measured) if name == "trace" else 0.0
            wanted = pytest.approx(first[name + NORMALISED], rel=2e-3, abs=error)
            assert second[name + NORMALISED] == wanted
            assert abs(second[name] / first[name] - 1) > 0.1

    def test_other_weights_compile_nothing(self, dataset, measure, measured, trained, caplog):
        with jax.log_compiles(), caplog.at_level("WARNING"):
            assert measure(rescaled(dataset, trained, 2.0)) != measured[0]
        assert [said for said in caplog.messages if "Compiling" in said] == []

    def test_of_weights_that_are_not_finite_is_refused(self, dataset, measure, trained):
        broken = jax.tree.map(lambda x: x * jnp.nan, trained.weights.params)
        with pytest.raises(ValueError, match="finite"):
            measure(made(dataset, broken))

    def test_too_few_products_are_refused(self, dataset, trained):
        with pytest.raises(ValueError, match="at least 6 products, got 2"):
            flatness.make_measure(dataset, num_matvecs=2)(trained)


def test_density_is_that_of_the_hessian(dataset, trained, dense):
    found = flatness.make_density(dataset, num_matvecs=30, num_probes=8)(trained)
    grid, lines = np.asarray(found["grid"]), np.asarray(found["density"])
    assert lines.shape == (8, len(grid))
    assert np.trapezoid(lines, grid, axis=1) == pytest.approx(np.ones(8), rel=0.01)
    traces = len(dense[0]) * np.trapezoid(lines * grid, grid, axis=1)  # one estimate per probe
    error = 4 * traces.std(ddof=1) / np.sqrt(8)
    assert traces.mean() == pytest.approx(np.trace(dense[2]), abs=error)


def test_surface_is_the_loss_point_by_point_in_the_same_units_for_all(dataset, trained, loss, caplog):
    surface = flatness.make_surface(dataset, points=5, radius=0.5)
    found, params = surface(trained), trained.weights.params
    steps = found["x"]
    assert steps == found["y"] == [-0.5, -0.25, 0.0, 0.25, 0.5]

    def moved(x, y, param, a, b):
        if param.ndim < 2:
            return param  # vectors are held
        axes = tuple(range(param.ndim - 1))
        own, *others = (np.sqrt(np.sum(np.square(v), axes)) for v in (param, a, b))
        return param + x * a * own / others[0] + y * b * own / others[1]

    draws = [landscape.random_direction(jax.random.key(seed), params) for seed in (0, 1)]
    for i, x in enumerate(steps):
        for j, y in enumerate(steps):
            at = jax.tree.map(lambda *p, at=(x, y): moved(*at, *map(np.asarray, p)), params, *draws)
            assert found["loss"][i][j] == pytest.approx(float(loss(at)), rel=1e-3)
    # The same function with other weights has the same surface, and the same program computes it.
    alike = rescaled(dataset, trained, 4.0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        other = surface(alike)
    assert [said for said in caplog.messages if "Compiling" in said] == []
    np.testing.assert_allclose(other["loss"], found["loss"], rtol=2e-3)


def test_surface_refuses_points_without_a_centre_and_losses_that_are_not_finite(dataset, trained):
    for points in (1, 4):
        with pytest.raises(ValueError, match="points must be odd"):
            flatness.make_surface(dataset, points=points)
    far = made(dataset, jax.tree.map(lambda x: x * 1e30, trained.weights.params))
    with pytest.raises(ValueError, match="not finite: give a smaller one"):
        flatness.make_surface(dataset, points=3)(far)
