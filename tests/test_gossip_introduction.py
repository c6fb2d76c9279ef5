"""What a node says of itself in a beat; what it makes of others' stands in `test_gossip_core`."""

from __future__ import annotations

import pytest
from consortium import Consortium, peer_of

from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.guard import Guard
from p2pfed.gossip.introduction import Introduction
from p2pfed.gossip.membership import Liveness, Membership
from p2pfed.gossip.progress import Progress
from p2pfed.gossip.sync import Sync
from p2pfed.wire.beat import MAX_ADDRESS, MAX_ADDRESSES
from p2pfed.wire.measure import Measure
from p2pfed.wire.messages import decode_message, encode_message

NET = Consortium(2)
RUN = NET.run()
HERE = "/ip4/10.0.0.1/tcp/1"


def introduction(*addresses: str, contributes: bool = False) -> Introduction:
    book = NET.book()
    return Introduction(
        book,
        Sync(book, lambda _: False),
        Guard(Membership(peer_of(0), Liveness())),
        contributes=lambda: contributes,
        addresses=addresses,
    )


def progress(round_: int = 0) -> Progress:
    return Progress(RunFacts(RUN, NET.book()), peer_of(0), joining=False, round_=round_)


def test_before_a_run_a_beat_says_the_network_and_where_we_are():
    beat = introduction(HERE).compose(7)
    assert (beat.sequence, beat.network_id) == (7, NET.book().network_id)
    assert (beat.run_id, beat.task_id, beat.round, beat.model_hash) == (b"", b"", 0, b"")
    assert beat.addresses == (HERE,)


def test_in_a_run_a_beat_says_which_and_how_far():
    ours = introduction(HERE, contributes=True)
    ours.task_id = RUN.task_id
    ours.take_run(progress(round_=3))
    beat = ours.compose(1)
    assert (beat.run_id, beat.task_id, beat.round) == (RUN.run_id, RUN.task_id, 3)
    assert beat.contributes


@pytest.mark.parametrize("unsayable", ["/dns4/" + "x" * MAX_ADDRESS, "/dns4/a\nb"])
def test_an_address_that_no_beat_may_carry_is_left_out(unsayable):
    beat = introduction(unsayable, HERE).compose(1)
    assert beat.addresses == (HERE,)
    assert decode_message(encode_message(beat)) == beat


def test_of_many_addresses_the_first_are_said():
    many = [f"/ip4/10.0.0.{i}/tcp/1" for i in range(MAX_ADDRESSES + 3)]
    beat = introduction(*many).compose(1)
    assert beat.addresses == tuple(many[:MAX_ADDRESSES])
    assert decode_message(encode_message(beat)) == beat


def test_a_measure_of_one_run_is_not_said_in_the_next():
    ours = introduction()
    ours.take_run(progress())
    ours.measure = Measure("dice", 3, 87)
    assert ours.compose(1).measure == Measure("dice", 3, 87)
    ours.take_run(progress())
    assert ours.compose(2).measure is None
