"""Hostile input for what decodes messages, facts, documents and requests for files.

Values are changed as well as bytes (one item of a message, one value of a document, a header that
its own node signed), for mutated bytes alone rarely get past the outermost reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msgpack
from consortium import Consortium, key_of, sparse
from fuzz_input import Layer, Rng, Tape, mutated, sometimes, split

from p2pfed.errors import FactRejected, PeerUnreachable, RemoteProtocolError
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run, check_signed_run
from p2pfed.identity.signing import DELTA, SignedDocument, sign
from p2pfed.network.blob import BlobServer
from p2pfed.wire.delta import Delta, Header, Proof
from p2pfed.wire.meetings import Abort, Accept, Busy, Commit, Done, Propose
from p2pfed.wire.messages import decode_message, encode_message
from p2pfed.wire.payload import decode_payload, encode_payload
from p2pfed.wire.seats import decode_seats, encode_seats

__all__ = ["WIRE"]

DATA = Path(__file__).with_name("data")


def _golden(pattern: str) -> list[bytes]:
    found = [bytes.fromhex("".join(p.read_text("ascii").split())) for p in DATA.glob(pattern)]
    assert found, pattern
    return found


@dataclass(frozen=True)
class _World:
    """What the inputs are made of, and are checked against."""

    net: Consortium
    run: Run
    pools: list[list[bytes]]


_WIDTHS = ("int16", "int8")
_MESSAGE, _DELTA, _PROOF, _WIDE, _NARROW, _ROSTER, _RUN, _HEADER, _SEATS, _BLOB = range(10)
_NUM_PARAMETERS = 200_000


@cache
def _world() -> _World:
    net = Consortium(3)
    run = net.run()
    delta = net.delta(run, 3, 0)
    ident = bytes(16)
    meetings = (
        Propose(run.run_id, ident, net.roster.hash),
        Accept(run.run_id, ident, ident, bytes(80)),
        Busy(run.run_id, ident),
        Commit(run.run_id, ident, bytes(80)),
        Abort(run.run_id, ident),
        Done(run.run_id, ident),
    )
    wide = [
        sparse({5: 7}),
        sparse({i: i % 99 - 40 for i in range(300)}),
        sparse({0: 1, 199_999: -3}),
    ]
    payloads = [
        [encode_payload(each, num_parameters=_NUM_PARAMETERS, width=width) for each in wide]
        for width in _WIDTHS
    ]
    return _World(
        net,
        run,
        [
            _golden("message-*.hex") + [encode_message(each) for each in meetings],
            [*_golden("delta.hex"), delta.encode()],
            _golden("proof.hex"),
            payloads[0],
            payloads[1],
            [*_golden("roster-*.hex"), *net.signed],
            [*_golden("run.hex"), net.signed_run()],
            [delta.signed.header_bytes],
            [encode_seats(bits, 1024) for bits in (0, 5, 1 << 1023, (1 << 1024) - 1, 0xAAAA << 77)],
            [b"PFB2" + bytes(32) + bytes(8) + b"\1"],
        ],
    )


_TOKEN = re.compile(rb'"[^"]*"|-?\d+(?:\.\d+)?|true|false|null|[\[\]{}:,]')
_TEXTS = (b"0", b"-1", b"1e999", b"-0", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"')
_TEXTS += (b"9" * 30, b"9" * 5000, b"1.5", b'"' + b"x" * 300 + b'"', b'"\\u0000"', b"[" * 3000)
_TEXTS += (b'"1e9999999"', b'"0.' + b"0" * 99 + b'1"', b'"2027-01-01T00:00:00Z"', b'"\xff"')


def _json_mutated(rng: Rng, signed: bytes) -> bytes:
    """A document whose signatures are right no more, with one or two values changed."""
    payload, marker, tail = signed.partition(b"\n-- p2pfed signatures --\n")
    for _ in range(rng.randint(1, 2)):
        tokens = list(_TOKEN.finditer(payload))
        if not tokens:
            break
        token = rng.choice(tokens)
        payload = payload[: token.start()] + rng.choice(_TEXTS) + payload[token.end() :]
    return payload + marker + tail


_ITEMS = (
    None,
    True,
    0,
    -1,
    2**63,
    2**64 - 1,
    1.5,
    float("nan"),
    "",
    "x" * 300,
    "\x1b[2J",
    "\ud7ff",
)
_ITEMS += (b"", b"x" * 33, (), ((),), (0,) * 300, ("a", b"b"), ((b"x", 1),) * 5)
_BOMBS = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x91" * 60_000,
)
_BOMBS += (b"\x81\xa1a" * 20_000, b"\xdc\xff\xff" * 20_000, b"\xc9\xff\xff\xff\xff\x01")
_BOMBS += (b"\xdc\x10\x00" + b"\x91\xc0" * 4096, b"\x92\xa3ack\xdb\xff\xff\xff\xff")


def _items_mutated(rng: Rng, data: bytes) -> bytes:
    """A message with one value, perhaps deep inside, changed for another."""

    def change(value: object) -> object:
        if isinstance(value, list) and value and rng.random() < 0.8:
            at = rng.randrange(len(value))
            if rng.random() < 0.2:
                return value[:at] + value[at + 1 :] if rng.random() < 0.5 else [*value, value[at]]
            return [*value[:at], change(value[at]), *value[at + 1 :]]
        return rng.choice(_ITEMS)

    return bytes(msgpack.packb(change(msgpack.unpackb(data, use_list=True)), use_bin_type=True))


def _signed_again(rng: Rng, header: bytes) -> bytes:
    """A delta whose header is wrong and signed all the same: a member's own."""
    changed = _items_mutated(rng, header) if rng.random() < 0.5 else mutated(rng, header)
    return bytes(msgpack.packb([changed, sign(key_of(0).seed, DELTA, changed), b"payload"]))


def make_wire(rng: Rng) -> bytes:
    pools = _world().pools
    kind = rng.choice((*[_MESSAGE] * 8, *range(10)))
    data, other = rng.choice(pools[kind]), rng.choice(pools[kind])
    luck = rng.random()
    if kind in (_ROSTER, _RUN) and luck < 0.7:
        made = _json_mutated(rng, data)
    elif kind in (_MESSAGE, _DELTA, _PROOF, _HEADER) and luck < 0.4:
        made = _items_mutated(rng, data)
    elif kind == _DELTA and luck < 0.5:
        made = _signed_again(rng, pools[_HEADER][0])
    elif kind in (_MESSAGE, _DELTA, _HEADER) and luck < 0.52:
        made = rng.choice(_BOMBS)
    else:
        made = sometimes(rng, data, other)
    return bytes([kind]) + made


async def check_wire(data: bytes) -> tuple[int, int]:
    kind, body, rng = split(data)
    kind %= 10
    try:
        if kind == _BLOB:
            await BlobServer(stall=1.0).serve(Tape(body, rng), lambda _: None)
        else:
            _READ[kind](body)
    except (RemoteProtocolError, FactRejected, PeerUnreachable) as refused:
        if isinstance(refused, FactRejected) != (kind in (_ROSTER, _RUN)):
            raise AssertionError(
                "refused with an error that its caller does not catch"
            ) from refused
        str(refused)
        return 0, 1
    return 1, 0


def _read_message(body: bytes) -> None:
    message = decode_message(body)
    assert decode_message(encode_message(message)) == message


def _read_delta(body: bytes) -> None:
    delta = Delta.decode(body)
    assert Delta.decode(delta.encode()).fact == delta.fact


def _read_payload(width: str) -> Callable[[bytes], None]:
    def read(body: bytes) -> None:
        options = {"num_parameters": _NUM_PARAMETERS, "width": width}
        payload = decode_payload(body, max_released=1000, **options)
        assert encode_payload(payload, **options) == body

    return read


def _read_roster(body: bytes) -> None:
    """As a document by itself, then as news for a book that holds the first version."""
    roster = Roster.decode(SignedDocument.parse(body).payload)
    again = Roster.decode(roster.encode())
    named = roster.network_id  # the first version's is its hash, hence of its exact bytes
    assert replace(again, hash=roster.hash, network_id=named) == roster
    _world().net.book(1).add(body)


def _read_run(body: bytes) -> None:
    run = Run.decode(SignedDocument.parse(body).payload)
    json.dumps(run.leaving(_world().net.roster))
    check_signed_run(body, _world().net.roster)


def _read_seats(body: bytes) -> None:
    bits = decode_seats(body, 1024)
    assert decode_seats(encode_seats(bits, 1024), 1024) == bits < 1 << 1024


_READ: list[Callable[[bytes], object]] = [
    _read_message,
    _read_delta,
    Proof.decode,
    _read_payload("int16"),
    _read_payload("int8"),
    _read_roster,
    _read_run,
    Header.decode,
    _read_seats,
]


WIRE = Layer(make_wire, check_wire)
