"""What every call pays before it begins: `--help`."""

import subprocess
import sys
from pathlib import Path

from benchmarks.rows import Contender, Loaded, Row


def make(_folder: Path) -> None:
    """Nothing."""


def helped(program: str) -> Loaded:
    command = [str(Path(sys.executable).with_name(program)), "--help"]

    def act() -> None:
        subprocess.run(command, check=True, capture_output=True)

    return Loaded({}, act)


ROW = Row(
    title="start-up: `--help`",
    contenders={
        "blemish": Contender(lambda _folder: helped("blemish")),
        "anomalib": Contender(lambda _folder: helped("anomalib"), is_peer=True),
    },
    equal="nothing but the question",
    target={},
    make=make,
)
