"""Where each data set comes from, how it is recognised, and on what terms it may be used.

MVTec AD: Bergmann et al., CVPR 2019 and IJCV 2021. DTD: Cimpoi et al., CVPR 2014. ImageNette: ten classes of ImageNet.
The teachers of EfficientAD are those of its public reproduction, as anomalib hands them on. Solar cells are in
`solar_cells`, since they come with a package.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

from pipelines.errors import DatasetError


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a data set may be used; printed before it is made."""

    title: str
    licence: str
    citation: str

    def sentence(self) -> str:
        return f"{self.title}: {self.licence}. Cite: {self.citation}"


@dataclass(frozen=True, slots=True)
class Source(Terms):
    """One archive. A mirror or a local copy of it must have the same SHA-256."""

    url: str
    size: int | None  # bytes of the archive; None where the publisher states none
    sha256: str
    packing: Literal["tar.gz", "tar.xz", "zip"]
    top_folder: str | None  # the folder of the archive that holds everything, left out when extracting
    contents: tuple[str, ...]  # files and folders that must be there once it is extracted

    @property
    def file_name(self) -> str:
        """What the publisher calls the archive."""
        return PurePosixPath(urlsplit(self.url).path).name


@dataclass(frozen=True, slots=True)
class CategoryCounts:
    """Images of one category of MVTec AD; there are as many masks as defective test images."""

    train_good: int
    test_good: int
    test_defect: int
    defect_types: int


MVTEC_AD_COUNTS = {
    "bottle": CategoryCounts(209, 20, 63, 3),
    "cable": CategoryCounts(224, 58, 92, 8),
    "capsule": CategoryCounts(219, 23, 109, 5),
    "carpet": CategoryCounts(280, 28, 89, 5),
    "grid": CategoryCounts(264, 21, 57, 5),
    "hazelnut": CategoryCounts(391, 40, 70, 4),
    "leather": CategoryCounts(245, 32, 92, 5),
    "metal_nut": CategoryCounts(220, 22, 93, 4),
    "pill": CategoryCounts(267, 26, 141, 7),
    "screw": CategoryCounts(320, 41, 119, 5),
    "tile": CategoryCounts(230, 33, 84, 5),
    "toothbrush": CategoryCounts(60, 12, 30, 1),
    "transistor": CategoryCounts(213, 60, 40, 4),
    "wood": CategoryCounts(247, 19, 60, 5),
    "zipper": CategoryCounts(240, 32, 119, 7),
}

SOURCES = {
    "mvtec_ad": Source(
        title="MVTec AD",
        url="https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/"
        "420938113-1629960298/mvtec_anomaly_detection.tar.xz",
        size=5_264_982_680,
        sha256="cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        packing="tar.xz",
        top_folder=None,
        contents=tuple(MVTEC_AD_COUNTS),
        licence="CC BY-NC-SA 4.0: not for commercial use",
        citation="Bergmann, Fauser, Sattlegger, Steger: MVTec AD - A Comprehensive Real-World Dataset for "
        "Unsupervised Anomaly Detection, CVPR 2019, pp. 9584-9592; and IJCV 129(4):1038-1059, 2021",
    ),
    "dtd": Source(
        title="Describable Textures Dataset r1.0.1",
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        size=None,
        sha256="e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
        packing="tar.gz",
        top_folder="dtd",
        contents=("images",),
        licence="available for research purposes",
        citation="Cimpoi, Maji, Kokkinos, Mohamed, Vedaldi: Describing Textures in the Wild, CVPR 2014",
    ),
    "imagenette": Source(
        title="ImageNette 2",
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz",
        size=None,
        sha256="6cbfac238434d89fe99e651496f0812ebc7a10fa62bd42d6874042bf01de4efd",
        packing="tar.gz",
        top_folder="imagenette2",
        contents=("train", "val"),
        licence="photos of ImageNet: for non-commercial research and education",
        citation="Howard: Imagenette, github.com/fastai/imagenette, 2019; Russakovsky et al.: ImageNet Large Scale "
        "Visual Recognition Challenge, IJCV 115(3):211-252, 2015",
    ),
    "efficientad_teachers": Source(
        title="EfficientAD teachers",
        url="https://github.com/open-edge-platform/anomalib/releases/download/efficientad_pretrained_weights/"
        "efficientad_pretrained_weights.zip",
        size=None,
        sha256="c09aeaa2b33f244b3261a5efdaeae8f8284a949470a4c5a526c61275fe62684a",
        packing="zip",
        top_folder="efficientad_pretrained_weights",
        contents=("pretrained_teacher_small.pth", "pretrained_teacher_medium.pth"),
        licence="Apache-2.0; learnt from photos of ImageNet",
        citation="weights: nelson1425/EfficientAD and anomalib; method: Batzner, Heckler, Koenig: EfficientAD, "
        "WACV 2024, arXiv 2303.14535",
    ),
}


def check_mvtec_ad(root: Path, categories: Iterable[str]) -> None:
    """Compare `root/<category>` with the published counts: trimmed and re-split copies of MVTec AD are common.

    Raises:
        DatasetError: one message with every difference.
    """
    differences = [
        f"{category}: {found} {what}, published are {published}"
        for category in categories
        for what, found, published in _counts_against_published(root / category, MVTEC_AD_COUNTS[category])
        if found != published
    ]
    if differences:
        raise DatasetError(
            "\n  ".join([f"{root}: not the published MVTec AD; take the original archive", *differences])
        )


def _counts_against_published(folder: Path, published: CategoryCounts) -> Iterator[tuple[str, int, int]]:
    """What is counted, how many there are, and how many were published."""
    test_types = [path for path in (folder / "test").glob("*") if path.is_dir() and path.name != "good"]
    yield "training images", _num_files(folder, "train/good/*.png"), published.train_good
    yield "good test images", _num_files(folder, "test/good/*.png"), published.test_good
    yield "defective test images", sum(_num_files(path, "*.png") for path in test_types), published.test_defect
    yield "masks", _num_files(folder, "ground_truth/*/*_mask.png"), published.test_defect
    yield "types of defect", len(test_types), published.defect_types


def _num_files(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))
