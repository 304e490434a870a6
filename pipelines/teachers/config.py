"""Section `distill` of `params.yaml`: how a model's teacher is made."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, RootModel

from anomaly_models.common.backbones import BackboneConfig
from anomaly_models.common.settings import Settings
from anomaly_models.efficient_ad import Precision, Width


class DistillConfig(Settings):
    """An entry of the section `distill`: the model that the teacher is for is its name.

    The paper: 256 px, 60,000 steps of 16, 1e-4, 1e-5, float32, layers 2 and 3 of wide_resnet101_2.tv_in1k, ImageNet.
    """

    source: Literal["distilled"]
    width: Width
    backbone: BackboneConfig
    image_size: Annotated[int, Field(ge=64, multiple_of=32)]  # of the network's images
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    precision: Precision  # of the network's convolutions while it learns; the backbone always runs in float32
    seed: NonNegativeInt


class PublishedTeacherConfig(Settings):
    """The other kind of entry: the authors' method on ImageNet, as others have published the result."""

    source: Literal["published"]
    width: Literal["small", "medium"]
    archive: Annotated[str, Field(min_length=1)]  # "official", a mirror's URL, or a local file; verified in any case


TeacherConfig = Annotated[DistillConfig | PublishedTeacherConfig, Field(discriminator="source")]


class Teachers(RootModel[dict[str, TeacherConfig]]):
    """The section `distill`, by the model that the teacher is for."""
