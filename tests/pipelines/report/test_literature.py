import pytest

from pipelines.report.literature import MVTEC_AD_ORDER, Published, is_mvtec_ad, load_published
from pipelines.sources.catalogue import MVTEC_AD_COUNTS

PUBLISHED = load_published()


def entry(method: str) -> Published:
    return next(published for published in PUBLISHED if published.method == method)


def test_the_categories_are_those_of_mvtec_ad() -> None:
    assert set(MVTEC_AD_ORDER) == set(MVTEC_AD_COUNTS)
    assert len(MVTEC_AD_ORDER) == 15
    assert MVTEC_AD_ORDER[:5] == ("carpet", "grid", "leather", "tile", "wood")


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.method)
def test_every_figure_is_a_percentage_with_a_source(published: Published) -> None:
    assert published.source
    assert published.notes
    for metric, values in published.metrics.items():
        assert metric in {"image_auroc", "pixel_auroc", "pixel_f1_max", "aupro_30"}
        assert set(values) <= {"average", *MVTEC_AD_ORDER}
        assert all(20 < value <= 100 for value in values.values())


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.method)
def test_a_whole_table_averages_to_what_was_published_beside_it(published: Published) -> None:
    for values in published.metrics.values():
        if len(values) == 16:
            mean = sum(values[category] for category in MVTEC_AD_ORDER) / 15
            assert mean == pytest.approx(values["average"], abs=0.055)


def test_figures_as_they_were_published() -> None:
    patchcore = entry("PatchCore (WideResNet-50)").metrics
    assert (patchcore["image_auroc"]["pill"], patchcore["pixel_auroc"]["wood"]) == (96.7, 95.1)
    assert patchcore["aupro_30"]["transistor"] == 83.2
    assert entry("FAPM (paper)").metrics["image_auroc"]["screw"] == 95.2
    assert entry("CFA (anomalib)").metrics["image_auroc"]["screw"] == 70.3
    assert entry("EfficientAD-S (PyTorch)").metrics["aupro_30"]["cable"] == 88.2
    assert entry("EfficientAD-M (anomalib)").metrics["image_auroc"]["pill"] == 92.6


def test_an_average_over_some_categories_is_of_these() -> None:
    patchcore = entry("PatchCore (WideResNet-50)")
    assert patchcore.average("image_auroc", MVTEC_AD_ORDER) == 99.16
    assert patchcore.average("image_auroc", ["pill", "screw"]) == pytest.approx((96.7 + 98.8) / 2)
    # only the average over all fifteen is known
    assert entry("DiffusionAD (paper)").average("image_auroc", ["pill"]) is None


def test_a_folder_of_bottles_is_not_mvtec_ad() -> None:
    assert is_mvtec_ad({"bottle": 209, "zipper": 240})
    assert not is_mvtec_ad({"bottle": 60})
    assert not is_mvtec_ad({"bottle": 209, "fabric": 60})
    assert not is_mvtec_ad({})
