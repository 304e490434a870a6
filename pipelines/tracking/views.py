"""The view of an experiment's runs that MLflow's page opens with: chosen columns, grouped by category, best run first.

MLflow keeps a view in a tag of the experiment, whose name ends in the key that an address opens it by. Nothing
documents what is in it: this is what the page of MLflow 3.17 writes. Pages from before views had names read the same
keys without their envelope.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import mlflow
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

KEY = "figures"  # of the view, in its address
_TAG = f"mlflow.sharedViewState.{KEY}"
_NAME = "Figures by category"  # in the page's list of views
_TAGS = ("model", "category", "seed")
_WIDTHS = {"model": 100, "category": 90, "seed": 60}  # pixels; ten figures are to fit beside them
_FIGURE_WIDTH = 92


def offer_view(client: mlflow.MlflowClient, experiment_id: str, figures: Sequence[str]) -> bool:
    """Keep the view with the experiment; gives whether it is there.

    One that somebody has changed on the page stays as it is. Where the experiment may only be read, there is none.
    """
    experiment = client.get_experiment(experiment_id)
    view = _view(experiment, figures)
    found = experiment.tags.get(_TAG)
    if found == view or (found is not None and _is_changed(found)):
        return True
    try:
        client.set_experiment_tag(experiment_id, _TAG, view)
    except MlflowException:
        return found is not None
    return True


def _view(experiment: Experiment, figures: Sequence[str]) -> str:
    state = _state(figures)
    made = {"createdAt": experiment.creation_time, "updatedAt": experiment.creation_time}
    return json.dumps({"name": _NAME, **made, "state": json.dumps(state), **state})


def _state(figures: Sequence[str]) -> dict[str, Any]:
    tags = {f"tags.`{name}`": _WIDTHS[name] for name in _TAGS}
    metrics = {f"metrics.`{name}`": _FIGURE_WIDTH for name in figures}
    columns = tags | metrics
    return {
        "selectedColumns": list(columns),
        "columnOrder": ["attributes.`Run Name`", *columns, "duration"],
        "columnWidths": columns,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "category"}]},
        "useGroupedValuesInCharts": False,  # a curve for each run, not for each category
        "orderByKey": f"metrics.`{figures[0]}`",
        "orderByAsc": False,
    }


def _is_changed(view: str) -> bool:
    """Whether the page has written it anew."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        envelope = json.loads(view)
        return bool(envelope["updatedAt"] != envelope["createdAt"])
    return False
