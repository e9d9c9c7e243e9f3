"""Batches as pure functions of seed and epoch."""

import numpy as np
import pytest

from kdjax import data


def test_an_epoch_draws_every_example_at_most_once():
    ids = np.arange(100, 203)
    index = data.epoch_index(ids, seed=0, epoch=0, batch_size=10)
    assert index.shape == (10, 10)
    assert len(set(index.ravel())) == 100
    assert set(index.ravel()) <= set(ids)


def test_epochs_and_seeds_have_other_orders_and_each_is_repeatable():
    orders = {
        (seed, epoch): data.epoch_index(np.arange(64), seed=seed, epoch=epoch, batch_size=8).tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert orders[1, 1] == data.epoch_index(np.arange(64), seed=1, epoch=1, batch_size=8).tobytes()


def test_every_example_takes_part_over_the_epochs():
    drawn = np.concatenate(
        [data.epoch_index(np.arange(19), seed=0, epoch=e, batch_size=8).ravel() for e in range(30)]
    )
    counts = np.bincount(drawn, minlength=19)
    assert counts.min() > 15  # 25 expected


def test_a_set_smaller_than_a_batch_fills_one():
    index = data.epoch_index(np.array([5, 6, 7]), seed=0, epoch=0, batch_size=8)
    assert index.shape == (1, 8)
    assert set(index.ravel()) == {5, 6, 7}


def test_evaluation_visits_everything_once_in_order():
    index, valid = data.evaluation_index(np.arange(3, 20), batch_size=5)
    assert index.shape == valid.shape == (4, 5)
    np.testing.assert_array_equal(index[valid > 0], np.arange(3, 20))
    assert valid.sum() == 17


@pytest.mark.parametrize("function", [data.epoch_index, data.evaluation_index])
def test_refuses_an_empty_split(function):
    options = {"seed": 0, "epoch": 0} if function is data.epoch_index else {}
    with pytest.raises(ValueError, match="at least one id"):
        function(np.zeros(0, np.int64), batch_size=4, **options)


def test_feed_is_a_function_of_the_step():
    arrays = {"image": np.zeros(3)}
    feed = data.resident_feed(arrays, np.arange(60), seed=1, batch_size=8, steps_per_dispatch=4)
    assert feed.steps_per_epoch == 7
    rows = data.epoch_index(np.arange(60), seed=1, epoch=2, batch_size=8)
    resident, index = feed.at(14 + 4)  # third epoch, second dispatch: the three steps that are left
    assert resident is arrays
    np.testing.assert_array_equal(index, rows[4:7].T)


@pytest.mark.parametrize(
    ("most", "lengths"), [(1, [1] * 12), (4, [4] * 3), (5, [4] * 3), (100, [12]), (8, [6, 6])]
)
def test_dispatches_are_of_equal_length_where_an_epoch_allows_it(most, lengths):
    feed = data.resident_feed({}, np.arange(24), seed=1, batch_size=2, steps_per_dispatch=most)
    found, step = [], 0
    while step < feed.steps_per_epoch:
        found.append(feed.at(step)[1].shape[1])
        step += found[-1]
    assert found == lengths


def test_feed_takes_this_processes_rows():
    feed = data.resident_feed({}, np.arange(32), seed=1, batch_size=8, rows_of=lambda rows: rows[4:])
    np.testing.assert_array_equal(
        feed.at(0)[1], data.epoch_index(np.arange(32), seed=1, epoch=0, batch_size=8)[:1].T[4:]
    )


@pytest.mark.parametrize("function", [data.epoch_index, data.evaluation_index, data.resident_feed])
@pytest.mark.parametrize(
    ("ids", "batch_size", "said"),
    [
        (
            np.arange(6) % 2 == 0,
            2,
            r"row numbers .* got bool\[6\]; a mask becomes row numbers by np.flatnonzero",
        ),
        (np.arange(6.0), 2, r"row numbers .* got float64\[6\]"),
        (np.arange(6).reshape(2, 3), 2, r"row numbers .* got int64\[2, 3\]"),
        (np.array([0, -1]), 2, "row numbers"),
        (np.array([0, 2**31]), 2, "row numbers"),
        (np.arange(6), 0, "batch size of 1 or more, got 0"),
        (np.zeros(0, np.int64), 2, "at least one id"),
    ],
)
def test_refuses_ids_that_are_no_row_numbers(function, ids, batch_size, said):
    more = {
        data.epoch_index: {"seed": 0, "epoch": 0},
        data.evaluation_index: {},
        data.resident_feed: {"arrays": {}, "seed": 0},
    }[function]
    with pytest.raises(ValueError, match=said):
        function(ids=ids, batch_size=batch_size, **more)


@pytest.mark.parametrize("seed", [-1, 2**32, 20240101123456])
def test_refuses_a_seed_that_does_not_fit_into_32_bits(seed):
    with pytest.raises(ValueError, match=rf"from 0 to 4294967295, got {seed}"):
        data.epoch_index(np.arange(6), seed=seed, epoch=0, batch_size=2)
    with pytest.raises(ValueError, match=rf"from 0 to 4294967295, got {seed}"):
        data.resident_feed({}, np.arange(6), seed=seed, batch_size=2)


def test_refuses_dispatches_of_no_steps():
    with pytest.raises(ValueError, match="steps_per_dispatch of 1 or more, got 0"):
        data.resident_feed({}, np.arange(6), seed=0, batch_size=2, steps_per_dispatch=0)


def test_a_feed_is_known_by_what_decides_its_steps():
    def identity(ids=range(6), **changed):
        options = {"seed": 0, "batch_size": 2} | changed
        return data.resident_feed({}, np.array(ids), **options).identity

    assert identity() == identity(steps_per_dispatch=3)
    others = [
        identity(seed=1),
        identity(batch_size=3),
        identity(range(7)),
        identity(range(1, 7)),
        identity([5, 4, 3, 2, 1, 0]),
    ]
    assert len({str(one) for one in [identity(), *others]}) == 6
