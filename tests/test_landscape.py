"""Loss surfaces against closed forms, and their invariance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import landscape

KEY = jax.random.key(0)


def quadratic():
    """A loss over two arrays, its symmetric matrix of six rows, and a point."""
    half = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    matrix = half + half.T
    params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, -0.4])}
    return jax.tree_util.Partial(quadratic_loss, jnp.asarray(matrix)), matrix, params


def quadratic_loss(matrix, params):
    flat = jnp.concatenate([params["bias"], params["kernel"].reshape(-1)])
    return flat @ matrix @ flat / 2


def flat(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def network():
    """Parameters of a ReLU network of two layers without biases, and a loss on fixed data."""
    rng = np.random.default_rng(0)
    first, second, inputs = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(3, 8), (8, 2), (16, 3)]
    )
    return {"first": first, "second": second}, jax.tree_util.Partial(network_loss, inputs)


def network_loss(inputs, params):
    logits = jax.nn.relu(inputs @ params["first"]) @ params["second"]
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


class TestDirections:
    def test_filters_have_the_norms_of_the_parameters(self):
        shapes = {"conv": (3, 3, 4, 8), "dense": (5, 6), "scale": (8,)}
        params, direction = (
            {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
            for rng in map(np.random.default_rng, range(2))
        )
        found = jax.tree.map(np.asarray, landscape.filter_normalised(direction, params))
        for name, axes in {"conv": (0, 1, 2), "dense": (0,)}.items():
            wanted = np.linalg.norm(params[name].reshape(-1, params[name].shape[-1]), axis=0)
            got = np.sqrt(np.sum(np.square(found[name]), axis=axes))
            np.testing.assert_allclose(got, wanted, rtol=1e-5)
            cosines = np.sum(found[name] * direction[name], axis=axes)
            np.testing.assert_allclose(  # the direction of each filter is that which it had
                cosines / wanted, np.sqrt(np.sum(np.square(direction[name]), axis=axes)), rtol=1e-5
            )
        np.testing.assert_array_equal(found["scale"], 0)

        norms = landscape.filter_norms(params)
        assert jax.tree.map(np.shape, norms) == {"conv": (1, 1, 1, 8), "dense": (1, 6), "scale": ()}
        for name in ("conv", "dense"):
            wanted = np.linalg.norm(params[name].reshape(-1, params[name].shape[-1]), axis=0)
            np.testing.assert_allclose(np.ravel(norms[name]), wanted, rtol=1e-5)
        assert norms["scale"] == 0

    def test_a_filter_that_is_zero_stays_where_it_is(self):
        direction, params = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[0.0, 5.0, 6.0]])
        np.testing.assert_array_equal(landscape.filter_normalised(direction, params), [[0, 0, 6]])

    def test_random_numbers_are_normal_and_follow_the_key(self):
        params = {"a": np.zeros((100, 50), jnp.bfloat16), "b": np.zeros(50), "c": np.zeros(())}
        draw, again, other = (
            jax.tree.map(np.asarray, landscape.random_direction(jax.random.key(i), params)) for i in (0, 0, 1)
        )
        assert jax.tree.map(np.shape, draw) == jax.tree.map(np.shape, params)
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(draw))
        assert abs(np.mean(draw["a"])) < 0.05
        assert abs(np.std(draw["a"]) - 1) < 0.05
        np.testing.assert_array_equal(again["a"], draw["a"])
        assert not np.array_equal(other["b"], draw["b"])
        assert not np.array_equal(draw["a"][0], draw["b"])

    def test_jitted_equals_plain(self):
        params, _ = network()

        def draw(key, params):
            return landscape.filter_normalised(landscape.random_direction(key, params), params)

        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5), jax.jit(draw)(KEY, params), draw(KEY, params)
        )


class TestSurfaces:
    def test_surface_of_a_quadratic_is_its_closed_form(self):
        loss, matrix, params = quadratic()
        first, second = (landscape.random_direction(jax.random.key(i), params) for i in (1, 2))
        xs, ys = np.linspace(-1, 1, 5), np.linspace(-0.5, 2, 4)
        got = landscape.surface(loss, params, first, second, xs=xs, ys=ys)
        points = flat(params) + xs[:, None, None] * flat(first) + ys[:, None] * flat(second)
        wanted = np.einsum("xyi,ij,xyj->xy", points, matrix, points) / 2
        assert got.shape == (5, 4)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        row = landscape.line(loss, params, second, steps=ys)
        np.testing.assert_allclose(row, got[2], rtol=1e-6)

    def test_line_along_an_eigenvector_is_half_its_eigenvalue_times_the_square(self):
        loss, matrix, params = quadratic()
        values, vectors = np.linalg.eigh(matrix)
        origin = jax.tree.map(jnp.zeros_like, params)
        steps = np.linspace(-2, 2, 9)
        for value, vector in zip(values, vectors.T, strict=True):
            direction = {"bias": vector[:2], "kernel": vector[2:].reshape(2, 2)}
            got = landscape.line(loss, origin, direction, steps=steps)
            np.testing.assert_allclose(got, value / 2 * steps**2, rtol=1e-4, atol=1e-4)

    @settings(deadline=None, max_examples=10)
    @given(factor=st.floats(0.01, 100), seed=st.integers(0, 100))
    def test_scales_of_relu_layers_do_not_show(self, factor, seed):
        params, loss = network()
        direction = landscape.random_direction(jax.random.key(seed), params)
        other = {"first": params["first"] * factor, "second": params["second"] / factor}
        plain, scaled = (
            landscape.line(loss, p, landscape.filter_normalised(direction, p), steps=np.linspace(-1, 1, 7))
            for p in (params, other)
        )
        np.testing.assert_allclose(scaled, plain, rtol=1e-4)
        if not 0.5 < factor < 2:  # which the bare direction shows
            bare = (landscape.line(loss, p, direction, steps=[0.5]) for p in (params, other))
            assert abs(np.subtract(*bare)) > 1e-3

    def test_the_loss_is_traced_once_for_all_calls_with_other_data(self):
        traces = []

        def counted(inputs, params):
            traces.append(1)
            return network_loss(inputs, params)

        params, _ = network()
        direction = landscape.random_direction(KEY, params)
        found = []
        for scale in (1.0, 2.0):
            inputs = scale * jnp.ones((4, 3))
            loss = jax.tree_util.Partial(counted, inputs)
            found.append(landscape.line(loss, params, direction, steps=np.linspace(-1, 1, 3)))
            np.testing.assert_allclose(found[-1][1], network_loss(inputs, params), rtol=1e-6)
        assert len(traces) == 1
        assert not np.allclose(*found)

    def test_a_jitted_loss_and_a_plain_one_agree(self):
        params, loss = network()
        direction = params
        plain, jitted = (
            landscape.line(f, params, direction, steps=[0.0, 1.0]) for f in (loss, jax.jit(loss))
        )
        np.testing.assert_allclose(jitted, plain, rtol=1e-6)

    def test_bfloat16_parameters_reach_the_loss_as_such_and_round_once(self):
        seen = []

        def loss(params):
            seen.append(params.dtype)
            return jnp.sum(params.astype(jnp.float32))

        params = jnp.ones((2, 2), jnp.bfloat16)
        steps = [0.0, 1 / 1024, 0.5, 1.0]
        got = landscape.line(loss, params, landscape.filter_normalised(jnp.ones((2, 2)), params), steps=steps)
        np.testing.assert_array_equal(got, [4, 4, 6, 8])
        assert set(seen) == {jnp.dtype(jnp.bfloat16)}

    def test_a_loss_that_overflows_stays_in_the_surface(self):
        got = landscape.line(lambda p: jnp.exp(p[0]), jnp.zeros(1), jnp.ones(1), steps=[0.0, 1000.0])
        np.testing.assert_array_equal(got, [1, np.inf])


class TestErrors:
    def test_directions(self):
        loss, _, params = quadratic()
        line = partial(landscape.line, loss, params, steps=[0.0])
        zero = jax.tree.map(jnp.zeros_like, params)
        with pytest.raises(ValueError, match="direction as a pytree with the structure"):
            line({"kernel": params["kernel"]})
        with pytest.raises(ValueError, match=r"direction\['bias'\] of shape \(2,\)"):
            line(params | {"bias": jnp.zeros(3)})
        with pytest.raises(ValueError, match="line needs a non-zero direction"):
            line(zero)
        with pytest.raises(ValueError, match="surface needs a non-zero second"):
            landscape.surface(loss, params, params, zero, xs=[0.0], ys=[0.0])
        with pytest.raises(ValueError, match="filter_normalised needs direction as a pytree"):
            landscape.filter_normalised(params["kernel"], params)
        with pytest.raises(ValueError, match="filter_normalised needs an array of two axes"):
            landscape.filter_normalised(params["bias"], params["bias"])
        with pytest.raises(ValueError, match="filter_norms needs an array of two axes"):
            landscape.filter_norms(params["bias"])

    def test_parameters(self):
        params = {"weights": jnp.ones(2), "count": jnp.array(3)}
        for call in (
            lambda: landscape.line(lambda p: p["weights"][0], params, params, steps=[0.0]),
            lambda: landscape.random_direction(KEY, params),
        ):
            with pytest.raises(ValueError, match=r"params\['count'\] is int32: leave it out"):
                call()
        with pytest.raises(ValueError, match="got none"):
            landscape.random_direction(KEY, {})

    @pytest.mark.parametrize("loss", [lambda p: p, lambda p: jnp.argmax(p)], ids=["vector", "integer"])
    def test_losses(self, loss):
        with pytest.raises(ValueError, match="the loss must be one floating-point number"):
            landscape.line(loss, jnp.ones(2), jnp.ones(2), steps=[0.0])

    @pytest.mark.parametrize("steps", [[], np.zeros((1, 1)), [0.0, np.nan]])
    def test_steps(self, steps):
        with pytest.raises(ValueError, match="line needs steps as a flat list of finite numbers"):
            landscape.line(jnp.sum, jnp.ones(2), jnp.ones(2), steps=steps)
