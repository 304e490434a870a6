"""The whole params.yaml, with the models' own settings and all that they read; needs torch's import."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from pipelines.errors import hint
from pipelines.settings.params import Params, validated
from pipelines.settings.problems import problems_in, read_yaml, refusal, section_problems

if TYPE_CHECKING:
    from anomaly_models.base import Config


def load_checked(path: Path) -> Params:
    """Read and validate the file as a whole: `load_params`, and each model's section with all that the models read.

    Raises:
        ParamsError: one message with every problem, each with its dotted path and the value found.
    """
    raw = read_yaml(path)
    params, problems = validated(raw)
    configs, model_problems = _model_configs(raw.get("models"))
    problems += model_problems + _input_problems(raw, configs)
    if problems or params is None:
        raise refusal(path, problems)
    return params.model_copy(update={"models": configs})


def _input_problems(raw: dict[str, Any], configs: Mapping[str, "Config"]) -> list[str]:
    """What the models read must be made, and at their size."""
    from pipelines.preparation.penalty import Penalties
    from pipelines.preparation.textures import TextureSets
    from pipelines.teachers.distill import Teachers

    schemas: dict[str, type[BaseModel]] = {"distill": Teachers, "penalty": Penalties, "textures": TextureSets}
    problems = [problem for name, schema in schemas.items() for problem in section_problems(raw, name, schema)]
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
            problems.append(f"models.{name}: unknown model{hint(str(name), MODELS)}; known: {', '.join(MODELS)}")
            continue
        try:
            configs[name] = MODELS[name].Config.model_validate(values)
        except ValidationError as error:
            problems += problems_in(error, f"models.{name}", MODELS[name].Config, values)
    return configs, problems
