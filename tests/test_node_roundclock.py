"""What is counted as a round, and what of it as waiting."""

from __future__ import annotations

from p2pfed.node.roundclock import RoundClock


def played(*happenings) -> dict:
    clock = RoundClock()
    for now, (kind, round_) in enumerate(happenings):
        if kind == "trained":
            clock.trained(round_, float(now))
        else:
            clock.note(f"round.{kind}", {"round": round_}, float(now))
    return clock.last


def test_what_passes_after_ones_own_training_is_waiting():
    assert played(("started", 5), ("trained", 5), ("x", 5), ("finished", 5)) == {
        "round": 5,
        "seconds": 3.0,
        "waiting": 2.0,
    }


def test_a_round_without_a_training_is_all_waiting():
    assert played(("started", 5), ("x", 5), ("finished", 5))["waiting"] == 2.0


def test_a_round_that_is_jumped_over_is_not_told():
    assert played(("started", 5), ("started", 9), ("finished", 5)) == {}


def test_a_training_that_ends_after_its_round_changes_nothing_of_the_next():
    late = played(("started", 5), ("finished", 5), ("started", 6), ("trained", 5), ("finished", 6))
    assert late == {"round": 6, "seconds": 2.0, "waiting": 2.0}
