"""One frame of a DICOM, by pydicom (the extra `medical`), as its window shows it (PS3.3 C.11.1 and C.11.2).

Of the header no more is read than what describes pixels, and no message repeats a word of it: what a file says of a
patient, wherever it says so, reaches nothing.
"""

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import ImageError
from pipelines.pictures.damage import find_damage_in_jpeg_part
from pipelines.pictures.reading import DicomWindow, PlainWindow, Reading, WantedWindow, check_size, select_page

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

_SHAPE = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation")
_DEPTH = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_RESCALE = ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
_WINDOW = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_PIXELS = ("PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths")
_KEYWORDS = [*_SHAPE, *_DEPTH, *_RESCALE, *_WINDOW, *_GROUPS, *_PIXELS]

_GREYS = frozenset({"MONOCHROME1", "MONOCHROME2"})
_COLOURS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"})  # of which pydicom makes RGB
_MOST_BITS = 16
_HEAD = 0x0002  # group of what is said of the file itself, always in one way of writing
_SILENCING = threading.Lock()
_SILENT = ("ignore", None, Warning, re.compile("pydicom"), 0)  # a filter of warnings, as Python keeps it


def read(content: bytes, path: Path, reading: Reading) -> NDArray[np.uint8]:
    """The frame `reading.page`, (H, W, 3).

    Raises:
        ImageError: it is no DICOM, holds no pixels, is damaged, too large or of a kind that is not understood, or
            without that frame; or pydicom or a plugin of it is missing.
    """
    try:
        import pydicom
    except ImportError:
        raise ImageError(f"{path}: DICOM needs pydicom; pip install 'blemish[medical]', or save it as PNG") from None
    _silence()
    try:
        syntax = _syntax(content)
        _check_syntax(syntax, path)
        return _shown(pydicom.dcmread(io.BytesIO(content), specific_tags=_KEYWORDS), syntax, path, reading)
    except (ImageError, MemoryError):
        raise
    except pydicom.errors.InvalidDicomError:
        raise ImageError(f"{path}: not a DICOM file; save it as one or remove it") from None
    except Exception:  # nearly any class, and the words of a header in its message
        raise ImageError(f"{path}: damaged DICOM, or not to be decoded by pydicom; save it anew or remove it") from None


def _syntax(content: bytes) -> "UID | None":
    """How it is packed, by the head of the file alone: pydicom unpacks one that is deflated when it reads on."""
    from pydicom.filereader import read_dataset, read_preamble

    file = io.BytesIO(content)
    read_preamble(file, force=False)
    stop = {"stop_when": lambda tag, *_: tag.group != _HEAD}
    return read_dataset(file, is_implicit_VR=False, is_little_endian=True, **stop).get("TransferSyntaxUID")


def _silence() -> None:
    """Keep pydicom from logging and warning: it quotes the header."""
    import pydicom

    logging.getLogger("pydicom").disabled = True
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with _SILENCING:  # putting a filter first takes it away for a moment
        if warnings.filters[:1] != [_SILENT]:
            warnings.filterwarnings("ignore", module="pydicom")


def _check_syntax(syntax: "UID | None", path: Path) -> None:
    from pydicom.pixels import get_decoder
    from pydicom.uid import AllTransferSyntaxes, DeflatedExplicitVRLittleEndian

    # An unknown one is not named: it may say anything.
    name = syntax.name if syntax is not None and syntax in AllTransferSyntaxes else "unknown"
    if syntax == DeflatedExplicitVRLittleEndian:  # whose size shows when it is unpacked
        raise ImageError(f"{path}: a DICOM that is deflated as a whole is not supported; save it uncompressed")
    try:
        decoder = get_decoder(syntax)
    except (NotImplementedError, TypeError):
        raise ImageError(f"{path}: no picture by its transfer syntax ({name}); save it uncompressed") from None
    if not decoder.is_available:
        plugins = "; ".join(decoder.missing_dependencies)
        raise ImageError(f"{path}: {name} needs a plugin of pydicom; install one ({plugins}), or save it uncompressed")


def _shown(dataset: "Dataset", syntax: "UID", path: Path, reading: Reading) -> NDArray[np.uint8]:
    from pydicom.pixels import pixel_array

    if "PixelData" not in dataset:
        raise ImageError(f"{path}: a DICOM without pixels, or cut off before their end; copy it again or remove it")
    check_size(int(dataset.Columns), int(dataset.Rows), path, reading.max_megapixels)
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    frame = select_page(num_frames, path, reading.page, "frame")
    is_grey = _is_grey(dataset, path)
    if damage := _find_damage(dataset, syntax, frame, num_frames):
        raise ImageError(f"{path}: damaged image ({damage}); save it again or remove it")
    values = pixel_array(dataset, index=frame)
    if not is_grey:
        return np.asarray(values, dtype=np.uint8)
    lowest, shown = _table(dataset, frame, path, reading.dicom_window)
    steps = np.clip(values, lowest, lowest + len(shown) - 1) - np.int32(lowest)
    return np.repeat(shown[steps][..., None], 3, axis=2)


def _is_grey(dataset: "Dataset", path: Path) -> bool:
    """Whether it is grey or colour; raises ImageError where it is neither, or too deep."""
    kind, channels, bits = dataset.PhotometricInterpretation, int(dataset.SamplesPerPixel), int(dataset.BitsStored)
    if kind == "PALETTE COLOR":
        raise ImageError(f"{path}: a DICOM with a palette is not supported; save it as RGB")
    if (channels != 1 or kind not in _GREYS) and (channels != 3 or kind not in _COLOURS):
        raise ImageError(f"{path}: neither grey nor RGB nor YBR by its photometric interpretation; save it as one")
    if bits > (_MOST_BITS if channels == 1 else 8):
        raise ImageError(f"{path}: {bits} bits per channel are not supported; save it with 16 of grey or 8 of colour")
    return channels == 1


def _find_damage(dataset: "Dataset", syntax: "UID", frame: int, num_frames: int) -> str | None:
    from pydicom.encaps import get_frame
    from pydicom.uid import JPEGTransferSyntaxes

    if syntax not in JPEGTransferSyntaxes:
        return None  # pydicom compares the lengths
    return find_damage_in_jpeg_part(get_frame(dataset.PixelData, frame, number_of_frames=num_frames))


# -------------------------------------------------------------------------------------------------------------- window


def _table(dataset: "Dataset", frame: int, path: Path, wanted: WantedWindow) -> tuple[int, NDArray[np.uint8]]:
    """The lowest value that can be stored, and what it and each above it is shown as."""
    bits = int(dataset.BitsStored)
    lowest = -(1 << (bits - 1)) if dataset.PixelRepresentation == 1 else 0
    stored = np.arange(lowest, lowest + (1 << bits))
    slope, intercept = _rescale(dataset, frame, path)
    window = _window_in_file(dataset, frame, path) if wanted == "file" else wanted
    shown = _full_range(stored, slope) if window is None else _windowed(stored * slope + intercept, window)
    return lowest, 255 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


def _full_range(stored: NDArray[np.integer], slope: float) -> NDArray[np.uint8]:
    """All that the bits can hold, black to white, rounded half up; a negative slope makes the lowest the brightest."""
    steps, most = stored - stored[0], len(stored) - 1
    return ((2 * 255 * (steps if slope > 0 else steps[::-1]) + most) // (2 * most)).astype(np.uint8)


def _windowed(values: NDArray[np.floating], window: DicomWindow) -> NDArray[np.uint8]:
    """PS3.3 C.11.2.1.2.1, of 0 to 255, rounded half up."""
    beyond = values - (window.centre - 0.5)
    share = (beyond > 0) if window.width == 1 else beyond / (window.width - 1) + 0.5
    return np.floor(255 * np.clip(share, 0.0, 1.0) + 0.5).astype(np.uint8)


def _rescale(dataset: "Dataset", frame: int, path: Path) -> tuple[float, float]:
    """Slope and intercept from stored values to those of the modality, such as Hounsfield units."""
    if "ModalityLUTSequence" in dataset:
        raise ImageError(f"{path}: a table of modality values is not supported; save it with slope and intercept")
    macro = "PixelValueTransformationSequence"
    slope = _number(_found(dataset, frame, macro, "RescaleSlope"), 1.0)
    intercept = _number(_found(dataset, frame, macro, "RescaleIntercept"), 0.0)
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise ImageError(f"{path}: its rescale slope and intercept make no values; mend or remove it")
    return slope, intercept


def _window_in_file(dataset: "Dataset", frame: int, path: Path) -> DicomWindow | None:
    """The first of the file; None where it has none."""
    macro, remedy = "FrameVOILUTSequence", "set `prepare.dicom_window: {centre: ..., width: ...}`"
    centre, width = (_found(dataset, frame, macro, keyword) for keyword in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        if "VOILUTSequence" in dataset:
            raise ImageError(f"{path}: its window is a table, which is not supported; {remedy}")
        return None
    if (_found(dataset, frame, macro, "VOILUTFunction") or "LINEAR") != "LINEAR":
        raise ImageError(f"{path}: its window is not the linear one; {remedy}")
    first = _number(centre, 0.0), _number(width, 0.0)
    if not np.isfinite(first).all() or first[1] < 1:
        raise ImageError(f"{path}: its window shows nothing; {remedy}")
    return PlainWindow(*first)


def _number(value: Any, otherwise: float) -> float:
    """The first of one or several; `otherwise` where there is none."""
    if value is None or value == "":
        return otherwise
    return float(value) if np.ndim(value) == 0 else float(value[0])


def _found(dataset: "Dataset", frame: int, macro: str, keyword: str) -> Any:
    """An attribute of a frame: where enhanced files keep it, per frame or for all, or in the plain header."""
    for group in _groups(dataset, frame):
        if macro in group and len(group[macro].value) > 0 and keyword in group[macro].value[0]:
            return group[macro].value[0][keyword].value
    return dataset.get(keyword)


def _groups(dataset: "Dataset", frame: int) -> Iterator["Dataset"]:
    shared, per_frame = (dataset.get(keyword) or [] for keyword in _GROUPS)
    yield from per_frame[frame : frame + 1]
    yield from shared[:1]
