"""Whether a node is slow itself: signs that raise its factor, and what a single peer cannot do."""

from __future__ import annotations

import pytest

from p2pfed.gossip.health import MOST, UNANSWERED, LocalHealth

TICK = 0.25


class Node:
    """One that ticks every quarter of a second and beats every second."""

    def __init__(self, tick: float = TICK) -> None:
        self.health = LocalHealth(1.0)
        self.now, self.step = 0.0, tick
        self.slept: list[float] = []
        self.tick(8)

    @property
    def factor(self) -> int:
        return self.health.factor

    def tick(self, times: int = 1, *, late: float = 0.0) -> float:
        for _ in range(times):
            self.now += self.step + late
            self.slept.append(self.health.tick(self.now))
        return self.slept[-1]

    def second(self, in_time: str = "", late: str = "", doubted: str = "") -> None:
        """A beat interval with these answers (one letter is one peer)."""
        for peer in in_time:
            self.health.answered(peer, in_time=True)
        for peer in late:
            self.health.answered(peer, in_time=False)
        for peer in doubted:
            self.health.doubted(peer)
        self.tick(round(1 / self.step))


def test_who_ticks_in_time_is_well_and_slept_never():
    node = Node()
    node.tick(100)
    assert (node.factor, set(node.slept)) == (1, {0.0})


@pytest.mark.parametrize(
    ("late", "slept", "factor"),
    [(0.9, 0.0, 1), (1.1, 1.1, 2), (2.0, 2.0, 3), (30.0, 30.0, MOST)],
)
def test_a_late_tick_adds_one_for_each_beat_that_was_missed(late, slept, factor):
    node = Node()
    assert node.tick(late=late) == pytest.approx(slept)
    assert node.factor == factor


def test_a_node_that_always_ticks_slowly_is_not_late():
    """A benchmark or a simulation may tick every few seconds."""
    node = Node(tick=3.0)
    node.tick(20)
    assert (node.factor, set(node.slept)) == (1, {0.0})
    assert node.tick(late=9.0) == pytest.approx(9.0)


def test_one_long_sleep_does_not_make_the_next_one_usual():
    node = Node()
    assert node.tick(late=30.0) > 29
    assert node.tick(late=30.0) > 29


def test_what_is_read_after_a_sleep_may_be_old():
    node = Node()
    assert node.health.keeps_up(node.now)
    assert not node.health.keeps_up(node.now + 5.0)  # awake, and its tick has not come yet
    node.tick(late=5.0)
    assert not node.health.keeps_up(node.now)
    node.tick(8)
    assert not node.health.keeps_up(node.now)
    node.tick(8)
    assert node.health.keeps_up(node.now)


@pytest.mark.parametrize(
    ("in_time", "late", "doubted", "factor"),
    [
        ("abcd", "", "", 1),
        ("abcd", "e", "", 1),  # it is them
        ("", "a", "", 1),  # with one peer alone nobody can say whose fault it is
        ("ab", "cd", "", 2),
        ("abc", "de", "", 1),
        ("", "ab", "", 2),
        ("", "", "ab", 2),  # nobody hears us: it is our way out
        ("abcdef", "", "ab", 1),  # two of six that lie
        ("abcdef", "", "abc", 2),
        ("", "", "a", 1),
        ("", "", "", 1),  # cut off: missing answers are no sign
    ],
)
def test_signs_of_several_peers_at_once_count_and_those_of_one_never(
    in_time, late, doubted, factor
):
    node = Node()
    node.second(in_time, late, doubted)
    assert node.factor == factor


def test_one_peer_can_raise_nothing_however_often_it_says_so():
    node = Node()
    for _ in range(100):
        node.second("bc", late="a", doubted="aaaa")
    assert node.factor == 1


def test_the_factor_is_bounded_and_falls_by_one_a_second_with_answers_in_time():
    node = Node()
    for _ in range(20):
        node.second(late="ab")
    assert node.factor == MOST
    node.second()  # nobody answers: that is no proof of health
    assert node.factor == MOST
    for expected in range(MOST - 1, 0, -1):
        node.second("a")
        assert node.factor == expected
    node.second("a")
    assert node.factor == 1


def test_what_was_found_fades_when_nobody_answers_for_long():
    """Else who is cut off after a slow time would take minutes to call the others away."""
    node = Node()
    for _ in range(20):
        node.second(late="ab")
    for _ in range(UNANSWERED):
        node.second()
    assert node.factor >= MOST - 1
    for _ in range(MOST):
        node.second()
    assert node.factor == 1
