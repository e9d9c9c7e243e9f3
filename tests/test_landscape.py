"""Loss surfaces against closed forms, their invariance, and dimensions of functions whose dimension is known."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import landscape
from kdjax.landscape import Transects, fractal_dimension

KEY = jax.random.key(0)
ESTIMATORS = ("madogram", "second_differences")
BOTH = pytest.mark.parametrize("estimator", ESTIMATORS)


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


@cache
def weierstrass(dimension, *, transects=32, points=1025, base=1.5):
    """Sums of cosines with random phases, of frequencies far above that of the points: graphs of known dimension."""
    exponent = 2 - dimension
    k = np.arange(int(np.log(points * 1e4) / np.log(base)))
    phase = np.random.default_rng(0).uniform(0, 2 * np.pi, (transects, len(k)))
    angle = 2 * np.pi * base ** k[:, None] * np.linspace(0, 1, points)
    size = base ** (-exponent * k)
    return (size * np.cos(phase)) @ np.cos(angle) - (size * np.sin(phase)) @ np.sin(angle)


def box_dimension(values, sides):
    """Of graphs scaled to the unit square: boxes of each side that a graph passes through, against the side."""
    values = (values - values.min(1, keepdims=True)) / np.ptp(values, axis=1)[:, None]
    cells = values.shape[1] - 1
    counts = []
    for side in sides:
        columns = np.stack([values[:, i : i + side + 1] for i in range(0, cells, side)], 1) * cells / side
        counts.append(np.mean(np.sum(np.floor(columns.max(-1)) - np.floor(columns.min(-1)) + 1, 1)))
    return -np.polyfit(np.log(sides), np.log(counts), 1)[0]


class TestDirections:
    def test_filters_have_the_norms_of_the_parameters(self):
        shapes = {"conv": (3, 3, 4, 8), "dense": (5, 6), "scale": (8,)}
        params, direction = (
            {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
            for rng in map(np.random.default_rng, range(2))
        )
        zeroed, scaled = (
            jax.tree.map(np.asarray, landscape.filter_normalised(direction, params, vectors=v))
            for v in ("zero", "scale")
        )
        for name, axes in {"conv": (0, 1, 2), "dense": (0,)}.items():
            wanted = np.linalg.norm(params[name].reshape(-1, params[name].shape[-1]), axis=0)
            got = np.sqrt(np.sum(np.square(zeroed[name]), axis=axes))
            np.testing.assert_allclose(got, wanted, rtol=1e-5)
            cosines = np.sum(zeroed[name] * direction[name], axis=axes)
            np.testing.assert_allclose(  # the direction of each filter is that which it had
                cosines / wanted, np.sqrt(np.sum(np.square(direction[name]), axis=axes)), rtol=1e-5
            )
            np.testing.assert_array_equal(scaled[name], zeroed[name])
        np.testing.assert_array_equal(zeroed["scale"], 0)
        np.testing.assert_allclose(
            np.linalg.norm(scaled["scale"]), np.linalg.norm(params["scale"]), rtol=1e-5
        )

        norms = landscape.filter_norms(params)
        assert jax.tree.map(np.shape, norms) == {"conv": (1, 1, 1, 8), "dense": (1, 6), "scale": ()}
        for name in ("conv", "dense"):
            wanted = np.linalg.norm(params[name].reshape(-1, params[name].shape[-1]), axis=0)
            np.testing.assert_allclose(np.ravel(norms[name]), wanted, rtol=1e-5)
        assert norms["scale"] == 0
        whole = landscape.filter_norms(params, vectors="scale")["scale"]
        np.testing.assert_allclose(whole, np.linalg.norm(params["scale"]), rtol=1e-5)

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


class TestInterpolation:
    def test_barrier_of_a_double_well(self):
        found = landscape.interpolate(
            lambda p: (p["x"] ** 2 - 1) ** 2, {"x": jnp.array(-1.0)}, {"x": jnp.array(1.0)}, steps=8
        )
        np.testing.assert_allclose(found.positions, np.linspace(0, 1, 9))
        np.testing.assert_allclose(found.losses, ((2 * found.positions - 1) ** 2 - 1) ** 2, atol=1e-6)
        assert found.barrier == pytest.approx(1)

    def test_barrier_is_above_the_straight_line_between_the_ends(self):
        """A tilt of the double well moves its ends and not its barrier."""
        found = landscape.interpolate(
            lambda x: (x**2 - 1) ** 2 + 3 * x, jnp.array(-1.0), jnp.array(1.0), steps=8
        )
        assert found.losses[-1] - found.losses[0] == pytest.approx(6)
        assert found.barrier == pytest.approx(1)

    def test_none_in_a_convex_loss_whose_ends_are_exact(self):
        a, b = jnp.array([0.1, 0.7]), jnp.array([1e6, 1 / 3])
        found = landscape.interpolate(lambda p: jnp.sum(p**2), a, b, steps=5)
        assert found.barrier == 0
        np.testing.assert_allclose(found.losses[[0, -1]], [jnp.sum(a**2), jnp.sum(b**2)], rtol=1e-6)


class TestFractalDimension:
    @BOTH
    @pytest.mark.parametrize("dimension", [1.2, 1.5, 1.8])
    def test_of_weierstrass_functions(self, estimator, dimension):
        sampled = Transects(weierstrass(dimension), spacing=1 / 1024)
        found = fractal_dimension(sampled, lags=(1, 2, 4, 8, 16), estimator=estimator)
        assert abs(found.dimension - dimension) < 0.05
        assert 0 < found.standard_error < 0.02
        assert found.window == (1 / 1024, 1 / 64)
        assert found.transects == 32
        assert found.ulps > 1e6

    def test_counting_boxes_would_be_biased_low(self):
        found = {d: box_dimension(weierstrass(d), (1, 2, 4, 8, 16)) for d in (1.5, 1.8)}
        assert found[1.5] < 1.45
        assert found[1.8] < 1.6

    @BOTH
    @pytest.mark.parametrize(
        "function", [lambda x: np.sin(5 * x), np.square, np.abs, np.exp], ids=["sine", "square", "abs", "exp"]
    )
    def test_of_smooth_functions_and_kinks_is_one(self, estimator, function):
        x = np.linspace(-1, 1, 65)
        found = fractal_dimension(Transects(function(x)[None]), lags=(1, 2, 4), estimator=estimator)
        assert abs(found.dimension - 1) < 0.05
        assert np.isnan(found.standard_error)

    def test_second_differences_see_roughness_on_a_slope_and_the_madogram_does_not(self):
        values = weierstrass(1.5) + np.linspace(0, 300, 1025)[None]
        first, second = (
            fractal_dimension(Transects(values), lags=(1, 2, 4, 8, 16), estimator=e) for e in ESTIMATORS
        )
        assert first.dimension < 1.1
        assert abs(second.dimension - 1.5) < 0.05

    def test_second_differences_tell_smooth_by_the_exponent(self):
        x = np.linspace(-1, 1, 65)
        found = fractal_dimension(
            Transects(np.square(x)[None]), lags=(1, 2, 4), estimator="second_differences"
        )
        assert found.exponent == pytest.approx(2)

    @BOTH
    def test_rounding_is_not_taken_for_roughness(self, estimator):
        point, direction = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
        steps = np.linspace(-1e-5, 1e-5, 257, dtype=np.float32)
        values = np.stack(
            [[np.sum((point + t * direction) ** 2) for t in steps]]
        )  # a parabola but for rounding
        measured = partial(fractal_dimension, lags=(1, 2), estimator=estimator)
        naive = measured(Transects(values, precision=1e-16))
        assert naive.dimension > 1.6
        found = measured(Transects(values))
        assert np.isnan([found.dimension, found.exponent, found.standard_error]).all()
        assert found.ulps < 1
        constant = measured(Transects(np.zeros((3, 9))))
        assert np.isnan(constant.dimension)
        assert constant.ulps == 0

    @BOTH
    def test_neither_scale_nor_level_nor_spacing_matter(self, estimator):
        values = weierstrass(1.5, transects=4, points=129)
        plain, other = (
            fractal_dimension(Transects(v, spacing=s), lags=(1, 2, 4), estimator=estimator)
            for v, s in [(values, 1.0), (7 - 100 * values, 0.1)]
        )
        assert other.exponent == pytest.approx(plain.exponent)
        np.testing.assert_allclose(other.window, [0.1, 0.4])

    def test_of_a_loss_that_is_rough_along_every_line(self):
        """Cosines of one parameter, which filter-normalised steps move by their own length."""
        k = np.arange(20)
        frequencies, sizes = (jnp.asarray(base**k, jnp.float32) for base in (1.5, 1.5**-0.5))

        def smooth(params):
            return jnp.sum(params["kernel"] ** 2)

        def rough(params):
            return jnp.sum(sizes * jnp.cos(2 * jnp.pi * frequencies * params["kernel"][0, 0] + k))

        params = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
        for loss, wanted, tolerance in [(smooth, 1, 0.05), (rough, 1.5, 0.15)]:
            sampled = landscape.transects(loss, params, KEY, radius=0.5, count=3, points=129)
            assert sampled.values.shape == (3, 129)
            assert sampled.spacing == pytest.approx(1 / 128)
            assert sampled.precision == np.finfo(np.float32).eps
            for estimator in ESTIMATORS:
                found = fractal_dimension(sampled, lags=(1, 2, 4), estimator=estimator)
                assert abs(found.dimension - wanted) < tolerance

    def test_transects_are_lines_in_filter_normalised_directions(self):
        params, loss = network()
        sampled = landscape.transects(loss, params, KEY, radius=0.3, count=2, points=5)
        direction = landscape.random_direction(jax.random.fold_in(KEY, 1), params)
        wanted = landscape.line(
            loss, params, landscape.filter_normalised(direction, params), steps=np.linspace(-0.3, 0.3, 5)
        )
        np.testing.assert_allclose(sampled.values[1], wanted, rtol=1e-5)
        assert not np.allclose(sampled.values[0], sampled.values[1])

    def test_coarse_parameters_are_coarse_losses(self):
        params, loss = network()
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        sampled = landscape.transects(loss, params, KEY, radius=0.3, count=2, points=9)
        assert sampled.precision == jnp.finfo(jnp.bfloat16).eps
        assert np.isnan(fractal_dimension(sampled, lags=(1, 2)).dimension)


class TestErrors:
    def test_directions(self):
        loss, _, params = quadratic()
        line = partial(landscape.line, loss, params, steps=[0.0])
        zero = jax.tree.map(jnp.zeros_like, params)
        with pytest.raises(ValueError, match="direction as a pytree of the same structure"):
            line({"kernel": params["kernel"]})
        with pytest.raises(ValueError, match=r"direction\['bias'\] of shape \(2,\)"):
            line(params | {"bias": jnp.zeros(3)})
        with pytest.raises(ValueError, match="stay where it is, since direction is zero"):
            line(zero)
        with pytest.raises(ValueError, match="since second is zero"):
            landscape.surface(loss, params, params, zero, xs=[0.0], ys=[0.0])
        with pytest.raises(ValueError, match="filter_normalised needs direction as a pytree"):
            landscape.filter_normalised(params["kernel"], params)
        with pytest.raises(ValueError, match="pass vectors='scale'"):
            landscape.filter_normalised(params["bias"], params["bias"])
        with pytest.raises(ValueError, match="filter_norms finds no array of two axes"):
            landscape.filter_norms(params["bias"])
        with pytest.raises(ValueError, match="direction is zero"):
            landscape.transects(jnp.sum, jnp.zeros((2, 2)), KEY, radius=1.0, count=1, points=3)

    def test_parameters(self):
        params = {"weights": jnp.ones(2), "count": jnp.array(3)}
        for call in (
            lambda: landscape.line(lambda p: p["weights"][0], params, params, steps=[0.0]),
            lambda: landscape.random_direction(KEY, params),
            lambda: landscape.interpolate(lambda p: p["weights"][0], params, params, steps=2),
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

    def test_interpolation(self):
        with pytest.raises(ValueError, match="2 steps or more"):
            landscape.interpolate(jnp.sum, jnp.ones(2), jnp.ones(2), steps=1)
        with pytest.raises(ValueError, match="finite loss at both ends"):
            landscape.interpolate(lambda p: jnp.log(p[0]), jnp.ones(1), jnp.zeros(1), steps=2)
        with pytest.raises(ValueError, match="b of shape"):
            landscape.interpolate(jnp.sum, jnp.ones(2), jnp.ones(3), steps=2)

    def test_sampling(self):
        with pytest.raises(ValueError, match="got radius=0"):
            landscape.transects(jnp.sum, jnp.ones((2, 2)), KEY, radius=0.0, count=1, points=9)

    @pytest.mark.parametrize(
        ("values", "lags", "message"),
        [
            (np.ones((2, 8)), (1,), "two or more rising whole numbers"),
            (np.ones((2, 8)), (2, 1), "two or more rising whole numbers"),
            (np.ones((2, 8)), (1, 8), "a lag of 8 needs 9 points or more"),
            (np.ones(8), (1, 2), r"write values\[None\]"),
            (np.array([[1.0, np.inf, 3.0]]), (1, 2), "within a smaller radius"),
        ],
    )
    def test_values(self, values, lags, message):
        with pytest.raises(ValueError, match=message):
            fractal_dimension(Transects(values), lags=lags)

    def test_second_differences_need_twice_the_lag(self):
        with pytest.raises(ValueError, match="a lag of 4 needs 9 points"):
            fractal_dimension(Transects(np.ones((1, 8))), lags=(1, 4), estimator="second_differences")
