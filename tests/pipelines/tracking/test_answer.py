"""A tracking server that is away is told of within seconds, by every verb that writes to it or reads from it."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CATEGORY, tiny_params, write_params

from pipelines.errors import StageError
from pipelines.tracking import store

VERBS = ("train", "evaluate", "export", "latency")
OF_CELLS = [(verb, "fapm", CATEGORY) for verb in VERBS]


def test_a_server_that_takes_calls_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(StageError, match="does not answer; mend it, or check MLFLOW_TRACKING_URI") as caught:
            store.require_answer(tmp_path)
    assert time.monotonic() - started < 15
    assert "secret" not in str(caught.value)


def test_a_local_store_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store.require_answer(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [*OF_CELLS, ("report",), ("compare",), ("run",), ("ui",)], ids=" ".join)
def test_every_verb_asks_before_it_works(
    tmp_path: Path, blemish: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    write_params(tmp_path, tiny_params())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")

    def away(_: Path) -> None:
        raise StageError("away")

    monkeypatch.setattr(store, "require_answer", away)
    outcome = blemish(*command)
    assert (outcome.code, outcome.err) == (1, "error: away\n")
