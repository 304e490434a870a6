"""What a sweep shows."""

import io

import pytest
from rich.console import Console

from pipelines.settings.params import Resources
from pipelines.sweeps.board import Board, demands

SMALL = Resources(num_cpus=1, num_gpus=0, memory=0, processes=1)
LARGE = Resources(num_cpus=1, num_gpus=0.5, memory=4, processes=1)


def board(width: int = 200, *, terminal: bool = False) -> tuple[Board, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal)
    found = Board(console, {"CPU": 4, "GPU": 1, "memory": 64 * 2**30}, lambda: "2 of 4 CPUs in use on 1 machine")
    for model, wants in (("fapm", SMALL), ("diffusion_ad", LARGE)):
        for _ in range(8):
            found.expect(model, wants)
    return found, file


def test_what_is_reserved_has_rays_names() -> None:
    assert demands(SMALL) == {"CPU": 1}
    assert demands(LARGE) == {"CPU": 1, "GPU": 0.5, "memory": 4 * 2**30}


def test_the_time_left_is_that_of_the_scarcest() -> None:
    shown, _ = board()
    assert shown.time_left() == "time left unknown"
    shown.done("fapm", 40.0, "fapm on nut")
    # 15 cells like the only one that is done: 150 s on 4 CPUs, 160 s for two at once on the GPU
    assert shown.time_left() == "about 3 min left"
    shown.done("diffusion_ad", 20.0, "diffusion_ad on nut")
    # 7 of 40 s and 7 of 20 s on 4 CPUs: 105 s; 7 of 20 s, half a GPU each: 70 s
    assert shown.time_left() == "about 2 min left"
    for _ in range(7):
        shown.failed("fapm", "fapm failed")
    assert shown.time_left() == "about 70 s left"


def test_elsewhere_than_in_a_terminal_there_are_lines_alone() -> None:
    shown, file = board()
    with shown:
        shown.done("fapm", 40.0, "fapm on [nut]")
        shown.lost("fapm", "fapm on hook: its worker was lost")
        shown.failed("fapm", "fapm on hook failed: no images")
    assert file.getvalue().splitlines() == [
        "1 of 16: fapm on [nut]; about 3 min left",
        "fapm on hook: its worker was lost",
        "2 of 16: fapm on hook failed: no images",
    ]


def test_a_terminal_has_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, file = board(terminal=True)
    with shown:
        shown.done("fapm", 40.0, "fapm on nut")
        shown.lost("fapm", "fapm on hook: its worker was lost")
    text = " ".join(file.getvalue().split())
    assert "fapm │ 1 │ 7 │ 0 │ 1 │ 40" in text
    assert "diffusion_ad │ 0 │ 8 │ 0 │ 0 │ -" in text
    assert "2 of 4 CPUs in use on 1 machine; about 3 min left" in text
