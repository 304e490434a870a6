"""`dvc repro`, whose stages are done in its own process.

As processes of their own, a cell's `train`, `evaluate` and `export` would import torch, timm and MLflow three times,
seconds each, more than a small model takes to learn. All else is DVC's as ever: what is out of date, what its cache of
earlier runs has, what is written to dvc.lock. `python -m pipelines.sweeps.repro` takes the arguments of `dvc`, in a
project's folder and with this code first in PYTHONPATH.
"""

import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import dvc.stage.run as running
from dvc.cli import main as dvc
from dvc.stage.exceptions import StageCmdFailedError

from pipelines.lineage import ROOT
from pipelines.variables import set_for_now

_CALLS = (["python", "cli.py"], ["blemish"])  # as dvc.yaml has them here, and in a project of `blemish init`
_in_a_shell: Callable[..., None] | None = getattr(running, "_run", None)  # DVC's own, which a later one may not have


def arguments(command: str) -> list[str] | None:
    """Of our command line, where a stage's command is a call of it, and of this code; None where a shell is to do it.

    Windows quotes by rules of its own.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation without an end
        return None
    if os.name == "nt" or shlex.join(words) != command:
        return None
    if words[:1] == ["python"] and Path("cli.py").resolve() != (ROOT / "cli.py").resolve():
        return None
    return next((words[len(call) :] for call in _CALLS if words[: len(call)] == call), None)


def _run(executable: str | None, command: str, **process: Any) -> None:
    """In place of DVC's own, which begins a shell; raises StageCmdFailedError where the command fails."""
    assert _in_a_shell is not None, "else DVC would not call this"
    words = arguments(command)
    if words is None or Path(process["cwd"]).resolve() != Path.cwd():
        _in_a_shell(executable, command, **process)
        return
    with set_for_now(**{name: value for name, value in process["env"].items() if name.startswith("DVC_")}):
        code = _exit_code(words)
    if code != 0:
        raise StageCmdFailedError(command, code)


def _exit_code(words: list[str]) -> int:
    """Of `python cli.py WORDS`, after what it says."""
    cli = str(ROOT / "cli.py")
    before, sys.argv = sys.argv, [cli, *words]
    try:
        runpy.run_path(cli, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    except Exception:  # a bug, which ends the stage as it would end a process
        traceback.print_exc()
        return 1
    finally:
        sys.argv = before
        sys.stdout.flush()
    return 0


def main(arguments: list[str]) -> NoReturn:
    """End as `dvc` does with these."""
    if _in_a_shell is not None:
        running._run = _run
    sys.exit(dvc(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
