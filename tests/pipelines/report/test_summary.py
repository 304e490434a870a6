from pathlib import Path

import pytest
from drawn_cells import LATENCY
from made_up import BOTH, params_of, put, put_both

from pipelines.deployment.records import Latency
from pipelines.errors import StageError
from pipelines.evaluation.certainty import Champion
from pipelines.evaluation.outcomes import Evaluation
from pipelines.files import write_json
from pipelines.paths import Project
from pipelines.refusals import Refusal
from pipelines.report.summary import Summary, Tracking, summarise
from pipelines.tracking.pages import Pages
from pipelines.tracking.records import CellRun


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return put_both(Project(tmp_path))


def test_the_average_weighs_every_category_alike(project: Project) -> None:
    summary = summarise(BOTH, project)
    assert [row.model for row in summary.averages] == ["a", "b"]
    for model in ("a", "b"):
        values = [summary.rows[model, category].metrics["image_auroc"] for category in ("nut", "my bolt")]
        average = summary.rows[model, "average"]
        assert average.metrics["image_auroc"] == pytest.approx(sum(values) / 2)
        low, high = average.intervals["image_auroc"]
        assert low < average.metrics["image_auroc"] < high
        assert average.counts.test_images == "50 + 60"


def test_a_metric_that_a_category_lacks_has_no_average(project: Project) -> None:
    summary = summarise(BOTH, project)
    average = summary.rows["a", "average"]
    assert average.metrics["pixel_auroc"] is None
    assert "pixel_auroc" not in average.intervals
    assert summary.rows["a", "nut"].metrics["pixel_auroc"] > 0.5
    assert summary.champions["pixel_auroc"]["nut"].best in ("a", "b")
    assert summary.champions["pixel_auroc"]["average"].best is None
    assert summary.champions["pixel_auroc"]["average"].reason == "no Pixel AUROC"


def test_cells_come_in_the_files_order_and_removed_ones_are_gone(project: Project) -> None:
    cells = [(cell.model, cell.category) for cell in summarise(BOTH, project).cells]
    assert cells == [("a", "nut"), ("a", "my bolt"), ("b", "nut"), ("b", "my bolt")]
    summary = summarise(params_of(["b"], ["my bolt"]), project)
    assert [(cell.model, cell.category) for cell in summary.cells] == [("b", "my bolt")]
    assert summary.categories == ("my bolt",)
    assert list(summary.models) == ["b"]
    assert summary.comparisons == ()
    assert "nut" not in summary.model_dump_json()


def test_a_cell_that_is_not_evaluated_is_named(project: Project) -> None:
    summary = summarise(params_of(["a"], ["nut", "screw"]), project)
    assert [cell.text for cell in summary.absent] == [
        "a on screw: not evaluated; run `blemish evaluate a screw`, or `dvc repro` for everything"
    ]
    with pytest.raises(StageError) as caught:
        summarise(params_of(["a"], ["screw", "bolt"]), project)
    assert str(caught.value) == (
        "no cell has been evaluated\n"
        "  - a on screw: not evaluated; run `blemish evaluate a screw`, or `dvc repro` for everything\n"
        "  - a on bolt: not evaluated; run `blemish evaluate a bolt`, or `dvc repro` for everything"
    )


def test_a_cell_that_was_refused_leaves_the_others_as_they_are(project: Project) -> None:
    whole = summarise(BOTH, project)
    Refusal(verb="train", reason="a loss that is not finite").save(project.cell("a", "nut").refusal)
    summary = summarise(BOTH, project)
    assert [cell.text for cell in summary.absent] == ["a on nut: refused by train: a loss that is not finite"]
    assert summary.cells == tuple(cell for cell in whole.cells if (cell.model, cell.category) != ("a", "nut"))
    assert summary.categories == whole.categories
    of_a, of_b = summary.averages
    assert (of_a.model, of_a.metrics, of_a.counts.test_images) == ("a", {}, "20 + 20")
    assert of_b == whole.averages[1]
    places = summary.champions["image_auroc"]
    assert (places["nut"].best, places["my bolt"], places["average"].best) == (
        "b",
        whole.champions["image_auroc"]["my bolt"],
        "b",
    )


def test_what_all_models_or_categories_need_and_lack(project: Project) -> None:
    Refusal(verb="prepare", reason="damaged").save(project.refusal("prepare", "nut"))
    assert [cell.text for cell in summarise(BOTH, project).absent] == [
        "a on nut: refused by prepare: damaged",
        "b on nut: refused by prepare: damaged",
    ]
    Refusal(verb="distill", reason="no photos").save(project.refusal("distill", "b"))
    summary = summarise(BOTH, project)
    assert [(cell.model, cell.category) for cell in summary.cells] == [("a", "my bolt")]
    assert list(summary.models) == ["a"]
    assert summary.categories == ("my bolt",)


def test_an_evaluation_of_an_earlier_training_is_not_shown(project: Project) -> None:
    cell = project.cell("a", "nut")
    write_json(cell.run_record, {"run_id": evaluation_of(project, "nut").run_id})
    assert summarise(BOTH, project).absent == ()
    write_json(cell.run_record, {"run_id": "later"})
    (absent,) = summarise(BOTH, project).absent
    assert absent.text.startswith("a on nut: trained anew since it was evaluated; run `blemish evaluate a nut`")


def test_what_a_model_costs(project: Project) -> None:
    cell = project.cell("a", "nut")
    cell.exported.mkdir(parents=True)
    cell.onnx.write_bytes(bytes(1_234_567))
    write_json(cell.latency, LATENCY)
    summary = summarise(BOTH, project)
    assert [cell.onnx_megabytes for cell in summary.cells] == [1.23, None, None, None]
    assert [cell.figures["latency_ms"] for cell in summary.cells] == [8.0, None, None, None]
    assert summary.cells[0].latency == Latency(**LATENCY)
    average = summary.rows["a", "average"]
    assert average.train_seconds_total == pytest.approx(24.8)
    assert (average.onnx_megabytes_mean, average.latency_p50) == (None, None)  # of one category it is not known


def test_who_beats_whom(project: Project) -> None:
    summary = summarise(BOTH, project)
    (found,) = [c for c in summary.comparisons if (c.metric, c.category) == ("image_auroc", "average")]
    assert (found.a, found.b, found.verdict, found.num_images) == ("a", "b", "a", 110)
    assert found.difference > 0
    assert found.p <= 0.05
    assert found.text.startswith("a beats b by ")
    assert summary.champions["image_auroc"]["average"] == Champion("a", (), None)


def test_the_same_model_twice_is_a_tie(tmp_path: Path) -> None:
    """Equal quality, another seed: neither is the champion alone."""
    project = Project(tmp_path)
    for seed, model in enumerate(("one", "two")):
        for category in ("nut", "bolt"):
            put(project, model, category, auroc=0.95, seed=seed, good=40, defect=40)
    champion = summarise(params_of(["one", "two"], ["nut", "bolt"]), project).champions["image_auroc"]["average"]
    assert champion.tied_with
    assert {champion.best, *champion.tied_with} == {"one", "two"}


def test_models_tested_on_different_images_have_no_champion(project: Project) -> None:
    put(project, "b", "nut", good=29, defect=40)
    summary = summarise(BOTH, project)
    for category in ("nut", "average"):
        found = summary.champions["image_auroc"][category]
        assert (found.best, found.reason) == (None, "70 and 69 test images of nut")
    assert summary.champions["image_auroc"]["my bolt"].best == "a"
    refused = next(c for c in summary.comparisons if c.category == "nut")
    assert (refused.verdict, refused.difference) == ("refused", None)


def evaluation_of(project: Project, category: str) -> Evaluation:
    return Evaluation.load(project.cell("a", category).evaluation, "evaluate again")


def run_of(evaluation: Evaluation, seed: int, **metrics: float) -> CellRun:
    run_id = f"{evaluation.run_id} seed {seed}" if metrics else evaluation.run_id
    settings = {"models.a.grid": "8", "train.seed": str(seed)}
    return CellRun(run_id, "a", evaluation.category, seed, settings, evaluation.known | metrics, {})


def test_several_seeds_are_a_mean_and_a_spread(project: Project) -> None:
    evaluations = [evaluation_of(project, category) for category in BOTH.data.categories]
    runs = [run_of(evaluation, 0) for evaluation in evaluations]
    runs += [run_of(found, 1, image_auroc=found.known["image_auroc"] - 0.1) for found in evaluations]
    alone = summarise(BOTH, project)
    summary = summarise(BOTH, project, runs, Pages("http://127.0.0.1:5000", "3"))
    found = summary.rows["a", "nut"].seeds
    assert found.seeds == (0, 1)
    assert found.metrics["image_auroc"].mean == pytest.approx(evaluations[0].known["image_auroc"] - 0.05, abs=1e-6)
    assert found.metrics["image_auroc"].sd == pytest.approx(0.1 / 2**0.5, abs=1e-6)
    assert summary.rows["a", "average"].seeds.metrics["image_auroc"].sd == pytest.approx(0.070711)
    assert summary.rows["b", "nut"].seeds is None
    assert alone.rows["a", "nut"].seeds is None

    def p(of: Summary) -> float:
        (pair,) = [c for c in of.comparisons if (c.metric, c.category) == ("image_auroc", "average")]
        return pair.p

    assert p(alone) <= 0.05
    assert p(summary) > 0.1  # a tenth between two seeds says little of a third


def test_links_to_the_runs_that_the_store_has(project: Project) -> None:
    evaluation = evaluation_of(project, "nut")
    summary = summarise(BOTH, project, [run_of(evaluation, 0)], Pages("http://127.0.0.1:5000", "3"))
    url = f"http://127.0.0.1:5000/#/experiments/3/runs/{evaluation.run_id}?workflowType=machine_learning"
    assert [cell.run_url for cell in summary.cells] == [url, None, None, None]
    assert summary.tracking == Tracking(experiment="demo", experiment_id="3", page="http://127.0.0.1:5000")
    assert summarise(BOTH, project).tracking.page is None


def test_good_parts_alone_can_be_summed_up(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for model in ("a", "b"):
        put(project, model, "nut", good=10, defect=0)
    summary = summarise(params_of(["a", "b"], ["nut"]), project)
    assert set(summary.champions) == {"false_alarms"}
    assert summary.cells[0].metrics["image_auroc"] is None
    assert set(summary.cells[0].intervals) == {"false_alarms"}


def test_everything_can_be_read_back_and_is_short(project: Project) -> None:
    summary = summarise(BOTH, project)
    summary.save(project.summary)
    assert Summary.of(project) == summary
    assert len(summary.model_dump_json()) < 60_000
