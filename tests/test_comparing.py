"""Sentences about finished arms say what the tests say."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import common
from kdjax import data, models, significance, train


def runs(**accuracies):
    return {
        name: [common.Trained(None, None, {"accuracy": a}, {}, 0.0) for a in own]  # type: ignore[arg-type]
        for name, own in accuracies.items()
    }


def test_apart_is_welchs_test_and_an_interval_of_pairs():
    a, b = [0.91, 0.93, 0.92], [0.90, 0.90, 0.905]
    found = significance.welch(a, b)
    said = common.apart("kd", "scratch", runs(kd=a, scratch=b))
    assert said.startswith(f"kd against scratch: {100 * found.difference:+.2f} points")
    assert f"p = {found.p:.2g}" in said
    paired = scipy.stats.ttest_rel(a, b).confidence_interval()
    assert f"; {100 * paired.low:+.2f} to {100 * paired.high:+.2f} seed by seed)." in said


def test_equal_needs_more_than_no_difference():
    rng = np.random.default_rng(0)
    plain, same, far, wild = (
        rng.normal(m, s, 8) for m, s in ((0.9, 0.002), (0.9, 0.002), (0.95, 0.002), (0.9, 0.1))
    )
    said = common.equal(runs(scratch=plain, same=same, far=far, wild=wild), baseline="scratch")
    assert "same (p =" in said
    assert "far" not in said
    assert "wild" not in said
    assert "no arm" in common.equal(runs(scratch=plain, far=far), baseline="scratch")


def test_the_main_effect_is_the_mean_over_pairs_with_an_interval_over_seeds():
    own = runs(a=[0.5, 0.6, 0.7], b=[0.51, 0.62, 0.73], c=[0.5, 0.5, 0.5], d=[0.52, 0.53, 0.54])
    said = common.main_effect("x", (("a", "b"), ("c", "d")), own)
    found = significance.t_interval([1.5, 2.5, 3.5])
    assert f"{found.estimate:+.2f} points" in said
    assert f"{found.low:+.2f} to {found.high:+.2f} over 3 seeds" in said
    with pytest.raises(KeyError):
        common.main_effect("x", (("a", "e"),), own)


def test_disagreements_count_seeds_that_differ_on_the_same_images():
    task = common.make_task("digits", data_dir=None, num_train=32, num_validation=64)
    network = models.build("digits_student", num_classes=10)

    def run(seed, sign=1.0):
        params, state = models.init(network, (8, 8, 1), seed=seed)
        params = {**params, "Dense_0": {k: sign * v for k, v in params["Dense_0"].items()}}
        weights = train.Weights(params, state)
        return common.Trained(network, SimpleNamespace(last=weights), {"accuracy": 0.0}, {}, 0.0)  # type: ignore[arg-type]

    def constant(seed):  # says 0 to everything
        made = run(seed, 0.0)
        made.weights.params["Dense_0"]["bias"] = np.eye(10, dtype=np.float32)[0]
        return made

    own = {"scratch": [run(0), run(1)], "same": [run(0), run(1)], "other": [constant(0), constant(1)]}
    ids = task.split["validation"]

    def correct(arm, seed):
        x = data.normalise(jnp.asarray(task.source.images[ids]), mean=task.mean, std=task.std)
        logits = models.apply_fn(network)(*own[arm][seed].weights, x, train=False)[0].logits
        return np.argmax(np.asarray(logits), -1) == task.source.labels[ids]

    wanted = sum(
        significance.mcnemar(correct("other", k), correct("scratch", k), ids_a=ids, ids_b=ids).mid_p < 0.05
        for k in range(2)
    )
    said = common.disagreements(task, own, baseline="scratch", split="validation")
    assert f"same 0, other {wanted}." in said
