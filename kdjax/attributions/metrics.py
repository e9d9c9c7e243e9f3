"""Whether a map shows what a network uses: by taking pixels away, by where an object is, by another map."""

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
    """Scores while pixels are exchanged, those of the largest map values first.

    A map that shows what the score rests on lets it fall at once when its pixels are deleted, and rise at once when
    they are inserted. The mean over the points is the area under the curve. Compare with a random map: pixels out of
    place disturb a network by themselves.

    Args:
      score_fn: one number per example, as in :func:`kdjax.attributions.integrated_gradients`; usually a probability.
      inputs: normalised images [batch, height, width, channels].
      maps: one per image, where larger means more important; ties in reading order.
      replacements: what stands where nothing of the image is shown: zeros, or the image blurred.
      kind: "deletion" from the images to the replacements, or "insertion" from the replacements to the images.
      targets: handed to ``score_fn`` beside the inputs.
      num_steps: equal steps from none to all pixels.

    Returns:
      Scores with none, one step's share, ..., and all pixels exchanged.

    Raises:
      ValueError: if shapes do not fit, there are no steps, or the kind has another name.

    References:
      Petsiuk, Das, Saenko, `RISE <https://arxiv.org/abs/1806.07421>`_, 2018, section 4.1.
    """
    if kind not in ("deletion", "insertion"):
        raise ValueError(f"kind needs to be 'deletion' or 'insertion', got {kind!r}.")
    if num_steps < 1:
        raise ValueError(f"a removal curve needs a step or more, got num_steps={num_steps}.")
    if inputs.ndim != 4 or maps.shape != (*inputs.shape[:3], 1) or replacements.shape != inputs.shape:
        raise ValueError(
            f"inputs {list(inputs.shape)} need maps {[*inputs.shape[:3], 1]} and replacements of their own shape, got "
            f"{list(maps.shape)} and {list(replacements.shape)}."
        )
    score = check_score(score_fn, inputs, targets)
    first, second = (inputs, replacements) if kind == "deletion" else (replacements, inputs)
    # In float32, since a stored map is of uint8, whose negative wraps around.
    rank = _ranks(-_rows(maps.astype(jnp.float32))).reshape(maps.shape)
    pixels = inputs.shape[1] * inputs.shape[2]

    def at(step):
        return score(jnp.where(rank < step * pixels / num_steps, second, first))

    return jax.lax.map(at, jnp.arange(num_steps + 1))


def pointing_game(maps: Map, masks: Other) -> Bool[Array, " batch"]:
    """Whether the largest value of each map, the first of equal ones, lies on the object.

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
    """Spearman's correlation of two maps over positions: whether two networks look at the same places.

    Ties are broken in reading order; a constant map's correlation means nothing.

    References:
      Adebayo et al., `Sanity Checks for Saliency Maps <https://arxiv.org/abs/1810.03292>`_, 2018, section 3.
    """
    _check_pair(maps, others)
    a, b = (_ranks(_rows(x)).astype(jnp.float32) for x in (maps, others))
    a, b = (x - jnp.mean(x, axis=-1, keepdims=True) for x in (a, b))
    return jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.sum(a**2, axis=-1) * jnp.sum(b**2, axis=-1))


def _rows(maps: Array) -> Array:
    """Each map's values in reading order; of no maps, no rows."""
    return maps.reshape(len(maps), math.prod(maps.shape[1:]))


def _ranks(rows: Float[Array, "batch positions"]) -> Array:
    """Each value's place in its row's ascending order."""
    order = jnp.argsort(rows, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)


def _check_pair(maps: Array, others: Array, mask: bool = False) -> None:
    if maps.shape != others.shape or maps.ndim != 4 or maps.shape[-1] != 1:
        raise ValueError(
            f"two batches of maps [batch, height, width, 1] are compared, got {list(maps.shape)} and "
            f"{list(others.shape)}: take attributions.importance of attributions first."
        )
    if mask and jnp.issubdtype(others.dtype, jnp.inexact):
        raise ValueError(
            f"masks need to be boolean, or integers of which 0 is outside, got {others.dtype}: write masks > 0.5."
        )
