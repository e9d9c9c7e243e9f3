"""Cached attribution maps: integrated gradients of every training image, and attention after a teacher's stages."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdjax import attributions, checkpoints, data, losses
from kdjax.teacher import cache
from kdjax.teacher.signal import TrainedNetwork
from kdjax.types import Weights

ROWS = 512  # explained together, and stored in one file: a killed run loses no more


class Explanations(NamedTuple):
    """Maps of the training images, as rows of the whole data set; rows of other images are zero.

    Attributes:
      answers: ``map``, uint8[examples, 1, height, width, 1], and ``attention_STAGE``, float16.
      nodes: gradients that each training image took.
      residual: relative completeness residual of each.
    """

    answers: dict[str, np.ndarray]
    nodes: np.ndarray
    residual: np.ndarray


def explain(
    teacher: TrainedNetwork,
    dataset: data.Dataset,
    *,
    directory: str | os.PathLike[str],
    stages: Sequence[str] = (),
    tolerance: float = 0.05,
    **options: Any,
) -> Explanations:
    """Computes, caches and verifies the teacher's maps of the true class of every training image.

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
    # Not the nodes: an example at the very tolerance may take twice as many where numbers are rounded otherwise.
    cache.verify(
        cached._replace(arrays=maps), ask, teacher.weights, images, view_fn=with_labels, num_samples=32
    )
    found = {}
    for name, rows in maps.items():
        found[name] = np.zeros((len(dataset.images), *rows.shape[1:]), rows.dtype)
        found[name][ids] = rows
    nodes, residual = (cached.arrays[name][:, 0] for name in ("nodes", "residual"))
    return Explanations(found, nodes, residual.astype(np.float32))
