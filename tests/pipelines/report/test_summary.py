from pathlib import Path

import pytest
from drawn_cells import LATENCY
from made_up import BOTH, params_of, put, put_both, put_evaluation

from pipelines.deployment.records import Latency
from pipelines.errors import StageError
from pipelines.evaluation.certainty import Champion
from pipelines.evaluation.outcomes import Evaluation
from pipelines.files import write_json
from pipelines.paths import Project
from pipelines.refusals import Refusal
from pipelines.report.markdown import absences, headlines, over_seeds
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


def test_the_best_model_comes_first_and_removed_cells_are_gone(project: Project) -> None:
    summary = summarise(params_of(["b", "a"], ["nut", "my bolt"]), project)
    cells = [(cell.model, cell.category) for cell in summary.cells]
    assert cells == [("a", "nut"), ("a", "my bolt"), ("b", "nut"), ("b", "my bolt")]
    assert [row.model for row in summary.averages] == list(summary.models) == ["a", "b"]
    summary = summarise(params_of(["b"], ["my bolt"]), project)
    assert [(cell.model, cell.category) for cell in summary.cells] == [("b", "my bolt")]
    assert summary.categories == ("my bolt",)
    assert list(summary.models) == ["b"]
    assert summary.comparisons == ()
    assert "nut" not in summary.model_dump_json()


def test_another_model_may_be_the_best_on_one_category(project: Project) -> None:
    put(project, "b", "my bolt", auroc=0.9999, masks=False)
    summary = summarise(BOTH, project)
    found = {category: summary.best_first(category) for category in ("nut", "my bolt", "average")}
    assert (found["nut"], found["my bolt"]) == (["a", "b"], ["b", "a"])
    means = {row.model: row.metrics["image_auroc"] for row in summary.averages}
    assert found["average"] == sorted(means, key=lambda model: -means[model])


def test_without_defects_the_fewest_false_alarms_come_first(project: Project) -> None:
    for model, alarms in (("a", 4), ("b", 1)):
        evaluation = put(project, model, "nut", good=30, defect=0)
        evaluation = evaluation.model_copy(update={"metrics": evaluation.metrics | {"false_alarms": alarms / 30}})
        evaluation.save(project.cell(model, "nut", 0).evaluation)
    summary = summarise(params_of(["a", "b"], ["nut"]), project)
    assert summary.rows["a", "nut"].metrics["image_auroc"] is None
    assert summary.best_first() == summary.best_first("nut") == list(summary.models) == ["b", "a"]


def test_a_category_without_defects_does_not_hide_the_others(project: Project) -> None:
    for model in ("a", "b"):
        put(project, model, "screw", good=30, defect=0)
    summary = summarise(params_of(["b", "a"], ["screw", "nut"]), project)
    assert summary.rows["a", "average"].metrics["image_auroc"] is None
    assert summary.best_first() == ["a", "b"]


def test_the_champion_comes_before_a_higher_figure(project: Project) -> None:
    """One that it has only because it was tested on other images."""
    summary = summarise(BOTH, project)
    places = summary.champions["image_auroc"] | {"nut": Champion("b", (), None)}
    summary = summary.model_copy(update={"champions": summary.champions | {"image_auroc": places}})
    assert (summary.best_first("nut"), summary.best_first("my bolt")) == (["b", "a"], ["a", "b"])


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
    Refusal(verb="train", reason="a loss that is not finite").save(project.cell("a", "nut", 0).refusal)
    summary = summarise(BOTH, project)
    assert [cell.text for cell in summary.absent] == ["a on nut: refused by train: a loss that is not finite"]
    places = [("b", "nut"), ("b", "my bolt"), ("a", "my bolt")]  # whoever lacks a category comes last
    assert [(cell.model, cell.category) for cell in summary.cells] == places
    assert list(summary.cells) == [whole.rows[place] for place in places]
    assert summary.categories == whole.categories
    of_b, of_a = summary.averages
    assert (of_a.model, of_a.metrics, of_a.counts.test_images) == ("a", {}, "20 + 20")
    assert of_b == whole.rows["b", "average"]
    best = summary.champions["image_auroc"]
    assert (best["nut"].best, best["my bolt"], best["average"].best) == (
        "b",
        whole.champions["image_auroc"]["my bolt"],
        "b",
    )


def test_a_cell_that_was_not_exported_keeps_its_figures(project: Project) -> None:
    whole = summarise(BOTH, project)
    Refusal(verb="export", reason="the graph differs").save(project.cell("a", "nut", 0).refusal)
    summary = summarise(BOTH, project)
    assert (summary.cells, summary.averages) == (whole.cells, whole.averages)
    assert [cell.text for cell in summary.absent] == ["a on nut: refused by export: the graph differs"]
    assert absences(summary) == ["Not exported: a on nut: refused by export: the graph differs"]


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
    cell = project.cell("a", "nut", 0)
    write_json(cell.run_record, {"run_id": evaluation_of(project, "nut").run_id, "settings": {"train": {"seed": 0}}})
    assert summarise(BOTH, project).absent == ()
    write_json(cell.run_record, {"run_id": "later"})
    (absent,) = summarise(BOTH, project).absent
    assert absent.text.startswith("a on nut: trained anew since it was evaluated; run `blemish evaluate a nut`")


def test_what_a_model_costs(project: Project) -> None:
    cell = project.cell("a", "nut", 0)
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
    return Evaluation.load(project.cell("a", category, 0).evaluation, "evaluate again")


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


def test_the_seeds_of_the_file_need_no_store(project: Project) -> None:
    """What is shown is the first seed's; one that is not there is named, and the others tell the spread."""
    params = BOTH.model_copy(update={"train": BOTH.train.model_copy(update={"seeds": [0, 1, 2]})})
    for model, auroc in (("a", 0.9), ("b", 0.7)):
        for category in BOTH.data.categories:
            for seed in (0, 1):
                cell = project.cell(model, category, seed)
                if seed:
                    put_evaluation(cell.evaluated, model, category, auroc=auroc, seed=seed)
                run_id = Evaluation.load(cell.evaluation, "").run_id
                settings = {"method": model, "models": {model: {"grid": 8}}, "train": {"seed": seed}}
                write_json(cell.run_record, {"run_id": run_id, "settings": settings})
    summary = summarise(params, project)
    assert [(row.model, row.seeds.seeds) for row in summary.averages] == [("a", (0, 1)), ("b", (0, 1))]
    assert {cell.seed for cell in summary.cells} == {0}
    values = [Evaluation.load(project.cell("a", "nut", seed).evaluation, "").known["image_auroc"] for seed in (0, 1)]
    assert summary.rows["a", "nut"].seeds.metrics["image_auroc"].values == pytest.approx(values, abs=1e-6)
    assert [cell.text.partition(";")[0] for cell in summary.absent] == [
        f"{model} on {category}, seed 2: not evaluated" for model, category in params.cells()
    ]
    assert summary.rows["a", "average"].metrics["image_auroc"] is not None
    (told,) = over_seeds(summary)
    assert told.startswith("Image AUROC over seeds 0, 1: a ")
    other = params.model_copy(update={"train": params.train.model_copy(update={"seeds": [1, 0]})})
    assert {cell.seed for cell in summarise(other, project).cells} == {1}


def test_a_second_seed_that_is_absent_takes_no_average(tmp_path: Path) -> None:
    """Without a defect there is no figure to tell, which is not the absent seed's doing."""
    project = Project(tmp_path)
    put(project, "a", "nut", good=10, defect=0)
    params = params_of(["a"], ["nut"])
    summary = summarise(params.model_copy(update={"train": params.train.model_copy(update={"seeds": [0, 1]})}), project)
    (absent,) = summary.absent
    assert (absent.seed, absent.without_figures) == (1, False)
    assert headlines(summary)[0] == "a: no defect to find"


def test_a_run_with_other_settings_is_no_other_seed_of_it(project: Project) -> None:
    params = BOTH.model_copy(update={"train": BOTH.train.model_copy(update={"seeds": [0, 1]})})
    put_evaluation(project.cell("a", "nut", 1).evaluated, "a", "nut", auroc=0.9, seed=1)
    for seed, grid in ((0, 8), (1, 4)):
        cell = project.cell("a", "nut", seed)
        settings = {"method": "a", "models": {"a": {"grid": grid}}, "train": {"seed": seed}}
        write_json(cell.run_record, {"run_id": Evaluation.load(cell.evaluation, "").run_id, "settings": settings})
    assert summarise(params, project).rows["a", "nut"].seeds is None


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
    summary.save(project.summary("demo"))
    assert Summary.of(project, "demo") == summary
    assert len(summary.model_dump_json()) < 60_000
