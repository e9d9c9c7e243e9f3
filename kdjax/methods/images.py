"""Methods that show the student its teacher's attribution maps: overlays, crops and dimming, and maps as a loss.

They read the cached answer ``map`` of :func:`kdjax.teacher.explain`, as ``batch["teacher_map"]``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kdjax import attributions, losses
from kdjax.methods.method import Method
from kdjax.types import ApplyFn, Batch


def ig_overlay(
    *, probability: float = 0.1, opacity: float = 0.5, exponents: tuple[float, float] = (1.0, 2.0)
) -> Method:
    """Blends some training images with the teacher's integrated gradients (Hernandez et al., arXiv 2503.13008).

    Args:
      probability: of an overlay.
      opacity: share of the map in an overlay.
      exponents: of the map, drawn between these.
    """
    options = {"probability": probability, "opacity": opacity, "exponents": exponents}

    def blend(batch: Batch, keys: Array) -> Array:
        return attributions.random_overlay(batch["image"], batch["teacher_map"], keys, **options)

    return Method(blend=blend, teacher_features=("map",), settings={"ig_overlay": options})


def saliency_dim(*, probability: float = 0.1, strength: float = 0.5) -> Method:
    """Dims pixels of some training images where their maps are low, down to ``1 - strength`` of the pixel."""

    def blend(batch: Batch, keys: Array) -> Array:
        maps = batch["teacher_map"]
        light = losses.attribution_map(maps, scale="min_max").reshape(maps.shape)
        factor = 1 - strength + strength * light
        chosen = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 5), probability))(keys)
        pixels = batch["image"].astype(jnp.float32)
        return jnp.where(chosen[:, None, None, None], factor * pixels, pixels)

    options = {"probability": probability, "strength": strength}
    return Method(blend=blend, teacher_features=("map",), settings={"saliency_dim": options})


def saliency_crop() -> Method:
    """Of two random crops of each image, takes the one that contains more of its map."""

    def crop(batch: Batch, keys: Array, move) -> Array:
        others = jax.vmap(lambda key: jax.random.fold_in(key, 6))(keys)
        maps = batch["teacher_map"].astype(jnp.float32)
        first, second = (jnp.sum(move(maps, k), axis=(1, 2, 3)) for k in (keys, others))
        return jnp.where(second > first, others, keys)

    return Method(crop=crop, teacher_features=("map",), settings={"saliency_crop": True})


def map_matching(weight: float = 0.8) -> Method:
    """Draws the student's own maps, gradient times input, to the teacher's, as a loss; trains through the gradient."""

    def match(outputs, batch):
        score = jax.nn.one_hot(batch["label"], outputs.logits.shape[-1])
        slope = outputs.features["pullback"](score)
        own = losses.attribution_map(slope * batch["image"])
        return {"match": weight * unit_distance(own, batch["teacher_map"])}

    return Method(
        objectives=(match,),
        student=_with_pullback,
        teacher_features=("map",),
        settings={"map_matching": weight},
    )


def unit_distance(own: Array, maps: Array) -> Array:
    """The squared distance of unit maps, 2 - 2 cos, averaged over the batch.

    Args:
      own: maps of the student, flat and of unit norm: ``[batch, positions]``.
      maps: cached maps ``[batch, height, width, 1]``; a cropped one is normalised again.
    """
    theirs = losses.attribution_map(maps)
    return jnp.mean(own.shape[-1] * losses.map_distance(own, theirs))


def _with_pullback(apply_fn: ApplyFn) -> ApplyFn:
    """The network with one more feature in training: what pulls a cotangent of its logits back to its inputs."""

    def score(params, inputs, model_state, key, cotangent):
        return cotangent * apply_fn(params, model_state, inputs, train=True, key=key)[0].logits

    def apply(params, model_state, inputs, *, train, key=None):
        outputs, state = apply_fn(params, model_state, inputs, train=train, key=key)
        if not train:
            return outputs, state

        def pullback(cotangent):
            return attributions.trainable_input_gradients(score, params, inputs, model_state, key, cotangent)

        return outputs._replace(features={**outputs.features, "pullback": pullback}), state

    return apply
