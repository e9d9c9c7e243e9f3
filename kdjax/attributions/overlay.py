"""Maps as stored, and as overlays of training images."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from kdjax.attributions.integrated import kind_of
from kdjax.types import Scalar

_CHOICE, _EXPONENT = 3, 4  # folded into an example's key; crop and flip use other numbers


def importance(attributions: Float[Array, "..."]) -> Float[Array, "*batch height width 1"]:
    """Absolute attributions summed over channels: one number per position.

    Raises:
      ValueError: if they are not of images, such as a dict of several inputs' attributions: pass one of them.
    """
    if getattr(attributions, "ndim", 0) < 3:
        raise ValueError(
            f"importance needs attributions [..., height, width, channels], got {kind_of(attributions)}: pass those of "
            "the images alone."
        )
    return jnp.sum(jnp.abs(attributions), axis=-1, keepdims=True)


def quantised(maps: Shaped[Array, "..."]) -> dict[str, Array]:
    """Maps in their stored form, as rows of :func:`kdjax.teacher.precompute`.

    Returns:
      ``map``, uint8, scaled so that each map's largest value is 255; and ``map_peak``, that value, float32[batch]. It
      is not finite where the map is not, so that ``precompute`` refuses it.

    Raises:
      ValueError: if the shape is not that of maps.
    """
    _check_maps("quantised", maps, maps.shape[:3])
    peak = jnp.max(maps, axis=(1, 2, 3))
    share = maps / jnp.where(peak > 0, peak, 1)[:, None, None, None]
    return {"map": jnp.round(255 * share).astype(jnp.uint8), "map_peak": peak}


def overlay(
    images: Shaped[Array, "batch height width channels"],
    maps: Shaped[Array, "maps map_height map_width depth"],
    *,
    opacity: Scalar | Float[Array, " opacities"] = 0.5,
    exponent: Scalar | Float[Array, " exponents"] = 1.0,
) -> Float[Array, "batch height width channels"]:
    r"""Blends images with grey-scale attribution maps.

    .. math:: (1 - w) \, x + 255 \, w \, \frac{m^s - \min m^s}{\max m^s - \min m^s}

    Args:
      images: on the scale [0, 255], uint8 or floating-point.
      maps: non-negative, on any scale, one per image, cropped and flipped like it.
      opacity: w, the share of the map, from 0 to 1; one for all images or one each.
      exponent: s above 0, which emphasises the map's peaks; one for all images or one each.

    Returns:
      float32 on [0, 255]. An image whose map is constant is blended with black.

    Raises:
      ValueError: if images and maps differ in size, or a number is out of range.

    References:
      Hernandez, Chang, Nordling, `Knowledge Distillation: Enhancing Neural Network Compression with Integrated
      Gradients <https://arxiv.org/abs/2503.13008>`_, 2025. Defaults there: opacity ½, exponent drawn from 1 to 2.
    """
    _check_maps("overlay", maps, images.shape[:3])
    _check_each("overlay", len(images), opacity=opacity, exponent=exponent)
    if isinstance(opacity, float | int) and not 0 <= opacity <= 1:
        raise ValueError(f"overlay needs an opacity from 0 to 1, got {opacity}; ½ is as published.")
    if isinstance(exponent, float | int) and not exponent > 0:
        raise ValueError(f"overlay needs an exponent above 0, got {exponent}; from 1 to 2 is as published.")
    opacity, exponent = (jnp.reshape(jnp.asarray(x, jnp.float32), (-1, 1, 1, 1)) for x in (opacity, exponent))
    maps = maps.astype(jnp.float32)
    # Scaled to 1 first, so that powers neither overflow nor underflow; the scale cancels below.
    raised = (maps / jnp.maximum(_peak(maps), jnp.finfo(jnp.float32).tiny)) ** exponent
    low = -_peak(-raised)
    span = _peak(raised) - low
    picture = jnp.where(span > 0, (raised - low) / jnp.where(span > 0, span, 1), 0)
    return (1 - opacity) * images.astype(jnp.float32) + opacity * 255 * picture


def random_overlay(
    images: Shaped[Array, "batch height width channels"],
    maps: Shaped[Array, "batch height width 1"],
    keys: Key[Array, " keys"],
    *,
    probability: float = 0.1,
    opacity: float = 0.5,
    exponents: tuple[float, float] = (1.0, 2.0),
) -> Float[Array, "batch height width channels"]:
    """Overlays each image with its map with some probability, as an augmentation.

    Args:
      images: as in :func:`overlay`.
      maps: as in :func:`overlay`.
      keys: one per example, :func:`kdjax.data.example_keys`; the ones that cropped and flipped image and map.
      probability: of an overlay; other images are returned unchanged.
      opacity: as in :func:`overlay`.
      exponents: bounds of the exponent, drawn log-uniformly.

    Raises:
      ValueError: as :func:`overlay`.
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
    blended = overlay(images, maps, opacity=opacity, exponent=exponent)
    return jnp.where(chosen[:, None, None, None], blended, images.astype(jnp.float32))


def _check_maps(what: str, maps: Array, size: tuple[int, ...]) -> None:
    if len(size) != 3 or maps.shape != (*size, 1):
        raise ValueError(
            f"{what} needs maps [{', '.join(map(str, size))}, 1], one per image, got {list(maps.shape)}: take "
            "attributions.importance of attributions first."
        )


def _check_each(what: str, batch: int, **numbers: Any) -> None:
    """Raises a ValueError unless each is one number for all images or one per image."""
    for name, number in numbers.items():
        if jnp.shape(number) not in ((), (batch,)):
            raise ValueError(
                f"{what} needs one {name} for all images or {batch} of them, got {list(jnp.shape(number))}."
            )


def _peak(maps: Array) -> Array:
    return jnp.max(maps, axis=(1, 2, 3), keepdims=True)
