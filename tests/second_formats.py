"""The second implementation, 3: what is signed (sections 1 and 2 of `docs/protocol.md`).

Nothing of p2pfed is imported. Documents, deltas, payloads and proofs are read and checked, the
weight of a member is computed. Whole numbers are Python's, which are exact.

Invariant: whatever a reader here returns was signed as the document demands; all else is `Wrong`.

Not here: which deltas count (`second_facts.py`), the arithmetic of the fold (`second_fold.py`), the
bounds of single values of a roster or run file, which its stewards have seen to.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Any

import msgpack
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey
from second_transport import Wrong, public_key

MARK = b"\n-- p2pfed signatures --\n"
ROSTER, RUN, DELTA = b"p2pfed-roster", b"p2pfed-run", b"p2pfed-delta"
ZEROS = bytes(32)


def h(data: bytes, person: bytes = b"", size: int = 32) -> bytes:
    """BLAKE2b, with a personalisation if one is given."""
    return hashlib.blake2b(data, digest_size=size, person=person).digest()


def sign(seed: bytes, person: bytes, payload: bytes) -> bytes:
    return SigningKey(seed).sign(h(payload, person)).signature


def is_signed(key: bytes, person: bytes, payload: bytes, signature: bytes) -> bool:
    try:
        VerifyKey(key).verify(h(payload, person), signature)
    except BadSignatureError:
        return False
    return True


def require(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


# --- documents ---------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    require(len(dict(pairs)) == len(pairs), "a doubled key")
    return dict(pairs)


@dataclass(frozen=True)
class Document:
    """A roster or run file: its payload as it came, who signed it, and what it says."""

    payload: bytes
    signers: frozenset[bytes]
    says: dict[str, Any]

    @property
    def name(self) -> bytes:
        return h(self.payload)

    def signed_by(self, roster: Document) -> bool:
        """Whether enough stewards of a roster signed this."""
        stewards = {bytes.fromhex(each["key"]) for each in roster.says["stewards"]}
        return len(stewards & self.signers) >= roster.says["threshold"]

    def member(self, peer: str) -> dict[str, Any] | None:
        """What a roster says of a member."""
        return next((each for each in self.says["members"] if each["peer_id"] == peer), None)

    def trains(self) -> list[dict[str, Any]]:
        """The members that train, by a roster."""
        members = self.says["members"]
        return [each for each in members if "train" in each["roles"] and each["samples"] > 0]

    def revoked(self, peer: str, round_: int) -> bool:
        """Whether a roster revokes a peer from a round that is not later."""
        gone = self.says["revoked"]
        return any(each["peer_id"] == peer and each["from_round"] <= round_ for each in gone)


ROSTER_KEYS = {
    "type", "network", "network_id", "version", "previous", "expires", "threshold", "stewards",
    "members", "revoked",
}  # fmt: skip
RUN_KEYS = {
    "type", "name", "network_id", "task", "task_id", "genesis", "num_parameters", "rounds",
    "grid_bits", "mechanism", "unit", "epsilon", "delta", "clip", "block_size", "segment_blocks",
    "select_share", "top_fraction", "outer", "robust", "quorum", "min_live", "deadline_s",
    "min_round_interval_s", "gate", "encoding", "averaging",
}  # fmt: skip


def read_document(data: bytes, person: bytes) -> Document:
    """A roster (person `ROSTER`) or a run file (`RUN`), with the signatures that are good.

    Raises:
        Wrong: Too long, or not of the form that the document gives.
    """
    require(len(data) <= 256 << 10, "a document is too long")
    payload, mark, rest = data.partition(MARK)
    if not mark:
        payload = payload.rstrip(b"\n")
    lines = rest.decode().splitlines()
    require(len(lines) <= 64, "too many signatures")
    pairs = [tuple(map(bytes.fromhex, each.split(" "))) for each in lines]
    signers = frozenset(key for key, made in pairs if is_signed(key, person, payload, made))
    says = json.loads(payload.decode(), object_pairs_hook=_once)
    kind, keys = ("roster", ROSTER_KEYS) if person == ROSTER else ("run", RUN_KEYS)
    require(says.keys() == keys, "unknown or missing keys")
    require(says["type"] == f"p2pfed.{kind}/1", "another kind of document")
    return Document(payload, signers, says)


def hash_of(document: Document, key: str) -> bytes:
    """A hash that a document holds under a key."""
    return bytes.fromhex(document.says[key])


# --- what a run fixes --------------------------------------------------------------------------


class Run:
    """A run file that enough stewards of a roster signed."""

    def __init__(self, data: bytes, roster: Document, network_id: bytes) -> None:
        document = read_document(data, RUN)
        require(document.signed_by(roster), "too few stewards signed the run file")
        require(hash_of(document, "network_id") == network_id, "a run of another network")
        self.run_id, self.says = document.name, document.says
        self.task_id, self.genesis = hash_of(document, "task_id"), hash_of(document, "genesis")
        self.size, self.rounds = self.says["num_parameters"], self.says["rounds"]
        (self.outer,), (self.averaging,) = self.says["outer"], self.says["averaging"]
        (encoding,) = self.says["encoding"]
        self.wide = encoding["values"] == "int16"

    @property
    def max_released(self) -> int:
        """The most coordinates of one delta."""
        says, size = self.says, self.size
        blocks = ceil(Fraction(size, says["block_size"]))
        segments = ceil(Fraction(blocks, says["segment_blocks"]))
        if says["mechanism"] == "svt":
            return min(size, segments * says["block_size"])
        if says["mechanism"] == "svt-textbook":
            return ceil(Fraction(size, says["segment_blocks"]))
        return max(1, ceil(size * Fraction(says["top_fraction"])))

    def weight(self, roster: Document, peer: str) -> int:
        """Weight of a member that trains by a roster, from that roster's samples."""
        averaging, trains = self.averaging, roster.trains()
        (samples,) = (each["samples"] for each in trains if each["peer_id"] == peer)
        cap = Fraction(averaging["sample_cap"])
        if cap:
            median = lower_median([each["samples"] for each in trains])
            samples = min(samples, max(1, floor(cap * median)))
        power = Fraction(averaging["weight_power"])
        a, b = power.numerator, power.denominator
        return integer_root(samples**a << 20 * (b - a), b)


def lower_median(values: Iterable[Any]) -> Any:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def integer_root(value: int, degree: int) -> int:
    """The greatest integer whose power is not above the value."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle)
    return low


# --- payloads ----------------------------------------------------------------------------------

HEAD, GAP = struct.Struct("<BBHI"), 0xFFFF


def read_payload(data: bytes, run: Run) -> tuple[list[int], int]:
    """The integers q of all coordinates, and how many the payload names.

    Raises:
        Wrong: It is not the one way to write these values.
    """
    layout, bits, exponent, count = HEAD.unpack_from(data)
    size = 2 if bits == 16 else 1
    require(bits == (16 if run.wide else 8), "values of a width that the run has not")
    require(exponent <= (0 if run.wide else 8), "an exponent that is too large")
    body, width = data[HEAD.size :], size if layout == 1 else 2 + size
    entries = len(body) // width
    require(entries * width == len(body) and layout in (0, 1), "a payload of no layout")
    gaps = struct.unpack_from(f"<{entries}H", body) if layout == 0 else ()
    values = struct.unpack_from(f"<{entries}{'h' if run.wide else 'b'}", body, 2 * len(gaps))
    require(run.wide or -128 not in values, "a value below -127")
    if not run.wide:
        most = max(map(abs, values), default=0) << exponent
        require(exponent == _exponent(most), "not the least exponent")
    most_bytes = (2 + size) * (run.max_released + run.size // GAP)
    if layout == 1:
        require(entries == count == run.size, "a dense payload has a value for each coordinate")
        require(sum(map(bool, values)) <= run.max_released, "too many values")
        require(len(body) <= most_bytes, "sparse would be shorter")
        return [value << exponent for value in values], count
    require(len(body) <= size * run.size, "dense would be shorter")
    require(not gaps or gaps[-1] != GAP, "a filler at the end")
    vector, at, last, named = [0] * run.size, 0, -1, 0
    for gap, value in zip(gaps, values, strict=True):
        at += gap
        if gap == GAP:
            require(value == 0, "a filler with a value")
            continue
        require(last < at < run.size, "positions that do not rise")
        vector[at], last, named = value << exponent, at, named + 1
    require(named == count <= run.max_released, "another count, or too many values")
    return vector, count


def _exponent(most: int) -> int:
    """The least exponent with which the largest value fits into an int8."""
    return next(e for e in range(17) if most <= 127 << e)


def write_payload(released: dict[int, int], run: Run) -> bytes:
    """The payload of some coordinates; int8 values must be multiples of their exponent's unit."""
    exponent = 0 if run.wide else _exponent(max(map(abs, released.values()), default=0))
    kind, size = ("h", 2) if run.wide else ("b", 1)
    gaps, values, at = [], [], 0
    for position in sorted(released):
        fillers = (position - at) // GAP
        gaps += [GAP] * fillers + [position - at - GAP * fillers]
        values += [0] * fillers + [released[position] >> exponent]
        at = position
    if (2 + size) * len(gaps) <= size * run.size:
        head = HEAD.pack(0, 8 * size, exponent, len(released))
        return head + struct.pack(f"<{len(gaps)}H{len(gaps)}{kind}", *gaps, *values)
    dense = [released.get(i, 0) >> exponent for i in range(run.size)]
    return HEAD.pack(1, 8 * size, exponent, run.size) + struct.pack(f"<{run.size}{kind}", *dense)


# --- deltas ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """A signed header; `made` is what it says: run, round, origin and so on."""

    data: bytes
    signature: bytes
    made: list[Any]

    @property
    def name(self) -> bytes:
        return h(self.data)

    @property
    def slot(self) -> tuple[bytes, int, str]:
        """Run, round and origin; there is at most one delta for each."""
        return self.made[0], self.made[1], self.made[2]


def read_header(data: bytes, signature: bytes) -> Header:
    """A header that its origin signed.

    Raises:
        Wrong: It is malformed, or not signed.
    """
    require(len(data) <= 1024, "a header is too long")
    version, *made = msgpack.unpackb(data)
    require(version == 1 and len(made) == 11, "a header of another version")
    require(is_signed(public_key(made[2]), DELTA, data, signature), "a header is not signed")
    return Header(data, signature, made)


def read_proof(wire: bytes) -> tuple[bytes, int, str]:
    """The run, round and origin for which two headers were signed.

    Raises:
        Wrong: It proves nothing.
    """
    first, signature, second, other = msgpack.unpackb(wire)
    headers = [read_header(first, signature), read_header(second, other)]
    require(headers[0].slot == headers[1].slot, "headers of two deltas, as it should be")
    require(headers[0].name < headers[1].name, "twice the same header, or in the wrong order")
    return headers[0].slot


@dataclass(frozen=True)
class Delta:
    """A signed delta; `wire` is its bytes as they came, `values` its integers q."""

    wire: bytes
    header: Header
    values: list[int]

    @property
    def name(self) -> bytes:
        return self.header.name

    @property
    def round(self) -> int:
        return self.header.slot[1]

    @property
    def origin(self) -> str:
        return self.header.slot[2]

    @property
    def roster(self) -> bytes:
        """Name of the roster that it was signed under."""
        return bytes(self.header.made[3])


def read_delta(wire: bytes, run: Run) -> Delta:
    """A delta of a run, its signature, hashes and payload checked.

    Raises:
        Wrong: It is malformed, or not of this run.
    """
    data, signature, payload = msgpack.unpackb(wire)
    header = read_header(data, signature)
    run_id, round_, _, _, _, mechanism, _, _, _, digest, count = header.made
    require(run_id == run.run_id, "a delta of another run")
    require(0 <= round_ < run.rounds, "a round that the run has not")
    require(mechanism == run.says["mechanism"], "another mechanism than the run's")
    require(digest == h(payload), "a payload with another hash")
    values, named = read_payload(payload, run)
    require(named == count, "another number of coordinates than the header says")
    return Delta(wire, header, values)


def make_delta(
    seed: bytes, run: Run, round_: int, origin: str, roster: bytes, view: bytes,
    released: dict[int, int], releases: int,
) -> bytes:  # fmt: skip
    """A delta that spends nothing of a budget (mechanism `none`)."""
    payload = write_payload(released, run)
    count = HEAD.unpack_from(payload)[3]
    mechanism = run.says["mechanism"]
    fields = [1, run.run_id, round_, origin, roster, view, mechanism, 0, releases, ZEROS]
    header = msgpack.packb([*fields, h(payload), count])
    return msgpack.packb([header, sign(seed, DELTA, header), payload])
