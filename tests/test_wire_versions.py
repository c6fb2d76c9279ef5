"""Two adjacent versions of the wire: what the older one said is understood, and is all it is told.

`conversation-v1.hex` and `negotiation-v1.hex` in `tests/data/` were recorded from the last release
that spoke version 1 only: a whole conversation of two nodes (`two_cores`), and the bytes with which
it opened, answered and offered streams.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from consortium import peer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_scenario import scenario_of
from two_cores import LATENCY, SEATS, STEP, WALL, TwoCores
from wire_script import Script

from p2pfed.errors import NoCommonProtocol, PeerUnreachable, RemoteProtocolError
from p2pfed.gossip.events import Connected, Note, Received, Tick, Unlike
from p2pfed.gossip.membership import Peer, State
from p2pfed.network import multistream
from p2pfed.network.framing import read_frame
from p2pfed.network.host import ROSTER
from p2pfed.node.likeness import measure_of, unlike_lines
from p2pfed.simulate.play import Stage
from p2pfed.wire.beat import MAX_ADDED, Beat
from p2pfed.wire.codec import pack, unpack
from p2pfed.wire.measure import MAX_HUNDREDTHS, Measure
from p2pfed.wire.messages import decode_message, encode_message
from p2pfed.wire.versions import NEWEST, VERSIONS, gossip_protocol, speaks, version_of

DATA = Path(__file__).with_name("data")
DICE = Measure("dice", 7, 87)


@dataclass(frozen=True)
class Recorded:
    """One frame of the conversation: when, who (0 or 1), what."""

    at: float
    sender: int
    frame: bytes


def conversation() -> tuple[tuple[int, bytes], list[Recorded]]:
    """How the recorded conversation ended (round and model), and its frames."""
    head, *lines = (DATA / "conversation-v1.hex").read_text("ascii").splitlines()
    *_, end, model = head.split()
    frames = [line.split() for line in lines]
    told = [Recorded(float(at), int(who), bytes.fromhex(frame)) for at, who, frame in frames]
    return (int(end), bytes.fromhex(model)), told


def negotiation() -> dict[str, bytes]:
    """What the recorded release wrote on streams, by name."""
    lines = (DATA / "negotiation-v1.hex").read_text("ascii").splitlines()
    return {name: bytes.fromhex(text) for name, text in map(str.split, lines)}


END, FRAMES = conversation()
WRITTEN = negotiation()


def a_beat(**changes) -> Beat:
    beat = Beat(1, bytes(32), b"r" * 32, b"", 3, True, 3, b"m" * 32, bytes(16), ())
    return replace(beat, **changes)


# --- the recorded conversation -----------------------------------------------------------------


def test_every_recorded_frame_is_read_as_version_1_and_written_again_with_the_same_bytes():
    assert len(FRAMES) > 100
    for recorded in FRAMES:
        assert encode_message(decode_message(recorded.frame, 1), 1) == recorded.frame


@pytest.mark.parametrize("ours", SEATS)
def test_this_release_goes_through_the_recorded_run_with_the_recorded_peer(ours):
    talk = TwoCores(wire=1)
    party, theirs = talk.parties[ours], [each for each in FRAMES if each.sender != ours]
    talk.give(ours, Connected(peer_of(1 - ours), 1))
    while talk.now < 30.0:
        talk.now += LATENCY
        while theirs and theirs[0].at + LATENCY <= talk.now + 1e-9:
            talk.give(ours, Received(peer_of(1 - ours), theirs.pop(0).frame, 1))
        if round(talk.now / LATENCY) % round(STEP / LATENCY) == 0:
            talk.give(ours, Tick(WALL))
    assert party.blamed == []
    assert party.folded == END
    assert party.trained == [0, 1, 2]
    said = [frame for _, sender, frame in talk.frames if sender == ours]
    assert {unpack(frame, "").text() for frame in said} >= {"beat", "held", "facts", "witness"}


@pytest.mark.parametrize("wire", VERSIONS)
def test_two_of_this_release_end_as_recorded_whatever_version_they_agree_on(wire):
    talk = TwoCores(wire=wire)
    for party in talk.parties:
        party.core.introduction.measure = DICE
    talk.hold()
    assert [party.blamed for party in talk.parties] == [[], []]
    assert [party.folded for party in talk.parties] == [END, END]
    for party in talk.parties:
        (peer,) = (p for p in party.core.membership.peers.values() if p.beat is not None)
        assert peer.version == wire
        assert peer.beat.measure == (DICE if wire > 1 else None)


def test_a_node_with_something_to_share_says_to_a_peer_of_version_1_what_version_1_said():
    talk = TwoCores(wire=1)
    for party in talk.parties:
        party.core.introduction.measure = DICE
    talk.hold()
    assert [(round(at, 2), who, frame) for at, who, frame in talk.frames] == [
        (each.at, each.sender, each.frame) for each in FRAMES
    ]


def test_a_beat_of_version_2_on_a_stream_of_version_1_costs_the_sender_its_connection():
    talk = TwoCores(wire=1)
    for index in SEATS:
        talk.give(index, Connected(peer_of(1 - index), 1))
    beat = a_beat(network_id=talk.parties[0].core.book.network_id, measure=DICE)
    talk.give(0, Received(peer_of(1), encode_message(beat, 2), 1))
    assert len(talk.parties[0].blamed) == 1
    talk.give(1, Received(peer_of(0), encode_message(beat, 2), 2))
    assert talk.parties[1].blamed == []


def test_in_a_simulated_network_older_and_newer_nodes_end_with_one_model():
    """All share a measure; one of the three nodes is of the release before."""
    stage = Stage(scenario_of(until_s="20", rounds="3"), 5)
    stage.run_until(0.0)  # now they are there, and not connected
    nodes = list(stage.heap.nodes.values())
    for node, version in zip(nodes, (1, 2, 2), strict=True):
        node.version = version
        node.core.introduction.measure = DICE
    stage.run_until(20.0)
    stage.settle()
    assert len({node.hash for node in nodes}) == 1
    assert nodes[0].hash != b""
    for node in nodes:
        for peer in node.core.membership.peers.values():
            version = min(node.version, stage.heap.nodes[peer.peer_id].version)
            assert peer.version == version
            assert peer.beat.measure == (DICE if version == 2 else None)
    assert not [note for node in nodes for note in node.notes if "refused" in note.type]


# --- what version 2 adds -----------------------------------------------------------------------


def test_a_beat_carries_a_measure_in_version_2_alone():
    told = a_beat(measure=DICE)
    assert decode_message(encode_message(told, 2), 2) == told
    assert decode_message(encode_message(told, 1), 1) == a_beat()
    assert encode_message(a_beat(), 2) == encode_message(a_beat(), 1)
    with pytest.raises(RemoteProtocolError, match="too many"):
        decode_message(encode_message(told, 2), 1)


def behind_the_addresses(*items) -> bytes:
    """A beat with these items behind what version 1 has."""
    fields = unpack(encode_message(a_beat(), 1), "beat")
    return pack(*fields._values, *items)


def test_an_empty_array_stands_for_no_measure():
    assert decode_message(behind_the_addresses(()), 2) == a_beat()


def test_what_a_later_version_puts_behind_the_measure_is_passed_over_up_to_four_items():
    told = ("dice", 7, 87)
    added = [b"new", 5, None, ("any", True)]
    assert len(added) == MAX_ADDED
    assert decode_message(behind_the_addresses(told, *added), 2) == a_beat(measure=DICE)
    with pytest.raises(RemoteProtocolError, match="too many"):
        decode_message(behind_the_addresses(told, *added, 1), 2)


@pytest.mark.parametrize(
    "lie",
    [
        None,
        0.87,
        "dice",
        ("dice", 7),
        ("dice", 7, 87, 1),
        ("", 7, 87),
        ("d" * 33, 7, 87),
        ("dice\x1b[2J", 7, 87),
        (b"dice", 7, 87),
        ("dice", -1, 87),
        ("dice", 1 << 40, 87),
        ("dice", 7, 0.87),
        ("dice", 7, True),
        ("dice", 7, MAX_HUNDREDTHS + 1),
        ("dice", 7, -MAX_HUNDREDTHS - 1),
        (("dice",), 7, 87),
    ],
)
def test_a_measure_out_of_bounds_is_refused(lie):
    with pytest.raises(RemoteProtocolError):
        decode_message(behind_the_addresses(lie), 2)


@pytest.mark.parametrize(
    ("value", "hundredths"),
    [(0.8749, 87), (0.8751, 88), (-0.004, 0), (1, 100), (99_999.994, MAX_HUNDREDTHS - 1)],
)
def test_a_value_is_rounded_to_two_digits(value, hundredths):
    assert Measure.of("auc", 3, value) == Measure("auc", 3, hundredths)


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {},
        {"name": "auc", "round": 3},
        {"name": "auc", "round": 3, "value": float("nan")},
        {"name": "auc", "round": 3, "value": float("inf")},
        {"name": "auc", "round": 3, "value": 1e9},
        {"name": "auc", "round": 3, "value": True},
        {"name": "auc", "round": 3, "value": "0.87"},
        {"name": "auc", "round": -3, "value": 0.87},
        {"name": "auc", "round": 3.0, "value": 0.87},
        {"name": "case-0017 " * 5, "round": 3, "value": 0.87},
        {"name": "a\nb", "round": 3, "value": 0.87},
    ],
)
def test_what_is_no_measure_is_never_told(told):
    assert Measure.from_json(told) is None


@settings(max_examples=50)
@given(st.text(max_size=40), st.integers(-5, 1 << 33), st.floats())
def test_whatever_a_task_calls_its_metric_a_measure_that_is_made_can_be_sent(name, round_, value):
    measure = Measure.of(name, round_, value)
    if measure is None:
        return
    beat = a_beat(measure=measure)
    assert decode_message(encode_message(beat)) == beat
    assert Measure.from_json(measure.as_json()) == measure


# --- agreeing ----------------------------------------------------------------------------------


async def test_the_recorded_release_agrees_with_us_on_version_1():
    stream = Script(WRITTEN["answers"])
    ours = [gossip_protocol(version) for version in sorted(VERSIONS, reverse=True)]
    assert await multistream.propose(stream, *ours, stall=1) == gossip_protocol(1)
    assert stream.written.count(b"/p2pfed/gossip/2\n") == 1
    assert stream.written.endswith(b"\x11/p2pfed/gossip/1\n")


async def test_we_agree_with_the_recorded_release_on_version_1_and_read_its_frames():
    stream = Script(WRITTEN["opens"])
    served = [gossip_protocol(version) for version in VERSIONS]
    refused: list[str] = []
    agreed = await multistream.accept(stream, served, stall=1, refused=refused.append)
    assert (agreed, refused) == (gossip_protocol(1), [])
    frame = await read_frame(stream, max_bytes=100, stall=1)
    assert encode_message(decode_message(frame, 1), 1) == frame


async def test_the_roster_that_the_recorded_release_offers_is_read_as_ever():
    stream = Script(WRITTEN["offers"])
    assert await multistream.accept(stream, (ROSTER,), stall=1, silent=True) == ROSTER
    assert await read_frame(stream, max_bytes=100, stall=1) == b"a signed roster"
    assert stream.written == b""


async def test_who_refuses_every_version_is_told_apart_from_who_breaks_the_protocol():
    line = multistream._line
    no = line(multistream.HEADER) + line("na") + line("na")
    with pytest.raises(NoCommonProtocol):
        await multistream.propose(Script(no), gossip_protocol(3), gossip_protocol(2), stall=1)
    other = line(multistream.HEADER) + line("/plaintext/2.0.0")
    with pytest.raises(RemoteProtocolError) as raised:
        await multistream.propose(Script(other), gossip_protocol(3), stall=1)
    assert not isinstance(raised.value, NoCommonProtocol)


async def test_what_a_later_release_proposes_is_noted_though_it_is_refused():
    line = multistream._line
    proposals = [line(gossip_protocol(version)) for version in (4, 3)]
    stream, refused = Script(line(multistream.HEADER) + b"".join(proposals)), []
    with pytest.raises(PeerUnreachable):  # it gives up
        await multistream.accept(stream, [gossip_protocol(2)], stall=1, refused=refused.append)
    assert list(map(version_of, refused)) == [4, 3]


@pytest.mark.parametrize(
    ("protocol", "version"),
    [
        ("/p2pfed/gossip/1", 1),
        ("/p2pfed/gossip/9999", 9999),
        ("/p2pfed/gossip/10000", None),
        ("/p2pfed/gossip/", None),
        ("/p2pfed/gossip/0", None),
        ("/p2pfed/gossip/01", None),
        ("/p2pfed/gossip/-1", None),
        ("/p2pfed/gossip/1.0", None),
        ("/p2pfed/gossip/٣", None),
        ("/p2pfed/blob/1", None),
        ("1", None),
        ("", None),
    ],
)
def test_a_version_is_read_from_the_name_of_its_protocol_and_from_nothing_else(protocol, version):
    assert version_of(protocol) == version


def test_this_release_speaks_its_own_version_and_the_one_before():
    assert VERSIONS == (NEWEST - 1, NEWEST)
    assert [version_of(gossip_protocol(version)) for version in VERSIONS] == list(VERSIONS)


# --- in words ----------------------------------------------------------------------------------


def test_versions_are_told_in_words():
    told = [speaks(versions) for versions in ([3], [1, 2], [2, 1, 3], [1, 4])]
    assert told == ["3", "1 to 2", "1 to 3", "1, 4"]


def test_a_member_without_a_common_version_is_told_apart_once_and_never_blamed():
    talk = TwoCores()
    core = talk.parties[0].core
    effects = core.handle(Unlike(peer_of(1), (3, 4)), 0.0)
    (note,) = (effect for effect in effects if isinstance(effect, Note))
    assert note.type == "peer.version-differs"
    assert note.data["speaks"] == [3, 4]
    assert note.data["we_speak"] == list(VERSIONS)
    again = core.handle(Unlike(peer_of(1), (3, 4)), 9.0)
    assert not [effect for effect in again if isinstance(effect, Note)]
    peers = core.membership.peers.values()
    (line,) = unlike_lines(peers)
    assert line == "h1 speaks wire version 3 to 4, this node 1 to 2; update this node"
    talk.give(0, Connected(peer_of(1)))  # it was updated, or we were
    assert unlike_lines(peers) == []
    assert talk.parties[0].blamed == []


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        ((3,), "Oslo speaks wire version 3, this node 1 to 2; update this node"),
        ((1,), "Oslo speaks wire version 1, this node 2 to 3; update Oslo"),
        ((), "Oslo speaks no wire version that this node speaks (1 to 2); update both"),
    ],
)
def test_who_has_to_update_is_said(theirs, line):
    ours = (2, 3) if theirs == (1,) else (1, 2)
    peer = Peer("12D3…", "Oslo", speaks=theirs)
    assert unlike_lines([peer], ours) == [line]
    assert unlike_lines([replace(peer, state=State.REVOKED)], ours) == []


def test_a_measure_of_another_run_or_of_a_round_that_there_is_not_is_not_shown():
    talk = TwoCores()
    run = talk.parties[0].run
    peer = Peer("12D3…", "Oslo", beat=a_beat(run_id=run.run_id, measure=Measure("dice", 3, 87)))
    assert measure_of(peer, run) == {"name": "dice", "round": 3, "value": 0.87}
    for beat in (
        replace(peer.beat, run_id=bytes(32)),
        replace(peer.beat, measure=Measure("dice", run.rounds + 1, 87)),
        replace(peer.beat, measure=None),
        None,
    ):
        assert measure_of(replace(peer, beat=beat), run) is None
    assert measure_of(peer, None) is None


def test_a_new_run_forgets_what_was_measured_in_the_one_before():
    talk = TwoCores()
    party = talk.parties[0]
    party.core.introduction.measure = DICE
    party.core.start_run(party.run)
    assert party.core.introduction.measure is None


async def test_the_script_of_these_tests_ends_where_it_ends():
    with pytest.raises(PeerUnreachable):
        await read_frame(Script(b"PF"), max_bytes=10, stall=1)
    await trio.lowlevel.checkpoint()
