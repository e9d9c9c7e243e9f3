"""Saddle point recruitment: it leaves saddles that its base does not, and does nothing where there are none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from kdjax import curvature, data, train, transforms
from kdjax.types import Outputs

KEY = jax.random.key(0)

# These programs run for milliseconds; unoptimised, they compile in half the time.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def strict_saddle(p):
    return p[0] ** 2 - p[1] ** 2 + p[1] ** 4 / 4  # minima of -1


def monkey_saddle(p):
    x, y = p
    return x**3 - 3 * x * y**2 + (x**2 + y**2) ** 2 / 4  # minima of -27/4; no curvature at 0


def deep_linear(weights):
    """Half the squared distance of a product of matrices from the identity; all weights zero is a saddle."""
    product = functools.reduce(jnp.matmul, weights)
    return 0.5 * jnp.sum((product - jnp.eye(3)) ** 2)


def chained_wells(p):
    return jnp.sum(p**4 / 4 - p**2 / 2) + 0.05 * jnp.sum(jnp.diff(p) ** 2)  # minima of -5/4


def octopus(p):
    """A chain of saddles after Du et al., 2017: each variable is drawn to zero until the one before it has left."""
    share = jnp.clip((p[:-1] ** 2 - 0.25) / 0.5, 0, 1)
    free = jnp.concatenate([jnp.ones(1), share**2 * (3 - 2 * share)])
    return jnp.sum(free * (p**4 / 4 - p**2 / 2) + (1 - free) * 2 * p**2)  # minima of -d/4


def path(tx, loss, params, steps, **extra_args):
    """Losses before every update, the final parameters, and the final state."""
    return compiled(lambda params: scanned(tx, loss, params, steps, **extra_args))(params)


def scanned(tx, loss, params, steps, **extra_args):
    """As :func:`path`, for use within a compiled function."""
    tx = optax.with_extra_args_support(tx)

    def body(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss, **extra_args)
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(body, (params, tx.init(params)), length=steps)
    return losses, params, state


def one_by_one(tx, loss, params, steps):
    """Parameters after every update, and the final state.

    Gradient, update and sum are programs of their own: in one program XLA may round the same step in another way,
    according to what stands beside it.
    """
    tx = optax.with_extra_args_support(tx)
    grad, add = jax.jit(jax.grad(loss)), jax.jit(optax.apply_updates)
    update = jax.jit(lambda grads, state, params: tx.update(grads, state, params, value_fn=loss))
    state, seen = tx.init(params), []
    for _ in range(steps):
        updates, state = update(grad(params), state, params)
        params = add(params, updates)
        seen.append(np.asarray(params))
    return np.stack(seen), state


def reached(losses, target):
    """The first step whose loss is below the target; infinite if none is."""
    below = np.flatnonzero(np.asarray(losses, np.float32) < target)
    return below[0] if below.size else np.inf


def recruited(base=None, **options):
    options = {"num_matvecs": 2, "period": 10, "cooldown": 0, "key": KEY} | options
    return transforms.sprkd(optax.sgd(0.1) if base is None else base, **options)


class TestEscapes:
    def test_strict_saddle(self):
        start = jnp.array([1.0, 0.0])
        stuck, _, _ = path(optax.sgd(0.1), strict_saddle, start, 400)
        escaped, _, state = path(recruited(), strict_saddle, start, 60)
        disturbed, _, _ = path(transforms.perturbed_gradient_descent(0.1, key=KEY), strict_saddle, start, 400)
        noise = optax.add_noise(1e-4, 0.55, KEY)  # of .01, as long as the perturbation
        noisy, _, _ = path(optax.chain(noise, optax.sgd(0.1)), strict_saddle, start, 400)
        assert reached(stuck, -1e-3) == np.inf
        assert reached(escaped, -0.99) < reached(noisy, -0.99) < 400
        assert reached(escaped, -0.99) < reached(disturbed, -0.99) < 400
        assert state.events >= 1

    def test_monkey_saddle_only_after_a_perturbation(self):
        @compiled
        def run(radius):
            return scanned(
                recruited(optax.sgd(0.02), perturbation_radius=radius), monkey_saddle, jnp.zeros(2), 150
            )[0]

        assert reached(run(0.0), -1e-6) == np.inf
        assert reached(run(0.01), -6.7) < 150

    @pytest.mark.parametrize(("depth", "steps"), [(2, 100), (3, 300)])
    def test_deep_linear_network_at_its_zero_saddle(self, depth, steps):
        start = (jnp.zeros((3, 3)),) * depth
        tx = recruited(num_matvecs=8, escape_radius=1.0, perturbation_radius=0.1)
        losses, _, _ = path(tx, deep_linear, start, steps)
        assert all(
            jnp.all(g == 0) for g in jax.grad(deep_linear)(start)
        )  # where any first-order method stays
        assert reached(losses, 0.05 * losses[0]) < steps

    def test_octopus_at_an_equal_budget_of_gradients(self):
        start = jnp.full(5, 0.1)
        stuck, _, _ = path(optax.sgd(0.1), octopus, start, 2000)
        disturbed, _, _ = path(transforms.perturbed_gradient_descent(0.1, key=KEY), octopus, start, 2000)
        escaped, _, state = path(recruited(num_matvecs=5), octopus, start, 100)
        # A product and a linearisation count as 1.5 gradients, a loss as one: more than they take.
        spent = 100 + 1.5 * (state.hvps + state.num_checks) + state.evaluations
        assert reached(stuck, -0.99 * 5 / 4) == np.inf
        assert np.min(stuck) > -0.8  # at most three of five have left
        assert reached(escaped, -0.99 * 5 / 4) < 100
        assert spent < reached(disturbed, -0.99 * 5 / 4) < np.inf

    def test_chained_saddles(self):
        losses, _, _ = path(recruited(num_matvecs=5, escape_radius=1.0), chained_wells, jnp.zeros(5), 100)
        assert reached(losses, -1.2) < 100


class TestNull:
    @pytest.mark.parametrize(
        ("problem", "base"), [("least squares", optax.adam(0.05)), ("logistic", optax.sgd(0.1))]
    )
    def test_convex_losses_are_left_to_the_base(self, problem, base):
        inputs = jax.random.normal(jax.random.key(1), (20, 4))
        labels = jnp.sign(jax.random.normal(jax.random.key(2), (20,)))

        def loss(params):
            outputs = inputs @ params
            if problem == "logistic":
                return jnp.mean(jax.nn.softplus(-labels * outputs))
            return jnp.mean((outputs - labels) ** 2)

        plain, _ = one_by_one(base, loss, jnp.ones(4), 60)
        same, state = one_by_one(recruited(base, num_matvecs=4), loss, jnp.ones(4), 60)
        assert (state.events, state.num_checks, state.evaluations) == (0, 6, 0)
        assert state.lambda_min > -1e-5
        np.testing.assert_array_equal(same, plain)

    def test_a_step_that_is_not_due_is_the_base_s(self):
        start = jnp.array([1.0, 0.1])
        plain, _ = one_by_one(optax.adam(0.1), strict_saddle, start, 20)
        same, state = one_by_one(recruited(optax.adam(0.1), budget=0), strict_saddle, start, 20)
        np.testing.assert_array_equal(same, plain)
        assert state.num_checks == 0


def at_the_saddle(loss=strict_saddle, params=None, **options):
    params = jnp.zeros(2) if params is None else params
    options = {"num_matvecs": 2, "escape_radius": 1.0} | options
    return transforms.escape(loss, params, jnp.full(2, 1e-3), KEY, **options)


class TestEscapeKernel:
    def test_candidates_that_are_not_finite_are_skipped(self):
        def walled(p):
            return jnp.where(jnp.linalg.norm(p) > 0.6, jnp.nan, strict_saddle(p))

        found = at_the_saddle(walled)
        assert found.accepted
        assert 0.45 < jnp.linalg.norm(found.updates) < 0.6  # the half of the radius

    def test_without_a_finite_candidate_the_updates_come_back(self):
        def cage(p):
            return jnp.where(jnp.linalg.norm(p) > 0.1, jnp.inf, strict_saddle(p))

        found = at_the_saddle(cage, escape_radius=8.0)
        assert not found.accepted
        assert found.lambda_min < -1.9
        np.testing.assert_array_equal(found.updates, jnp.full(2, 1e-3))

    def test_a_loss_that_is_nan_everywhere_is_left_to_the_base(self):
        found = compiled(lambda p: at_the_saddle(lambda p: jnp.nan * jnp.sum(p**2), p))(jnp.zeros(2))
        assert not found.accepted
        np.testing.assert_array_equal(found.updates, jnp.full(2, 1e-3))

    def test_called_from_python_it_names_a_product_that_is_not_finite(self):
        with pytest.raises(ValueError, match="finite"):
            at_the_saddle(lambda p: jnp.nan * jnp.sum(p**2))

    def test_a_second_batch_must_agree(self):
        confirmed = at_the_saddle(certify_fn=strict_saddle)
        denied = at_the_saddle(certify_fn=lambda p: jnp.sum(p**2))
        assert confirmed.accepted
        assert not denied.accepted
        assert (denied.hvps, denied.evaluations) == (3, 0)

    def test_a_second_batch_tells_noise_from_a_saddle(self):
        data = jax.random.normal(jax.random.key(1), (128, 4)), jax.random.normal(jax.random.key(2), (128, 1))
        shapes = {"in": (4, 3), "out": (3, 1)}
        start = {n: 0.5 * jax.random.normal(jax.random.key(len(n)), shape) for n, shape in shapes.items()}

        def loss(batch, params):
            inputs, labels = batch
            return jnp.mean((jnp.tanh(inputs @ params["in"]) @ params["out"] - labels) ** 2)

        trained = path(optax.adam(0.03), functools.partial(loss, data), start, 1500)[1]

        @compiled
        def run(trained, keys):
            def probe(key):
                rows_key, key = jax.random.split(key)
                rows = jax.random.choice(rows_key, 128, (2, 16), replace=False)
                first, second = (jax.tree_util.Partial(loss, tuple(x[r] for x in data)) for r in rows)
                nothing = jax.tree.map(jnp.zeros_like, trained)
                options = {"num_matvecs": 8, "perturbation_radius": 0.0, "negative_curvature_ratio": 0.0}
                return [
                    transforms.escape(first, trained, nothing, key, certify_fn=c, **options).accepted
                    for c in (None, second)
                ]

            return jax.lax.map(probe, keys)

        careless, careful = run(trained, jax.random.split(KEY, 50))
        assert jnp.mean(careless) > 0.5
        assert jnp.mean(careful) < 0.1

    def test_another_batch_compiles_nothing(self):
        traces, counts = [], []

        def loss(batch, params):
            traces.append(1)
            return strict_saddle(params) + jnp.mean(batch @ params)

        for i in range(3):
            batch = jax.random.normal(jax.random.key(i), (4, 2))
            transforms.escape(
                jax.tree_util.Partial(loss, batch), jnp.zeros(2), jnp.zeros(2), KEY, num_matvecs=2
            )
            counts.append(len(traces))
        assert counts[0] == counts[-1]

    def test_spends_what_it_says(self, monkeypatch):
        products, losses = [], []

        class Counted(curvature.Operator):
            def __call__(self, vector):
                products.append(1)
                return curvature.Operator(self.rule, self.arrays, self.structure)(vector)

        def counted(*args, **kwargs):
            operator = curvature.operators.hessian(*args, **kwargs)
            return Counted(operator.rule, operator.arrays, operator.structure)

        def loss(p):
            jax.debug.callback(lambda: losses.append(1))
            return strict_saddle(p)

        monkeypatch.setattr(curvature, "hessian", counted)
        found = at_the_saddle(loss, certify_fn=strict_saddle)
        jax.effects_barrier()
        assert found.hvps == len(products) == 2 + 1
        assert found.evaluations == 2 * 6 + 2 == len(losses) - 1  # one to linearise the gradient

    def test_a_loop_on_the_host_finds_the_same_as_compiled_and_batched(self):
        starts = jnp.array([[0.1, 0.05], [0.0, 1.4]])  # there is negative curvature at the first only
        batched = compiled(jax.vmap(lambda params: at_the_saddle(params=params)))(starts)
        assert batched.accepted.tolist() == [True, False]
        for i, params in enumerate(starts):
            host = at_the_saddle(params=params)
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a, b[i], rtol=1e-4, atol=1e-6), host, batched
            )

    def test_never_raises_the_loss_of_relu_networks(self):
        def loss(batch, params):
            inputs, labels = batch
            outputs = jax.nn.relu(inputs @ params["in"]) @ params["out"]
            return jnp.mean((outputs - labels) ** 2)

        def trial(key):
            keys = jax.random.split(key, 5)
            shapes = {"in": (4, 6), "out": (6, 2)}
            params, updates = (
                {n: s * jax.random.normal(k, shapes[n]) for n, k in zip(shapes, pair, strict=True)}
                for s, pair in ((0.3, jax.random.split(keys[0])), (0.01, jax.random.split(keys[1])))
            )
            batch = jax.random.normal(keys[2], (16, 4)), jax.random.normal(keys[3], (16, 2))
            here = jax.tree_util.Partial(loss, batch)
            found = transforms.escape(
                here, params, updates, keys[4], num_matvecs=8, negative_curvature_ratio=0.0
            )
            same = jax.tree.map(lambda a, b: jnp.all(a == b), found.updates, updates)
            after = (here(optax.apply_updates(params, u)) for u in (found.updates, updates))
            return found.accepted, jnp.array([here(params), *after]), jnp.stack(jax.tree.leaves(same)).all()

        accepted, (before, after, base), same = compiled(
            lambda keys: (lambda a, v, s: (a, v.T, s))(*jax.lax.map(trial, keys))
        )(jax.random.split(KEY, 100))
        accepted, same = np.asarray(accepted), np.asarray(same)
        assert 20 < accepted.sum() <= 100
        assert (after < np.minimum(before, base))[accepted].all()
        assert same[~accepted].all()

    def test_devices_with_parts_of_a_batch_decide_alike(self):
        data = jax.random.normal(jax.random.key(3), (8, 2))
        params, updates = jnp.array([0.3, 0.1]), jnp.array([1e-3, 2e-3])

        def loss(batch, p):
            return jnp.mean((batch @ p) ** 2 * batch[:, 0]) + strict_saddle(p)

        def run(batch, axis_name=None):
            here = jax.tree_util.Partial(loss, batch)
            return transforms.escape(here, params, updates, KEY, num_matvecs=2, axis_name=axis_name)

        whole = compiled(run)(data)
        parts = jax.pmap(functools.partial(run, axis_name="batch"), axis_name="batch")(data.reshape(2, 4, 2))
        assert whole.accepted
        for device in range(2):
            jax.tree.map(
                lambda a, b, device=device: np.testing.assert_allclose(a[device], b, rtol=1e-4, atol=1e-6),
                parts,
                whole,
            )

        def checked(batch):  # where the check of varying axes sums gradients, the mean belongs into the loss
            def here(p):
                return jax.lax.pmean(loss(batch, p), "batch")

            return transforms.escape(here, params, updates, KEY, num_matvecs=2)

        mesh, spec = jax.sharding.Mesh(jax.devices()[:2], ("batch",)), jax.P("batch")
        sharded = jax.device_put(data, jax.sharding.NamedSharding(mesh, spec))
        named = functools.partial(run, axis_name="batch")
        shared = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=jax.P())
        for form in (shared(named, check_vma=False), shared(checked), run):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                compiled(form)(sharded),
                whole,
            )


class TestSprkd:
    def test_is_deterministic_and_depends_on_its_key(self):
        start = jnp.array([0.2, 0.0])
        run = compiled(lambda key: scanned(recruited(key=key), strict_saddle, start, 15)[1])
        runs = [run(jax.random.key(seed)) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(runs[0], runs[1])
        assert np.any(runs[0] != runs[2])

    def test_budget_and_cooldown(self):
        @compiled
        def run(budget, cooldown):
            options = {"escape_radius": 0.2, "perturbation_radius": 0.0, "budget": budget}
            tx = recruited(num_matvecs=5, period=1, cooldown=cooldown, **options)
            state = scanned(tx, chained_wells, jnp.zeros(5), 4)[2]
            return state.events, state.num_checks, state.hvps

        assert run(20, 0) == (4, 4, 4 * 5)
        assert run(2, 0) == (2, 2, 2 * 5)
        assert run(20, 2) == (2, 2, 2 * 5)  # at updates 0 and 3

    def test_certify_fn_is_its_own(self):
        denied = {"certify_fn": lambda p: jnp.sum(p**2)}
        _, _, state = path(recruited(), strict_saddle, jnp.zeros(2), 11, **denied)
        assert (state.events, state.hvps) == (0, 2 * 3)

    def test_approaches_with_its_base_at_rest(self):
        region = jnp.array([0.0, 0.01])
        tx = recruited(optax.adam(0.01), region=region)
        params = jnp.array([0.12, 0.01])
        state = tx.init(params)
        update = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=strict_saddle))
        for step in range(1, 4):  # .12 halves in ten updates; the fourth finds it below .1
            updates, state = update(jax.grad(strict_saddle)(params), state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params, [0.12 * 0.5 ** (step / 10), 0.01], rtol=1e-6)
            assert state.phase == 0
            assert optax.tree.get(state.base, "count") == 0
        _, state = update(jax.grad(strict_saddle)(params), state, params)
        assert state.phase == 1
        assert optax.tree.get(state.base, "count") == 1

    def test_hyperparameters_may_be_injected(self):
        static = ("num_matvecs", "key")
        tx = optax.inject_hyperparams(transforms.sprkd, static_args=static)(
            optax.sgd(0.1), num_matvecs=2, period=10, escape_radius=lambda step: 0.3 + 0 * step, key=KEY
        )
        losses, _, state = path(tx, strict_saddle, jnp.array([1.0, 0.0]), 60)
        assert reached(losses, -0.99) < 60
        assert "perturbation_radius" in state.hyperparams

    def test_as_the_train_step_of_the_devices_calls_it(self):
        data = jax.random.normal(jax.random.key(4), (8, 2))
        tx = recruited(axis_name="batch", period=2)

        def loss(params, batch):
            return strict_saddle(params) + 0.1 * jnp.mean(batch @ params) ** 2

        def step(params, state, batch):
            grads = jax.lax.pmean(jax.grad(loss)(params, batch), "batch")
            updates, state = tx.update(grads, state, params, grad=grads, value_fn=lambda p: loss(p, batch))
            return optax.apply_updates(params, updates), state

        params = jnp.array([0.1, 0.0])
        each = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=(None, None))
        state = tx.init(params)
        for _ in range(12):
            params, state = each(params, state, data.reshape(2, 4, 2))
        assert state.events >= 1
        assert strict_saddle(params) < -0.5

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_short_parameters_stay_so(self, dtype):
        losses, params, _ = path(recruited(), strict_saddle, jnp.array([1.0, 0.0], dtype), 60)
        assert params.dtype == dtype
        assert reached(losses, -0.97) < 60

    def test_frozen_parameters_are_closed_over(self):
        frozen, moving = {"x": jnp.array(0.5)}, {"y": jnp.array(0.0)}

        def loss(moving):
            both = {**frozen, **moving}
            return strict_saddle((both["x"], both["y"]))

        losses, final, state = path(recruited(num_matvecs=1), loss, moving, 30)
        assert state.events >= 1
        assert set(final) == {"y"}
        assert reached(losses, 0.25 - 0.99) < 30

    def test_the_base_receives_what_it_may_ask_for(self):
        received = {}

        def update(updates, state, params, **extra_args):
            received.update(extra_args)
            return updates, state

        base = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
        tx, params = recruited(base, budget=0), jnp.ones(2)
        extra_args = {"value": jnp.array(1.0), "grad": params, "value_fn": strict_saddle, "foreign": 2}
        tx.update(params, tx.init(params), params, **extra_args)
        assert received == extra_args

    def test_many_small_steps_around_it(self):
        several = optax.MultiSteps(recruited(), 2)
        tx = optax.GradientTransformationExtraArgs(several.init, several.update)
        losses, _, state = path(tx, strict_saddle, jnp.array([1.0, 0.0]), 120)
        inside = state.inner_opt_state
        assert reached(losses, -0.99) < 120
        assert (inside.count, inside.num_checks) == (60, 6)


class TestHostCadence:
    def test_the_trainer_asks_for_an_escape_between_dispatches(self):
        """A linear network of two layers at zero, where every gradient is zero."""
        rng = np.random.default_rng(0)
        arrays = {"image": jnp.asarray(rng.normal(size=(24, 4)), jnp.float32)}

        def apply_fn(params, model_state, inputs, *, train, key=None):
            return Outputs(inputs @ params["in"] @ params["out"], {}), model_state

        def objective(outputs, batch):
            return {"square": jnp.mean((outputs.logits - batch["image"]) ** 2)}

        tx = optax.sgd(0.3)
        step = train.make_train_step(apply_fn, objective, tx)
        run = jax.jit(train.make_run(step, lambda arrays, index, key: data.gather(arrays, index)))
        feed = data.resident_feed(arrays, np.arange(24), seed=0, batch_size=8, steps_per_dispatch=3)
        loss = curvature.evaluation_loss(apply_fn, objective)
        found = []

        def on_batch(batch, params):
            return loss(params, batch, {})

        on = [jax.tree_util.Partial(on_batch, {"image": half}) for half in jnp.split(arrays["image"], 2)]

        def look(state, step):
            found.append(
                transforms.escape(
                    on[0],
                    state.params,
                    optax.tree.zeros_like(state.params),
                    jax.random.fold_in(KEY, step),
                    num_matvecs=4,
                    certify_fn=on[1],
                )
            )
            return state._replace(params=optax.apply_updates(state.params, found[-1].updates))

        def final(**options):
            params = {"in": jnp.zeros((4, 3)), "out": jnp.zeros((3, 4))}
            begin = train.init_state(params, {}, tx, seed=0)
            return train.fit(run, begin, feed, epochs=40, **options).history[-1]["loss"]

        assert final() == pytest.approx(float(jnp.mean(arrays["image"] ** 2)), rel=1e-5)
        assert final(between=look) < 0.5 * final()
        assert bool(found[0].accepted)
        assert not bool(found[-1].accepted)


class TestBatchNorm:
    """A network whose loss on a batch also makes new statistics of it."""

    norm = nn.BatchNorm(use_running_average=False, momentum=0.5)

    def start(self):
        inputs = jax.random.normal(jax.random.key(1), (16, 3))
        variables = self.norm.init(KEY, inputs)
        params = {"norm": variables["params"], "out": jax.random.normal(jax.random.key(2), (3,))}
        return params, variables["batch_stats"], {"image": inputs, "label": jnp.sin(3 * inputs[:, 0])}

    def apply(self, params, model_state, inputs, *, train, key=None):
        variables = {"params": params["norm"], "batch_stats": model_state}
        if train:
            hidden, changed = self.norm.apply(variables, inputs, mutable=["batch_stats"])
            model_state = changed["batch_stats"]
        else:
            hidden = self.norm.clone(use_running_average=True).apply(variables, inputs)
        return jnp.tanh(hidden) @ params["out"], model_state

    @staticmethod
    def objective(outputs, batch):
        return {"loss": jnp.mean((outputs - batch["label"]) ** 2)}

    def test_statistics_are_those_of_the_step_whatever_was_looked_at(self):
        params, stats, batch = self.start()
        finals = []
        # So strong that nothing is: looks at every step, and takes nothing.
        for tx in (optax.sgd(0.1), recruited(num_matvecs=4, period=1, negative_curvature_ratio=1e6)):
            step = jax.jit(train.make_train_step(self.apply, self.objective, tx))
            state = train.init_state(params, stats, tx, seed=0)
            for _ in range(3):
                state, _ = step(state, batch)
            finals.append(state)
        plain, looked = finals
        assert (looked.opt_state.num_checks, looked.opt_state.events) == (3, 0)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            (plain.params, plain.model_state),
            (looked.params, looked.model_state),
        )
        assert any(
            np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (stats, looked.model_state)), strict=True)
        )

    def test_frozen_statistics_make_the_curvature_a_mean_over_examples(self):
        params, stats, batch = self.start()
        loss = curvature.evaluation_loss(self.apply, self.objective)

        def dense(batch):
            flat, unravel = ravel_pytree(params)
            hessian = jax.jit(jax.hessian(lambda x: loss(unravel(x), batch, stats)))
            return np.asarray(hessian(flat), np.float64)

        halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(8), slice(8, None))]
        mean = sum(map(dense, halves)) / 2
        nothing = jax.tree.map(jnp.zeros_like, params)
        found = compiled(
            lambda params: transforms.escape(
                lambda p: loss(p, batch, stats), params, nothing, KEY, num_matvecs=9, perturbation_radius=0.0
            )
        )(params)
        np.testing.assert_allclose(dense(batch), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.lambda_min, np.linalg.eigvalsh(mean)[0], atol=1e-4)


class TestApproachRegion:
    def test_the_published_form_is_a_share_of_the_region(self):
        region, params = {"w": jnp.array([3.0, -4.0])}, {"w": jnp.array([0.0, 7.0])}
        tx = transforms.approach_region(region, form="published", epsilon=0.1)
        state = tx.init(params)
        for step in range(1, 58):  # 5 * 2 ** (-57 / 10) is the first below epsilon
            updates, state = tx.update({"w": jnp.ones(2)}, state, params)
            params = optax.apply_updates(params, updates)
            wanted = (1 - 2 ** (-step / 10)) * np.array([3.0, -4.0])
            np.testing.assert_allclose(params["w"], wanted, rtol=1e-5, atol=1e-6)
            assert not state.arrived
        updates, state = tx.update({"w": jnp.ones(2)}, state, params)
        assert state.arrived
        assert state.distance <= 0.1
        np.testing.assert_array_equal(updates["w"], 1.0)

    def test_gives_up_after_max_steps(self):
        tx = transforms.approach_region(jnp.ones(2), epsilon=0.0, max_steps=3)
        params = jnp.zeros(2)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(jnp.full(2, 5.0), state, params)
            params = optax.apply_updates(params, updates)
        assert state.arrived
        assert state.count == 3
        np.testing.assert_array_equal(updates, 5.0)

    def test_refuses_what_is_not_like_the_parameters(self):
        with pytest.raises(ValueError, match="structure of the parameters"):
            transforms.approach_region({"w": jnp.ones(2)}).init(jnp.ones(2))
        with pytest.raises(ValueError, match=r"region\['w'\] of shape \(2,\)"):
            transforms.approach_region({"w": jnp.ones(3)}).init({"w": jnp.ones(2)})
        with pytest.raises(ValueError, match="structure of the parameters"):
            recruited(region={"w": jnp.ones(2)}).init(jnp.ones(2))


class TestParts:
    def test_the_published_chain_leaves_a_saddle(self):
        parts = optax.chain(
            transforms.negative_eigenstep(period=5, num_matvecs=2, key=KEY),
            transforms.perturb(period=5, sigma=0.01, key=jax.random.key(1)),
        )
        tx = optax.chain(optax.sgd(0.1), transforms.accept_if_better(parts))
        losses, _, state = path(tx, strict_saddle, jnp.array([1.0, 0.0]), 100)
        assert reached(losses, -0.99) < 100
        counts = state[1]
        assert counts.accepted >= 1
        assert counts.accepted + counts.rejected == 20
        assert counts.evaluations == 3 * 20

    def test_a_step_that_is_not_better_is_reverted(self):
        tx = transforms.accept_if_better(optax.scale(-1.0))
        updates = {"w": jnp.array([-0.1, 0.3])}
        kept, state = tx.update(
            updates,
            tx.init(updates),
            {"w": jnp.array([1.0, 1.0])},
            value_fn=lambda p: p["w"][0] ** 2 - p["w"][1],
        )
        np.testing.assert_array_equal(kept["w"], updates["w"])
        assert (state.accepted, state.rejected, state.evaluations) == (0, 1, 3)

    @pytest.mark.parametrize(("scale", "expected"), [(1.0, 0.1), (16.0, 1 / 32)])
    def test_eigenstep_goes_down_the_slope(self, scale, expected):
        tx = transforms.negative_eigenstep(period=1, num_matvecs=2, key=KEY)
        params = jnp.array([0.0, 0.0005])
        updates, state = tx.update(
            jnp.zeros(2), tx.init(params), params, value_fn=lambda p: scale * (p[0] ** 2 - p[1] ** 2)
        )
        np.testing.assert_allclose(updates, [0.0, expected], atol=1e-5)
        np.testing.assert_allclose(state.lambda_min, -2.0 * scale, rtol=1e-5)
        assert (state.num_checks, state.steps) == (1, 1)

    def test_eigenstep_passes_through_where_the_gradient_is_long(self):
        tx = transforms.negative_eigenstep(period=1, num_matvecs=2, key=KEY)
        params = jnp.array([0.0, 0.1])
        updates, state = tx.update(jnp.ones(2), tx.init(params), params, value_fn=strict_saddle)
        np.testing.assert_array_equal(updates, 1.0)
        assert (state.num_checks, state.steps) == (1, 0)

    def test_perturbations_have_their_size(self):
        params = jnp.full(400, 2.0)
        for options, norm, tolerance in [({"radius": 0.5}, 20.0, 1e-5), ({"sigma": 0.1}, 2.0, 0.1)]:
            tx = transforms.perturb(period=2, key=KEY, **options)
            state = tx.init(params)
            first, state = tx.update(jnp.zeros(400), state, params)
            second, state = tx.update(jnp.zeros(400), state, params)
            np.testing.assert_allclose(jnp.linalg.norm(first), norm, rtol=tolerance)
            np.testing.assert_array_equal(second, 0.0)


class TestBaselines:
    def test_jumps_only_where_the_gradient_is_short_and_after_a_wait(self):
        tx = transforms.perturbed_gradient_descent(0.5, radius=0.1, max_gradient_norm=0.2, wait=2, key=KEY)
        params, sizes = jnp.zeros(3), []
        state = tx.init(params)
        for _ in range(5):
            updates, state = tx.update(jnp.full(3, 0.01), state, params)
            sizes.append(bool(jnp.all(updates == -0.005)))
            assert jnp.linalg.norm(updates) <= 0.1
        assert sizes == [False, True, True, False, True]
        assert state.perturbations == 2
        updates, _ = tx.update(jnp.ones(3), tx.init(params), params)
        np.testing.assert_array_equal(updates, -0.5)

    def test_saddle_free_newton_is_the_absolute_hessian_s(self):
        matrix = jax.random.normal(KEY, (5, 5))
        matrix = matrix + matrix.T
        values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
        params = jnp.arange(1.0, 6.0)
        gradient = matrix @ params
        tx = transforms.saddle_free_newton(0.5, num_matvecs=5, damping=0.1)
        update = compiled(lambda g, s, p: tx.update(g, s, p, value_fn=lambda p: 0.5 * p @ matrix @ p))
        updates, state = update(gradient, tx.init(params), params)
        wanted = -0.5 * vectors @ ((vectors.T @ np.asarray(gradient)) / (np.abs(values) + 0.1))
        np.testing.assert_allclose(updates, wanted, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose([state.lambda_min, state.lambda_max], values[[0, -1]], rtol=1e-4)

    def test_saddle_free_newton_stays_where_the_gradient_is_zero(self):
        tx = transforms.saddle_free_newton(num_matvecs=2)
        updates, _ = tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)), jnp.zeros(2), value_fn=strict_saddle)
        np.testing.assert_array_equal(updates, 0.0)


NEEDS_BOTH = {
    "sprkd": lambda: recruited(),
    "negative_eigenstep": lambda: transforms.negative_eigenstep(period=1, num_matvecs=1, key=KEY),
    "accept_if_better": lambda: transforms.accept_if_better(optax.identity()),
    "saddle_free_newton": lambda: transforms.saddle_free_newton(num_matvecs=1),
}


class TestErrors:
    @pytest.mark.parametrize("name", NEEDS_BOTH)
    def test_parameters_and_loss_are_asked_for(self, name):
        tx, params = NEEDS_BOTH[name](), jnp.ones(2)
        state = tx.init(params)
        with pytest.raises(ValueError, match=f"{name} needs the current parameters"):
            tx.update(params, state, value_fn=jnp.sum)
        with pytest.raises(ValueError, match=f"{name} needs the loss as a function of the parameters"):
            tx.update(params, state, params)

    def test_a_part_of_the_parameters_is_no_argument_of_the_loss(self):
        tx, params = optax.masked(recruited(), {"a": True, "b": False}), {"a": jnp.ones(2), "b": jnp.ones(2)}
        with pytest.raises(ValueError, match="let the loss close over the frozen parameters"):
            tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p["a"] + p["b"]))

    @pytest.mark.parametrize("name", ["sprkd", "negative_eigenstep", "saddle_free_newton"])
    def test_integers_are_refused(self, name):
        with pytest.raises(ValueError, match=f"{name} needs real floating-point numbers"):
            NEEDS_BOTH[name]().init({"steps": jnp.arange(2), "w": jnp.ones(2)})

    @pytest.mark.parametrize("num_matvecs", [0, 3])
    def test_as_many_products_as_there_are_dimensions(self, num_matvecs):
        for make in (
            lambda n: recruited(num_matvecs=n),
            lambda n: transforms.negative_eigenstep(period=1, num_matvecs=n, key=KEY),
            lambda n: transforms.saddle_free_newton(num_matvecs=n),
        ):
            with pytest.raises(
                ValueError, match="num_matvecs from 1 to the number of parameters, which is 2"
            ):
                make(num_matvecs).init(jnp.ones(2))

    def test_options_outside_their_range(self):
        for make in (
            lambda: recruited(period=0),
            lambda: transforms.negative_eigenstep(period=0, key=KEY),
            lambda: transforms.perturb(period=0, radius=0.1, key=KEY),
        ):
            with pytest.raises(ValueError, match="a period of 1 step or more, got 0"):
                make()
        for option in ({"escape_radius": 0.0}, {"perturbation_radius": -1.0}, {"budget": -1}):
            with pytest.raises(ValueError, match=f"sprkd needs {next(iter(option))}"):
                recruited(**option)
        for options in ({}, {"radius": 0.1, "sigma": 0.1}):
            with pytest.raises(ValueError, match="either radius"):
                transforms.perturb(period=1, key=KEY, **options)
        for make in (
            lambda: transforms.perturb(period=1, radius=0.1, key=KEY),
            lambda: transforms.approach_region(jnp.ones(2)),
        ):
            tx = make()
            with pytest.raises(
                ValueError, match=r"needs the current parameters: call update\(updates, state, params\)"
            ):
                tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
