"""Metrics as masked sums, so that padding, batch size and sharding do not change them.

:func:`metric_sums` turns a batch into sums over its valid examples, :func:`make_evaluator` adds these up over batches,
devices and hosts, and :func:`summarise` turns the totals into metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kdjax import losses, parallel
from kdjax.data.batches import evaluation_index
from kdjax.types import ApplyFn, Batch, ModelState, Params

NUM_BINS = 15
"""Equal-width bins of confidence between 0 and 1, for the calibration error; 15 as in Guo et al. 2017."""


def metric_sums(
    logits: Float[Array, "batch classes"],
    label: Int[Array, " batch"],
    *,
    valid: Float[Array, " batch"],
    teacher_logits: Float[Array, "batch classes"] | None = None,
) -> dict[str, Array]:
    """Sums over the valid examples of a batch, from which all metrics are computed.

    Args:
      logits: scores before the softmax.
      label: true classes.
      valid: 1 for examples, 0 for padding.
      teacher_logits: on the same examples, to measure agreement with the teacher.

    Returns:
      ``count``, ``nll`` (nats), ``confusion`` (true class by predicted class), and per bin of confidence ``bin_count``,
      ``bin_confidence``, ``bin_correct``; with a teacher ``agree`` and ``teacher_kl`` (nats). All float32.
    """
    # Padding is replaced by zero, not multiplied by it: it may hold NaN.
    logits = jnp.where(valid[:, None] > 0, logits, 0).astype(jnp.float32)
    num_classes = logits.shape[-1]
    predicted, confidence = jnp.argmax(logits, -1), jnp.max(jax.nn.softmax(logits), -1)
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    bins = jax.nn.one_hot(jnp.clip((confidence * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1), NUM_BINS)
    bins = bins * valid[:, None]
    truth = jax.nn.one_hot(label, num_classes) * valid[:, None]
    sums = {
        "count": jnp.sum(valid),
        "nll": nll @ valid,
        "confusion": truth.T @ jax.nn.one_hot(predicted, num_classes),
        "bin_count": jnp.sum(bins, 0),
        "bin_confidence": confidence @ bins,
        "bin_correct": (predicted == label).astype(jnp.float32) @ bins,
    }
    if teacher_logits is not None:
        teacher_logits = jnp.where(valid[:, None] > 0, teacher_logits, 0)
        sums["agree"] = (predicted == jnp.argmax(teacher_logits, -1)).astype(jnp.float32) @ valid
        sums["teacher_kl"] = losses.soft_target_kl(logits, teacher_logits) @ valid
    return sums


def summarise(sums: Mapping[str, Any]) -> dict[str, float]:
    """Metrics from the totals of :func:`metric_sums`.

    Returns:
      ``accuracy``, ``loss`` (mean negative log-likelihood, nats), ``precision``, ``recall`` and ``f1`` (means over the
      classes that occur; a class never predicted has precision 0), ``worst_class_accuracy``, ``ece`` (expected
      calibration error); with a teacher ``agreement`` and ``teacher_kl``.

    Raises:
      ValueError: if no example was counted.

    References:
      Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017, section 2.
    """
    total = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    count = float(total["count"])
    if count == 0:
        raise ValueError("summarise needs at least one valid example, the sums count none.")
    present = total["confusion"].sum(1) > 0
    precision, recall, f1 = (scores[present] for scores in per_class(sums))
    metrics = {
        "accuracy": float(np.trace(total["confusion"])) / count,
        "loss": float(total["nll"]) / count,
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "worst_class_accuracy": float(recall.min()),
        "ece": float(np.abs(total["bin_confidence"] - total["bin_correct"]).sum()) / count,
    }
    if "agree" in total:
        metrics["agreement"] = float(total["agree"]) / count
        metrics["teacher_kl"] = float(total["teacher_kl"]) / count
    return metrics


def per_class(sums: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall (a class's accuracy) and F1, float64[classes] each; 0 where undefined."""
    confusion = np.asarray(sums["confusion"], np.float64)
    hits, truth, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(truth, 1)
    f1 = 2 * hits / np.maximum(truth + predicted, 1)
    return precision, recall, f1


def reliability(sums: Mapping[str, Any]) -> dict[str, list[float]]:
    """The bins of a reliability diagram; ``ece`` is the mean gap between confidence and accuracy, weighted by count.

    Returns:
      Per bin, from the lowest confidence: ``confidence`` and ``accuracy``, the means over its examples (0 if it has
      none), and ``count``.
    """
    names = ("bin_confidence", "bin_correct", "bin_count")
    confidence, correct, count = (np.asarray(sums[name], np.float64) for name in names)
    filled = np.maximum(count, 1)
    bins = {"confidence": confidence / filled, "accuracy": correct / filled, "count": count}
    return {name: values.tolist() for name, values in bins.items()}


def exaggeration(
    student: Float[np.ndarray, "examples classes"], teacher: Float[np.ndarray, "examples classes"]
) -> float:
    """How much surer a student becomes where its teacher becomes surer: 1 if it copies the teacher's confidence.

    The slope of the least-squares line of the student's log-odds of the teacher's prediction over the teacher's own.
    Above 1 the student exaggerates: it is surer than its teacher where that is sure, and doubts more where it doubts.

    Args:
      student: its logits.
      teacher: the teacher's, of the same examples.

    Returns:
      The slope; NaN where the teacher is equally sure of all examples.

    References:
      Nagarajan et al., `On student-teacher deviations in distillation: does it pay to disobey?
      <https://arxiv.org/abs/2301.12923>`_, 2023, sections 3 and 4.
    """
    predicted = teacher.argmax(1)[:, None]
    x, y = (_log_odds(np.asarray(logits, np.float64), predicted) for logits in (teacher, student))
    spread = np.sum((x - x.mean()) ** 2)
    return float(np.sum((x - x.mean()) * (y - y.mean())) / spread) if spread else float("nan")


def _log_odds(logits: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Log p / (1 - p) of a class per example, without computing p, which rounds to 1."""
    others = logits.copy()
    np.put_along_axis(others, of, -np.inf, 1)
    return np.take_along_axis(logits, of, 1)[:, 0] - np.logaddexp.reduce(others, axis=1)


def best_shift(
    logits: Float[np.ndarray, "examples classes"], label: Int[np.ndarray, " examples"], target: int
) -> float:
    """The constant that minimises the errors when it is added to one class's logit, which training saw too rarely.

    The prediction of an example becomes the class as soon as the shift exceeds the lead of the best other class. So
    the number of right predictions is a step function of the shift, and its maximum is found exactly.

    Args:
      logits: of a validation split, not of the split that is reported.
      label: true classes.
      target: the class whose logit is shifted.

    Returns:
      The middle of the range of shifts with the fewest errors; of the lowest such range if there are several.

    Raises:
      ValueError: if no example is of the class.

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015, section
      3: the bias of a digit that the student never saw.
    """
    if not (label == target).any():
        raise ValueError(f"best_shift needs examples of class {target} to choose its bias by, got none.")
    classes = np.delete(np.arange(logits.shape[1]), target)
    others = logits[:, classes].astype(np.float64)
    lead = others.max(1) - logits[:, target]
    gain = np.where(label == target, 1, -(classes[others.argmax(1)] == label).astype(int))
    order = np.argsort(lead[gain != 0])
    lead, gain = lead[gain != 0][order], gain[gain != 0][order]
    ends = np.concatenate([[lead[0] - 1], lead, [lead[-1] + 1]])
    right = np.concatenate([[0], np.cumsum(gain)])  # between two ends, up to a constant
    right = np.where(np.diff(ends) > 0, right, -np.inf)  # examples of equal lead change together
    best = int(np.argmax(right))
    return float(ends[best] + ends[best + 1]) / 2


def make_evaluator(
    apply_fn: ApplyFn,
    make_batch: Callable[[Any, Array], Batch],
    arrays: Any,
    ids: np.ndarray,
    *,
    batch_size: int,
    devices: Sequence[jax.Device],
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda sums_of: sums_of,
) -> Callable[..., dict[str, Any]]:
    """Builds a function of the weights that returns the sums of :func:`metric_sums` over ``ids``.

    Args:
      apply_fn: the network; called with ``train=False``.
      make_batch: ``(arrays, index) -> batch``, without augmentation. If the batch has ``teacher_logits``, agreement
        with the teacher is measured too.
      arrays: the data set, on the devices.
      ids: the examples to evaluate.
      batch_size: examples per call over all devices; changes memory and speed, not the answer.
      devices: of this process, which share the work.
      transform: applied to ``(params, model_state, arrays, index, valid) -> sums`` before it is compiled, such as
        :func:`kdjax.vmapped.over_weights`, which evaluates stacked weights at once.

    Returns:
      ``(params, model_state, arrays=arrays) -> sums`` for :func:`summarise`; other arrays must have the same shapes.

    Raises:
      ValueError: if the devices do not divide ``batch_size``.
    """
    parallel.check_batch_size(batch_size, devices)
    index, valid = evaluation_index(ids, batch_size=batch_size)

    def sums_of(params, model_state, arrays, index, valid):
        batch = make_batch(arrays, index)
        outputs, _ = apply_fn(params, model_state, batch["image"], train=False, key=None)
        teacher_logits = batch.get("teacher_logits")
        sums = metric_sums(outputs.logits, batch["label"], valid=valid, teacher_logits=teacher_logits)
        return jax.lax.psum(sums, parallel.AXIS)

    compiled = parallel.data_parallel(transform(sums_of), replicated=3, devices=devices)
    rows = [(parallel.process_rows(i), parallel.process_rows(v)) for i, v in zip(index, valid, strict=True)]

    def evaluate(params: Params, model_state: ModelState, arrays: Any = arrays) -> dict[str, Any]:
        parts = [compiled(params, model_state, arrays, *row) for row in rows]
        # Added up on the host in float64: float32 counts exactly only up to 2^24.
        return jax.tree.map(
            lambda *values: np.sum([np.asarray(v, np.float64) for v in values], axis=0), *parts
        )

    return evaluate
