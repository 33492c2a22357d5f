"""Times counted in cells: what is exact, what is near, and who may read when."""

from __future__ import annotations

import math
import random
import sys
import threading
from typing import get_type_hints

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_pool import Latency
from trio_pool._latency import FLUSH, Histogram

NOTHING = Latency(count=0, mean=0.0, p50=0.0, p95=0.0, p99=0.0, max=0.0)
PERCENTS = (50, 95, 99)

# How far a percentile may be from the sample of its rank, with room for the
# rounding of floats.
BOUND = 1 / 17 + 1e-12

times = st.floats(min_value=1e-12, max_value=1e9) | st.just(0.0)
samples = st.lists(times, min_size=1, max_size=300)


def histogram_of(seconds, *, flush_every=FLUSH):
    """Count times as the pool does."""
    histogram = Histogram()
    for one in seconds:
        histogram.pending.append(one)
        if len(histogram.pending) >= flush_every:
            histogram.flush()
    return histogram


def latency_of(seconds):
    return histogram_of(seconds).latency()


def nearest_rank(seconds, percent):
    """Return a percentile by its definition."""
    rank = math.ceil(percent * len(seconds) / 100)
    return sorted(seconds)[rank - 1]


def percentiles(latency):
    return [latency.p50, latency.p95, latency.p99]


def exact_parts(latency):
    """Return all but the mean, whose rounding depends on the order of adding."""
    return attrs.evolve(latency, mean=0.0)


def at_each_step(function, step):
    """Call ``step`` before every bytecode that ``function`` runs in the module."""
    before = sys.gettrace()
    home = Histogram.flush.__code__.co_filename

    def trace(frame, event, arg):
        # A garbage collection may call anybody's code in between.
        if frame.f_code.co_filename != home:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            # What the step itself runs is not traced: Python sees to that.
            step()
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)


# What is near and what is exact


@given(samples, st.integers(1, 400))
def test_a_percentile_is_near_the_sample_of_its_rank(seconds, flush_every):
    latency = histogram_of(seconds, flush_every=flush_every).latency()
    for percent, found in zip(PERCENTS, percentiles(latency), strict=True):
        wanted = nearest_rank(seconds, percent)
        assert abs(found - wanted) <= BOUND * wanted
        assert min(seconds) <= found <= max(seconds)


@given(samples)
def test_count_and_max_are_exact_and_the_mean_is_but_for_rounding(seconds):
    latency = latency_of(seconds)
    assert latency.count == len(seconds)
    assert latency.max == max(seconds)
    assert latency.mean == pytest.approx(math.fsum(seconds) / len(seconds))
    assert min(seconds) <= latency.mean <= max(seconds)


@given(samples)
def test_percentiles_never_fall(seconds):
    latency = latency_of(seconds)
    assert latency.p50 <= latency.p95 <= latency.p99 <= latency.max


@given(times, st.integers(1, 50), st.integers(1, 60))
def test_equal_samples_are_reported_exactly(seconds, count, flush_every):
    latency = histogram_of([seconds] * count, flush_every=flush_every).latency()
    assert latency == Latency(
        count=count,
        mean=seconds,
        p50=seconds,
        p95=seconds,
        p99=seconds,
        max=seconds,
    )


def test_the_bound_is_met_at_both_ends_of_every_cell():
    for octave in range(-40, 31):
        for eighth in range(8, 16):
            low = math.ldexp(eighth, octave)
            high = math.nextafter(math.ldexp(eighth + 1, octave), 0)
            (middle,) = {latency_of([low, one, high]).p50 for one in (low, high)}
            assert low < middle < high
            assert middle - low <= BOUND * low
            assert high - middle <= BOUND * high


def test_the_edges_of_cells_are_at_the_eighths_of_an_octave():
    for eighth in range(8, 16):
        edge = eighth / 8
        below = math.nextafter(edge, 0)
        # The second of four is p50: its own side of the edge is reported.
        assert latency_of([0.1, below, edge, 9.0]).p50 < edge
        assert latency_of([below, edge, edge, 9.0]).p50 > edge


def test_known_percentiles_of_one_to_a_hundred_milliseconds():
    latency = latency_of([n / 1000 for n in range(1, 101)])
    assert latency.count == 100
    assert latency.max == 0.1
    assert latency.mean == pytest.approx(0.0505)
    assert latency.p50 == pytest.approx(0.050, rel=BOUND)
    assert latency.p95 == pytest.approx(0.095, rel=BOUND)
    assert latency.p99 == pytest.approx(0.099, rel=BOUND)


def test_one_slow_sample_of_a_hundred_is_not_the_p99_but_two_are():
    assert latency_of([1.0] * 99 + [64.0]).p99 == pytest.approx(1.0, rel=BOUND)
    assert latency_of([1.0] * 98 + [64.0] * 2).p99 == pytest.approx(64.0, rel=BOUND)


def test_half_of_an_even_number_is_the_lower_middle():
    assert latency_of([1.0, 8.0]).p50 == pytest.approx(1.0, rel=BOUND)


def test_a_single_sample_is_everything():
    assert latency_of([0.3]) == Latency(
        count=1, mean=0.3, p50=0.3, p95=0.3, p99=0.3, max=0.3
    )


def test_nothing_measured_is_all_zero():
    histogram = Histogram()
    histogram.flush()
    assert histogram.latency() == NOTHING


def test_zeros_stay_exactly_zero_among_others():
    latency = latency_of([0.0] * 60 + [1.5] * 40)
    assert latency.p50 == 0.0
    assert latency.p95 == 1.5
    assert latency.mean == pytest.approx(0.6)


def test_negative_samples_count_as_zero():
    latency = latency_of([-1.0, -0.0, -1e-9, 0.0, 3.0])
    assert latency == Latency(count=5, mean=0.6, p50=0.0, p95=3.0, p99=3.0, max=3.0)
    assert latency_of([-2.0]) == latency_of([0.0])
    added = Histogram()
    added.add(-2.0, 4)
    added.add(3.0, 4)
    assert added.latency().p50 == 0.0
    assert added.latency().mean == 1.5


@pytest.mark.parametrize("seconds", [5e-324, 1e-310, 1e-12, 1e9, 1e300])
def test_no_finite_time_is_too_short_or_too_long(seconds):
    latency = latency_of([seconds, seconds, 1.0])
    assert latency.count == 3
    assert latency.max == max(seconds, 1.0)
    assert min(seconds, 1.0) <= latency.p50 <= latency.max


def test_whole_numbers_of_seconds_are_counted_too():
    assert latency_of([2, 2, 2]).p50 == 2.0


# Counting


def test_flush_empties_the_same_list_and_changes_no_figure():
    histogram = Histogram()
    pending = histogram.pending
    pending += [0.25, 1.5, 0.0, -1.0]
    before = histogram.latency()
    histogram.flush()
    assert histogram.pending is pending
    assert pending == []
    assert histogram.latency() == before


def test_what_is_pending_stays_so_whatever_is_counted_meanwhile():
    histogram = histogram_of([0.25, 1.5])
    histogram.merge(histogram_of([4.0]))
    assert histogram.latency().count == 3
    histogram.add(2.0, 5)
    assert histogram.latency().count == 8
    histogram.flush()
    assert histogram.latency().count == 8


def test_many_times_of_one_cell_are_counted_in_one_step():
    """Which is what makes counting a job cheap."""

    def steps(number):
        steps = []
        histogram = histogram_of([1.0 + at / 2_000 for at in range(number)])
        at_each_step(histogram.flush, lambda: steps.append(None))
        return len(steps)

    assert steps(200) == steps(2)


def test_reading_leaves_the_pending_samples_pending():
    histogram = histogram_of([0.25, 1.5])
    assert histogram.latency() == histogram.latency()
    assert histogram.pending == [0.25, 1.5]


def test_a_reader_has_a_value_of_one_moment():
    histogram = histogram_of([0.25])
    latency = histogram.latency()
    histogram.pending.append(64.0)
    histogram.flush()
    assert latency.count == 1
    assert latency.max == 0.25


@given(st.lists(st.tuples(times, st.integers(-1, 20)), max_size=30))
def test_adding_many_at_once_is_adding_each(runs):
    at_once, one_by_one = Histogram(), Histogram()
    for seconds, count in runs:
        at_once.add(seconds, count)
        one_by_one.pending += [seconds] * count
    assert exact_parts(at_once.latency()) == exact_parts(one_by_one.latency())
    assert at_once.latency().mean == pytest.approx(one_by_one.latency().mean)


def test_adding_keeps_what_is_pending():
    histogram = histogram_of([0.25])
    histogram.add(1.5, 3)
    histogram.add(-1.0, 1)
    assert histogram.latency().count == 5
    assert histogram.pending == [0.25]
    assert histogram.latency().max == 1.5


@given(st.lists(st.lists(times, max_size=60), max_size=5), st.integers(1, 80))
def test_merging_is_adding_all(parts, flush_every):
    merged = Histogram()
    for part in parts:
        merged.merge(histogram_of(part, flush_every=flush_every))
    together = latency_of([seconds for part in parts for seconds in part])
    assert exact_parts(merged.latency()) == exact_parts(together)
    assert merged.latency().mean == pytest.approx(together.mean)


def test_merging_leaves_the_other_as_it_was():
    one, other = histogram_of([0.25]), histogram_of([1.5, 3.0])
    before = other.latency()
    one.merge(other)
    one.add(64.0, 5)
    assert other.latency() == before
    assert other.pending == [1.5, 3.0]
    assert one.latency().count == 8


def test_a_million_samples_drift_by_rounding_only():
    histogram = Histogram()
    for _ in range(100):
        histogram.add(0.1, 10_000)
    latency = histogram.latency()
    assert latency.count == 1_000_000
    assert latency.mean == pytest.approx(0.1, rel=1e-12)


# Other threads


def test_a_reader_between_any_two_steps_of_a_flush_sees_every_sample_once():
    histogram = histogram_of([0.25, 1.5, 3.0, 3.0, 0.0], flush_every=3)
    wanted = histogram.latency()
    seen = []
    at_each_step(histogram.flush, lambda: seen.append(histogram.latency()))
    assert len(seen) > 50
    assert set(seen) == {wanted}


def test_a_reader_between_any_two_steps_of_adding_and_merging_sees_no_half():
    other = histogram_of([8.0] * 4)
    histogram = histogram_of([0.25, 1.5])
    seen = []

    def look():
        seen.append(histogram.latency().count)

    at_each_step(lambda: histogram.add(2.0, 3), look)
    look()
    at_each_step(lambda: histogram.merge(other), look)
    look()
    assert seen == sorted(seen)
    assert set(seen) == {2, 5, 9}


def test_a_flush_between_any_two_steps_of_a_reader_is_seen_whole_or_not_at_all():
    def read_and_write_at(moment):
        """Return how many the reader saw, and in how many steps."""
        histogram = histogram_of([0.25] * 5)
        steps = 0
        seen = []

        def step():
            nonlocal steps
            if steps == moment:
                # Other lengths before and after, so that a mixture would show.
                histogram.pending.extend([1.5] * 2)
                histogram.flush()
                histogram.pending.append(3.0)
            steps += 1

        at_each_step(lambda: seen.append(histogram.latency().count), step)
        return seen[0], steps

    _, steps = read_and_write_at(-1)
    counts = [read_and_write_at(moment)[0] for moment in range(min(steps, 150))]
    assert set(counts) == {5, 8}
    assert counts == sorted(counts, reverse=True)


def test_a_thread_reads_while_another_counts():
    histogram = Histogram()
    rounds, each = 40, 25
    reading, stop = threading.Event(), threading.Event()
    counts: list[int] = []
    errors: list[BaseException] = []

    def read():
        try:
            for _ in range(1_000):
                latency = histogram.latency()
                counts.append(latency.count)
                assert set(percentiles(latency)) <= {0.0, 0.25}
                reading.set()
                if stop.is_set():
                    break
        except BaseException as error:
            errors.append(error)
            reading.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=read)
    try:
        thread.start()
        assert reading.wait(5)
        for _ in range(rounds):
            for _ in range(each):
                histogram.pending.append(0.25)
                if len(histogram.pending) >= 8:
                    histogram.flush()
    finally:
        stop.set()
        thread.join(5)
        sys.setswitchinterval(interval)
    assert not thread.is_alive()
    assert errors == []
    assert counts == sorted(counts)
    assert counts[-1] <= rounds * each
    assert histogram.latency().count == rounds * each


# The record


def test_a_latency_is_a_frozen_value_of_plain_numbers():
    latency = latency_of([0.25])
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        latency.count = 2
    seen = attrs.asdict(latency, filter=lambda field, _: field.name != "_cells")
    assert seen == {
        "count": 1,
        "mean": 0.25,
        "p50": 0.25,
        "p95": 0.25,
        "p99": 0.25,
        "max": 0.25,
    }
    assert get_type_hints(Latency)["p99"] is float
    with pytest.raises(TypeError):
        Latency(1, 0.25, 0.25, 0.25, 0.25, 0.25)


def test_a_full_flush_of_random_times_is_within_the_bound():
    draw = random.Random(1)
    seconds = [draw.lognormvariate(-7, 2) for _ in range(2 * FLUSH + 100)]
    latency = latency_of(seconds)
    for percent, found in zip(PERCENTS, percentiles(latency), strict=True):
        assert found == pytest.approx(nearest_rank(seconds, percent), rel=BOUND)
