"""The main metric crosses to the network process where the hospital says so, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from p2pfed.node.shell import Shell
from p2pfed.training.answers import Answers
from p2pfed.training.early import Plateau
from p2pfed.wire.measure import Measure

VALUES = {"dice": 0.87499, "loss": 0.31, "hausdorff of case 17": 4.0}


class Shown:
    """What the private socket would show."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def set_ledger(self, *_facts) -> None:
        """Not looked at here."""

    def add_metrics(self, number: int, values: dict[str, float]) -> None:
        self.metrics.append((number, values))


def answers(*, shares: bool, monitor: str = "dice") -> Answers:
    hospital = SimpleNamespace(
        task=SimpleNamespace(monitor=monitor),
        ledger=None,
        spent=None,
        budget=None,
        shares_metrics=shares,
    )
    made = Answers(hospital, Path("exchange"), Plateau(0, larger_is_better=True), Shown())
    made.turn_to(request(b"a run"))
    return made


def request(run_id: bytes) -> SimpleNamespace:
    return SimpleNamespace(run=lambda: SimpleNamespace(run_id=run_id, rounds=30))


def test_without_the_hospitals_word_an_answer_tells_no_metric():
    quiet = answers(shares=False)
    quiet.saw(3, VALUES)
    assert quiet.record.metrics == [(3, VALUES)]
    assert quiet.shared == {}


def test_with_it_an_answer_tells_the_main_metric_in_two_digits_and_no_other():
    open_ = answers(shares=True)
    assert open_.shared == {}  # nothing was evaluated yet
    open_.saw(3, VALUES)
    assert open_.shared == {"measure": {"name": "dice", "round": 3, "value": 0.87}}
    open_.saw(4, {"dice": 0.5})
    assert open_.shared["measure"] == {"name": "dice", "round": 4, "value": 0.5}


@pytest.mark.parametrize(
    "values", [{}, {"loss": 1.0}, {"dice": float("nan")}, {"dice": float("inf")}, {"dice": 1e12}]
)
def test_a_metric_that_is_missing_or_out_of_bounds_is_not_told(values):
    open_ = answers(shares=True)
    open_.saw(3, VALUES)
    open_.saw(4, values)
    assert open_.shared == {}


def test_another_run_begins_without_the_measure_of_the_one_before():
    open_ = answers(shares=True)
    open_.turn_to(request(b"one"))
    open_.saw(3, VALUES)
    open_.turn_to(request(b"one"))
    assert open_.shared
    open_.turn_to(request(b"other"))
    assert open_.shared == {}


def test_the_daemon_takes_a_measure_from_an_answer_and_nothing_malformed():
    shell = SimpleNamespace(core=SimpleNamespace(introduction=SimpleNamespace(measure=None)))
    take = Shell._take_measure
    take(shell, {"event": "released", "measure": {"name": "dice", "round": 3, "value": 0.87}})
    assert shell.core.introduction.measure == Measure("dice", 3, 87)
    take(shell, {"event": "failed"})  # says nothing of it
    assert shell.core.introduction.measure == Measure("dice", 3, 87)
    take(shell, {"event": "released", "measure": {"name": "x" * 99, "round": 3, "value": 0.87}})
    assert shell.core.introduction.measure is None


def test_a_round_is_told_once_however_many_models_are_scored_for_it():
    """A network process in wrong hands could else ask for the score of any model, any number."""
    open_ = answers(shares=True)
    open_.turn_to(request(b"one"))
    open_.saw(3, VALUES)
    open_.saw(3, {"dice": 0.1})
    open_.saw(2, {"dice": 0.2})
    assert open_.shared["measure"]["value"] == 0.87
    open_.turn_to(request(b"two"))
    open_.saw(1, {"dice": 0.3})
    open_.turn_to(request(b"one"))
    open_.saw(3, {"dice": 0.4})
    assert open_.shared == {}
