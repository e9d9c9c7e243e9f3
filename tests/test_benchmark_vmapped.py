"""The benchmark of training many students at once: what is timed together."""

import itertools
import time
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def benchmark(alone):
    with alone("experiments.benchmarks.vmapped") as found:
        yield found


def test_numbers_of_students_are_timed_apart_in_turns_of_many_calls(benchmark, monkeypatch):
    called: list[tuple[int, str]] = []

    def call(count, way):
        def go():
            time.sleep(0.001)
            called.append((count, way))

        return go

    ways = ("one by one", "vmap")
    made = {count: {way: call(count, way) for way in ways} for count in (1, 55)}
    monkeypatch.setattr(benchmark, "make_ways", lambda case: made)
    monkeypatch.setattr(benchmark, "ROUNDS", SimpleNamespace(value=3))
    monkeypatch.setattr(benchmark, "SECONDS", 0.02)
    times, added = benchmark.measure("mlp")
    assert [count for count, _ in itertools.groupby(called, key=lambda one: one[0])] == [1, 55]
    turns = [len(list(calls)) for _, calls in itertools.groupby(called)]
    assert max(turns) > 5
    assert {count: set(found) for count, found in times.items()} == {1: set(ways), 55: set(ways)}
    assert all(len(values) == 3 and min(values) >= 1 for found in times.values() for values in found.values())
    assert added.keys() == {1, 55}
