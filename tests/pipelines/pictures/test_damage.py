"""No decoder's forgiveness lets a damaged file pass, and no sound file is refused for being unusual."""

import io
from itertools import product

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import ImageError
from pipelines.pictures import images
from pipelines.pictures.reading import Reading

WHITE = Reading(
    black_level=0, white_level=65535, above_white="refuse", page=None, dicom_window="file", max_megapixels=None
)

JPEGS = {
    "grey": {"mode": "L"},
    "colour": {"subsampling": 0, "quality": 95},
    "halved colour": {"subsampling": 2, "quality": 60},
    "best": {"subsampling": 1, "quality": 100},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True, "quality": 90},
    "progressive, unhalved": {"progressive": True, "subsampling": 0, "quality": 80},
    "restarts": {"restart_marker_rows": 1},
    "restarts at each block": {"restart_marker_blocks": 1, "progressive": True},
    "cmyk": {"mode": "CMYK"},
    "of a camera": {"format": "MPO"},
}


def part(seed, height=150, width=210, noise=8):
    """A bright plate on a dark ground, with noise: as compressible as a photograph."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    plate = 60 + 110 * ((abs(rows - height / 2) < height / 3) & (abs(columns - width / 2) < width / 3))
    grey = plate + 15 * np.sin(columns / 6) + rng.normal(0, noise, (height, width))
    return Image.fromarray(np.clip(np.stack([grey, grey + 8, grey - 12], axis=2), 0, 255).astype(np.uint8))


def jpeg(image, mode="RGB", **options):
    written = io.BytesIO()
    if options.get("format") == "MPO":
        options |= {"save_all": True, "append_images": [image.resize((40, 30))]}
    image.convert(mode).save(written, **{"format": "JPEG", **options})
    return written.getvalue()


def scan(content):
    """Where the compressed data begin, and where the first picture ends."""
    return content.index(b"\xff\xda") + 14, content.index(b"\xff\xd9")


def zero_tail(content, rng):
    place = int(rng.integers(scan(content)[0], scan(content)[1] - 8))
    return content[:place] + bytes(len(content) - place)


def zero_half(content, rng):
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def hole(content, rng):
    place = int(rng.integers(scan(content)[0], scan(content)[1] - 512))
    return content[:place] + bytes(512) + content[place + 512 :]


def erased(content, rng):
    place = int(rng.integers(scan(content)[0], scan(content)[1] - 512))
    return content[:place] + b"\xff" * 512 + content[place + 512 :]


def cut(content, rng):
    return content[: int(rng.integers(scan(content)[0], scan(content)[1]))]


def no_end(content, rng):
    return content[: scan(content)[1]]


def another_head(content, rng):
    other = jpeg(part(77, 160, 200), quality=90)
    place = min(len(content), len(other)) // 2
    return other[:place] + content[place:]


DAMAGES = [zero_tail, zero_half, hole, erased, cut, no_end, another_head]


def read(folder, content, suffix=".jpg"):
    path = folder / f"a{suffix}"
    path.write_bytes(content)
    return images.load_rgb(path, WHITE)


def refusal(folder, content, suffix=".jpg"):
    with pytest.raises(ImageError) as caught:
        read(folder, content, suffix)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'a'}{suffix}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_jpeg_is_refused(tmp_path, kind, damage):
    rng = np.random.default_rng(0)
    for seed in range(3):
        assert "damaged image (" in refusal(tmp_path, damage(jpeg(part(seed), **JPEGS[kind]), rng))


@pytest.mark.parametrize("kind", JPEGS)
def test_what_follows_a_jpegs_end_marker_is_allowed(tmp_path, kind):
    content = jpeg(part(0), **JPEGS[kind])
    expected = read(tmp_path, content)
    rest = np.random.default_rng(0).integers(0, 256, 900, dtype=np.uint8).tobytes()
    for trailer in (bytes(4096), b"\xff\xd9", rest, jpeg(part(1))):  # the last: overwritten by a shorter picture
        np.testing.assert_array_equal(read(tmp_path, content + trailer), expected)


def test_sound_jpegs_of_every_kind_are_read(tmp_path):
    sizes = [(1, 1), (7, 9), (16, 16), (33, 250)]
    for (height, width), (kind, options) in product(sizes, JPEGS.items()):
        assert read(tmp_path, jpeg(part(3, height, width), **options)).shape == (height, width, 3), kind


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("level", [0, 127, 255])
def test_a_flat_ground_is_no_hole(tmp_path, level, mode, progressive):
    """Optimised tables make zeros of it: a saturated backlight is as sound as a textured part."""
    pixels = np.full((1200, 1200), level, dtype=np.uint8)
    pixels[500:560, 500:560] = np.random.default_rng(0).integers(0, 256, (60, 60))
    content = jpeg(Image.fromarray(pixels), mode, optimize=True, progressive=progressive)
    assert bytes(256) in content
    assert read(tmp_path, content).shape == (1200, 1200, 3)


def saved(image, **options):
    written = io.BytesIO()
    image.save(written, **options)
    return written.getvalue()


@pytest.mark.parametrize("place", [0.3, 0.9, -14])  # in the data, in the last checksum
def test_a_wrong_byte_in_a_png(tmp_path, place):
    content = bytearray(saved(part(0), format="PNG"))
    place = int(place * len(content)) if isinstance(place, float) else place
    content[place] ^= 1
    assert "damaged image (wrong checksum" in refusal(tmp_path, bytes(content), ".png")


@pytest.mark.parametrize("lost", [1, 4, 12])
def test_a_png_without_its_end(tmp_path, lost):
    content = saved(part(0), format="PNG")
    assert "damaged image (its end is missing)" in refusal(tmp_path, content[:-lost], ".png")
    assert "damaged image (" in refusal(tmp_path, content[:-lost] + bytes(lost), ".png")
    assert read(tmp_path, content + b"trailer", ".png").shape == (150, 210, 3)


COMPRESSED = {
    ".webp": [{"format": "WEBP", "quality": 90}, {"format": "WEBP", "lossless": True}],
    ".tif": [
        {"format": "TIFF", "compression": name}
        for name in ("tiff_adobe_deflate", "tiff_lzw", "packbits", "jpeg", "zstd")
    ],
}
EACH_COMPRESSED = [(suffix, options) for suffix, each in COMPRESSED.items() for options in each]


@pytest.mark.parametrize(
    ("suffix", "options"), [(suffix, each) for suffix in COMPRESSED for each in COMPRESSED[suffix]]
)
def test_zeros_in_a_compressed_file(tmp_path, suffix, options):
    content = saved(part(0), **options)
    assert read(tmp_path, content, suffix).shape == (150, 210, 3)
    for place in (len(content) // 3, len(content) // 2):
        holed = content[:place] + bytes(512) + content[place + 512 :]
        assert "damaged image (" in refusal(tmp_path, holed, suffix)
        refusal(tmp_path, content[:place] + bytes(len(content) - place), suffix)  # a TIFF may lose its directory too


def test_a_wrong_byte_in_a_deflated_tiff(tmp_path):
    content = bytearray(saved(part(0), format="TIFF", compression="tiff_adobe_deflate"))
    content[len(content) // 2] ^= 1
    assert "damaged image (in the strip or tile at byte " in refusal(tmp_path, bytes(content), ".tif")


@pytest.mark.parametrize(("suffix", "options"), EACH_COMPRESSED)
def test_flat_files_are_no_holes(tmp_path, suffix, options):
    flat = Image.fromarray(np.full((1000, 1000), 255, dtype=np.uint8))
    assert (read(tmp_path, saved(flat, **options), suffix) > 250).all()
