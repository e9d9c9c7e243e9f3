"""Image files as a viewer shows them: upright, opaque, 8 bits a channel, grey or RGB.

Every file that Pillow opens becomes an image of mode "L" or "RGB", or is refused with the reason. The rules:

- An EXIF (or XMP) orientation is applied.
- Transparency is composited on white.
- 16-bit grey is scaled by its full range, 65,535 to 255 (12-bit TIFF: 4,095 to 255), not by the values that occur.
- The first of several frames is used (GIF, APNG, WebP, TIFF).
- 32-bit integers, floats and CIELAB are refused: nothing in the file says which value is white.
- Embedded colour profiles are not applied.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that Pillow recognises and cannot decode by itself, and FITS, whose values have no defined white.
_NO_PICTURES = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF")
_SHOWN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_GREY = ("1", "L", "LA")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE_IS_ZERO = 0


def suffixes() -> dict[str, str]:
    """The file name endings of pictures that Pillow reads on this machine, each with the name of its format."""
    from PIL import Image

    known = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"} - {*_NO_PICTURES}  # the JPEG reader opens MPO, the files of many phones
    return {suffix: form for suffix, form in known.items() if form in readable}


def read(path: Path) -> tuple[Image, list[str]]:
    """Reads an image file, whatever its name ends in, in mode "L" or "RGB"; also returns the rules that were applied.

    Raises:
      ValueError: if the file cannot be read; the message is the reason, without the path.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise ValueError("no regular file, or a link to a file that is gone")
    readable = set(suffixes().values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Given a path, Pillow maps TIFF into memory and garbles rotated ones (13.0), so it is given a file.
            formats = [form for form in Image.ID if form in readable]
            with path.open("rb") as file, Image.open(file, formats=formats) as image:
                return as_shown(image), _decisions(image)
    except UnidentifiedImageError as error:
        raise ValueError("empty" if path.stat().st_size == 0 else "no image that Pillow knows") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS:,} (PIL.Image.MAX_IMAGE_PIXELS), as a "
            "decompression bomb has: shrink it"
        ) from error
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise ValueError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def as_shown(image: Image) -> Image:
    """Returns an opened image in mode "L" or "RGB", by the rules at the top of this module."""
    from PIL import Image, ImageOps

    sixteen_bits = _sixteen_bits(image)
    grey = sixteen_bits or image.mode in _GREY
    if not sixteen_bits and image.mode not in _SHOWN:
        raise ValueError(
            f"mode {image.mode!r} of Pillow, whose values have no defined white: save it with 8 or 16 bits a channel"
        )
    upright = ImageOps.exif_transpose(image)
    if sixteen_bits:
        upright = Image.fromarray(_to_eight_bits(image, np.asarray(upright)))
    elif image.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("L" if grey else "RGB")


def fit(image: Image, size: tuple[int, int]) -> Image:
    """Resizes an image (Lanczos) to cover ``(height, width)``, and crops it at its centre."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)


def stretch(image: Image, size: tuple[int, int]) -> Image:
    """Resizes an image (Lanczos) to ``(height, width)``, which changes its proportions."""
    from PIL import Image

    return image.resize((size[1], size[0]), Image.Resampling.LANCZOS)  # a copy if it has that size


def _sixteen_bits(image: Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # scaled by Pillow


def _to_eight_bits(image: Image, values: np.ndarray) -> np.ndarray:
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    scaled = np.round(values * (255 / white)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 255 - scaled
    transparent = image.info.get("transparency")  # one value that means transparent
    return scaled if transparent is None else np.where(values == transparent, np.uint8(255), scaled)


def _decisions(image: Image) -> list[str]:
    frames = getattr(image, "n_frames", 1) > 1 and image.format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
    sixteen_bits, clear = _sixteen_bits(image), image.has_transparency_data
    if clear and not sixteen_bits:
        clear = np.asarray(image.convert("RGBA"))[..., 3].min() < 255
    taken = {
        "several frames, of which the first was used": frames,
        "transparency, which was composited on white": clear,
        "16 bits a channel, which were scaled to 8": sixteen_bits,
    }
    return [what for what, so in taken.items() if so]
