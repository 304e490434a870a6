"""The champion of each category in MLflow's model registry."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import RegisteredModel

from pipelines.errors import StageError
from pipelines.names import as_key
from pipelines.tracking.store import RUNS_PER_CALL, is_known, prepare_store, told_at_once

_LONGEST_NAME = 250  # of a registered model, which has neither / nor :, nor ? since that ends its address
_CHAMPION = "champion"  # the alias of a category's best model


def crown(project: Path, experiment: str, name: str, run_id: str | None, why: str) -> None:
    """Give the exported model of a run the alias "champion" of the registered model `name`, with `why` beside it.

    `models:/NAME@champion` is then that model, for MLflow's own tools. Without a run, or where its model was not
    exported to this store, nobody is champion.

    Raises:
        StageError: the store cannot be used.
    """
    name = _registered(name)
    with _looked_up(project, experiment, name) as (client, known):
        best = _exported_model(client, run_id) if run_id and is_known(client, run_id) else None
        if best is None:
            if known is not None and _CHAMPION in known.aliases:
                client.delete_registered_model_alias(name, _CHAMPION)
            return
        if known is None:
            client.create_registered_model(name, description="The best model of a category, by its test images.")
        of_run = client.search_model_versions(f"run_id = '{run_id}'", max_results=RUNS_PER_CALL)
        same = [found for found in of_run if (found.name, found.source) == (name, best.artifact_location)]
        version = same[0] if same else None
        if version is None:
            version = client.create_model_version(name, best.artifact_location, run_id, model_id=best.model_id)
        client.update_model_version(name, version.version, why)
        client.set_registered_model_alias(name, _CHAMPION, version.version)


def reigning(project: Path, experiment: str, name: str) -> str | None:
    """The run whose model is champion of the registered model `name`; None where nobody is.

    Raises:
        StageError: the store cannot be used.
    """
    name = _registered(name)
    with _looked_up(project, experiment, name) as (client, known):
        if known is None or _CHAMPION not in known.aliases:
            return None
        return client.get_model_version(name, known.aliases[_CHAMPION]).run_id


@contextlib.contextmanager
def bundle_of_champion(project: Path, experiment: str, name: str) -> Iterator[Path]:
    """The bundle that the champion of `name` was logged as, in a temporary place.

    Raises:
        StageError: the store cannot be used, or has no such file.
    """
    uri, _ = prepare_store(project, experiment)
    address = f"models:/{_registered(name)}@{_CHAMPION}"
    with tempfile.TemporaryDirectory() as temporary:
        with told_at_once(uri):
            place = Path(
                mlflow.artifacts.download_artifacts(
                    f"{address}/artifacts", dst_path=temporary, tracking_uri=uri, registry_uri=uri
                )
            )
        found = sorted(place.rglob("*.zip"))
        if len(found) != 1:
            raise StageError(f"{address}: holds no bundle; it was exported by another version of Blemish")
        yield found[0]


def _registered(name: str) -> str:
    return as_key(name, "[/:?]", _LONGEST_NAME)


@contextlib.contextmanager
def _looked_up(
    project: Path, experiment: str, name: str
) -> Iterator[tuple[mlflow.MlflowClient, RegisteredModel | None]]:
    """The registry, and the model of that name if it has one; raises StageError where the store cannot be used."""
    uri, _ = prepare_store(project, experiment)
    with told_at_once(uri):
        client = mlflow.MlflowClient(uri)
        models = client.search_registered_models(max_results=RUNS_PER_CALL)
        yield client, next((model for model in models if model.name == name), None)


def _exported_model(client: mlflow.MlflowClient, run_id: str) -> LoggedModel | None:
    """The last model that a run's export logged."""
    outputs = client.get_run(run_id).outputs
    models = [client.get_logged_model(output.model_id) for output in (outputs.model_outputs if outputs else [])]
    return max(models, key=lambda model: model.creation_timestamp, default=None)
