"""Image files as a viewer shows them: every mode and orientation beside what NumPy makes of the same numbers."""

import os
import struct
import zlib
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from kdjax import data

photos = import_module("kdjax.data.photos")

HEIGHT, WIDTH = 5, 7
ORIENTATION = 0x0112

# Where the pixel of stored row i and column j is seen, from the words of the EXIF standard: of 6, for instance, "the
# 0th row is the visual right-hand side of the image, and the 0th column is the visual top".
SEEN_AT = {
    1: lambda i, j: (i, j),
    2: lambda i, j: (i, WIDTH - 1 - j),
    3: lambda i, j: (HEIGHT - 1 - i, WIDTH - 1 - j),
    4: lambda i, j: (HEIGHT - 1 - i, j),
    5: lambda i, j: (j, i),
    6: lambda i, j: (j, WIDTH - 1 - i),
    7: lambda i, j: (HEIGHT - 1 - j, WIDTH - 1 - i),
    8: lambda i, j: (HEIGHT - 1 - j, i),
}

RNG = np.random.default_rng(0)
PALETTE = RNG.integers(0, 256, (16, 3), np.uint8)
ALPHAS = RNG.integers(0, 256, 16, np.uint8)


def stored_as(upright, orientation):
    """The pixels as a camera stores them that was held in this way."""
    turned = orientation > 4
    stored = np.zeros((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH), upright.dtype)
    stored = np.zeros((*stored.shape, *upright.shape[2:]), upright.dtype)
    for i, j in np.ndindex(stored.shape[:2]):
        stored[i, j] = upright[SEEN_AT[orientation](i, j)]
    return stored


def bands(mode):
    return lambda pixels: Image.merge(
        mode, [Image.fromarray(np.ascontiguousarray(p)) for p in np.moveaxis(pixels, 2, 0)]
    )


def indexed(pixels):
    image = bands("PA")(pixels) if pixels.ndim == 3 else Image.fromarray(pixels)
    image.putpalette(PALETTE.tobytes())
    return image


def on_white(colour, alpha):
    alpha = np.asarray(alpha, float)[..., None] / 255
    return alpha * np.asarray(colour, float) + (1 - alpha) * 255


def ycbcr_to_rgb(pixels):
    y, cb, cr = np.moveaxis(pixels.astype(float), 2, 0)
    rgb = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
    return np.clip(np.stack(rgb, -1), 0, 255)


def integers(high, *channels, dtype=np.uint8):
    return RNG.integers(0, high, (HEIGHT, WIDTH, *channels)).astype(dtype)


GREY = integers(256)
COLOUR = integers(256, 3)
DEEP = integers(65536, dtype=np.uint16)
INDEX = integers(16)

# mode: suffix, pixels, how Pillow makes an image of them, what NumPy says a viewer shows, how it is saved
MODES = {
    "1": ("png", GREY > 99, Image.fromarray, lambda p: p * 255.0, {}),
    "L": ("png", GREY, Image.fromarray, lambda p: p, {}),
    "L tRNS": (
        "png",
        GREY % 4,
        Image.fromarray,
        lambda p: np.where(p == 2, 255, p),
        {"transparency": 2},
    ),
    "LA": ("png", integers(256, 2), bands("LA"), lambda p: on_white(p[..., :1], p[..., 1])[..., 0], {}),
    "P": ("png", INDEX, indexed, lambda p: PALETTE[p], {}),
    "P tRNS": (
        "png",
        INDEX,
        indexed,
        lambda p: np.where(p[..., None] == 3, 255, PALETTE[p]),
        {"transparency": 3},
    ),
    "P tRNS bytes": (
        "png",
        INDEX,
        indexed,
        lambda p: on_white(PALETTE[p], ALPHAS[p]),
        {"transparency": ALPHAS.tobytes()},
    ),
    "PA": (
        "tif",
        np.stack([INDEX, GREY], -1),
        indexed,
        lambda p: on_white(PALETTE[p[..., 0]], p[..., 1]),
        {},
    ),
    "RGB": ("png", COLOUR, Image.fromarray, lambda p: p, {}),
    "RGB tiff": ("tif", COLOUR, Image.fromarray, lambda p: p, {"compression": "tiff_lzw"}),
    "RGB webp": ("webp", COLOUR, Image.fromarray, lambda p: p, {"lossless": True}),
    "RGB tRNS": (
        "png",
        COLOUR // 128,
        Image.fromarray,
        lambda p: np.where((p == [1, 0, 1]).all(-1, keepdims=True), 255, p),
        {"transparency": (1, 0, 1)},
    ),
    "RGBA": ("png", integers(256, 4), Image.fromarray, lambda p: on_white(p[..., :3], p[..., 3]), {}),
    "CMYK": (
        "tif",
        integers(256, 4),
        bands("CMYK"),
        lambda p: (255.0 - p[..., :3]) * (255.0 - p[..., 3:]) / 255,
        {},
    ),
    "YCbCr": ("tif", integers(256, 3), bands("YCbCr"), ycbcr_to_rgb, {}),
    "I;16": ("png", DEEP, Image.fromarray, lambda p: p / 257, {}),
    "I;16 tiff": ("tif", DEEP, Image.fromarray, lambda p: p / 257, {}),
    "I;16B": ("tif", DEEP.astype(">u2"), Image.fromarray, lambda p: p / 257, {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_orientation_is_what_a_viewer_shows(mode, tmp_path):
    suffix, pixels, make, shown, options = MODES[mode]
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for orientation in SEEN_AT:
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            image = make(stored_as(pixels, orientation))
            path = tmp_path / folder / f"{orientation}.{suffix}"
            image.save(path, exif=exif, **options)
            with Image.open(path) as saved:
                assert saved.mode == mode.split()[0]
                assert saved.getexif()[ORIENTATION] == orientation
    source = data.load(f"folder:{tmp_path}")
    expected = np.asarray(shown(pixels), float)
    assert source.images.shape == (16, HEIGHT, WIDTH, 1 if expected.ndim == 2 else 3)
    for image in source.images:
        # half a level of rounding; Pillow's fixed-point alpha and YCbCr add up to one more
        assert np.abs(image.squeeze() - expected).max() <= (
            0.5 if mode[0] in "1LPRI" and mode != "LA" else 1.5
        )


def tiff(bits, photometric, values, *, sample_format=1):
    """A little-endian grey TIFF of one row, tag by tag."""
    tags = {256: len(values) * 8 // bits, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1}
    tags |= {279: len(values), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(values))
        + values
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


def one_row(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    image, decided = photos.read(tmp_path / name)
    return np.asarray(image)[0].tolist(), decided


def test_deep_grey_is_scaled_by_the_range_of_its_format(tmp_path):
    values = np.array([0, 257, 32768, 65535], "<u2")
    sixteen = "16 bits a channel, which were scaled to 8"
    assert one_row(tmp_path, "a.tif", tiff(16, 1, values.tobytes())) == ([0, 1, 128, 255], [sixteen])
    assert one_row(tmp_path, "b.tif", tiff(16, 0, values.tobytes())) == ([255, 254, 127, 0], [sixteen])
    twelve = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x10])  # 4095, 0, 2048, 16 in twelve bits each
    assert one_row(tmp_path, "c.tif", tiff(12, 1, twelve))[0] == [255, 0, 128, 1]
    pgm = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    assert one_row(tmp_path, "d.pgm", pgm) == ([0, 1, 128, 255], [sixteen])
    assert one_row(tmp_path, "e.pgm", b"P2 3 1 1000\n0 500 1000\n")[0] == [0, 128, 255]


def test_a_transparent_value_of_sixteen_bits_is_white(tmp_path):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 0, 0, 0, 0)) + chunk(
        b"tRNS", struct.pack(">H", 1000)
    )
    row = zlib.compress(b"\0" + np.array([0, 1000, 1001], ">u2").tobytes())
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    shown, decided = one_row(tmp_path, "a.png", png)
    assert shown == [0, 255, 4]
    assert "transparency, which was composited on white" in decided


@pytest.mark.parametrize(
    ("mode", "content"),
    [
        ("I", tiff(32, 1, np.array([0, 70_000], "<u4").tobytes())),
        ("I", tiff(16, 1, np.array([-5, 70], "<i2").tobytes(), sample_format=2)),
        ("F", tiff(32, 1, np.array([0, 0.5], "<f4").tobytes(), sample_format=3)),
        ("F", b"Pf 2 1 -1.0\n" + np.array([0, 0.5], "<f4").tobytes()),
    ],
)
def test_values_without_a_white_are_refused(tmp_path, mode, content):
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^mode '{mode}' .* no defined white: save it with 8 or 16 bits"):
        photos.read(tmp_path / "x.tif")


def test_lab_is_refused_by_name(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.new("LAB", (2, 2)).save(tmp_path / folder / "x.tif")
    with pytest.raises(ValueError, match=r"2 of the 2 image files .* a/x.tif \(mode 'LAB'.*b/x.tif"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_taken_and_counted(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(
        tmp_path / f"x.{suffix}",
        save_all=True,
        append_images=frames[1:],
        **{"lossless": True} if suffix == "webp" else {},
    )
    image, decided = photos.read(tmp_path / f"x.{suffix}")
    assert np.asarray(image)[0, 0].tolist() == [255, 0, 0]
    assert decided == ["several frames, of which the first was used"]


def test_broken_exif_does_not_hide_the_picture(tmp_path):
    for i, exif in enumerate(
        (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12")
    ):
        Image.new("L", (4, 2)).save(tmp_path / f"{i}.jpg", exif=exif)
        assert photos.read(tmp_path / f"{i}.jpg")[0].size == (4, 2)


@pytest.mark.parametrize(
    "limit", [40, 20]
)  # Pillow warns of 48 pixels above the first, and refuses above twice the other
def test_too_many_pixels_are_refused(tmp_path, monkeypatch, limit):
    Image.new("L", (8, 6)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"more pixels than Pillow's limit of {limit}"):
        photos.read(tmp_path / "x.png")


def test_the_content_decides_and_not_the_name(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert photos.read(tmp_path / "x.jpg")[0].size == (3, 2)


def test_what_is_no_file_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name in ("pipe", "gone", "loop"):
        with pytest.raises(ValueError, match="no regular file"):
            photos.read(tmp_path / f"{name}.png")


def test_every_damage_is_a_sentence_without_a_path(tmp_path):
    """Pillow raises OSError, SyntaxError, struct.error, IndexError and more, according to where a file is damaged."""
    image = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), np.uint8))
    reasons = []
    for suffix in ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm", "jp2"):
        path = tmp_path / f"x.{suffix}"
        image.save(path)
        good = path.read_bytes()
        for trial in range(30):
            bad = bytearray(good[: RNG.integers(len(good))] if trial % 2 else good)
            for at in RNG.integers(0, max(len(bad), 1), 4):
                bad[at : at + 1] = RNG.bytes(1)
            path.write_bytes(bad)
            try:
                photos.read(path)
            except ValueError as error:
                reasons.append(str(error))
    assert len(reasons) > 120
    assert all(reason.strip() and str(tmp_path) not in reason for reason in reasons)


def test_fit_covers_the_size_and_cuts_the_rest():
    stripes = np.repeat(np.array([10, 20, 30], np.uint8), 8)[None].repeat(
        8, 0
    )  # 8x24: three squares side by side
    assert np.array_equal(np.asarray(photos.fit(Image.fromarray(stripes), (8, 8))), np.full((8, 8), 20))
    assert np.array_equal(np.asarray(photos.fit(Image.fromarray(stripes.T), (8, 8))), np.full((8, 8), 20))
    # Of the same proportions nothing is cut: it is the plain resize. A ramp keeps its slope in the middle.
    ramp = np.arange(0, 160, 10, dtype=np.uint8)[None].repeat(16, 0)
    halved = np.asarray(photos.fit(Image.fromarray(ramp), (8, 8)))
    assert np.array_equal(halved, np.asarray(photos.stretch(Image.fromarray(ramp), (8, 8))))
    assert np.abs(halved[:, 2:6] - (ramp[:8, 4:12:2] + 5.0)).max() <= 1
    # What is kept of a disc is a disc, where a stretch would make an ellipse.
    y, x = np.mgrid[:60, :100]
    disc = Image.fromarray(((y - 29.5) ** 2 + (x - 49.5) ** 2 < 20**2).astype(np.uint8) * 255)
    inside = np.asarray(photos.fit(disc, (30, 30))) > 127
    assert inside.any(0).sum() == inside.any(1).sum() == 20
