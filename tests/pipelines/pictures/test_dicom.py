"""A DICOM is shown as its window says, and nothing that its header says of a patient comes out."""

import io
import logging
import struct
import sys
import warnings
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from drawn_dicoms import PATIENT, described, named_everywhere, saved
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from refusals import refused

from pipelines.errors import ImageError
from pipelines.pictures import images
from pipelines.pictures.reading import PlainWindow, Reading

READING = Reading(
    black_level=0, white_level=65535, above_white="refuse", page=None, dicom_window="file", max_megapixels=90
)
NOISE = np.random.default_rng(0).integers(0, 4096, (20, 30), dtype=np.uint16)
PART = np.tile(np.arange(96, dtype=np.uint8) * 2, (64, 1))


def dicom(values, syntax=ExplicitVRLittleEndian, **options):
    return saved(described(values, **options), syntax)


def read(folder, content, reading=READING, name="a.dcm"):
    (folder / name).write_bytes(content)
    return images.load_rgb(folder / name, reading)


def grey(folder, content, reading=READING):
    rgb = read(folder, content, reading)
    np.testing.assert_array_equal(rgb, np.repeat(rgb[..., :1], 3, axis=2))
    return rgb[..., 0]


def refusal(folder, content, reading=READING, name="a.dcm"):
    (folder / name).write_bytes(content)
    return refused(folder / name, reading)


# --------------------------------------------------------------------------------------------------------------- window


@pytest.mark.parametrize(
    ("centre", "width", "values", "shown"),
    [
        # The examples of PS3.3 C.11.2.1.2.1: (x - 2047.5) / 4095, then (x + 0.5) / 99, then all or nothing.
        (2048, 4096, [0, 8, 9, 2047, 2048, 4095], [0, 0, 1, 127, 128, 255]),
        (0, 100, [-51, -50, -49, -1, 0, 49, 50], [0, 0, 3, 126, 129, 255, 255]),
        (0, 1, [-2, -1, 0, 1], [0, 0, 255, 255]),
        (40, 400, [-160, 40, 240], [0, 128, 255]),
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_the_linear_window(tmp_path, centre, width, values, shown, in_file):
    stored = np.array([values], dtype=np.int16)
    if in_file:
        content = dicom(stored, WindowCenter=centre, WindowWidth=width)
        assert grey(tmp_path, content).tolist() == [shown]
    window = replace(READING, dicom_window=PlainWindow(centre=centre, width=width))
    assert grey(tmp_path, dicom(stored, WindowCenter=7, WindowWidth=9), window).tolist() == [shown]


def test_the_first_of_several_windows(tmp_path):
    content = dicom(np.array([[0, 50, 100]], dtype=np.uint16), WindowCenter=[50, 900], WindowWidth=[101, 9])
    assert grey(tmp_path, content).tolist() == [[1, 129, 255]]  # 0.5 / 100, 50.5 / 100 of 255


def test_slope_and_intercept_come_before_the_window(tmp_path):
    stored = np.array([[0, 1024, 1064, 4095]], dtype=np.uint16)
    header = {"bits": 12, "RescaleIntercept": -1024, "RescaleSlope": 1, "WindowCenter": 40, "WindowWidth": 400}
    assert grey(tmp_path, dicom(stored, **header)).tolist() == [[0, 102, 128, 255]]  # 0: (-39.5 / 399 + 0.5) 255
    header |= {"RescaleSlope": 0.5, "RescaleIntercept": -512}
    assert grey(tmp_path, dicom(stored, **header)).tolist() == [[0, 102, 115, 255]]  # 20: (-19.5 / 399 + 0.5) 255


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_without_a_window_all_stored_bits_are_shown(tmp_path, bits):
    top = 2**bits - 1
    stored = np.array([[0, top // 2, top]], dtype=np.uint8 if bits == 8 else np.uint16)
    middle = (510 * (top // 2) + top) // (2 * top)
    assert grey(tmp_path, dicom(stored, bits=bits)).tolist() == [[0, middle, 255]]
    signed = (stored.astype(int) - 2 ** (bits - 1)).astype(np.int8 if bits == 8 else np.int16)
    assert grey(tmp_path, dicom(signed, bits=bits)).tolist() == [[0, middle, 255]]
    falling = {"RescaleSlope": -2, "RescaleIntercept": 7}
    assert grey(tmp_path, dicom(stored, bits=bits, **falling)).tolist() == [[255, 255 - middle, 0]]


def test_monochrome1_is_turned_round(tmp_path):
    stored = np.array([[0, 1000, 4095]], dtype=np.uint16)
    header = {"bits": 12, "WindowCenter": 2048, "WindowWidth": 4096}
    first = grey(tmp_path, dicom(stored, **header))
    second = grey(tmp_path, dicom(stored, PhotometricInterpretation="MONOCHROME1", **header))
    np.testing.assert_array_equal(second, 255 - first)
    assert first.tolist() == [[0, 62, 255]]


def test_levels_and_what_is_above_them_are_not_of_dicom(tmp_path):
    content = dicom(NOISE, WindowCenter=2048, WindowWidth=4096)
    levels = replace(READING, black_level=5, white_level=9)
    np.testing.assert_array_equal(read(tmp_path, content, levels), read(tmp_path, content))
    assert images.read(tmp_path / "a.dcm", READING).highest is None


# ----------------------------------------------------------------------------------------- frames, colour, compression


def test_a_frame_is_named_or_the_file_is_refused(tmp_path):
    content = dicom(np.stack([NOISE, NOISE[::-1]]), frames=2, bits=12)
    assert refusal(tmp_path, content) == (
        "holds 2 frames; save the one to read by itself or, for pictures, set `prepare.page` to it (0 is the first)"
    )
    for page, values in enumerate([NOISE, NOISE[::-1]]):
        expected = (510 * values.astype(int) + 4095) // 8190
        np.testing.assert_array_equal(grey(tmp_path, content, replace(READING, page=page)), expected)
    assert refusal(tmp_path, content, replace(READING, page=2)).startswith("holds 2 frames, none at `prepare.page` 2")
    assert refusal(tmp_path, dicom(NOISE), replace(READING, page=1)).startswith("holds 1 frame, none at")


def test_an_enhanced_file_has_its_window_per_frame_or_for_all(tmp_path):
    def macro(centre):
        item = Dataset()
        item.WindowCenter, item.WindowWidth = centre, 1
        group = Dataset()
        group.FrameVOILUTSequence = [item]
        return group

    rescale, shared = Dataset(), macro(1000)
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, 0
    shared.PixelValueTransformationSequence = [rescale]
    frames = np.array([[[400, 600]], [[400, 600]]], dtype=np.uint16)
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": [Dataset(), macro(500)]}
    content = dicom(frames, frames=2, WindowCenter=0, WindowWidth=1, **groups)
    assert grey(tmp_path, content, replace(READING, page=0)).tolist() == [[0, 255]]
    assert grey(tmp_path, content, replace(READING, page=1)).tolist() == [[255, 255]]


def test_colour(tmp_path):
    colour = np.stack([NOISE % 256, NOISE // 16, NOISE % 200], axis=2).astype(np.uint8)
    np.testing.assert_array_equal(read(tmp_path, dicom(colour)), colour)
    planes = described(colour, PlanarConfiguration=1)
    planes.PixelData = colour.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(read(tmp_path, saved(planes)), colour)
    ycbcr = np.array(Image.fromarray(colour).convert("YCbCr"))
    found = read(tmp_path, dicom(ycbcr, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(found.astype(int) - colour).max() <= 3
    assert np.abs(found.astype(int) - ycbcr).max() > 50


def test_a_head_that_is_written_as_the_rest_may_be_is_understood(tmp_path):
    content = dicom(NOISE, ImplicitVRLittleEndian)
    body = content[content.index(bytes.fromhex("08001600")) :]  # (0008,0016), the first after the head
    uid = f"{ImplicitVRLittleEndian}\0".encode()
    head = bytes.fromhex("02001000") + len(uid).to_bytes(4, "little") + uid
    np.testing.assert_array_equal(
        read(tmp_path, bytes(128) + b"DICM" + head + body), read(tmp_path, content, name="as it should be.dcm")
    )


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_transfer_syntaxes(tmp_path, syntax):
    dataset = described(NOISE, bits=12)
    if syntax == RLELossless:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless, generate_instance_uid=False)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = NOISE.astype(">u2").tobytes()
    np.testing.assert_array_equal(grey(tmp_path, saved(dataset, syntax)), (510 * NOISE.astype(int) + 4095) // 8190)


def compressed(values, syntax, options, **header):
    file = io.BytesIO()
    Image.fromarray(values).save(file, **options)
    dataset = described(values, **header)
    dataset.PixelData = encapsulate([file.getvalue()])
    return saved(dataset, syntax), file.getvalue()


def jpeg(values, **header):
    return compressed(values, JPEGBaseline8Bit, {"format": "JPEG", "quality": 95}, **header)


def test_jpeg(tmp_path):
    assert np.abs(grey(tmp_path, jpeg(PART)[0]).astype(int) - PART).max() < 4
    colour = np.dstack([PART, PART[:, ::-1], PART // 2])
    content, _ = jpeg(colour, PhotometricInterpretation="YBR_FULL_422")
    assert np.abs(read(tmp_path, content).astype(int) - colour).max() < 40


def test_jpeg_2000(tmp_path):
    options = {"format": "JPEG2000", "no_jp2": True, "irreversible": False}
    content, _ = compressed(NOISE, JPEG2000Lossless, options, bits=16)
    np.testing.assert_array_equal(grey(tmp_path, content), (510 * NOISE.astype(int) + 65535) // 131070)


# ------------------------------------------------------------------------------------------------------------- refusals


def sequence(keyword):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [2, 0, 16], b"\0\0\1\0"
    return {keyword: [item]}


WINDOW = {"WindowCenter": 40, "WindowWidth": 400}
REMEDY = "set `prepare.dicom_window: {centre: ..., width: ...}`"


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "a DICOM with a palette is not supported; save it as RGB"),
        (
            {"PhotometricInterpretation": "HSV"},
            "neither grey nor RGB nor YBR by its photometric interpretation; save it as one",
        ),
        (
            sequence("ModalityLUTSequence"),
            "a table of modality values is not supported; save it with slope and intercept",
        ),
        (sequence("VOILUTSequence"), f"its window is a table, which is not supported; {REMEDY}"),
        (WINDOW | {"VOILUTFunction": "SIGMOID"}, f"its window is not the linear one; {REMEDY}"),
        (WINDOW | {"WindowWidth": 0.5}, f"its window shows nothing; {REMEDY}"),
        ({"RescaleSlope": 0}, "its rescale slope and intercept make no values; mend or remove it"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(tmp_path, header, told):
    assert refusal(tmp_path, dicom(NOISE, **header)) == told


def test_a_window_of_the_settings_stands_for_one_that_is_not_understood(tmp_path):
    window = replace(READING, dicom_window=PlainWindow(centre=2048, width=4096))
    expected = grey(tmp_path, dicom(NOISE), window)
    for header in (sequence("VOILUTSequence"), WINDOW | {"VOILUTFunction": "SIGMOID"}, WINDOW | {"WindowWidth": 0}):
        np.testing.assert_array_equal(grey(tmp_path, dicom(NOISE, **header), window), expected)


@pytest.mark.parametrize(
    ("values", "bits"), [(NOISE.astype(np.uint32), 32), (np.dstack([NOISE] * 3), 16)], ids=["grey", "colour"]
)
def test_too_many_bits(tmp_path, values, bits):
    told = f"{bits} bits per channel are not supported; save it with 16 of grey or 8 of colour"
    assert refusal(tmp_path, dicom(values)) == told


def test_a_dicom_without_pixels(tmp_path):
    report = described(NOISE)
    del report.PixelData
    told = "a DICOM without pixels, or cut off before their end; copy it again or remove it"
    assert refusal(tmp_path, saved(report)) == told
    report.FloatPixelData = NOISE.astype(np.float32).tobytes()
    assert refusal(tmp_path, saved(report)) == told


def test_what_is_called_dicom_and_is_none(tmp_path):
    for content in (b"not a DICOM at all", bytes(400)):
        assert refusal(tmp_path, content) == "not a DICOM file; save it as one or remove it"
    assert refusal(tmp_path, b"") == "the file is empty; copy it again or remove it"
    assert "not a PNG, JPEG, BMP, TIFF or WEBP image" in refusal(tmp_path, dicom(NOISE), name="a.png")
    assert "not a PNG, BMP or TIFF image" in mask_refusal(tmp_path, dicom(NOISE))


def mask_refusal(folder, content):
    (folder / "a.dcm").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        images.load_mask(folder / "a.dcm")
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.dcm", "a.DCM", "a.dicom"])
def test_the_suffixes(tmp_path, name):
    assert read(tmp_path, dicom(NOISE), name=name).shape == (20, 30, 3)
    assert images.orientation(tmp_path / name, None) == 1


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["native", "jpeg"])
def test_truncated_files(tmp_path, kind, kept):
    content = dicom(NOISE) if kind == "native" else jpeg(PART)[0]
    assert any(word in refusal(tmp_path, content[: int(len(content) * kept)]) for word in ("damaged", "cut off"))


def test_a_damaged_jpeg_within_a_dicom(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    content, frame = jpeg(noise)
    place = content.index(frame) + len(frame) // 2
    assert refusal(tmp_path, content[:place] + bytes(512) + content[place + 512 :]).startswith("damaged image (")
    short = described(noise)
    short.PixelData = encapsulate([frame[: len(frame) // 2]])
    assert refusal(tmp_path, saved(short, JPEGBaseline8Bit)).startswith("damaged image (")


def test_transfer_syntaxes_that_cannot_be_decoded(tmp_path):
    packed = described(NOISE, bits=12)
    packed.PixelData = encapsulate([bytes(100)])
    told = refusal(tmp_path, saved(packed, JPEGLSLossless))
    assert told.startswith("JPEG-LS Lossless Image Compression needs a plugin of pydicom; install one (")
    assert "pyjpegls" in told
    told = "no picture by its transfer syntax (MPEG2 Main Profile / Main Level); save it uncompressed"
    assert refusal(tmp_path, saved(packed, MPEG2MPML)) == told
    deflated = dicom(NOISE, DeflatedExplicitVRLittleEndian)
    assert refusal(tmp_path, deflated) == ("a DICOM that is deflated as a whole is not supported; save it uncompressed")


def test_without_the_extra_a_line_says_what_to_install(tmp_path, monkeypatch):
    content = dicom(NOISE)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert refusal(tmp_path, content) == "DICOM needs pydicom; pip install 'blemish[medical]', or save it as PNG"


def test_the_limit_holds_before_anything_is_decoded(tmp_path, monkeypatch):
    content = dicom(np.zeros((1000, 1001), dtype=np.uint8))
    assert read(tmp_path, content, replace(READING, max_megapixels=2)).shape == (1000, 1001, 3)
    monkeypatch.setattr("pydicom.pixels.pixel_array", lambda *_, **__: pytest.fail("was decoded"))
    found = refusal(tmp_path, content, replace(READING, max_megapixels=1))
    assert found.startswith("1,001 x 1,000 pixels are 1.0 megapixels, above `prepare.max_megapixels` 1; set it to 2,")


# ------------------------------------------------------------------------------------------------------------- patients


def with_patient():
    dataset = named_everywhere(described(NOISE, bits=12))
    assert len(dataset) > 1000
    return dataset


@pytest.fixture
def loose(monkeypatch):
    """Lets a test write what no standard allows."""
    monkeypatch.setattr(pydicom.config.settings, "_writing_validation_mode", pydicom.config.IGNORE)


@pytest.fixture
def nothing_said(caplog, capfd):
    """No log, warning, or line on either stream is left by the test."""
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    assert [str(warning.message) for warning in warned] == []
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("loose", "nothing_said")
def test_nothing_of_a_header_that_names_a_patient_everywhere(tmp_path):
    expected = (510 * NOISE.astype(int) + 4095) // 8190
    np.testing.assert_array_equal(grey(tmp_path, saved(with_patient())), expected)


WORDED = ["PhotometricInterpretation", "VOILUTFunction", "WindowCenter", "WindowWidth", "RescaleSlope"]
WORDED += ["RescaleIntercept", "NumberOfFrames"]
NUMBERED = ["Rows", "BitsStored", "PixelRepresentation", "SamplesPerPixel"]  # two bytes each


@pytest.mark.usefixtures("loose", "nothing_said")
@pytest.mark.parametrize("field", WORDED + NUMBERED)
def test_no_error_repeats_a_word_of_the_header(tmp_path, field):
    """The name stands where pixels are described, as if another program had written it there."""
    told = refusal(tmp_path, named(field))
    assert PATIENT not in told
    assert told.startswith(("damaged DICOM", "neither grey", "its window is not"))


@pytest.mark.usefixtures("loose", "nothing_said")
def test_the_encoding_of_words_does_not_matter(tmp_path):
    assert grey(tmp_path, named("SpecificCharacterSet")).shape == NOISE.shape


def named(field):
    """A DICOM in which one attribute is the patient's name, whatever it should be."""
    window = {"WindowCenter": 40, "WindowWidth": 400}
    if field not in NUMBERED:
        return saved(described(NOISE, bits=12, **window | {field: "77777777"})).replace(b"77777777", PATIENT.encode())
    content, tag = saved(described(NOISE, bits=12, **window)), pydicom.datadict.tag_for_keyword(field)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + b"US"
    place = content.index(head)
    return content[:place] + head + struct.pack("<H", 8) + PATIENT.encode() + content[place + 10 :]


@pytest.mark.usefixtures("loose", "nothing_said")
def test_a_transfer_syntax_that_is_a_name(tmp_path):
    content = saved(described(NOISE)).replace(
        ExplicitVRLittleEndian.encode(), b"1.2.3.9\0" + PATIENT.encode() + b"\0" * 3
    )
    told = refusal(tmp_path, content)
    assert told == "no picture by its transfer syntax (unknown); save it uncompressed"


@pytest.mark.usefixtures("loose", "nothing_said")
def test_no_damage_repeats_a_word_of_the_header(tmp_path):
    content = saved(with_patient())
    for end in np.linspace(140, len(content) - 1, 40).astype(int):
        assert PATIENT not in refusal(tmp_path, content[:end])
