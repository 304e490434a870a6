import threading
import time

import pytest

from pipelines import threads as module
from pipelines.threads import in_order, threads


def test_results_come_in_the_order_of_the_items(monkeypatch):
    monkeypatch.setattr(module, "_AHEAD", 3)

    def slow_at_first(number):
        time.sleep(0.05 if number == 0 else 0)
        return number * number

    with threads() as pool:
        assert list(in_order(slow_at_first, range(10), pool)) == [number * number for number in range(10)]
        assert list(in_order(slow_at_first, [], pool)) == []


@pytest.mark.parametrize(("cores", "most", "expected"), [(2, 8, 2), (64, 8, 8), (4, 3, 3), (4, 100, 4), (None, 8, 1)])
def test_no_more_than_there_are_cores(monkeypatch, cores, most, expected):
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    together = threading.Barrier(expected)
    with threads(most) as pool:
        assert len([*in_order(lambda _: together.wait(30), range(expected), pool)]) == expected
        assert len(pool._threads) == expected


def test_no_more_is_begun_than_fits_ahead(monkeypatch):
    monkeypatch.setattr(module, "_AHEAD", 4)
    begun = []
    with threads() as pool:
        found = in_order(begun.append, range(20), pool)
        for taken in range(1, 8):
            next(found)
            assert len(begun) < taken + 4


def test_what_has_not_begun_when_it_ends_in_an_error_is_not_done():
    begun, end = [], threading.Event()

    def work(number):
        begun.append(number)
        if number:
            end.wait(60)

    def stop_at_the_first():
        with threads() as pool:
            for _ in in_order(work, range(60), pool):
                threading.Timer(0.2, end.set).start()
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        stop_at_the_first()
    assert len(begun) < 20
