"""Ray, looked for."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.errors import ArgumentError, StageError
from pipelines.settings.params import Params, SweepConfig
from pipelines.sweeps import cluster
from pipelines.sweeps.cluster import Cluster, connected


def refused(address: str | None, words: Path) -> str:
    with pytest.raises(ArgumentError) as error, connected(address, 1, words):
        raise AssertionError
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_ray_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert refused(None, tmp_path / "words") == ("a sweep needs Ray: pip install 'blemish[ray]', or use `blemish run`")


@pytest.mark.parametrize("address", ["somewhere", "http://127.0.0.1:6379", "127.0.0.1:port", ":6379"])
def test_what_is_no_address(address: str, tmp_path: Path) -> None:
    told = f"address '{address}': give that of a Ray cluster, such as 10.0.0.1:6379"
    assert refused(address, tmp_path / "words") == told


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nobody_listens(scheme: str, tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{one.getsockname()[1]}"
        assert refused(address, tmp_path / "words").startswith(f"Ray at {address} does not answer (")


def test_where_somebody_else_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ANSWER", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = f"Ray at {address} does not answer as Ray does: is it that of a cluster's head?"
        assert refused(address, tmp_path / "words") == told


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The node timed out.\nMore of it", "The node timed out."),
        ("Failure from server:\nTraceback:\n  File\nRuntimeError: no room\n", "RuntimeError: no room"),
        ("", "RuntimeError"),
    ],
)
def test_ray_does_not_start(said: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(StageError) as error, connected(None, 1, tmp_path / "words"):
        raise AssertionError
    assert str(error.value) == f"Ray does not start here ({told}): call again, or use `blemish run`"


def of(*nodes: dict[str, float], hosts: tuple[str, ...] = ()) -> Cluster:
    names = hosts or tuple(socket.gethostname() for _ in nodes)
    shown: list[dict[str, Any]] = [
        {"Alive": True, "Resources": node, "NodeManagerHostname": name} for node, name in zip(nodes, names, strict=True)
    ]
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}, "NodeManagerHostname": "gone"}
    return Cluster(SimpleNamespace(nodes=lambda: [*shown, gone], available_resources=lambda: {"CPU": 1.0}), True)


def params(**sweep: Any) -> Params:
    return Params.model_construct(models={"fapm": {}, "bgad": {}}, sweep=SweepConfig.model_validate(sweep))


def test_each_cell_needs_a_machine_that_has_enough() -> None:
    two = of({"CPU": 2.0, "memory": 8.0 * 2**30}, {"CPU": 1.0, "GPU": 1.0, "memory": 2.0 * 2**30})
    two.require_room(params())
    two.require_room(params(num_gpus=0.25))
    larger = {"bgad": {"num_cpus": 1, "num_gpus": 2, "memory": 16, "processes": 2}}
    with pytest.raises(ArgumentError) as error:
        two.require_room(params(models=larger))
    assert str(error.value) == (
        "a cell of bgad wants 2 GPUs and 16 GiB of memory, and no machine has it: the most that one has is 1 GPUs and "
        "8 GiB of memory; lower sweep in params.yaml, or add a machine"
    )
    with pytest.raises(ArgumentError, match="a cell of fapm wants 2 CPUs and 1 GPUs, and no machine has it"):
        two.require_room(params(num_cpus=2, num_gpus=1, processes=1))  # each machine has one of them


def test_how_much_is_in_use() -> None:
    assert of({"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}).in_use() == ("2 of 3 CPUs and 1 of 1 GPUs in use on 2 machines")


def test_other_machines_need_a_server() -> None:
    of({"CPU": 1.0}).require_server("sqlite:///mlflow.db")
    two = of({"CPU": 1.0}, {"CPU": 1.0}, hosts=(socket.gethostname(), "other"))
    two.require_server("http://127.0.0.1:5000")
    with pytest.raises(ArgumentError, match=r"^cells on other need an MLflow server"):
        two.require_server("sqlite:///mlflow.db")
