"""DICOMs of drawn pictures, one with a patient's name wherever the standard has room for it."""

import io
import warnings

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
PATIENT = "KOWALSKI"  # one word, and too long to stand by chance in the random bytes of weights
WORDS = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"}  # kinds of attribute that hold a name as it is
PIXELS = {"PhotometricInterpretation", "VOILUTFunction", "SpecificCharacterSet"}  # words, and no patient's


def described(values, *, bits=None, frames=1, **header):
    """A data set whose pixels are (H, W), (H, W, 3) or, of several `frames`, (N, H, W)."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CAPTURE, "1.2.3"
    shape = values.shape[1:] if frames > 1 else values.shape
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 1 if len(shape) == 2 else 3
    dataset.PhotometricInterpretation = "MONOCHROME2" if len(shape) == 2 else "RGB"
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.BitsAllocated = 8 * values.itemsize
    dataset.BitsStored = bits or 8 * values.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for keyword, value in header.items():
        setattr(dataset, keyword, value)
    return dataset


def saved(dataset, syntax=ExplicitVRLittleEndian):
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def named_everywhere(dataset):
    """The same with the name in all attributes of words, private ones too, but for those that describe the pixels."""
    with warnings.catch_warnings(action="ignore"):  # a name is no code
        for tag, (kind, *_, keyword) in pydicom.datadict.DicomDictionary.items():
            if kind in WORDS and keyword and keyword not in PIXELS and tag >> 16 > 0x0007:
                dataset.add_new(tag, kind, PATIENT)
        dataset.add_new(0x00091001, "LO", PATIENT)
    return dataset
