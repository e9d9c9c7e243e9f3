"""Corruptions of images, each with five strengths.

A corruption is a pure function ``(images, strength, keys) -> images`` of images in [0, 1], with one key per image.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kdjax import data
from kdjax.extras import extra
from kdjax.types import Scalar

Images = Float[Array, "batch height width channels"]  # in [0, 1]
Keys = Key[Array, " batch"]  # one per image


def gaussian_noise(images: Images, sigma: Scalar, keys: Keys) -> Images:
    """Adds normal noise of standard deviation ``sigma``, on the scale [0, 1], to every channel, and clips."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
    return jnp.clip(images + sigma * noise, 0, 1)


def gaussian_blur(images: Images, sigma: Scalar, keys: Keys | None = None) -> Images:
    """Blurs with a Gaussian truncated at four standard deviations; the border's pixels continue beyond it.

    Equal to ``scipy.ndimage.gaussian_filter`` with ``mode="nearest"``, which made CIFAR-10-C. ``sigma`` is the standard
    deviation in pixels, at most the shorter side.
    """
    del keys
    rows, columns = (_blur_matrix(size, sigma) for size in images.shape[1:3])
    blurred = jnp.einsum("ih,bhwc->biwc", rows, images, precision="highest")
    return jnp.clip(jnp.einsum("jw,biwc->bijc", columns, blurred, precision="highest"), 0, 1)


def contrast(images: Images, factor: Scalar, keys: Keys | None = None) -> Images:
    """Scales the differences from each image's mean per channel: 1 changes nothing, 0 leaves a uniform image."""
    del keys
    mean = jnp.mean(images, axis=(1, 2), keepdims=True)
    return jnp.clip((images - mean) * factor + mean, 0, 1)


def jpeg(images: Images, quality: int | float, keys: Keys | None = None) -> Images:
    """Compresses and decompresses each image as a JPEG, with Pillow on the host: not for use under ``jit``.

    Args:
      images: rounded to 8 bits.
      quality: Pillow's, 1 to 95.
      keys: not used.

    Raises:
      ValueError: for images of neither one channel nor three.
    """
    with extra("data"):
        from PIL import Image

    del keys
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"jpeg needs images of 1 or 3 channels, got {images.shape[-1]}: leave it out of the corruptions."
        )

    def compressed(picture: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(
            buffer, "JPEG", quality=int(quality)
        )
        return np.asarray(Image.open(buffer)).reshape(picture.shape)

    pictures = np.rint(255 * np.asarray(images)).astype(np.uint8)
    return jnp.asarray(np.stack([compressed(picture) for picture in pictures]), jnp.float32) / 255


def occlusion(images: Images, fraction: Scalar, keys: Keys) -> Images:
    """Covers a uniformly placed square of the image with grey. With one key, a larger square contains a smaller one.

    Args:
      images: in [0, 1].
      fraction: side of the square, as a part of the image's shorter side; rounded to whole pixels.
      keys: one per image.

    References:
      Zeiler and Fergus, `Visualizing and Understanding Convolutional Networks <https://arxiv.org/abs/1311.2901>`_,
      2014, section 4.2, move such a square over the image.
    """
    height, width = images.shape[1:3]
    side = jnp.floor(jnp.asarray(fraction, jnp.float32) * min(height, width) + 0.5)
    place = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)

    def covered(size, place):
        first = jnp.floor(place * (size - side + 1))[:, None]
        pixels = jnp.arange(size)[None]
        return (pixels >= first) & (pixels < first + side)

    square = covered(height, place[:, 0])[:, :, None] & covered(width, place[:, 1])[:, None, :]
    return jnp.where(square[..., None], jnp.asarray(0.5, images.dtype), images)


def translation(images: Images, pixels: Scalar, keys: Keys, *, fill: float = 0.0) -> Images:
    """Shifts each image up, down, left or right, as its key chooses, by a whole number of pixels.

    ``fill`` is the value of the pixels that move in; black, as at the border of :func:`kdjax.data.crop_and_flip`.
    """
    height, width = images.shape[1:3]
    direction = jax.vmap(lambda key: jax.random.randint(key, (), 0, 4))(keys)
    shift = jnp.asarray([(-1, 0), (1, 0), (0, -1), (0, 1)])[direction] * jnp.asarray(pixels).astype(jnp.int32)

    def move(image, shift):
        rows, columns = jnp.arange(height) - shift[0], jnp.arange(width) - shift[1]
        seen = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
        moved = image[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
        return jnp.where(seen[..., None], moved, jnp.asarray(fill, image.dtype))

    return jax.vmap(move)(images, shift)


def _blur_matrix(size: int, sigma: Scalar) -> Float[Array, "size size"]:
    """Weights of the blur along one axis, output by input pixel; the border's include all beyond it."""
    reach = 4 * size  # taps on each side; only those within four standard deviations have weight
    taps = jnp.arange(-reach, reach + 1)
    sigma = jnp.asarray(sigma, jnp.float32)
    weights = jnp.exp(-(taps**2) / (2 * jnp.maximum(sigma, 1e-6) ** 2))
    weights = jnp.where(jnp.abs(taps) <= jnp.floor(4 * sigma + 0.5), weights, 0)
    below = jnp.pad(jnp.cumsum(weights / jnp.sum(weights)), (1, 0))  # sum of the taps before each
    place = jnp.arange(size)
    tap = place[None] - place[:, None]
    first = jnp.where(place[None] == 0, -reach, tap)
    last = jnp.where(place[None] == size - 1, reach, tap)
    return below[last + reach + 1] - below[first + reach]


@dataclasses.dataclass(frozen=True)  # not a tuple, which `jax.jit` cannot take as a function
class Corruption:
    """A corruption and the strengths of its severities; call it as ``corruption(images, severity, key)``.

    Attributes:
      function: ``(images, strength, keys) -> images``, images in [0, 1]; the strength may be traced.
      strengths: of severity 1, 2, and so on.
      on_host: whether the function cannot be traced; then it is not random either, and ``keys`` is None.
    """

    function: Callable[..., Array]
    strengths: tuple[float, ...]
    on_host: bool = False

    def __call__(self, images: Images, severity: int | Int[Array, ""], key: Key[Array, ""]) -> Images:
        """Corrupts the first examples of a data set; a severity without strength is a ValueError unless traced."""
        if isinstance(severity, int):  # not traced
            check_severities([severity], {"this corruption": self})
        if self.on_host:
            return self.function(images, self.strengths[int(severity) - 1], None)
        keys = data.example_keys(key, jnp.arange(len(images)))
        return self.function(images, jnp.asarray(self.strengths, jnp.float32)[severity - 1], keys)


CORRUPTIONS: dict[str, Corruption] = {
    # CIFAR-10-C: standard deviation of the noise on [0, 1]; of the blur in pixels; factor of contrast; JPEG quality
    "gaussian_noise": Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "gaussian_blur": Corruption(gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg": Corruption(jpeg, (80, 65, 58, 50, 40), on_host=True),
    # our own: side as a part of the shorter side (4 to 20 pixels of 32, 1 to 5 of 8); pixels
    "occlusion": Corruption(occlusion, (0.125, 0.25, 0.375, 0.5, 0.625)),
    "translation": Corruption(translation, (1, 2, 3, 4, 5)),
}
"""Every corruption by name, with its strength at the severities 1 to 5."""


def check_severities(severities: Sequence[int], corruptions: Mapping[str, Corruption]) -> None:
    """Raises a ValueError if a corruption has no strength for one of the severities."""
    for name, corruption in corruptions.items():
        count = len(corruption.strengths)
        for severity in severities:
            if not 1 <= severity <= count:
                raise ValueError(f"{name} has the severities 1 to {count}, got {severity}.")
