"""Metrics of maps: deletion and insertion of pixels, agreement with object masks, and rank correlation."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from kdjax.attributions.integrated import ScoreFn, check_score

Map = Float[Array, "batch height width depth"]
Other = Shaped[Array, "others other_height other_width other_depth"]


def deletion_insertion(
    score_fn: ScoreFn,
    inputs: Float[Array, "..."],
    maps: Other,
    replacements: Float[Array, "..."],
    *,
    kind: str,
    targets: PyTree | None = None,
    num_steps: int = 16,
) -> Float[Array, "points batch"]:
    """Scores while pixels are replaced, in order of decreasing map value.

    For a faithful map the score falls early under deletion and rises early under insertion. The mean over the points is
    the area under the curve. Compare with a random map, since replaced pixels disturb a network by themselves.

    Args:
      score_fn: one number per example, as in :func:`kdjax.attributions.integrated_gradients`; usually a probability.
      inputs: normalised images [batch, height, width, channels].
      maps: one per image, larger is more important; ties in reading order.
      replacements: pixels that replace the image's: zeros, or the blurred image.
      kind: "deletion" from the images to the replacements, or "insertion" from the replacements to the images.
      targets: second argument of ``score_fn``.
      num_steps: equal steps from none to all pixels.

    Returns:
      Scores with 0, 1/num_steps, ..., and all of the pixels replaced.

    Raises:
      ValueError: if shapes do not match, there are no steps, or the kind is unknown.

    References:
      Petsiuk, Das, Saenko, `RISE <https://arxiv.org/abs/1806.07421>`_, 2018, section 4.1.
    """
    if kind not in ("deletion", "insertion"):
        raise ValueError(f"kind needs to be 'deletion' or 'insertion', got {kind!r}.")
    if num_steps < 1:
        raise ValueError(f"deletion_insertion needs num_steps of 1 or more, got {num_steps}.")
    if inputs.ndim != 4 or maps.shape != (*inputs.shape[:3], 1) or replacements.shape != inputs.shape:
        raise ValueError(
            f"inputs {list(inputs.shape)} need maps {[*inputs.shape[:3], 1]} and replacements of their own shape, got "
            f"{list(maps.shape)} and {list(replacements.shape)}."
        )
    score = check_score(score_fn, inputs, targets)
    first, second = (inputs, replacements) if kind == "deletion" else (replacements, inputs)
    # In float32, since the negative of a stored uint8 map wraps around.
    rank = _ranks(-_rows(maps.astype(jnp.float32))).reshape(maps.shape)
    pixels = inputs.shape[1] * inputs.shape[2]

    def at(step):
        return score(jnp.where(rank < step * pixels / num_steps, second, first))

    return jax.lax.map(at, jnp.arange(num_steps + 1))


def pointing_game(maps: Map, masks: Other) -> Bool[Array, " batch"]:
    """Whether the largest value of each map (the first among ties) lies on the object.

    References:
      Zhang et al., `Top-down Neural Attention by Excitation Backprop <https://arxiv.org/abs/1608.00507>`_, 2016,
      section 4.2.
    """
    _check_pair(maps, masks, mask=True)
    place = jnp.argmax(_rows(maps), axis=-1)
    return jnp.take_along_axis(_rows(masks), place[:, None], axis=-1)[:, 0] != 0


def relevance_mass(maps: Map, masks: Other) -> Float[Array, " batch"]:
    """The share of each map that lies on the object; 0 for a map of zeros.

    References:
      Arras, Osman, Samek, `CLEVR-XAI <https://arxiv.org/abs/2003.07258>`_, 2022, section 3.3.
    """
    _check_pair(maps, masks, mask=True)
    inside, total = (jnp.sum(x, axis=(1, 2, 3)) for x in (jnp.where(masks, maps, 0), maps))
    return inside / jnp.where(total > 0, total, 1)


def rank_correlation(maps: Map, others: Other) -> Float[Array, " batch"]:
    """Spearman's correlation of two maps over positions.

    Ties are broken in reading order; the correlation of a constant map is meaningless.

    References:
      Adebayo et al., `Sanity Checks for Saliency Maps <https://arxiv.org/abs/1810.03292>`_, 2018, section 3.
    """
    _check_pair(maps, others)
    a, b = (_ranks(_rows(x)).astype(jnp.float32) for x in (maps, others))
    a, b = (x - jnp.mean(x, axis=-1, keepdims=True) for x in (a, b))
    return jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.sum(a**2, axis=-1) * jnp.sum(b**2, axis=-1))


def _rows(maps: Array) -> Array:
    """Each map's values in reading order; also for an empty batch."""
    return maps.reshape(len(maps), math.prod(maps.shape[1:]))


def _ranks(rows: Float[Array, "batch positions"]) -> Array:
    """The rank of each value in its row, ascending."""
    order = jnp.argsort(rows, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)


def _check_pair(maps: Array, others: Array, mask: bool = False) -> None:
    if maps.shape != others.shape or maps.ndim != 4 or maps.shape[-1] != 1:
        raise ValueError(
            f"maps of two equal shapes [batch, height, width, 1] are needed, got {list(maps.shape)} and "
            f"{list(others.shape)}: take attributions.importance of attributions first."
        )
    if mask and jnp.issubdtype(others.dtype, jnp.inexact):
        raise ValueError(
            f"masks must be boolean, or integers with 0 outside, got {others.dtype}: write masks > 0.5."
        )
