"""Every mode of pillow has a right value, or a refusal that names mode and range; any bytes give an image or that."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import GREY, first, message, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from nvae_lowmem.data.decode import UnreadableImage, decode
from nvae_lowmem.errors import ConfigError

SIZE = (4, 4)


def saved(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(colour_type: int, depth: int, values: Any, *chunks: bytes) -> bytes:
    """A PNG of 1 x n pixels in one row; values: big-endian bytes of the row."""
    row = np.asarray(values, dtype=">u2" if depth == 16 else np.uint8).tobytes()
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    header = struct.pack(">IIBBBBB", len(row) * 8 // depth // channels, 1, depth, colour_type, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    parts = [b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), *chunks, pixels, png_chunk(b"IEND", b"")]
    return b"".join(parts)


# --- right values -----------------------------------------------------------------------------------------------------

RED, GREY_90 = (200, 30, 40), (90, 90, 90)
RIGHT: dict[str, tuple[bytes, tuple[int, ...], int]] = {
    # name: (file, the colour it has all over, what lossy conversion may change)
    "1 white": (saved(Image.new("1", SIZE, 1), "PNG"), (255,), 0),
    "1 black": (saved(Image.new("1", SIZE, 0), "TIFF"), (0,), 0),
    "1 transparent": (saved(Image.new("1", SIZE, 0), "PNG", transparency=0), (255,), 0),
    "L": (saved(Image.new("L", SIZE, 90), "PNG"), (90,), 0),
    "L transparent": (saved(Image.new("L", SIZE, 90), "PNG", transparency=90), (255,), 0),
    "LA opaque": (saved(Image.new("LA", SIZE, (90, 255)), "PNG"), (90,), 0),
    "LA half": (saved(Image.new("LA", SIZE, (0, 128)), "PNG"), (127,), 1),
    "P colour": (saved(Image.new("RGB", SIZE, RED).quantize(4), "PNG"), RED, 0),
    "P grey": (saved(Image.new("RGB", SIZE, GREY_90).quantize(4), "PNG"), (90,), 0),
    "P transparent": (saved(Image.new("RGB", SIZE, RED).quantize(4), "PNG", transparency=0), (255,), 0),
    "P alpha bytes": (saved(Image.new("RGB", SIZE, RED).quantize(4), "PNG", transparency=bytes([255])), RED, 0),
    "PA": (saved(Image.new("RGBA", SIZE, (*RED, 255)).convert("PA"), "TIFF"), RED, 0),
    "RGB": (saved(Image.new("RGB", SIZE, RED), "PNG"), RED, 0),
    "RGB transparent": (saved(Image.new("RGB", SIZE, RED), "PNG", transparency=RED), (255, 255, 255), 0),
    "RGBX": (saved(Image.new("RGBX", SIZE, (*RED, 0)), "TIFF"), RED, 0),
    "RGBA clear": (saved(Image.new("RGBA", SIZE, (*RED, 0)), "PNG"), (255, 255, 255), 0),
    "RGBA half": (saved(Image.new("RGBA", SIZE, (200, 0, 0, 128)), "PNG"), (227, 127, 127), 1),
    "CMYK": (saved(Image.new("RGB", SIZE, RED).convert("CMYK"), "TIFF"), RED, 0),
    "YCbCr": (saved(Image.new("RGB", SIZE, RED).convert("YCbCr"), "TIFF"), RED, 2),
    "LAB": (saved(Image.new("RGB", SIZE, RED).convert("LAB"), "TIFF"), RED, 3),
    "I;16 PNG": (png(0, 16, [90 * 256 + 17] * 4), (90,), 0),
    "I;16 PNG white": (png(0, 16, [65535] * 4), (255,), 0),
    "I;16 PNG transparent": (png(0, 16, [9000] * 4, png_chunk(b"tRNS", struct.pack(">H", 9000))), (255,), 0),
    "I;16 TIFF": (saved(Image.fromarray(np.full(SIZE, 90 * 256, np.uint16)), "TIFF"), (90,), 0),
    "I;16B TIFF": (saved(Image.fromarray(np.full(SIZE, 90 * 256, ">u2")), "TIFF"), (90,), 0),
    "I;16 TIFF, white is zero": (
        saved(Image.fromarray(np.full(SIZE, 65535, np.uint16)), "TIFF", tiffinfo={262: 0}), (0,), 0
    ),
    "I PGM": (b"P5 1 1 65535\n" + struct.pack(">H", 90 * 256), (90,), 0),
    "I PGM of 12 bits": (b"P5 1 1 4095\n" + struct.pack(">H", 2048), (128,), 1),
    "RGB of 16 bits": (png(2, 16, [v * 256 + 9 for v in RED]), RED, 0),
    "LA of 16 bits": (png(4, 16, [90 * 256, 65535]), (90,), 0),
    "black of 16 bits": (png(0, 16, [0] * 4), (0,), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_every_mode_has_its_right_value(name: str) -> None:
    data, colour, slack = RIGHT[name]
    picture = decode(data, name)
    assert picture.mode in ("L", "RGB")
    values = np.asarray(picture.convert("RGB" if len(colour) == 3 else picture.mode)).astype(int)
    assert values.ndim == 2 or len(colour) == 3 or (values == values[..., :1]).all()
    wanted = np.array(colour) if values.ndim == 3 else np.array(colour[0])
    assert np.abs(values - wanted).max() <= slack


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("HSV", (0, 255, 200), (200, 0, 0)), ("RGBa", (100, 0, 0, 128), (226, 127, 127)), ("La", (45, 128), (172,) * 3)],
)
def test_modes_that_no_file_has_become_grey_or_rgb_too(
    mode: str, colour: tuple[int, ...], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may hand such pictures on: they go through the same function."""
    from nvae_lowmem.data.decode import _grey_or_rgb

    found = np.asarray(_grey_or_rgb(Image.new(mode, SIZE, colour)).convert("RGB")).astype(int)
    assert np.abs(found - np.array(expected)).max() <= 2


# --- ranges that are not agreed upon ----------------------------------------------------------------------------------

INT32 = np.array([[0, 100], [200, 255]], np.int32)
FLOATS = np.array([[0.0, 0.5], [0.25, 1.0]], np.float32)
DEEP = np.array([[0, 1000], [2048, 4095]], np.uint16)


@pytest.mark.parametrize(
    ("values", "format", "said"),
    [
        (INT32, "TIFF", "mode I, values 0 to 255: which value is white is not known: set data.white"),
        (INT32 - 9, "TIFF", "mode I, values -9 to 246"),
        (FLOATS, "TIFF", "mode F, values 0 to 1: which value is white"),
        (FLOATS * np.nan, "TIFF", "not finite"),
        (INT32.astype(np.uint16), "PNG", "I;16, values 0 to 255 of 65,535 would come out black: set data.white = 255"),
        (DEEP, "PNG", "values 0 to 4,095 of 65,535 would come out black: set data.white = 4095"),
        (DEEP // 4, "TIFF", "set data.white = 1023"),
    ],
)  # fmt: skip
def test_a_range_is_not_guessed(values: np.ndarray, format: str, said: str) -> None:
    with pytest.raises((ConfigError, UnreadableImage)) as caught:
        decode(saved(Image.fromarray(values), format), "it")
    assert "it: " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "format", "white", "expected"),
    [
        (INT32, "TIFF", 255, INT32),
        (INT32.astype(np.uint16), "PNG", 255, INT32),
        (INT32.astype(np.uint16), "PNG", 65535, INT32 * 0),
        (DEEP, "PNG", 4095, DEEP >> 4),
        (FLOATS, "TIFF", 1, np.array([[0, 128], [64, 255]])),
        (FLOATS * 10, "TIFF", 10, np.array([[0, 128], [64, 255]])),
        (INT32, "TIFF", 510, INT32 * 256 // 511),
    ],
)
def test_white_says_what_the_range_is(values: np.ndarray, format: str, white: float, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(decode(saved(Image.fromarray(values), format), "it", white)), expected)


def test_values_beyond_white_are_refused_with_their_range() -> None:
    for values in (INT32 * 2, INT32 - 1):
        with pytest.raises(ConfigError, match=r"mode I, values .* lie outside 0 to data\.white = 255"):
            decode(saved(Image.fromarray(values), "TIFF"), "it", 255)


@pytest.mark.parametrize(("colour_type", "values"), [(2, [1, 2, 255]), (4, [200, 65535]), (6, [1, 2, 3, 65535])])
def test_pictures_whose_lower_eight_bits_alone_are_used_are_refused(colour_type: int, values: list[int]) -> None:
    with pytest.raises(UnreadableImage, match="of 16 bits, all values from 0 to 255"):
        decode(png(colour_type, 16, values), "it")


def test_data_white_reaches_folders(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.tiff").write_bytes(saved(Image.fromarray(np.full((8, 8), 40 * i, np.int32)), "TIFF"))
    assert "set data.white" in message(tmp_path, GREY)
    assert opened(tmp_path, GREY, white=255).train.images([0]).shape == (1, 1, 8, 8)
    np.testing.assert_array_equal(first(tmp_path, GREY, white=80), np.zeros((1, 8, 8)))


# --- metadata ---------------------------------------------------------------------------------------------------------


def large_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (3 << 20), zip=True)
    info.add_itxt("XML:com.adobe.xmp", "y" * (3 << 20), zip=True)
    return info


@pytest.mark.parametrize(
    "options",
    [{"pnginfo": large_text()}, {"icc_profile": b"z" * (3 << 20)}, {"exif": b"Exif\0\0damaged"}],
    ids=["text", "profile", "exif"],
)
def test_large_or_damaged_metadata_is_no_reason_to_do_without_the_pixels(options: dict[str, Any]) -> None:
    data = saved(Image.new("RGB", SIZE, RED), "PNG", **options)
    assert decode(data, "it").getpixel((0, 0)) == RED


def test_a_png_with_large_text_keeps_its_transparency_and_its_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (4, 2), RED)
    picture.putpixel((0, 0), (1, 2, 3))
    data = saved(picture, "PNG", pnginfo=large_text(), exif=exif, transparency=(1, 2, 3))
    found = decode(data, "it")
    assert found.size == (2, 4) and found.getpixel((1, 0)) == (255, 255, 255) and found.getpixel((0, 0)) == RED


def test_damaged_text_in_a_png_is_passed_over_but_damaged_pixels_are_not() -> None:
    data = saved(Image.new("RGB", (64, 64), RED), "PNG", pnginfo=large_text())
    place = data.index(b"zTXt") + 20
    damaged = data[:place] + bytes(20) + data[place + 20 :]
    assert decode(damaged, "it").getpixel((0, 0)) == RED
    with pytest.raises(UnreadableImage, match="^it: "):
        decode(data[: data.index(b"IDAT") + 10], "it")


# --- any bytes --------------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "GIF", "BMP", "WEBP", "TGA", "PCX", "ICO", "SGI")
SEEDS = [data for data, _, _ in RIGHT.values()]
SEEDS += [saved(Image.new("RGB", (16, 16), RED), format) for format in FORMATS]


@st.composite
def mutated(draw: Callable[..., Any]) -> bytes:
    """A good file with some bytes changed, cut or doubled."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del data[draw(st.integers(1, len(data))) :]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # pillow's own, about damaged metadata
@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), mutated()), st.sampled_from([0.0, 1.0, 255.0, 1e12]))
def test_any_bytes_give_an_image_or_a_message(data: bytes, white: float) -> None:
    try:
        picture = decode(data, "it", white)
    except (UnreadableImage, ConfigError) as error:
        assert "it: " in str(error)
    else:
        assert picture.mode in ("L", "RGB")
