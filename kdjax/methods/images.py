"""Methods that use a teacher's cached maps: as overlays, crops or dimming of training images, and as targets of a loss.

They read answers of :func:`kdjax.teacher.explain`: ``batch["teacher_map"]``, the integrated gradients of an image, and
``batch["teacher_attention_STAGE"]``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax import attributions, losses
from kdjax.methods.method import Features, Method
from kdjax.types import ApplyFn, Batch

_DIM, _CROP = 5, 6  # folded into an example's key; crop, flip and overlay fold in others


def ig_overlay(
    *, probability: float = 0.1, opacity: float = 0.5, exponents: tuple[float, float] = (1.0, 2.0)
) -> Method:
    """Overlays some training images with the teacher's integrated gradients.

    Hernandez et al., `Knowledge Distillation: Enhancing Neural Network Compression with Integrated Gradients
    <https://arxiv.org/abs/2503.13008>`_, 2025.

    Args:
      probability: of an overlay.
      opacity: share of the map in an overlay.
      exponents: the map is raised to a power drawn between these; see :func:`kdjax.attributions.random_overlay`.
    """
    options = {"probability": probability, "opacity": opacity, "exponents": exponents}

    def blend(batch: Batch, keys: Array) -> Array:
        return attributions.random_overlay(batch["image"], batch["teacher_map"], keys, **options)

    return Method(blend=blend, teacher_features=("map",), settings={"ig_overlay": options})


def saliency_dim(*, probability: float = 0.1, strength: float = 0.5) -> Method:
    """Dims some training images where the teacher's map is low.

    Args:
      probability: of dimming an image.
      strength: what a pixel loses where the map is lowest; where it is highest, a pixel keeps its value.
    """
    options = {"probability": probability, "strength": strength}

    def blend(batch: Batch, keys: Array) -> Array:
        maps = batch["teacher_map"].astype(jnp.float32)
        light = losses.attribution_map(maps, scale="min_max").reshape(maps.shape)
        factor = 1 - strength + strength * light
        chosen = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, _DIM), probability))(keys)
        pixels = batch["image"].astype(jnp.float32)
        return jnp.where(chosen[:, None, None, None], factor * pixels, pixels)

    return Method(blend=blend, teacher_features=("map",), settings={"saliency_dim": options})


def saliency_crop() -> Method:
    """Of two random crops of each training image, takes the one that contains more of the teacher's map."""

    def crop(batch: Batch, keys: Array, move) -> Array:
        others = jax.vmap(lambda key: jax.random.fold_in(key, _CROP))(keys)
        maps = batch["teacher_map"].astype(jnp.float32)
        first, second = (jnp.sum(move(maps, k), axis=(1, 2, 3)) for k in (keys, others))
        return jnp.where(second > first, others, keys)

    return Method(crop=crop, teacher_features=("map",), settings={"saliency_crop": True})


def map_matching(weight: float = 0.8) -> Method:
    """Draws the student's maps, gradient times input of the true class, to the teacher's integrated gradients.

    The loss is trained through the gradient, forward over reverse; see
    :func:`kdjax.attributions.trainable_input_gradients`.

    Args:
      weight: of the squared distance of unit maps, 2 - 2 cos.
    """

    def objective(outputs, batch):
        score = jax.nn.one_hot(batch["label"], outputs.logits.shape[-1])
        slope = outputs.features["pullback"](score)
        own = losses.attribution_map(slope * batch["image"])
        return {"match": weight * unit_distance(own, batch["teacher_map"])}

    return Method(
        objectives=(objective,),
        student=_with_pullback,
        teacher_features=("map",),
        settings={"map_matching": weight},
    )


def attention_matching(stages: Sequence[str], *, weight: float = 0.8) -> Method:
    """Draws the student's attention maps to the teacher's cached ones, as Hernandez et al. do.

    For a teacher that is asked in the step, and the published weight of attention transfer, see
    :func:`kdjax.methods.attention_transfer`.

    Args:
      stages: features that both networks have at one size; see :func:`common_stages`.
      weight: of the squared distance of unit maps, 2 - 2 cos, averaged over the stages.

    Raises:
      ValueError: if there are no stages.
    """
    if not stages:
        raise ValueError(
            "attention_matching compares maps after stages, and there is no stage of which student and teacher have "
            "maps of one size: choose another student."
        )

    def objective(outputs, batch):
        each = [
            unit_distance(losses.attention_map(outputs.features[name]), batch[f"teacher_attention_{name}"])
            for name in stages
        ]
        total: Any = sum(each)
        return {"attention": weight * total / len(each)}

    return Method(
        objectives=(objective,),
        teacher_features=tuple(f"attention_{name}" for name in stages),
        settings={"attention_matching": {"stages": list(stages), "weight": weight}},
    )


def common_stages(student: Features, teacher: Features) -> tuple[str, ...]:
    """The stages after which both networks have maps of one height and width, shallowest first.

    Args:
      student: shapes of its features by name, as ``network.output_shapes.features``.
      teacher: shapes of its features.
    """
    theirs = {name: x.shape[1:3] for name, x in teacher.items() if name.startswith("stage") and x.ndim == 4}
    return tuple(
        name
        for name in sorted(theirs.keys() - {"stage0"})
        if name in student and student[name].shape[1:3] == theirs[name]
    )


def unit_distance(own: Float[Array, "batch positions"], maps: Array) -> Float[Array, ""]:
    """The squared distance of unit maps, 2 - 2 cos, averaged over the batch.

    Args:
      own: maps of the student, of unit norm.
      maps: cached maps ``[batch, height, width, 1]``, brought to unit norm here, since a crop changes it.
    """
    theirs = losses.attribution_map(maps.astype(jnp.float32))
    return jnp.mean(own.shape[-1] * losses.map_distance(own, theirs))


def _with_pullback(apply_fn: ApplyFn) -> ApplyFn:
    """The network with one more feature in training, ``pullback``: cotangent of its logits → gradient of its inputs."""

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
