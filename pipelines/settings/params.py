"""params.yaml -> Params: every number that changes a result, validated once, with every problem listed at once."""

import os
import unicodedata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    RootModel,
    ValidationError,
    field_validator,
    model_validator,
)

from anomaly_models.common.settings import Settings
from pipelines.errors import ParamsError, hint
from pipelines.preparation.config import PrepareConfig, Views
from pipelines.settings.problems import problems_in, read_yaml, refusal, section_problems
from pipelines.settings.tuned import Tuned, tuned_of, tuned_problems
from pipelines.sources.download import DownloadParams

if TYPE_CHECKING:
    from anomaly_models.base import Config

T = TypeVar("T")
_LONGEST_NAME = 200  # bytes; a file system takes 255, of which some are for endings and temporary names


def _folder_name(name: str) -> str:
    """What can be a folder, and a part of a DVC stage's name: `train@MODEL-CATEGORY`, where no model has a hyphen."""
    kinds = [unicodedata.category(character)[0] for character in name]  # Letters, Numbers, Marks that belong to letters
    allowed = all(kind in "LNM" or character in " ._-" for kind, character in zip(kinds, name, strict=True))
    if not kinds or kinds[0] not in "LN" or not allowed:
        raise ValueError(
            "a name begins with a letter or a digit of any language, and may go on with these, spaces, hyphens, "
            "underscores and dots: rename the folder"
        )
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"a name may have {_LONGEST_NAME} bytes, this has {len(name.encode())}: rename the folder")
    return name


def _without_home(path: str) -> str:
    if path.startswith("~"):
        raise ValueError(f"DVC does not know what ~ stands for: write {os.path.expanduser(path)}")  # noqa: PTH111
    return path


FolderPath = Annotated[str, Field(min_length=1), AfterValidator(_without_home)]


def _distinct_names(categories: list[str]) -> list[str]:
    """Two names that differ in case only, or in how an accent is put together, are one folder on many file systems."""
    seen: dict[str, str] = {}
    for name in categories:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            same = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", seen[key])
            what = "the way of writing accents" if same and name != seen[key] else "case"
            raise ValueError(f"'{seen[key]}' and '{name}' are the same folder where {what} is ignored: rename one")
        seen[key] = name
    return categories


class DataConfig(Settings):
    root: FolderPath  # the folder that holds a folder per category
    categories: Annotated[
        list[Annotated[str, AfterValidator(_folder_name)]], Field(min_length=1), AfterValidator(_distinct_names)
    ]

    @property
    def name(self) -> str:
        """What the data set is called: its folder."""
        return Path(self.root).resolve().name


def _no_seed_twice(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("each seed once")
    return seeds


class TrainConfig(Settings):
    # Every cell is trained and evaluated under each; what is exported is that of the first.
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_no_seed_twice)]


class EvaluateConfig(Settings):
    resolution: Literal["prepared", "native"]  # where pixels are compared: mask down, or map up
    region: Literal["image", "seen"]  # which: all of an image's, or those of the centre that the model sees
    pixel_metrics: Literal["exact", "streaming"]
    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)]  # of good parts; the threshold is set for it
    reject_rate: Annotated[float, Field(gt=0, lt=1)]  # likewise, that may be rejected without a person's look
    review_rate: Annotated[float, Field(gt=0, lt=1)]  # of defects like those known, that may be left to a person
    bootstrap: Annotated[int, Field(ge=50)]  # exchanges of two models' results, for comparisons
    learnt_defects: Literal["tested_by_nobody", "tested_by_others"]  # those of prepare.anomalous_train

    @model_validator(mode="after")
    def _rejects_less(self) -> Self:
        if self.reject_rate > self.false_alarm_rate:
            raise ValueError(
                f"reject_rate {self.reject_rate} above false_alarm_rate {self.false_alarm_rate}: a part that is "
                "rejected without a look is one that is not accepted"
            )
        return self


def _with_float32(precisions: list[str]) -> list[str]:
    if "float32" not in precisions or len(set(precisions)) < len(precisions):
        raise ValueError("float32, of which others are made, and each once: [float32] or [float32, int8]")
    return precisions


class ExportConfig(Settings):
    opset: Annotated[int, Field(ge=18)]
    # the largest of a score or map to the trained model's, in standard deviations of held-out good parts
    max_difference: Annotated[float, Field(gt=0)]
    precisions: Annotated[list[Literal["float32", "int8"]], AfterValidator(_with_float32)]
    max_decisions_changed: Annotated[float, Field(ge=0, le=1)]  # of test images, between the float32 and an int8 file


class LatencyConfig(Settings):
    threads: PositiveInt  # of ONNX Runtime
    seconds: Annotated[float, Field(gt=0)]  # of measuring images one by one, and as long again in batches
    batch_size: PositiveInt  # images at once, for the throughput


class Resources(Settings):
    """What a cell reserves while a sweep works on it."""

    num_cpus: Annotated[float, Field(gt=0)]  # and its threads
    num_gpus: Annotated[float, Field(ge=0)]  # or a share of one: as many cells share it
    memory: Annotated[float, Field(ge=0)]  # GiB; 0: whatever is there
    processes: PositiveInt  # that train it together, each with its part of the above

    @field_validator("num_cpus", "num_gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("a share of one, or a whole number")
        return value

    @model_validator(mode="after")
    def _a_gpu_for_each(self) -> Self:
        if self.num_gpus and (self.num_gpus > 1 or self.processes > 1) and self.num_gpus != self.processes:
            raise ValueError(
                f"num_gpus {self.num_gpus:g} with processes {self.processes}: of several, each has a GPU of its own"
            )
        return self


class SweepConfig(Resources):
    """For `blemish sweep` alone: no result depends on it, so that a file may do without."""

    num_cpus: Annotated[float, Field(gt=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    memory: Annotated[float, Field(ge=0)] = 0
    processes: PositiveInt = 1
    retries: NonNegativeInt = 3  # of a cell whose worker or machine is lost
    models: dict[str, Resources] = Field(default_factory=dict)  # by model, in the stead of the above

    def of(self, model: str) -> Resources:
        return self.models.get(model, self)


def _experiment(name: str) -> str:
    """Also of a folder below `reports`, which DVC writes as it stands: an experiment may be called as a path is."""
    parts = PurePosixPath(name.removeprefix("/")).parts
    odd = name != name.strip() or not name.isprintable() or set(name) & set("\\$")
    if odd or not parts or ".." in parts or any(len(part.encode()) > _LONGEST_NAME for part in parts):
        raise ValueError(
            "the report's folder in reports/ is called so: not with '..', $, a backslash, spaces at the ends, what "
            f"cannot be printed, or more than {_LONGEST_NAME} bytes"
        )
    return name


class TrackingConfig(Settings):
    experiment: Annotated[str, Field(min_length=1), AfterValidator(_experiment)]


class Params(Settings):
    """The whole file.

    `models`, `distill`, `penalty` and `textures` are plain mappings until `preview.check.load_checked` has looked.
    """

    download: dict[str, Any]  # checked as pipelines.sources.download.DownloadParams
    data: DataConfig
    prepare: PrepareConfig
    photos: FolderPath  # folder of everyday pictures, for teachers and penalty images
    texture_photos: FolderPath  # folder of pictures of surfaces, for synthetic defects
    distill: dict[str, Any]  # by the model that the teacher is for; checked as pipelines.teachers.distill.TeacherConfig
    penalty: dict[str, Any]  # by the model that the images are for; checked as pipelines.preparation.penalty.Penalties
    textures: dict[str, Any]  # by the model that they are for; checked as pipelines.preparation.textures.TextureSets
    models: Annotated[dict[str, Any], Field(min_length=1)]
    train: TrainConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    latency: LatencyConfig
    tracking: TrackingConfig
    sweep: SweepConfig = SweepConfig()
    _methods: dict[str, str] = PrivateAttr(default_factory=dict)
    _sections: dict[str, Any] = PrivateAttr(default_factory=dict)  # of `models`, as the file has them

    @model_validator(mode="after")
    def _keep_methods(self) -> Self:
        self._methods = {name: method_of(name, section) for name, section in self.models.items()}
        self._sections = self.models
        return self

    @property
    def seed(self) -> int:
        """The first, of which a model is exported and shown."""
        return self.train.seeds[0]

    def seed_of(self, asked: int | None) -> int:
        """The one asked for, which must be the file's; the first, if none is.

        Raises:
            ParamsError: it is not.
        """
        if asked is not None and asked not in self.train.seeds:
            listed = ", ".join(map(str, self.train.seeds))
            raise ParamsError(f"seed {asked} is not in params.yaml, whose train.seeds lists: {listed}")
        return self.seed if asked is None else asked

    def method_of(self, model: str) -> str:
        """Of a model of the file: the method that it is a variant of, its own name where that is a method's.

        Raises:
            ParamsError: no such model in the file.
        """
        self._require(model)
        return self._methods[model]

    def _require(self, model: str) -> None:
        if model not in self.models:
            raise ParamsError(f"model '{model}' is not in params.yaml, which lists: {', '.join(self.models)}")

    def model_config_of(self, model: str) -> "Config":
        """The validated hyper-parameters of `model`; the file must have been loaded with its models checked.

        Raises:
            ParamsError: no such model in the file.
        """
        from anomaly_models.base import Config

        self._require(model)
        config = self.models[model]
        assert isinstance(config, Config), "load_checked comes first"
        return config

    def tuned_of(self, model: str) -> Tuned | None:
        """What the settings of a model of the file were chosen on, if `tune` has chosen them."""
        return tuned_of(self._sections.get(model))

    def views(self) -> Views:
        """What each model sees of a picture; the models need not have been checked.

        Raises:
            ParamsError: one message with every section that does not say.
        """
        sections = {name: dict(value) if isinstance(value, BaseModel) else value for name, value in self.models.items()}
        problems = section_problems({"models": sections}, "models", Views)
        if problems:
            raise ParamsError("\n  ".join(["params.yaml:", *problems]))
        return Views.model_validate(sections)

    def defects_apart(self, *, learns: bool) -> bool:
        """Whether a model is not tested on the real defects that models learn from, or are tuned on.

        `learns`: whether it does so itself.

        Where no model of the file learns from any, none is apart. The models must have been checked.
        """
        learners = [
            name for name in self.models if self.model_config_of(name).wants.anomalies or self.chosen_on_defects(name)
        ]
        some = bool(learners) and self.prepare.anomalous_train.count > 0
        return learns or (some and self.evaluate.learnt_defects == "tested_by_nobody")

    def told_of(self, model: str) -> str | None:
        """The same in words, for `variants.sentences`."""
        tuned = self.tuned_of(model)
        return None if tuned is None else tuned.text

    def chosen_on_defects(self, model: str) -> bool:
        """Whether the settings of a model were chosen on real defects, on which it cannot be tested then."""
        tuned = self.tuned_of(model)
        return tuned is not None and tuned.defects == "real"

    def check_category(self, category: str) -> None:
        """Raise ParamsError if `category` is not one of the file's."""
        if category not in self.data.categories:
            listed = ", ".join(self.data.categories)
            raise ParamsError(f"category '{category}' is not in params.yaml, whose data.categories lists: {listed}")

    def entry(
        self, section: Literal["distill", "penalty", "textures"], model: str, schema: type[RootModel[dict[str, T]]]
    ) -> T:
        """What `section` says for `model`, validated.

        Raises:
            ParamsError: nothing, or something wrong.
        """
        found = getattr(self, section)
        if model not in found:
            raise ParamsError(
                f"{section}.{model}: not in params.yaml; its {section} section serves: {', '.join(found)}"
            )
        one = {model: found[model]}
        problems = section_problems({section: one}, section, schema)
        if problems:
            raise ParamsError("\n  ".join(["params.yaml:", *problems]))
        return schema.model_validate(one).root[model]

    def cells(self) -> list[tuple[str, str]]:
        """Every (model, category), in the file's order."""
        return [(model, category) for model in self.models for category in self.data.categories]

    def trainings(self) -> list[tuple[str, str, int]]:
        """Every (model, category, seed): the cells under the first seed, then under the next."""
        return [(model, category, seed) for seed in self.train.seeds for model, category in self.cells()]


def method_of(name: str, section: object) -> str:
    """What a section of `models` says under `method`; its own name, where it says nothing."""
    return str(section.get("method", name)) if isinstance(section, dict) else name


def load_params(path: Path) -> Params:
    """Read and validate the file, but for what needs the models' own code: `preview.check.load_checked` does that.

    Raises:
        ParamsError: one message with every problem, each with its dotted path and the value found.
    """
    raw = read_yaml(path)
    params, problems = validated(raw)
    if problems or params is None:
        raise refusal(path, problems)
    return params


def validated(raw: dict[str, Any]) -> tuple[Params | None, list[str]]:
    """What a file's content says, None where that cannot be known, and every problem that shows without the models."""
    problems: list[str] = []
    params: Params | None = None
    try:
        params = Params.model_validate(raw)
        problems += _category_problems(params) + _precision_problems(params) + _sweep_problems(params)
    except ValidationError as error:
        problems += problems_in(error, "", Params, raw)
    problems += section_problems(raw, "download", DownloadParams) + tuned_problems(raw.get("models"))
    return params, problems


def _sweep_problems(params: Params) -> list[str]:
    return [
        f"sweep.models.{name}: not in models{hint(name, params.models)}"
        for name in params.sweep.models
        if name not in params.models
    ]


def _precision_problems(params: Params) -> list[str]:
    """Where thresholds come from models of the other folds, none of these is the int8 file."""
    if "int8" not in params.export.precisions or params.prepare.holdout != "folds":
        return []
    return [
        "export.precisions: int8 with prepare.holdout = 'folds': its threshold is set on good parts that it has not "
        "learnt from; hold out a share, such as 0.25, or write [float32]"
    ]


def _category_problems(params: Params) -> list[str]:
    named = {"surfaces": params.prepare.surfaces, "regions": list(params.prepare.regions)}
    return [
        f"prepare.{key}: '{name}' is not among data.categories{hint(name, params.data.categories)}"
        for key, names in named.items()
        for name in names
        if name not in params.data.categories
    ]
