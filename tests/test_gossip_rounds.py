"""When a round starts and ends, and how far a node lets itself be taken along."""

from __future__ import annotations

import pytest
from consortium import Consortium, hospital, peer_of
from hypothesis import given
from hypothesis import strategies as st

from p2pfed.gossip.events import FetchCheckpoint, Fold, Folded, Note, Train
from p2pfed.gossip.progress import JOIN_PATIENCE, JOIN_SETTLE, Phase, Presence, Progress
from p2pfed.gossip.rounds import enough_alive, furthest_round, quorum_reached
from p2pfed.gossip.weights import weights_of
from p2pfed.identity.rules import Averaging
from p2pfed.wire.messages import CheckpointOffer

NET = Consortium(4, samples=[10, 10, 10, 10])
RUN = NET.run(quorum=0.75, min_live=0.5, deadline_s=5.0, min_round_interval_s=1.0, rounds=20)
PEERS = [peer_of(i) for i in range(4)]
EQUAL = dict.fromkeys("abcd", 10)


# --- pure rules --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("newest", "furthest"),
    [
        ({}, 0),
        ({"a": 99}, 0),  # a single member under a third drags nobody
        ({"a": 99, "b": 0}, 0),
        ({"a": 99, "b": 7}, 7),
        ({"a": 99, "b": 98, "c": 5}, 98),
        ({"a": 3, "b": 3, "c": 3, "d": 99}, 3),
        ({"a": 99, "stranger": 99}, 0),  # who is not on the roster has no weight
    ],
)
def test_a_third_a_node_goes_only_where_more_than_a_third_of_the_weight_is(newest, furthest):
    assert furthest_round(EQUAL, newest) == furthest


def test_a_third_exactly_is_not_enough():
    assert furthest_round({"a": 10, "b": 10, "c": 10}, {"a": 9}) == 0
    assert furthest_round({"a": 11, "b": 10, "c": 10}, {"a": 9}) == 9


@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 1000), min_size=2),
    st.data(),
)
def test_a_third_liars_with_less_cannot_move_the_furthest_round(weights, data):
    honest = {p: data.draw(st.integers(0, 9)) for p in weights}
    liars = data.draw(st.sets(st.sampled_from(sorted(weights))))
    if 3 * sum(weights[p] for p in liars) > sum(weights.values()):
        return
    lied = honest | dict.fromkeys(liars, 10**6)
    assert furthest_round(weights, lied) <= max(honest.values())


@pytest.mark.parametrize(
    ("contributing", "arrived", "reached"),
    [
        ("abcd", "abc", True),
        ("abcd", "ab", False),
        ("abcd", "abcd", True),
        ("ab", "ab", True),  # the dead are not waited for
        ("ab", "a", False),
        ("ab", "cd", False),  # who is not waited for does not replace who is
        ("", "c", True),
        ("", "", False),
        ("abcd", "", False),
    ],
)
def test_quorum_is_of_the_live_contributing_weight(contributing, arrived, reached):
    assert (
        quorum_reached(EQUAL, contributing=set(contributing), arrived=set(arrived), run=RUN)
        == reached
    )


@pytest.mark.parametrize(
    ("alive", "left", "enough"),
    [
        ("a", "", False),
        ("ab", "", True),
        ("a", "cd", True),  # left is not failed: they do not count in the whole
        ("a", "bcd", True),
        ("", "abcd", False),
        ("x", "", False),
    ],
)
def test_min_live_is_of_the_weight_that_has_not_left(alive, left, enough):
    assert enough_alive(EQUAL, alive=set(alive), left=set(left), run=RUN) == enough


def test_only_members_that_train_have_weight():
    net = Consortium(1)
    net.grow(hospital(1, roles=("relay",)), hospital(2, samples=0), hospital(3, samples=7))
    assert weights_of(net.roster, Averaging()) == {peer_of(0): 50, peer_of(3): 7}


# --- a node's way through the rounds -------------------------------------------------------------


class Way:
    """A Progress of h0, its clock, and what it asked for."""

    def __init__(self, *, joining: bool = False, round_: int = 0, run=RUN) -> None:
        self.run = run
        self.facts = NET.facts(run)
        self.progress = Progress(self.facts, PEERS[0], joining=joining, round_=round_)
        self.alive = set(PEERS)
        self.contributing = set(PEERS)
        self.left: set[str] = set()
        self.ahead: dict[str, int] = {}
        self.contributes = True
        self.now = 0.0
        self.effects: list = []

    def advance(self, seconds: float = 0.0) -> list:
        self.now += seconds
        presence = Presence(
            frozenset(self.alive),
            frozenset(self.contributing),
            frozenset(self.left),
            frozenset(self.alive - {PEERS[0]}),
        )
        done = []
        for _ in range(10):
            effects = self.progress.advance(
                self.now,
                NET.roster,
                presence,
                contributes=self.contributes,
                ahead=self.ahead,
            )
            done += effects
            if not effects:
                break
            for effect in effects:
                if isinstance(effect, Fold):
                    self.progress.on_folded(Folded(effect.round, effect.chains[-1], bytes(32)))
        else:
            raise AssertionError("it never comes to rest")
        self.effects += done
        return done

    def arrive(self, *members: int, round_: int | None = None) -> None:
        round_ = self.progress.round if round_ is None else round_
        for i in members:
            self.facts.add(NET.delta(self.run, round_, i).signed)

    def release(self) -> None:
        trained = self.progress.trained(self.progress.round)
        assert trained is not None
        self.arrive(0, round_=trained.round)

    @property
    def asked(self) -> list[int]:
        return [e.round for e in self.effects if isinstance(e, Train)]


def test_a_round_starts_folds_trains_and_ends_with_its_quorum():
    way = Way()
    effects = way.advance()
    assert [type(e).__name__ for e in effects] == ["Fold", "Note", "Train"]
    assert way.progress.phase is Phase.GATHERING
    way.release()
    way.arrive(1)
    assert way.advance(1.5) == []  # two of four
    way.arrive(2)
    way.advance()
    assert way.progress.round == 1
    assert way.asked == [0, 1]


def test_a_round_does_not_end_before_the_shortest_interval():
    way = Way()
    way.advance()
    way.release()
    way.arrive(1, 2, 3)
    way.advance(0.9)
    assert way.progress.round == 0
    way.advance(0.1)
    assert way.progress.round == 1


def test_at_the_deadline_a_round_ends_with_what_there_is():
    way = Way()
    way.advance()
    way.release()
    way.advance(4.9)
    assert way.progress.round == 0
    effects = way.advance(0.1)
    assert way.progress.round == 1
    [note] = [e for e in effects if isinstance(e, Note) and e.type == "round.finished"]
    assert note.data["missing"] == sorted(PEERS[1:])


def test_members_that_do_not_contribute_are_not_waited_for():
    """Budget exhausted, sharing off or no trainer: their beats say so."""
    way = Way()
    way.contributing = {PEERS[0], PEERS[1]}
    way.advance()
    way.release()
    way.arrive(1)
    way.advance(1.0)
    assert way.progress.round == 1


def test_who_is_not_alive_or_has_left_is_not_waited_for():
    way = Way()
    way.alive = way.contributing = {PEERS[0], PEERS[1]}
    way.left = {PEERS[3]}
    way.advance()
    way.release()
    way.arrive(1)
    way.advance(1.0)
    assert way.progress.round == 1


def test_below_min_live_no_round_starts_and_no_budget_is_spent():
    way = Way()
    way.alive = {PEERS[0]}
    way.advance(100.0)
    assert way.progress.phase is Phase.WAITING
    assert way.asked == []
    way.alive = {PEERS[0], PEERS[1]}
    way.advance(1.0)
    assert way.asked == [0]


def test_the_trainer_is_asked_at_most_once_in_a_round():
    """A trainer that fails after its debit would otherwise pay again and again."""
    way = Way()
    way.advance()
    assert way.progress.trained(0) is not None  # failed: nothing was released
    for _ in range(20):
        way.advance(1.0)
    assert way.asked.count(0) == 1


def test_a_round_in_which_every_trainer_fails_does_not_stop_the_run():
    way = Way()
    way.advance()
    way.progress.trained(0)
    way.advance(4.9)
    assert way.progress.round == 0
    way.advance(0.2)
    assert way.progress.round == 1
    assert way.asked == [0, 1]


def test_a_round_whose_training_still_runs_is_not_left_for_nothing():
    way = Way()
    way.advance()
    way.advance(100.0)
    assert way.progress.round == 0


def test_one_who_does_not_contribute_never_ends_a_round_without_deltas():
    way = Way()
    way.contributes = False
    way.contributing = set()
    way.advance()
    way.advance(1000.0)
    assert way.progress.round == 0
    assert way.asked == []


def test_one_training_at_a_time_however_long_it_takes():
    way = Way()
    way.advance()
    for r in (0, 1, 2):
        way.arrive(1, 2, 3, round_=r)
        way.advance(6.0)
    assert way.progress.round == 3
    assert way.asked == [0]
    assert way.progress.trained(1) is None
    assert way.progress.trained(0) is not None
    way.advance(1.0)
    assert way.asked == [0, 3]


def test_a_round_with_an_own_delta_is_not_trained_again():
    way = Way()
    way.arrive(0, round_=0)
    way.advance()
    assert way.asked == []


def test_a_node_that_is_behind_jumps_to_where_a_third_of_the_weight_is():
    way = Way()
    way.advance()
    way.arrive(1, round_=12)
    way.advance(0.1)
    assert way.progress.round == 0
    way.ahead = {PEERS[2]: 11}
    way.advance(0.1)
    assert way.progress.round == 11


def test_nobody_goes_beyond_the_last_round():
    way = Way()
    way.advance()
    way.ahead = {PEERS[1]: 10**9, PEERS[2]: 10**9}
    way.advance(0.1)
    assert way.progress.round == RUN.rounds
    assert way.progress.phase is Phase.FINISHED


def test_after_the_last_round_late_deltas_are_still_folded_in():
    way = Way(round_=19)
    way.advance()
    way.release()
    way.arrive(1, 2, 3)
    way.advance(1.5)
    assert way.progress.phase is Phase.FINISHED
    folds = [e for e in way.effects if isinstance(e, Fold)]
    assert folds[-1].round == 20
    way.arrive(1, round_=5)
    late = [e for e in way.advance(2.0) if isinstance(e, Fold)]
    assert [f.round for f in late] == [20]
    assert late[0].chains != folds[-1].chains
    assert way.advance(100.0) == []


def test_a_proven_equivocator_does_not_count_towards_the_quorum():
    from p2pfed.wire.delta import Proof

    way = Way()
    way.advance()
    way.release()
    way.arrive(1, 2)
    one = NET.delta(RUN, 0, 2, releases=7).signed
    way.facts.add_proof(Proof.of(one, NET.delta(RUN, 0, 2).signed))
    way.advance(1.5)
    assert way.progress.round == 0


# --- joining -----------------------------------------------------------------------------------


def offer(round_: int = 8, tag: bytes = b"h", size: int = 500) -> CheckpointOffer:
    return CheckpointOffer(round_, tag * 32, tag * 32, size)


def fetches(effects: list) -> list[FetchCheckpoint]:
    return [e for e in effects if isinstance(e, FetchCheckpoint)]


def test_a_joiner_takes_the_checkpoint_that_all_three_vouch_for():
    way = Way(joining=True)
    way.advance()
    for i in (1, 2, 3):
        way.progress.offered(PEERS[i], (offer(8), offer(4)), way.now)
    assert fetches(way.advance(JOIN_SETTLE - 0.1)) == []
    [fetch] = fetches(way.advance(0.2))
    assert fetch == FetchCheckpoint(offer(8), tuple(sorted(PEERS[1:])))
    assert fetches(way.advance(100.0)) == []  # one at a time
    way.progress.fetched(offer(8), ok=True)
    way.advance()
    assert way.progress.round == 8
    assert way.facts.adopted == (8, b"h" * 32)


def test_without_vouchers_a_joiner_folds_from_the_genesis():
    way = Way(joining=True)
    way.advance()
    way.progress.offered(PEERS[1], (offer(19, b"x"),), way.now)
    way.progress.offered(PEERS[2], (), way.now)
    way.progress.offered(PEERS[3], (), way.now)
    assert fetches(way.advance(JOIN_PATIENCE)) == []
    assert way.facts.adopted is None
    assert (way.progress.round, way.progress.phase) == (0, Phase.GATHERING)


def test_a_checkpoint_that_does_not_arrive_is_not_believed():
    way = Way(joining=True)
    way.advance()
    for i in (1, 2, 3):
        way.progress.offered(PEERS[i], (offer(8),), way.now)
    assert fetches(way.advance(JOIN_PATIENCE))
    way.progress.fetched(offer(8), ok=False)
    way.advance()
    assert way.facts.adopted is None
    assert way.progress.round == 0


@pytest.mark.parametrize(
    "impossible", [offer(21), offer(1 << 31), offer(8, size=1 << 40), offer(8, size=100_000)]
)
def test_a_checkpoint_that_cannot_be_of_this_run_is_not_even_fetched(impossible):
    """Beyond the last round, or larger than the model: one liar alone could fill the disk."""
    way = Way(joining=True)
    way.advance()
    for i in (1, 2, 3):
        way.progress.offered(PEERS[i], (impossible,), way.now)
    assert fetches(way.advance(JOIN_PATIENCE)) == []
    assert way.progress.round == 0


def test_a_checkpoint_of_a_run_that_is_over_changes_nothing_in_the_next():
    way = Way()
    way.advance()
    way.progress.fetched(offer(8), ok=True)
    assert way.facts.adopted is None
    assert way.progress.phase is Phase.GATHERING


def test_a_joiner_that_nobody_answers_starts_after_its_patience():
    way = Way(joining=True)
    way.advance()
    assert way.progress.phase is Phase.JOINING
    way.advance(JOIN_PATIENCE)
    assert way.progress.phase is Phase.GATHERING
