"""Files and folders that are not what their place says: masks among pictures, good parts among defects."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

# Names of folders, whatever is written between the letters: "OK", "i.O.", "non-defective", "good_parts".
_GOOD_WORDS = {
    "good", "ok", "okay", "normal", "io", "ino", "inordnung", "gut", "pass", "passed", "nondefective",
    "nondefect", "nodefect", "defectfree", "faultfree", "flawless", "fehlerfrei", "healthy", "nonanomalous",
    "noanomaly", "anomalyfree", "acceptable", "accepted", "bon", "bueno", "buono", "正常", "良品", "合格"
}  # fmt: skip
_BAD_WORDS = {
    "bad", "abnormal", "abnormality", "anomaly", "anomalous", "anomalie", "defect", "defective", "nok", "ng",
    "ko", "nio", "notok", "notgood", "nogood", "fail", "failed", "failure", "reject", "rejected", "faulty",
    "schlecht", "defekt", "fehler", "fehlerhaft", "ausschuss", "不良", "异常"
}  # fmt: skip
_MASK_WORDS = {"mask", "maske", "masken", "groundtruth", "gt", "segmentation", "annotation"}
# "label" may be a folder's type of defect; of a file it says "mask".
_MASK_WORDS_OF_FILES = _MASK_WORDS | {"masks", "label", "labels", "seg", "segm", "annot"}
_FILLERS = {
    "part", "parts", "image", "images", "img", "imgs", "picture", "pictures", "sample", "samples", "teile",
    "bilder", "test", "set"
}  # fmt: skip


def _words(name: str) -> list[str]:
    """The words of a name, in small letters: what digits and signs part, and capitals after small letters."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", name))
    return re.findall(r"[^\W\d_]+", parted.casefold())


def _says(name: str, vocabulary: set[str]) -> bool:
    """Whether the whole name is one of the words, but for what is said of any folder of pictures."""
    words = _words(name)
    return any(
        "".join(kept) in vocabulary or "".join(kept).removesuffix("s") in vocabulary
        for kept in (words, [word for word in words if word not in _FILLERS])
    )


def says_good(name: str) -> bool:
    return _says(name, _GOOD_WORDS)


def says_bad(name: str) -> bool:
    return _says(name, _BAD_WORDS)


def says_masks(name: str) -> bool:
    return _says(name, _MASK_WORDS)


def masks_beside(paths: Iterable[str]) -> list[str]:
    """Those that are called like another picture in their folder, but for a word that says "mask"."""
    folders: defaultdict[PurePosixPath, list[PurePosixPath]] = defaultdict(list)
    for path in map(PurePosixPath, paths):
        folders[path.parent].append(path)
    return [
        str(path)
        for inside in folders.values()
        for pictures in [{_key(path.stem) for path in inside}]
        for path in inside
        if (bare := _without_mask_words(path.stem)) is not None and bare in pictures
    ]


def _key(stem: str) -> str:
    return " ".join(re.findall(r"\d+|[^\W\d_]+", unicodedata.normalize("NFC", stem).casefold()))


def _without_mask_words(stem: str) -> str | None:
    """The key of a stem without "mask", "label", ...; None where it has no such word, or nothing else."""
    key = _key(stem).replace("ground truth", "groundtruth").split()
    kept = [word for word in key if word not in _MASK_WORDS_OF_FILES]
    return " ".join(kept) if kept and len(kept) < len(key) else None


def same_stems(paths: Iterable[str]) -> dict[str, list[str]]:
    """Picture -> the others in its folder that differ from it in the suffix alone."""
    stems: defaultdict[PurePosixPath, list[str]] = defaultdict(list)
    for path in paths:
        stems[PurePosixPath(path).with_suffix("")].append(path)
    return {path: [other for other in same if other != path] for same in stems.values() for path in same}


def is_black_and_white(rgb: NDArray[np.uint8]) -> bool:
    """Whether (H, W, 3) holds exactly two colours, as masks do; a picture of one colour is no mask."""
    sample = _sample(rgb)
    further = sample[(sample != sample[0]).any(axis=1)]
    if (further != further[:1]).any():
        return False  # nearly every picture, found out at little cost
    others = (rgb != rgb[0, 0]).any(axis=2)
    if not others.any():
        return False
    return bool((rgb[others] == rgb[others][0]).all())


def is_nearly_black_and_white(rgb: NDArray[np.uint8]) -> bool:
    """Whether (H, W, 3) is a mask that was saved with loss: almost all near black or near white, and some of each."""
    if ((sample := _sample(rgb)) < 25).all(axis=1).mean() + (sample > 230).all(axis=1).mean() < 0.9:
        return False
    black, white = (rgb < 25).all(axis=2), (rgb > 230).all(axis=2)
    return bool((black | white).mean() > 0.95 and black.any() and white.any())


def _sample(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels (N, 3) from all over a picture, about 64 by 64."""
    return rgb[:: max(1, rgb.shape[0] // 64), :: max(1, rgb.shape[1] // 64)].reshape(-1, 3)
