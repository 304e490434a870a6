"""What a model's settings were chosen on by `blemish tune`: a record in its section of params.yaml, beside `method`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveInt, ValidationError

from anomaly_models.common.settings import Settings
from pipelines.numbers import counted
from pipelines.settings.problems import problems_in

TUNED = "tuned"  # the key; no setting, so that nothing is trained anew for it
_DEFECTS = {
    "synthetic": "synthetic defects on good parts; test images and held-out parts unseen",
    "real": "known defects, which are not in its test; test images and held-out parts unseen",
}


class Tuned(Settings):
    model: str  # whose settings the search began from
    category: str
    trials: PositiveInt  # that ended, the model's own settings among them
    defects: Literal["synthetic", "real"]  # that good parts were to be told from
    objective: float  # as `pipelines.tuning.judge` says
    before: float | None  # of the settings that the search began from; None if they could not be judged

    @property
    def text(self) -> str:
        """What is said of the model wherever its figures stand."""
        return f"tuned on {self.category}: {counted(self.trials, 'trial')} against {_DEFECTS[self.defects]}"


def tuned_of(section: object) -> Tuned | None:
    """The record of a model's section, if it has one.

    Raises:
        ValidationError: it is no such record.
    """
    found = section.get(TUNED) if isinstance(section, Mapping) else None
    return None if found is None else Tuned.model_validate(found)


def tuned_problems(models: object) -> list[str]:
    """What is wrong with the records in section `models`."""
    problems: list[str] = []
    for name, section in models.items() if isinstance(models, dict) else ():
        try:
            tuned_of(section)
        except ValidationError as error:
            problems += problems_in(error, f"models.{name}.{TUNED}", Tuned, section[TUNED])
    return problems


def without_record(section: Any) -> Any:
    """A model's section as its method knows it: settings alone."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in ("method", TUNED)}
