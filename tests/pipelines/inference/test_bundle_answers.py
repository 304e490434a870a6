"""Pictures as programs have them at hand: paths, bytes, Base64; of each an answer or what is wrong with it."""

import base64
import sys
from pathlib import Path

import pytest
from drawn_dicoms import described, saved
from numpy import full, uint16
from small_bundles import make, png

from pipelines.errors import ExportError
from pipelines.inference.answers import Answers


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return Answers(make(tmp_path / "gear.zip"))


@pytest.mark.parametrize(("brightness", "decision"), [(100, "good"), (200, "defect")])
def test_a_path_its_bytes_and_their_base64_are_one_picture(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brightness: int, decision: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = png(brightness)
    Path("QUJD").write_bytes(content)  # which is Base64 too
    given = [Path("QUJD"), "QUJD", content, bytearray(content), memoryview(content), base64.b64encode(content).decode()]
    expected = {"score": pytest.approx(brightness / 255), "threshold": 0.5, "decision": decision}
    expected |= {"disposition": "reject" if decision == "defect" else "accept", "error": None}
    assert answers(given) == [expected] * len(given)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("missing.png", "'missing.png': neither a file here nor a picture's bytes as Base64"),
        ("x" * 5001, f"'{'x' * 100}': neither a file here nor a picture's bytes as Base64"),
        (Path("missing.png"), "missing.png: "),
        ("", "picture: not a PNG"),
        (b"", "picture: not a PNG"),
        (base64.b64encode(png(100)[:-20]).decode(), "picture: "),
        (None, "no picture but None; give its path, its bytes, or these as Base64"),
        (3.5, "no picture but 3.5; give"),
    ],
)
def test_what_is_no_picture_is_told_and_the_next_is_answered(answers: Answers, given: object, error: str) -> None:
    first, second = answers([given, png(100)])
    assert (first["score"], first["threshold"], first["decision"]) == (None, None, None)
    assert first["error"].startswith(error)
    assert second["decision"] == "good"


def test_dicom_is_known_by_its_bytes_and_names_the_package_that_is_missing(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = saved(described(full((20, 20), 4095, uint16), bits=12))
    assert answers([content])[0]["error"] is None
    for name in [name for name in sys.modules if name.partition(".")[0] == "pydicom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (answer,) = answers([content])
    assert answer["error"] == "picture.dcm: DICOM needs pydicom; pip install 'blemish[medical]', or save it as PNG"


def test_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such file"):
        Answers(tmp_path / "gear.zip")
