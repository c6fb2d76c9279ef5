"""Clipping on the integer grid: the sensitivity contract and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from p2pfed.errors import UpdateRejected
from p2pfed.identity.rules import Gate
from p2pfed.privacy.clipping import Ball, Blocks, Box, clip_to_grid, clipped_sum, grid_limit
from p2pfed.privacy.units import HOSPITAL, PATIENT, PatientRows, Unit

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=FLOATS)


def squared(row):
    return sum(int(v) ** 2 for v in row)


@settings(deadline=None)
@given(ROWS, st.sampled_from([1, 2, 3, 1000, 2**16, 2**26]), st.integers(0, 40))
def test_formal_guarantee_every_row_is_at_most_limit_long(rows, limit, bits):
    grid = clip_to_grid(rows, bound=Ball(limit), bits=bits)
    assert grid.dtype == np.int64
    assert grid.shape == rows.shape
    for row in grid:
        assert squared(row) <= limit**2


@settings(deadline=None)
@given(ROWS, st.sampled_from([1, 3, 1000, 2**16]), st.integers(1, 5), st.integers(0, 30))
def test_formal_guarantee_every_block_is_at_most_its_limit_long(rows, limit, size, bits):
    small = max(1, limit // 3)
    grid = clip_to_grid(rows, bound=Blocks(limit, size, small), bits=bits)
    assert grid.shape == rows.shape
    for row in grid:
        assert squared(row) <= limit**2
        for start in range(0, row.size, size):
            assert squared(row[start : start + size]) <= small**2


@settings(deadline=None)
@given(ROWS, st.sampled_from([1, 2, 1000, 2**26]), st.integers(0, 40))
def test_formal_guarantee_every_number_lies_in_the_box(rows, limit, bits):
    grid = clip_to_grid(rows, bound=Box(limit), bits=bits)
    assert np.abs(grid).max() <= limit


def test_within_its_bounds_a_row_is_only_rounded_whatever_the_bound():
    rows = np.array([[0.25, -0.5, 0.126]], np.float32)
    for bound in (Ball(256), Blocks(256, 2, 200), Box(128)):
        assert clip_to_grid(rows, bound=bound, bits=8).tolist() == [[64, -128, 32]]


def test_a_neighbour_moves_the_sum_by_twice_the_bound_where_a_row_is_replaced():
    assert PATIENT.moves == 1
    assert "zero-out" in PATIENT.neighbours
    for unit in (HOSPITAL, Unit("patient", 4)):
        assert unit.moves == 2
        assert "replace" in unit.neighbours
    rows = PatientRows(np.array([[30.0, 0]], np.float32))
    other = PatientRows(np.array([[-30.0, 0]], np.float32))  # one of its patients changed all
    moved = clipped_sum(rows, bound=Ball(9), bits=0) - clipped_sum(other, bound=Ball(9), bits=0)
    assert moved.tolist() == [18, 0]


@pytest.mark.parametrize(("kind", "size"), [("patient", 1), ("patient", 4), ("hospital", 1)])
def test_the_network_process_names_the_relation_as_this_room_does(kind, size):
    word = Gate(patients_per_row=size).relation(kind)
    assert Unit(kind, size).neighbours.startswith(f"{word}: ")


@pytest.mark.parametrize(("kind", "size"), [("patient", 0), ("hospital", 2), ("patient", -1)])
def test_a_unit_without_meaning_is_refused(kind, size):
    with pytest.raises(ValueError, match="patients_per_row"):
        Unit(kind, size)


@pytest.mark.slow
@settings(deadline=None)
@given(ROWS, st.sampled_from([3, 1000, 2**20]))
def test_formal_guarantee_a_row_depends_on_itself_alone(rows, limit):
    together = clip_to_grid(rows, bound=Ball(limit), bits=8)
    for row, grid in zip(rows, together, strict=True):
        assert (clip_to_grid(row[None], bound=Ball(limit), bits=8)[0] == grid).all()


@settings(deadline=None)
@given(ROWS, st.integers(0, 11))
def test_formal_guarantee_zeroing_one_patient_moves_the_sum_by_at_most_limit(rows, patient):
    without = rows.copy()
    without[patient % len(rows)] = 0
    total = clipped_sum(PatientRows(rows), bound=Ball(777), bits=10)
    moved = total - clipped_sum(PatientRows(without), bound=Ball(777), bits=10)
    assert squared(moved) <= 777**2


@settings(deadline=None)
@given(ROWS, st.data())
def test_formal_guarantee_holds_on_a_chosen_support_too(rows, data):
    columns = data.draw(st.sets(st.integers(0, rows.shape[1] - 1)))
    chosen = np.array(sorted(columns), np.int64)
    for row in rows:
        total = clipped_sum(PatientRows(row[None]), bound=Ball(50), bits=10, chosen_K=chosen)
        assert total.shape == chosen.shape
        assert squared(total) <= 2500


def test_a_chosen_support_is_cut_out_before_clipping():
    rows = PatientRows(np.array([[1e6, 0.5]], np.float32))
    assert clipped_sum(rows, bound=Ball(256), bits=8, chosen_K=np.array([1])).tolist() == [128]


def test_a_short_row_is_only_rounded():
    rows = np.array([[0.25, -0.5, 0.126]], np.float32)
    assert clip_to_grid(rows, bound=Ball(grid_limit(1, 8)), bits=8).tolist() == [[64, -128, 32]]


def test_a_long_row_keeps_its_direction():
    rows = np.array([[3.0, 4.0]], np.float32) * np.array([[1.0], [1e30]], np.float32)
    for row in clip_to_grid(rows, bound=Ball(2**20), bits=20):
        assert row == pytest.approx([0.6 * 2**20, 0.8 * 2**20], abs=2)


def test_the_sum_is_the_same_in_any_chunking():
    @dataclass
    class Chunked:
        rows: np.ndarray
        size: int
        num_patients = 100
        num_parameters = 7

        def chunks(self):
            for start in range(0, 100, self.size):
                yield self.rows[start : start + self.size]

    rows = (np.arange(700, dtype=np.float32).reshape(100, 7) - 350) / 100
    sums = [clipped_sum(Chunked(rows, size), bound=Ball(500), bits=8) for size in (1, 7, 100)]
    sums.append(clipped_sum(PatientRows(rows), bound=Ball(500), bits=8))
    assert all((total == sums[0]).all() for total in sums)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad):
    rows = np.zeros((3, 4), np.float32)
    rows[1, 2] = bad
    with pytest.raises(UpdateRejected, match="NaN"):
        clipped_sum(PatientRows(rows), bound=Ball(10), bits=4)


def test_a_double_beyond_single_precision_counts_as_infinite():
    with pytest.raises(UpdateRejected, match="NaN"):
        clipped_sum(PatientRows(np.array([[1e300]])), bound=Ball(10), bits=4)


@pytest.mark.parametrize(
    "rows", [np.zeros(4, np.float32), np.zeros((2, 2, 2), np.float32), np.zeros((2, 2), np.int64)]
)
def test_a_wrong_shape_or_type_is_refused(rows):
    with pytest.raises(UpdateRejected, match="shape"):
        clip_to_grid(rows, bound=Ball(10), bits=4)


@dataclass
class Announced:
    num_patients: int
    num_parameters: int
    rows: np.ndarray

    def chunks(self):
        yield self.rows


@pytest.mark.parametrize(
    ("patients", "parameters", "why"),
    [(3, 4, "announced"), (2, 5, "shape"), (0, 4, "0 contributions"), (2**31, 4, "grid units")],
)
def test_rows_that_were_not_announced_are_refused(patients, parameters, why):
    rows = np.zeros((2, 4), np.float32)
    with pytest.raises(UpdateRejected, match=why):
        clipped_sum(Announced(patients, parameters, rows), bound=Ball(10), bits=4)


def test_the_limit_is_rounded_down_and_bounded():
    assert grid_limit(Fraction(1, 3), 4) == 5
    assert grid_limit(0.1, 8) == 25
    for clip, bits in ((0, 8), (-1, 8), (1, 31), (1e-9, 8), (1, -1), (1e-300, 65)):
        with pytest.raises(ValueError, match="clip"):
            grid_limit(clip, bits)
