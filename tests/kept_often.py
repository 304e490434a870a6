"""`blemish`, with a checkpoint after every step; the process of a rank may be killed before one of its steps.

torchrun ... tests/kept_often.py train MODEL CATEGORY    with KILL=RANK:STEP in the environment
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from pipelines.training import loop


def main() -> None:
    loop.CHECKPOINT_SECONDS = 0.0
    rank, _, step = os.environ.get("KILL", "").partition(":")
    take = loop._Stepper.take

    def killed(self: Any, number: int) -> None:
        if (rank, step) == (os.environ.get("RANK", "0"), str(number)):
            os.kill(os.getpid(), signal.SIGKILL)
        take(self, number)

    loop._Stepper.take = killed
    cli.main()


if __name__ == "__main__":
    main()
