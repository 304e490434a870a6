"""A copy of the project in a folder of its own, for the tests that type commands in it."""

import os
import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LEFT_OUT = ("__pycache__", ".*_cache", "tmp", "cache", "config.local", "teacher", "penalty", "textures")


def copy_project(root: Path, *names: str) -> Path:
    """These files and folders, but for what is built or bound to a machine."""
    root.mkdir(exist_ok=True)
    for name in names:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy2(REPOSITORY / name, root / name)
    return root


def commit(root: Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "project"]):
        subprocess.run(["git", *identity, *command], cwd=root, check=True)


def environment(programs: Path, **more: str) -> dict[str, str]:
    """Of a shell that finds these programs first."""
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return {**kept, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}
