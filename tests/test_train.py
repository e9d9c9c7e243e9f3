"""The step against mathematics, and the loop against being stopped."""

import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import data, parallel, train
from kdjax.types import Outputs

CLASSES, FEATURES = 3, 4


def linear(params, model_state, inputs, *, train, key=None):
    flat = inputs.reshape(len(inputs), -1)
    return Outputs(flat @ params["kernel"] + params["bias"][None], {}), model_state


def with_statistics(params, model_state, inputs, *, train, key=None):
    outputs, _ = linear(params, model_state, inputs, train=train)
    return outputs, {"mean": jnp.mean(inputs)} if train else model_state


def cross_entropy(outputs, batch):
    value = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
    return {"hard": jnp.mean(value)}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.normal(size=(FEATURES, CLASSES)).astype(np.float32),
        "bias": np.zeros(CLASSES, np.float32),
    }


def examples(n=48, seed=1):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n).astype(np.int32)
    image = (rng.normal(size=(n, 2, 2, 1)) + label[:, None, None, None]).astype(np.float32)
    return {"image": image, "label": label}


def make_batch(arrays, index, key):
    return data.gather(arrays, index)


def batch_of(n=8):
    return {name: jnp.asarray(x[:n]) for name, x in examples().items()}


class TestStep:
    def test_is_gradient_descent_on_the_mean_loss(self):
        # Softmax regression by hand: dL/dW = X'(p - y) / n.
        tx, params, batch = optax.sgd(0.5), weights(), batch_of()
        step = jax.jit(train.make_train_step(linear, cross_entropy, tx))
        state, metrics = step(train.init_state(params, {}, tx, seed=0), batch)
        x, y = (
            np.asarray(batch["image"], np.float64).reshape(8, -1),
            np.eye(CLASSES)[np.asarray(batch["label"])],
        )
        scores = x @ params["kernel"]
        p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        np.testing.assert_allclose(
            state.params["kernel"], params["kernel"] - 0.5 * x.T @ (p - y) / 8, atol=1e-6
        )
        np.testing.assert_allclose(metrics["loss"], -np.log((p * y).sum(1)).mean(), rtol=1e-6)
        gradient = np.concatenate([(x.T @ (p - y) / 8).ravel(), (p - y).mean(0)])
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
        assert state.step == 1

    def test_loss_is_the_sum_of_the_terms(self):
        def objective(outputs, batch):
            hard = cross_entropy(outputs, batch)["hard"]
            return {"hard": 0.25 * hard, "size": jnp.mean(outputs.logits**2)}

        tx = optax.sgd(0.1)
        _, metrics = train.make_train_step(linear, objective, tx)(
            train.init_state(weights(), {}, tx, seed=0), batch_of()
        )
        np.testing.assert_allclose(metrics["loss"], metrics["hard"] + metrics["size"], rtol=1e-6)

    def test_hands_optax_its_extra_arguments(self):
        # A backtracking line search needs value, grad and value_fn; with them one step never raises the loss.
        tx = optax.chain(optax.sgd(50.0), optax.scale_by_backtracking_linesearch(20))
        step = jax.jit(train.make_train_step(linear, cross_entropy, tx))
        state, first = step(train.init_state(weights(), {}, tx, seed=0), batch_of())
        _, second = step(state, batch_of())
        assert second["loss"] < first["loss"]

    def test_a_second_batch_is_that_of_the_next_step(self):
        def look(updates, state, params=None, *, certify_fn, **extra_args):
            return optax.tree.zeros_like(updates), certify_fn(params)

        tx = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), look)
        step = train.make_train_step(
            linear, cross_entropy, tx, record=lambda before, after: {"before": before, "certified": after}
        )
        run, arrays, index = (
            train.make_run(step, make_batch, second=True),
            examples(),
            np.arange(24).reshape(8, 3),
        )
        state, metrics = jax.jit(run)(train.init_state(weights(), {}, tx, seed=0), arrays, index)

        def loss(rows):
            batch = data.gather(arrays, jnp.asarray(rows))
            return cross_entropy(linear(weights(), {}, batch["image"], train=False)[0], batch)["hard"]

        np.testing.assert_allclose(
            metrics["certified"], [loss(rows) for rows in index.T[[1, 2, 0]]], rtol=1e-5
        )
        np.testing.assert_array_equal(metrics["before"], [0, *metrics["certified"][:-1]])
        with pytest.raises(ValueError, match="two steps per dispatch"):
            run(state, arrays, index[:, :1])

    @pytest.mark.parametrize("implementation", ["pmap", "shard_map"])
    @pytest.mark.parametrize("steps", [1, 3])
    def test_shards_equal_the_full_batch(self, implementation, steps):
        devices = parallel.local_devices()
        assert len(devices) == 2, "the test needs two (simulated) devices"
        tx, arrays = optax.adam(1e-2), examples()
        index = np.arange(24, dtype=np.int32).reshape(8, 3)[:, :steps]
        step = train.make_train_step(with_statistics, cross_entropy, tx)
        begin = train.init_state(weights(), {"mean": jnp.zeros(())}, tx, seed=0)
        full, full_metrics = jax.jit(train.make_run(step, make_batch))(begin, arrays, index)
        sharded_step = train.make_train_step(with_statistics, cross_entropy, tx, axis_name=parallel.AXIS)
        run = parallel.data_parallel(
            train.make_run(sharded_step, make_batch),
            replicated=2,
            devices=devices,
            implementation=implementation,
        )
        placed = parallel.replicate((begin, arrays), devices)
        parts, part_metrics = run(*placed, index)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), full, parts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), full_metrics, part_metrics)

    def test_many_steps_in_one_dispatch_equal_one_at_a_time(self):
        tx, arrays = optax.adam(1e-2), examples()
        run = jax.jit(train.make_run(train.make_train_step(linear, cross_entropy, tx), make_batch))
        index = np.arange(40, dtype=np.int32).reshape(8, 5)
        together, metrics = run(train.init_state(weights(), {}, tx, seed=0), arrays, index)
        alone, losses = train.init_state(weights(), {}, tx, seed=0), []
        for i in range(5):
            alone, one = run(alone, arrays, index[:, i : i + 1])
            losses.append(one["loss"][0])
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
        np.testing.assert_allclose(together.params["kernel"], alone.params["kernel"], atol=1e-6)

    def test_accumulating_two_halves_equals_the_whole(self):
        whole, halves = optax.sgd(0.3), optax.MultiSteps(optax.sgd(0.3), 2).gradient_transformation()
        one, _ = train.make_train_step(linear, cross_entropy, whole)(
            train.init_state(weights(), {}, whole, seed=0), batch_of(8)
        )
        step, state = (
            train.make_train_step(linear, cross_entropy, halves),
            train.init_state(weights(), {}, halves, seed=0),
        )
        for part in (slice(0, 4), slice(4, 8)):
            state, _ = step(state, {name: x[part] for name, x in batch_of(8).items()})
        np.testing.assert_allclose(one.params["kernel"], state.params["kernel"], atol=1e-6)

    def test_dropout_differs_by_step_seed_and_device(self):
        def noisy(params, model_state, inputs, *, train, key=None):
            outputs, _ = linear(params, model_state, inputs, train=train)
            return outputs, {"draw": jax.random.normal(key)}

        tx = optax.sgd(0.0)
        step = train.make_train_step(noisy, cross_entropy, tx)
        draws = []
        for seed in (0, 1):
            state = train.init_state(weights(), {"draw": jnp.zeros(())}, tx, seed=seed)
            for _ in range(2):
                state, _ = step(state, batch_of())
                draws.append(float(state.model_state["draw"]))
        assert len(set(draws)) == 4


class TestCompanions:
    """Terms with parameters and a state of their own, trained in one step with the student."""

    @staticmethod
    def scaled(params, model_state, inputs, *, train, key=None):
        outputs, batch = inputs
        term = jnp.mean((params["scale"] * outputs.logits - batch["teacher_logits"]) ** 2)
        return {"scaled": term}, {"calls": model_state["calls"] + 1}

    def state(self, tx):
        params = {"student": weights(), "heads": {"scale": jnp.float32(0.5)}}
        return train.init_state(params, {"student": {}, "heads": {"calls": jnp.int32(0)}}, tx, seed=0)

    def test_student_and_companions_take_the_gradient_of_the_sum(self):
        tx, batch = optax.sgd(0.1), batch_of(8) | {"teacher_logits": jnp.ones((8, 3))}
        step = jax.jit(train.make_train_step(linear, cross_entropy, tx, heads=self.scaled))

        def loss(params):
            outputs, _ = linear(params["student"], {}, batch["image"], train=True)
            more, _ = self.scaled(params["heads"], {"calls": 0}, (outputs, batch), train=True)
            return sum(cross_entropy(outputs, batch).values()) + more["scaled"]

        begin = self.state(tx)
        after, metrics = step(begin, batch)
        value, gradient = jax.value_and_grad(loss)(begin.params)
        want = jax.tree.map(lambda p, g: p - 0.1 * g, begin.params, gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.params, want)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        assert after.model_state["heads"]["calls"] == 1
        assert train.student_of(after).params is after.params["student"]

    def test_a_weight_may_follow_the_step(self):
        def objective(outputs, batch):
            return {
                "hard": jnp.where(batch["step"] < 2, 1.0, 0.0) * sum(cross_entropy(outputs, batch).values())
            }

        tx = optax.sgd(0.1)
        step, state = jax.jit(train.make_train_step(linear, objective, tx)), None
        state = train.init_state(weights(), {}, tx, seed=0)
        found = []
        for _ in range(4):
            state, metrics = step(state, batch_of(8))
            found.append(float(metrics["loss"]))
        assert min(found[:2]) > 0
        assert found[2:] == [0, 0]


def fitting(tmp_path=None, *, epochs=6, stop_after=None, monitor="accuracy", rate=0.05, **options):
    """A small run of `fit`; returns its outcome. `stop_after` sends a signal after that many dispatches."""
    tx, arrays = optax.adam(rate), examples()
    run = jax.jit(
        train.make_run(train.make_train_step(linear, cross_entropy, tx), make_batch), donate_argnums=0
    )
    feed = data.resident_feed(arrays, np.arange(40), seed=3, batch_size=8, steps_per_dispatch=2)
    calls, stop_by = [], options.pop("stop_by", signal.SIGTERM)

    def progress(steps, record):
        calls.append((steps, dict(record)))
        if stop_after is not None and len(calls) == stop_after:
            os.kill(os.getpid(), stop_by)

    def validate(params, model_state):
        scores = np.asarray(
            arrays["image"][40:].reshape(8, -1) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
        )
        return {"accuracy": float((scores.argmax(1) == arrays["label"][40:]).mean())}

    fitted = train.fit(
        run,
        train.init_state(weights(), {}, tx, seed=0),
        feed,
        epochs=epochs,
        evaluate=options.pop("evaluate", validate),
        monitor=monitor,
        directory=tmp_path,
        progress=progress,
        **options,
    )
    return fitted, calls


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, (a.last, a.best), (b.last, b.best))
    assert repr(a.history) == repr(b.history)  # which finds NaN equal to NaN
    assert a.best_epoch == b.best_epoch


class TestFit:
    def test_loss_falls_and_every_epoch_is_recorded(self):
        fitted, calls = fitting()
        assert [record["epoch"] for record in fitted.history] == [1, 2, 3, 4, 5, 6]
        assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
        assert sum(steps for steps, _ in calls) == 6 * 5

    def test_records_the_mean_over_all_steps_of_the_epoch(self):
        # At rate 0 every step of an epoch has the loss of its batch; batches of 8 cover the 40 once.
        fitted, _ = fitting(epochs=1, rate=0.0)
        arrays = examples()
        per = optax.losses.softmax_cross_entropy_with_integer_labels(
            arrays["image"][:40].reshape(40, -1) @ weights()["kernel"], arrays["label"][:40]
        )
        np.testing.assert_allclose(fitted.history[0]["loss"], per.mean(), rtol=1e-6)

    def test_keeps_the_first_best_and_the_last(self):
        script = iter([0.2, 0.7, 0.5, 0.7, 0.1, 0.3])
        seen = []

        def evaluate(params, model_state):
            seen.append(np.array(params["kernel"]))
            return {"accuracy": next(script)}

        fitted, _ = fitting(evaluate=evaluate)
        assert fitted.best_epoch == 2
        np.testing.assert_array_equal(fitted.best.params["kernel"], seen[1])
        np.testing.assert_array_equal(fitted.last.params["kernel"], seen[5])

    @pytest.mark.parametrize("stop_after", [1, 3, 4, 11])
    def test_sigterm_saves_and_the_resumed_run_ends_bitwise_equal(self, tmp_path, stop_after):
        whole, _ = fitting()
        with pytest.raises(SystemExit) as stopped:
            fitting(tmp_path, stop_after=stop_after)
        assert stopped.value.code == 143
        resumed, calls = fitting(tmp_path)
        assert sum(steps for steps, _ in calls) < 30, "the resumed run began again from the start"
        assert_same(whole, resumed)

    def test_what_is_done_between_dispatches_is_part_of_the_run(self, tmp_path):
        def between(state, step):
            asked.append((step, int(state.step)))
            return state._replace(params=jax.tree.map(lambda p: p + 0.01 * (step % 10 == 0), state.params))

        asked = []
        whole, calls = fitting(between=between)
        assert asked == [(step, step) for step in np.cumsum([steps for steps, _ in calls])]
        plain, _ = fitting()
        assert np.abs(whole.last.params["bias"] - plain.last.params["bias"]).min() > 1e-3
        with pytest.raises(SystemExit):
            fitting(tmp_path, stop_after=4, between=between)
        assert_same(whole, fitting(tmp_path, between=between)[0])

    def test_a_finished_run_is_read_back(self, tmp_path):
        first, _ = fitting(tmp_path)
        again, calls = fitting(tmp_path)
        assert calls == []
        assert_same(first, again)

    def test_sigterm_handler_is_put_back(self, tmp_path):
        before = signal.getsignal(signal.SIGTERM)
        fitting(tmp_path, epochs=1)
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_loss_that_is_not_finite_is_named_and_not_saved(self, tmp_path):
        def objective(outputs, batch):
            return {"hard": jnp.mean(jnp.where(batch["index"] == 17, jnp.nan, 0.0) * outputs.logits[:, 0])}

        tx, arrays = optax.sgd(0.1), examples()
        run = jax.jit(train.make_run(train.make_train_step(linear, objective, tx), make_batch))
        feed = data.resident_feed(arrays, np.arange(40), seed=3, batch_size=8, steps_per_dispatch=2)
        order = data.epoch_index(np.arange(40), seed=3, epoch=0, batch_size=8)
        at = int(np.flatnonzero((order == 17).any(1))[0])
        with pytest.raises(train.NonFiniteLoss, match=f"not finite at step {at} .*learning rate"):
            train.fit(
                run,
                train.init_state(weights(), {}, tx, seed=0),
                feed,
                epochs=2,
                directory=tmp_path,
                save_every_s=0,
            )
        state = train.init_state(weights(), {}, tx, seed=0)
        saved = train.checkpoints.restore(tmp_path, {"state": state, "best": train.Weights(state.params, {})})
        assert saved is None or np.isfinite(saved.tree["state"].params["kernel"]).all()


def fit_with(tx, objective=cross_entropy, *, apply_fn=linear, begin=None, epochs=3, dispatch=2, **options):
    """A small run of 5 steps per epoch of any optimizer and objective."""
    arrays, params, model_state = examples(), weights(), begin or {}
    run = jax.jit(train.make_run(train.make_train_step(apply_fn, objective, tx), make_batch))
    feed = options.pop("feed", None) or data.resident_feed(
        arrays, np.arange(40), seed=3, batch_size=8, steps_per_dispatch=dispatch
    )
    seed = options.pop("seed", 0)
    state = train.init_state(params, model_state, tx, seed=seed)
    return train.fit(run, state, feed, epochs=epochs, **options)


def newest(directory, tx, model_state=None):
    """The newest checkpoint of :func:`fit_with`."""
    state = train.init_state(weights(), model_state or {}, tx, seed=0)
    return train.checkpoints.restore(directory, {"state": state, "best": train.weights_of(state)})


def nan_gradient(at):
    """Adds a term of value 0 whose gradient is NaN at one step: that of a square root at 0."""

    def objective(outputs, batch):
        on = jnp.where(batch["step"] == at, 0.0, 1.0)
        return cross_entropy(outputs, batch) | {"root": 1e-3 * jnp.sqrt(on * jnp.sum(outputs.logits**2))}

    return objective


class TestNothingBrokenIsKept:
    @pytest.mark.parametrize(("at", "dispatch"), [(0, 1), (7, 1), (7, 5), (9, 5), (14, 2)])
    def test_a_gradient_that_is_not_finite_is_named_with_its_step(self, tmp_path, at, dispatch):
        tx = optax.adam(0.05)
        for _ in range(2):  # the second start fails where the first did
            with pytest.raises(
                train.NonFiniteLoss, match=rf"grad_norm is not finite at step {at} .*root 0.*learning rate"
            ):
                fit_with(tx, nan_gradient(at), directory=tmp_path, save_every_s=0, dispatch=dispatch)
            saved = newest(tmp_path, tx)
            assert saved is None or saved.step <= at
            assert saved is None or all(np.isfinite(x).all() for x in jax.tree.leaves(saved.tree))

    def test_the_corrected_command_goes_on_from_the_last_good_step(self, tmp_path):
        tx = optax.adam(0.05)
        with pytest.raises(train.NonFiniteLoss):
            fit_with(tx, nan_gradient(7), directory=tmp_path, save_every_s=0, dispatch=1)
        assert newest(tmp_path, tx).step == 7
        mended = fit_with(tx, nan_gradient(-1), directory=tmp_path, dispatch=1)
        whole = fit_with(tx, nan_gradient(-1), dispatch=1)
        assert_same(mended, whole)

    def test_an_infinite_parameter_after_the_very_last_update(self, tmp_path):
        tx = optax.sgd(lambda count: jnp.where(count == 14, jnp.inf, 0.05))
        with pytest.raises(train.NonFiniteLoss, match=r"parameter \w+ is not finite after step 14 "):
            fit_with(tx, directory=tmp_path)
        assert newest(tmp_path, tx) is None

    def test_statistics_that_the_loss_does_not_see(self, tmp_path):
        def drifting(params, model_state, inputs, *, train, key=None):
            outputs, _ = linear(params, model_state, inputs, train=train)
            return outputs, {"norm": {"var": model_state["norm"]["var"] * 1e20}}

        begin = {"norm": {"var": np.ones(2, np.float32)}}
        with pytest.raises(train.NonFiniteLoss, match="statistic norm/var is not finite after step 4 "):
            fit_with(optax.sgd(0.1), apply_fn=drifting, begin=begin, directory=tmp_path)

    def test_moments_that_freeze_their_parameter(self):
        # Squares of 1e25 overflow: Adam divides by infinity from then on, and never moves these weights again.
        def steep(outputs, batch):
            return {"steep": 1e25 * jnp.mean(outputs.logits)}

        with pytest.raises(train.NonFiniteLoss, match=r"optimizer state 0/nu/(bias|kernel) is not finite"):
            fit_with(optax.adam(1e-3), steep)

    def test_a_gradient_that_the_optimizer_leaves_out_is_no_fault(self):
        at, arrays, params, step = 7, examples(), weights(), 0
        for epoch in range(3):
            for rows in data.epoch_index(np.arange(40), seed=3, epoch=epoch, batch_size=8):
                if step != at:
                    batch = data.gather(arrays, jnp.asarray(rows)) | {"step": step}
                    slope = jax.grad(
                        lambda p, b=batch: sum(
                            nan_gradient(at)(linear(p, {}, b["image"], train=True)[0], b).values()
                        )
                    )(params)
                    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
                step += 1
        fitted = fit_with(optax.apply_if_finite(optax.sgd(0.1), 3), nan_gradient(at))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), fitted.last.params, params)
        assert fitted.notes == ("the gradient was not finite in 1 of 15 steps; the optimizer left it out",)

    def test_infinity_by_right_is_no_fault(self):
        masked = {"mask": np.array([0.0, -np.inf], np.float32)}
        search = optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(3))
        for tx in (optax.sgd(0.1), search, optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())):
            fitted = fit_with(tx, begin=masked, epochs=1)
            assert np.isfinite(fitted.history[-1]["loss"])

    @pytest.mark.parametrize(("scale", "dtype"), [(1e25, "float32"), (1e25, "bfloat16"), (300.0, "float16")])
    def test_a_large_gradient_has_a_norm(self, scale, dtype):
        # Its squares overflow float32 (or float16), the norm does not.
        def objective(outputs, batch):
            return {"steep": jnp.sum(outputs.logits * jnp.asarray(scale, outputs.logits.dtype))}

        def bias_only(params, model_state, inputs, *, train, key=None):
            return Outputs(params["bias"][None], {}), model_state

        tx = optax.sgd(0.0)
        state = train.init_state({"bias": jnp.zeros(CLASSES, dtype)}, {}, tx, seed=0)
        _, metrics = jax.jit(train.make_train_step(bias_only, objective, tx))(state, batch_of())
        np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(CLASSES) * scale, rtol=1e-2)

    def test_low_precision_integers_and_raw_keys_are_states_too(self, tmp_path):
        def counting(params, model_state, inputs, *, train, key=None):
            wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
            return linear(wide, {}, inputs, train=train)[0], model_state | {"count": model_state["count"] + 1}

        begin = {"count": np.zeros((), np.int32), "key": np.asarray(jax.random.key_data(jax.random.key(0)))}
        tx = optax.sgd(lambda count: jnp.where(count == 4, jnp.nan, 0.1))
        low = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), weights())
        run = jax.jit(train.make_run(train.make_train_step(counting, cross_entropy, tx), make_batch))
        feed = data.resident_feed(examples(), np.arange(40), seed=3, batch_size=8, steps_per_dispatch=5)
        with pytest.raises(train.NonFiniteLoss, match=r"parameter \w+ is not finite after step 4 "):
            train.fit(run, train.init_state(low, begin, tx, seed=0), feed, epochs=1, directory=tmp_path)

    @pytest.mark.parametrize(
        ("scores", "best"),
        [
            ([np.nan, 0.2, 0.9, 0.5], 3),
            ([0.2, np.nan, 0.9, 0.5], 3),
            ([-np.inf, 0.2, 0.9, 0.5], 3),
            ([np.nan, -np.inf, np.nan, np.nan], 2),
            ([np.nan, 0.2, np.inf, np.nan], 3),
        ],
    )
    def test_any_number_is_better_than_nan(self, scores, best):
        script = iter(scores)
        fitted, _ = fitting(evaluate=lambda params, state: {"accuracy": next(script)}, epochs=4)
        assert fitted.best_epoch == best

    def test_scores_that_are_all_nan_leave_the_last_weights(self):
        with pytest.warns(UserWarning, match="accuracy was NaN in every evaluation"):
            fitted, _ = fitting(evaluate=lambda params, state: {"accuracy": np.nan}, epochs=3)
        jax.tree.map(np.testing.assert_array_equal, fitted.best, fitted.last)
        assert fitted.best_epoch == 3
        assert "every evaluation" in fitted.notes[0]

    def test_a_monitor_that_is_not_there(self):
        with pytest.raises(ValueError, match="monitor='f1', and evaluate returned only accuracy"):
            fitting(monitor="f1")


class TestResuming:
    """A run is the run that its directory holds, or is refused."""

    @pytest.mark.parametrize("save_every_s", [0.0, 1e9])
    @pytest.mark.parametrize("killed_after", [1, 4, 5, 8])
    def test_killed_without_warning_twice_it_ends_bitwise_equal(self, tmp_path, killed_after, save_every_s):
        class Killed(Exception):
            pass

        def evaluate(params, state):  # NaN at first, so that what is best is resumed too
            size = float(np.abs(np.asarray(params["kernel"])).sum())
            return {"accuracy": size if size < 6.4 else np.nan}

        def dying(steps, record):
            left.pop()
            if not left:
                raise Killed

        tx = optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.1, 15))
        options = {"evaluate": evaluate, "save_every_s": save_every_s}
        for _ in range(2):
            left = [None] * killed_after
            with pytest.raises(Killed):
                fit_with(tx, progress=dying, directory=tmp_path, **options)
        resumed = fit_with(tx, directory=tmp_path, **options)
        assert_same(resumed, fit_with(tx, **options))
        assert resumed.notes == ()

    def feed(self, **changed):
        options = {"seed": 3, "batch_size": 8, "ids": np.arange(40)} | changed
        return data.resident_feed(examples(), options.pop("ids"), **options)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            (
                {"batch_size": 20},
                "batches.batch_size 8 there and 20 here, batches.steps_per_epoch 5 there and 2",
            ),
            ({"batch_size": 4}, "batches.batch_size 8 there and 4 here"),
            ({"seed": 4}, "batches.seed 3 there and 4 here"),
            ({"ids": np.arange(47)}, "batches.examples 40 there and 47 here"),
            ({"ids": np.arange(1, 41)}, "batches.ids"),
            ({"ids": np.arange(40)[::-1]}, "batches.ids"),
        ],
    )
    def test_other_batches_are_refused(self, tmp_path, changed, said):
        fit_with(optax.sgd(0.1), directory=tmp_path, epochs=2)
        with pytest.raises(ValueError, match=said):
            fit_with(optax.sgd(0.1), feed=self.feed(**changed), directory=tmp_path, epochs=4)

    def test_another_seed_of_the_state_or_identity_is_refused(self, tmp_path):
        fit_with(optax.sgd(0.1), directory=tmp_path, epochs=2, identity={"arm": "kd"})
        with pytest.raises(ValueError, match=r"state\.seed 0 there and 1 here"):
            fit_with(optax.sgd(0.1), seed=1, directory=tmp_path, epochs=4, identity={"arm": "kd"})
        with pytest.raises(ValueError, match="arm 'kd' there and 'scratch' here"):
            fit_with(optax.sgd(0.1), directory=tmp_path, epochs=4, identity={"arm": "scratch"})

    def test_a_feed_of_ones_own_is_known_by_its_epoch(self, tmp_path):
        def feed(steps):
            return data.Feed(steps, lambda step: (examples(), np.arange(8)[:, None] + step % steps))

        fit_with(optax.sgd(0.1), feed=feed(3), directory=tmp_path, epochs=2)
        with pytest.raises(ValueError, match=r"batches\.steps_per_epoch 3 there and 2 here"):
            fit_with(optax.sgd(0.1), feed=feed(2), directory=tmp_path, epochs=6)

    def test_other_dispatches_and_more_epochs_are_the_same_run(self, tmp_path):
        fit_with(optax.adam(0.05), directory=tmp_path, epochs=2, dispatch=1)
        longer = fit_with(optax.adam(0.05), directory=tmp_path, epochs=4, dispatch=5)
        whole = fit_with(optax.adam(0.05), epochs=4, dispatch=5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), longer.last, whole.last)
        assert [record["epoch"] for record in longer.history] == [1, 2, 3, 4]
        assert len(longer.notes) == 1
        assert "up to step 10 the run was to have 2 epochs, and now has 4: a schedule" in longer.notes[0]
        assert fit_with(optax.adam(0.05), directory=tmp_path, epochs=4).notes == longer.notes

    def test_more_epochs_end_bitwise_as_if_they_had_been_asked_for(self, tmp_path):
        fitting(tmp_path, epochs=2)
        assert_same(fitting(tmp_path, epochs=6)[0], fitting(epochs=6)[0])

    def test_fewer_epochs_than_there_are(self, tmp_path):
        fitting(tmp_path, epochs=4)
        with pytest.raises(
            ValueError, match=r"at step 20 already, and epochs=3 are 15 steps: use epochs=4 or"
        ):
            fitting(tmp_path, epochs=3)

    def test_a_run_cut_short_between_evaluations_is_evaluated(self, tmp_path):
        with pytest.raises(train.Stopped):
            fitting(tmp_path, epochs=6, evaluate_every=4, stop_after=10)  # dispatches of one step
        cut, _ = fitting(tmp_path, epochs=2, evaluate_every=4)
        short, _ = fitting(epochs=2, evaluate_every=4)
        assert_same(cut, short)

    def test_another_monitor_cannot_be_compared(self, tmp_path):
        def evaluate(params, state):
            return {"accuracy": 0.5, "loss": 9.0}

        fitting(tmp_path, epochs=1, evaluate=evaluate)
        with pytest.raises(ValueError, match=r"monitor='accuracy', which cannot be compared with 'loss'"):
            fitting(tmp_path, epochs=2, evaluate=evaluate, monitor="loss")

    @pytest.mark.parametrize("kind", ["plain", "injected", "chained", "schedule"])
    def test_a_new_learning_rate_is_taken_whoever_keeps_it(self, tmp_path, kind):
        make = {
            "plain": optax.sgd,
            "injected": lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate),
            "chained": lambda rate: optax.chain(
                optax.identity(), optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
            ),
            "schedule": lambda rate: optax.inject_hyperparams(optax.sgd)(optax.constant_schedule(rate)),
        }[kind]
        x, y = examples()["image"].reshape(48, -1), np.eye(CLASSES)[examples()["label"]]
        w, b = (np.asarray(weights()[name], np.float64) for name in ("kernel", "bias"))
        for epoch, rate in enumerate([0.1, 0.1, 0.01, 0.01]):  # softmax regression in float64, by hand
            for rows in data.epoch_index(np.arange(40), seed=3, epoch=epoch, batch_size=8):
                p = np.exp(x[rows] @ w + b)
                slope = (p / p.sum(1, keepdims=True) - y[rows]) / 8
                w, b = w - rate * x[rows].T @ slope, b - rate * slope.sum(0)
        fit_with(make(0.1), directory=tmp_path, epochs=2)
        fitted = fit_with(make(0.01), directory=tmp_path, epochs=4)
        np.testing.assert_allclose(fitted.last.params["kernel"], w, rtol=1e-4, atol=1e-6)
        found = [note for note in fitted.notes if "learning_rate was 0.1 up to step 10 and is 0.01" in note]
        assert len(found) == (kind != "plain")

    def test_a_rate_that_the_run_itself_changed_is_kept(self, tmp_path):
        tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)

        def between(state, step):
            if step != 6:
                return state
            rate = {**state.opt_state.hyperparams, "learning_rate": jnp.float32(0.001)}
            return state._replace(opt_state=state.opt_state._replace(hyperparams=rate))

        whole = fit_with(tx, between=between, epochs=3)
        fit_with(tx, between=between, epochs=2, directory=tmp_path)
        resumed = fit_with(tx, between=between, epochs=3, directory=tmp_path)
        jax.tree.map(np.testing.assert_array_equal, whole.last, resumed.last)

    def test_another_machine_is_noted(self, tmp_path, monkeypatch):
        fit_with(optax.sgd(0.1), directory=tmp_path, epochs=1)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
        with pytest.warns(UserWarning, match=r"cores \d+ there and 64 here"):
            fitted = fit_with(optax.sgd(0.1), directory=tmp_path, epochs=2)
        assert any("not bitwise" in note for note in fitted.notes)
        again = fit_with(optax.sgd(0.1), directory=tmp_path, epochs=2)  # of the same machine: no warning
        assert again.notes == fitted.notes

    def test_a_run_that_made_no_update_says_so(self, tmp_path):
        tx = optax.MultiSteps(optax.sgd(0.1), 11).gradient_transformation()
        for _ in range(2):
            with pytest.warns(UserWarning, match="nothing was trained.*more gradients .* the 10 of this run"):
                fitted = fit_with(tx, epochs=2, directory=tmp_path)
            np.testing.assert_array_equal(fitted.last.params["kernel"], weights()["kernel"])
        longer = fit_with(tx, epochs=3, directory=tmp_path)  # the gradients gathered so far count
        assert not np.array_equal(longer.last.params["kernel"], weights()["kernel"])
        assert not any("nothing" in note for note in longer.notes)


class TestStopping:
    @pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
    @pytest.mark.parametrize("saved", [True, False])
    def test_a_signal_ends_the_run_with_its_code_and_a_sentence(self, tmp_path, number, name, saved):
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(SystemExit) as caught:
            fitting(tmp_path if saved else None, stop_after=2, stop_by=number)
        stopped = caught.value
        assert isinstance(stopped, train.Stopped)
        assert (stopped.code, stopped.signal, stopped.step) == (128 + number, number, 2)
        want = "saved at step 2; the same command continues" if saved else "nothing was saved"
        assert f"stopped by {name}" in stopped.message
        assert want in stopped.message
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
        if saved:
            assert_same(fitting(tmp_path)[0], fitting()[0])

    def test_a_second_ctrl_c_interrupts_at_once(self, tmp_path):
        def progress(steps, record):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            pytest.fail("the second Ctrl-C waited")

        with pytest.raises(KeyboardInterrupt):
            fit_with(optax.sgd(0.1), directory=tmp_path, progress=progress)

    def test_what_a_shell_has_told_to_ignore_stays_ignored(self):
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            fitted, _ = fitting(stop_after=2, stop_by=signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, previous)
        assert len(fitted.history) == 6

    def test_an_interactive_session_keeps_its_own_ctrl_c(self, monkeypatch):
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        with pytest.raises(KeyboardInterrupt):
            fitting(stop_after=2, stop_by=signal.SIGINT)

    def test_other_threads_leave_the_handlers_alone(self):
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        seen = []

        def progress(steps, record):
            seen.append([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)])

        thread = threading.Thread(target=lambda: fit_with(optax.sgd(0.1), epochs=1, progress=progress))
        thread.start()
        thread.join()
        assert seen == [before] * 5


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"epochs": 0}, "fit needs epochs to be a whole number of 1 or more, got 0"),
            ({"evaluate_every": 0}, "fit needs evaluate_every .* got 0"),
            ({"save_every_s": -1.0}, "save_every_s to be 0 seconds or more, got -1"),
            ({"save_every_s": float("nan")}, "save_every_s to be 0 seconds or more, got nan"),
            ({"feed": data.Feed(0, lambda step: ())}, "fit needs feed.steps_per_epoch .* got 0"),
        ],
    )
    def test_what_cannot_make_a_run_is_refused_at_once(self, tmp_path, options, said):
        with pytest.raises(ValueError, match=said):
            fit_with(optax.sgd(0.1), directory=tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("seed", [0, 20240101, 2**32 - 1])
    def test_seeds_of_32_bits_are_kept(self, seed):
        assert int(train.init_state(weights(), {}, optax.sgd(0.1), seed=seed).seed) == seed

    @pytest.mark.parametrize("seed", [-1, 2**32, 20240101123456])
    def test_other_seeds_are_refused(self, seed):
        with pytest.raises(ValueError, match=rf"whole number from 0 to 4294967295, got {seed}"):
            train.init_state(weights(), {}, optax.sgd(0.1), seed=seed)
