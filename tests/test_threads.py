"""Threads change when work is done, never its order, and never hide a fault."""

import threading

import pytest

from pipeline.core.threads import ahead


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("depth", [1, 3, 100])
def test_results_come_in_the_order_of_the_items_for_any_number_of_workers(workers, depth):
    gates = [threading.Event() for _ in range(20)]

    def work(i: int) -> int:
        if workers > 1 and depth > 1 and i % 2 == 0 and i + 1 < 20:
            gates[i + 1].wait(5)  # the next item is finished first
        gates[i].set()
        return i * i

    assert list(ahead(work, range(20), workers, depth)) == [i * i for i in range(20)]


def test_no_more_than_depth_items_are_taken_ahead_of_the_consumer():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = ahead(lambda i: i, items(), workers=2, depth=4)
    for i in range(10):
        assert next(results) == i
        assert len(taken) <= i + 4
    results.close()
    assert len(taken) <= 14


def test_a_fault_reaches_the_consumer_at_its_place():
    def work(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    results, seen = ahead(work, range(10), workers=2, depth=4), []
    with pytest.raises(ValueError, match="three"):
        seen.extend(results)
    assert seen == [0, 1, 2]


def test_nothing_gives_nothing():
    assert list(ahead(str, [], workers=2, depth=4)) == []
