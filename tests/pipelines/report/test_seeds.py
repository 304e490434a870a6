import pytest

from pipelines.report.seeds import SeedFigure, SeedFigures, average_seeds, latest, seeds_of, short_names
from pipelines.tracking.records import CellRun


def run(
    run_id: str, seed: int | None = 0, *, model: str = "fapm", category: str = "nut", started: int = 0, **rest: object
) -> CellRun:
    auroc = float(rest.pop("auroc", 0.9))  # type: ignore[arg-type]
    settings = {name: str(value) for name, value in rest.items()}
    if seed is not None:
        settings["train.seed"] = str(seed)
    return CellRun(run_id, model, category, started, settings, {"image_auroc": auroc}, {})


def test_the_last_run_stands_for_its_cell() -> None:
    runs = [run("new", started=3), run("old", started=1), run("other", category="bolt", started=2)]
    assert [found.run_id for found in latest(runs)] == ["other", "new"]


def test_seeds_are_runs_that_differ_in_nothing_else() -> None:
    mine = run("mine", 0, started=5, grid=8)
    runs = [
        mine,
        run("again", 0, started=9, grid=8),
        run("first try", 1, started=1, grid=8),
        run("seed 1", 1, started=2, grid=8),
        run("other settings", 2, grid=4),
        run("other cell", 3, grid=8, category="bolt"),
        run("unknown seed", None, grid=8),
    ]
    # of its own seed the run itself counts, of another the last
    assert {seed: found.run_id for seed, found in seeds_of(mine, runs).items()} == {0: "mine", 1: "seed 1"}


def test_mean_and_spread() -> None:
    runs = [run("a", 0, auroc=0.90), run("b", 1, auroc=0.92), run("c", 2, auroc=0.94)]
    seeds = average_seeds(runs[:1], runs)
    figure = SeedFigure(mean=0.92, sd=0.02, values=(0.90, 0.92, 0.94))
    assert seeds.figures() == SeedFigures(seeds=(0, 1, 2), metrics={"image_auroc": figure})
    assert seeds.spreads()["image_auroc"].num_runs == 3


def test_one_seed_has_no_spread() -> None:
    seeds = average_seeds([run("a")], [run("a")])
    assert seeds.figures() is None
    assert seeds.spreads() == {}


def test_the_average_is_over_the_seeds_that_all_categories_have() -> None:
    nut = [run("n0", 0, auroc=0.8), run("n1", 1, auroc=0.9), run("n2", 2, auroc=1.0)]
    bolt = [run(f"b{seed}", seed, category="bolt", auroc=0.6 + seed / 10) for seed in (0, 1)]
    seeds = average_seeds([nut[0], bolt[0]], [*nut, *bolt])
    assert seeds.seeds == (0, 1)
    assert seeds.values["image_auroc"] == (pytest.approx(0.7), pytest.approx(0.8))
    assert average_seeds([nut[2], run("b9", 9, category="bolt")], nut).figures() is None


def test_names_tell_runs_apart() -> None:
    cells = [run("1"), run("2", category="bolt"), run("3", model="bgad")]
    assert short_names(cells) == {"1": "fapm", "2": "fapm", "3": "bgad"}
    assert short_names([run("1", 0), run("2", 7)]) == {"1": "fapm seed 0", "2": "fapm seed 7"}
    assert short_names([run("0123456789"), run("abcdef0123")]) == {
        "0123456789": "fapm 01234567",
        "abcdef0123": "fapm abcdef01",
    }
