"""16-bit colour, and TIFFs that Pillow cannot read: every kind comes out as the values that were written."""

import io
import logging
import struct
import sys
import zlib
from dataclasses import replace
from itertools import product

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from refusals import refused

from pipelines.errors import ImageError
from pipelines.pictures import images
from pipelines.pictures.reading import Reading

DEEP = Reading(
    black_level=0, white_level=65535, above_white="refuse", page=None, dicom_window="file", max_megapixels=90
)
BITS_12 = replace(DEEP, white_level=4095)
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
COLOUR = RNG.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
ORIENTATION = 274


def shown(values, black=0, white=65535):
    """By hand: round half up, as whole numbers."""
    steps = np.clip(values.astype(int), black, white) - black
    found = (510 * steps + white - black) // (2 * (white - black))
    return found if values.ndim == 3 else np.repeat(found[..., None], 3, axis=2)


def read(folder, content, reading=DEEP, name="a.tif"):
    (folder / name).write_bytes(content)
    return images.load_rgb(folder / name, reading)


def refusal(folder, content, reading=DEEP, name="a.tif"):
    (folder / name).write_bytes(content)
    return refused(folder / name, reading)


def tiff(*pages, **options):
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=options.pop("byteorder", "<")) as writer:
        for page in pages:
            writer.write(page, metadata=None, **options)
    return file.getvalue()


def rgb(values, **options):
    return tiff(values, photometric="rgb", **options)


# ------------------------------------------------------------------------------------------------------- 16-bit colour


def test_png_of_16_bit_colour(tmp_path):
    content = imagecodecs.png_encode(COLOUR)
    np.testing.assert_array_equal(read(tmp_path, content, name="a.png"), shown(COLOUR))
    window = replace(DEEP, black_level=1000, white_level=30000, above_white="clip")
    np.testing.assert_array_equal(read(tmp_path, content, window, "a.png"), shown(COLOUR, 1000, 30000))
    assert images.read(tmp_path / "a.png", DEEP).highest == COLOUR.max()


def test_a_value_of_colour_above_the_white_level_is_refused(tmp_path):
    content = imagecodecs.png_encode(np.array([[[1, 2, 4096]]], dtype=np.uint16))
    assert refusal(tmp_path, content, BITS_12, "a.png").startswith(
        "holds the value 4096, above `prepare.white_level` 4095; raise it"
    )


@pytest.mark.parametrize("grey", [False, True])
def test_transparent_16_bits_show_a_white_ground(tmp_path, grey):
    colour = np.array([[[0, 25700, 65535], [0, 25700, 65535], [0, 25700, 65535]]], dtype=np.uint16)
    colour = colour[..., 1:2] if grey else colour
    opacity = np.array([[[65535], [0], [13107]]], dtype=np.uint16)  # the last: 0.2
    content = imagecodecs.png_encode(np.dstack([colour, opacity]))
    expected = np.array([[0, 100, 255], [255, 255, 255], [204, 224, 255]])
    np.testing.assert_array_equal(
        read(tmp_path, content, name="a.png")[0], expected[:, [1, 1, 1]] if grey else expected
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_colour_is_turned_as_pillow_turns_8_bits(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray((COLOUR // 257).astype(np.uint8)).save(tmp_path / "8.png", exif=exif)
    expected = images.load_rgb(tmp_path / "8.png", DEEP)
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    content = imagecodecs.png_encode(COLOUR // 257 * np.uint16(257))
    end = content.index(b"IDAT") - 4
    turned = struct.pack(">I", len(chunk) - 4) + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    found = read(tmp_path, content[:end] + turned + content[end:], name="a.png")
    np.testing.assert_array_equal(found, expected)
    assert images.orientation(tmp_path / "a.png", None) == orientation
    content = rgb(COLOUR // 257 * np.uint16(257), extratags=[(ORIENTATION, 3, 1, orientation, True)])
    np.testing.assert_array_equal(read(tmp_path, content), expected)
    assert images.orientation(tmp_path / "a.tif", None) == orientation


KINDS = [{}, {"tile": (16, 16)}, {"planarconfig": "separate"}, {"byteorder": ">"}]


@pytest.mark.parametrize(
    ("compression", "kind"),
    [
        *product([None, "lzw", "deflate", "packbits", "zstd", "lzma"], KINDS),
        *product(["jpeg2000", "png", "lerc"], KINDS[:-1]),
    ],
    ids=str,
)
def test_tiff_of_16_bit_colour(tmp_path, compression, kind):
    values = COLOUR.transpose(2, 0, 1) if "planarconfig" in kind else COLOUR
    content = rgb(np.ascontiguousarray(values), compression=compression, **kind)
    np.testing.assert_array_equal(read(tmp_path, content), shown(COLOUR))


@pytest.mark.parametrize("compression", ["lzw", "deflate"])
def test_a_predictor(tmp_path, compression):
    np.testing.assert_array_equal(read(tmp_path, rgb(COLOUR, compression=compression, predictor=True)), shown(COLOUR))


@pytest.mark.parametrize(("kind", "opacity"), [("unassalpha", True), ("unspecified", False)])
def test_a_fourth_channel_of_a_tiff(tmp_path, kind, opacity):
    content = rgb(np.dstack([COLOUR, np.zeros_like(GREY)]), extrasamples=[kind])
    expected = np.full_like(COLOUR, 255) if opacity else shown(COLOUR)
    np.testing.assert_array_equal(read(tmp_path, content), expected)


# --------------------------------------------------------------------------------------------------- rare kinds of TIFF


def packed(values, bits):
    """Each row's values bit after bit, the highest first, as TIFF has it in either byte order."""
    rows = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    rows = [row + "0" * (-len(row) % 8) for row in rows]
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)


def write_by_hand(values, bits, photometric, order):
    rows, (height, width) = packed(values, bits), values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 122)]
    tags += [(277, 3, 1), (278, 3, height), (279, 4, len(rows))]
    entries = [struct.pack(f"{order}HHI", tag, kind, 1) + filled(order, kind, value) for tag, kind, value in tags]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    return head + b"".join(entries) + bytes(4) + rows


def filled(order, kind, value):
    return struct.pack(f"{order}I", value) if kind == 4 else struct.pack(f"{order}HH", value, 0)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("width", [30, 31])
def test_packed_bits(tmp_path, bits, photometric, order, width):
    white = 2**bits - 1
    values = RNG.integers(0, white + 1, (7, width), dtype=np.uint16)
    found = read(tmp_path, write_by_hand(values, bits, photometric, order), replace(DEEP, white_level=white))
    np.testing.assert_array_equal(found, shown(white - values if photometric == 0 else values, 0, white))


@pytest.mark.parametrize("kind", [{}, {"tile": (16, 16)}, {"photometric": "miniswhite"}], ids=str)
@pytest.mark.parametrize("compression", ["jpeg2000", "png", "lerc", "jpegxl"])
def test_grey_that_pillow_cannot_decode(tmp_path, compression, kind):
    content = tiff(GREY, compression=compression, **{"photometric": "minisblack"} | kind)
    expected = 65535 - GREY if kind.get("photometric") == "miniswhite" else GREY
    np.testing.assert_array_equal(read(tmp_path, content), shown(expected))


@pytest.mark.parametrize("colour", [False, True])
def test_jpeg_of_12_bits(tmp_path, colour):
    rows, columns = np.mgrid[:64, :80]
    values = (rows * 40 + columns * 10).astype(np.uint16)
    values = np.dstack([values, values[::-1], values[:, ::-1]]) if colour else values
    options = {"photometric": "rgb"} if colour else {"photometric": "minisblack"}
    content = tiff(values, compression="jpeg", compressionargs={"level": 98}, bitspersample=12, **options)
    found = read(tmp_path, content, BITS_12)
    assert np.abs(found.astype(int) - shown(values, 0, 4095)).max() <= 2


def test_8_bits_in_webp_are_as_they_are(tmp_path):
    values = (COLOUR // 257).astype(np.uint8)
    content = rgb(values, compression="webp", compressionargs={"lossless": True})
    np.testing.assert_array_equal(read(tmp_path, content), values)
    assert images.read(tmp_path / "a.tif", DEEP).highest is None


@pytest.mark.parametrize("kind", [{}, {"tile": (16, 16)}, {"byteorder": ">"}], ids=str)
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits"])
def test_what_pillow_reads_right_stays_with_pillow(tmp_path, monkeypatch, compression, kind):
    """The same bytes, and without the extra."""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    colour = (COLOUR // 257).astype(np.uint8)
    np.testing.assert_array_equal(read(tmp_path, rgb(colour, compression=compression, **kind)), colour)
    grey = tiff(GREY, photometric="minisblack", compression=compression, **kind)
    np.testing.assert_array_equal(read(tmp_path, grey), shown(GREY))
    planes = rgb(np.ascontiguousarray(colour.transpose(2, 0, 1)), planarconfig="separate", compression=compression)
    np.testing.assert_array_equal(read(tmp_path, planes), colour)


def test_without_the_extra_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert refusal(tmp_path, rgb(COLOUR)) == (
        "damaged, or a kind of TIFF that needs tifffile and imagecodecs; pip install 'blemish[images]', or save it anew"
    )


# --------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("deep", [False, True])
def test_a_page_is_named_or_the_file_is_refused(tmp_path, deep):
    pages = [COLOUR, COLOUR[::-1], COLOUR[:, ::-1]]
    pages = pages if deep else [(page // 257).astype(np.uint8) for page in pages]
    content = tiff(*pages, photometric="rgb")
    told = "holds 3 pages; save the one to read by itself or, for pictures, set `prepare.page` to it (0 is the first)"
    assert refusal(tmp_path, content) == told
    for number, page in enumerate(pages):
        found = read(tmp_path, content, replace(DEEP, page=number))
        np.testing.assert_array_equal(found, shown(page) if deep else page)
    told = "holds 3 pages, none at `prepare.page` 3, which counts from 0; lower it"
    assert refusal(tmp_path, content, replace(DEEP, page=3)) == told


def test_pages_of_unlike_kinds(tmp_path):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write((GREY // 257).astype(np.uint8), photometric="minisblack", metadata=None)
        writer.write(COLOUR, photometric="rgb", metadata=None)
        writer.write(GREY, photometric="minisblack", compression="jpeg2000", metadata=None)
        writer.write(GREY[::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    for number, expected in enumerate([GREY // 257 * 257, COLOUR, GREY]):
        found = read(tmp_path, file.getvalue(), replace(DEEP, page=number))
        np.testing.assert_array_equal(found, shown(expected))
    assert "holds 3 pages, none at" in refusal(tmp_path, file.getvalue(), replace(DEEP, page=3))


def test_a_thumbnail_is_no_page(tmp_path):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(COLOUR, photometric="rgb", metadata=None)
        writer.write(COLOUR[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read(tmp_path, file.getvalue()), shown(COLOUR))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp", "a.tif"])
def test_a_file_of_one_page_has_page_0(tmp_path, name):
    Image.new("L", (4, 4), 9).save(tmp_path / name)
    assert images.load_rgb(tmp_path / name, replace(DEEP, page=0)).shape == (4, 4, 3)
    with pytest.raises(ImageError, match=r"holds 1 page, none at `prepare.page` 1, which counts from 0; lower it"):
        images.load_rgb(tmp_path / name, replace(DEEP, page=1))


def test_a_page_is_turned_by_its_own_tag(tmp_path):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(GREY, photometric="minisblack", metadata=None)
        writer.write(GREY, photometric="minisblack", metadata=None, extratags=[(ORIENTATION, 3, 1, 6, True)])
    upright = read(tmp_path, file.getvalue(), replace(DEEP, page=1))
    np.testing.assert_array_equal(upright, shown(np.rot90(GREY, -1)))
    assert [images.orientation(tmp_path / "a.tif", page) for page in (0, 1)] == [1, 6]


def test_a_mask_has_one_page(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(GREY, GREY, photometric="minisblack"))
    with pytest.raises(ImageError, match="holds 2 pages; save the one to read by itself"):
        images.load_mask(tmp_path / "a.tif")


# ------------------------------------------------------------------------------------------------------ masks, refusals


def test_masks_that_pillow_cannot_read(tmp_path):
    mask = np.zeros((6, 9), dtype=bool)
    mask[1:3, 2:7] = True
    deep = mask.astype(np.uint16) * 1000
    colour = np.dstack([np.zeros_like(deep), deep, np.zeros_like(deep)])
    stored = {
        "planes": rgb(colour),
        "grey": tiff(deep, photometric="minisblack", compression="jpeg2000"),
        "bytes": tiff((deep // 4).astype(np.uint8), photometric="minisblack", compression="png"),
        "inverted": tiff(65535 - deep, photometric="miniswhite", compression="jpeg2000"),
        "opacity": rgb(np.dstack([colour + np.uint16(1), deep]), extrasamples=["unassalpha"]),
    }
    for name, content in stored.items():
        (tmp_path / "a.tif").write_bytes(content)
        np.testing.assert_array_equal(images.load_mask(tmp_path / "a.tif"), mask, err_msg=name)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(colour))
    np.testing.assert_array_equal(images.load_mask(tmp_path / "a.png"), mask)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_point_is_refused_and_nan_is_counted(tmp_path, dtype):
    values = np.ones((4, 5), dtype=dtype)
    told = "save it with 8 or 16 bits per channel"
    assert refusal(tmp_path, tiff(values)) == f"floating point is not supported; {told}"
    values[1, 2] = np.nan
    assert refusal(tmp_path, tiff(values)) == (
        f"floating point, with NaN (no number) at 1 place; fill them, and {told}"
    )
    values[0] = np.nan
    assert "NaN (no number) at 6 places; fill them" in refusal(tmp_path, tiff(values))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (rgb(np.dstack([COLOUR, GREY]), extrasamples=["assocalpha"]), "colour multiplied by its transparency"),
        (rgb(np.dstack([COLOUR, GREY, GREY]), extrasamples=["unassalpha", "unspecified"]), "or further channels"),
        (tiff(np.dstack([COLOUR, GREY]), photometric="separated"), "4 channels and photometric interpretation SEPAR"),
        (tiff(COLOUR, photometric="cielab"), "3 channels and photometric interpretation CIELAB is not supported"),
        (tiff((COLOUR[..., 0] // 1024).astype(np.uint8), bitspersample=6), "6 bits per channel are not supported"),
        (tiff(GREY.astype(np.uint64) * 9, photometric="minisblack"), "above 65535; save it as unsigned 16-bit"),
        (tiff(-GREY.astype(np.int64), photometric="minisblack"), "holds the negative value"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(tmp_path, content, told):
    assert told in refusal(tmp_path, content)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "jpeg2000", "jpeg"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.995])
def test_truncated_tiffs(tmp_path, compression, kept, caplog):
    values = RNG.integers(0, 4096, (64, 64, 3), dtype=np.uint16)
    bits = {"bitspersample": 12} if compression == "jpeg" else {}
    content = rgb(values, compression=compression, rowsperstrip=16, **bits)
    assert read(tmp_path, content).shape == (64, 64, 3)
    with caplog.at_level(logging.INFO):
        assert refusal(tmp_path, content[: int(len(content) * kept)]).startswith("damaged image (")
    assert caplog.records == []


@pytest.mark.parametrize("compression", ["lzw", "deflate", "zstd", "jpeg"])
def test_a_hole_in_a_tiff(tmp_path, compression):
    values = RNG.integers(0, 4096, (64, 64, 3), dtype=np.uint16)
    bits = {"bitspersample": 12} if compression == "jpeg" else {}
    content = bytearray(rgb(values, compression=compression, **bits))
    content[4000:4600] = bytes(600)
    assert "damaged image (" in refusal(tmp_path, bytes(content))


def test_a_strip_that_is_not_there(tmp_path):
    content = rgb(COLOUR, rowsperstrip=5)
    (tmp_path / "a.tif").write_bytes(content)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags["StripByteCounts"].overwrite([900, 900, 0, 900])
    assert "its end is missing" in refusal(tmp_path, (tmp_path / "a.tif").read_bytes())


def test_the_limit_holds_before_anything_is_decoded(tmp_path, monkeypatch):
    values = np.zeros((1000, 1001, 3), dtype=np.uint16)
    content = rgb(values, compression="deflate")
    assert read(tmp_path, content, replace(DEEP, max_megapixels=2)).shape == values.shape
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *_, **__: pytest.fail("was decoded"))
    found = refusal(tmp_path, content, replace(DEEP, max_megapixels=1))
    assert found.startswith("1,001 x 1,000 pixels are 1.0 megapixels, above `prepare.max_megapixels` 1; set it to 2,")
    monkeypatch.setattr(imagecodecs, "png_decode", lambda *_, **__: pytest.fail("was decoded"))
    found = refusal(tmp_path, imagecodecs.png_encode(values), replace(DEEP, max_megapixels=1), "a.png")
    assert found.startswith("1,001 x 1,000 pixels are 1.0 megapixels, above `prepare.max_megapixels` 1; set it to 2,")
