"""Where a round's time goes: blocks inside blocks are counted once."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from p2pfed.training.early import Plateau
from p2pfed.training.watch import Watch, telling


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_time_inside_another_kind_is_counted_once():
    clock = Clock()
    watch = Watch(clock)
    with watch.spent_on("gate"):
        clock.now += 1
        with watch.spent_on("compute"):
            clock.now += 4
            watch.add("data", 3)
        clock.now += 2
    assert watch.taken() == {"gate": 3, "compute": 1, "data": 3}
    assert watch.taken() == {}


def test_time_counts_also_when_the_work_fails():
    clock = Clock()
    watch = Watch(clock)

    def fail():
        clock.now += 5
        raise ValueError("task")

    with pytest.raises(ValueError, match="task"), watch.spent_on("compute"):
        fail()
    assert watch.taken() == {"compute": 5}


def test_progress_names_the_step_at_hand_and_its_time():
    clock = Clock()
    watch = Watch(clock)
    assert watch.shown == {}
    watch.progress("local steps", 0, 10)
    clock.now += 6
    watch.progress("local steps", 3, 10)
    assert watch.shown == {"step": "local steps", "done": 3, "of": 10, "seconds": 6}
    watch.idle()
    assert watch.shown == {}


def test_notes_are_few_and_the_newest():
    watch = Watch()
    for number in range(30):
        watch.note(f"note {number}")
    assert watch.notes == [f"note {number}" for number in range(10, 30)]


def test_a_note_of_every_round_is_kept_once_and_drives_out_no_other():
    watch = Watch()
    watch.note("one process only")
    for _ in range(30):
        watch.note("one by one")
    assert watch.notes == ["one process only", "one by one"]
    watch.note("one process only")
    assert watch.notes == ["one by one", "one process only"]


def test_what_was_noted_since_a_moment_is_told_apart_though_it_was_noted_before():
    watch = Watch()
    watch.note("memory ran out")
    watch.note("one by one")
    before = watch.said
    assert watch.notes_after(before) == []
    watch.note("memory ran out")
    assert watch.notes_after(before) == ["memory ran out"]


def test_notes_go_to_the_log_or_to_who_wants_to_hear_them(caplog):
    heard = []
    Watch(heard=heard.append).note("for another process")
    Watch().note("for the log")
    assert heard == ["for another process"]
    assert caplog.messages == ["for the log"]


def test_a_tasks_progress_is_that_of_the_step_it_is_asked_for_and_of_no_other_thread():
    watch, task = Watch(Clock()), SimpleNamespace(progress=None)
    with telling(task, watch, "evaluation"):
        task.progress(2, 5)
        other = threading.Thread(target=task.progress, args=(4, 5))  # somebody looks at pictures
        other.start()
        other.join()
        assert watch.shown == {"step": "evaluation", "done": 2, "of": 5, "seconds": 0}
    assert task.progress is None


def seen(values, *, patience, larger_is_better=True):
    plateau = Plateau(patience, larger_is_better=larger_is_better)
    for value in values:
        plateau.saw(value)
    return plateau.reached


def test_training_stops_after_so_many_rounds_without_a_better_model():
    assert not seen([0.5, 0.6, 0.6], patience=2)
    assert seen([0.5, 0.6, 0.6, 0.59], patience=2)
    assert not seen([0.5, 0.6, 0.6, 0.59, 0.61], patience=2)
    assert seen([0.5, 0.6, 0.7], patience=2, larger_is_better=False)


def test_without_patience_or_metric_training_never_stops_early():
    assert not seen([0.5] * 100, patience=0)
    assert not seen([None] * 100, patience=2)


def test_another_run_begins_anew():
    """Its first models are worse than the last run's best, and it must not be skipped for that."""
    plateau = Plateau(2, larger_is_better=True)
    for value in (0.9, 0.9, 0.9):
        plateau.saw(value)
    assert plateau.reached
    plateau.begin()
    for value in (0.1, 0.2):
        plateau.saw(value)
        assert not plateau.reached


def test_nan_is_never_a_better_model():
    assert seen([0.5, float("nan"), float("nan")], patience=2)
