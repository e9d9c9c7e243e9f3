"""Whether a network's attribution maps agree with its teacher's, and whether they show what its score rests on."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kdjax import attributions, data
from kdjax.models import Network
from kdjax.teacher import TrainedNetwork
from kdjax.types import Normalisation, Weights


def make_measure(
    dataset: data.Dataset,
    teacher: TrainedNetwork,
    *,
    split: str = "test",
    num_images: int = 64,
    tolerance: float = 0.05,
) -> Callable[[TrainedNetwork], dict[str, float]]:
    """Builds a function that compares a network's maps with a teacher's: integrated gradients of the true class.

    * ``map_correlation``: Spearman's correlation of the two maps of an image, averaged over images.
    * ``deletion``, ``insertion``: the mean probability of the true class while pixels are set to zero, or set to their
      value from an image of zeros, those of the network's largest map values first. Maps that show what the score rests
      on have a small deletion and a large insertion.

    Args:
      dataset: after :func:`kdjax.data.split`.
      teacher: whose maps the network's are compared with.
      split: whose images are used.
      num_images: the first so many of the split.
      tolerance: of the relative completeness residual; see
        :func:`kdjax.attributions.adaptive_integrated_gradients`.

    Returns:
      ``trained -> {measure: value}``.
    """
    ids = dataset.splits[split][:num_images]
    images, labels = jnp.asarray(dataset.images[ids]), jnp.asarray(dataset.labels[ids].astype(np.int32))

    def explain(trained: TrainedNetwork) -> tuple[Array, dict[str, Array]]:
        # On one device, like the images.
        weights = jax.device_put(jax.device_get(trained.weights), jax.local_devices()[0])
        return _explainer(trained.network, trained.normalisation, tolerance)(weights, images, labels)

    teacher_maps = functools.cache(lambda: explain(teacher)[0])  # not computed where all numbers are cached

    def measure(trained: TrainedNetwork) -> dict[str, float]:
        maps, areas = explain(trained)
        correlation = jnp.mean(attributions.rank_correlation(maps, teacher_maps()))
        return {"map_correlation": float(correlation)} | {kind: float(area) for kind, area in areas.items()}

    return measure


@functools.cache  # one program per network
def _explainer(network: Network, normalisation: Normalisation, tolerance: float) -> Callable:
    """``(weights, images, labels) -> maps, areas under the deletion and the insertion curve``, compiled."""

    @jax.jit
    def explain(weights: Weights, images: Array, labels: Array) -> tuple[Array, dict[str, Array]]:
        def logits(x):
            return network.apply(*weights, x, train=False)[0].logits

        def probability(x, labels):
            return jnp.take_along_axis(jax.nn.softmax(logits(x)), labels[:, None], axis=-1)[:, 0]

        x = data.normalise(images, **normalisation._asdict())
        score = attributions.class_score(logits)
        found = attributions.adaptive_integrated_gradients(
            score, x, targets=labels, tolerance=tolerance, max_nodes=64
        )
        maps = attributions.importance(found.values)
        curves = {
            kind: attributions.deletion_insertion(
                probability, x, maps, jnp.zeros_like(x), kind=kind, targets=labels
            )
            for kind in ("deletion", "insertion")
        }
        return maps, {kind: jnp.mean(curve) for kind, curve in curves.items()}

    return explain
