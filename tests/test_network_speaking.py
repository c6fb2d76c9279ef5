"""What goes out on a link, in which order and how fast; no socket, virtual time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from p2pfed.errors import NoCommonProtocol, PeerUnreachable
from p2pfed.network import Limits
from p2pfed.network.framing import CHUNK
from p2pfed.network.host import ROSTER
from p2pfed.network.session import Session
from p2pfed.network.speaking import Speaking
from p2pfed.wire.versions import gossip_protocol

LIMITS = Limits()
ROSTER_BYTES = b"a roster"
LONG = bytes(LIMITS.urgent_bytes + 1)


class FakeStream:
    """Takes a piece in `seconds`."""

    def __init__(self, protocol: str, seconds: float = 0.0):
        self.protocol, self.seconds = protocol, seconds
        self.written = b""

    async def write(self, data) -> None:
        await trio.sleep(self.seconds)
        self.written += bytes(data)

    async def finish(self, seconds: float) -> None:
        await trio.lowlevel.checkpoint()


class FakeLink:
    """A member that speaks `theirs`, best first, and takes a piece of a stream in `seconds`."""

    is_relayed, opened_at, broke_protocol, sent, received, heard = False, 0.0, False, 0, 0, 0
    proposed: frozenset[int] = frozenset()

    def __init__(self, nursery, *, inbound=False, theirs=(1, 2), seconds=0.0):
        self.inbound, self.version, self.nothing_common = inbound, 0, False
        self.aborted = trio.Event()
        self.opened: list[FakeStream] = []
        self._nursery, self._theirs, self._seconds = nursery, theirs, seconds

    async def open(self, protocol, *, one_way=False, urgent=False):
        assert one_way == (protocol == ROSTER)
        await trio.lowlevel.checkpoint()
        self.opened.append(FakeStream(protocol, self._seconds))
        return self.opened[-1]

    async def open_first(self, protocols, *, urgent):
        assert urgent
        for protocol in protocols:
            if protocol in map(gossip_protocol, self._theirs):
                return await self.open(protocol, urgent=True), protocol
        raise NoCommonProtocol("none")

    def spawn(self, task) -> None:
        self._nursery.start_soon(self._run, task)

    async def _run(self, task) -> None:
        try:
            await task()
        except PeerUnreachable:
            assert self.aborted.is_set(), "a link that lost a stream goes on"

    def abort(self) -> None:
        self.aborted.set()


class Members:
    def __init__(self, roster: bytes = ROSTER_BYTES):
        self._roster = roster

    def current_roster(self) -> bytes:
        return self._roster


def speaking(*, roster: bytes = ROSTER_BYTES, versions=(1, 2), bulk_stall=60.0) -> Speaking:
    return Speaking(Members(roster), LIMITS, bulk_stall=bulk_stall, versions=versions)


async def talking(ours: Speaking, link: FakeLink, nursery) -> Session:
    """The session of a member to which frames are being written on this link."""
    session = Session("them", "us", LIMITS)
    out = await ours.begin(link)
    session.links.add(link)
    session.adopt(link)
    nursery.start_soon(ours.write, session, link, out)
    return session


@pytest.mark.parametrize(
    ("inbound", "roster", "said"),
    [(False, ROSTER_BYTES, [ROSTER]), (True, ROSTER_BYTES, []), (False, b"", [])],
)
async def test_who_dialled_offers_the_roster_ahead_of_everything(nursery, inbound, roster, said):
    link = FakeLink(nursery, inbound=inbound)
    await speaking(roster=roster).begin(link)
    assert [stream.protocol for stream in link.opened] == [*said, gossip_protocol(2)]
    assert all(ROSTER_BYTES in stream.written for stream in link.opened[:-1])


async def test_the_highest_common_version_is_the_one_of_the_link(nursery):
    link = FakeLink(nursery, theirs=(2, 1))
    out = await speaking(versions=(1, 2)).begin(link)
    assert (link.version, out.protocol) == (2, gossip_protocol(2))
    older = FakeLink(nursery, theirs=(1,))
    await speaking(versions=(1, 2)).begin(older)
    assert older.version == 1


async def test_without_a_common_version_nothing_is_said_and_the_member_is_heard_out(
    nursery, autojump_clock: MockClock
):
    link = FakeLink(nursery, theirs=(9,))
    assert await speaking().begin(link) is None
    assert link.nothing_common
    assert trio.current_time() >= LIMITS.grace_seconds


async def test_a_stream_for_long_frames_is_opened_with_the_first_of_them(
    nursery, autojump_clock: MockClock
):
    link = FakeLink(nursery, inbound=True)
    session = await talking(speaking(), link, nursery)
    session.put(b"short")
    await trio.sleep(1)
    assert [b"short" in stream.written for stream in link.opened] == [True]
    session.put(LONG)
    await trio.sleep(1)
    urgent, bulk = link.opened
    assert len(bulk.written) > len(LONG) > len(urgent.written)
    assert bulk.protocol == urgent.protocol
    nursery.cancel_scope.cancel()


async def test_a_long_frame_may_take_as_long_as_our_own_cap_makes_it(
    nursery, autojump_clock: MockClock
):
    slow, allowed = 50.0, 60.0
    assert LIMITS.stall_seconds < slow
    link = FakeLink(nursery, inbound=True, seconds=slow)
    ours = speaking(bulk_stall=allowed)
    session = await talking(ours, link, nursery)
    session.put(LONG)
    await trio.sleep(slow * (len(LONG) / CHUNK + 4))
    assert not link.aborted.is_set()
    ours.allow_stall(slow / 2)
    session.put(LONG)
    await link.aborted.wait()
    nursery.cancel_scope.cancel()
