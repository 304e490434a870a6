import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from pipelines.tracking.views import offer_view

# SQLAlchemy warns of what MLflow's tables ask of it.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

TAG = "mlflow.sharedViewState.figures"
FIGURES = ["image_auroc", "recall"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture
def experiment(client: mlflow.MlflowClient, tmp_path: Path) -> str:
    return str(client.create_experiment(tmp_path.name, tmp_path.as_uri()))


def view_of(client: mlflow.MlflowClient, experiment: str) -> Any:
    """What the page opens."""
    tags = client.get_experiment(experiment).tags
    assert [name for name in tags if "View" in name] == [TAG]
    return json.loads(tags[TAG])


def test_the_view_has_the_figures_and_what_a_run_is_of(client: mlflow.MlflowClient, experiment: str) -> None:
    assert offer_view(client, experiment, FIGURES)
    view = view_of(client, experiment)
    state = json.loads(view["state"])
    assert state["selectedColumns"] == [
        "tags.`model`",
        "tags.`category`",
        "tags.`seed`",
        "metrics.`image_auroc`",
        "metrics.`recall`",
    ]
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "category"}]
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`image_auroc`", False)
    assert state.items() <= view.items()  # for pages that know of no envelope


def test_the_view_is_written_once(
    client: mlflow.MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_view(client, experiment, FIGURES)
    with monkeypatch.context() as patch:
        patch.setattr(client, "set_experiment_tag", lambda *_: pytest.fail("written again"))
        assert offer_view(client, experiment, FIGURES)
    assert offer_view(client, experiment, ["recall"])
    assert "image_auroc" not in view_of(client, experiment)["state"]


def test_what_somebody_made_of_the_view_stays(client: mlflow.MlflowClient, experiment: str) -> None:
    theirs = {"name": "mine", "createdAt": 1, "updatedAt": 2, "state": "{}"}
    client.set_experiment_tag(experiment, TAG, json.dumps(theirs))
    assert offer_view(client, experiment, FIGURES)
    assert view_of(client, experiment) == theirs


@pytest.mark.parametrize("damaged", ["", "no JSON", "[]", "{}"])
def test_a_damaged_view_is_mended(client: mlflow.MlflowClient, experiment: str, damaged: str) -> None:
    client.set_experiment_tag(experiment, TAG, damaged)
    assert offer_view(client, experiment, FIGURES)
    assert view_of(client, experiment)["name"] == "Figures by category"


def test_a_store_that_may_only_be_read_has_no_view(
    client: mlflow.MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MlflowException("Permission denied")

    monkeypatch.setattr(client, "set_experiment_tag", refuse)
    assert not offer_view(client, experiment, FIGURES)


def test_the_view_of_many_figures_is_no_longer_than_a_tag(client: mlflow.MlflowClient, experiment: str) -> None:
    assert offer_view(client, experiment, [f"a_metric_of_some_length_{number}" for number in range(12)])
    assert len(client.get_experiment(experiment).tags[TAG]) < 5000
