"""What MLflow runs for an exported model: pictures in, decisions out. It logs this file as it stands, with a bundle.

So it holds what it takes in an environment with MLflow and the bundle alone: the modules that score lie in the bundle.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Decisions(PythonModel):
    """Answers a table whose first column holds pictures: paths, bytes, or these as Base64."""

    def load_context(self, context: PythonModelContext) -> None:
        (path,) = (Path(artifact) for artifact in context.artifacts.values())
        if not _is_installed():
            sys.path.insert(0, str(path))
        from pipelines.inference.answers import COLUMNS, Answers

        self._answers, self._columns = Answers(path), COLUMNS

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  # MLflow's own way to call
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Score, threshold, decision and disposition of each picture; or its error, in a row of its own."""
        answers = self._answers([] if model_input.empty else model_input.iloc[:, 0])
        # With numbers alone, None would be NaN.
        return pd.DataFrame(answers, columns=self._columns, dtype=object)


def _is_installed() -> bool:
    """Whether `pipelines` is Blemish's here; many a project has a folder of that name."""
    found = importlib.util.find_spec("pipelines")
    return found is not None and any(
        Path(folder, "inference", "answers.py").is_file() for folder in found.submodule_search_locations or ()
    )


set_model(Decisions())
