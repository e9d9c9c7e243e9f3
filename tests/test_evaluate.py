"""Metrics against scikit-learn, and that neither padding nor sharding changes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn import metrics as sklearn_metrics

from kdjax import data, evaluate, parallel
from kdjax.types import Outputs

CLASSES = 5


def scores(n=203, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n).astype(np.int32)
    logits = rng.normal(size=(n, CLASSES)).astype(np.float32)
    logits[np.arange(n), label] += 1.0
    return logits, label, rng.normal(size=(n, CLASSES)).astype(np.float32)


metric_sums = jax.jit(evaluate.metric_sums)


def summary(logits, label, valid=None, teacher=None):
    valid = np.ones(len(label), np.float32) if valid is None else valid
    teacher = None if teacher is None else jnp.asarray(teacher)
    sums = metric_sums(
        jnp.asarray(logits), jnp.asarray(label), valid=jnp.asarray(valid), teacher_logits=teacher
    )
    return evaluate.summarise(sums)


def test_agrees_with_sklearn():
    logits, label, _ = scores()
    found, predicted = summary(logits, label), logits.argmax(1)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    average = {"average": "macro", "zero_division": 0}
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(label, predicted))
    assert found["loss"] == pytest.approx(sklearn_metrics.log_loss(label, probabilities), rel=1e-5)
    assert found["precision"] == pytest.approx(sklearn_metrics.precision_score(label, predicted, **average))
    assert found["recall"] == pytest.approx(sklearn_metrics.recall_score(label, predicted, **average))
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(label, predicted, **average))
    assert found["worst_class_accuracy"] == pytest.approx(
        sklearn_metrics.recall_score(label, predicted, average=None).min()
    )


def test_calibration_error_from_its_definition():
    logits, label, _ = scores()
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    confidence, correct = p.max(1), p.argmax(1) == label
    wanted = 0.0
    for low in np.arange(evaluate.NUM_BINS) / evaluate.NUM_BINS:
        inside = (confidence >= low) & (confidence < low + 1 / evaluate.NUM_BINS)
        if inside.any():
            wanted += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert summary(logits, label)["ece"] == pytest.approx(wanted, abs=1e-6)


def test_a_perfectly_confident_wrong_network_is_off_by_one():
    logits = np.full((10, CLASSES), -1e4, np.float32)
    logits[:, 1] = 1e4
    assert summary(logits, np.zeros(10, np.int32))["ece"] == pytest.approx(1.0)


def test_agreement_with_the_teacher():
    logits, label, teacher = scores()
    found = summary(logits, label, teacher=teacher)
    p = np.exp(teacher.astype(np.float64)) / np.exp(teacher.astype(np.float64)).sum(1, keepdims=True)
    q = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    assert found["agreement"] == pytest.approx((logits.argmax(1) == teacher.argmax(1)).mean())
    assert found["teacher_kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert summary(logits, label, teacher=logits)["teacher_kl"] == pytest.approx(0, abs=1e-6)


def test_masked_rows_do_not_count_even_if_they_hold_nan():
    logits, label, teacher = scores()
    valid = (np.arange(len(label)) % 3 > 0).astype(np.float32)
    broken = np.where(valid[:, None] > 0, logits, np.nan)
    kept = valid > 0
    assert summary(broken, label, valid, teacher) == pytest.approx(
        summary(logits[kept], label[kept], teacher=teacher[kept]), rel=1e-5
    )


@pytest.mark.parametrize(("batch_size", "num_devices"), [(2, 1), (50, 2), (64, 1), (300, 2)])
def test_neither_batches_nor_devices_change_the_answer(batch_size, num_devices):
    logits, label, teacher = scores()
    ids = np.flatnonzero(np.arange(len(label)) % 4)
    arrays = {"image": logits, "label": label, "teacher_logits": teacher}
    devices = parallel.local_devices(num_devices)

    def apply_fn(params, model_state, inputs, *, train, key=None):
        assert not train
        return Outputs(inputs * params, {}), model_state

    run = evaluate.make_evaluator(
        apply_fn,
        data.gather,
        parallel.replicate(arrays, devices),
        ids,
        batch_size=batch_size,
        devices=devices,
    )
    found = evaluate.summarise(run(jnp.float32(1), {}))
    assert found == pytest.approx(summary(logits[ids], label[ids], teacher=teacher[ids]), rel=1e-5)


def test_on_simulated_devices_no_call_starts_before_the_last_has_ended(monkeypatch):
    # Two calls at once would deadlock now and then: XLA aborts the process after forty seconds.
    build, waited = parallel.data_parallel, []

    def watched(*args, **options):
        compiled, last = build(*args, **options), []

        def call(*arguments):
            waited.extend(x.is_ready() for x in jax.tree.leaves(last))
            last[:] = [compiled(*arguments)]
            return last[0]

        return call

    def slow(params, model_state, inputs, *, train, key=None):
        inputs = jax.lax.fori_loop(0, 10_000, lambda _, x: jnp.tanh(x) @ params, inputs)
        return Outputs(inputs, {}), model_state

    monkeypatch.setattr(parallel, "data_parallel", watched)
    logits, label, _ = scores()
    devices = parallel.local_devices(2)
    arrays = parallel.replicate({"image": logits, "label": label}, devices)
    run = evaluate.make_evaluator(slow, data.gather, arrays, np.arange(200), batch_size=20, devices=devices)
    run(jnp.eye(CLASSES), {})
    assert waited
    assert all(waited)


def test_refuses_to_summarise_nothing():
    with pytest.raises(ValueError, match="at least one valid example"):
        summary(*scores(4)[:2], valid=np.zeros(4, np.float32))


class TestExaggeration:
    @given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 6))
    @settings(deadline=None)
    def test_is_the_slope_of_log_odds(self, seed, classes):
        rng = np.random.default_rng(seed)
        teacher, student = rng.normal(size=(2, 20, classes)).astype(np.float32)
        rows, of = np.arange(20), teacher.argmax(1)
        x, y = (special.logit(special.softmax(z, axis=1)[rows, of].astype(float)) for z in (teacher, student))
        wanted = stats.linregress(x, y).slope
        assert evaluate.exaggeration(student, teacher) == pytest.approx(wanted, rel=1e-4, abs=1e-4)

    def test_of_a_copy_is_one_and_of_twice_the_log_odds_two(self):
        teacher = np.array([[1.0, 0], [0, 3], [60, -60]], np.float32)
        assert evaluate.exaggeration(teacher + 5, teacher) == pytest.approx(1)
        assert evaluate.exaggeration(2 * teacher, teacher) == pytest.approx(2)

    def test_of_a_teacher_that_is_equally_sure_of_all_is_undefined(self):
        assert np.isnan(evaluate.exaggeration(np.eye(3), np.eye(3)))


class TestBestShift:
    @given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
    @settings(deadline=None)
    def test_no_other_shift_makes_fewer_errors(self, seed, ties):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(30, 4)).astype(np.float32)
        logits = np.round(logits) if ties else logits
        label = np.append(rng.integers(0, 4, 29), 2)

        def errors(shift):
            moved = logits.astype(np.float64)
            moved[:, 2] += shift
            return int((moved.argmax(1) != label).sum())

        best = errors(evaluate.best_shift(logits, label, 2))
        assert best <= min(errors(shift) for shift in np.linspace(-9.01, 9.03, 500))

    def test_is_the_middle_of_the_range(self):
        # The example of class 1 turns at 2, that of class 0 is lost at 5.
        logits = np.array([[2.0, 0.0], [5.0, 0.0]], np.float32)
        assert evaluate.best_shift(logits, np.array([1, 0]), 1) == 3.5

    def test_needs_an_example_of_the_class(self):
        with pytest.raises(ValueError, match="examples of class 1"):
            evaluate.best_shift(np.zeros((2, 2), np.float32), np.array([0, 0]), 1)
