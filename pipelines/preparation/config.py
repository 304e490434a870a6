"""Section `prepare` of params.yaml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, RootModel

from anomaly_models.common.settings import Settings, Sides
from pipelines.data.index import Layout
from pipelines.pictures.images import Filter, Frame

LayoutName = Literal["auto", Layout]


class AnomalousTrainConfig(Settings):
    """Section `prepare.anomalous_train`: the real anomalies that supervised methods may learn from.

    A model that learns from them is not tested on them; whether others are, `evaluate.learnt_defects` says. `spread` is
    the published protocol of BGAD (Yao et al., CVPR 2023): count // T of each of the T types, the rest at random; at
    least half of each type stays. `one_type` is the open-set protocol: all from one type, drawn by the seed, and a
    model that learns from them is tested on nothing else of that type.
    """

    count: NonNegativeInt  # per category, at the most
    protocol: Literal["spread", "one_type"]


class View(BaseModel):
    """What `prepare` must know of a model's section; the rest is the model's own."""

    model_config = ConfigDict(frozen=True, strict=True)

    image_size: Sides  # pixels
    resize: Filter


class Views(RootModel[dict[str, View]]):
    """Section `models`."""

    @property
    def frames(self) -> dict[str, Frame]:
        """What each model sees of a picture."""
        return {model: Frame(view.image_size, view.resize) for model, view in self.root.items()}


class PrepareConfig(Settings):
    """Section `prepare` of `params.yaml`. What pictures are resized to, the models' own sections say."""

    layout: LayoutName  # of the categories' folders (docs/layouts.md); auto: what each of them looks like
    white_level: Annotated[int, Field(ge=1, le=65535)]  # 16-bit value shown as white
    max_megapixels: PositiveInt  # larger pictures are refused: a file of kilobytes may unpack to gigabytes
    holdout: Annotated[float, Field(gt=0, lt=1)]  # share of the normal training images
    test_normal: Annotated[float, Field(gt=0, lt=1)]  # share of `normal`, in the plain-folder layout only
    anomalous_train: AnomalousTrainConfig
    surfaces: list[str]  # categories that fill the image: no part stands out from a background
    seed: NonNegativeInt
