"""Which of the real defects a model is tested on, where some are there to learn from."""

import copy
import dataclasses
import json

import pytest
import torch
from conftest import CATEGORY, FAPM, tiny_params, write_params
from mlflow import MlflowClient
from tiny_models import SETTINGS

from pipelines.data.index import PreparedIndex
from pipelines.deployment.export import export
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.outcomes import Counts, Evaluation, read_tested
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.training.train import train
from pipelines.training.trained import load_trained

CPU = torch.device("cpu")
BGAD = SETTINGS["bgad"] | {"backbone": FAPM["backbone"], "epochs": 2}


def with_models(project, *names, learnt_defects="tested_by_nobody", count=2, **bgad):
    """The parameters with these of two models, on disk too; two of the four defects are there to learn from."""
    values = tiny_params()
    values["prepare"]["anomalous_train"] = {"count": count, "protocol": "spread"}
    values["evaluate"]["learnt_defects"] = learnt_defects
    settings = {"fapm": FAPM, "bgad": BGAD | bgad}
    values["models"] = {name: copy.deepcopy(settings[name]) for name in names}
    write_params(project.root, values)
    return load_checked(project.params)


def prepared(project, params):
    source = project.root / "images" / CATEGORY
    folder = project.prepared(CATEGORY)
    return prepare(source, CATEGORY, params.prepare, params.views().frames, folder, lambda *_: None).index


def counts_of(project, model):
    counts = Evaluation.load(project.cell(model, CATEGORY, 0).evaluation, "evaluate again").counts
    return counts.test_images


def review_of(project, model):
    found = Evaluation.load(project.cell(model, CATEGORY, 0).evaluation, "evaluate again")
    return found.review, found.threshold.value


def test_who_is_tested_on_what(project, console):
    """None is apart for FAPM alone; beside BGAD, that is decided by `learnt_defects`; BGAD never sees its own."""
    both = with_models(project, "fapm", "bgad")
    index = prepared(project, both)
    for model in ("fapm", "bgad"):
        train(model, CATEGORY, both, project, CPU, console)
    learnt = {index.images[row].path for row in index.rows("anomalous_train")}
    assert len(learnt) == 2

    for model in ("fapm", "bgad"):
        evaluate(model, CATEGORY, both, project, CPU)
        assert counts_of(project, model) == "4 + 2 (2 apart)"
        assert not learnt & {image.path for image in read_tested(project.cell(model, CATEGORY, 0).evaluated)}
    # FAPM has never seen them, and nobody tests it on them: they say from where on it rejects without a look.
    trained = load_trained(project.cell("fapm", CATEGORY, 0), CPU)
    data = trained.data(project, CPU)
    scores = [float(trained.model(data.batch([row]).image).score) for row in index.rows("anomalous_train")]
    review, threshold = review_of(project, "fapm")
    assert min(scores) > threshold  # as all of the 3 held-out good parts, whose highest score it is
    assert (review.comes_from, review.num_images, review.reject_above) == ("known defects", 2, min(scores))
    # BGAD has learnt from them, and 3 held-out good parts promise nothing.
    review, _ = review_of(project, "bgad")
    assert (review.comes_from, review.num_known_defects, review.reject_above) == ("held-out good parts", 0, None)
    others = with_models(project, "fapm", "bgad", learnt_defects="tested_by_others")
    for model, expected in (("fapm", "4 + 4"), ("bgad", "4 + 2 (2 apart)")):
        evaluate(model, CATEGORY, others, project, CPU)
        assert counts_of(project, model) == expected
    assert review_of(project, "fapm")[0].comes_from == "held-out good parts"  # what is tested on sets no threshold
    assert learnt < {image.path for image in read_tested(project.cell("fapm", CATEGORY, 0).evaluated)}
    client = MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    tags = {run.data.tags["model"]: run.data.tags for run in runs}
    tested = {
        model: tuple(found[f"test.{key}"] for key in ("good", "defective", "defects_apart"))
        for model, found in tags.items()
    }
    assert tested == {"fapm": ("4", "4", "0"), "bgad": ("4", "2", "2")}
    assert (
        "2 real defects apart, for models that learn from some; tested on 4 good and 2 defective"
        in (tags["bgad"]["mlflow.note.content"])
    )

    alone = with_models(project, "fapm")
    evaluate("fapm", CATEGORY, alone, project, CPU)
    assert counts_of(project, "fapm") == "4 + 4"
    assert export("fapm", CATEGORY, alone, project).num_images == 8
    # what BGAD has learnt from stays learnt, whatever its settings say by now or whether it is in the file
    idle = with_models(project, "fapm", "bgad", anomalies_per_batch=0, pastes_per_batch=0)
    for params, fapm in ((idle, "4 + 4"), (alone, "4 + 4")):
        evaluate("bgad", CATEGORY, params, project, CPU)
        assert counts_of(project, "bgad") == "4 + 2 (2 apart)"
        evaluate("fapm", CATEGORY, params, project, CPU)
        assert counts_of(project, "fapm") == fapm


def test_none_is_apart_where_none_is_learnt(project):
    assert not with_models(project, "fapm", "bgad", count=0).defects_apart(learns=False)
    assert with_models(project, "fapm", "bgad").defects_apart(learns=False)
    assert not with_models(project, "fapm", "bgad", anomalies_per_batch=0, pastes_per_batch=0).defects_apart(
        learns=False
    )
    assert with_models(project, "fapm").defects_apart(learns=True)


def test_the_index_is_the_same_whoever_is_in_models(project):
    """So that a model that joins trains, and nobody else does."""
    files = []
    for params in (with_models(project, "fapm"), with_models(project, "bgad", learnt_defects="tested_by_others")):
        prepared(project, params)
        files.append((project.prepared(CATEGORY) / "index.json").read_bytes())
    assert files[0] == files[1]


def test_one_type_withholds_the_rest_of_it_from_who_learns(project):
    values = [("anomalous_train", "cut"), ("withheld", "cut"), ("test", "bent"), ("test", "good"), ("train", "good")]
    index = prepared(project, with_models(project, "fapm"))
    images = tuple(
        dataclasses.replace(index.images[row], split=split, defect=defect) for row, (split, defect) in enumerate(values)
    )
    found: PreparedIndex = dataclasses.replace(index, images=images)
    assert found.apart() == [0, 1]
    assert found.tested(defects_apart=True) == [2, 3]
    assert found.tested(defects_apart=False) == [0, 1, 2, 3]


@pytest.mark.parametrize(("apart", "text"), [(0, "30 + 24"), (6, "30 + 24 (6 apart)")])
def test_a_test_in_words(apart, text):
    counts = Counts(train=60, holdout=20, test_normal=30, test_anomalous=24, apart=apart)
    assert counts.test_images == text
    total = Counts.total([counts, counts])
    assert json.loads(total.model_dump_json()) == {name: 2 * value for name, value in counts.model_dump().items()}
