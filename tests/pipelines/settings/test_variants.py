"""What is said of models that are variants of one method."""

from pipelines.settings.variants import Variant, sentences

FAPM = {"image_size": "256", "grid": "4", "backbone.name": "resnet50"}


def variant(name: str, method: str = "fapm", **changes: str) -> Variant:
    return Variant(name, method, FAPM | changes)


def test_what_differs_is_named_beside_what_the_first_has() -> None:
    models = [variant("fapm"), variant("fapm_wide", grid="8"), variant("fapm_small", **{"backbone.name": "resnet18"})]
    assert sentences(models) == {
        "fapm_wide": "fapm_wide is fapm with grid 8 (4)",
        "fapm_small": "fapm_small is fapm with backbone.name resnet18 (resnet50)",
    }


def test_first_is_the_one_that_is_called_as_the_method() -> None:
    assert sentences([variant("fapm_wide", grid="8"), variant("fapm")]) == {
        "fapm_wide": "fapm_wide is fapm with grid 8 (4)"
    }
    assert sentences([variant("wide", grid="8"), variant("narrow", grid="2")]) == {
        "narrow": "narrow is wide with grid 2 (8)"
    }


def test_models_of_other_methods_are_no_variants() -> None:
    assert sentences([variant("fapm"), variant("adfa", "adfa", grid="8")]) == {}


def test_a_setting_that_one_lacks() -> None:
    tiled = variant("tiled", **{"tiles.side": "256"})
    assert sentences([variant("fapm"), tiled]) == {"tiled": "tiled is fapm with tiles.side 256 (unset)"}


def test_many_differences_and_none() -> None:
    many = variant("many", **{f"key{number}": "x" * 50 for number in range(10)})
    told = sentences([variant("fapm"), many, variant("twin")])
    assert told["many"].endswith(", 2 more")
    assert f"key0 {'x' * 39}… (unset)" in told["many"]
    assert told["twin"] == "twin is fapm with the same settings"


def test_what_a_model_was_tuned_on_follows():
    tuned = Variant("fapm_tuned", "fapm", FAPM | {"grid": "2"}, "tuned on gear: 3 trials")
    assert sentences([variant("fapm"), tuned]) == {
        "fapm_tuned": "fapm_tuned is fapm with grid 2 (4), tuned on gear: 3 trials"
    }
    assert sentences([tuned]) == {"fapm_tuned": "fapm_tuned was tuned on gear: 3 trials"}
