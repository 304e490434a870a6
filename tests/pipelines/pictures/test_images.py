"""Every kind of file comes out as the pixels that a viewer shows, and what cannot be read is one clear line."""

import os
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from anomaly_models.base import Config
from anomaly_models.common.sizes import Size
from pipelines.errors import ImageError
from pipelines.pictures import images
from pipelines.pictures.reading import Reading

WHITE = Reading(
    black_level=0, white_level=65535, above_white="refuse", page=None, dicom_window="file", max_megapixels=None
)
ORIENTATION = 0x0112


def white(level):
    return replace(WHITE, white_level=level)


def gradient(height=20, width=30):
    """RGB (H, W, 3) in which every pixel differs from its mirror images."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 10, columns * 8, rows + columns], axis=2).astype(np.uint8)


def grey_as_rgb(grey):
    return np.repeat(np.asarray(grey, dtype=np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".webp", ".PNG"])
def test_rgb_of_every_lossless_format(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(gradient()).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    loaded = images.load_rgb(path, WHITE)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, gradient())


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_jpeg(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(gradient()).save(path, quality=95, subsampling=0)
    assert np.abs(images.load_rgb(path, WHITE).astype(int) - gradient()).max() < 12


def test_8_bit_and_1_bit_grey(tmp_path):
    grey = gradient()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "grey.png", WHITE), grey_as_rgb(grey))
    Image.fromarray(grey > 90).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "bit.png", WHITE), grey_as_rgb((grey > 90) * 255))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_by_the_white_level_and_rounded_half_up(tmp_path, suffix):
    values = np.array([[0, 8, 9, 2048, 4094, 4095]], dtype=np.uint16)  # 4095 / 255 = 16.06: 8 is below a half, 9 above
    path = tmp_path / f"a{suffix}"
    Image.fromarray(values).save(path)
    np.testing.assert_array_equal(images.load_rgb(path, white(4095)), grey_as_rgb([[0, 0, 1, 128, 255, 255]]))
    Image.fromarray(np.array([[1, 3, 510]], dtype=np.uint16)).save(path)
    np.testing.assert_array_equal(images.load_rgb(path, white(510)), grey_as_rgb([[1, 2, 255]]))  # 0.5, 1.5: half up


def test_16_bit_big_endian_and_32_bit_grey(tmp_path):
    values = np.array([[0, 257, 65535]])
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "int.tif")
    for name in ("big.tif", "int.tif"):
        np.testing.assert_array_equal(images.load_rgb(tmp_path / name, WHITE), grey_as_rgb([[0, 1, 255]]))


def test_scaling_comes_before_resizing(tmp_path):
    values = np.tile(np.array([[0, 4095]], dtype=np.uint16), (8, 4))
    Image.fromarray(values).save(tmp_path / "a.png")
    resized = images.resize_rgb(images.load_rgb(tmp_path / "a.png", white(4095)), Size.square(4), "bilinear")
    expected = Image.fromarray(grey_as_rgb(np.tile([[0, 255]], (8, 4)))).resize((4, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized, np.asarray(expected))


def test_a_value_above_the_white_level_is_refused(tmp_path):
    Image.fromarray(np.array([[0, 4096]], dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: holds the value 4096, above `prepare\.white_level` 4095"):
        images.load_rgb(tmp_path / "a.png", white(4095))


def test_a_value_above_the_white_level_is_white_where_that_is_wanted(tmp_path):
    Image.fromarray(np.array([[0, 4095, 4096, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    clipped = replace(white(4095), above_white="clip")
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "a.png", clipped), grey_as_rgb([[0, 255, 255, 255]]))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_window_begins_at_the_black_level(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.array([[0, 1000, 1001, 1002, 1255, 1509, 1510]], dtype=np.uint16)).save(path)
    window = replace(WHITE, black_level=1000, white_level=1510)  # two values a shade: 1001 is 0.5, 1255 is 127.5
    np.testing.assert_array_equal(images.load_rgb(path, window), grey_as_rgb([[0, 0, 1, 1, 128, 255, 255]]))


@pytest.mark.parametrize(("order", "mark"), [("<", "II"), (">", "MM")])
def test_a_window_is_turned_round_where_white_is_zero(tmp_path, order, mark):
    values = np.array([[0, 1000, 1002, 1510, 2000]], dtype=np.uint16)
    write_tiff(tmp_path / f"{mark}.tif", values, 0, order)
    window = replace(WHITE, black_level=1000, white_level=1510, above_white="clip")
    shown = images.load_rgb(tmp_path / f"{mark}.tif", window)
    np.testing.assert_array_equal(shown, grey_as_rgb([[255, 255, 254, 0, 0]]))


def test_a_window_is_for_more_than_8_bits(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    window = replace(WHITE, black_level=1000, white_level=1510)
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "a.png", window), gradient())


def test_a_value_above_16_bits_is_not_answered_by_a_white_level_that_cannot_be(tmp_path):
    Image.fromarray(np.array([[0, 177616]], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"holds the value 177616, above 65535; save it as unsigned 16-bit grey"):
        images.load_rgb(tmp_path / "a.tif", white(4095))


def test_negative_values_are_refused(tmp_path):
    Image.fromarray(np.array([[-5, 7]], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="negative value -5"):
        images.load_rgb(tmp_path / "a.tif", WHITE)


def test_palette(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 10, 20, 30, 210, 40, 50, 60, 220])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        images.load_rgb(tmp_path / "a.png", WHITE)[0], [[200, 10, 20], [30, 210, 40], [50, 60, 220]]
    )
    palette.save(tmp_path / "b.png", transparency=1)
    np.testing.assert_array_equal(
        images.load_rgb(tmp_path / "b.png", WHITE)[0], [[200, 10, 20], [255, 255, 255], [50, 60, 220]]
    )
    palette.save(tmp_path / "c.png", transparency=bytes([255, 0, 255]))
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "c.png", WHITE)[0, 1], [255, 255, 255])


def test_alpha_shows_a_white_ground(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    expected = [[10, 20, 30], [255, 255, 255], [206, 208, 210]]  # 51 / 255 = 0.2
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "rgba.png", WHITE)[0], expected)
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "la.png")
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "la.png", WHITE)[0], [[10] * 3, [255] * 3, [206] * 3])


@pytest.mark.parametrize(("mode", "transparent"), [("RGB", (10, 20, 30)), ("L", 10)])
def test_a_transparent_colour_shows_a_white_ground(tmp_path, mode, transparent):
    image = Image.new(mode, (2, 1), transparent)
    image.putpixel((1, 0), (1, 2, 3) if mode == "RGB" else 1)
    image.save(tmp_path / "a.png", transparency=transparent)
    expected = [[255] * 3, [1, 2, 3] if mode == "RGB" else [1] * 3]
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "a.png", WHITE)[0], expected)


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cmyk.paste((0, 0, 0, 0), (8, 0, 16, 16))
    cmyk.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "a.tif", WHITE)[0, [0, 15]], [[0, 255, 255], [255] * 3])
    cmyk.save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(
        images.load_rgb(tmp_path / "a.jpg", WHITE)[0, [0, 15]], [[0, 255, 255], [255] * 3], atol=3
    )


UPRIGHT = {  # what a viewer does with the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(gradient()).save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(images.load_rgb(path, WHITE), UPRIGHT[orientation](gradient()))


def test_exif_orientation_of_jpeg_and_16_bit(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    turned = images.load_rgb(tmp_path / "a.jpg", WHITE)
    assert np.abs(turned.astype(int) - UPRIGHT[6](gradient())).max() < 12
    values = np.arange(6, dtype=np.uint16).reshape(2, 3)
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "a.png", white(255))[..., 0], UPRIGHT[6](values))


@pytest.mark.parametrize("resize", ["bilinear", "lanczos"])
def test_resize_is_pillows_antialiased(resize):
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    expected = Image.fromarray(noise).resize((16, 16), Image.Resampling[resize.upper()])
    resized = images.resize_rgb(noise, Size.square(16), resize)
    np.testing.assert_array_equal(resized, np.asarray(expected))
    assert resized.std() < 0.6 * noise.std()  # without antialiasing, noise would keep its contrast


def test_models_and_pictures_know_the_same_filters():
    assert get_args(Config.model_fields["resize"].annotation) == get_args(images.Filter)


def test_to_input_is_exactly_x_over_255():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    tensor = images.to_input(every)
    assert tensor.dtype == np.float32
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.flags.c_contiguous
    np.testing.assert_array_equal(tensor[0, 1].ravel(), (np.arange(256) / 255).astype(np.float32))
    two = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.to_input(two)[1, 2, 3, 4], np.float32(two[1, 3, 4, 2] / 255))


def test_masks_of_every_kind(tmp_path):
    mask = np.zeros((6, 9), dtype=bool)
    mask[1:3, 2:7] = True
    stored = {
        "bit.png": Image.fromarray(mask),
        "byte.png": Image.fromarray(mask.astype(np.uint8) * 255),
        "class_index.png": Image.fromarray(mask.astype(np.uint8) * 3),
        "deep.png": Image.fromarray(mask.astype(np.uint16) * 1000),
        "rgb.png": Image.fromarray(mask[..., None] * np.array([0, 0, 7], dtype=np.uint8)),
        "rgba.png": Image.fromarray(np.dstack([np.full((6, 9, 3), 255, np.uint8), mask.astype(np.uint8) * 255])),
        "byte.bmp": Image.fromarray(mask.astype(np.uint8) * 255),
        "bit.tif": Image.fromarray(mask),
    }
    palette = Image.fromarray(mask.astype(np.uint8))
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    stored["palette.png"] = palette
    inverted = Image.fromarray((~mask).astype(np.uint8)).convert("P")
    inverted.putpalette([255, 255, 255, 0, 0, 0])  # the colour counts, not its place in the palette
    stored["inverted_palette.png"] = inverted
    for name, image in stored.items():
        image.save(tmp_path / name)
        loaded = images.load_mask(tmp_path / name)
        assert loaded.dtype == bool, name
        np.testing.assert_array_equal(loaded, mask, err_msg=name)


def test_masks_are_upright(tmp_path):
    mask = np.zeros((4, 6), dtype=bool)
    mask[0, 0] = True
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(mask).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(images.load_mask(tmp_path / "a.png"), UPRIGHT[6](mask))


def test_a_lossy_mask_is_refused(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=r"a\.jpg: not a PNG, BMP or TIFF image: a mask that is compressed with loss"):
        images.load_mask(tmp_path / "a.jpg")


def test_resize_mask_takes_the_nearest_pixel():
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, :4] = True
    np.testing.assert_array_equal(images.resize_mask(mask, Size.square(4)), mask[1::2, 1::2])
    np.testing.assert_array_equal(images.resize_mask(mask, Size.square(16)), mask.repeat(2, 0).repeat(2, 1))
    assert images.resize_mask(mask, Size.square(4)).dtype == bool


def noise_file(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files(tmp_path, suffix, kept):
    path = tmp_path / f"a{suffix}"
    noise_file(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ImageError) as caught:
        images.load_rgb(path, WHITE)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_empty_missing_and_text_files(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png: the file is empty; copy it again or remove it"):
        images.load_rgb(tmp_path / "empty.png", WHITE)
    (tmp_path / "text.png").write_text("not an image at all")
    with pytest.raises(ImageError, match=r"text\.png: not a PNG, JPEG, BMP, TIFF or WEBP image"):
        images.load_rgb(tmp_path / "text.png", WHITE)
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(No such file"):
        images.load_rgb(tmp_path / "gone.png", WHITE)
    with pytest.raises(ImageError, match=r"text\.png"):
        images.load_mask(tmp_path / "text.png")


def write_png(path, header, pixels):
    """A PNG that Pillow itself would not write."""
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


@pytest.mark.parametrize(("side", "megapixels"), [(10_000, "100.0"), (60_000, "3,600.0")])
def test_decompression_bombs(tmp_path, side, megapixels):
    """Pillow would warn about the one and refuse the other, by a number of pixels that no setting changes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    write_png(path, header, b"")
    found = f"{path}: {side:,} x {side:,} pixels are {megapixels} megapixels, above "
    with pytest.raises(ImageError) as photo:
        images.load_rgb(path, WHITE)
    assert str(photo.value) == f"{found}90 for photos; make it smaller or remove it"
    with pytest.raises(ImageError) as picture:
        images.load_rgb(path, replace(WHITE, max_megapixels=95))
    remedy = f"set it to {side * side // 10**6}, if the memory allows, or make the picture smaller"
    assert str(picture.value) == f"{found}`prepare.max_megapixels` 95; {remedy}"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_the_limit_holds_for_every_format_and_for_masks(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.new("L", (1001, 1000)).save(path)
    loads = [lambda limit: images.load_rgb(path, replace(WHITE, max_megapixels=limit))]
    if suffix in {".png", ".bmp", ".tif"}:
        loads.append(lambda limit: images.load_mask(path, limit))
    for load in loads:
        assert load(2).shape[:2] == (1000, 1001)
        with pytest.raises(ImageError, match=r"1,001 x 1,000 pixels are 1\.0 megapixels.* 1; set it to 2,"):
            load(1)


def test_a_line_camera_s_picture(tmp_path):
    """98 megapixels: what the setting allows is read without a warning."""
    path = tmp_path / "line.png"
    Image.new("1", (16_384, 6_000)).save(path)
    assert images.load_mask(path, 99).shape == (6_000, 16_384)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_several_frames_are_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(gradient()).save(path, save_all=True, append_images=[Image.fromarray(255 - gradient())])
    with pytest.raises(ImageError, match="several frames"):
        images.load_rgb(path, WHITE)


def save_pages(path, kinds):
    """A TIFF of as many pages, each with its NewSubfileType."""
    first, *others = [Image.fromarray(gradient()), *(Image.fromarray(gradient()[::2, ::2]) for _ in kinds[1:])]
    for page, kind in zip(others, kinds[1:], strict=True):
        page.encoderinfo = {"tiffinfo": {254: kind}}
    first.save(path, save_all=True, append_images=others, tiffinfo={254: kinds[0]})


@pytest.mark.parametrize(("kinds", "is_read"), [((0, 1), True), ((0, 1, 1), True), ((0, 0), False), ((0, 1, 0), False)])
def test_thumbnails_in_a_tiff_do_not_matter(tmp_path, kinds, is_read):
    path = tmp_path / "a.tif"
    save_pages(path, kinds)
    if is_read:
        np.testing.assert_array_equal(images.load_rgb(path, WHITE), gradient())
    else:
        with pytest.raises(ImageError, match=r"holds \d pages; save the one to read by itself"):
            images.load_rgb(path, WHITE)


def test_the_previews_in_a_cameras_jpeg_do_not_matter(tmp_path):
    path = tmp_path / "a.jpg"
    first, second = Image.fromarray(gradient()), Image.fromarray(255 - gradient())
    first.save(path, format="MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(images.load_rgb(path, WHITE).astype(int) - gradient()).mean() < 5


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError) as caught:
        images.load_rgb(tmp_path / "a.tif", WHITE)
    told = f"{tmp_path / 'a.tif'}: floating point is not supported; save it with 8 or 16 bits per channel"
    assert str(caught.value) == told


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])  # RGB, RGBA, LA
def test_16_bits_in_colour_need_the_extra_and_are_not_truncated_in_silence(
    tmp_path, monkeypatch, colour_type, channels
):
    write_deep_png(tmp_path / "a.png", colour_type, channels)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ImageError) as caught:
        images.load_rgb(tmp_path / "a.png", white(4095))
    assert str(caught.value) == (
        f"{tmp_path / 'a.png'}: 16 bits with colour or transparency need imagecodecs; pip install 'blemish[images]', "
        "or save it with 8 bits"
    )


def write_deep_png(path, colour_type, channels):
    header = struct.pack(">IIBBBBB", 1, 1, 16, colour_type, 0, 0, 0)
    write_png(path, header, zlib.compress(b"\0" + struct.pack(f">{channels}H", *[4095] * channels)))


def write_tiff(path, values, photometric, order="<"):
    """One uncompressed strip of grey, in either byte order; Pillow writes big-endian files with black as 0 only."""
    rows = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, 8 * values.itemsize), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 122), (277, 3, 1), (278, 3, height), (279, 4, len(rows))]
    entries = [struct.pack(f"{order}HHI", tag, kind, 1) + packed(order, kind, value) for tag, kind, value in tags]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    path.write_bytes(head + b"".join(entries) + bytes(4) + rows)


def packed(order, kind, value):
    return struct.pack(f"{order}I", value) if kind == 4 else struct.pack(f"{order}HH", value, 0)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_tiff_whose_white_is_zero_is_shown_upright(tmp_path, deep, order):
    values = np.array([[0, 257, 25700], [65535, 65278, 514]], dtype=np.uint16)
    values = values if deep else (values // 257).astype(np.uint8)
    for photometric in (0, 1):
        write_tiff(tmp_path / f"{photometric}.tif", values, photometric, order)
    shown = grey_as_rgb([[0, 1, 100], [255, 254, 2]])
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "1.tif", WHITE), shown)
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "0.tif", WHITE), 255 - shown)
    np.testing.assert_array_equal(images.load_mask(tmp_path / "0.tif"), shown[..., 0] != 255)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_a_compressed_tiff_whose_white_is_zero(tmp_path, compression):
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0}, compression=compression)
    shown = (255 * (600 - values.astype(int)) + 300) // 600
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "a.tif", white(600))[..., 0], shown)
    bits = Image.fromarray(gradient()[..., 0] > 90)
    bits.save(tmp_path / "bits.tif", tiffinfo={262: 0}, compression=compression)
    np.testing.assert_array_equal(images.load_rgb(tmp_path / "bits.tif", WHITE)[..., 0], np.asarray(bits) * 255)


def test_the_highest_value_of_deep_grey_is_told(tmp_path):
    Image.fromarray(np.array([[7, 3000]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert images.read(tmp_path / "a.png", WHITE).highest == 3000
    Image.fromarray(gradient()).save(tmp_path / "b.png")
    assert images.read(tmp_path / "b.png", WHITE).highest is None


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("a.png", "folder.png"):
        with pytest.raises(ImageError, match=rf"{name}: a folder, pipe or device, not a file; remove it"):
            images.load_rgb(tmp_path / name, WHITE)


def test_suffixes_are_lower_case():
    assert {suffix.lower() for suffix in images.SUFFIXES} == images.SUFFIXES
    assert Path("A.JPG").suffix.lower() in images.SUFFIXES


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_bands_of_rows_leave_no_trace(mode, tmp_path, monkeypatch):
    """A large picture becomes pixels in bands, to need less memory; transparency and palettes go along."""
    noise = np.random.default_rng(0).integers(0, 256, (11, 5, 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    converted = picture.quantize(8) if mode == "P" else picture.convert("RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        converted.putalpha(picture.getchannel("A"))
    converted.save(path, **({"transparency": 3} if mode == "P" else {}))
    whole = load_rgb_of(path)
    for rows in (1, 4):
        monkeypatch.setattr(images, "_BAND", rows)
        np.testing.assert_array_equal(load_rgb_of(path), whole)
    if mode not in ("LA", "P", "RGBA"):
        np.testing.assert_array_equal(whole, np.asarray(converted.convert("RGB")))


def load_rgb_of(path):
    return images.load_rgb(path, Reading(0, 65535, "refuse", None, "file", None))
