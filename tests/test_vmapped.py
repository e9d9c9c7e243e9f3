"""Many trainings in one program against the same trainings one by one."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import data, evaluate, models, parallel, train, vmapped
from kdjax.types import Outputs

SEEDS, WEIGHTS = (3, 4, 3), (1.0, 1.0, 0.25)
NOISE = 0.3


def noisy_linear(params, model_state, inputs, *, train, key=None):
    """A linear classifier that adds noise to its inputs and counts its calls."""
    flat = inputs.reshape(len(inputs), -1)
    if train:
        flat = flat + NOISE * jax.random.normal(key, flat.shape)
        model_state = {"calls": model_state["calls"] + 1}
    return Outputs(flat @ params["kernel"] + params["bias"][None], {}), model_state


def weighted(outputs, batch):
    value = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
    return {"hard": batch["settings"]["hard_weight"] * jnp.mean(value)}


def make_batch(arrays, index, key=None):
    batch = data.gather(arrays["data"], index)
    return batch | {"settings": arrays["settings"]} if key is not None else batch


def examples(n=48):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, n).astype(np.int32)
    image = (rng.normal(size=(n, 2, 2, 1)) + label[:, None, None, None]).astype(np.float32)
    return {"image": image, "label": label}


def linear_weights(seed):
    kernel = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    return {"kernel": kernel, "bias": np.zeros(3, np.float32)}, {"calls": np.zeros((), np.float32)}


TX = optax.adam(0.05)


def begin(seeds=SEEDS):
    return vmapped.stack([train.init_state(*linear_weights(seed), TX, seed=seed) for seed in seeds])


def one_run(axis_name=None, objective=weighted):
    return train.make_run(train.make_train_step(noisy_linear, objective, TX, axis_name=axis_name), make_batch)


def the_arrays(weights=WEIGHTS):
    return {"data": examples(), "settings": {"hard_weight": jnp.asarray(weights, jnp.float32)}}


def the_feed(arrays, seeds=SEEDS):
    ids = np.arange(40)
    return vmapped.feed(
        [data.resident_feed(arrays, ids, seed=s, batch_size=10, steps_per_dispatch=2) for s in seeds]
    )


def validate(params, model_state):
    images = examples()["image"][40:].reshape(8, -1)
    scores = (
        np.einsum("ni,kic->knc", images, np.asarray(params["kernel"])) + np.asarray(params["bias"])[:, None]
    )
    return {"accuracy": (scores.argmax(2) == examples()["label"][None, 40:]).mean(1)}


@functools.cache
def compiled(mapping):
    run = one_run() if mapping == "alone" else vmapped.make_run(one_run(), mapping=mapping)
    return jax.jit(run, donate_argnums=0)


def fitting(directory=None, *, mapping="vmap", epochs=4, stop_after=None, weights=WEIGHTS, **options):
    run, calls = compiled(mapping), []

    def progress(steps, record):
        calls.append(steps)
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"evaluate": validate, "progress": progress, "directory": directory} | options
    return vmapped.fit(run, begin(), the_feed(the_arrays(weights)), epochs=epochs, **options), calls


def alone(k, *, epochs=4):
    """The training ``k`` by itself, through the ordinary functions."""
    arrays = {"data": examples(), "settings": {"hard_weight": jnp.float32(WEIGHTS[k])}}
    params, model_state = linear_weights(SEEDS[k])
    return train.fit(
        compiled("alone"),
        train.init_state(params, model_state, TX, seed=SEEDS[k]),
        data.resident_feed(arrays, np.arange(40), seed=SEEDS[k], batch_size=10, steps_per_dispatch=2),
        epochs=epochs,
        evaluate=lambda params, state: {
            "accuracy": float(
                validate(*jax.tree.map(lambda x: np.asarray(x)[None], (params, state)))["accuracy"][0]
            )
        },
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, (a.last, a.best), (b.last, b.best))
    assert (a.history, a.best_epoch) == (b.history, b.best_epoch)


class TestEachIsAsAlone:
    @pytest.mark.parametrize("mapping", ["map", "vmap"])
    def test_a_whole_fit(self, mapping):
        together, _ = fitting(mapping=mapping)
        for k, fitted in enumerate(together):
            want = alone(k)
            if mapping == "map":  # bitwise, from noise to best epoch
                assert_same(fitted, want)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                (fitted.last, fitted.best, fitted.history, fitted.best_epoch),
                (want.last, want.best, want.history, want.best_epoch),
            )
            assert fitted.last.model_state["calls"] == 16

    @pytest.mark.parametrize("mapping", ["map", "vmap"])
    def test_a_network_with_convolutions(self, mapping):
        module, tx, shape = models.build("digits_student", num_classes=3), optax.sgd(0.1), (8, 8, 1)
        rng = np.random.default_rng(0)
        image = rng.normal(size=(12, *shape)).astype(np.float32)
        stored = {"image": image, "label": np.arange(12, dtype=np.int32) % 3}
        step = train.make_train_step(models.apply_fn(module), weighted, tx)
        run = train.make_run(step, make_batch)
        states = [train.init_state(*models.init(module, shape, seed=s), tx, seed=s) for s in SEEDS]
        index = rng.integers(0, 12, (6, 2, 3)).astype(np.int32)
        arrays = {"data": stored, "settings": {"hard_weight": jnp.asarray(WEIGHTS)}}
        after, metrics = jax.jit(vmapped.make_run(run, mapping=mapping))(vmapped.stack(states), arrays, index)
        assert metrics["loss"].shape == (2, 3)
        for k, state in enumerate(vmapped.unstack(after)):
            own = {"data": stored, "settings": {"hard_weight": jnp.float32(WEIGHTS[k])}}
            want, losses = jax.jit(run)(states[k], own, index[:, :, k])
            tolerance = {"rtol": 0, "atol": 0} if mapping == "map" else {"rtol": 1e-4, "atol": 1e-6}
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), state, want)  # noqa: B023
            np.testing.assert_allclose(metrics["loss"][:, k], losses["loss"], **tolerance)

    @pytest.mark.parametrize("mapping", ["map", "vmap"])
    def test_on_two_devices(self, mapping):
        devices = parallel.local_devices()
        assert len(devices) == 2, "the test needs two (simulated) devices"

        def still(params, model_state, inputs, *, train, key=None):  # noise would differ by device
            return noisy_linear(params, model_state, inputs, train=False)

        arrays, index = the_arrays(), the_feed(None).at(0)[1]

        def built(axis_name):
            step = train.make_train_step(still, weighted, TX, axis_name=axis_name)
            return vmapped.make_run(train.make_run(step, make_batch), mapping=mapping)

        spread = parallel.data_parallel(built(parallel.AXIS), replicated=2, devices=devices)
        halves = spread(*parallel.replicate((begin(), arrays), devices), index)
        whole = jax.jit(built(None))(begin(), arrays, index)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), halves, whole)

    def test_seeds_and_settings_reach_each_training(self):
        together, _ = fitting(epochs=1)
        kernels = [fitted.last.params["kernel"] for fitted in together]
        assert not any(np.array_equal(kernels[a], kernels[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
        # The same seed has the same first loss but for its weight, and Adam's first step does not see the weight.
        _, metrics = compiled("vmap")(begin(), *the_feed(the_arrays()).at(0))
        np.testing.assert_allclose(metrics["loss"][0, 2], 0.25 * metrics["loss"][0, 0], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"][0, 2], 0.25 * metrics["grad_norm"][0, 0], rtol=1e-5)

    def test_without_settings_only_seeds_differ(self):
        def plain(outputs, batch):
            return weighted(outputs, batch | {"settings": {"hard_weight": 1.0}})

        arrays = {"data": examples()}
        _, metrics = vmapped.make_run(one_run(objective=plain))(begin(), *the_feed(arrays).at(0))
        np.testing.assert_array_equal(metrics["loss"][:, 0], metrics["loss"][:, 2])
        assert metrics["loss"][0, 0] != metrics["loss"][0, 1]


def test_evaluating_at_once_counts_what_each_alone_counts():
    arrays, ids = the_arrays(), np.arange(29)
    options = {"batch_size": 16, "devices": parallel.local_devices()}
    apart = evaluate.make_evaluator(noisy_linear, make_batch, arrays, ids, **options)
    at_once = evaluate.make_evaluator(
        noisy_linear,
        make_batch,
        arrays,
        ids,
        transform=vmapped.over_weights,
        **options,
    )
    states = begin()
    for sums, weights in zip(
        vmapped.unstack(at_once(states.params, states.model_state)),
        vmapped.unstack(train.weights_of(states)),
        strict=True,
    ):
        want = apart(*weights)
        np.testing.assert_array_equal(sums["confusion"], want["confusion"])
        assert evaluate.summarise(sums) == pytest.approx(evaluate.summarise(want), rel=1e-5)


class TestDivergence:
    @pytest.mark.parametrize("mapping", ["map", "vmap"])
    def test_one_is_named_and_the_others_are_not_touched(self, mapping):
        healthy, _ = fitting(mapping=mapping)
        with pytest.warns(UserWarning, match=r"1 of 3 trainings diverged.*: 1 in epoch 1\."):
            found, _ = fitting(mapping=mapping, weights=(1.0, float("nan"), 0.25))
        assert [vmapped.diverged_at(fitted) for fitted in found] == [None, 1, None]
        for k in (0, 2):
            assert_same(found[k], healthy[k])

    def test_none_left_is_an_error(self):
        with pytest.raises(train.NonFiniteLoss, match=r"not finite at step 0 .*learning rate"):
            fitting(weights=(float("nan"),) * 3)

    @pytest.mark.parametrize("at", [7, 15])  # the last step of the second epoch, and of the run
    def test_weights_lost_under_a_finite_loss_have_no_score(self, tmp_path, at):
        def rooted(outputs, batch):  # a root at 0, whose value is 0 and whose gradient NaN
            lost = (batch["step"] == at) & (batch["settings"]["hard_weight"] == 2)
            size = jnp.sum(outputs.logits**2)
            return weighted(outputs, batch) | {"root": jnp.sqrt(jnp.where(lost, 0.0, 1.0) * size) * 1e-3}

        def constant(params, model_state):  # NaN logits are a class too, and may be right
            return {"accuracy": np.array([0.5, 0.9, 0.5])}

        run = jax.jit(vmapped.make_run(one_run(objective=rooted)))
        options = {"evaluate": constant, "directory": tmp_path}
        arrays = the_arrays((1.0, 2.0, 0.25))
        for epochs in (3, 4) if at == 7 else (4,):  # resumed with what is lost
            with pytest.warns(
                UserWarning, match=rf"1 of 3 trainings diverged.*: 1 in epoch {(at + 1) // 4}\."
            ):
                found = vmapped.fit(run, begin(), the_feed(arrays), epochs=epochs, **options)
            lost = found[1]
            assert [fitted.best_epoch for fitted in found] == [1, 1, 1]
            assert np.isfinite(lost.best.params["kernel"]).all()
            assert np.isnan([r["validation_accuracy"] for r in lost.history[(at + 1) // 4 - 1 :]]).all()
            assert "diverged in epoch" in lost.notes[-1]
            assert not any("diverged" in note for fitted in (found[0], found[2]) for note in fitted.notes)
            assert all(np.isfinite(r["loss"]) for r in found[0].history)

    def test_a_training_lost_before_its_first_score_is_never_best_by_it(self):
        scores = iter(np.array([[0.1, 0.2, 0.3], [0.4, 0.1, 0.2]]))
        with pytest.warns(UserWarning, match="1 of 3 trainings diverged"):
            found, _ = fitting(
                weights=(1.0, float("nan"), 0.25), evaluate=lambda p, s: {"accuracy": next(scores)}, epochs=2
            )
        assert [found[0].best_epoch, found[2].best_epoch] == [2, 1]
        assert np.isnan([r["validation_accuracy"] for r in found[1].history]).all()


class TestResuming:
    @pytest.mark.parametrize("stop_after", [1, 3, 7])
    def test_sigterm_saves_and_the_resumed_run_ends_bitwise_equal(self, tmp_path, stop_after):
        whole, _ = fitting()
        with pytest.raises(SystemExit) as stopped:
            fitting(tmp_path, stop_after=stop_after)
        assert stopped.value.code == 143
        resumed, calls = fitting(tmp_path)
        assert 0 < sum(calls) < 16, "the resumed run began again from the start"
        for a, b in zip(whole, resumed, strict=True):
            assert_same(a, b)

    def test_each_keeps_its_own_first_best(self):
        script = iter([[0.2, 0.9, 0.1], [0.7, 0.9, 0.2], [0.7, 0.3, 0.3], [0.1, 0.2, 0.4]])
        seen = []

        def scripted(params, model_state):
            seen.append(np.array(params["kernel"]))
            return {"accuracy": next(script)}

        found, _ = fitting(evaluate=scripted)
        assert [fitted.best_epoch for fitted in found] == [2, 1, 4]
        for k, fitted in enumerate(found):
            np.testing.assert_array_equal(fitted.best.params["kernel"], seen[fitted.best_epoch - 1][k])
            np.testing.assert_array_equal(fitted.last.params["kernel"], seen[3][k])

    def test_without_evaluation_the_best_is_the_last(self):
        found, _ = fitting(evaluate=None, epochs=2)
        assert [fitted.best_epoch for fitted in found] == [2, 2, 2]
        assert [record["epoch"] for record in found[1].history] == [1, 2]

    def test_other_seeds_or_their_order_are_another_run(self, tmp_path):
        fitting(tmp_path, epochs=2)
        ids, arrays = np.arange(40), the_arrays()
        feeds = [data.resident_feed(arrays, ids, seed=s, batch_size=10) for s in (4, 3, 3)]
        with pytest.raises(ValueError, match=r"batches\.seed \[3, 4, 3\] there and \[4, 3, 3\] here"):
            vmapped.fit(compiled("vmap"), begin(), vmapped.feed(feeds), epochs=4, directory=tmp_path)

    def test_each_takes_its_own_new_learning_rate(self, tmp_path):
        def states(rates):
            return vmapped.stack(
                [
                    train.init_state(*linear_weights(s), optax.inject_hyperparams(optax.sgd)(rate), seed=s)
                    for s, rate in zip(SEEDS, rates, strict=True)
                ]
            )

        tx = optax.inject_hyperparams(optax.sgd)(0.1)
        step = train.make_train_step(noisy_linear, weighted, tx)
        run = jax.jit(vmapped.make_run(train.make_run(step, make_batch)))
        options = {"feed": the_feed(the_arrays()), "directory": tmp_path}
        vmapped.fit(run, states((0.1, 0.1, 0.2)), epochs=1, **options)
        found = vmapped.fit(run, states((0.1, 0.0, 0.2)), epochs=2, **options)
        still = vmapped.fit(run, states((0.1, 0.1, 0.2)), feed=the_feed(the_arrays()), epochs=1)
        jax.tree.map(np.testing.assert_array_equal, found[1].last.params, still[1].last.params)
        assert not np.array_equal(found[0].last.params["kernel"], still[0].last.params["kernel"])
        assert "learning_rate was [0.1 0.1 0.2] up to step 4 and is [0.1 0.  0.2]" in found[0].notes[0]


class TestRefusals:
    def test_an_unknown_mapping(self):
        with pytest.raises(ValueError, match="one of vmap, map, got 'pmap'"):
            vmapped.make_run(one_run(), mapping="pmap")

    def test_settings_of_another_number(self):
        with pytest.raises(
            ValueError, match=r"'hard_weight' needs one value for each of 3 trainings.*\(2,\)"
        ):
            vmapped.make_run(one_run())(begin(), *the_feed(the_arrays((1.0, 0.5))).at(0))

    def test_the_index_of_one_training(self):
        with pytest.raises(ValueError, match=r"\[batch, steps, 3\], got shape \(8, 2\)"):
            vmapped.make_run(one_run())(begin(), the_arrays(), jnp.zeros((8, 2), jnp.int32))

    def test_epochs_of_different_lengths(self):
        feeds = [data.resident_feed(None, np.arange(n), seed=0, batch_size=8) for n in (16, 40)]
        with pytest.raises(ValueError, match=r"one length, got 2 feeds of \[2, 5\] steps"):
            vmapped.feed(feeds)
        with pytest.raises(ValueError, match="got 0 feeds"):
            vmapped.feed([])

    def test_nothing_to_stack(self):
        with pytest.raises(ValueError, match="at least one tree"):
            vmapped.stack([])
