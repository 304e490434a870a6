"""`make audit` without a network: a copy of OSV's records is matched as OSV's server would, which pip-audit asks."""

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"


def record(name: str, events: list[dict[str, str]], versions: list[str] | None = None) -> dict[str, Any]:
    package = {"ecosystem": "PyPI", "name": name}
    affected = {"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}], "versions": versions or []}
    return {"id": f"PYSEC-{name}", "affected": [affected]}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WITHIN = ("1.0", "1.9.post1", "3.0", "3.10", "7.7")
OUTSIDE = ("0.9", "2.0", "2.5", "3.10.1")


@pytest.mark.parametrize("version", [*WITHIN, *OUTSIDE])
def test_a_version_is_affected_as_the_schema_says(audit: ModuleType, version: str) -> None:
    events = [{"introduced": "3.0"}, {"last_affected": "3.10"}, {"introduced": "1.0"}, {"fixed": "2.0"}]
    assert audit.is_affected(record("a-package", events, ["7.7"]), "a-package", version) is (version in WITHIN)
    assert not audit.is_affected(record("another", events, ["7.7"]), "a-package", version)


def test_a_copy_answers_as_the_server_does(audit: ModuleType, tmp_path: Path) -> None:
    copy = tmp_path / "all.zip"
    found = record("A_Package", [{"introduced": "0"}])
    with zipfile.ZipFile(copy, "w") as packed:
        packed.writestr("PYSEC-1.json", json.dumps(found))
        packed.writestr("GO-1.json", json.dumps({"affected": [{"package": {"ecosystem": "Go", "name": "a-package"}}]}))
    with audit.answering(audit.read_records(copy)) as address:
        for name, vulnerabilities in (("a-package", {"vulns": [found]}), ("sound", {})):
            query = {"package": {"name": name, "ecosystem": "PyPI"}, "version": "1.0"}
            assert requests.post(address, json=query, timeout=10).json() == vulnerabilities


def test_what_is_no_copy_is_told_in_a_line(audit: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "all.zip").write_text("no zip")
    for name in ("all.zip", "none.zip"):
        with pytest.raises(SystemExit, match="no copy of OSV's records"):
            audit.main(str(tmp_path / name))


def test_all_locks_are_looked_at(audit: ModuleType) -> None:
    there = {path.name for path in SCRIPT.parents[1].glob("requirements*.lock")}
    parts = {"requirements-predict.lock", "requirements-serve.lock"}  # of the first
    assert there - set(audit.LOCKS) == parts | {"requirements-bench.lock"}  # which nothing of ours runs on
