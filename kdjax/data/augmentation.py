"""Augmentation as pure functions of an image and a random key, inside the jitted step.

An example's key is made from its index, so the augmentation does not depend on how a batch is sharded, and view number
``v`` of an image can be made again at any time: ``example_keys(jax.random.fold_in(key, v), index)``. An attribution map
moves with its image when both are given the same keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8

_CROP, _FLIP = 1, 2  # folded into a key, so that crop and flip are independent


def example_keys(key: Key[Array, ""], index: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """One random key per example, from ``key`` and the example's index; its place in the batch does not matter."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def crop_and_flip(
    images: Shaped[Array, "batch height width channels"],
    keys: Key[Array, " batch"],
    *,
    padding: int,
    flip: bool,
) -> Shaped[Array, "batch height width channels"]:
    """The usual augmentation of small photographs.

    Args:
      images: a batch.
      keys: one per example, :func:`example_keys`.
      padding: each image is shifted by up to so many pixels, and its border filled with zeros: black in images before
        normalisation, and the mean after it.
      flip: mirror images left to right with probability one half; not for digits or other writing.

    Raises:
      ValueError: for a negative padding.
    """
    if padding < 0:
        raise ValueError(f"a crop needs a padding of 0 or more pixels, got {padding}; 4 is usual at 32x32.")
    if padding:
        images = _random_crop(images, keys, padding)
    if flip:
        mirror = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, _FLIP)))(keys)
        images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)
    return images


def _random_crop(images: Array, keys: Array, padding: int) -> Array:
    height, width, channels = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(image, key):
        row, column = jax.random.randint(jax.random.fold_in(key, _CROP), (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(image, (row, column, jnp.zeros_like(row)), (height, width, channels))

    return jax.vmap(crop)(padded, keys)


def stored_view(
    images: Shaped[Array, "batch height width channels"],
    index: Int[Array, " batch"],
    view: Int[Array, " batch"] | Int[Array, ""] | int,
    *,
    seed: int,
    padding: int,
    flip: bool,
) -> Shaped[Array, "batch height width channels"]:
    """View number ``view`` of each image.

    View 0 is the image itself; the others are crops and flips that depend only on ``seed``, ``view`` and the example's
    index. So a teacher's answer to a view can be cached, and the student given the same view later.

    Args:
      images: a batch.
      index: of each image in its data set.
      view: one number for all, or one per image.
      seed: of the family of views.
      padding: as for :func:`crop_and_flip`.
      flip: as there.
    """
    view = jnp.broadcast_to(view, index.shape)
    base = jax.random.key(seed)
    keys = jax.vmap(lambda i, v: jax.random.fold_in(jax.random.fold_in(base, v), i))(index, view)
    moved = crop_and_flip(images, keys, padding=padding, flip=flip)
    return jnp.where((view == 0)[:, None, None, None], images, moved)


def normalise(
    images: UInt8[Array, "*batch height width channels"] | Float[Array, "*batch height width channels"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "*batch height width channels"]:
    """Normalises images in [0, 255] to float32 of zero mean and unit variance per channel.

    Args:
      images: uint8, or floats on the same scale.
      mean: per channel, of images scaled to [0, 1], from :func:`kdjax.data.channel_statistics`.
      std: standard deviation per channel, on the same scale.
    """
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    offset = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    shape = (1,) * (images.ndim - 1) + (-1,)
    return images.astype(jnp.float32) * scale.reshape(shape) - offset.reshape(shape)


def mixup(
    images: Float[Array, "batch height width channels"], key: Key[Array, ""], *, alpha: float
) -> tuple[Float[Array, "batch height width channels"], Int[Array, " batch"], Float[Array, ""]]:
    """Blends each image with another one of its batch, for teacher and student alike.

    Args:
      images: normalised.
      key: one for the batch.
      alpha: of the distribution Beta(alpha, alpha) of the share; 1 is uniform, small values blend little.

    Returns:
      The blends; each partner's place in the batch; and the share of the first image, in [0, 1]. The hard loss becomes
      ``share * loss(label) + (1 - share) * loss(label[partner])``.

    Raises:
      ValueError: if alpha is not positive.

    References:
      Zhang et al., `mixup: Beyond Empirical Risk Minimization <https://arxiv.org/abs/1710.09412>`_, 2018, section 2;
      for distillation Beyer et al., `A good teacher is patient and consistent <https://arxiv.org/abs/2106.05237>`_,
      2022, section 3.1.
    """
    if alpha <= 0:
        raise ValueError(f"mixup needs alpha above 0, got {alpha}; leave mixup out to switch it off.")
    share_key, partner_key = jax.random.split(key)
    share = jax.random.beta(share_key, alpha, alpha)
    partner = jax.random.permutation(partner_key, images.shape[0])
    return share * images + (1 - share) * images[partner], partner, share
