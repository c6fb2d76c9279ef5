"""Hostile input for what reads a stream: frames, negotiation, and the messages of circuits."""

from __future__ import annotations

import contextlib
from functools import cache

from consortium import key_of
from fuzz_input import Layer, Rng, Tape, sometimes, split, written

from p2pfed.errors import ConfigError, PeerUnreachable, RemoteProtocolError
from p2pfed.network import circuit, framing, multistream
from p2pfed.network.addresses import Direct, pack, unpack

__all__ = ["CIRCUIT", "FRAMING", "MULTISTREAM"]

# -- framing and multistream -----------------------------------------------------------------------


@cache
def _frames() -> list[bytes]:
    bodies = (b"", b"x", b"a message", bytes(300), bytes(4096))
    return [written(framing.write_frame, body, stall=1.0) for body in bodies]


def make_framing(rng: Rng) -> bytes:
    parts = [rng.choice(_frames()) for _ in range(rng.randint(1, 4))]
    return sometimes(rng, b"".join(parts), rng.choice(parts))


async def check_framing(data: bytes) -> tuple[int, int]:
    tape, accepted = Tape(data, split(data)[2]), 0
    while True:
        began = tape.at
        try:
            payload = await framing.read_frame(tape, max_bytes=4096, stall=1.0)
        except (RemoteProtocolError, PeerUnreachable):
            return accepted, int(tape.at > began or not accepted)
        head = b"PF01" + len(payload).to_bytes(4, "big")
        assert data[began : tape.at - 32] == head + payload
        accepted += 1


_PROTOCOLS = ("/noise", "/p2pfed/gossip/1", "/p2pfed/blob/1")


@cache
def _openings() -> list[bytes]:
    found = [written(multistream.announce, name) for name in (*_PROTOCOLS, "ls", "/ipfs/id/1.0.0")]
    hello = found[0][:20]
    lines = [each[20:] for each in found]
    return [*found, hello + b"".join(lines[3:]) + lines[0], hello + lines[3] * 20, hello, *lines]


def make_multistream(rng: Rng) -> bytes:
    opening = rng.choice(_openings()) + rng.randbytes(rng.choice((0, 0, 10)))
    return bytes([rng.randrange(3)]) + sometimes(rng, opening, rng.choice(_openings()))


async def check_multistream(data: bytes) -> tuple[int, int]:
    kind, body, rng = split(data)
    tape = Tape(body, rng)
    try:
        if kind % 3 == 2:
            await multistream.propose(tape, "/noise", stall=1.0)
        else:
            silent = kind % 3 == 1
            agreed = await multistream.accept(tape, _PROTOCOLS, stall=1.0, silent=silent)
            assert agreed in _PROTOCOLS
            assert not (silent and tape.written)
    except (RemoteProtocolError, PeerUnreachable):
        return 0, 1
    finally:
        assert tape.at <= (multistream.MAX_PROPOSALS + 1) * (multistream.MAX_LINE + 1)
        assert len(tape.written) < 100
    return 1, 0


# -- circuits --------------------------------------------------------------------------------------


@cache
def _circuit_parts() -> tuple[list[bytes], list[bytes], list[bytes]]:
    peer, ok = key_of(0).peer_id, circuit.Status.OK
    limit = circuit.Limit(3600, 1 << 30)
    where = Direct("ip4", "192.0.2.1", 4001, peer)
    granted = circuit.Answer(ok, 1_800_000_000, (pack(where),) * 3, limit)
    hops = (circuit.Reserve(), circuit.Connect(peer), granted, circuit.Answer(circuit.Status(204)))
    stops = (circuit.Connect(peer, limit), circuit.Answer(ok), circuit.Answer(circuit.Status(203)))
    places = [where, Direct("dns4", "a.example", 1), Direct("ip6", "2001:db8::1", 65535, peer)]
    return (
        [circuit.encode_hop(each) for each in hops],
        [circuit.encode_stop(each) for each in stops],
        [pack(each) for each in places],
    )


def make_circuit(rng: Rng) -> bytes:
    hops, stops, places = _circuit_parts()
    kind = rng.randrange(7)
    pool = (hops, stops, hops, stops, hops, stops, places)[kind]
    body = rng.choice(pool)
    if kind in (2, 3, 4, 5):
        low, high = len(body) & 0x7F, len(body) >> 7
        body = (bytes([low | 0x80, high]) if high else bytes([low])) + body
    return bytes([kind]) + sometimes(rng, body, rng.choice(pool))


async def check_circuit(data: bytes) -> tuple[int, int]:
    kind, body, rng = split(data)
    tape = Tape(body, rng)
    try:
        match kind % 7:
            case 0:
                hop = circuit.decode_hop(body)
                assert circuit.decode_hop(circuit.encode_hop(hop)) == hop
            case 1:
                stop = circuit.decode_stop(body)
                assert circuit.decode_stop(circuit.encode_stop(stop)) == stop
            case 2:
                await circuit.read_hop(tape)
            case 3:
                await circuit.read_stop(tape)
            case 4:
                granted = await circuit.reserve(tape, wall=lambda: 1_700_000_000.0)
                assert 0 < granted.expires_in < 1e6
                for address in granted.addresses:
                    _unpack(address)
            case 5:
                await circuit.accept_stop(tape)
                assert tape.at <= circuit.MAX_MESSAGE + 2
            case _:
                _unpack(body)
    except (RemoteProtocolError, PeerUnreachable, ConfigError):
        return 0, 1
    return 1, 0


def _unpack(address: bytes) -> None:
    with contextlib.suppress(ConfigError):
        direct = unpack(address, key_of(0).peer_id)
        assert unpack(pack(direct), key_of(0).peer_id) == direct


FRAMING = Layer(make_framing, check_framing)
MULTISTREAM = Layer(make_multistream, check_multistream)
CIRCUIT = Layer(make_circuit, check_circuit)
