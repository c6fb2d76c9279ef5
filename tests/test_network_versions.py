"""Members of different releases on real loopback sockets: what they agree on, or that they cannot.

What a release speaks is given to `open_network` here; real ones speak all of `VERSIONS`.
"""

from __future__ import annotations

import contextlib

import pytest
import trio
from test_network_peers import LOOPBACK, SEEDS, Gate, event, quiet

from p2pfed.network import (
    FrameReceived,
    Limits,
    PeerConnected,
    PeerDisconnected,
    VersionsDiffer,
    open_network,
)

pytestmark = pytest.mark.slow

QUICK = Limits(redial_first=0.05, redial_most=0.2, redial_unlike=0.4, grace_seconds=0.2)


def release(name: str, *versions: int, gate: Gate | None = None):
    """A member that speaks these versions."""
    return open_network(
        seed=SEEDS[name],
        listen=LOOPBACK,
        gatekeeper=gate or Gate(),
        limits=QUICK,
        versions=versions,
    )


@contextlib.asynccontextmanager
async def dialled(here: tuple[int, ...], there: tuple[int, ...]):
    """Two members; the first one dials."""
    async with release("a", *here) as a, release("b", *there) as b:
        a.keep_connected(b.peer_id, b.addresses())
        yield a, b


@pytest.mark.parametrize(
    ("here", "there", "agreed"),
    [
        ((1, 2), (1, 2), 2),
        ((1, 2), (1,), 1),
        ((1,), (1, 2), 1),
        ((1, 2), (2, 3), 2),
        ((2, 3), (1, 2), 2),
        ((1,), (1,), 1),
    ],
)
async def test_two_members_talk_in_the_highest_version_that_both_speak(here, there, agreed):
    async with dialled(here, there) as (a, b):
        for one in (a, b):
            assert (await event(one, PeerConnected)).version == agreed
        for sender, hearer in ((a, b), (b, a)):
            for frame in (b"short", bytes(8192)):  # each has a stream of its own
                assert sender.send(hearer.peer_id, frame)
                heard = await event(hearer, FrameReceived)
                assert (heard.frame, heard.version) == (frame, agreed)
            assert sender.stats(hearer.peer_id).breaches == 0


@pytest.mark.parametrize(
    ("here", "there"), [((1, 2), (3,)), ((3, 4), (1, 2)), ((2,), (1,)), ((1, 2), (4, 5, 6))]
)
async def test_two_members_without_a_common_version_are_told_and_blame_nobody(here, there):
    async with dialled(here, there) as (a, b):
        for one, other, versions in ((a, b, there), (b, a, here)):
            told = await event(one, VersionsDiffer)
            assert told == VersionsDiffer(other.peer_id, versions)
            assert one.stats(other.peer_id).breaches == 0
            assert one.stats(other.peer_id).direction is None
        again = await event(a, VersionsDiffer)  # it is dialled again, in case it was updated
        assert again == VersionsDiffer(b.peer_id, there)


async def test_a_roster_reaches_a_member_without_a_common_version():
    gate = Gate()
    async with release("a", 3) as a, release("b", 1, 2, gate=gate) as b:
        a.keep_connected(b.peer_id, b.addresses())
        await event(b, VersionsDiffer)
        assert gate.heard[0] == (a.peer_id, b"roster")


async def test_a_member_that_was_updated_is_met_without_a_restart_of_the_other():
    async with release("a", 1, 2) as a:
        async with release("b", 3) as b:
            a.keep_connected(b.peer_id, b.addresses())
            assert await event(a, VersionsDiffer) == VersionsDiffer(b.peer_id, (3,))
        async with release("b", 2, 3) as b:
            b.keep_connected(a.peer_id, a.addresses())
            while not isinstance(heard := await a.events.receive(), PeerConnected):
                assert isinstance(heard, VersionsDiffer)
            assert heard.version == 2
        async with release("b", 1) as b:  # and goes back to the release before
            while not isinstance(heard := await a.events.receive(), PeerDisconnected):
                pass
            b.keep_connected(a.peer_id, a.addresses())
            assert (await event(a, PeerConnected)).version == 1


async def test_others_hear_nothing_of_two_that_cannot_talk():
    async with dialled((1, 2), (1, 2)) as (a, b), release("c", 3) as c:
        await event(a, PeerConnected)
        await event(b, PeerConnected)
        c.keep_connected(a.peer_id, a.addresses())
        await event(c, VersionsDiffer)
        assert await event(a, VersionsDiffer) == VersionsDiffer(c.peer_id, (3,))
        assert a.send(b.peer_id, b"still here")
        assert (await event(b, FrameReceived)).frame == b"still here"
        await quiet(b, 0.3)
        await trio.lowlevel.checkpoint()
