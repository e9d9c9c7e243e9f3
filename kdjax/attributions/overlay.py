"""Maps as the pictures that training images are blended with."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from kdjax.attributions.integrated import kind_of
from kdjax.types import Scalar

_CHOICE, _EXPONENT = 3, 4  # folded into an example's key; crop and flip fold in others


def importance(attributions: Float[Array, "..."]) -> Float[Array, "*batch height width 1"]:
    """How much each position matters: absolute attributions summed over channels.

    Raises:
      ValueError: if they are not of images, such as a dict of several inputs' attributions: take one of them.
    """
    if getattr(attributions, "ndim", 0) < 3:
        raise ValueError(
            f"importance needs attributions [..., height, width, channels], got {kind_of(attributions)}: take those of "
            "the images alone."
        )
    return jnp.sum(jnp.abs(attributions), axis=-1, keepdims=True)


def quantised(maps: Shaped[Array, "..."]) -> dict[str, Array]:
    """Maps as they are stored, to be rows of :func:`kdjax.teacher.precompute`.

    Returns:
      ``map``, uint8, as shares of each map's largest value, which is 255; and ``map_peak``, that value, float32[batch],
      which is not finite where the map is not, so that ``fill`` refuses it.

    Raises:
      ValueError: if they are no maps.
    """
    _check_maps("quantised", maps, maps.shape[:3])
    peak = jnp.max(maps, axis=(1, 2, 3))
    share = maps / jnp.where(peak > 0, peak, 1)[:, None, None, None]
    return {"map": jnp.round(255 * share).astype(jnp.uint8), "map_peak": peak}


def overlay(
    images: Shaped[Array, "batch height width channels"],
    maps: Shaped[Array, "maps map_height map_width depth"],
    *,
    strength: Scalar | Float[Array, " strengths"] = 0.5,
    exponent: Scalar | Float[Array, " exponents"] = 1.0,
) -> Float[Array, "batch height width channels"]:
    r"""Blends images with grey maps of what a teacher looks at.

    .. math:: (1 - w) \, x + 255 \, w \, \frac{m^s - \min m^s}{\max m^s - \min m^s}

    Args:
      images: on the scale [0, 255], uint8 or floating-point.
      maps: non-negative, on any scale, each the map of its image: cropped and flipped by the same keys.
      strength: w, the share of the map, from 0 to 1; for all or for each.
      exponent: s above 0; the larger, the more the map's peaks stand out. For all or for each.

    Returns:
      float32 on [0, 255]. An image whose map is constant is blended with black.

    Raises:
      ValueError: if images and maps differ in size, or a number lies outside its range.

    References:
      Hernandez, Chang, Nordling, `Knowledge Distillation: Enhancing Neural Network Compression with Integrated
      Gradients <https://arxiv.org/abs/2503.13008>`_, 2025. Defaults there: strength ½, exponent drawn from 1 to 2.
    """
    _check_maps("overlay", maps, images.shape[:3])
    _check_each("overlay", len(images), strength=strength, exponent=exponent)
    if isinstance(strength, float | int) and not 0 <= strength <= 1:
        raise ValueError(f"overlay needs a strength from 0 to 1, got {strength}; ½ is as published.")
    if isinstance(exponent, float | int) and not exponent > 0:
        raise ValueError(f"overlay needs an exponent above 0, got {exponent}; from 1 to 2 is as published.")
    strength, exponent = (
        jnp.reshape(jnp.asarray(x, jnp.float32), (-1, 1, 1, 1)) for x in (strength, exponent)
    )
    maps = maps.astype(jnp.float32)
    # A map's scale is divided out, so it may as well be taken to 1 before powers of it over- or underflow.
    raised = (maps / jnp.maximum(_most(maps), jnp.finfo(jnp.float32).tiny)) ** exponent
    low = -_most(-raised)
    span = _most(raised) - low
    picture = jnp.where(span > 0, (raised - low) / jnp.where(span > 0, span, 1), 0)
    return (1 - strength) * images.astype(jnp.float32) + strength * 255 * picture


def random_overlay(
    images: Shaped[Array, "batch height width channels"],
    maps: Shaped[Array, "batch height width 1"],
    keys: Key[Array, " keys"],
    *,
    probability: float = 0.1,
    strength: float = 0.5,
    exponents: tuple[float, float] = (1.0, 2.0),
) -> Float[Array, "batch height width channels"]:
    """Overlays each image with its map with some probability, as an augmentation; the others stay as they are.

    Args:
      images: as in :func:`overlay`.
      maps: as there.
      keys: one per example, :func:`kdjax.data.example_keys`; the same that moved image and map.
      probability: of an overlay.
      strength: as there.
      exponents: between which each exponent is drawn, its logarithm uniform.

    Raises:
      ValueError: as there.
    """
    _check_each("random_overlay", len(images), keys=keys)
    low, high = exponents
    if not 0 <= probability <= 1 or not 0 < low <= high:
        raise ValueError(
            "random_overlay needs a probability from 0 to 1 and exponents (low, high) above 0, got "
            f"{probability} and {exponents}; .1 and (1, 2) are as published."
        )

    def draw(key):
        chosen = jax.random.bernoulli(jax.random.fold_in(key, _CHOICE), probability)
        log = jax.random.uniform(
            jax.random.fold_in(key, _EXPONENT), minval=jnp.log(low), maxval=jnp.log(high)
        )
        return chosen, jnp.exp(log)

    chosen, exponent = jax.vmap(draw)(keys)
    blended = overlay(images, maps, strength=strength, exponent=exponent)
    return jnp.where(chosen[:, None, None, None], blended, images.astype(jnp.float32))


def _check_maps(what: str, maps: Array, size: tuple[int, ...]) -> None:
    if len(size) != 3 or maps.shape != (*size, 1):
        raise ValueError(
            f"{what} needs a map [{', '.join(map(str, size))}, 1] for each image, got {list(maps.shape)}: take "
            "attributions.importance of attributions first."
        )


def _check_each(what: str, batch: int, **numbers: Any) -> None:
    """Raises a ValueError unless there is one for all, or one for each."""
    for name, number in numbers.items():
        if jnp.shape(number) not in ((), (batch,)):
            raise ValueError(
                f"{what} needs {name} for all images or for each of {batch}, got {list(jnp.shape(number))}."
            )


def _most(maps: Array) -> Array:
    return jnp.max(maps, axis=(1, 2, 3), keepdims=True)
