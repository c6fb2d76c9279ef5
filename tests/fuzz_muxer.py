"""Hostile input for the muxer (frames of yamux) and the record layer (Noise).

yamux: a peer that mostly keeps to the rules, against our side reading, writing, giving up and
ending at random; after each step every counter of the muxer must agree with every other.
Noise: records that are changed, left out, doubled and swapped, against a plain reading one by one.
"""

from __future__ import annotations

import contextlib
import random
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from fuzz_input import EXTREMES, Layer, Rng, mutated, split

from p2pfed.errors import PeerUnreachable, RemoteProtocolError
from p2pfed.network.flow import INITIAL_WINDOW
from p2pfed.network.noise import MAX_PLAINTEXT, Opener, Sealer
from p2pfed.network.yamux import Bounds, Muxer

__all__ = ["NOISE", "YAMUX"]

# -- yamux -----------------------------------------------------------------------------------------

_BOUNDS = Bounds(streams=4, window=2 * INITIAL_WINDOW, memory=16 * INITIAL_WINDOW, answers=40)


def _frame(kind: int, flags: int, stream: int, body: bytes = b"", length: int | None = None):
    size = len(body) if length is None else length
    return struct.pack("!BBHII", 0, kind, flags, stream, size & 0xFFFFFFFF) + body


def _fair_frame(rng: Rng, streams: list[int]) -> bytes:
    """Bytes, leave to send, an end or a reset of one of the open streams, or a ping."""
    kind, stream = rng.randrange(12), rng.choice(streams)
    if kind < 6:
        large = rng.choice((70_000, 150_000)) if rng.random() < 0.2 else 9
        size = rng.choice((0, 1, 1, 30, 500, 5000, large))
        return _frame(0, rng.choice((0, 0, 0, 0, 4, 8)), stream, bytes(size))
    if kind < 8:
        length = rng.choice((0, 1, 5000, 262_144, 2**31, 2**32 - 1))
        return _frame(1, rng.choice((0, 0, 2)), stream, length=length)
    if kind < 10:
        if rng.random() < 0.7:
            streams.remove(stream)
        return _frame(1, rng.choice((4, 8, 4, 8, 12)), stream)
    return _frame(2, rng.choice((1, 2)), 0, length=rng.randrange(9)) * rng.choice((1, 1, 9))


def _odd_frame(rng: Rng, newest: int) -> bytes:
    """A header with something in it that should not be there."""
    stream = rng.choice((0, 1, 2, newest + 2, newest - 2, 2**32 - 1))
    version, kind = rng.choice((0, 0, 0, 1)), rng.randrange(5)
    flags, length = rng.choice((0, 1, 15, 16, 0xFFFF)), rng.choice((0, 1, *EXTREMES))
    mask = 0xFFFFFFFF
    return struct.pack("!BBHII", version, kind, flags, stream & mask, length & mask)


def disorder(rng: Rng, parts: list[bytes], chances: tuple[float, float, float]) -> None:
    """Double one, leave one out or mix them all, up to these chances; else leave them."""
    luck, at = rng.random(), rng.randrange(len(parts))
    double, drop, shuffle = chances
    if luck < double:
        parts[at:at] = [parts[rng.randrange(len(parts))]]
    elif luck < drop:
        del parts[at]
    elif luck < shuffle:
        rng.shuffle(parts)


def make_yamux(rng: Rng) -> bytes:
    """Frames of a peer that mostly keeps to the rules."""
    role = rng.randrange(2)  # 1: we dialled, the peer opens even streams
    newest, streams, found = (0 if role else -1), [], []
    for _ in range(rng.randint(3, 40)):
        if not streams or rng.random() < 0.2:
            newest += 2 * rng.choice((1, 1, 1, 7))
            streams.append(newest)
            body = bytes(rng.choice((0, 0, 20)))
            found.append(_frame(0, 1, newest, body) if body else _frame(1, 1, newest))
        elif rng.random() < 0.06:
            found.append(_odd_frame(rng, newest))
        else:
            found.append(_fair_frame(rng, streams))
    disorder(rng, found, (0.1, 0.2, 0.3))
    body = b"".join(found)
    return bytes([role]) + (mutated(rng, body) if rng.random() < 0.3 else body)


def _count_frames(body: bytes, seen: int) -> int:
    """Whole frames in what was taken in; a body's length is believed, as the muxer did."""
    at = count = 0
    while at + 12 <= seen:
        kind, length = body[at + 1], int.from_bytes(body[at + 8 : at + 12], "big")
        at += 12 + (length if kind == 0 else 0)
        count += 1
    return count


def _act(muxer: Muxer, rng: Rng) -> None:
    """What our side does meanwhile: reads, writes, gives up, opens, ends, sends."""
    muxer.opened.clear()
    flows = muxer.flows
    for flow in flows:
        kind = rng.randrange(12)
        if kind < 4 and flow.held:
            assert muxer.take(flow, rng.choice((1, 50, 1 << 20)))
        elif kind == 4 and not (flow.outbox or flow.is_ending):
            muxer.push(flow, bytes(rng.choice((1, 100, 100_000))))
        elif kind == 5:
            muxer.withdraw(flow)
        elif kind == 6:
            muxer.end(flow)
        elif kind == 7 and rng.random() < 0.3:
            muxer.reset(flow)
    if rng.random() < 0.2:
        with contextlib.suppress(PeerUnreachable):
            muxer.open(urgent=rng.random() < 0.5)
    if rng.random() < 0.1:
        muxer.ping(rng.randrange(9))
    if rng.random() < 0.7:
        pieces, drained = muxer.batch(rng.randint(1, 4), urgent_only=rng.random() < 0.2)
        assert all(0 < len(head) + len(part) <= MAX_PLAINTEXT for head, part in pieces)
        assert all(not flow.outbox for flow in drained)


def _holds(muxer: Muxer) -> None:
    flows = muxer.flows
    theirs = sum(flow.id % 2 != muxer._next_id % 2 for flow in flows)
    assert theirs == muxer._num_theirs <= _BOUNDS.streams
    assert len(flows) - theirs <= _BOUNDS.streams
    assert sum(flow.share for flow in flows) <= _BOUNDS.memory
    for flow in flows:
        assert flow.window >= 0
        assert flow.window + flow.awaited + flow.held <= flow.share <= _BOUNDS.window
        assert flow.held == sum(map(len, flow.inbox))
        assert 0 <= flow.credit < 2**32
        assert not flow.is_over and not flow.is_reset
        sends = [flow in ready for ready in muxer._ready]
        assert flow.may_send <= sum(sends) <= 1  # a withdrawn push leaves its place in the queue
    assert muxer._answers <= _BOUNDS.answers
    assert muxer._stray >= 0
    assert len(muxer._head) < 12


async def check_yamux(data: bytes) -> tuple[int, int]:
    role, body, rng = split(data)
    muxer = Muxer(initiator=bool(role & 1), bounds=_BOUNDS)
    at = 0
    while at < len(body):
        piece = body[at : at + rng.choice((1, 12, 40, 300, 70_000))]
        try:
            changed = muxer.receive(bytearray(piece))
        except RemoteProtocolError:
            return _count_frames(body, at), 1
        at += len(piece)
        assert all(flow.owner is None for flow in changed)
        _act(muxer, rng)
        _holds(muxer)
        if muxer.is_parting:
            break  # the link ends here
    return _count_frames(body, at), 0


# -- noise -----------------------------------------------------------------------------------------

_KEY = b"k" * 32


def make_noise(rng: Rng) -> bytes:
    sizes = (0, 1, 12, 12, 40, 500, 3000, MAX_PLAINTEXT if rng.random() < 0.05 else 1)
    sealer = Sealer(_KEY)
    records = [
        bytes(sealer.seal([(b"", bytes(rng.choice(sizes)))])) for _ in range(rng.randint(1, 12))
    ]
    disorder(rng, records, (0.15, 0.3, 0.4))
    body = b"".join(records)
    return mutated(rng, body) if rng.random() < 0.4 else body


def _plainly(body: bytes) -> tuple[list[bytes], bool]:
    """What the records hold, read one by one with fresh memory; whether they end in a breach."""
    aead, opened, at = ChaCha20Poly1305(_KEY), [], 0
    while at + 2 <= len(body):
        length = int.from_bytes(body[at : at + 2], "big")
        if at + 2 + length > len(body):
            return opened, False
        try:
            nonce = bytes(4) + len(opened).to_bytes(8, "little")
            opened.append(aead.decrypt(nonce, body[at + 2 : at + 2 + length], None))
        except InvalidTag:
            return opened, True
        at += 2 + length
    return opened, False


async def check_noise(data: bytes) -> tuple[int, int]:
    opener, opened, at = Opener(_KEY), [], 0
    rng = random.Random(int.from_bytes(data[-8:], "big"))
    breach = False
    try:
        while at < len(data):
            room = opener.room()
            count = min(len(room), len(data) - at, rng.choice((1, 30, 5000, 1 << 20)))
            assert count
            room[:count] = data[at : at + count]
            at += count
            opened += opener.filled(count)
            assert len(opener._in) <= 330_000
    except RemoteProtocolError:
        breach = True
    good, is_broken = _plainly(data)
    assert breach == is_broken
    if not breach:
        assert opened == [record for record in good if record]
    return len(good), int(breach)


YAMUX = Layer(make_yamux, check_yamux)
NOISE = Layer(make_noise, check_noise)
