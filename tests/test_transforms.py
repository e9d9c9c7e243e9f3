"""Every transformation through one conformance table, and each against its own mathematics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, serialization

from kdjax import transforms

TARGET = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0), "c": jnp.array([[1.0, 2.0], [3.0, -4.0]])}
NEAR = jax.tree.map(lambda x: 0.03 * x, TARGET)  # approached in eleven updates
KEY = jax.random.key(0)
TRANSFORMS = {
    "parameter_ema": lambda: after_sgd(transforms.parameter_ema(0.9)),
    "max_norm": lambda: after_sgd(transforms.max_norm(10.0)),
    "approach_region": lambda region=TARGET: after_sgd(
        transforms.approach_region(region, half_life=2, epsilon=1)
    ),
    "negative_eigenstep": lambda: after_sgd(transforms.negative_eigenstep(period=7, num_matvecs=2, key=KEY)),
    "perturb": lambda: after_sgd(transforms.perturb(period=7, radius=1e-3, key=KEY)),
    "accept_if_better": lambda: after_sgd(transforms.accept_if_better(optax.scale(2.0))),
    "perturbed_gradient_descent": lambda: transforms.perturbed_gradient_descent(0.1, key=KEY),
    "saddle_free_newton": lambda: transforms.saddle_free_newton(0.2, num_matvecs=2),
    "sprkd": lambda region=NEAR: transforms.sprkd(
        optax.sgd(0.1), period=7, num_matvecs=2, region=region, key=KEY
    ),
}


# These programs run for milliseconds; unoptimised, they compile in half the time.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def after_sgd(tx):
    return optax.chain(optax.sgd(0.1), tx)


def start(dtype):
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype), TARGET)


def loss_of(params):
    return sum(
        jnp.sum((p.astype(jnp.float32) - t) ** 2)
        for p, t in zip(*map(jax.tree.leaves, (params, TARGET)), strict=True)
    )


def descend(tx, params, state, steps):
    traces = []

    @compiled
    def step(params, state):
        traces.append(1)
        value, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=loss_of, foreign="ignored"
        )
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    assert len(traces) == 1
    return params, state


@pytest.mark.parametrize("name", TRANSFORMS)
class TestConforms:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_in_a_chain(self, name, dtype):
        tx, params = TRANSFORMS[name](), start(dtype)
        state = tx.init(params)
        specs = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state)
        final, final_state = descend(tx, params, state, 60)
        assert loss_of(final) < 1e-2
        assert all(p.dtype == dtype for p in jax.tree.leaves(final))
        assert specs == jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), final_state)
        packed = serialization.from_bytes(final_state, serialization.to_bytes(final_state))
        jax.tree.map(np.testing.assert_array_equal, packed, final_state)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_wrapped(self, name, dtype):
        # One around the other, since every program takes seconds to compile. MultiSteps is outermost: inside others it
        # is not seen to take extra arguments, and gets none.
        tx = optax.masked(TRANSFORMS[name](), {"a": True, "b": True, "c": True})
        tx = optax.MultiSteps(optax.apply_if_finite(tx, 3), 2).gradient_transformation()
        params = start(dtype)
        final, _ = descend(tx, params, tx.init(params), 120)
        assert loss_of(final) < 1e-2

    def test_in_scan_and_pmap(self, name):
        tx, params = TRANSFORMS[name](), start(jnp.float32)

        def body(carry, _):
            params, state = carry
            grads = jax.grad(loss_of)(params)
            updates, state = tx.update(
                grads, state, params, value=loss_of(params), grad=grads, value_fn=loss_of
            )
            return (optax.apply_updates(params, updates), state), None

        def run(params):
            return jax.lax.scan(body, (params, tx.init(params)), length=60)[0][0]

        final = compiled(run)(params)
        assert loss_of(final) < 1e-2
        on_each = jax.pmap(run)(jax.tree.map(lambda p: jnp.stack([p, p]), params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5), on_each, final)

    def test_trees_with_places_for_nothing(self, name):
        params = core.FrozenDict({"a": jnp.ones(2), "frozen": None, "bare": {}})
        tx = TRANSFORMS[name](**({"region": params} if name in ("approach_region", "sprkd") else {}))
        grads = jax.tree.map(lambda p: 0.1 * p, params)
        update = compiled(functools.partial(tx.update, value_fn=lambda p: jnp.sum(p["a"] ** 2)))
        updates, _ = update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)

    def test_the_empty_group_of_a_partition(self, name):
        params = start(jnp.float32)
        groups = {"ours": TRANSFORMS[name](), "theirs": optax.sgd(0.1)}
        tx = optax.partition(groups, jax.tree.map(lambda _: "theirs", params))
        grads = jax.grad(loss_of)(params)
        updates, _ = tx.update(grads, tx.init(params), params, value_fn=loss_of)
        jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * g, rtol=1e-6), updates, grads)


def test_the_state_says_where_it_keeps_trees_like_the_parameters():
    """Which is what lays an optimiser's state out over devices as its parameters are."""
    params, specs = start(jnp.float32), {"a": "A", "b": "B", "c": "C"}
    for tx, places in (
        (transforms.parameter_ema(0.9), ["ema"]),
        (transforms.approach_region(TARGET), ["region"]),
        (transforms.sprkd(optax.adam(0.1), num_matvecs=2, region=TARGET, key=0), None),
    ):
        laid_out = optax.tree.map_params(
            tx, lambda _, spec: spec, tx.init(params), specs, transform_non_params=lambda _: None
        )
        if places is None:
            found = (*laid_out.base[0][1:], laid_out.approach.region)
            assert found == (specs,) * 3
            assert len(jax.tree.leaves(laid_out)) == 9
        else:
            assert [getattr(laid_out, place) for place in places] == [specs]
            assert len(jax.tree.leaves(laid_out)) == 3


class TestKeys:
    MAKE = (
        lambda key: transforms.sprkd(optax.sgd(0.1), num_matvecs=2, key=key),
        lambda key: transforms.negative_eigenstep(period=1, num_matvecs=2, key=key),
        lambda key: transforms.perturb(period=1, radius=0.1, key=key),
        lambda key: transforms.perturbed_gradient_descent(0.1, key=key),
    )

    @pytest.mark.parametrize("make", MAKE, ids=["sprkd", "eigenstep", "perturb", "descent"])
    def test_a_seed_is_the_key_that_jax_makes_of_it(self, make):
        for seed in (7, jnp.int32(7), jax.random.PRNGKey(7), jax.random.key(7)):
            stored = make(seed).init(jnp.zeros(2)).key
            np.testing.assert_array_equal(stored, jax.random.key_data(jax.random.key(7)))

    def test_the_kernel_takes_a_seed_too(self):
        found = [
            transforms.escape(lambda p: p[0] ** 2 - p[1] ** 2, jnp.zeros(2), jnp.zeros(2), key, num_matvecs=2)
            for key in (7, jax.random.key(7))
        ]
        np.testing.assert_array_equal(found[0].updates, found[1].updates)

    @pytest.mark.parametrize("key", [jnp.float32(7), jax.random.split(KEY), jnp.arange(2)])
    def test_others_are_refused(self, key):
        with pytest.raises(ValueError, match="one key or an integer seed"):
            transforms.perturb(period=1, radius=0.1, key=key)


class TestHyperparameters:
    """Beside the suite of optax, which injects each number under jit: what cannot be one, and what is still checked."""

    @pytest.mark.parametrize(
        ("factory", "options", "sizes"),
        [
            (functools.partial(transforms.sprkd, optax.sgd(0.1)), {"key": 0}, ("num_matvecs",)),
            (transforms.negative_eigenstep, {"period": 2, "key": 0}, ("num_matvecs",)),
            (transforms.saddle_free_newton, {}, ("num_matvecs",)),
        ],
    )
    def test_sizes_are_static_and_their_defaults_are_left_alone(self, factory, options, sizes):
        tx = optax.inject_hyperparams(factory)(num_matvecs=2, **options)
        tx.init(jnp.ones(2))  # known here
        message = (
            rf"num_matvecs as an integer known at compile time.*static_args=\({', '.join(map(repr, sizes))}"
        )
        with pytest.raises(ValueError, match=message):
            jax.jit(tx.init)(jnp.ones(2))
        static = optax.inject_hyperparams(factory, static_args=sizes)(num_matvecs=2, **options)
        by_default = optax.inject_hyperparams(factory)(**options)
        for tx, params in ((static, jnp.ones(2)), (by_default, jnp.ones(3)), (by_default, jnp.ones(20))):
            updates, state = compiled(
                lambda p, tx=tx: tx.update(p, tx.init(p), p, value_fn=lambda p: jnp.sum(p**2) / 2)
            )(params)
            assert np.isfinite(updates).all()
            assert not set(sizes) & state.hyperparams.keys()

    def test_a_fraction_is_no_size(self):
        with pytest.raises(ValueError, match="num_matvecs as an integer"):
            transforms.saddle_free_newton(num_matvecs=jnp.float32(2.5))

    def test_what_is_known_is_checked_whatever_holds_it(self):
        for number in (-1, -1.0, jnp.float32(-1), jnp.bfloat16(-1)):
            for make in (
                lambda x: transforms.max_norm(x),
                lambda x: transforms.parameter_ema(x),
                lambda x: transforms.perturbed_gradient_descent(x, key=0),
                lambda x: transforms.saddle_free_newton(x),
                lambda x: transforms.perturb(period=1, radius=x, key=0),
                lambda x: transforms.approach_region(TARGET, epsilon=x),
            ):
                with pytest.raises(ValueError, match=r"got -1"):
                    make(number)
        never = jnp.int32(0)
        with pytest.raises(ValueError, match="period of 1 step or more, got 0"):
            jax.jit(lambda: transforms.perturb(period=never, radius=0.1, key=0).init(jnp.ones(2)))()

    def test_learning_rates_follow_schedules(self):
        def schedule(count):
            return 0.1 / (1 + count)

        curvatures = jnp.array([2.0, -1.0])
        params = jnp.array([1.0, 3.0])
        grads = curvatures * params
        damped = grads / (jnp.abs(curvatures) + 0.5)
        for tx, direction in (
            (transforms.perturbed_gradient_descent(schedule, key=0), grads),
            (transforms.saddle_free_newton(schedule, num_matvecs=2, damping=0.5), damped),
        ):
            state = tx.init(params)
            update = compiled(
                lambda state, tx=tx: tx.update(
                    grads, state, params, value_fn=lambda p: jnp.sum(curvatures * p**2) / 2
                )
            )
            for step in range(3):
                updates, state = update(state)
                np.testing.assert_allclose(updates, -0.1 / (1 + step) * direction, rtol=1e-4)


class TestParameterEma:
    def test_is_the_unbiased_weighted_mean(self):
        decay, steps = 0.8, 7
        tx, params = optax.chain(optax.sgd(0.1), transforms.parameter_ema(decay)), jnp.array([1.0, 2.0])
        state, seen = tx.init(params), []
        for i in range(steps):
            updates, state = tx.update(jnp.array([1.0, -float(i)]), state, params)
            params = optax.apply_updates(params, updates)
            seen.append(np.asarray(params, np.float64))
        share = decay ** np.arange(steps - 1, -1, -1)
        wanted = (share[:, None] * np.array(seen)).sum(0) / share.sum()
        np.testing.assert_allclose(optax.tree.get(state, "ema"), wanted, rtol=1e-5)

    def test_passes_updates_through(self):
        tx = transforms.parameter_ema(0.9)
        updates, _ = tx.update(jnp.array([1.0, -2.0]), tx.init(jnp.zeros(2)), jnp.zeros(2))
        np.testing.assert_array_equal(updates, [1.0, -2.0])

    @pytest.mark.parametrize("decay", [-0.1, 1.0])
    def test_refuses_a_decay_outside_its_range(self, decay):
        with pytest.raises(ValueError, match=r"decay in \[0, 1\)"):
            transforms.parameter_ema(decay)

    def test_says_that_it_needs_parameters(self):
        tx = transforms.parameter_ema(0.9)
        with pytest.raises(ValueError, match="update\\(updates, state, params\\)"):
            tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))


class TestMaxNorm:
    def test_is_the_projection_of_each_unit(self):
        rng = np.random.default_rng(0)
        for shape in [(5, 7), (3, 3, 2, 7)]:
            params = jnp.asarray(rng.normal(size=shape), jnp.float32)
            updates = jnp.asarray(rng.normal(size=shape), jnp.float32)
            tx = transforms.max_norm(2.5)
            limited, _ = tx.update(updates, tx.init(params), params)
            wanted = jax.vmap(lambda w: optax.projections.projection_l2_ball(w, 2.5), -1, -1)(
                params + updates
            )
            np.testing.assert_allclose(params + limited, wanted, rtol=1e-5, atol=1e-6)

    def test_leaves_units_inside_and_biases_bit_for_bit(self):
        params = {"kernel": jnp.array([[3.0, 0.1], [4.0, 0.1]]), "bias": jnp.full(2, 9.0)}
        updates = {"kernel": jnp.full((2, 2), 1 / 3), "bias": jnp.full(2, 1 / 3)}
        tx = transforms.max_norm(1.0)
        limited, _ = tx.update(updates, tx.init(params), params)
        np.testing.assert_array_equal(limited["kernel"][:, 1], updates["kernel"][:, 1])
        np.testing.assert_array_equal(limited["bias"], updates["bias"])
        new = params["kernel"] + limited["kernel"]
        np.testing.assert_allclose(jnp.linalg.norm(new[:, 0]), 1.0, rtol=1e-6)

    def test_zero_weights_stay_finite(self):
        tx = transforms.max_norm(1.0)
        limited, _ = tx.update(jnp.zeros((2, 2)), tx.init(jnp.zeros((2, 2))), jnp.zeros((2, 2)))
        np.testing.assert_array_equal(limited, 0)

    @pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
    def test_refuses_a_limit_that_is_none(self, limit):
        with pytest.raises(ValueError, match="limit above 0"):
            transforms.max_norm(limit)

    def test_says_that_it_needs_parameters(self):
        tx = transforms.max_norm(1.0)
        with pytest.raises(ValueError, match="update\\(updates, state, params\\)"):
            tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))
