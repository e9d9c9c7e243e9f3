"""Cached maps of a teacher: integrated gradients of every training image, and attention after its stages."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdjax import attributions, checkpoints, data, losses
from kdjax.teacher import cache
from kdjax.teacher.signal import TeacherSignal, TrainedNetwork
from kdjax.types import Weights

ROWS = 512  # images explained at once, and per file: a killed run loses no more


class Explanations(NamedTuple):
    """Maps of the training images.

    Attributes:
      answers: ``map``, uint8[examples, 1, height, width, 1], and ``attention_STAGE``, float16; one row for each image
        of the data set, zero for images that are not for training.
      nodes: gradients that the map of each training image took.
      residual: relative completeness residual of each.
    """

    answers: dict[str, np.ndarray]
    nodes: np.ndarray
    residual: np.ndarray

    @property
    def note(self) -> str:
        """What the maps took and how exact they are, as a sentence."""
        return (
            f"Maps took {self.nodes.mean():.1f} gradients each on average ({self.nodes.min()} to {self.nodes.max()}); "
            f"their relative completeness residual is {np.median(self.residual):.3f} in the median and "
            f"{np.quantile(self.residual, 0.9):.3f} at nine tenths of {len(self.nodes)} images."
        )


def explain(
    teacher: TrainedNetwork,
    dataset: data.Dataset,
    *,
    directory: str | os.PathLike[str],
    stages: Sequence[str] = (),
    tolerance: float = 0.05,
    **options: Any,
) -> Explanations:
    """Computes, caches and verifies the teacher's maps of the true class of each training image.

    Args:
      teacher: a trained network.
      dataset: after :func:`kdjax.data.split`.
      directory: of the cache.
      stages: features of the teacher whose attention maps are cached too.
      tolerance: of the relative completeness residual; see
        :func:`kdjax.attributions.adaptive_integrated_gradients`.
      **options: of :func:`kdjax.teacher.precompute`, such as ``devices`` and ``progress``.
    """
    ids = dataset.splits["train"]
    images, labels = dataset.images[ids], dataset.labels[ids].astype(np.int32)
    own = teacher.normalisation._asdict()

    def ask(weights: Weights, batch):
        inputs = data.normalise(batch["image"], **own)
        score = attributions.class_score(lambda x: teacher.network.apply(*weights, x, train=False)[0].logits)
        found = attributions.adaptive_integrated_gradients(
            score, inputs, targets=batch["label"], tolerance=tolerance
        )
        rows = attributions.quantised(attributions.importance(found.values))
        rows |= {"nodes": found.nodes, "residual": found.relative_residual}
        if stages:
            features = teacher.network.apply(*weights, inputs, train=False)[0].features
            for stage in stages:
                maps = losses.attention_map(features[stage])
                rows[f"attention_{stage}"] = maps.reshape(*features[stage].shape[:3], 1)
        return rows

    def with_labels(images, index, view):
        del view
        return {"image": images, "label": jnp.asarray(labels)[index]}

    settings = {
        "normalisation": [list(values) for values in teacher.normalisation],
        "integrated_gradients": {"tolerance": tolerance},
        "labels": checkpoints.digest_tree(labels),
        "stages": list(stages),
    }
    options = {"settings": settings, "dtype": "float16", "batch_size": ROWS, "chunk_size": ROWS, **options}
    cached = cache.precompute(directory, ask, teacher.weights, images, view_fn=with_labels, **options)
    maps = {name: rows for name, rows in cached.arrays.items() if rows.ndim > 2}
    # Not the nodes: rounding decides whether an example whose residual is at the tolerance takes twice as many.
    cache.verify(
        cached._replace(arrays=maps), ask, teacher.weights, images, view_fn=with_labels, num_samples=32
    )
    found = {}
    for name, rows in maps.items():
        found[name] = np.zeros((len(dataset.images), *rows.shape[1:]), rows.dtype)
        found[name][ids] = rows
    nodes, residual = (cached.arrays[name][:, 0] for name in ("nodes", "residual"))
    return Explanations(found, nodes, residual.astype(np.float32))


def with_maps(signal: TeacherSignal, found: Explanations, names: Sequence[str] = ("map",)) -> TeacherSignal:
    """Adds cached maps to a signal; they are cropped and mirrored with their image.

    Args:
      signal: of :func:`kdjax.teacher.answers`, cached for unaugmented images.
      found: of :func:`explain`, by the same teacher.
      names: of the maps that the student's method reads.
    """
    added = {name: found.answers[name] for name in names}
    return signal._replace(answers={**(signal.answers or {}), **added}, maps=(*signal.maps, *names))
