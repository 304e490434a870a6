"""The report as a reader sees it, in headless Chromium from the disk. Every test also asks that nothing went wrong."""

import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browse, chromium
from drawn_cells import (
    NO_ORIGINALS,
    READING,
    groups,
    picture,
    read_summary,
    summary_of,
    write_evaluation,
    write_prepared,
)
from PIL import Image
from scipy.stats import binomtest
from waiting import until

from pipelines.evaluation.certainty import share_interval
from pipelines.files import file_sha256
from pipelines.numbers import interval
from pipelines.paths import Project
from pipelines.report import page as html_report
from pipelines.report.large import Originals

MODELS = ["fapm", "bgad", "adfa"]
CATEGORIES = ["nut & <b>bolt</b>", "screw"]
GOOD = [1.0, 1.2, 1.4, 1.9, 2.2]  # scores; the deployed threshold is 2
CUT, HOLE = [3.0, 2.5, 1.5], [4.0, 2.1]


def write_cells(project: Project) -> None:
    for model in MODELS:
        for place, category in enumerate(CATEGORIES):
            kinds = [("good", GOOD), ("cut", CUT), ("hole", HOLE)]
            shift = 0.0 if model == "fapm" else 0.3  # the other models' scores are higher throughout
            pictures = [
                picture(f"test/{kind}/{number}.png", kind, score + shift, seed=number, size=(64, 64 - 24 * place))
                for kind, scores in kinds
                for number, score in enumerate(scores)
            ]
            write_evaluation(project, model, category, pictures)
            if model == MODELS[0]:  # all were tested on the same images
                write_prepared(project, category, pictures)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    write_cells(Project(root))
    summary = summary_of(MODELS, CATEGORIES, num_good=5, num_defects=5)
    summary["cells"][0]["groups"] = groups()
    return html_report.write(read_summary(summary), Project(root), root, root, NO_ORIGINALS)


@pytest.fixture(scope="module")
def session() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium is installed")
    with browse(program) as browser:
        yield browser


@pytest.fixture
def browser(session: Browser) -> Iterator[Browser]:
    session.show(1280, 900)
    session.problems.clear()
    session.requests.clear()
    yield session
    assert session.problems == []
    assert session.requests == []


def open_page(browser: Browser, report: Path, fragment: str = "") -> None:
    browser.call("Page.navigate", url="about:blank")  # else another fragment is no new page
    browser.open(report, fragment)


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((each) => each.innerText.trim())")


def contents(browser: Browser, selector: str) -> list[str]:
    """Also of what is not laid out, being far below."""
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((each) => each.textContent)")


def counts(browser: Browser) -> dict[str, int]:
    names = ("hit", "miss", "alarm", "pass")
    return {name: browser.run(f"Number(document.getElementById('count-{name}').textContent)") for name in names}


def slide(browser: Browser, threshold: float) -> None:
    """As a hand does: to the place of the slider nearest to this threshold."""
    low, high = (browser.run(f"Number({end}.textContent)") for end in ("lowest", "highest"))
    choose(browser, "threshold", str(1000 * (threshold - low) / (high - low)))


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        f"""(() => {{
          const choice = document.getElementById({name!r});
          choice.value = {value!r};
          choice.dispatchEvent(new Event(choice.tagName === 'INPUT' ? 'input' : 'change', {{bubbles: true}}));
        }})()"""
    )


def of_pixels(browser: Browser, script: str) -> Any:
    """What the script says of `data`, the pixels of the first picture."""
    return browser.run(
        f"""(() => {{
          const canvas = document.querySelector('.tile canvas'), {{width, height}} = canvas;
          const copy = new OffscreenCanvas(width, height).getContext('2d', {{willReadFrequently: true}});
          copy.drawImage(canvas, 0, 0);
          const {{data}} = copy.getImageData(0, 0, width, height);
          {script}
        }})()"""
    )


def count_cyan(browser: Browser) -> int:
    words = "new Uint32Array(data.buffer)"
    return of_pixels(browser, f"return {words}.reduce((count, word) => count + (word === 0xffffff00), 0);")


def painted(browser: Browser) -> list[float]:
    """The means of red, green, blue and opacity."""
    sums = "const sums = [0, 0, 0, 0]; data.forEach((value, place) => { sums[place % 4] += value; });"
    return of_pixels(browser, f"{sums} return sums.map((sum) => sum * 4 / data.length);")


FIRST, SECOND = "#/nut%20%26%20%3Cb%3Ebolt%3C%2Fb%3E", "#/screw"


def test_the_leaderboard_shows_one_metric_at_a_time(browser: Browser, report: Path) -> None:
    open_page(browser, report)
    shown = "[...document.querySelectorAll('.board')].filter((each) => !each.hidden).map((each) => each.dataset.metric)"
    assert browser.run(shown) == ["image_auroc"]
    choose(browser, "metric", "false_alarms")
    assert browser.run(shown) == ["false_alarms"]
    assert browser.run("document.getElementById('category').hidden")


def order(browser: Browser, metric: str) -> list[str]:
    rows = f"[...document.querySelectorAll('[data-metric={metric}] .sortable tbody tr')]"
    return browser.run(f"{rows}.map((row) => row.cells[0].dataset.value)")


def test_sorting_sorts(browser: Browser, report: Path) -> None:
    open_page(browser, report)
    assert order(browser, "image_auroc") == ["fapm", "bgad", "adfa"]
    click = "document.querySelectorAll('[data-metric=image_auroc] th button')[{}].click()"
    heads = "[...document.querySelectorAll('[data-metric=image_auroc] thead th')]"
    state = f"{heads}.map((each) => each.getAttribute('aria-sort'))"
    browser.run(click.format(0))
    assert order(browser, "image_auroc") == ["adfa", "bgad", "fapm"]
    assert browser.run(state)[:2] == ["ascending", None]
    browser.run(click.format(1))  # the average: the best first
    assert order(browser, "image_auroc") == ["fapm", "bgad", "adfa"]
    assert browser.run(state)[:2] == [None, "descending"]
    browser.run(click.format(1))
    assert order(browser, "image_auroc") == ["adfa", "bgad", "fapm"]
    assert browser.run(state)[:2] == [None, "ascending"]


def test_where_less_is_better_the_least_comes_first(browser: Browser, report: Path) -> None:
    open_page(browser, report)
    choose(browser, "metric", "false_alarms")
    browser.run("document.querySelectorAll('[data-metric=false_alarms] th button')[1].click()")
    assert order(browser, "false_alarms") == ["fapm", "bgad", "adfa"]


def test_a_figure_leads_to_its_pictures(browser: Browser, report: Path) -> None:
    open_page(browser, report)
    browser.run("document.querySelector('[data-metric=image_auroc] tbody tr:nth-child(2) td:nth-child(3) a').click()")
    browser.wait("!document.getElementById('category').hidden")
    assert texts(browser, "#category-title") == ["nut & <b>bolt</b>"]
    assert browser.run("document.querySelector('#models :checked').value") == "bgad"
    assert texts(browser, "[aria-current]") == ["nut & <b>bolt</b>"]
    assert browser.run("document.activeElement.id") == "category-title"
    browser.run("history.back()")
    browser.wait("!document.getElementById('overview').hidden")


def test_the_slider_moves_the_counts(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    assert counts(browser) == {"hit": 4, "miss": 1, "alarm": 1, "pass": 4}
    assert texts(browser, "#decided") == ["4 of 5 defects found (80.0\xa0%), 1 of 5 good parts rejected (20.0\xa0%)."]
    assert "has not seen the test images" in texts(browser, "#oracle-note")[0]
    slide(browser, 2.3)
    assert counts(browser) == {"hit": 3, "miss": 2, "alarm": 0, "pass": 5}
    assert "promises nothing" in texts(browser, "#oracle-note")[0]
    slide(browser, 1.1)
    assert counts(browser) == {"hit": 5, "miss": 0, "alarm": 4, "pass": 1}
    assert texts(browser, "#types th") == ["good", "cut", "hole"]
    assert [text.split("\t")[1] for text in texts(browser, "#types tr")] == ["4 of 5", "3 of 3", "2 of 2"]
    browser.run("document.getElementById('reset').click()")
    assert counts(browser) == {"hit": 4, "miss": 1, "alarm": 1, "pass": 4}
    choose(browser, "threshold-value", "2.2")
    assert counts(browser) == {"hit": 3, "miss": 2, "alarm": 0, "pass": 5}  # a score at the threshold is not above it
    choose(browser, "threshold-value", "3.5")
    assert counts(browser) == {"hit": 1, "miss": 4, "alarm": 0, "pass": 5}


def test_the_slider_changes_which_images_are_flagged(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    verdicts = "[...document.querySelectorAll('.tile')].map((each) => each.dataset.verdict)"
    # from the highest score to the lowest: 4, 3, 2.5, 2.2, 2.1, then 1.9 and less
    assert browser.run(verdicts) == ["hit", "hit", "hit", "alarm", "hit", "pass", "miss", "pass", "pass", "pass"]
    assert browser.run("document.querySelectorAll('.tile.flagged').length") == 5
    slide(browser, 2.3)
    assert browser.run(verdicts) == ["hit", "hit", "hit", "pass", "miss", "pass", "miss", "pass", "pass", "pass"]
    choose(browser, "filter", "miss")
    assert contents(browser, ".tile b") == ["✗ defect missed"] * 2
    assert contents(browser, ".tile .quiet") == ["score 2.1", "score 1.5"]
    assert texts(browser, "#shown") == ["2 of 10"]
    choose(browser, "defect", "cut")
    assert texts(browser, "#shown") == ["1 of 10"]
    slide(browser, 1.1)
    assert texts(browser, "#shown") == ["0 of 10"]


def test_the_keyboard_moves_the_slider_and_focus_is_seen(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    browser.run("document.getElementById('threshold').focus()")
    for _ in range(100):
        browser.press("ArrowRight", 39)
    assert counts(browser) == {"hit": 3, "miss": 2, "alarm": 0, "pass": 5}
    browser.press("End", 35)
    assert counts(browser) == {"hit": 0, "miss": 5, "alarm": 0, "pass": 5}
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "threshold-value"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_every_page_can_be_reached_by_keyboard(browser: Browser, report: Path) -> None:
    open_page(browser, report)
    browser.press("Tab", 9)
    assert texts(browser, ":focus") == ["Skip to the content"]
    for expected in ["Overview", *CATEGORIES]:
        browser.press("Tab", 9)
        assert texts(browser, ":focus") == [expected]
    browser.press("Enter", 13, "\r")
    browser.wait("document.getElementById('category-title').textContent === 'screw'")


def test_costs_choose_a_threshold(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    for name, value in (("reject-cost", "1"), ("escape-cost", "10"), ("prevalence", "20")):
        choose(browser, name, value)
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in texts(browser, "#costs tr")}
    # At 2: 10,000 x (0.8 x 1/5 x 1 + 0.2 x 1/5 x 10) = 1,600 + 4,000. Cheapest is between 1.4 and 1.5, where no
    # defect escapes and two of five good parts are rejected: 10,000 x 0.8 x 2/5 = 3,200.
    assert [rows["deployed"][0], rows["deployed"][1].split("\n")[0]] == ["2", "5,600"]
    assert [rows["cheapest"][0], rows["cheapest"][1].split("\n")[0]] == ["1.45", "3,200"]
    # Of both shares, 1 in 5; the cost is 10,000 x (0.8 p + 0.2 p x 10).
    low, high = (28_000 * p for p in binomtest(1, 5).proportion_ci())
    assert rows["deployed"][1].split("\n")[1] == f"{low:,.0f} to {high:,.0f}"
    # Rejected without a look is what is above 3, one of the five defects; a person looks at three more, and at a good
    # one: 10,000 x (0.8 x 1/5 x 0.5 + 0.2 x (1/5 x 10 + 3/5 x 0.5)) = 800 + 4,600.
    choose(browser, "review-cost", "0.5")
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in texts(browser, "#costs tr")}
    assert [rows["with review"][0], rows["with review"][1].split("\n")[0]] == ["2", "5,400"]
    said = "With review, a person looks at 2800 of 10,000 parts and decides rightly; the rest is as deployed."
    assert texts(browser, "#review-note") == [said]
    browser.run("document.getElementById('use-cheapest').click()")
    assert counts(browser) == {"hit": 5, "miss": 0, "alarm": 2, "pass": 3}
    choose(browser, "prevalence", "0")  # where nothing is defective, nothing should be rejected
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in texts(browser, "#costs tr")}
    assert rows["cheapest"][1].startswith("0.00")


def test_a_command_deploys_what_the_slider_shows(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    begin, end = 'blemish threshold fapm "nut & <b>bolt</b>" ', ' --because "chosen on 10 test images"'
    assert texts(browser, "#deploy-slider") == [f'{begin}2 --because "as exported"']
    slide(browser, 2.3)
    (command,) = texts(browser, "#deploy-slider")
    value = command.removeprefix(begin).removesuffix(end)
    assert 2.2 <= float(value) < 2.5  # decides as the slider does, in few digits
    assert len(value) <= 5
    choose(browser, "threshold-value", "2.49999999")
    assert texts(browser, "#deploy-slider") == [f"{begin}2.49999999{end}"]  # 2.5 would miss a defect of that score
    open_page(browser, report, SECOND)
    assert texts(browser, "#deploy-slider")[0].startswith("blemish threshold fapm screw 2 ")


def test_a_command_deploys_the_cheapest_threshold(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    for name, value in (("reject-cost", "1"), ("escape-cost", "10"), ("prevalence", "20")):
        choose(browser, name, value)
    assert texts(browser, "#deploy-cheapest") == [
        'blemish threshold fapm "nut & <b>bolt</b>" 1.45 --because "cheapest on 10 test images, where rejecting a good '
        'part costs 1, a defect that escapes 10, and 20 percent are defective"'
    ]


def test_a_command_is_copied_or_marked(browser: Browser, report: Path) -> None:
    open_page(browser, report, SECOND)
    (command,) = texts(browser, "#deploy-slider")
    browser.run(
        """Object.defineProperty(navigator, "clipboard", {configurable: true, value: {
             writeText: async (text) => { window.copied = text; }}})"""
    )
    browser.run("document.querySelector('[data-copies=deploy-slider]').click()")
    browser.wait("document.querySelector('[data-copies=deploy-slider]').textContent === 'Copied'")
    assert browser.run("window.copied") == command
    browser.run('Object.defineProperty(navigator, "clipboard", {value: undefined})')
    browser.run("document.querySelector('[data-copies=deploy-slider]').click()")
    browser.wait("getSelection().toString() !== ''")
    assert browser.run("getSelection().toString()") == command


def test_a_share_has_the_interval_that_the_tables_have(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    shown = dict(zip(texts(browser, "#types th"), texts(browser, "#types .share .sub"), strict=True))
    assert shown == {
        defect: interval(share_interval(flagged / images, images))
        for defect, flagged, images in (("good", 1, 5), ("cut", 2, 3), ("hole", 2, 2))
    }
    slide(browser, 2.3)
    assert texts(browser, "#types .share .sub")[0] == interval(share_interval(0, 5)) == "0.0 to 52.2"


def test_groups_have_a_table_where_they_are_known(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    assert texts(browser, "#groups-note")[0].startswith("The 2 groups of held-out good parts score differently, so ")
    rows = [row.split("\t") for row in texts(browser, "#group-rows tr")]
    assert rows[0] == ["<i>wed", "0", "8", "1", "1.5", "25.0", "1", "1", "2.2"]
    assert len(rows) == 3
    open_page(browser, report, SECOND)
    assert browser.run("document.getElementById('groups').hidden")


def test_another_model_has_its_own_scores(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    browser.run("document.querySelector('#models input[value=adfa]').click()")
    assert counts(browser) == {"hit": 4, "miss": 1, "alarm": 2, "pass": 3}
    assert browser.run("location.hash") == f"{FIRST}/adfa"
    assert browser.run("document.getElementById('run').href") == "http://127.0.0.1:5000/#/experiments/1/runs/0123"


def test_pictures_are_painted(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    browser.run("document.getElementById('gallery').scrollIntoView()")
    means, outlined = {}, {}
    for panel in ("input", "map", "overlay", "mask", "truth"):
        choose(browser, "view", panel)
        until(lambda: painted(browser)[3] == 255, 30)  # opaque once it is painted
        means[panel] = painted(browser)
        outlined[panel] = count_cyan(browser)
    # a sixteenth of the part is marked, and found exactly
    assert means["truth"][:3] == pytest.approx([255 / 16] * 3, rel=0.1)
    assert means["mask"][:3] == pytest.approx([255 / 16] * 3, rel=0.15)
    assert means["input"][:3] == pytest.approx([127] * 3, rel=0.05)
    assert means["overlay"][0] > means["overlay"][2]  # the colours of the map over grey
    assert outlined == {"input": 0, "map": 0, "overlay": pytest.approx(4 * 63, abs=8), "mask": 0, "truth": 0}


def test_the_viewer_shows_five_panels_and_the_other_models(browser: Browser, report: Path) -> None:
    open_page(browser, report, SECOND)
    browser.run("document.querySelector('.tile').click()")
    assert browser.run("document.getElementById('viewer').open")
    assert texts(browser, "#viewer-title") == ["hole: test/hole/0.png"]
    assert texts(browser, "#viewer-verdict") == ["fapm: defect found, score 4, threshold 2"]
    captions = ["input: hole", "anomaly map", "overlay", "predicted mask", "ground truth"]
    assert texts(browser, "#viewer-panels figcaption") == captions
    others = texts(browser, "#viewer-others figcaption")
    assert others == [f"{model}: defect found, score 4.3, threshold 2" for model in ("bgad", "adfa")]
    ratio = browser.run("(() => { const c = document.querySelector('#viewer canvas'); return c.height / c.width; })()")
    assert ratio == 40 / 64  # of the original, not the square that models see
    # in words on every overlay: on the stage, the small one, and those of the others
    assert texts(browser, "#viewer .stamp") == ["✓ defect found"] * 4
    browser.press("ArrowRight", 39)
    assert texts(browser, "#viewer-title") == ["cut: test/cut/0.png"]
    browser.press("Escape", 27)
    browser.wait("!document.getElementById('viewer').open")
    browser.wait("document.querySelector(':focus .quiet')?.textContent === 'score 3'")  # where one left off


def test_a_picture_of_the_first_page_leads_to_itself(browser: Browser, report: Path) -> None:
    open_page(browser, report)
    assert texts(browser, ".strip b")[:4] == ["✓ defect found"] * 3 + ["✗ defect missed"]
    browser.run("document.querySelectorAll('.strip a')[3].click()")
    browser.wait("document.getElementById('viewer').open")
    assert texts(browser, "#viewer-title") == ["cut: test/cut/2.png"]
    assert texts(browser, "#viewer-verdict") == ["fapm: defect missed, score 1.5, threshold 2"]
    browser.run("history.back()")
    browser.wait("!document.getElementById('overview').hidden && !document.getElementById('viewer').open")


def test_a_term_opens_its_explanation_by_click_and_by_key(browser: Browser, report: Path) -> None:
    open_page(browser, report)
    shown = "document.querySelector('#term-holdout').matches(':popover-open')"
    browser.run("document.querySelector('.lead [popovertarget=term-holdout]').click()")
    assert browser.run(shown)
    assert texts(browser, ".explanation:popover-open") == [
        "Hold-out\n\nGood parts that are put aside: no model learns from them, and their scores set the threshold."
    ]
    browser.press("Escape", 27)
    assert not browser.run(shown)
    browser.run("document.querySelector('[data-metric=image_auroc] h3 .hint').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.run("document.querySelector('#term-auroc').matches(':popover-open')")


def test_terms_of_a_model_are_explained_too(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    terms = ["deployed threshold", "held-out", "95\xa0% interval", "promised"]
    assert texts(browser, "#note .term") == [term for term in terms if term in texts(browser, "#note")[0]]
    names = browser.run("[...document.querySelectorAll('#curves .hint')].map((each) => each.ariaLabel)")
    assert names[:2] == ["What is AUROC?", "What is AP, average precision?"]
    browser.run("document.querySelector('#curves .hint').click()")
    assert browser.run("document.querySelector('#term-auroc').matches(':popover-open')")
    assert texts(browser, "#run-needs") == ["needs make ui running"]


SIZE = (300, 1260)  # of a long part, which its small picture shows 61 pixels wide


@pytest.fixture(scope="module")
def long_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of parts with a crack that is one pixel wide; of the last, the original is gone."""
    project, pictures, crops = Project(tmp_path_factory.mktemp("long parts")), [], []
    for number in range(3):
        pictures.append(picture(f"test/cut/{number} %.png", "cut", 3.0 - number, seed=number, size=SIZE))
        rgb = np.full((*SIZE[::-1], 3), 120, dtype=np.uint8)
        rgb[:, 150] = 0
        crops.append(Image.fromarray(rgb))
    write_evaluation(project, "fapm", "rail", pictures)
    source = project.root / "parts" / "rail"
    for part, crop in zip(pictures[:2], crops[:2], strict=True):
        (source / part.path).parent.mkdir(parents=True, exist_ok=True)
        crop.save(source / part.path)
    hashes = {part.path: file_sha256(source / part.path) for part in pictures[:2]}
    write_prepared(project, "rail", pictures, hashes)
    place = project.report("parts")
    place.mkdir(parents=True)
    summary = read_summary(summary_of(["fapm"], ["rail"], num_good=0, num_defects=3))
    return html_report.write(summary, project, place, place, Originals(source.parent, READING))


def stage(browser: Browser) -> list[int]:
    """Width and height of its picture, pixels of their own."""
    canvas = "document.querySelector('#stage canvas')"
    return browser.run(f"[{canvas}.width, {canvas}.height]")


def test_the_viewer_loads_the_large_picture_and_zooms(browser: Browser, long_parts: Path) -> None:
    open_page(browser, long_parts, "#/rail")
    browser.run("document.querySelector('.tile').click()")
    browser.wait("document.querySelector('#stage canvas').width === 244")
    assert stage(browser) == [244, 1024]
    assert texts(browser, "#stage-note") == ["244 × 1024 of 300 × 1260 pixels."]
    address = browser.run("decodeURI(document.getElementById('original').href)")
    assert address == (long_parts.parents[2] / "parts/rail/test/cut/0 %.png").as_uri().replace("%20", " ").replace(
        "%25", "%"
    )
    width = "document.querySelector('#stage canvas').getBoundingClientRect().width"
    whole = browser.run(width)
    assert browser.run("document.querySelector('#stage canvas').getBoundingClientRect().height <= stage.clientHeight")
    browser.run("document.getElementById('larger').click()")
    assert browser.run(width) == pytest.approx(1.5 * whole, abs=2)
    browser.press("+", 187, "+")
    assert browser.run(width) == pytest.approx(2.25 * whole, abs=2)
    assert browser.run("stage.scrollHeight > stage.clientHeight && stage.scrollTop > 0")
    browser.run("document.getElementById('whole').click()")
    assert browser.run(width) == whole
    browser.run("document.querySelector('[data-panel=map]').click()")
    assert texts(browser, "#stage .stamp") == []
    assert browser.run("document.querySelector('[data-panel=map]').ariaPressed") == "true"


def test_what_is_gone_is_shown_as_it_was_kept(browser: Browser, long_parts: Path) -> None:
    open_page(browser, long_parts, "#/rail")
    browser.run("document.querySelectorAll('.tile')[2].click()")
    assert stage(browser) == [61, 256]
    assert browser.run("document.getElementById('original').hidden")
    assert texts(browser, "#stage-note") == ["Kept small; the original had 300 × 1260 pixels."]


def test_the_file_alone_shows_its_small_pictures(browser: Browser, long_parts: Path, tmp_path: Path) -> None:
    open_page(browser, Path(shutil.copy(long_parts, tmp_path)), "#/rail")
    browser.run("document.querySelector('.tile').click()")
    browser.wait("document.getElementById('stage-note').textContent.startsWith('Shown small: ')")
    assert "in the folder pictures, which is not here." in texts(browser, "#stage-note")[0]
    assert stage(browser) == [61, 256]
    assert all("ERR_FILE_NOT_FOUND" in problem for problem in browser.problems)
    browser.problems.clear()


@pytest.mark.parametrize("fragment", ["", FIRST, SECOND])
def test_a_phone_shows_it_without_scrolling_sideways(browser: Browser, report: Path, fragment: str) -> None:
    browser.show(390, 844, phone=True)
    open_page(browser, report, fragment)
    assert browser.run("document.documentElement.scrollWidth") == 390


def luminance(colour: str) -> float:
    red, green, blue = (int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_in_dark(browser: Browser, report: Path, dark: bool) -> None:
    browser.show(1280, 900, dark=dark)
    open_page(browser, report, FIRST)
    paper = luminance(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.05) == dark
    selectors = ("body", ".note", ".lead", "a.run", ".verdict-hit", ".verdict-miss", ".verdict-alarm", ".verdict-pass")
    for selector in selectors:
        ink = luminance(browser.run(f"getComputedStyle(document.querySelector({selector!r})).color"))
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast >= 4.5, selector  # what WCAG asks of small text


def test_a_place_on_the_page_is_no_page(browser: Browser, report: Path) -> None:
    open_page(browser, report, FIRST)
    browser.run("location.hash = '#main'")
    browser.run("new Promise((resolve) => setTimeout(resolve, 50))")
    assert not browser.run("document.getElementById('category').hidden")
    open_page(browser, report, "#/%E0%A4%A/x")  # no UTF-8
    assert not browser.run("document.getElementById('overview').hidden")


@pytest.mark.slow
@pytest.mark.parametrize(("num_categories", "num_images", "megabytes"), [(4, 80, 15), (15, 100, 60)])
def test_a_large_report_stays_small_and_quick(
    browser: Browser, tmp_path: Path, num_categories: int, num_images: int, megabytes: int
) -> None:
    models, categories = [f"model_{n}" for n in range(5)], [f"category_{n}" for n in range(num_categories)]
    for category in categories:
        pictures = [  # grain, which compresses badly
            picture(f"test/{kind}/{n}.png", kind, 1.0 + n / num_images, seed=n, side=256)
            for n, kind in zip(range(num_images), cycle(("good", "cut", "hole")), strict=False)
        ]
        write_prepared(Project(tmp_path), category, pictures)
        for model in models:
            write_evaluation(Project(tmp_path), model, category, pictures)
    good = (num_images + 2) // 3
    summary = read_summary(summary_of(models, categories, num_good=good, num_defects=num_images - good))
    path = html_report.write(summary, Project(tmp_path), tmp_path, tmp_path, NO_ORIGINALS)
    assert path.stat().st_size < megabytes * 1e6
    open_page(browser, path, f"#/{categories[-1]}")
    assert int(browser.run("document.documentElement.dataset.ready")) < 2000
    assert browser.run("document.querySelectorAll('.tile').length") == num_images
