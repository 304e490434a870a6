"""Changes of scores and pictures are told, soon and with few false alarms, by server, watcher and `blemish drift`."""

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from at_the_line import post, running
from PIL import Image
from small_bundles import make, png

from pipelines.inference.bundle import Bundle
from pipelines.inference.drift import BLOCK, Monitor, SequentialTest
from pipelines.inference.engine import Inputs
from pipelines.inference.measures import MEASURES, measured
from pipelines.inference.proven import Proven
from pipelines.inference.watch import Pace, watch

LOOKS = 4320 * 4 / 0.1  # that the product waits for


# ------------------------------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize("held_out", [15, 100])
def test_without_a_change_false_alarms_are_as_rare_as_is_said(held_out: int) -> None:
    """It takes 100 looks at least, on average over 400 lines; scores may tie, as of a dark picture's brightness."""
    lengths = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        draw = rng.normal if seed % 2 else partial(rng.integers, 0, 4)
        test, looks = SequentialTest("score", [float(draw()) for _ in range(held_out)], 100), 0
        while test.change is None:
            for _ in range(4):
                test.add(float(draw()))
            test.look(0.0)
            looks += 1
        lengths.append(looks)
    assert np.mean(lengths) > 100
    assert np.mean(lengths) < 150  # nor is it deaf


@pytest.mark.parametrize(("shift", "most"), [(0.5, 400), (1, 150), (2, 90), (-1, 150)])
def test_a_change_is_told_within_so_many_parts(shift: float, most: int) -> None:
    """Of 20 lines with 20 parts held out that worked well for 500; in half of them as soon as in half as many."""
    needed = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        test, number = SequentialTest("score", rng.normal(size=20).tolist(), LOOKS), 0
        for value in rng.normal(size=500):
            test.add(float(value))
            test.look(0.0)
        assert test.change is None
        while test.change is None:
            test.add(float(rng.normal(shift)))
            test.look(0.0)
            number += 1
        assert test.change.is_higher is (shift > 0)
        needed.append(number)
    assert max(needed) <= most
    assert test.evidence == 1
    assert test.change.expected == pytest.approx(test.expected)


def test_defects_are_no_drift() -> None:
    """One part in five: their scores lie above the threshold."""
    rng = np.random.default_rng(0)
    held_out = np.sort(rng.normal(size=40))
    monitor = Monitor({"score": held_out.tolist()}, threshold=float(held_out[38]))
    assert list(monitor.tests) == ["score"]
    for number in range(20_000):
        defect = rng.random() < 0.2
        monitor.add(number * BLOCK / 5, {"score": float(rng.normal(5 if defect else 0))})
    assert monitor.changes == []
    assert 14_000 < monitor.tests["score"].number < 16_500


def test_looks_are_as_far_apart_as_the_false_alarms_are_counted_by() -> None:
    monitor = Monitor({"brightness": [0.5, 0.51, 0.52] * 10}, threshold=1.0)
    times = [BLOCK * 7 + number * BLOCK / 1000 for number in range(5000)]  # so many come between two looks
    told = [monitor.add(now, {"brightness": 0.9}) for now in times]
    assert {number for number, changes in enumerate(told) if changes} < {1000, 2000, 3000, 4000}
    ((change,),) = (changes for changes in told if changes)  # told once
    assert (change.quantity, change.is_higher, change.at % BLOCK) == ("brightness", True, 0)
    assert "brightness is higher than of the good parts" in change.text
    assert monitor.changes == [change]


def test_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.inference.drift._LONGEST", 300)
    rng = np.random.default_rng(0)
    test = SequentialTest("score", rng.normal(size=20).tolist(), LOOKS)
    for _ in range(1000):
        test.add(float(rng.normal()))
        test.look(0.0)
        assert len(test._known) <= 301
    assert (test.number, test.change) == (1000, None)


# ------------------------------------------------------------------------------------------------------------- measures


def test_light_contrast_and_sharpness_are_told_apart() -> None:
    part = np.random.default_rng(0).integers(60, 120, (32, 32, 1)).repeat(3, axis=2).astype(np.uint8)

    def of(pixels: Any, region: Any = None) -> dict[str, float]:
        return measured(Inputs(pixels[None], None if region is None else region[None]))

    before = of(part)
    assert list(before) == list(MEASURES)
    assert before["brightness"] == pytest.approx(part.mean() / 255, abs=1e-5)
    assert before["contrast"] == pytest.approx(part.std() / 255, abs=1e-5)
    lighter = of(part + 40)
    assert lighter["brightness"] == pytest.approx(before["brightness"] + 40 / 255)
    assert (lighter["contrast"], lighter["sharpness"]) == pytest.approx((before["contrast"], before["sharpness"]))
    assert of(part * 2)["contrast"] == pytest.approx(2 * before["contrast"])
    assert of(part * 2)["sharpness"] == pytest.approx(before["sharpness"])
    blurred = np.asarray(Image.fromarray(part).resize((8, 8)).resize((32, 32)))
    assert of(blurred)["sharpness"] < before["sharpness"] / 3
    assert of(np.full_like(part, 7)) == pytest.approx({"brightness": 7 / 255, "contrast": 0.0, "sharpness": 0.0})
    region = np.zeros((32, 32), bool)
    assert of(part, region) == {"brightness": 0.0, "contrast": 0.0, "sharpness": 0.0}
    region[4:20, 4:20] = True
    half = part.copy()
    half[~region] = 255
    assert of(half, region)["brightness"] == pytest.approx(part[region].mean() / 255, abs=1e-5)


# ------------------------------------------------------------------------------------------------ where it is looked at


def test_a_large_picture_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pixels, region = rng.integers(0, 256, (1, 67, 30, 3), dtype=np.uint8), rng.random((1, 67, 30)) < 0.7
    whole = [measured(Inputs(pixels, None)), measured(Inputs(pixels, region))]
    for rows in (1, 10, 33, 66):
        monkeypatch.setattr("pipelines.inference.measures._ROWS", rows)
        for inputs, expected in zip((Inputs(pixels, None), Inputs(pixels, region)), whole, strict=True):
            assert measured(inputs) == pytest.approx(expected, rel=1e-9)


def test_a_server_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]

    class Clock:
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def time() -> float:
            now[0] += BLOCK / 2
            return now[0]

    monkeypatch.setattr("pipelines.inference.proven.time", Clock)
    with running(make(tmp_path / "gear.zip")) as address:
        assert requests.get(f"{address}/ready", timeout=30).json()["bundles"]["gear"]["drift"] == []
        for seed in range(120):  # brighter than any good part was, and no defect
            post(address, png(110, seed=seed))
        told = requests.get(f"{address}/ready", timeout=30).json()["bundles"]["gear"]["drift"]
        figures = requests.get(f"{address}/metrics", timeout=30).text
    assert any(text.startswith("score is higher than of the good parts") for text in told)
    assert caplog.text.count("score is higher") == 1
    assert 'blemish_drift{bundle="gear",quantity="score"} 1.0' in figures
    assert 'blemish_drift_evidence{bundle="gear",quantity="score"} 1.0' in figures
    assert f'blemish_calibration_mean{{bundle="gear",quantity="score"}} {49.5 / 255:.6}'[:-2] in figures


def test_a_watcher_goes_on_with_what_it_saw_before(
    tmp_path: Path, blemish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, camera, output = make(tmp_path / "gear.zip"), tmp_path / "camera", tmp_path / "watched"
    camera.mkdir()
    for number in range(3):
        (camera / f"{number}.png").write_bytes(png(100, seed=number))
    bundle = Proven(path)
    pace = Pace(settle=0.0, patience=0.0, poll=0.01)
    watch(camera, bundle, output, [], lambda _: None, threading.Event(), pace=pace, once=True)
    assert bundle.monitor.tests["score"].number == 3
    again = Proven(path)
    watch(camera, again, output, [], lambda _: None, threading.Event(), pace=pace, once=True)
    assert again.monitor.tests["score"].number == 3
    assert again.monitor.tests["brightness"].mean == bundle.monitor.tests["brightness"].mean
    done = blemish("drift", str(output), "--bundle", str(path), "--fail-on-drift")
    assert done.code == 0, done.err
    assert "of 3 parts" in done.out
    assert "no change told" in done.out
    # Two days of brighter parts, as the watcher would have written them.
    (table,) = (output / "results").iterdir()
    header, first, *_ = table.read_text(encoding="utf-8").splitlines()
    names = header.split(",")
    row = dict(zip(names, first.split(","), strict=True))
    rows = [row | {"scored_at": f"2026-12-0{1 + n // 100}T{n % 100 // 6:02}:{n % 6}5:00+00:00"} for n in range(200)]
    lines = [",".join(r[name] for name in names) for r in rows]
    (output / "results" / "2026-12-01.csv").write_text("\n".join([header, *lines, "torn,"]), encoding="utf-8")
    done = blemish("drift", str(output), "--bundle", str(path), "--fail-on-drift")
    assert done.code == 3
    assert "score is higher than of the good parts that the threshold comes from" in done.err
    refused = blemish("drift", str(tmp_path / "none"), "--bundle", str(path))
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "give the folder that `blemish watch` writes" in refused.err


def test_a_bundle_holds_what_to_compare_with(tmp_path: Path) -> None:
    assert sorted(Bundle(make(tmp_path / "gear.zip")).calibration) == [
        "brightness",
        "contrast",
        "score",
        "sharpness",
        "threshold_score",
    ]
