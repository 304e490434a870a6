"""`make bench`: sides that disagree are not compared, and the table in the docs is the one that was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anomaly_models import MODELS
from benchmarks import bench
from benchmarks.gpu import WAYS
from benchmarks.rows import NAMES, Contender, Loaded, Row, differences, row
from benchmarks.rows.metrics import make

SIDES = {"ours": Contender(lambda _: Loaded({}, list)), "theirs": Contender(lambda _: Loaded({}, list), is_peer=True)}


def compared(**tolerance: float) -> Row:
    return Row("a row", SIDES, "all", {"theirs": 2}, lambda _: None, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_compares_ours_with_others_or_has_a_limit(name: str) -> None:
    found = row(name)
    ours, *others = found.contenders
    assert not found.contenders[ours].is_peer
    assert not found.contenders[ours].is_earlier
    assert others or found.at_most
    assert set(found.target) <= set(others)


def test_sides_that_disagree_are_not_compared() -> None:
    ours, theirs = {"auroc": 0.9, "shape": [3, 4]}, {"auroc": 0.9004, "shape": [3, 4]}
    found = differences(compared(auroc=1e-3, shape=0), {"ours": ours, "theirs": theirs})
    assert found == pytest.approx({"auroc": 4e-4, "shape": 0})
    with pytest.raises(ValueError, match=r"a row: auroc differs by 0.0004, where 0.0001 is allowed"):
        differences(compared(auroc=1e-4), {"ours": ours, "theirs": theirs})
    with pytest.raises(ValueError, match="a row: auroc differs by nan"):
        differences(compared(auroc=1e-4), {"ours": ours, "theirs": {"auroc": float("nan")}})


def test_what_the_processor_does_not_compute_in_is_left_out() -> None:
    every = row("efficient_ad_step").contenders
    assert list(bench.here(every, {"avx2"})) == ["float32", "anomalib"]
    assert bench.here(every, {"avx2", "avx512_bf16"}) == every


def test_a_ratio_is_of_the_same_turn() -> None:
    """A neighbour that slows both sides of a turn changes nothing."""
    ours = [{"wall": wall} for wall in (1.0, 10.0, 1.0)]
    theirs = [{"wall": wall} for wall in (2.0, 20.0, 3.0)]
    assert bench.ratio(theirs, ours) == {"median": 2.0, "lowest": 2.0, "highest": 3.0}


def test_a_side_answers_with_its_results_and_then_with_its_turns(tmp_path: Path) -> None:
    make(tmp_path)
    with bench.side("metrics", "exact", Path(sys.executable), tmp_path) as side:
        results, versions = side.loaded()
        assert set(results) == set(row("metrics").tolerance)
        assert all(0 < value <= 1 for value in results.values())
        assert {"python", "torch"} <= set(versions)
        turn = side.turn()
    assert turn["wall"] > 0
    assert turn["cpu"] > 0
    assert turn["megabytes"] > 50


def test_what_a_turn_says_of_itself_can_have_a_limit(tmp_path: Path) -> None:
    with bench.side("streaming", "streaming", Path(sys.executable), tmp_path) as side:
        side.loaded()
        turn = side.turn()
    entry = {"ours": "streaming", "sides": {"streaming": bench.figures([turn])}, "ratios": {}, "targets": {}}
    few, many = (turn[name] for name in row("streaming").at_most)
    assert 10 < few < 300
    assert 10 < many < 300  # what both take beside the images differs by a megabyte from one process to another
    assert not bench.misses(entry | {"at_most": row("streaming").at_most})
    assert bench.misses(entry | {"at_most": {"wall": turn["wall"] / 2}})


def test_what_measures_a_gpu_runs_here_at_small_sizes() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--small"]
    done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    names = [row[0] for row in rows]
    assert {f"EfficientAD-S, {kind}, {way}" for kind in ("fp32", "bf16", "fp16") for way in WAYS} <= set(names)
    assert {*MODELS, "all of them, 15 categories"} <= set(names)
    assert "no time left" not in done.stdout


def test_the_table_is_the_one_that_was_measured() -> None:
    rows = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    page = bench.PAGE.read_text(encoding="utf-8")
    assert page.split(bench.BEGIN)[1].split(bench.END)[0].strip() == bench.table(rows).strip()
    readme = bench.README.read_text(encoding="utf-8")
    assert f"<!-- speed -->{bench.sentence(rows)}<!-- /speed -->" in readme
    assert f"<!-- pace -->{bench.pace(rows)}<!-- /pace -->" in readme
    assert all(f"{model} " in bench.pace(rows).split(";")[place] for model in MODELS for place in (0, 1))
    assert [entry["row"] for entry in rows] == list(NAMES)
    for entry in rows:
        found = row(entry["row"])
        assert (entry["title"], entry["equal"], entry["targets"]) == (found.title, found.equal, dict(found.target))
        assert entry["at_most"] == found.at_most
        assert entry["pairs"] >= (1 if found.once else 5)
        assert not bench.misses(entry) or found.missed
