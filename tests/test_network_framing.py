"""Framing and negotiation over streams in memory: the parts without a socket."""

from __future__ import annotations

import hashlib
import struct

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import PeerError, PeerUnreachable, RemoteProtocolError
from p2pfed.network import framing, multistream

LIMIT = 4096


class Tape:
    """A stream that plays given bytes in pieces, then ends, and records what is written."""

    def __init__(self, heard: bytes = b"", piece: int = 1 << 30) -> None:
        self.heard = bytearray(heard)
        self.piece = piece
        self.written = bytearray()
        self.asked = 0

    async def read(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.asked = max(self.asked, n)
        taken = bytes(self.heard[: min(n, self.piece)])
        del self.heard[: len(taken)]
        return taken

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.written += data


class Silence:
    """A stream on which nothing ever happens."""

    async def read(self, n: int) -> bytes:
        await trio.sleep_forever()

    async def write(self, data: bytes) -> None:
        await trio.sleep_forever()


def frame_of(payload: bytes) -> bytes:
    digest = hashlib.blake2b(payload, digest_size=32).digest()
    return b"PF01" + struct.pack("!I", len(payload)) + payload + digest


def read(heard: bytes, piece: int = 1 << 30) -> bytes:
    async def once() -> bytes:
        return await framing.read_frame(Tape(heard, piece), max_bytes=LIMIT, stall=1.0)

    return trio.run(once)


async def test_a_frame_is_magic_length_payload_and_digest():
    tape = Tape()
    await framing.write_frame(tape, b"delta", stall=1.0)
    assert bytes(tape.written) == frame_of(b"delta")


@given(st.binary(max_size=300), st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_property_a_written_frame_is_read_back_however_it_is_cut(payload, piece):
    assert read(frame_of(payload), piece) == payload


@given(st.binary(max_size=40))
@settings(max_examples=8, deadline=None)
def test_property_every_truncation_of_a_frame_is_refused(payload):
    whole = frame_of(payload)
    for kept in range(len(whole)):
        with pytest.raises(PeerUnreachable):
            read(whole[:kept])


@given(st.binary(max_size=40), st.integers(1, 255))
@settings(max_examples=8, deadline=None)
def test_property_every_flipped_byte_of_a_frame_is_refused(payload, flip):
    whole = frame_of(payload)
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= flip
        with pytest.raises(PeerError):
            read(bytes(broken))


async def test_a_length_over_the_limit_is_refused_before_the_payload_is_read():
    tape = Tape(b"PF01" + struct.pack("!I", LIMIT + 1) + bytes(LIMIT + 40))
    with pytest.raises(RemoteProtocolError, match="limit"):
        await framing.read_frame(tape, max_bytes=LIMIT, stall=1.0)
    assert tape.asked <= 8
    assert len(tape.heard) == LIMIT + 40


async def test_a_started_frame_that_stands_still_is_given_up(autojump_clock):
    class Half(Tape):
        async def read(self, n: int) -> bytes:
            return await super().read(n) or await Silence().read(n)

    with pytest.raises(PeerUnreachable, match="no progress"):
        await framing.read_frame(Half(b"PF01\0"), max_bytes=LIMIT, stall=30.0)
    assert trio.current_time() == pytest.approx(30.0)


async def test_the_wait_for_a_frames_first_byte_has_no_deadline(autojump_clock):
    with trio.move_on_after(10_000) as scope:
        await framing.read_frame(Silence(), max_bytes=LIMIT, stall=1.0)
    assert scope.cancelled_caught


async def test_a_peer_that_takes_no_bytes_is_given_up(autojump_clock):
    with pytest.raises(PeerUnreachable, match="no progress"):
        await framing.write_frame(Silence(), b"x", stall=30.0)
    assert trio.current_time() == pytest.approx(30.0)


# -- negotiation -------------------------------------------------------------------------------


def line(text: str) -> bytes:
    return bytes([len(text) + 1]) + text.encode() + b"\n"


async def test_a_silent_listener_hears_the_protocol_and_writes_nothing():
    tape = Tape(line("/multistream/1.0.0") + line("/p2pfed/roster/1"))
    heard = await multistream.accept(tape, ("/p2pfed/roster/1",), stall=1.0, silent=True)
    assert heard == "/p2pfed/roster/1"
    assert not tape.written


async def test_a_silent_listener_refuses_other_protocols_without_a_byte():
    tape = Tape(line("/multistream/1.0.0") + line("/ipfs/ping/1.0.0"))
    with pytest.raises(RemoteProtocolError):
        await multistream.accept(tape, ("/p2pfed/roster/1",), stall=1.0, silent=True)
    assert not tape.written


async def test_an_open_listener_says_na_and_hears_the_next_proposal():
    tape = Tape(line("/multistream/1.0.0") + line("/quic") + line("/noise"))
    assert await multistream.accept(tape, ("/noise",), stall=1.0) == "/noise"
    assert bytes(tape.written) == line("/multistream/1.0.0") + line("na") + line("/noise")


async def test_guessing_protocols_ends_after_a_few():
    tape = Tape(line("/multistream/1.0.0") + line("ls") * 1000)
    with pytest.raises(RemoteProtocolError):
        await multistream.accept(tape, ("/noise",), stall=1.0)
    assert len(tape.heard) > 900 * len(line("ls"))


@pytest.mark.parametrize("start", [b"\xff\xff\xff\xff\x7f", b"\x80\x80", b"\0", b"\x03abc"])
async def test_a_negotiation_line_of_a_wrong_length_is_refused_unread(start):
    tape = Tape(start + bytes(1000))
    with pytest.raises(RemoteProtocolError):
        await multistream.accept(tape, ("/noise",), stall=1.0)
    assert len(tape.heard) >= 1000


async def test_an_opener_refuses_an_answer_that_is_not_its_proposal():
    with pytest.raises(RemoteProtocolError):
        await multistream.propose(
            Tape(line("/multistream/1.0.0") + line("/plaintext/2.0.0")), "/noise", stall=1.0
        )
