import csv
import io
from pathlib import Path

import drawn_cells
import pytest

from anomaly_models.common.sizes import Size
from pipelines.evaluation.certainty import AVERAGE, Champion
from pipelines.report.field_tables import FieldTable, Row, field_tables, write_tables
from pipelines.report.literature import MVTEC_AD_ORDER
from pipelines.report.summary import Summary
from pipelines.sources.catalogue import MVTEC_AD_COUNTS, CategoryCounts


def summary_of(figures: dict[str, dict[str, float]], **counts: int) -> Summary:
    """Models and their image AUROC by category; the counts are those of MVTec AD where the category is one of its."""
    categories = list(next(iter(figures.values())))

    def numbers(category: str) -> dict[str, int]:
        own = MVTEC_AD_COUNTS.get(category, CategoryCounts(60, 10, 8, 2))
        tested = {"test_normal": own.test_good, "test_anomalous": own.test_defect}
        return {"train": own.train_good - 20, "holdout": 20, **tested, **counts}

    content = drawn_cells.summary_of(list(figures), categories)
    for cell in content["cells"]:
        cell["metrics"] = {"image_auroc": figures[cell["model"]][cell["category"]]}
        cell["counts"] |= numbers(cell["category"])
        cell["protocol"] |= {"image_size": 256, "compared": 256}
    for average in content["averages"]:
        values = figures[average["model"]].values()
        average["metrics"] = {"image_auroc": sum(values) / len(values)}
        own = [cell["counts"] for cell in content["cells"] if cell["model"] == average["model"]]
        average["counts"] = {name: sum(counts[name] for counts in own) for name in own[0]}
    best = {place: max(figures, key=lambda model: figures[model].get(place, 0)) for place in (*categories, AVERAGE)}
    champions = {place: {"best": model, "tied_with": [], "reason": None} for place, model in best.items()}
    return drawn_cells.read_summary(content | {"champions": {"image_auroc": champions}})


OWN = summary_of({"fapm": {"nut": 0.9, "my_bolt": 0.8}, "bgad": {"nut": 0.7, "my_bolt": 0.95}})


def only(summary: Summary) -> FieldTable:
    (table,) = field_tables(summary)
    return table


def by_method(table: FieldTable) -> dict[str, Row]:
    return {row.method: row for row in table.rows}


def test_markdown_has_the_average_first_and_the_test_images() -> None:
    lines = only(OWN).markdown().splitlines()
    assert lines[0] == "## Image-Level AUC"
    assert lines[2:7] == [
        "| Method | Avg | nut | my_bolt |",
        "| --- | ---: | ---: | ---: |",
        "| *Test images* | *20 + 16* | *10 + 8* | *10 + 8* |",
        "| fapm | **85.0** | **90.0** | 80.0 |",
        "| bgad | 82.5 | 70.0 | **95.0** |",
    ]


def test_what_ties_the_best_is_bold_too() -> None:
    champions = OWN.champions["image_auroc"] | {"nut": Champion("fapm", ("bgad",), None)}
    lines = only(OWN.model_copy(update={"champions": {"image_auroc": champions}})).markdown().splitlines()
    assert lines[5:7] == ["| fapm | **85.0** | **90.0** | 80.0 |", "| bgad | 82.5 | **70.0** | **95.0** |"]


def test_one_model_has_no_winner() -> None:
    text = only(summary_of({"fapm": {"nut": 0.9}})).markdown()
    assert "**" not in text
    assert "Bold" not in text


def test_csv_can_be_read_back() -> None:
    rows = list(csv.DictReader(io.StringIO(only(OWN).csv())))
    assert rows[0] == {
        "method": "test images",
        "source": "",
        "average": "20 + 16",
        "nut": "10 + 8",
        "my_bolt": "10 + 8",
    }
    assert rows[2] == {"method": "bgad", "source": "this run", "average": "82.50", "nut": "70.00", "my_bolt": "95.00"}


def test_latex_is_escaped_and_balanced() -> None:
    text = only(OWN).latex()
    assert r"\rotatebox{90}{my\_bolt}" in text
    assert r"fapm & \textbf{85.0} & \textbf{90.0} & 80.0 \\" in text
    assert text.count("{") == text.count("}")
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {row.count("&") for row in rows} == {3}
    assert r"\begin{tabular}{lrrr}" in text


def test_a_folder_of_ones_own_has_no_published_results() -> None:
    assert [row.source for row in only(OWN).rows] == ["this run", "this run"]
    bottles = summary_of({"fapm": {"bottle": 0.9}}, train=40)
    assert [row.method for row in only(bottles).rows] == ["fapm"]


MVTEC = summary_of({"fapm": dict.fromkeys(sorted(MVTEC_AD_ORDER), 0.95)}, apart=10)


def test_mvtec_ad_comes_in_the_fields_order_with_published_results() -> None:
    table = only(MVTEC)
    assert table.categories == MVTEC_AD_ORDER
    ((name, total, *numbers),) = table.tests
    assert (name, total, numbers[0]) == ("Test images", "467 + 1258 (150 apart)", "28 + 89 (10 apart)")
    header = table.markdown().splitlines()[2]
    assert header.startswith("| Method | Avg | Carpet | Grid | Leather | Tile | Wood | Bottle |")
    assert " Metal Nut | Pill |" in header
    rows = by_method(table)
    assert rows["fapm"].values == (95.0,) * 15
    assert rows["FAPM (paper)"].average == 99
    assert rows["PatchCore (WideResNet-50)"].values[table.categories.index("screw")] == 98.8
    assert rows["BGAD (official code)"].values == (None,) * 15


def test_a_row_measured_on_a_part_of_the_image_says_so() -> None:
    cells = tuple(
        cell.model_copy(update={"protocol": cell.protocol.model_copy(update={"compared": Size.square(224)})})
        if cell.model == "fapm"
        else cell
        for cell in MVTEC.cells
    )
    cropped = MVTEC.model_copy(update={"cells": cells})
    said = "pixel metrics of fapm on the centre 224 x 224 of 256 x 256 pixels, which is all it sees"
    assert cropped.regions == [said]
    assert said in only(cropped).notes["*"]


def test_footnotes_say_what_keeps_results_apart() -> None:
    table = only(MVTEC)
    assert set(table.notes) == {note for row in table.rows for note in row.notes}
    assert table.notes["*"].startswith("This run: whole images at 256 pixels; masks resized by the nearest pixel")
    assert "pixel metrics" not in table.notes["*"]
    assert "up to 10 real defects per category, from which the supervised method learns, " in table.notes["*"]
    assert " are not in the test of any model" in table.notes["*"]
    texts = " ".join(table.notes[letter] for letter in by_method(table)["BGAD (official code)"].notes)
    assert "10 real defects" in texts
    assert "best epoch on the test set" in texts
    # a note that several share is written once
    assert len(set(table.notes.values())) == len(table.notes)
    assert "- <sup>a</sup> From: results.csv" in table.markdown()


def test_models_that_were_tested_otherwise_have_a_line_each() -> None:
    """BGAD's ten defects are in the test of the others."""
    summary = summary_of({"fapm": {"bottle": 0.9}, "bgad": {"bottle": 0.95}, "adfa": {"bottle": 0.8}})
    counts = {row.model: row.counts for row in summary.cells}
    counts["bgad"] = counts["bgad"].model_copy(update={"test_anomalous": 53, "apart": 10})
    cells, averages = (
        tuple(row.model_copy(update={"counts": counts[row.model]}) for row in rows)
        for rows in (summary.cells, summary.averages)
    )
    table = only(summary.model_copy(update={"cells": cells, "averages": averages}))
    assert table.tests == (
        ("Test images of fapm, adfa", "20 + 63", "20 + 63"),
        ("Test images of bgad", "20 + 53 (10 apart)", "20 + 53 (10 apart)"),
    )
    assert "are not in the test of bgad." in table.notes["*"].replace(";", ".")
    assert r"Test images of bgad & 20 + 53 (10 apart) & 20 + 53 (10 apart) \\" in table.latex()


def test_some_categories_of_mvtec_ad() -> None:
    table = only(summary_of({"fapm": {"zipper": 0.9, "carpet": 0.8}}))
    assert table.categories == ("carpet", "zipper")
    rows = by_method(table)
    assert rows["FAPM (paper)"].average == pytest.approx((99.3 + 99.5) / 2)
    assert "DiffusionAD (paper)" not in rows  # of it the average over fifteen is known, and nothing else
    assert table.notes["*"].endswith("Published averages are over the categories shown.")


def test_the_files(tmp_path: Path) -> None:
    write_tables(tmp_path, MVTEC)
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"image_auroc.csv", "image_auroc.tex"}
    assert (tmp_path / "tables.md").read_text(encoding="utf-8").count("## ") == 1
