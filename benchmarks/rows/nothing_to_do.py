"""`dvc repro` where nothing has changed: five models on fifteen categories."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.rows import Contender, Loaded, Row
from benchmarks.rows.project import ROOT, begin

CATEGORIES = [f"part{number}" for number in range(15)]


def make(folder: Path) -> None:
    """A project of which DVC believes that all has been made: what it compares are files, whatever is in them."""
    import yaml
    from dvc.repo import Repo

    root = folder / "project"
    root.mkdir(exist_ok=True)
    begin(root)
    values = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    values["data"] = {"root": "images", "categories": CATEGORIES}
    del values["download"]["demo"]
    values["prepare"]["surfaces"] = []
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    for category in CATEGORIES:
        (root / "images" / category).mkdir(parents=True, exist_ok=True)
        (root / "images" / category / "picture.png").write_bytes(category.encode())
    dvc(root, "repro", "check")
    with Repo(str(root)) as repo:
        stages = [stage for stage in repo.index.stages if stage.name != "check"]
        paths = [Path(one.fs_path) for stage in stages for one in [*stage.deps, *stage.outs]]
        names = [stage.name for stage in stages]
    for path in paths:
        file = path if path.suffix in (".json", ".safetensors", ".txt") else path / "made.json"
        if not path.is_file() and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(path))
    command = [sys.executable, str(ROOT / "pipelines" / "sweeps" / "commit.py")]
    subprocess.run(command, cwd=root, check=True, input="\n".join(names), text=True)


def dvc(root: Path, *arguments: str) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout


def repro(folder: Path) -> Loaded:
    root = folder / "project"
    told = dvc(root, "repro")
    assert told.count("Running stage") == 1, told  # `check`, which always runs

    return Loaded({}, lambda: dvc(root, "repro"))


ROW = Row(
    title="`dvc repro` with nothing to do, 75 cells",
    contenders={"dvc repro": Contender(repro)},
    equal="nothing to compare with",
    target={},
    make=make,
    once=True,
    at_most={"wall": 10},
    missed="It is DVC's own on one core: dvc.lock read and written again, since one stage always runs, 400 stages "
    "locked and their files compared (benchmarks/README.md). On another machine it was 5.8 s, before `check` became "
    "faster.",
)
