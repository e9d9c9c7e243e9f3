"""The step against mathematics, and the loop against being stopped."""

import os
import signal

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
        params = {"student": weights(), "companions": {"scale": jnp.float32(0.5)}}
        return train.init_state(params, {"student": {}, "companions": {"calls": jnp.int32(0)}}, tx, seed=0)

    def test_student_and_companions_take_the_gradient_of_the_sum(self):
        tx, batch = optax.sgd(0.1), batch_of(8) | {"teacher_logits": jnp.ones((8, 3))}
        step = jax.jit(train.make_train_step(linear, cross_entropy, tx, companions=self.scaled))

        def loss(params):
            outputs, _ = linear(params["student"], {}, batch["image"], train=True)
            more, _ = self.scaled(params["companions"], {"calls": 0}, (outputs, batch), train=True)
            return sum(cross_entropy(outputs, batch).values()) + more["scaled"]

        begin = self.state(tx)
        after, metrics = step(begin, batch)
        value, gradient = jax.value_and_grad(loss)(begin.params)
        want = jax.tree.map(lambda p, g: p - 0.1 * g, begin.params, gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.params, want)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        assert after.model_state["companions"]["calls"] == 1
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
    """A small run of `fit`; returns its outcome. `stop_after` sends SIGTERM after that many dispatches."""
    tx, arrays = optax.adam(rate), examples()
    run = jax.jit(
        train.make_run(train.make_train_step(linear, cross_entropy, tx), make_batch), donate_argnums=0
    )
    feed = data.resident_feed(arrays, np.arange(40), seed=3, batch_size=8, steps_per_dispatch=2)
    calls = []

    def progress(steps, record):
        calls.append((steps, dict(record)))
        if stop_after is not None and len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

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
    assert a.history == b.history
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
