import hashlib
import json
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from drawn_cells import NO_ORIGINALS, groups, picture, read_summary, summary_of, write_evaluation, write_prepared

from pipelines.paths import Project
from pipelines.report import gallery
from pipelines.report import page as html_report
from pipelines.report.page import page
from pipelines.report.terms import TERMS, explained

MODELS, CATEGORIES = ["fapm", "bgad"], ["nut", "my bolt"]
LAST = "Test images good + defective"
HOSTILE = "</script><script>alert(1)</script><s onclick='x'>&amp;\u2028"


def write_cells(project: Project, models: list[str], categories: list[str]) -> None:
    pictures = [
        picture("test/cut/0.png", "cut", 3.0),
        picture("test/cut/1.png", "cut", 1.0, seed=1),
        picture("test/good/0.png", "good", 1.2, seed=2),
    ]
    for category in categories:
        write_prepared(project, category, pictures)
        for model in models:
            write_evaluation(project, model, category, pictures)


def written(project: Project, summary: dict[str, Any]) -> str:
    path = html_report.write(read_summary(summary), project, project.root, project.root, NO_ORIGINALS)
    assert path == project.root / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    write_cells(Project(tmp_path), MODELS, CATEGORIES)
    return Project(tmp_path)


class Reader(HTMLParser):
    """Text by element, scripts apart, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.inside = False  # of a row
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in ("script", "style"):
            self.open.append(tag)
            self.scripts.append((dict(attrs) | {"tag": tag}, ""))
        if tag == "tr":
            self.rows.append([])
            self.inside = True
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        if tag == "tr":
            self.rows[-1] = [" ".join(cell.split()) for cell in self.rows[-1]]
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.open:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        else:
            self.words += data
            if self.inside and self.rows[-1]:
                self.rows[-1][-1] += data


def read(project: Project, summary: dict[str, Any] | None = None) -> Reader:
    return Reader(written(project, summary or summary_of(MODELS, CATEGORIES)))


def blocks(reader: Reader) -> dict[str, Any]:
    return {str(attrs["id"]): json.loads(text) for attrs, text in reader.scripts if "id" in attrs}


def test_the_page_names_every_size_that_the_models_see(project: Project) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    for cell, side in zip(summary["cells"], (256, 256, 128, 64), strict=True):
        cell["protocol"]["image_size"] = side
    assert "of drawn, 64, 128 and 256 px, seed 0." in read(project, summary).words


def test_the_tables_are_complete_without_a_script(project: Project) -> None:
    reader = read(project)
    assert "2 models on 2 categories of drawn, 64 px, seed 0." in reader.words
    assert ["Model", "average 24 images", "nut 12 images", "my bolt 12 images", LAST] in reader.rows
    tied = "(tied with the best)"
    assert ["fapm", "★97.9 (best)", f"≈98.0 {tied}96.0 to 100.0", f"≈97.8 {tied}95.8 to 99.8", "8 + 16"] in reader.rows
    assert ["bgad", "96.9", f"≈97.0 {tied}95.0 to 99.0", f"≈96.8 {tied}94.8 to 98.8", "8 + 16"] in reader.rows
    assert ["fapm", "11", "8.0", "20.9"] in reader.rows
    assert ["fapm", "nut", "2.0", "2.0", "2.0", "2.0", "8.0", "10.0", "12.0", "130.0batch 8"] in reader.rows
    assert [
        "average",
        "fapm is 1.0 points ahead of bgad, as may be chance (p = 0.11): not distinguishable",
    ] in reader.rows
    assert "On average the winner is fapm, distinguishable from every other model." in reader.words
    assert "A CPU (2 cores)" in reader.words


def test_a_cell_that_is_absent_leaves_the_page_of_all_others(project: Project) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    summary["cells"] = [cell for cell in summary["cells"] if (cell["model"], cell["category"]) != ("fapm", "nut")]
    (average,) = [row for row in summary["averages"] if row["model"] == "fapm"]
    average |= {"metrics": {}, "intervals": {}, "counts": average["counts"] | {"test_normal": 4, "test_anomalous": 8}}
    for champions in summary["champions"].values():
        champions |= {place: champions[place] | {"best": "bgad", "tied_with": []} for place in ("average", "nut")}
    summary["absent"] = [{"model": "fapm", "category": "nut", "evaluated": False, "reason": "refused by train"}]
    reader = read(project, summary)
    assert "Not in this report: fapm on nut: refused by train" in reader.words
    assert next(row[:3] for row in reader.rows if row[0] == "fapm") == ["fapm", "-", "-"]
    found = blocks(reader)
    by_category = {block["name"]: block for name, block in found.items() if "cells" in block}
    assert by_category["nut"]["models"] == list(by_category["nut"]["cells"]) == ["bgad"]
    assert sorted(by_category["my bolt"]["models"]) == ["bgad", "fapm"]


def test_a_metric_that_nobody_has_has_no_table(project: Project) -> None:
    text = written(project, summary_of(MODELS, CATEGORIES))
    assert re.findall(r'data-metric="(\w+)"', text) == ["image_auroc", "image_f1_max", "false_alarms", "all"]
    reader = Reader(text)
    titles = ["Image AUROC", "Image F1-max (oracle)", "False alarms"]
    assert ["Model", *(f"{title} 24 images" for title in titles), LAST] in reader.rows
    assert ["fapm", "★97.9 (best)", "★87.9 (best)"] in [row[:3] for row in reader.rows]
    assert ["bgad", "96.9", "86.9"] in [row[:3] for row in reader.rows]


def test_each_row_says_which_test_it_is(project: Project) -> None:
    """Models that are not tested on the same images: one learns from two of the defects."""
    summary = summary_of(MODELS, CATEGORIES)
    for row in (*summary["cells"], *summary["averages"]):
        if row["model"] == "bgad":
            row["counts"] |= {"test_anomalous": row["counts"]["test_anomalous"] - 2, "apart": 2}
    reader = read(project, summary)
    assert ["Model", "average 22 to 24 images", "nut 10 to 12 images", "my bolt 10 to 12 images", LAST] in reader.rows
    assert {(row[0], row[-1]) for row in reader.rows if " + " in row[-1] and row[0] in MODELS} == {
        ("fapm", "8 + 16"),
        ("bgad", "8 + 14 (2 apart)"),
    }
    assert "Defects that are apart are not in that test, since a model learns from them." in reader.words


def test_a_tie_is_called_a_tie_and_a_refusal_a_refusal(project: Project) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    summary["champions"]["image_auroc"]["average"] = {"best": "fapm", "tied_with": ["bgad"], "reason": None}
    summary["champions"]["image_f1_max"]["average"] = {"best": None, "tied_with": [], "reason": "they saw other images"}
    words = read(project, summary).words
    assert "On average it is a tie: fapm and bgad cannot be told apart on these images." in words
    assert "On average there is no winner: they saw other images." in words


def test_one_model_on_one_category_wins_nothing(tmp_path: Path) -> None:
    write_cells(Project(tmp_path), ["fapm"], ["nut"])
    reader = Reader(written(Project(tmp_path), summary_of(["fapm"], ["nut"])))
    assert "1 model on 1 category of drawn" in reader.words
    assert ["Model", "nut 12 images", LAST] in reader.rows
    assert ["fapm", "98.096.0 to 100.0", "4 + 8"] in reader.rows
    assert "★" not in reader.words
    assert "winner" not in reader.words


def test_several_seeds_show_their_spread(project: Project) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    cell = summary["cells"][0]
    cell["seeds"] = {"seeds": [0, 1, 2], "metrics": {"image_auroc": {"mean": 0.975, "sd": 0.004, "values": []}}}
    reader = read(project, summary)
    assert "seeds 0, 1, 2." in reader.words
    assert "mean ± standard deviation over training seeds" in reader.words
    row = next(row for row in reader.rows if row[0] == "fapm")
    assert row[2].endswith("97.5 ± 0.4")


def test_what_was_not_measured_is_a_dash(project: Project) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    for cell in summary["cells"]:
        cell |= {"latency": None, "intervals": {}, "run_url": None}
        cell["metrics"]["image_auroc"] = None
    summary["averages"][0]["latency_p50"] = summary["averages"][0]["metrics"]["image_auroc"] = None
    reader = read(project, summary)
    assert ["fapm", "11", "-", "20.9"] in reader.rows
    assert "Latency in detail" not in reader.words
    assert blocks(reader)["category-0"]["cells"]["fapm"]["runUrl"] is None


def test_the_first_page_answers_in_plain_words(project: Project) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    for cell in summary["cells"]:
        found, rejected = (6, 1) if cell["model"] == "fapm" else (8, 3)
        counts = {"true_positives": found, "false_negatives": 8 - found}
        cell["confusion"] = counts | {"false_positives": rejected, "true_negatives": 4 - rejected}
    summary["champions"]["image_auroc"]["my bolt"] = {"best": "bgad", "tied_with": ["fapm"], "reason": None}
    text = written(project, summary)
    words = " ".join(Reader(text).words.split())
    assert "fapm finds 12 of 16 defects and rejects 2 of 8 good parts Its threshold was set on held-out good" in words
    assert "nut: fapm finds 6 of 8 defects and rejects 1 of 4 good parts." in words
    assert "my bolt: bgad finds 8 of 8 defects and rejects 3 of 4 good parts." in words
    assert f'<a href="{page("my bolt", "bgad")}">my bolt</a>' in text
    assert blocks(Reader(text))["category-1"]["models"] == ["bgad", "fapm"]  # the best of the category first


def test_the_first_page_shows_hits_and_misses_with_their_verdict(project: Project) -> None:
    text = written(project, summary_of(MODELS, CATEGORIES))
    strip = text[text.index('<ul class="strip"') :].partition("</ul>")[0]
    # of both categories in turns: one hit, one miss and no false alarm each, then a good part
    assert re.findall(r'<b class="verdict-(\w+)">(.*?)</b>', strip) == [
        *[("hit", "✓ defect found")] * 2,
        *[("miss", "✗ defect missed")] * 2,
        ("pass", "· good part passed"),
    ]
    places = [("nut", 0), ("my bolt", 0), ("nut", 1), ("my bolt", 1), ("nut", 2)]
    assert re.findall(r'href="(.*?)"', strip) == [page(category, "fapm", place) for category, place in places]
    assert len(re.findall(r'<img src="data:image/webp;base64,', strip)) == 5


def test_every_term_can_be_opened_where_it_stands(project: Project) -> None:
    text = written(project, summary_of(MODELS, CATEGORIES))
    opened = set(re.findall(r'popovertarget="term-(\w+)"', text))
    assert opened >= {"auroc", "f1", "alarms", "oracle", "holdout", "promised", "interval", "tie"}
    explained = re.findall(r'<div popover id="term-(\w+)"', text)
    assert opened <= set(explained)
    assert explained == [term.key for term in TERMS]


def test_a_term_is_marked_once_in_a_sentence_and_the_rest_is_escaped() -> None:
    assert str(explained("Held-out <b>, held-out, untied, a tie")) == (
        '<button type="button" class="term" popovertarget="term-holdout">Held-out</button> &lt;b&gt;, held-out, '
        'untied, a <button type="button" class="term" popovertarget="term-tie">tie</button>'
    )


def test_the_pages_hold_what_evaluate_wrote(project: Project) -> None:
    content = blocks(read(project))
    assert content["report"]["categories"] == ["nut", "my bolt"]
    assert len(content["report"]["scale"]["colours"]) == len(content["report"]["scale"]["opacity"]) == 256
    block = content["category-1"]
    assert block["name"] == "my bolt"
    assert block["images"] == [
        ["test/cut/0.png", "cut", True],
        ["test/cut/1.png", "cut", True],
        ["test/good/0.png", "good", False],
    ]
    cell = block["cells"]["bgad"]
    assert (cell["scores"], cell["threshold"]) == ([3.0, 1.0, 1.2], 2.0)
    assert cell["runUrl"] == "http://127.0.0.1:5000/#/experiments/1/runs/0123"
    assert cell["runNeedsServer"]
    assert cell["curves"]["pro"] == [[0.0, 0.3], [0.5, 0.9]]
    assert cell["note"] == (
        "The deployed threshold 2 was set on 20 held-out good parts for 5\xa0% false alarms; expected on further parts "
        "like them are 4.76\xa0% (95\xa0% interval 0.13\xa0% to 16.8\xa0%). A score above 3 is rejected at once: of "
        "defects like 9 known ones, 10.0 % are expected not to be; one between the two goes to a person. Of "
        "good parts, 4.8 % are expected to go there (95 % interval 0.0 to 16.8 %). What is promised assumes that "
        "further good parts are exchangeable with the held-out ones: of the same days, lots and cameras. No groups "
        "were told apart (prepare.groups) that could show whether it holds on others."
    )
    assert cell["groups"] is None


def test_groups_are_told_apart(project: Project) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    summary["cells"][0]["groups"] = groups()
    cell = blocks(read(project, summary))["category-0"]["cells"]["fapm"]
    assert "What is promised assumes" not in cell["note"]
    assert cell["groups"]["text"] == (
        "the 2 groups of held-out good parts score differently, so that the promised false-alarm rate does not hold "
        "for a new group (p = 0.012); at the threshold of the others, 0.0 to 25.0 % of a group are false alarms, "
        "12.5 % on average; 2 groups promise a new one 33.3 % at best"
    )
    assert cell["groups"]["rows"] == [
        ["<i>wed", "0", "8", "1", "1.5", "25.0", "1", "1", "2.2"],
        ["mon", "60", "-", "-", "-", "-", "3", "0", "1.1"],
        ["tue", "0", "12", "0", "1", "0.0", "-", "-", "-"],
    ]


def test_a_threshold_that_promises_too_much_says_so(project: Project) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    summary["cells"][0]["threshold"] |= {"attainable": False, "num_images": 1, "num_images_needed": 19}
    note = blocks(read(project, summary))["category-0"]["cells"]["fapm"]["note"]
    assert "on 1 held-out good part as their highest score, since 5\xa0% false alarms take 19 to promise; exp" in note


def test_names_cannot_become_code(tmp_path: Path) -> None:
    project = Project(tmp_path)
    write_cells(project, ["fapm"], ["nut"])
    predictions = project.cell("fapm", "nut", 0).predictions
    predictions.write_text(predictions.read_text(encoding="utf-8").replace(",cut,", f',"{HOSTILE}",'), encoding="utf-8")
    summary = summary_of(["fapm"], ["nut"])
    summary["data_set"] = HOSTILE
    summary["cells"][0]["latency"]["hardware"] = HOSTILE
    summary["cells"][0]["run_url"] = "javascript:alert(1)"
    text = written(project, summary)
    reader = Reader(text)
    assert text.count("<script>") == 1
    assert "s" not in reader.tags
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert HOSTILE in reader.words
    block = blocks(reader)["category-0"]
    assert block["images"][0][1] == HOSTILE
    assert block["cells"]["fapm"]["runUrl"] is None


def test_a_hostile_category_is_escaped_in_text_and_address(project: Project) -> None:
    name = 'a/b"><script>x'  # no folder can be called so; nothing else may rely on that
    summary = summary_of(["fapm"], ["nut"])
    summary["categories"] = [name]
    summary["cells"][0]["category"] = name
    summary["champions"] = {}
    for folder_of in (lambda category: project.cell("fapm", category, 0).evaluated, project.prepared):
        folder_of(name).parent.mkdir(parents=True)
        folder_of("nut").rename(folder_of(name))
    text = written(project, summary)
    assert text.count("<script>") == 1
    assert page(name, "fapm") == "#/a%2Fb%22%3E%3Cscript%3Ex/fapm"
    assert f'href="{page(name, "fapm")}"' in text


def test_the_page_loads_nothing_and_allows_no_other_script(project: Project) -> None:
    reader = read(project)
    links = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links
    assert all(value and value.startswith(("#", "data:")) for value in links)
    (policy,) = [
        value for tag, name, value in reader.attributes if tag == "meta" and name == "content" and "src" in str(value)
    ]
    assert policy.startswith("default-src 'none'; img-src data: file: 'self';")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = [text for attrs, text in reader.scripts if attrs["tag"] == tag and "type" not in attrs]
        digest = b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert not [value for _, name, value in reader.attributes if name == "style"]


def test_pictures_shrink_to_what_the_page_may_take(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = summary_of(MODELS, CATEGORIES)
    large = len(written(project, summary))
    monkeypatch.setattr(gallery, "_MOST", 1)
    assert len(written(project, summary)) < large
