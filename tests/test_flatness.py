"""Measures of flatness are those of the Hessian, and the filter-normalised ones belong to the function alone."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import common
from experiments.common import flatness
from kdjax import landscape, models, train

IMAGES, NORMALISED = 48, "/filter_normalised"


@pytest.fixture(scope="module")
def task():
    return common.make_task("digits", data_dir=None, num_train=IMAGES, num_validation=16)


@pytest.fixture(scope="module")
def weights(task):
    network = models.build("digits_student", num_classes=10)
    params, state = models.init(network, task.source.images.shape[1:], seed=0)
    # Biases too, which begin at zero.
    noise = landscape.random_direction(jax.random.key(0), params)
    return train.Weights(jax.tree.map(lambda p, x: p + 0.05 * x, params, noise), state)


def run_of(weights):
    network = models.build("digits_student", num_classes=10)
    return common.Trained(network, SimpleNamespace(last=weights), {}, {}, 0.0)  # type: ignore[arg-type]


def rescaled(weights, factor):
    """The same function: ReLU and pooling pass a positive factor on."""
    params = {name: dict(layer) for name, layer in weights.params.items()}
    for name in ("kernel", "bias"):
        params["Conv_0"][name] = factor * params["Conv_0"][name]
    params["Conv_1"]["kernel"] = params["Conv_1"]["kernel"] / factor
    return weights._replace(params=params)


@pytest.fixture(scope="module")
def measured(task, weights, tmp_path_factory):
    """Of the network, and of the same function with other weights."""
    runs = [run_of(weights), run_of(rescaled(weights, 4.0))]
    return common.flatness_of(task, {"a": runs}, tmp_path_factory.mktemp("kept"), num_matvecs=60)["a"]


@pytest.fixture(scope="module")
def dense(task, weights):
    """Loss of flat parameters, the Hessian, and the norm of each parameter's filter."""
    ids = task.split["train"]
    pixels = (task.source.images[ids] / 255.0 - np.float32(task.mean)) / np.float32(task.std)
    flat, unravel = ravel_pytree(weights.params)
    apply_fn = models.apply_fn(run_of(weights).module)

    def loss(x):
        logits = apply_fn(unravel(x), {}, jnp.asarray(pixels, jnp.float32), train=False)[0].logits
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(IMAGES), task.source.labels[ids]])

    def norm(x):
        x = np.asarray(x)
        return np.broadcast_to(np.linalg.norm(x.reshape(-1, x.shape[-1]), axis=0) * (x.ndim > 1), x.shape)

    norms = ravel_pytree(jax.tree.map(norm, weights.params))[0]
    return flat, loss, np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64), np.asarray(norms)


@pytest.mark.parametrize("kind", ["", NORMALISED])
def test_eigenvalues_and_trace_are_those_of_the_dense_hessian(measured, dense, kind):
    _, _, hessian, norms = dense
    scaled = norms[:, None] * hessian * norms if kind else hessian
    values = np.linalg.eigvalsh(scaled)
    for name, value in (("lambda_max", values[-1]), ("lambda_min", values[0])):
        error = measured[f"{name}_residual{kind}"][0] + 1e-4 * values[-1]
        assert measured[name + kind][0] == pytest.approx(value, abs=error)
    assert measured["trace" + kind][0] == pytest.approx(
        np.trace(scaled), abs=4 * measured["trace_error" + kind][0]
    )


def test_loss_and_gradient_are_of_the_same_images(measured, dense):
    flat, loss, _, _ = dense
    value, slope = jax.value_and_grad(loss)(flat)
    assert measured["loss"][0] == pytest.approx(float(value), rel=1e-5)
    assert measured["gradient_norm"][0] == pytest.approx(float(jnp.linalg.norm(slope)), rel=1e-4)


@pytest.mark.parametrize("kind", ["", NORMALISED])
def test_sharpness_is_a_height_that_no_other_point_at_this_distance_exceeds(measured, dense, kind):
    flat, loss, _, norms = dense
    scales = norms if kind else np.ones_like(norms)
    slope = scales * jax.grad(loss)(flat)
    others = [slope, *jax.random.normal(jax.random.key(0), (20, len(flat)))]
    rises = [float(loss(flat + 0.05 * scales * d / jnp.linalg.norm(d)) - loss(flat)) for d in others]
    assert measured["sharpness" + kind][0] >= max(rises) > 0


def test_only_filter_normalised_measures_belong_to_the_function(measured):
    assert measured["loss"][1] == pytest.approx(measured["loss"][0], rel=1e-4)
    for name in ("lambda_max", "trace", "sharpness"):
        raw, normalised = measured[name], measured[name + NORMALISED]
        error = 4 * sum(measured["trace_error" + NORMALISED]) if name == "trace" else 0.0
        assert normalised[1] == pytest.approx(normalised[0], rel=2e-3, abs=error)
        assert abs(raw[1] / raw[0] - 1) > 0.1


def test_numbers_are_kept_until_the_weights_change(task, weights, tmp_path, monkeypatch, caplog):
    def measure(found, where):
        return common.flatness_of(task, {"a": [run_of(found)]}, where, num_images=16, num_matvecs=6)

    other = rescaled(weights, 2.0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        first = measure(weights, tmp_path)
        assert any("Compiling" in said for said in caplog.messages)
        caplog.clear()
        assert measure(other, tmp_path / "other") != first
    assert not any("Compiling" in said for said in caplog.messages)  # weights are arguments
    monkeypatch.setattr(flatness, "_slope", None)
    assert measure(weights, tmp_path) == first
    with pytest.raises(TypeError), pytest.warns(UserWarning, match=r"weights .* there and .*computed again"):
        measure(other, tmp_path)


def test_density_is_that_of_the_first_run(task, weights, dense, tmp_path):
    found = common.densities_of(task, {"a": [run_of(weights)]}, tmp_path, num_matvecs=30, num_probes=3)["a"]
    grid, lines = np.asarray(found["grid"]), np.asarray(found["density"])
    assert lines.shape == (3, len(grid))
    assert np.trapezoid(lines, grid, axis=1) == pytest.approx(np.ones(3), rel=0.01)
    mean = np.trapezoid(lines.mean(0) * grid, grid)
    assert mean * len(dense[0]) == pytest.approx(np.trace(dense[2]), rel=0.3)


def test_surface_is_the_loss_point_by_point_in_the_same_units_for_all(task, weights, tmp_path):
    where = {"a": [run_of(weights)], "rescaled": [run_of(rescaled(weights, 4.0))]}
    found = common.surfaces_of(task, where, tmp_path, points=5, radius=0.5)
    steps = found["a"]["x"]
    assert steps == found["a"]["y"] == [-0.5, -0.25, 0.0, 0.25, 0.5]
    ids = task.split["train"]
    pixels = (task.source.images[ids] / 255.0 - np.float32(task.mean)) / np.float32(task.std)
    apply_fn = models.apply_fn(run_of(weights).module)

    def moved(x, y, param, a, b):
        if param.ndim < 2:
            return param  # vectors are held
        axes = tuple(range(param.ndim - 1))
        own, *others = (np.sqrt(np.sum(np.square(v), axes)) for v in (param, a, b))
        return param + x * a * own / others[0] + y * b * own / others[1]

    draws = [landscape.random_direction(jax.random.key(seed), weights.params) for seed in (0, 1)]
    for i, x in enumerate(steps):
        for j, y in enumerate(steps):
            params = jax.tree.map(
                lambda *p, at=(x, y): moved(*at, *map(np.asarray, p)), weights.params, *draws
            )
            logits = apply_fn(params, {}, jnp.asarray(pixels, jnp.float32), train=False)[0].logits
            loss = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(IMAGES), task.source.labels[ids]])
            assert found["a"]["loss"][i][j] == pytest.approx(float(loss), rel=1e-3)
    # The same function in other weights has the same surface.
    np.testing.assert_allclose(found["rescaled"]["loss"], found["a"]["loss"], rtol=2e-3)
    for points in (1, 4):
        with pytest.raises(ValueError, match="points must be odd"):
            common.surfaces_of(task, where, tmp_path, points=points)


def test_surface_is_compiled_once_and_kept(task, weights, tmp_path, monkeypatch, caplog):
    def measure(found, where):
        return common.surfaces_of(task, {"a": [run_of(found)]}, where, num_images=16, points=3)

    first, other = measure(weights, tmp_path), jax.tree.map(lambda x: 2 * x, weights.params)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        assert measure(weights._replace(params=other), tmp_path / "other") != first
    assert not any("Compiling" in said for said in caplog.messages)
    monkeypatch.setattr(landscape, "surface", None)
    assert measure(weights, tmp_path) == first
