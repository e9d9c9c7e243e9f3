"""Curvature against dense Hessians, prescribed spectra, closed forms and another library; and its known pitfalls."""

from functools import cache, partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import matfree.decomp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.flatten_util import ravel_pytree

from kdjax import curvature, models, parallel
from kdjax.curvature import vectors
from kdjax.models import layers

LOOPS = ("compiled", "host")
SIZES = (3, 4, 2)  # units of the MLP: 26 parameters


def mlp(params, batch, activation=jnp.tanh):
    hidden = activation(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"][None]


def squares(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


def loss(params, batch):
    return squares(mlp(params, batch), batch)


def make_params(seed=0, dtype=jnp.float32):
    sizes = {"first": SIZES[:2], "last": SIZES[1:]}
    draw = np.random.default_rng(seed).normal
    return {
        name: {
            "kernel": jnp.asarray(draw(size=shape), dtype),
            "bias": jnp.asarray(draw(size=shape[1:]), dtype),
        }
        for name, shape in sizes.items()
    }


def make_batch(examples=11, dtype=jnp.float32):
    draw = np.random.default_rng(1).normal
    return {name: jnp.asarray(draw(size=(examples, n)), dtype) for name, n in {"x": 3, "y": 2}.items()}


def rotated(spectrum):
    """A symmetric matrix of these eigenvalues, along directions that have nothing to do with the axes."""
    basis = directions(len(spectrum))
    matrix = (basis * np.asarray(spectrum, np.float64)) @ basis.T
    return (matrix + matrix.T) / 2


@cache
def directions(n):
    return np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]


def product(matrix):
    return jax.tree_util.Partial(jnp.matmul, jnp.asarray(matrix))


def start_of(n, seed=0):
    return curvature.random_like(jax.random.key(seed), jnp.zeros(n))


def dense_hessian(loss, params, *arguments):
    """The Hessian itself, by JAX."""
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda x: loss(unravel(x), *arguments)))(flat))


def dense(matvec, like):
    """Every column of an operator, by products."""
    flat, unravel = ravel_pytree(like)
    return jax.jit(jax.vmap(lambda v: ravel_pytree(matvec(unravel(v)))[0]))(jnp.eye(len(flat)))


def eigenvalues(found):
    matrix = np.diag(found.alphas) + np.diag(found.betas[:-1], 1) + np.diag(found.betas[:-1], -1)
    return np.linalg.eigvalsh(matrix.astype(np.float64))


def network_like(n=400):
    """The spectrum of a trained network: a bulk around zero, outliers above, a few values below."""
    bulk = np.random.default_rng(3).normal(size=n - 13) * 0.05
    return np.concatenate([bulk, np.linspace(5, 50, 10), [-3, -1.5, -0.8]])


class TestProducts:
    def test_equal_the_dense_hessian(self):
        params, batch = make_params(), make_batch()
        wanted = dense_hessian(loss, params, batch)
        np.testing.assert_allclose(dense(curvature.hessian(loss, params, batch), params), wanted, atol=1e-5)
        vector = curvature.random_like(jax.random.key(0), params)
        cold = curvature.hvp(loss, params, vector, batch)
        np.testing.assert_allclose(ravel_pytree(cold)[0], wanted @ ravel_pytree(vector)[0], atol=1e-4)

    @settings(deadline=None, max_examples=8)
    @given(seeds=st.tuples(*[st.integers(0, 2**31 - 1)] * 2), factor=st.floats(-10, 10, width=32))
    def test_symmetric_and_linear(self, seeds, factor):
        multiply = curvature.hessian(loss, make_params(), make_batch())
        u, v = (curvature.random_like(jax.random.key(seed), make_params()) for seed in seeds)
        dot = optax.tree.vdot
        np.testing.assert_allclose(dot(u, multiply(v)), dot(v, multiply(u)), rtol=1e-3, atol=1e-4)
        together = multiply(jax.tree.map(lambda a, b: a + factor * b, u, v))
        apart = jax.tree.map(lambda a, b: a + factor * b, multiply(u), multiply(v))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), together, apart)

    @pytest.mark.parametrize("implementation", ["pmap", "shard_map"])
    def test_two_devices_equal_one(self, implementation):
        params, batch = make_params(), make_batch(8)
        v = curvature.random_like(jax.random.key(0), params)

        def smallest(params, v, x, y, axis_name=parallel.AXIS):
            multiply = curvature.hessian(loss, params, {"x": x, "y": y}, axis_name=axis_name)
            return multiply(v), curvature.lanczos(multiply, v, num_matvecs=6).alphas

        devices = parallel.local_devices(2)
        spread = parallel.data_parallel(
            smallest, replicated=2, devices=devices, implementation=implementation
        )
        got = spread(params, v, batch["x"], batch["y"])
        wanted = jax.jit(partial(smallest, axis_name=None))(params, v, batch["x"], batch["y"])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, wanted)

    def test_compiled_once_for_all_parameters_and_batches(self):
        traces = []

        def counted(params, batch):
            traces.append(1)
            return loss(params, batch)

        v = curvature.random_like(jax.random.key(0), make_params())
        for seed in range(3):
            multiply = curvature.hessian(counted, make_params(seed), make_batch())
            curvature.lanczos(multiply, v, num_matvecs=3)
            curvature.lanczos(multiply, v, num_matvecs=3, loop="compiled")
        assert len(traces) == 1

    def test_narrow_parameters_are_multiplied_in_float32(self):
        narrow, batch = make_params(dtype=jnp.bfloat16), make_batch()
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
        v = curvature.random_like(jax.random.key(0), narrow)
        got = curvature.hessian(loss, narrow, batch)(v)
        assert {x.dtype for x in jax.tree.leaves((v, got))} == {jnp.dtype("float32")}
        jax.tree.map(np.testing.assert_array_equal, got, curvature.hessian(loss, wide, batch)(v))


class TestClosedForms:
    x = make_batch()["x"]
    w = jnp.array([0.3, -1.0, 2.0])

    def test_linear_regression(self):
        got = dense(curvature.hessian(lambda w, x: jnp.mean((x @ w - 1) ** 2), self.w, self.x), self.w)
        np.testing.assert_allclose(got, 2 / 11 * self.x.T @ self.x, rtol=1e-5, atol=1e-6)

    def test_logistic_regression(self):
        p = jax.nn.sigmoid(self.x @ self.w)
        got = dense(curvature.hessian(lambda w, x: jnp.mean(jax.nn.softplus(x @ w)), self.w, self.x), self.w)
        np.testing.assert_allclose(
            got, self.x.T @ ((p * (1 - p) / 11)[:, None] * self.x), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
    def test_softmax_regression(self, kind):
        kernel, label = jnp.outer(self.w, jnp.array([1.0, -0.5])), jnp.arange(11) % 2

        def entropy(z, x):
            del x
            return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(z, label))

        if kind == "hessian":
            multiply = curvature.hessian(lambda k, x: entropy(x @ k, x), kernel, self.x)
        else:  # the same, since the network is linear
            multiply = curvature.gauss_newton(lambda k, x: x @ k, entropy, kernel, self.x)
        p = jax.nn.softmax(self.x @ kernel)
        middle = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
        wanted = jnp.einsum("nab,ni,nj->iajb", middle, self.x, self.x).reshape(6, 6) / 11
        np.testing.assert_allclose(dense(multiply, kernel), wanted, rtol=1e-5, atol=1e-6)

    def test_through_convolutions_that_have_no_forward_rule(self):
        images = jax.random.normal(jax.random.key(0), (2, 5, 5, 1))
        params = jax.random.normal(jax.random.key(1), (3, 3, 1, 2))

        def model(kernel, images):
            return jnp.tanh(layers.conv(images, kernel, strides=2)).sum((1, 2))

        def native(kernel, images):
            axes = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=axes)
            return jnp.sum(jnp.cosh(jnp.tanh(y).sum((1, 2))))

        v = jax.random.normal(jax.random.key(2), params.shape)
        got = curvature.hvp(lambda k, x: jnp.sum(jnp.cosh(model(k, x))), params, v, images)
        wanted = jax.jit(lambda: jax.jvp(jax.grad(native), (params, images), (v, 0 * images))[1])()
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        got = curvature.gauss_newton(model, lambda y, _: jnp.sum(jnp.cosh(y)), params, images)(v)
        y, jacobian = jax.jit(lambda: (model(params, images), jax.jacrev(model)(params, images)))()
        wanted = np.einsum("bcijkl,bc,bcmnop,mnop->ijkl", jacobian, np.cosh(y), jacobian, v)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


class TestLanczos:
    @pytest.mark.parametrize("loop", LOOPS)
    def test_all_eigenvalues_of_a_network(self, loop):
        params, batch = make_params(), make_batch(40)
        wanted = np.linalg.eigvalsh(dense_hessian(loss, params, batch))
        start = curvature.random_like(jax.random.key(0), params)
        found = curvature.lanczos(
            curvature.hessian(loss, params, batch), start, num_matvecs=len(wanted), loop=loop
        )
        np.testing.assert_allclose(eigenvalues(found), wanted, atol=1e-4 * np.abs(wanted).max())

    def test_all_eigenvalues_of_a_network_in_float64(self):
        with jax.enable_x64(True):
            params, batch = make_params(dtype=jnp.float64), make_batch(40, jnp.float64)
            wanted = np.linalg.eigvalsh(dense_hessian(loss, params, batch))
            start = curvature.random_like(jax.random.key(0), params)
            found = curvature.lanczos(curvature.hessian(loss, params, batch), start, num_matvecs=len(wanted))
            np.testing.assert_allclose(eigenvalues(found), wanted, atol=1e-8 * np.abs(wanted).max())

    @pytest.mark.parametrize(
        "spectrum",
        [
            [-3, *np.linspace(0.5, 1, 10), 40],  # gaps
            [-1, 1, *(2 + 1e-3 * np.arange(9)), 5],  # a cluster
            [-2, -2, 3, 3, 3, 3, 3, 3, 7, 7, 7, 9],  # repeated
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4],  # singular
            [0] * 12,
        ],
        ids=["gaps", "cluster", "repeated", "singular", "zero"],
    )
    def test_prescribed_spectra(self, spectrum):
        ends = curvature.extreme_eigenpairs(
            product(rotated(spectrum)), start_of(12), num_matvecs=12, top=2, bottom=2
        )
        scale = max(np.abs(spectrum).max(), 1)
        seen = np.unique(spectrum)  # a repeated eigenvalue is seen once
        for pairs, wanted in ((ends.top, seen[::-1][:2]), (ends.bottom, seen[:2])):
            assert np.isnan(pairs.values).sum() == 2 - len(wanted)
            np.testing.assert_allclose(pairs.values[: len(wanted)], wanted, atol=1e-5 * scale)
            rest = pairs.vectors @ rotated(spectrum) - pairs.values[:, None] * pairs.vectors
            assert np.linalg.norm(rest[: len(wanted)]) <= 1e-4 * scale

    def test_defining_identities_and_matfree(self):
        matrix, k = rotated(np.linspace(-2, 3, 30)).astype(np.float32), 8
        start = start_of(30)
        found = curvature.lanczos(product(matrix), start, num_matvecs=k)
        q = np.asarray(found.basis)
        tridiagonal = np.diag(found.alphas) + np.diag(found.betas[:-1], 1) + np.diag(found.betas[:-1], -1)
        np.testing.assert_allclose(q @ q.T, np.eye(k), atol=2e-6)
        left = matrix @ q.T - q.T @ tridiagonal
        np.testing.assert_allclose(left[:, :-1], 0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(left[:, -1]), found.betas[-1], rtol=1e-4)
        theirs = matfree.decomp.tridiag_sym(k)(lambda v: jnp.asarray(matrix) @ v, start)
        np.testing.assert_allclose(tridiagonal, theirs.J_small, atol=1e-5)
        np.testing.assert_allclose(q, theirs.Q_tall, atol=1e-4)

    def test_loops_and_any_function_agree(self):
        matrix = jnp.asarray(rotated(np.linspace(-2, 3, 30)))
        kinds = [(product(matrix), "compiled"), (product(matrix), "host"), (lambda v: matrix @ v, "host")]
        found = [curvature.lanczos(f, start_of(30), num_matvecs=8, loop=loop) for f, loop in kinds]
        for other in found[1:]:
            jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), other, found[0])

    def test_a_breakdown_ends_it(self):
        found = curvature.lanczos(product(rotated([-2] * 9 + [3] * 21)), start_of(30), num_matvecs=6)
        np.testing.assert_array_equal(found.alphas[2:], 0)
        np.testing.assert_array_equal(found.betas[1:], 0)
        np.testing.assert_array_equal(found.basis[2:], 0)
        identity = curvature.lanczos(lambda v: v, start_of(30), num_matvecs=3, loop="host")
        np.testing.assert_allclose(identity.alphas, [1, 0, 0], atol=1e-6)

    def test_under_vmap(self):
        matrices = jnp.stack([jnp.asarray(rotated(s)) for s in ([-1, 2, 3, 4], [-5, 1, 1, 2])])

        def smallest(matrix):
            multiply = jax.tree_util.Partial(jnp.matmul, matrix)
            return curvature.extreme_eigenpairs(multiply, start_of(4), num_matvecs=4).bottom.values

        np.testing.assert_allclose(jax.vmap(smallest)(matrices)[:, 0], [-1, -5], rtol=1e-4)


class TestExtremePairs:
    @pytest.mark.parametrize(("loop", "k"), [("compiled", 8), ("host", 30)])
    def test_values_lie_within_the_residuals(self, loop, k):
        spectrum = network_like()
        multiply = product(rotated(spectrum).astype(np.float32))
        find = partial(curvature.extreme_eigenpairs, multiply, start_of(400), num_matvecs=k, top=3, loop=loop)
        told, measured = (find(explicit_residuals=explicit) for explicit in (False, True))
        for pairs, again in zip(told, measured, strict=True):
            away = np.abs(np.asarray(pairs.values)[:, None] - spectrum[None]).min(1)
            assert np.all(away <= pairs.residuals + 1e-4)
            np.testing.assert_allclose(pairs.residuals, again.residuals, rtol=1e-2, atol=1e-4)
        if k == 30:
            np.testing.assert_allclose(told.top.values, [50, 45, 40], rtol=1e-4)
            np.testing.assert_allclose(told.bottom.values, [-3], rtol=1e-3)
            assert told.bottom.negative.all()
            assert not told.top.negative.any()

    def test_vectors_are_like_the_parameters(self):
        params, batch = make_params(), make_batch()
        multiply = curvature.hessian(loss, params, batch)
        start = curvature.random_like(jax.random.key(0), params)
        top = curvature.extreme_eigenpairs(multiply, start, num_matvecs=20, top=1).top
        vector = jax.tree.map(lambda x: x[0], top.vectors)
        assert jax.tree.map(jnp.shape, vector) == jax.tree.map(jnp.shape, params)
        wanted = jax.tree.map(lambda x: top.values[0] * x, vector)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-3), multiply(vector), wanted)


def diagonal(entries):
    """The product with a diagonal matrix, which is exact but for one rounding of every number."""
    return jax.tree_util.Partial(jnp.multiply, jnp.asarray(entries, jnp.float32))


def semidefinite(n, rank, seed=0):
    entries = np.zeros(n, np.float32)
    entries[:rank] = np.random.default_rng(seed).uniform(1, 5, rank)
    return entries


def normalised(row):
    row = np.asarray(row, np.float64)
    return row / np.linalg.norm(row)


@pytest.mark.usefixtures("optimised")
class TestAtAnySize:
    """Many parameters, where sums in float32 lose digits, and scales at which squares leave the range of float32."""

    @pytest.mark.parametrize("loop", LOOPS)
    @pytest.mark.parametrize("rank", [30, 200_000])
    def test_the_basis_is_orthonormal_and_the_rounding_holds(self, rank, loop):
        entries, start = semidefinite(200_000, rank), start_of(200_000)
        found = curvature.lanczos(diagonal(entries), start, num_matvecs=30, loop=loop)
        basis = np.asarray(found.basis, np.float64)
        basis = basis[np.any(basis != 0, axis=1)]
        assert np.abs(basis @ basis.T - np.eye(len(basis))).max() < 5e-6
        assert len(basis) > 20
        ends = curvature.extreme_eigenpairs(diagonal(entries), start, num_matvecs=30, loop=loop)
        for pairs in ends:
            vector = normalised(pairs.vectors[0])
            assert abs(vector**2 @ entries - pairs.values[0]) <= pairs.rounding[0] < 1e-5 * 5
            assert not pairs.negative[0]

    @pytest.mark.parametrize("explicit", [False, True])
    @pytest.mark.parametrize("loop", LOOPS)
    @pytest.mark.parametrize("rank", [5, 30, 100_000])
    def test_negative_is_claimed_where_it_is_and_nowhere_else(self, rank, loop, explicit):
        for seed in range(3):
            entries, start = semidefinite(100_000, rank, seed), start_of(100_000, seed)
            find = partial(
                curvature.extreme_eigenpairs, num_matvecs=30, explicit_residuals=explicit, loop=loop
            )
            assert not find(diagonal(entries), start).bottom.negative[0]
            entries[-1] = -1e-3 * entries.max()
            if rank < 30 or seed % 2:  # thirty-one eigenvalues are not all seen in thirty products
                start = start.at[-1].add(100.0)
                assert find(diagonal(entries), start).bottom.negative[0]

    @pytest.mark.parametrize("scale", [1e-30, 1e-17, 1e17, 1e30])
    def test_a_gauss_newton_matrix_of_any_scale(self, scale):
        params, batch = make_params(), make_batch(4)  # eight outputs of 26 parameters

        def scaled_squares(outputs, batch, scale):
            return scale * squares(outputs, batch)

        def find(scale, **options):
            multiply = curvature.gauss_newton(
                lambda params, batch, scale: mlp(params, batch),
                scaled_squares,
                params,
                batch,
                jnp.float32(scale),
            )
            start = curvature.random_like(jax.random.key(0), params)
            return curvature.extreme_eigenpairs(multiply, start, num_matvecs=12, **options)

        one = find(1.0)
        for loop in LOOPS:
            found = find(scale, loop=loop)
            np.testing.assert_allclose(found.top.values / np.float32(scale), one.top.values, rtol=1e-5)
            assert np.abs(found.bottom.values[0]) <= found.bottom.rounding[0] < 1e-5 * found.top.values[0]
            assert not found.bottom.negative[0]

    @pytest.mark.parametrize("loop", LOOPS)
    def test_a_power_of_two_changes_nothing_else(self, loop):
        entries = np.random.default_rng(0).uniform(-1, 5, 3000).astype(np.float32)
        plain, *others = (
            curvature.lanczos(diagonal(factor * entries), length * start_of(3000), num_matvecs=10, loop=loop)
            for factor, length in ((1.0, 1.0), (2.0**-90, 1.0), (2.0**90, 2.0**-80), (1.0, 2.0**80))
        )
        for factor, other in zip((2.0**-90, 2.0**90, 1.0), others, strict=True):
            np.testing.assert_array_equal(other.alphas / np.float32(factor), plain.alphas)
            np.testing.assert_array_equal(other.betas / np.float32(factor), plain.betas)
            np.testing.assert_array_equal(other.basis, plain.basis)

    @pytest.mark.parametrize("implementation", ["pmap", "shard_map"])
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
    def test_on_two_devices(self, scale, implementation):
        entries = jnp.asarray(semidefinite(50_000, 20) * np.float32(scale))

        def loss(p, weights, entries):
            return 0.5 * jnp.mean(weights) * jnp.sum(entries * p**2)

        def ends(entries, start, weights):
            multiply = curvature.hessian(loss, 0 * start, weights, entries, axis_name=parallel.AXIS)
            found = curvature.extreme_eigenpairs(multiply, start, num_matvecs=25)
            return found.top.values, found.bottom.values, found.bottom.negative

        devices = parallel.local_devices(2)
        spread = parallel.data_parallel(ends, replicated=2, devices=devices, implementation=implementation)
        for lowest, claimed in ((0.0, False), (-1e-3, True)):
            matrix = entries.at[-1].set(lowest * entries.max())
            start = start_of(50_000).at[-1].add(100.0)
            top, bottom, negative = spread(matrix, start, jnp.array([0.5, 1.5]))
            np.testing.assert_allclose(top[0], entries.max(), rtol=1e-5)
            np.testing.assert_allclose(bottom[0] / entries.max(), lowest, atol=5e-6)
            assert bool(negative[0]) == claimed

    def test_products_that_are_not_symmetric_prove_nothing(self):
        noise = jnp.asarray(np.random.default_rng(0).normal(size=(60, 60)) * 0.05, jnp.float32)
        multiply = product(np.diag(np.linspace(0, 1, 60)).astype(np.float32) + np.triu(noise, 1))
        found = curvature.extreme_eigenpairs(multiply, start_of(60), num_matvecs=60).bottom
        assert found.values[0] < -0.01
        assert not found.negative[0]

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_densities_and_traces_of_any_scale(self, scale):
        matrix = rotated(np.linspace(-1, 3, 30)).astype(np.float32)
        one, other = (
            curvature.spectral_density(
                product(factor * matrix), jnp.zeros(30), jax.random.key(0), num_matvecs=8, num_probes=3
            )
            for factor in np.float32([1, scale])
        )
        scale = np.float32(scale)
        for got, wanted in (
            (other.nodes / scale, one.nodes),
            (other.weights, one.weights),
            (other.mean * scale, one.mean),
            (other.spread * scale, one.spread),
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)
        one, other = (
            curvature.hutch_plus_plus(product(f * matrix), jnp.zeros(30), jax.random.key(0), num_matvecs=9)
            for f in np.float32([1, scale])
        )
        np.testing.assert_allclose(np.array(other) / scale, np.array(one), rtol=1e-3)


class TestDensity:
    @pytest.mark.parametrize(("loop", "k"), [("compiled", 2), ("host", 5)])
    def test_moments_are_those_of_the_probes_for_any_number_of_steps(self, loop, k):
        matrix = rotated(np.linspace(-2, 3, 30)).astype(np.float32)
        key = jax.random.key(1)
        starts = np.stack([curvature.random_like(k, jnp.zeros(30)) for k in jax.random.split(key, 3)])
        starts /= np.linalg.norm(starts, axis=1, keepdims=True)
        found = curvature.spectral_density(
            product(matrix),
            jnp.zeros(30),
            key,
            num_matvecs=k,
            num_probes=3,
            loop=loop,
        )
        products, nodes, weights = starts @ matrix, np.asarray(found.nodes), np.asarray(found.weights)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose((weights * nodes).sum(1), (starts * products).sum(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose((weights * nodes**2).sum(1), (products**2).sum(1), rtol=1e-4)

    def test_integral_mean_and_edges(self):
        spectrum = network_like()
        found = curvature.spectral_density(
            product(rotated(spectrum).astype(np.float32)),
            jnp.zeros(400),
            jax.random.key(0),
            num_matvecs=30,
            num_probes=20,
        )
        np.testing.assert_allclose(np.trapezoid(found.mean, found.grid), 1, atol=1e-3)
        mean = np.trapezoid(found.mean * found.grid, found.grid)
        np.testing.assert_allclose(mean, (found.weights * found.nodes).sum(1).mean(), rtol=1e-3)
        np.testing.assert_allclose(mean, spectrum.mean(), rtol=0.2)
        np.testing.assert_allclose(found.nodes[:, 0], -3, rtol=1e-3)
        np.testing.assert_allclose(found.nodes[:, -1], 50, rtol=1e-4)
        np.testing.assert_allclose(found.width, 53 / 30, rtol=1e-3)
        assert np.all(found.spread >= 0)
        # On a grid that ends inside the spectrum the mass outside is missing, not spread over the rest.
        part = jnp.linspace(-10.0, 2.5, 500)
        inside = curvature.smoothed(found.nodes, found.weights, part, width=0.1).mean(0)
        np.testing.assert_allclose(np.trapezoid(inside, part), 390 / 400, atol=0.01)

    def test_of_one_eigenvalue(self):
        for value in (0.0, 2.0):
            eye = product(value * np.eye(5, dtype=np.float32))
            found = curvature.spectral_density(
                eye, jnp.zeros(5), jax.random.key(0), num_matvecs=3, num_probes=1
            )
            np.testing.assert_allclose(found.nodes, value, rtol=1e-6)
            np.testing.assert_allclose(np.trapezoid(found.mean, found.grid), 1, atol=1e-3)
            assert np.isnan(found.spread).all()


class TestTraces:
    def test_the_standard_error_is_that_of_many_repeats(self):
        spectrum = np.concatenate([np.linspace(-1, 2, 28), [20.0, 30.0]])
        multiply, like = product(rotated(spectrum).astype(np.float32)), jnp.zeros(30)
        run = jax.jit(lambda key: curvature.hutch_plus_plus(multiply, like, key, num_matvecs=30))
        found = [run(jax.random.key(seed)) for seed in range(100)]
        estimates, errors = (np.array(x) for x in zip(*found, strict=True))
        assert abs(estimates.mean() - spectrum.sum()) < 4 * errors.mean() / 10
        np.testing.assert_allclose(np.sqrt((errors**2).mean()), estimates.std(), rtol=0.3)
        host = curvature.hutch_plus_plus(multiply, like, jax.random.key(0), num_matvecs=30)
        np.testing.assert_allclose(host.estimate, estimates[0], rtol=1e-4)

    def test_hutch_plus_plus_is_exact_for_low_rank_and_better_on_outliers(self):
        low_rank = product(rotated([5, -4, 3] + [0] * 27).astype(np.float32))
        found = curvature.hutch_plus_plus(low_rank, jnp.zeros(30), jax.random.key(0), num_matvecs=12)
        np.testing.assert_allclose(found.estimate, 4, rtol=1e-4)
        assert found.standard_error < 1e-4
        multiply = product(rotated(network_like()).astype(np.float32))
        better = curvature.hutch_plus_plus(multiply, jnp.zeros(400), jax.random.key(0), num_matvecs=60)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (60, 400))  # Hutchinson's estimator
        plain = np.einsum("ki,ij,kj->k", signs, rotated(network_like()), signs).std(ddof=1) / 60**0.5
        assert better.standard_error < plain / 5


class TestPitfalls:
    def test_p1_reorthogonalisation_leaves_no_ghosts(self):
        multiply, start = product(rotated(network_like()).astype(np.float32)), start_of(400)
        found = curvature.lanczos(multiply, start, num_matvecs=120, loop="compiled")
        gram = np.asarray(found.basis, np.float64) @ np.asarray(found.basis, np.float64).T
        assert np.abs(gram - np.eye(120)).max() < 5e-6
        assert (np.abs(eigenvalues(found) - 50) < 1e-2).sum() == 1

    def test_p2_no_negative_curvature_below_the_rounding_of_the_largest(self):
        spectrum = [1e4] * 2 + [1.0] * 26 + [-1e-4] * 2
        for k in (4, 30):
            ends = curvature.extreme_eigenpairs(
                product(rotated(spectrum).astype(np.float32)), start_of(30), num_matvecs=k
            )
            assert not ends.bottom.negative[0]
            assert ends.bottom.residuals[0] > 1e-6 * 1e4 / 2

    @pytest.mark.parametrize(("activation", "agrees"), [(jax.nn.gelu, True), (jax.nn.relu, False)])
    def test_p3_derivatives_see_all_curvature_of_smooth_networks_only(self, activation, agrees):
        with jax.enable_x64(True):  # or rounding would blur the differences
            batch = make_batch(40, jnp.float64)
            params = make_params(dtype=jnp.float64)

            def of(params, batch):
                return squares(mlp(params, batch, activation), batch)

            v = curvature.random_like(jax.random.key(0), params)
            step, slope = 1e-2, jax.jit(jax.grad(of))
            ahead, behind = (slope(optax.tree.add_scale(params, s, v), batch) for s in (step, -step))
            difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
            product = curvature.hessian(of, params, batch)(v)
            off = float(optax.tree.norm(optax.tree.sub(difference, product)) / optax.tree.norm(product))
        assert (off < 1e-2) == agrees

    def test_p4_with_stored_statistics_a_batch_is_the_mean_of_its_halves(self):
        images = jax.random.normal(jax.random.key(0), (6, 3))
        params, state = {"scale": jnp.array([1.0, 2.0, 0.5])}, {"mean": jnp.ones(3), "var": 2 * jnp.ones(3)}

        def apply_fn(params, model_state, inputs, *, train, key=None):
            mean, var = (
                (inputs.mean(0), inputs.var(0)) if train else (model_state["mean"], model_state["var"])
            )
            normal = (inputs - mean[None]) / jnp.sqrt(var + 1e-3)[None]
            return jnp.tanh(normal * params["scale"][None]).sum(1), {"mean": mean, "var": var}

        def objective(outputs, batch):
            return {"squares": jnp.mean((outputs - batch["label"]) ** 2), "decay": jnp.mean(outputs)}

        def training(params, batch, state):
            return sum(objective(apply_fn(params, state, batch["image"], train=True)[0], batch).values())

        batch = {"image": images, "label": jnp.arange(6.0)}
        v = {"scale": jnp.array([1.0, -1.0, 1.0])}
        for of, same in ((curvature.evaluation_loss(apply_fn, objective), True), (training, False)):
            parts = (batch, *(jax.tree.map(lambda x, i=i: x[3 * i : 3 * i + 3], batch) for i in (0, 1)))
            whole, *halves = (curvature.hvp(of, params, v, part, state)["scale"] for part in parts)
            assert np.allclose(whole, np.mean(halves, 0), rtol=1e-4) == same


def test_a_network_of_this_library_from_end_to_end():
    network = models.Mlp(3, widths=(4,))
    apply_fn = models.apply_fn(network)
    images = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
    params = jax.jit(partial(network.init, train=False))(jax.random.key(1), images)["params"]

    def objective(outputs, batch):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
        return {"hard": jnp.mean(losses)}

    of = curvature.evaluation_loss(apply_fn, objective)
    batch = {"image": images, "label": jnp.arange(5) % 3, "step": jnp.int32(0)}
    start = curvature.random_like(jax.random.key(2), params)
    multiply = curvature.hessian(of, params, batch, {})
    ends = curvature.extreme_eigenpairs(multiply, start, num_matvecs=25)
    wanted = np.linalg.eigvalsh(dense_hessian(of, params, batch, {}))
    np.testing.assert_allclose([ends.bottom.values[0], ends.top.values[0]], wanted[[0, -1]], atol=1e-4)
    layer = curvature.hessian(  # logistic regression, hence convex
        lambda last, batch, rest: of({**rest, "Dense_1": last}, batch, {}), params["Dense_1"], batch, params
    )
    found = curvature.spectral_density(
        layer, params["Dense_1"], jax.random.key(3), num_matvecs=8, num_probes=2
    )
    assert found.nodes.min() > -1e-4
    assert found.nodes.max() < ends.top.values[0]


EYE = product(np.eye(4, dtype=np.float32))


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: curvature.hessian(loss, {}, make_batch()), "at least one parameter"),
            (lambda: curvature.hessian(lambda p: 0.0, {"n": jnp.arange(3)}), "n is int32"),
            (lambda: curvature.hessian(loss, make_params(), make_batch())(jnp.ones(3)), "of the structure"),
            (lambda: curvature.hessian(lambda x: x @ x, jnp.ones(3))(jnp.ones(4)), "of the shapes"),
        ],
    )
    def test_of_operators(self, call, says):
        with pytest.raises(ValueError, match=says):
            call()

    @pytest.mark.parametrize("k", [0, 5])
    def test_of_a_number_of_products_beyond_the_dimension(self, k):
        for call in (
            lambda: curvature.lanczos(EYE, jnp.ones(4), num_matvecs=k),
            lambda: curvature.spectral_density(EYE, jnp.ones(4), jax.random.key(0), num_matvecs=k),
        ):
            with pytest.raises(ValueError, match="from 1 to the number of parameters, which is 4"):
                call()

    @pytest.mark.parametrize("loop", LOOPS)
    def test_of_krylov_methods(self, loop):
        run = partial(curvature.lanczos, num_matvecs=2, loop=loop)
        with pytest.raises(ValueError, match="finite positive length, got 0"):
            run(EYE, jnp.zeros(4))
        with pytest.raises(ValueError, match="int32"):
            run(EYE, jnp.arange(4))
        with pytest.raises(ValueError, match="matvec must return the structure"):
            run(lambda v: v[:3], jnp.ones(4))
        nan = product(np.full((4, 4), np.nan, np.float32))
        with pytest.raises(ValueError, match="not finite: check that"):
            run(nan, jnp.ones(4))
        nan = product(np.full((8, 8), np.nan, np.float32))
        with pytest.raises(ValueError, match="not finite"):
            curvature.hutch_plus_plus(nan, jnp.ones(8), jax.random.key(0), num_matvecs=6)

    def test_while_compiling_bad_numbers_become_nan(self):
        @jax.jit
        def bottom(matrix, start):
            multiply = jax.tree_util.Partial(jnp.matmul, matrix)
            return curvature.extreme_eigenpairs(multiply, start, num_matvecs=3).bottom.values

        assert np.isnan(bottom(jnp.full((4, 4), jnp.nan), jnp.ones(4))).all()
        assert np.isnan(bottom(jnp.eye(4), jnp.zeros(4))).all()

    def test_of_settings(self):
        like, key = jnp.ones(4), jax.random.key(0)
        with pytest.raises(ValueError, match="up to num_matvecs = 2 pairs"):
            curvature.extreme_eigenpairs(EYE, like, num_matvecs=2, bottom=3)
        with pytest.raises(ValueError, match="at least one probe"):
            curvature.spectral_density(EYE, like, key, num_matvecs=2, num_probes=0)
        with pytest.raises(ValueError, match="at least 6 products"):
            curvature.hutch_plus_plus(EYE, like, key, num_matvecs=5)


@pytest.mark.parametrize("form", ["library", "foreign", "none"])
def test_the_loop_on_a_cpu_is_chosen_by_the_convolutions_of_the_product(form):
    def convolved(x, kernel):
        if form == "library":
            return layers.conv(x, kernel)
        if form == "none":
            return jnp.einsum("nhwc,ijcf->nhwf", x, kernel)
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def loss(kernel, x):
        return jnp.mean(jnp.tanh(convolved(x, kernel)) ** 2)

    kernel, x = jnp.ones((3, 3, 2, 2)), jnp.ones((2, 4, 4, 2))
    multiply = curvature.hessian(loss, kernel, x)
    wanted = "compiled" if form == "library" else "host"
    assert vectors.choose_loop(None, multiply, kernel) == wanted
    assert vectors.choose_loop(None, lambda v: v, kernel) == "host"
    assert vectors.choose_loop("host", multiply, kernel) == "host"
