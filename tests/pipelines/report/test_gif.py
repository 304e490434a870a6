from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_params, write_params
from drawn_cells import THRESHOLDS, picture, write_evaluation
from made_up import scored_image
from PIL import Image

from pipelines.errors import StageError
from pipelines.paths import Project
from pipelines.pictures.overlays import CONTOUR
from pipelines.pictures.panels import MARKS, Verdict, save_strip
from pipelines.report.gif import _Part, choose, write_gif


def part(defect: str, score: float) -> _Part:
    label = defect != "good"
    image = scored_image(f"{defect}/{score}", defect, label, score, threshold=2.0)
    return _Part(image, (64, 64), Verdict.of(label, score, 2.0))


def scores(parts: list[_Part]) -> list[tuple[str, float]]:
    return [(p.image.defect, p.image.score) for p in parts]


def test_a_typical_hit_of_each_type_every_error_and_good_parts_between() -> None:
    hits = [part("cut", score) for score in (9, 3, 5)] + [part("hole", 4)]
    errors = [part("cut", score) for score in (1.5, 0.5, 1.0)] + [part("good", score) for score in (2.5, 7, 3)]
    passed = [part("good", score) for score in (0.1, 0.2, 0.3, 0.4)]
    chosen = choose([*hits, *errors, *passed])
    cuts = [("cut", 0.5), ("cut", 1.0), ("cut", 5)]  # of the hits the median, not the best
    good = [("good", 0.1), ("good", 0.2), ("good", 3), ("good", 7)]
    assert sorted(scores(chosen)) == [*cuts, *good, ("hole", 4)]
    labels = [p.image.label for p in chosen]
    assert all(labels[i : i + 3] != [True] * 3 for i in range(len(labels)))


def test_what_is_not_there_is_not_shown() -> None:
    assert scores(choose([part("good", 1.0)])) == [("good", 1.0)]
    assert scores(choose([part("cut", 5.0)])) == [("cut", 5.0)]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    pictures = [
        picture("test/cut/0.png", "cut", 3.0, seed=0),
        picture("test/cut/1.png", "cut", 1.0, seed=1, size=(80, 40)),
        picture("test/good/0.png", "good", 1.2, seed=2),
    ]
    folder = write_evaluation(Project(tmp_path), "fapm", "squares", pictures)
    for shown in pictures:
        save_strip(folder, shown, THRESHOLDS)
    return Project(tmp_path)


def frames(path: Path) -> list[tuple[np.ndarray, int]]:
    found = []
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            found.append((np.asarray(image.convert("RGB")), image.info["duration"]))
    return found


def test_each_part_alone_then_the_answer_then_the_truth(project: Project, tmp_path: Path) -> None:
    path = write_gif(project.cell("fapm", "squares", 0), tmp_path / "new" / "demo.gif")
    found = frames(path)
    assert [milliseconds for _, milliseconds in found] == [500, 500, 1000] * 3
    assert all(frame.shape[1] == 1000 for frame, _ in found)
    assert path.stat().st_size < 1_000_000
    for start, verdict in ((0, Verdict.HIT), (6, Verdict.MISS)):  # the good part between them
        alone, answered, known = (frame for frame, _ in found[start : start + 3])
        assert np.abs(alone[60:240, 10:190].astype(int) - answered[60:240, 10:190]).max() == 0  # the input stays
        assert not (alone[:, 210:400] == CONTOUR).all(axis=2).any()
        contour = (answered[:, 400:600] == CONTOUR).all(axis=2)
        assert contour.any() == (verdict is Verdict.HIT)
        assert not (answered[:30] == MARKS[verdict]).all(axis=2).any()  # before the truth is known
        assert (known[:30] == MARKS[verdict]).all(axis=2).any()
        assert (known[60:240, 800:990] > 250).all(axis=2).any()  # the true mask


def test_nothing_evaluated(tmp_path: Path) -> None:
    project = Project(tmp_path)
    with pytest.raises(StageError) as caught:
        write_gif(project.cell("fapm", "gear", 0), tmp_path / "demo.gif")
    folder = project.cell("fapm", "gear", 0).evaluated
    assert str(caught.value) == f"{folder}: no pictures of test images; run `blemish evaluate fapm gear` first"
    assert not (tmp_path / "demo.gif").exists()


def test_the_verb(project: Project, blemish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    write_params(project.root, tiny_params())
    outcome = blemish("gif", "fapm", "squares")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("animations/fapm/squares.gif: 0.")
    assert (project.root / "animations" / "fapm" / "squares.gif").exists()
    assert blemish("gif", "fapm", "squares", "-o", "x.gif").out.startswith("x.gif: ")
    outcome = blemish("gif", "fapm", "round")
    assert outcome.code == 1
    assert "run `blemish evaluate fapm round` first" in outcome.err
