"""The whole params.yaml, with the models' own settings and all that they read; needs torch's import."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.errors import BlemishError, DatasetError, WeightsError, hint, told
from pipelines.files import atomic_folder, sha256_lines
from pipelines.lineage import ROOT, STAGES, code_of, code_of_stage
from pipelines.paths import Project
from pipelines.preparation.layouts import choose_layout
from pipelines.preparation.listing import Findings
from pipelines.settings.params import Params, method_of, validated
from pipelines.settings.problems import problems_in, read_yaml, refusal, section_problems
from pipelines.settings.tuned import without_record

if TYPE_CHECKING:
    from anomaly_models.base import Config
    from anomaly_models.common.backbones import BackboneConfig

_NOT_NAMES = ("distill", "logs")  # which are folders of their own in work/
# The sections that describe what is made for models, and the setting that must be the model's own.
INPUTS = {"distill": "width", "penalty": "image_size", "textures": "image_size"}


def load_checked(path: Path) -> Params:
    """Read and validate the file as a whole: `load_params`, and each model's section with all that the models read.

    Raises:
        ParamsError: one message with every problem, each with its dotted path and the value found.
    """
    raw = read_yaml(path)
    params, problems = validated(raw)
    configs, model_problems = _model_configs(raw.get("models"))
    problems += model_problems + _input_problems(raw, configs)
    if params is not None and params.prepare.holdout == "folds":
        problems += _fold_problems(configs)
    if problems or params is None:
        raise refusal(path, problems)
    return params.model_copy(update={"models": configs})


def require_packages(params: Params) -> None:
    """Every backbone with `weights: package` has its package installed, so that nothing is trained in vain before it.

    Raises:
        WeightsError: one message with every problem.
    """
    from pipelines.training.packaged import packaged, state_file

    problems: list[BlemishError] = []
    for name in sorted({backbone.name for backbone in _backbones(params) if backbone.weights == "package"}):
        try:
            state_file(packaged(name))
        except WeightsError as error:
            problems.append(error)
    if problems:
        raise WeightsError(told(problems, f"{len(problems)} backbones without weights"))


def _backbones(params: Params) -> list["BackboneConfig"]:
    """Of the models of the file, and of what their teachers learn from."""
    from anomaly_models.common.backbones import BackboneConfig
    from pipelines.teachers.config import Teachers

    used = {model: entry for model, entry in params.distill.items() if model in params.models}
    settings = [*params.models.values(), *Teachers.model_validate(used).root.values()]
    return [value for section in settings for _, value in section if isinstance(value, BackboneConfig)]


def write_checked(params: Params, project: Project) -> None:
    """What DVC's other stages depend on: a small file for each thing that they must know, which changes with it alone.

    DVC reads all of params.yaml again for each stage that depends on a part of it, which takes minutes with hundreds of
    cells, and knows of no code but by its place: so a cell's stages depend on these. `train` depends on the folder of a
    model's inputs, too, also where it wants none.
    """
    from anomaly_models import MODELS

    for name in params.models:
        project.inputs(name).mkdir(parents=True, exist_ok=True)
    with atomic_folder(project.checked) as temporary:
        for place, text in _told(params, {*MODELS, *params.models}):
            path = temporary / place
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _told(params: Params, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The files of `checked/` and what stands in them."""
    yield "params.txt", "params.yaml is in order\n"
    for name in names:
        yield f"in_models/{name}.txt", "in models\n" if name in params.models else "not in models\n"
    for name in params.models:
        config, method = params.model_config_of(name), params.method_of(name)
        code = sha256_lines(sorted(code_of(f"anomaly_models/{method}.py")), ROOT)
        yield f"models/{name}.txt", f"method: {method}\n{_as_yaml(config.model_dump(mode='json'))}{code}"
        learns = config.wants.anomalies > 0 or params.chosen_on_defects(name)
        tested = "but for those that models learn from" if params.defects_apart(learns=learns) else "all"
        yield f"tests/{name}.txt", f"defects tested on: {tested}\n"
    yield "frames.txt", "".join(f"{name} sees {frame}\n" for name, frame in sorted(params.views().frames.items()))
    for stage in STAGES:
        yield f"stages/{stage}.txt", _as_yaml(_settings_of(stage, params)) + sha256_lines(code_of_stage(stage), ROOT)


def _settings_of(stage: str, params: Params) -> dict[str, Any]:
    """Those of the stages that there is one of for each cell, but for what a model or its tests have a file of."""
    match stage:
        case "evaluate":
            return params.evaluate.model_dump(mode="json", exclude={"bootstrap", "learnt_defects"})
        case "export":
            return params.export.model_dump(mode="json") | {"max_megapixels": params.prepare.max_megapixels}
        case "latency":
            return params.latency.model_dump(mode="json")
    return {}


def _as_yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=True) if settings else ""


def missing(params: Params, project: Project) -> list[str]:
    """A line for each folder and file that the params file names and that is not there, nor made by a stage.

    A category's folder is also looked at for its layout. What `download` brings is not missed before it has run.
    """
    brought = [(project.data / name).resolve() for name in params.download]
    problems = []
    for category in params.data.categories:
        folder = project.root / params.data.root / category
        if folder.exists() or not any(folder.resolve().is_relative_to(source) for source in brought):
            try:
                choose_layout(folder, params.prepare.layout, Findings())
            except DatasetError as error:
                problems.append(str(error))
    for section, key in (("distill", "photos"), ("penalty", "photos"), ("textures", "texture_photos")):
        folder = project.root / getattr(params, key)
        used = any(model in params.models for model in getattr(params, section))
        if used and not folder.is_dir() and not any(folder.resolve().is_relative_to(source) for source in brought):
            problems.append(f"{key}: {folder}: no such folder, which {section} takes its pictures from")
    for model in params.models:
        teacher = params.model_config_of(model).wants.teacher
        if teacher and model not in params.distill and not (project.root / teacher).is_file():
            problems.append(
                f"models.{model}.teacher: {teacher}: no such file; describe in distill.{model} how to make it, or "
                "put it there"
            )
    problems += [
        f"backbone {name}: weights: {weights}: no such file; give its path, or weights: package or timm"
        for name, weights in sorted({(backbone.name, backbone.weights) for backbone in _backbones(params)})
        if weights not in ("package", "timm") and not Path(weights).is_file()
    ]
    return list(dict.fromkeys(problems))


def unused_sections(params: Params) -> list[str]:
    """A line for each input that is described for a model which is not in `models`: nothing is made for it."""
    return [
        f"{section}.{name}: not used, since {name} is not in models"
        for section in INPUTS
        for name in getattr(params, section)
        if name not in params.models
    ]


def _input_problems(raw: dict[str, Any], configs: Mapping[str, "Config"]) -> list[str]:
    """What the models read must be made, and at their size."""
    from pipelines.preparation.penalty import Penalties
    from pipelines.preparation.textures import TextureSets
    from pipelines.teachers.config import Teachers

    schemas: dict[str, type[BaseModel]] = {"distill": Teachers, "penalty": Penalties, "textures": TextureSets}
    problems = [problem for name, schema in schemas.items() for problem in section_problems(_used(raw), name, schema)]
    for section, key in INPUTS.items():
        for name in raw[section] if isinstance(raw.get(section), dict) else ():
            problems += _input_problem(raw, section, name, key, configs)
    return problems


def _fold_problems(configs: Mapping[str, "Config"]) -> list[str]:
    if slow := [name for name, config in configs.items() if not config.learns_at_once]:
        return [
            f"prepare.holdout = 'folds': {', '.join(slow)} would train once for each fold, or calibrate on what is "
            "held out; set a share, such as 0.25, or leave in models what learns at once (fapm, adfa with epochs: 0)"
        ]
    return []


def _used(raw: dict[str, Any]) -> dict[str, Any]:
    """`distill`, `penalty` and `textures` without what is described for other models than those of `models`."""
    models = raw.get("models")
    return {
        section: {name: value for name, value in raw[section].items() if isinstance(models, dict) and name in models}
        for section in INPUTS
        if isinstance(raw.get(section), dict)
    }


def _input_problem(
    raw: dict[str, Any], section: str, name: Any, key: str, configs: Mapping[str, "Config"]
) -> Iterator[str]:
    """What is wrong with one entry of `distill`, `penalty` or `textures`, but for what its own schema says."""
    from anomaly_models import MODELS

    if name not in MODELS and name not in (raw["models"] if isinstance(raw.get("models"), dict) else ()):
        yield _unknown_model(section, name)
    elif name in configs:
        of_network = configs[name].network.model_dump()
        if (found := _at(raw, section, name, key)) != of_network.get(key, found):
            own = "tiles" if configs[name].tiles is not None and key == "image_size" else key
            yield f"{section}.{name}.{key} = {found!r}: models.{name}.{own} is {of_network[key]!r}"


def _unknown_model(section: str, name: Any) -> str:
    from anomaly_models import MODELS

    variant = "; a variant of one says which: method: fapm" if section == "models" else ", and the variants in models"
    return f"{section}.{name}: unknown model{hint(str(name), MODELS)}; known: {', '.join(MODELS)}{variant}"


def wrong_name(name: Any, method: str) -> str | None:
    """Why a variant cannot be called so; None if it can."""
    from anomaly_models import MODELS

    if name in MODELS and name != method:
        return f"models.{name}.method = {method!r}: {name} is a method's own name; call the variant otherwise"
    if name not in MODELS and (re.fullmatch("[a-z][a-z0-9_]{0,59}", str(name)) is None or name in _NOT_NAMES):
        return (
            f"models.{name}: a variant's name has small letters, digits and underscores, up to 60, a letter first, and "
            f"is none of {', '.join(_NOT_NAMES)}"
        )
    return None


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
        method = method_of(name, values)
        if method not in MODELS:
            named = isinstance(values, dict) and "method" in values
            unknown = f"models.{name}.method = {method!r}: unknown{hint(method, MODELS)}; known: {', '.join(MODELS)}"
            problems.append(unknown if named else _unknown_model("models", name))
            continue
        if wrong := wrong_name(name, method):
            problems.append(wrong)
            continue
        settings = without_record(values)
        try:
            configs[name] = MODELS[method].Config.model_validate(settings)
        except ValidationError as error:
            problems += problems_in(error, f"models.{name}", MODELS[method].Config, settings)
            continue
        problems += _teacher_problems(name, configs[name])
    return configs, problems


def _teacher_problems(name: str, config: "Config") -> Iterator[str]:
    """DVC follows what is made for a model in its own folder alone."""
    parts = Path(config.wants.teacher or "").parts
    if parts[:1] == ("pretrained",) and parts[1] != name:
        own = f"pretrained/{name}/{'/'.join(parts[2:])}"
        yield (
            f"models.{name}.teacher = {config.wants.teacher!r}: another model's, whose changes would go unseen here; "
            f"name {own}, and describe distill.{name} (with the settings of another entry, its teacher is taken over)"
        )
