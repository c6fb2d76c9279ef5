"""When a peer is dialled. Attempts to reach it race; what has won is somebody's, or is closed."""

from __future__ import annotations

import random

import pytest
import trio

from p2pfed.errors import PeerUnreachable
from p2pfed.network.dialling import Dialling, _race
from p2pfed.network.limits import Limits
from p2pfed.network.session import Session


class Link:
    """A connection that can be closed."""

    is_open = True

    def abort(self):
        self.is_open = False


def after(seconds, link, then=lambda: None):
    async def go():
        await trio.sleep(seconds)
        then()
        if link is None:
            raise PeerUnreachable("nobody answers")
        return link

    return go


async def test_the_first_that_answers_wins_and_the_others_are_given_up(autojump_clock):
    slow, quick = Link(), Link()
    assert await _race([after(9, slow), after(1, None), after(1, quick)]) is quick
    assert quick.is_open


async def test_where_nobody_answers_there_is_no_link(autojump_clock):
    assert await _race([after(1, None), after(2, None)]) is None
    assert await _race([]) is None


async def test_a_link_that_wins_while_the_race_is_called_off_is_closed(autojump_clock):
    link = Link()
    with trio.CancelScope() as scope:
        await _race([after(0.1, link, then=scope.cancel)])
        pytest.fail("the race was called off")
    assert not link.is_open


async def test_of_two_that_win_at_once_one_is_closed(autojump_clock):
    links = [Link(), Link()]

    def deaf(link):
        async def go():
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
            return link

        return go

    won = await _race([deaf(link) for link in links])
    assert won.is_open
    assert [link.is_open for link in links].count(True) == 1


# --- when --------------------------------------------------------------------------------------


class Attempts(Dialling):
    """Reaches nobody, and notes when it tried."""

    def __init__(self):
        super().__init__(
            None, None, Limits(), begin=None, link_to=None, linked=list, rng=random.Random(1)
        )
        self.at = []

    async def _try(self, session, ways):
        self.at.append(trio.current_time())

    def pauses(self):
        return [after - before for before, after in zip(self.at, self.at[1:], strict=False)]


@pytest.fixture
def session():
    return Session("peer", "us", Limits())


async def tried(session, seconds):
    attempts, scope = Attempts(), trio.CancelScope()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempts.keep, session, scope)
        await trio.sleep(seconds)
        scope.cancel()
    return attempts, began


async def test_a_silent_peer_is_dialled_at_once_and_then_every_few_seconds(autojump_clock, session):
    attempts, began = await tried(session, 600)
    assert attempts.at[0] == began
    assert max(attempts.pauses()) <= Limits().redial_most


async def test_a_peer_that_left_is_dialled_after_seconds_and_ever_more_seldom(
    autojump_clock, session
):
    session.has_left = True
    attempts, began = await tried(session, 3600)
    assert 1 < attempts.at[0] - began <= Limits().redial_most
    pauses = attempts.pauses()
    assert pauses[0] <= 2 * Limits().redial_most
    assert max(pauses) <= Limits().redial_left
    assert min(pauses[4:]) >= Limits().redial_left / 2


async def test_a_peer_that_is_heard_of_again_is_dialled_at_once(autojump_clock, session):
    session.has_left = True
    attempts, scope = Attempts(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempts.keep, session, scope)
        await trio.sleep(1000)
        before = len(attempts.at)
        session.has_left = False
        session.redial.set()
        await trio.sleep(60)
        scope.cancel()
    assert len(attempts.at) - before >= 60 / Limits().redial_most
