"""Many cells one after the other in one process: memory and open files stay what they are after the first few."""

from typing import Any

import psutil
import pytest
from conftest import CATEGORY

WARM = 4  # cells, after which caches are filled


@pytest.mark.usefixtures("root")
def test_many_cells_in_a_row(blemish: Any, thorough: bool) -> None:
    for verb in (["download", "demo_textures"], ["prepare", CATEGORY]):
        assert blemish(*verb).code == 0
    process, memory, files = psutil.Process(), [], []
    for _ in range(300 if thorough else 10):
        for verb in ("train", "evaluate"):
            outcome = blemish(verb, "fapm", CATEGORY)
            assert outcome.code == 0, outcome.err
        memory.append(process.memory_info().rss / 2**20)
        files.append(process.num_fds())
    print(f"megabytes {[round(value) for value in memory[::10]]}, open files {files[::10]}")
    assert max(files[WARM:]) <= files[WARM] + 2
    assert memory[-1] < 1.1 * memory[WARM] + 50
