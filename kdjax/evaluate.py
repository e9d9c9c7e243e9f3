"""Metrics as masked sums, so that neither padding, nor batch size, nor sharding changes an answer.

A step turns one batch into sums over its valid examples; sums add up over batches, devices and hosts; and
:func:`summarise` turns the totals into the metrics one reports.
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

NUM_BINS = 15  # of confidence, for the calibration error; 15 as in Guo et al. 2017
"""Equal-width bins of confidence between 0 and 1."""


def metric_sums(
    logits: Float[Array, "batch classes"],
    label: Int[Array, " batch"],
    *,
    valid: Float[Array, " batch"],
    teacher_logits: Float[Array, "batch classes"] | None = None,
) -> dict[str, Array]:
    """Sums over the valid examples from which every metric follows.

    Args:
      logits: scores before the softmax.
      label: true classes.
      valid: 1 where the example counts, 0 where it only fills up the batch.
      teacher_logits: for agreement with the teacher.

    Returns:
      ``count``, ``nll`` (nats), ``confusion`` (true class by predicted class), and per bin of confidence ``bin_count``,
      ``bin_confidence``, ``bin_correct``; with a teacher ``agree`` and ``teacher_kl`` (nats). All float32.
    """
    # Rows that only fill up are set to zero, not multiplied by it: they may hold NaN.
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
    """Metrics from totals of :func:`metric_sums`.

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
        metrics |= {
            "agreement": float(total["agree"]) / count,
            "teacher_kl": float(total["teacher_kl"]) / count,
        }
    return metrics


def per_class(sums: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, 0 where one is undefined: float64[classes] each.

    The recall of a class is its accuracy.
    """
    confusion = np.asarray(sums["confusion"], np.float64)
    hits, truth, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(truth, 1)
    f1 = 2 * hits / np.maximum(truth + predicted, 1)
    return precision, recall, f1


def reliability(sums: Mapping[str, Any]) -> dict[str, list[float]]:
    """The bins of a reliability diagram, whose weighted gaps between the two curves add up to ``ece``.

    Returns:
      Per bin of confidence, from the lowest: ``confidence`` and ``accuracy``, means over the bin's examples and 0 where
      there are none, and ``count``.

    References:
      Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017, section 2.
    """
    count = np.asarray(sums["bin_count"], np.float64)
    confidence, correct = (np.asarray(sums[name], np.float64) for name in ("bin_confidence", "bin_correct"))
    filled = np.maximum(count, 1)
    return {
        "confidence": (confidence / filled).tolist(),
        "accuracy": (correct / filled).tolist(),
        "count": count.tolist(),
    }


def best_shift(
    logits: Float[np.ndarray, "examples classes"], label: Int[np.ndarray, " examples"], chosen: int
) -> float:
    """What to add to one class's logit for the fewest errors: the bias of a class that training saw too rarely.

    An example's answer turns into the class where the shift exceeds the lead of its best other class: a gain if that is
    what it is, a loss if it was right before. So the number of right answers is a sum of steps at the leads, and its
    highest place is found exactly.

    Args:
      logits: of a validation split, not of the split that is reported.
      label: true classes.
      chosen: the class.

    Returns:
      The middle of the range of shifts with the fewest errors; of the lowest such range if there are several.

    Raises:
      ValueError: if no example is of the class.

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015, section
      3, correct the bias of a digit that a student never saw.
    """
    if not (label == chosen).any():
        raise ValueError(f"best_shift needs examples of class {chosen} to choose its bias by, got none.")
    classes = np.delete(np.arange(logits.shape[1]), chosen)
    others = logits[:, classes].astype(np.float64)
    lead = others.max(1) - logits[:, chosen]
    gain = np.where(label == chosen, 1, -(classes[others.argmax(1)] == label).astype(int))
    order = np.argsort(lead[gain != 0])
    lead, gain = lead[gain != 0][order], gain[gain != 0][order]
    ends = np.concatenate([[lead[0] - 1], lead, [lead[-1] + 1]])
    right = np.concatenate([[0], np.cumsum(gain)])  # between two ends, but for a constant
    right = np.where(np.diff(ends) > 0, right, -np.inf)  # examples of equal lead turn at once
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
    """Builds a function of the weights that returns the total sums over ``ids``, computed on all devices.

    Args:
      apply_fn: the network; called with ``train=False``.
      make_batch: ``(arrays, index) -> batch`` without augmentation. A batch with ``teacher_logits`` is also
        compared with the teacher.
      arrays: the resident data set; a call may be given other arrays of the same shapes, as a third argument.
      ids: the examples to evaluate.
      batch_size: examples per call over all devices; changes memory and speed, not the answer.
      devices: of this process.
      transform: of the function ``(params, model_state, arrays, index, valid) -> sums`` before it is compiled, such as
        :func:`kdjax.vmapped.over_weights`, which evaluates stacked weights at once.

    Returns:
      ``(params, model_state, arrays=arrays) -> sums``; pass them to :func:`summarise`.
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
        # Added up on the host in float64: counts stay exact beyond the 2^24 that float32 can hold.
        return jax.tree.map(
            lambda *values: np.sum([np.asarray(v, np.float64) for v in values], axis=0), *parts
        )

    return evaluate
