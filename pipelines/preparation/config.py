"""Section `prepare` of params.yaml."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt

from anomaly_models.common.settings import Settings
from pipelines.pictures.images import Filter


class AnomalousTrainConfig(Settings):
    """Section `prepare.anomalous_train`: the real anomalies that supervised methods may learn from.

    A model that learns from them is not tested on them; whether others are, `evaluate.learnt_defects` says. `spread` is
    the published protocol of BGAD (Yao et al., CVPR 2023): count // T of each of the T types, the rest at random; at
    least half of each type stays. `one_type` is the open-set protocol: all from one type, drawn by the seed, and a
    model that learns from them is tested on nothing else of that type.
    """

    count: NonNegativeInt  # per category, at the most
    protocol: Literal["spread", "one_type"]


def _unique(sizes: list[int]) -> list[int]:
    if len(set(sizes)) != len(sizes):
        raise ValueError("sizes must differ from one another")
    return sizes


Sizes = Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(_unique)]


def by_filter(sizes: Any) -> Any:
    """A list alone is of the filter that most models ask for."""
    return {"bilinear": sizes} if isinstance(sizes, list) else sizes


ImageSizes = Annotated[dict[Filter, Sizes], Field(min_length=1), BeforeValidator(by_filter)]


class PrepareConfig(Settings):
    """Section `prepare` of `params.yaml`."""

    image_sizes: ImageSizes  # pixels, by filter; every one that a model asks for
    white_level: Annotated[int, Field(ge=1, le=65535)]  # 16-bit value shown as white
    max_megapixels: PositiveInt  # larger pictures are refused: a file of kilobytes may unpack to gigabytes
    holdout: Annotated[float, Field(gt=0, lt=1)]  # share of the normal training images
    test_normal: Annotated[float, Field(gt=0, lt=1)]  # share of `normal`, in the plain-folder layout only
    anomalous_train: AnomalousTrainConfig
    surfaces: list[str]  # categories that fill the image: no part stands out from a background
    seed: NonNegativeInt

    @property
    def arrays(self) -> list[tuple[int, Filter]]:
        """The size and filter of each array of images."""
        return [(size, resize) for resize, sizes in self.image_sizes.items() for size in sizes]

    @property
    def mask_sizes(self) -> list[int]:
        """Masks are resized by the nearest pixel, whatever the images are by."""
        return list(dict.fromkeys(size for size, _ in self.arrays))
