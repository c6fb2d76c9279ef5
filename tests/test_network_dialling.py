"""Attempts to reach a peer race; what has won is somebody's, or is closed."""

from __future__ import annotations

import pytest
import trio

from p2pfed.errors import PeerUnreachable
from p2pfed.network.dialling import _race


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
