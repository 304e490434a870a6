from pipelines import numbers


def test_shares_are_in_percent() -> None:
    assert numbers.percent(0.98765) == "98.8"
    assert numbers.interval((0.428, 0.945)) == "42.8 to 94.5"
    assert numbers.narrow_interval((0.428, 0.945)) == "43-94"
    assert numbers.spread(0.97, 0.004) == "97.0 ± 0.4"
    assert [numbers.rate(share) for share in (0.05, 0.0013, 0.1684)] == ["5\u00a0%", "0.13\u00a0%", "16.8\u00a0%"]


def test_other_numbers() -> None:
    assert (numbers.score(1.23456), numbers.count(1700), numbers.seconds(12.4)) == ("1.235", "1,700", "12")
    assert (numbers.decimal(38.742), numbers.decimal(1234.56)) == ("38.7", "1,234.6")


def test_what_is_not_known_is_a_dash() -> None:
    formats = (numbers.percent, numbers.interval, numbers.narrow_interval, numbers.score, numbers.count)
    assert {show(None) for show in (*formats, numbers.seconds, numbers.decimal)} == {"-"}
