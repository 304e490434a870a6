import csv
import itertools
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from banded import picture_size
from bright_model import CARD, SIDE, write_model
from PIL import Image

import cli
from anomaly_models.common.sizes import Size
from pipelines.errors import ArgumentError, DatasetError, ExportError
from pipelines.inference.card import Disposition
from pipelines.inference.detector import Detector, as_threshold
from pipelines.inference.engine import Inputs
from pipelines.inference.marked import marked
from pipelines.inference.predict import Found, Result, find_images, predict
from pipelines.numbers import scores_apart
from pipelines.pictures.images import SUFFIXES, Filter, resize_rgb, to_input

ROOT = Path(__file__).parents[3]
Predict = Callable[..., list[Result]]


def write_image(path: Path, level: int = 0, size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.onnx", CARD.to_metadata())


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Predict:
    def on(*sources: Path) -> list[Result]:
        return predict(Detector(model), sources, tmp_path / "results", lambda _result, _total: None)

    return on


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_card_survives_the_file(model: Path) -> None:
    assert Detector(model).card == CARD


def test_a_detector_takes_any_batch(model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    anomaly_map, score = Detector(model)(Inputs(pixels, None))
    np.testing.assert_array_equal(anomaly_map, to_input(pixels).max(axis=1, keepdims=True))
    np.testing.assert_array_equal(score, to_input(pixels).max(axis=(1, 2, 3)))


def test_files_are_loaded_as_prepare_did(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((10, 20), 4095, dtype=np.uint16)).save(path)
    pixels, region = Detector(model).load(path)
    assert region is None
    assert pixels.shape == (1, SIDE, SIDE, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == 255).all()  # white at the card's white level


def test_the_card_says_by_which_filter(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    loaded = {}
    for resize in get_args(Filter):
        card = replace(CARD, resize=resize)
        detector = Detector(write_model(tmp_path / f"{resize}.onnx", card.to_metadata()))
        loaded[resize] = to_input(detector.load(path).pixels)
        np.testing.assert_array_equal(loaded[resize], to_input(resize_rgb(noise, Size.square(SIDE), resize)[None]))
        (found,) = predict(
            Detector(tmp_path / f"{resize}.onnx"), (path,), tmp_path / resize, lambda _result, _total: None
        )
        assert found.score == loaded[resize].max()
    assert (loaded["bilinear"] != loaded["lanczos"]).any()


def test_scores_decisions_and_overlays_are_written(run: Predict, tmp_path: Path) -> None:
    source = tmp_path / "parts"
    for name, level in (("good.png", 50), ("at.png", 128), ("above.png", 129), ("defect.jpg", 255)):
        write_image(source / name, level)
    found = {Path(result.path).name: result for result in run(source)}
    assert {name: result.decision for name, result in found.items()} == {
        "good.png": "good",
        "at.png": "good",  # a defect is above the threshold
        "above.png": "defect",
        "defect.jpg": "defect",
    }
    assert found["at.png"].score == CARD.threshold
    results = tmp_path / "results"
    rows = read_rows(results / "predictions.csv")
    assert list(rows[0]) == ["path", "score", "threshold", "decision", "disposition", "overlay", "error"]
    assert {float(row["threshold"]) for row in rows} == {CARD.threshold}
    assert [Path(row["path"]).name for row in rows] == ["above.png", "at.png", "defect.jpg", "good.png"]
    assert float(rows[0]["score"]) == found["above.png"].score  # no digit is lost
    assert [row["disposition"] for row in rows] == ["review", "accept", "reject", "accept"]
    assert [row["error"] for row in rows] == [""] * 4
    written = json.loads((results / "predictions.json").read_text(encoding="utf-8"))
    assert (written["threshold"], written["threshold_of_file"]) == (CARD.threshold, CARD.threshold)
    assert written["category"] == "part"
    assert [entry["decision"] for entry in written["images"]] == ["defect", "good", "defect", "good"]
    for row in rows:
        with Image.open(results / row["overlay"]) as overlay:
            assert picture_size(overlay) == (20, 10)
            assert overlay.format == "PNG"
    with Image.open(results / "overlays" / "good.png") as overlay:
        # far below the threshold: nothing glows
        assert (np.asarray(overlay)[:10, :20] == 50).all()
    assert files(results) == [
        *(f"overlays/{name}.png" for name in ("above", "at", "defect", "good")),
        "predictions.csv",
        "predictions.json",
    ]


def test_each_result_is_told_as_soon_as_it_is_there(model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "parts" / name)
    told: list[tuple[Result, int]] = []
    found = predict(
        Detector(model), [tmp_path / "parts"], tmp_path / "out", lambda result, total: told.append((result, total))
    )
    assert told == [(result, 2) for result in found]


def test_a_bad_image_is_told_in_its_row_and_the_others_are_scored(run: Predict, tmp_path: Path) -> None:
    source = tmp_path / "parts"
    for name in ("a.png", "z.png"):
        write_image(source / name)
    (source / "empty.png").touch()
    (source / "text.jpg").write_text("no image")
    Image.fromarray(np.full((4, 4), 5000, dtype=np.uint16)).save(source / "too_bright.png")
    found = {Path(result.path).name: result for result in run(source, source / "text.jpg")}
    assert [name for name, result in found.items() if result.error is None] == ["a.png", "z.png"]
    for name in ("empty.png", "text.jpg", "too_bright.png"):
        result = found[name]
        assert result.error is not None
        assert result.error.startswith(f"{source / name}: ")
        assert (result.score, result.threshold, result.decision, result.overlay) == (None,) * 4
    rows = read_rows(tmp_path / "results" / "predictions.csv")
    assert [(row["score"], bool(row["error"])) for row in rows] == [
        ("0.0", False),
        *[("", True)] * 3,
        ("0.0", False),
        ("", True),
    ]
    assert files(tmp_path / "results" / "overlays") == ["a.png", "z.png"]


def test_a_score_that_is_no_number_never_passes_as_good(tmp_path: Path) -> None:
    broken = write_model(tmp_path / "nan.onnx", CARD.to_metadata(), scale=float("nan"))
    path = write_image(tmp_path / "a.png", 200)
    (result,) = predict(Detector(broken), [path], tmp_path / "out", lambda _result, _total: None)
    error = f"{path}: the model's score is nan; inspect this part by hand"
    assert result == Result(str(path), None, None, None, None, None, error)
    assert read_rows(tmp_path / "out" / "predictions.csv")[0]["decision"] == ""


def test_equal_names_stay_apart(run: Predict, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    paths = [one / "a.jpg", one / "a.png", one / "sub" / "a.png", two / "a-2.png", two / "sub" / "a.png", two / "A.bmp"]
    for level, path in enumerate(paths):
        write_image(path, level * 15)
    found = run(one, two, one / "a.png")
    overlays = [result.overlay for result in found]
    assert len(found) == 7
    assert len({str(overlay).casefold() for overlay in overlays}) == 7
    assert sorted(map(str, overlays)) == files_under(tmp_path / "results", "overlays")
    for result in found:
        assert result.overlay is not None
        with Image.open(result.path) as picture, Image.open(tmp_path / "results" / result.overlay) as overlay:
            assert abs(int(np.asarray(picture)[0, 0]) - int(np.asarray(overlay)[0, 0, 0])) <= 1


def files_under(folder: Path, sub: str) -> list[str]:
    return [f"{sub}/{name}" for name in files(folder / sub)]


def test_folders_are_searched_to_the_bottom_for_images_only(tmp_path: Path) -> None:
    for name in ("b/c/deep.PNG", "a.tiff", "b/note.txt", "b/clip.mp4", "._a.tiff", "__MACOSX/a.png", "Thumbs.db"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    found = find_images([tmp_path], tmp_path / "results")
    assert found == [
        Found(tmp_path / "a.tiff", Path("a.tiff")),
        Found(tmp_path / "b/c/deep.PNG", Path("b/c/deep.PNG")),
    ]


def test_links_to_folders_are_followed_and_none_goes_round(run: Predict, tmp_path: Path) -> None:
    write_image(tmp_path / "share" / "tuesday" / "a.png")
    write_image(tmp_path / "parts" / "monday" / "a.png")
    (tmp_path / "parts" / "tuesday").symlink_to(tmp_path / "share" / "tuesday")
    (tmp_path / "share" / "tuesday" / "round").symlink_to(tmp_path / "parts")
    (tmp_path / "parts" / "linked.png").symlink_to(tmp_path / "share" / "tuesday" / "a.png")
    found = run(tmp_path / "parts")
    names = [Path(result.path).relative_to(tmp_path / "parts").as_posix() for result in found]
    assert names == ["linked.png", "monday/a.png", "tuesday/a.png"]
    assert all(result.decision == "good" for result in found)


def test_what_is_left_out_is_told_in_a_row(run: Predict, tmp_path: Path) -> None:
    source = tmp_path / "parts"
    write_image(source / "a.png")
    write_image(source / "b.png").rename(source / "b.jfif")
    write_image(source / "c.png").rename(source / "c")
    (source / "dead.png").symlink_to("gone.png")
    (source / "latest").symlink_to("gone")
    os.mkfifo(source / "pipe.png")
    os.mkfifo(source / "pipe.raw")
    found = {Path(result.path).name: result for result in run(source, source / "dead.png")}
    assert found.pop("a.png").error is None
    missing = "No such file or directory"
    read = (
        "(read are .bmp .dcm .dicom .jpeg .jpg .png .tif .tiff .webp); rename it, save it as one of them, or remove it"
    )
    assert {name: result.error for name, result in found.items()} == {
        "b.jfif": f"{source}/b.jfif: no image by its suffix '.jfif' {read}",
        "c": f"{source}/c: no image by its name, which has no suffix {read}",
        "dead.png": f"{source}/dead.png: cannot be read ({missing}); check the path and its permissions",
        "latest": f"{source}/latest: a link to nothing; mend or remove it",
        "pipe.png": f"{source}/pipe.png: a folder, pipe or device, not a file; remove it",
        "pipe.raw": f"{source}/pipe.raw: no image by its suffix '.raw' {read}",
    }
    assert len(read_rows(tmp_path / "results" / "predictions.csv")) == 8


def test_a_half_written_jpeg_does_not_pass_as_good(run: Predict, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (90, 120), dtype=np.uint8)).save(path, quality=95)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    (result,) = run(path)
    assert result.error is not None
    assert result.error.startswith(f"{path}: damaged image (")

    assert result.decision is None


def test_a_picture_above_the_limit_of_the_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "small.onnx", replace(CARD, max_megapixels=1).to_metadata())
    path = write_image(tmp_path / "line.png", size=(2000, 600))
    (result,) = predict(Detector(model), [path], tmp_path / "results", lambda _result, _total: None)
    assert result.error is not None
    assert "2,000 x 600 pixels are 1.2 megapixels, above `prepare.max_megapixels` 1; set it to 2" in result.error


def test_a_name_that_is_not_utf_8_is_scored(run: Predict, tmp_path: Path) -> None:
    try:
        write_image(tmp_path / "parts" / "pr\udcfcf.png", 200)
        (tmp_path / "parts" / "\udcfc.png").touch()
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes UTF-8 names only")
    scored, empty = run(tmp_path / "parts")
    assert (scored.path, scored.decision) == (rf"{tmp_path}/parts/pr\xfcf.png", "defect")
    assert empty.error == rf"{tmp_path}/parts/\xfc.png: the file is empty; copy it again or remove it"
    assert [row["path"] for row in read_rows(tmp_path / "results" / "predictions.csv")] == [scored.path, empty.path]
    assert (
        json.loads((tmp_path / "results" / "predictions.json").read_text("utf-8"))["images"][0]["path"] == scored.path
    )
    assert files(tmp_path / "results" / "overlays") == [r"pr\xfcf.png"]


def test_a_name_that_is_too_long_for_its_overlay_does_not_stop_the_others(run: Predict, tmp_path: Path) -> None:
    long = write_image(tmp_path / "parts" / f"{'检' * 82}.png")
    write_image(tmp_path / "parts" / "a.png")
    found = {result.path: result for result in run(tmp_path / "parts")}
    assert found[str(tmp_path / "parts" / "a.png")].decision == "good"
    assert (
        found[str(long)].error
        == f"{long}: its overlay cannot be written (File name too long); give the file a shorter name"
    )


def test_a_folder_that_may_not_be_searched_is_told(
    run: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "parts" / "a.png")
    (tmp_path / "parts" / "locked").mkdir()
    search = Path.iterdir

    def refuse(folder: Path) -> Any:
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied")
        return search(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    scored, locked = run(tmp_path / "parts")
    assert scored.decision == "good"
    assert locked.error == f"{tmp_path}/parts/locked: cannot be searched (Permission denied); check its permissions"


def test_results_among_the_images_are_not_scored_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "parts" / "a.png")
    write_image(tmp_path / "parts" / "overlays" / "mine.png")
    monkeypatch.chdir(tmp_path / "parts")
    for _ in range(3):
        found = predict(Detector(model), [Path()], Path("results"), lambda _result, _total: None)
        assert [result.path for result in found] == ["a.png", "overlays/mine.png"]


def test_a_file_that_was_named_is_tried_whatever_its_suffix(run: Predict, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png").rename(tmp_path / "a.dat")
    (result,) = run(path)
    assert result.decision == "good"


def test_nothing_found_says_where_and_what_was_looked_for(run: Predict, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError) as caught:
        run(tmp_path / "empty")
    assert str(caught.value) == f"{tmp_path / 'empty'}: no images in it (looked for {' '.join(sorted(SUFFIXES))})"
    with pytest.raises(DatasetError) as caught:
        run(tmp_path / "empty", tmp_path / "nowhere")
    assert str(caught.value) == f"{tmp_path / 'nowhere'}: no such file or folder"
    assert not (tmp_path / "results").exists()


def test_a_missing_model_says_what_to_give(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError) as caught:
        Detector(path)
    assert str(caught.value) == f"{path}: no such file; give the model.onnx that `blemish export` wrote"


@pytest.mark.parametrize("content", [b"", b"no model", bytes(range(256)) * 50])
def test_what_is_no_onnx_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError) as caught:
        Detector(path)
    assert str(caught.value).startswith(f"{path}: not an ONNX model that onnxruntime can run (")
    assert len(str(caught.value).splitlines()) == 1


def test_a_foreign_model_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "foreign.onnx", {"author": "somebody"})
    with pytest.raises(ExportError) as caught:
        Detector(path)
    assert str(caught.value) == f"{path}: an ONNX model, but not one that `blemish export` wrote; it has no threshold"


@pytest.mark.parametrize("found", ["6", "8"])
def test_another_format_is_refused(tmp_path: Path, found: str) -> None:
    path = write_model(tmp_path / "other.onnx", {**CARD.to_metadata(), "blemish.format": found})
    with pytest.raises(ExportError) as caught:
        Detector(path)
    assert str(caught.value) == f"{path}: written in format {found}, this version reads 7; export it again"


def test_every_field_is_plain_text_in_the_metadata() -> None:
    metadata = replace(CARD, category="Größe 5", params={"a": [1, None, True]}).to_metadata()
    assert metadata["blemish.category"] == json.dumps("Größe 5")
    assert json.loads(metadata["blemish.params"]) == {"a": [1, None, True]}
    assert all(isinstance(value, str) for value in metadata.values())


def test_another_threshold_decides_and_promises_nothing(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "parts" / "a.png", 100)
    parts, out = [tmp_path / "parts"], tmp_path / "out"
    (result,) = predict(Detector(model), parts, out, lambda _result, _total: None, threshold=0.25)
    assert (result.decision, result.threshold) == ("defect", 0.25)
    written = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert (written["threshold"], written["threshold_of_file"]) == (0.25, CARD.threshold)
    assert written["false_alarm_rate"] is None
    assert CARD.at(CARD.threshold).false_alarm_rate == CARD.false_alarm_rate


@pytest.mark.parametrize("size", [(20, 10), (300, 200), (3000, 20), (30, 2000)])
def test_the_verdict_stands_below_the_overlay_and_covers_nothing(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    overlay = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    said = {one: np.asarray(marked(overlay, one, "score 1, threshold 2")) for one in get_args(Disposition)}
    for picture in said.values():
        np.testing.assert_array_equal(picture[:height, :width], overlay)
        ink = (picture[height:] == 255).all(axis=2)
        rows, columns = ink.any(axis=1).nonzero()[0], ink.any(axis=0).nonzero()[0]
        assert rows[-1] - rows[0] >= 20  # two lines that can be read
        assert 0 < rows[0] < rows[-1] < len(ink) - 1
        assert 0 < columns[0] < columns[-1] < ink.shape[1] - 1  # whole
    words = [(picture[height:] == 255).all(axis=2) for picture in said.values()]
    for one, other in itertools.combinations(words, 2):
        assert one.shape != other.shape or (one != other).any()  # never by colour alone


def sort(model: Path, parts: Path, folder: Path) -> list[Result]:
    return predict(Detector(model), [parts], folder.parent / "out", lambda _result, _total: None, sort_into=folder)


def test_pictures_are_copied_by_what_was_decided(model: Path, tmp_path: Path) -> None:
    for name, level in (("a.png", 20), ("sub/b.png", 200), ("c.bmp", 200)):
        write_image(tmp_path / "parts" / name, level)
    (tmp_path / "parts" / "empty.png").touch()
    before = {name: (tmp_path / "parts" / name).read_bytes() for name in files(tmp_path / "parts")}
    sort(model, tmp_path / "parts", tmp_path / "sorted")
    assert files(tmp_path / "sorted") == ["defect/c.bmp", "defect/sub/b.png", "good/a.png"]
    assert {name: (tmp_path / "parts" / name).read_bytes() for name in files(tmp_path / "parts")} == before
    assert (tmp_path / "sorted" / "defect" / "sub" / "b.png").read_bytes() == before["sub/b.png"]


def test_copies_of_equal_names_stay_apart(model: Path, tmp_path: Path) -> None:
    paths = [write_image(tmp_path / folder / "a.png", 200 + place) for place, folder in enumerate(("one", "two"))]
    sources = [tmp_path / "one", tmp_path / "two"]
    folder = tmp_path / "sorted"
    predict(Detector(model), sources, tmp_path / "out", lambda _result, _total: None, sort_into=folder)
    assert files(folder) == ["defect/a-2.png", "defect/a.png"]
    assert [(folder / "defect" / name).read_bytes() for name in ("a.png", "a-2.png")] == [
        path.read_bytes() for path in paths
    ]


def test_what_was_sorted_before_is_left_alone(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "parts" / "a.png")
    mine = write_image(tmp_path / "sorted" / "defect" / "a.png")
    with pytest.raises(ArgumentError) as caught:
        sort(model, tmp_path / "parts", tmp_path / "sorted")
    expected = f"{mine.parent}: not an empty folder; sort into one that is new, or empty this one"
    assert str(caught.value) == expected
    assert files(tmp_path / "sorted") == ["defect/a.png"]
    assert not (tmp_path / "out").exists()


def test_a_copy_that_cannot_be_made_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "parts" / "a.png")

    def refuse(*_: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr("pipelines.inference.predict.shutil.copyfile", refuse)
    (result,) = sort(model, tmp_path / "parts", tmp_path / "sorted")
    assert result.error == f"{path}: cannot be copied (Permission denied); it is good, and not sorted"
    assert files(tmp_path / "sorted") == []


def test_the_same_pictures_give_the_same_files(run: Predict, tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / "parts" / f"{number}.png", 100 * number)
    written = []
    for _ in range(2):
        run(tmp_path / "parts")
        written.append([(tmp_path / "results" / name).read_bytes() for name in files(tmp_path / "results")])
    assert written[0] == written[1]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "high", ""])
def test_what_is_no_finite_number_is_no_threshold(text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        as_threshold(text)
    assert str(caught.value) == f"threshold '{text}': not a finite number; give one such as 2.5"


def test_digits_tell_a_score_from_its_threshold() -> None:
    assert scores_apart(2.0, 3.0) == ("2", "3")
    assert scores_apart(2.00004, 2.0) == ("2.00004", "2")
    assert scores_apart(1 / 3, 1 / 3) == ("0.3333", "0.3333")


PROBE = """
import sys
import cli
sys.argv[0] = "blemish"
code = 0
try:
    cli.main()
except SystemExit as stop:
    code = stop.code
heavy = {"torch", "torchvision", "timm", "mlflow", "pandas", "matplotlib", "scipy", "kornia", "dvc"} & set(sys.modules)
print("heavy:", sorted(heavy))
sys.exit(code)
"""


def blemish(folder: Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    command = [sys.executable, "-c", PROBE, *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, cwd=folder, env=environment, text=True, check=False, **streams)


SUMMARY = "2 images scored, 1 with a defect at threshold 0.502: out/predictions.csv"


def test_the_command_line_needs_no_torch_and_reports_bad_images(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "parts" / "a.png", 20)
    write_image(tmp_path / "parts" / "b.png", 200)
    done = blemish(tmp_path, "predict", model, "parts", "--output", "out")
    assert done.stdout.splitlines() == [
        "good    score 0.07843  threshold 0.502  parts/a.png",
        "defect  score 0.7843  threshold 0.502  parts/b.png",
        SUMMARY,
        "heavy: []",
    ]
    assert done.returncode == 0
    done = blemish(tmp_path, "predict", model, "parts", "-o", "out", "--fail-on-defect")
    assert done.returncode == 3

    (tmp_path / "parts" / "c.png").touch()
    done = blemish(tmp_path, "predict", model, "parts", "-o", "out", "--no-verdicts", "--fail-on-defect")
    assert done.stdout.splitlines() == [SUMMARY, "heavy: []"]
    assert "error: parts/c.png: the file is empty; copy it again or remove it\n" in done.stderr
    assert done.returncode == 1


def test_a_threshold_on_the_command_line_is_said(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 20)
    done = blemish(tmp_path, "predict", model, "a.png", "--threshold", "-0.25", "--fail-on-defect")
    summary = "1 image scored, 1 with a defect (1 for a person to review) at threshold -0.25 as given (the file's is"
    assert f"{summary} 0.502): predictions/" in done.stdout
    assert done.returncode == 3
    done = blemish(tmp_path, "predict", model, "a.png", "--threshold", "nan")
    assert done.stderr == "error: threshold 'nan': not a finite number; give one such as 2.5\n"
    assert done.returncode == 1


def test_many_pictures_have_lines_only_when_they_are_asked_for(model: Path, tmp_path: Path) -> None:
    for number in range(cli.FEW + 1):
        write_image(tmp_path / "parts" / f"{number:03}.png")
    assert len(blemish(tmp_path, "predict", model, "parts").stdout.splitlines()) == 2
    assert len(blemish(tmp_path, "predict", model, "parts", "--verdicts").stdout.splitlines()) == cli.FEW + 3


def test_json_lines_go_to_stdout_alone_also_where_a_bar_is_drawn(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "parts" / "a.png", 20)
    write_image(tmp_path / "parts" / "b.png", 200)
    (tmp_path / "parts" / "c.png").touch()
    ours, theirs = pty.openpty()  # someone watches stderr, and stdout is a pipe
    done = blemish(tmp_path, "predict", model, "parts", "-o", "out", "--json-lines", stderr=theirs)
    os.close(theirs)
    *lines, _ = done.stdout.splitlines()
    written = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert [json.loads(line) for line in lines] == written["images"]
    told = os.read(ours, 100_000).decode()
    os.close(ours)
    assert SUMMARY in told
    assert "error: parts/c.png: the file is empty" in told
    assert done.returncode == 1
