"""params.yaml -> Params: every number that changes a result, validated once, with every problem listed at once."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    RootModel,
    ValidationError,
)

from pipelines.errors import ParamsError
from pipelines.preparation.prepare import PrepareConfig
from pipelines.sources.download import DownloadParams

if TYPE_CHECKING:
    from anomaly_models.base import Config

T = TypeVar("T")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_. ]*$"  # '-' and '/' would be ambiguous in DVC's cell names


def _distinct_names(categories: list[str]) -> list[str]:
    """Two names that differ in case only are one folder on many file systems."""
    seen: dict[str, str] = {}
    for name in categories:
        key = name.casefold()
        if key in seen:
            raise ValueError(f"'{seen[key]}' and '{name}' are the same folder where case is ignored: rename one")
        seen[key] = name
    return categories


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    root: Annotated[str, Field(min_length=1)]  # the folder that holds a folder per category
    categories: Annotated[
        list[Annotated[str, Field(pattern=_NAME)]], Field(min_length=1), AfterValidator(_distinct_names)
    ]

    @property
    def name(self) -> str:
        """What the data set is called: its folder."""
        return Path(self.root).resolve().name


class TrainConfig(_Section):
    seed: NonNegativeInt


class EvaluateConfig(_Section):
    resolution: Literal["prepared", "native"]  # where pixels are compared: mask down, or map up
    pixel_metrics: Literal["exact", "streaming"]
    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)]  # of good parts; the threshold is set for it
    bootstrap: Annotated[int, Field(ge=50)]  # drawn test sets, for intervals and comparisons


class ExportConfig(_Section):
    opset: Annotated[int, Field(ge=18)]
    tolerance: Annotated[float, Field(gt=0)]  # largest difference of a map or score, absolute up to 1, relative above


class LatencyConfig(_Section):
    threads: PositiveInt  # of ONNX Runtime
    seconds: Annotated[float, Field(gt=0)]  # of measuring images one by one, and as long again in batches
    batch_size: PositiveInt  # images at once, for the throughput


class TrackingConfig(_Section):
    experiment: Annotated[str, Field(min_length=1)]


class Params(_Section):
    """The whole file.

    `models`, `distill`, `penalty` and `textures` are plain mappings where their check was not asked for.
    """

    download: dict[str, Any]  # checked as pipelines.sources.download.DownloadParams
    data: DataConfig
    prepare: PrepareConfig
    photos: Annotated[str, Field(min_length=1)]  # folder of everyday pictures, for teachers and penalty images
    texture_photos: Annotated[str, Field(min_length=1)]  # folder of pictures of surfaces, for synthetic defects
    distill: dict[str, Any]  # by the model that the teacher is for; checked as pipelines.teachers.distill.TeacherConfig
    penalty: dict[str, Any]  # by the model that the images are for; checked as pipelines.preparation.penalty.Penalties
    textures: dict[str, Any]  # by the model that they are for; checked as pipelines.preparation.textures.TextureSets
    models: Annotated[dict[str, Any], Field(min_length=1)]
    train: TrainConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    latency: LatencyConfig
    tracking: TrackingConfig

    def model_config_of(self, model: str) -> "Config":
        """The validated hyper-parameters of `model`; the file must have been loaded with its models checked.

        Raises:
            ParamsError: no such model in the file.
        """
        from anomaly_models.base import Config

        if model not in self.models:
            raise ParamsError(f"model '{model}' is not in params.yaml, which lists: {', '.join(self.models)}")
        config = self.models[model]
        assert isinstance(config, Config), "load_params(check_models=True) comes first"
        return config

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
        problems = _section_problems({section: found}, section, schema)
        if problems:
            raise ParamsError("\n  ".join(["params.yaml:", *problems]))
        return schema.model_validate(found).root[model]

    def cells(self) -> list[tuple[str, str]]:
        """Every (model, category), in the file's order."""
        return [(model, category) for model in self.models for category in self.data.categories]


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; a second `fapm:` would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # a key that cannot be one is the parent's to refuse, and `<<` may stand beside what it merges
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping, unvalidated.

    Raises:
        ParamsError: there is no such file, it is not YAML, or not a mapping at the top.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(
            f"{path}: no such file; run in the project's folder, or put a preset in place with `blemish preset demo`"
        ) from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        # a subclass of SafeLoader: nothing but plain YAML types is constructed
        value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ParamsError(f"{path}: not valid YAML{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ParamsError(f"{path}: holds {type(value).__name__}, not a mapping of sections")
    return value


def load_params(path: Path, *, check_models: bool) -> Params:
    """Read and validate the file. `check_models` also validates each model's section, which needs torch's import.

    Raises:
        ParamsError: one message with every problem, each with its dotted path and the value found.
    """
    raw = read_yaml(path)
    problems: list[str] = []
    params: Params | None = None
    try:
        params = Params.model_validate(raw)
        problems += _surface_problems(params)
    except ValidationError as error:
        problems += problems_in(error, "", Params, raw)
    problems += _section_problems(raw, "download", DownloadParams)
    if check_models:
        configs, model_problems = _model_configs(raw.get("models"))
        problems += model_problems + _input_problems(raw, configs)
        if params is not None:
            params = params.model_copy(update={"models": configs})
    if problems:
        raise refusal(path, problems)
    assert params is not None
    return params


def _surface_problems(params: Params) -> list[str]:
    return [
        f"prepare.surfaces: '{name}' is not among data.categories{_hint(name, params.data.categories)}"
        for name in params.prepare.surfaces
        if name not in params.data.categories
    ]


def _section_problems(raw: dict[str, Any], name: str, schema: type[BaseModel]) -> list[str]:
    section = raw.get(name)
    if not isinstance(section, dict):
        return []  # already reported
    try:
        schema.model_validate(section)
    except ValidationError as error:
        return problems_in(error, name, schema, section)
    return []


def _input_problems(raw: dict[str, Any], configs: Mapping[str, "Config"]) -> list[str]:
    """What the models read must be made, and at their size."""
    from pipelines.preparation.penalty import Penalties
    from pipelines.preparation.textures import TextureSets
    from pipelines.teachers.distill import Teachers

    schemas: dict[str, type[BaseModel]] = {"distill": Teachers, "penalty": Penalties, "textures": TextureSets}
    problems = [problem for name, schema in schemas.items() for problem in _section_problems(raw, name, schema)]
    sizes = _at(raw, "prepare", "image_sizes")
    problems += [
        f"models.{name}.image_size = {config.image_size}: not one of prepare.image_sizes {sizes}"
        for name, config in configs.items()
        if isinstance(sizes, list) and config.image_size not in sizes
    ]
    for section, key in (("distill", "width"), ("penalty", "image_size"), ("textures", "image_size")):
        for name in raw.get(section) or {}:
            if name not in (raw.get("models") or {}):
                problems.append(f"{section}.{name}: for a model that is not in models")
            elif name in configs and (found := _at(raw, section, name, key)) != getattr(configs[name], key, found):
                wanted = getattr(configs[name], key)
                problems.append(f"{section}.{name}.{key} = {found!r}: models.{name}.{key} is {wanted!r}")
    return problems


def _at(raw: Any, *keys: str) -> Any:
    """The value under nested keys, None where something on the way is missing or no mapping."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def _model_configs(section: object) -> tuple[dict[str, "Config"], list[str]]:
    from anomaly_models import MODELS

    configs: dict[str, Config] = {}
    problems: list[str] = []
    if not isinstance(section, dict):
        return configs, problems  # already reported
    for name, values in section.items():
        if name not in MODELS:
            problems.append(f"models.{name}: unknown model{_hint(str(name), MODELS)}; known: {', '.join(MODELS)}")
            continue
        try:
            configs[name] = MODELS[name].Config.model_validate(values)
        except ValidationError as error:
            problems += problems_in(error, f"models.{name}", MODELS[name].Config, values)
    return configs, problems


def refusal(path: Path, problems: list[str]) -> ParamsError:
    """One message with every problem of a file."""
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    return ParamsError("\n  ".join([f"{path}: {count}", *problems]))


def problems_in(error: ValidationError, prefix: str, schema: type[BaseModel], value: object) -> list[str]:
    """Each problem that validation found, as `dotted.path = value: what is wrong`."""
    return [_problem(dict(detail), prefix, schema, value) for detail in error.errors(include_url=False)]


def _problem(detail: dict[str, Any], prefix: str, schema: type[BaseModel], value: object) -> str:
    """`dotted.path = value: what is wrong`, with a guess at what a misspelt key was to be."""
    kind, found, context = detail["type"], detail["input"], detail.get("ctx", {})
    parts = _parts_of_the_file(detail["loc"], value)
    if kind == "missing":
        parts.append(str(detail["loc"][-1]))
    if kind in ("union_tag_invalid", "union_tag_not_found"):  # the key that chooses between several schemas
        parts.append(context["discriminator"].strip("'"))
        found = context.get("tag")
    path = ".".join([prefix, *parts] if prefix else parts) or "settings"
    if kind in ("missing", "union_tag_not_found"):
        return f"{path}: missing"
    what = path if isinstance(found, dict) else f"{path} = {found!r}"
    if kind == "extra_forbidden":
        return f"{what}: unknown key{_hint(parts[-1], _known_keys(schema, detail['loc'][:-1]))}"
    return f"{what}: {_message(detail, found)}"


def _message(detail: dict[str, Any], found: object) -> str:
    """Pydantic's message, where it does not speak of Python or pydantic."""
    match detail["type"]:
        case "model_type" | "dict_type":
            return "Input should be a mapping"
        case "tuple_type":
            return "Input should be a list"
        case "union_tag_invalid":
            return f"Input should be one of {detail['ctx']['expected_tags']}"
        case "float_type" | "int_type" if isinstance(found, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", found):
            return f"{detail['msg']}; YAML takes it for text: write 1.0e-4, not 1e-4"
        case _:
            return str(detail["msg"]).removeprefix("Value error, ")


def _parts_of_the_file(location: tuple[int | str, ...], value: Any) -> list[str]:
    """Pydantic's location without its own additions, such as the name of the tried member of a union."""
    parts = []
    for part in location:
        held = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
        if part in held:
            value = held[part]
            parts.append(str(part))
    return parts


def _known_keys(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at `location` may have."""
    schemas = [schema]
    for part in location:
        fields = [known.model_fields[part] for known in schemas if part in known.model_fields]
        if fields:
            schemas = [inner for field in fields for inner in _schemas_in(field.annotation)]
    return [name for known in schemas for name in known.model_fields]


def _schemas_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for argument in get_args(annotation) for schema in _schemas_in(argument)]


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
