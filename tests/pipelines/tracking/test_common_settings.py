import pytest

from pipelines.tracking.records import common_settings


@pytest.mark.parametrize(
    ("settings", "common"),
    [
        ({"models.fapm.image_size": 256}, {"image_size": 256}),
        ({"models.fapm_wide.backbone.name": "r50"}, {"backbone.name": "r50"}),
        ({"distill.efficient_ad.steps": 700, "distill.efficient_ad.seed": 1}, {"steps": 700, "seed": 1}),
        ({"train.seed": 2}, {"seed": 2}),
        ({"prepare.holdout": 0.25, "data.sha256": "ab", "inputs.teacher_sha256": "cd"}, {}),
        # one that would be taken for another section's
        ({"models.fapm.train.seed": 1, "train.seed": 2}, {"seed": 2}),
        ({"models.fapm": 1}, {}),
    ],
)
def test_what_a_setting_is_called_whatever_the_method(settings: dict[str, object], common: dict[str, object]) -> None:
    assert common_settings(settings) == common
