"""Asking others about a silent member: whom, how often, and how little a liar can do with it."""

from __future__ import annotations

import datetime as dt
import itertools
import random

import pytest
from consortium import Consortium, key_of, peer_of

from p2pfed.gossip.core import Core
from p2pfed.gossip.events import Connected, Disconnect, Disconnected, Note, Received, Send, Tick
from p2pfed.gossip.membership import State
from p2pfed.identity.signing import DELTA, sign
from p2pfed.wire.messages import Ack, Beat, decode_message, encode_message
from p2pfed.wire.spreading import AskHeard, Doubted, Heard, Ping

DAY = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
NET = Consortium(6)
OTHERS = (1, 2, 3, 4, 5)


class Node:
    """The core of h0, connected to the others; those in `silent` say nothing more."""

    def __init__(self) -> None:
        self.core = Core(
            own_id=peer_of(0),
            sign=lambda data: sign(key_of(0).seed, DELTA, data),
            book=NET.book(),
            rng=random.Random(1),
        )
        self.now = 0.0
        self.silent: set[int] = set()
        self.effects: list = []
        for i in OTHERS:
            self.give(Connected(peer_of(i)))
            self.say(i, Ping(1))
        self.pass_time(5)

    def give(self, event) -> list:
        effects = self.core.handle(event, self.now)
        self.effects += effects
        return effects

    def say(self, i: int, message) -> list:
        return self.give(Received(peer_of(i), encode_message(message)))

    def pass_time(self, seconds: float) -> list:
        """Ticks, with all pings answered at once but for those of the silent."""
        effects = []
        for _ in range(round(4 * seconds)):
            self.now += 0.25
            new = self.give(Tick(DAY))
            effects += new
            for i in OTHERS:
                for ping in sent(new, Ping, i):
                    if i not in self.silent:
                        self.say(i, Ack(ping.sequence))
        return effects

    def state(self, i: int) -> State:
        return self.core.membership.get(peer_of(i)).state

    def suspect(self, i: int) -> list:
        """Let this one be silent until it is suspect; what was done in the last tick."""
        self.silent.add(i)
        for _ in range(20):
            effects = self.pass_time(0.25)
            if self.state(i) is State.SUSPECT:
                return effects
        raise AssertionError


def sent(effects, kind, to: int | None = None) -> list:
    sends = [e for e in effects if isinstance(e, Send) and (to is None or e.peer == peer_of(to))]
    return [m for m in (decode_message(e.frame) for e in sends) if isinstance(m, kind)]


def asked(effects) -> list[int]:
    return [i for i in OTHERS if sent(effects, AskHeard, i)]


def answer(node: Node, i: int, about: int, age: float) -> list:
    """To the newest question."""
    newest = sent(node.effects, AskHeard)[-1].sequence if sent(node.effects, AskHeard) else 1
    return node.say(i, Heard(newest, ((peer_of(about), int(1000 * age)),)))


def away_in(node: Node, i: int, limit: float = 60.0) -> float:
    """Seconds of silence until it is away."""
    while node.state(i) is not State.AWAY and node.now < limit:
        node.pass_time(0.25)
    return node.now - node.core.membership.get(peer_of(i)).last_heard


# --- asking --------------------------------------------------------------------------------------


def test_three_others_are_asked_about_a_suspect_and_it_is_told_so():
    node = Node()
    effects = node.suspect(1)
    assert len(asked(effects)) == 3
    assert 1 not in asked(effects)
    assert sent(effects, AskHeard) == [AskHeard(1, (peer_of(1),))] * 3
    assert sent(effects, Doubted, 1) == [Doubted(True)] == sent(effects, Doubted)


def test_while_all_is_well_nobody_is_asked_anything():
    node = Node()
    assert sent(node.effects, AskHeard | Doubted) == []


def test_two_suspects_cost_no_more_questions_than_one():
    node = Node()
    node.silent |= {1, 2}
    effects = node.pass_time(6)
    questions = sent(effects, AskHeard)
    assert {question.peers for question in questions} == {(peer_of(1), peer_of(2))}
    assert len(questions) <= 3 * 5  # three a beat


def test_one_that_is_suspect_for_long_is_asked_for_seldom():
    node = Node()
    node.suspect(1)
    node.silent.add(1)
    questions = 0
    for _ in range(60):
        for i in asked(node.pass_time(1)):
            answer(node, i, 1, age=0.1)
            questions += 1
    assert node.state(1) is State.SUSPECT
    assert questions < 3 * (15 + 45 / 4 + 2)


# --- weighing ------------------------------------------------------------------------------------


def test_without_a_word_from_others_it_is_away_in_15_seconds():
    node = Node()
    node.suspect(1)
    assert 14.5 < away_in(node, 1) <= 15


@pytest.mark.parametrize(("confirmations", "seconds"), [(1, 11.25), (2, 9.4), (3, 8.0)])
def test_others_that_do_not_hear_it_either_bring_the_verdict_forward(confirmations, seconds):
    node = Node()
    for i in asked(node.suspect(1))[:confirmations]:
        answer(node, i, 1, age=2.6)
    assert away_in(node, 1) == pytest.approx(seconds, abs=0.3)


def test_one_that_repeats_itself_is_one_confirmation():
    node = Node()
    liar = asked(node.suspect(1))[0]
    for _ in range(20):
        answer(node, liar, 1, age=9.0)
        node.pass_time(0.25)
    assert node.core.membership.get(peer_of(1)).doubt.unheard_by == {peer_of(liar)}


def test_while_others_hear_it_it_is_not_away_and_its_connection_is_given_up():
    node = Node()
    effects = node.suspect(1)
    for _ in range(40):
        for i in asked(effects):
            node.effects += answer(node, i, 1, age=0.2)
        effects = node.pass_time(1)
    assert node.state(1) is State.SUSPECT
    hung_up = [e for e in node.effects if isinstance(e, Disconnect)]
    assert {(e.peer, e.blame) for e in hung_up} == {(peer_of(1), False)}
    noted = [e for e in node.effects if isinstance(e, Note) and e.type == "peer.unheard"]
    assert noted[0].data["name"] == "h1"
    assert noted[0].data["heard_by"] in {"h2", "h3", "h4", "h5"}


def test_a_connection_is_given_up_once_and_the_next_one_has_its_time():
    node = Node()
    effects = node.suspect(1)
    times = []
    for _ in range(60):
        answers = [e for i in asked(effects) for e in answer(node, i, 1, age=0.0)]
        if any(isinstance(e, Disconnect) for e in answers):
            times.append(node.now)
            node.give(Disconnected(peer_of(1)))
            node.pass_time(0.5)
            node.give(Connected(peer_of(1)))  # and silent as before
        effects = node.pass_time(0.5)
    assert len(times) > 3
    assert min(b - a for a, b in itertools.pairwise(times)) > 2.5


def test_answers_that_an_outage_held_back_do_not_make_its_path_look_long():
    node = Node()
    node.silent = {1}
    effects = node.pass_time(30)
    held_back = [ping.sequence for ping in sent(effects, Ping, 1)]
    assert len(held_back) >= 3
    path = node.core.membership.get(peer_of(1)).path
    before = path.timeout
    node.silent.clear()
    for sequence in held_back:
        node.say(1, Ack(sequence))
    assert path.timeout == before
    assert node.core.membership.health.factor == 1
    node.pass_time(5)
    node.silent = {1}
    node.pass_time(3)
    assert node.core.membership.get(peer_of(1)).state is State.SUSPECT


def test_an_answer_that_nobody_asked_for_is_not_weighed():
    node = Node()
    helpers = asked(node.suspect(1))
    [stranger] = {2, 3, 4, 5} - set(helpers)
    answer(node, stranger, 1, age=0.0)
    answer(node, helpers[0], 2, age=500.0)  # of one that is well
    answer(node, helpers[0], 1, age=0.0)  # it has had its say
    doubt = node.core.membership.get(peer_of(1)).doubt
    assert (doubt.heard_at, doubt.unheard_by) == (float("-inf"), set())
    assert node.state(2) is State.ALIVE


def test_an_answer_that_waited_for_us_is_not_newer_for_that():
    node = Node()
    helper = asked(node.suspect(1))[0]
    at = node.now
    node.now += 20
    answer(node, helper, 1, age=1.0)
    assert node.core.membership.get(peer_of(1)).doubt.heard_at == at - 1.0


def test_an_answer_that_comes_after_the_next_question_counts_for_its_own():
    node = Node()
    helper, at = asked(node.suspect(1))[0], node.now
    node.pass_time(3)
    node.say(helper, Heard(1, ((peer_of(1), 500),)))
    assert node.core.membership.get(peer_of(1)).doubt.heard_at == at - 0.5


def test_all_others_together_cannot_have_one_called_away_that_we_hear():
    node = Node()
    for _ in range(60):
        for i in (2, 3, 4, 5):
            answer(node, i, 1, age=1000.0)
            node.say(i, AskHeard(5, (peer_of(1),)))
        node.pass_time(0.5)
    assert node.state(1) is State.ALIVE
    notes = {e.type for e in node.effects if isinstance(e, Note)}
    assert not {"peer.suspect", "peer.away"} & notes


def test_it_is_alive_with_its_first_own_word_whatever_others_say():
    node = Node()
    for i in asked(node.suspect(1)):
        answer(node, i, 1, age=100.0)
    node.say(1, Ping(9))
    assert node.state(1) is State.ALIVE


# --- being asked ---------------------------------------------------------------------------------


def test_who_is_asked_says_when_it_heard_whom_and_tells_the_suspect():
    node = Node()
    node.say(3, Ping(2))
    node.now += 0.125
    effects = node.say(2, AskHeard(5, (peer_of(3), peer_of(0), peer_of(2), "nobody")))
    assert sent(effects, Heard, 2) == [Heard(5, ((peer_of(3), 125),))]
    assert sent(effects, Doubted) == sent(effects, Doubted, 3) == [Doubted(False)]
    again = node.say(4, AskHeard(5, (peer_of(3),)))
    assert sent(again, Doubted) == []  # once a beat
    assert len(sent(again, Heard, 4)) == 1


def test_who_stood_still_does_not_say_what_it_cannot_know():
    """A word that it reads now may have waited for it as long as it slept."""
    node = Node()
    node.now += 30
    node.say(3, Ping(2))
    assert sent(node.say(2, AskHeard(5, (peer_of(3),))), Heard) == []
    node.give(Tick(DAY))
    node.say(3, Ping(2))
    assert sent(node.say(2, AskHeard(6, (peer_of(3),))), Heard) == []
    node.pass_time(4)
    assert len(sent(node.say(2, AskHeard(7, (peer_of(3),))), Heard)) == 1


def test_who_is_suspect_speaks_up_at_once_to_all_and_once_a_beat():
    node = Node()
    effects = node.say(2, Doubted(True))
    assert [i for i in OTHERS if sent(effects, Beat, i)] == list(OTHERS)
    assert sent(node.say(3, Doubted(False)), Beat) == []
    node.pass_time(1)
    assert len(sent(node.say(3, Doubted(False)), Beat)) == 5


def test_who_asks_without_end_is_answered_no_more_and_then_blamed():
    node = Node()
    question = AskHeard(5, tuple(peer_of(i) for i in (1, 3, 4, 5)) * 8)
    answers = 0
    for _ in range(100):
        effects = node.say(2, question)
        answers += len(sent(effects, Heard))
        if any(isinstance(e, Disconnect) and e.blame for e in effects):
            break
    else:
        raise AssertionError
    assert answers <= 16
