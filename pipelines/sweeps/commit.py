"""What `dvc commit --force` does with many stages, in one writing of dvc.lock.

DVC's own command reads and writes dvc.lock anew for each stage that it is given, so that a sweep of n cells would pay
for n²: a second for each of fifty cells, ten for each of five hundred. Run as a process of its own, as all of DVC is,
which reads the names of stages from stdin, a line for each: there may be more than a command has room for.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo


def commit(root: Path, names: Sequence[str]) -> None:
    """Take what lies in the outputs of these stages of dvc.yaml as made by them, from what they depend on now.

    Waits for whoever has DVC's lock. dvc.lock is written when all are looked at, or not at all.

    Raises:
        DvcException: something that a stage depends on or makes is not there.
        KeyError: there is no such stage.
    """
    with Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
        known = {stage.addressing: stage for stage in repo.index.stages}
        stages = [known[name] for name in names]
        for stage in stages:
            stage.save()
            stage.commit()
        stages[0].dvcfile.dump_stages(stages, update_pipeline=False)


if __name__ == "__main__":
    try:
        commit(Path.cwd(), sys.stdin.read().splitlines())
    except DvcException as error:
        sys.exit(f"error: {error}")
