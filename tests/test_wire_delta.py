"""Signed deltas and proofs: every bit is covered."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from consortium import Consortium, key_of, peer_of, some_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import RemoteProtocolError
from p2pfed.identity.signing import DELTA, RUN, fact_hash, sign
from p2pfed.wire.codec import pack
from p2pfed.wire.delta import Delta, Header, Proof, SignedHeader

NET = Consortium(3)
RUN_ = NET.run()
DELTA_ = NET.delta(RUN_, 3, 0)
BYTES = DELTA_.encode()
OTHER = NET.delta(RUN_, 3, 0, some_payload(RUN_, 3, 0, salt=1))
PROOF = Proof.of(DELTA_.signed, OTHER.signed)

HASHES = st.binary(min_size=32, max_size=32)
COUNTS = st.integers(0, (1 << 63) - 1)
HEADERS = st.builds(
    Header,
    run_id=HASHES,
    round=st.integers(0, 1 << 31),
    origin=st.integers(0, 5).map(peer_of),
    roster_hash=HASHES,
    view_hash=HASHES,
    mechanism=st.sampled_from(["svt", "gaussian", "none", ""]),
    spent_nano_rho=COUNTS,
    releases=COUNTS,
    ledger_head=HASHES,
    payload_hash=HASHES,
    num_released=st.integers(0, 1 << 30),
)


def signer(i: int):
    return lambda data: sign(key_of(i).seed, DELTA, data)


@given(HEADERS)
def test_decode_of_encode_is_the_header_itself(header):
    assert Header.decode(header.encode()) == header


@settings(max_examples=30)
@given(st.binary(max_size=300), st.integers(0, 1 << 31))
def test_decode_of_encode_is_the_delta_itself(payload, round_):
    header = replace(DELTA_.header, payload_hash=fact_hash(payload), round=round_)
    delta = Delta.make(header, payload, signer(0))
    again = Delta.decode(delta.encode())
    assert again == delta
    assert again.fact == fact_hash(delta.signed.header_bytes)


def test_decode_of_encode_is_the_proof_itself():
    assert Proof.decode(PROOF.encode()) == PROOF


@pytest.mark.parametrize("whole", [BYTES, PROOF.encode()], ids=["delta", "proof"])
def test_every_truncation_is_refused(whole):
    decode = Delta.decode if whole is BYTES else Proof.decode
    for length in range(len(whole)):
        with pytest.raises(RemoteProtocolError):
            decode(whole[:length])


@pytest.mark.parametrize("whole", [BYTES, PROOF.encode()], ids=["delta", "proof"])
def test_every_byte_is_covered_a_flip_anywhere_is_refused(whole):
    decode = Delta.decode if whole is BYTES else Proof.decode
    rng = random.Random(2)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        with pytest.raises(RemoteProtocolError):
            decode(bytes(flipped))


@settings(max_examples=100)
@given(st.integers(0, len(BYTES) - 1), st.integers(1, 255))
def test_any_other_byte_in_any_place_is_refused(at, mask):
    flipped = bytearray(BYTES)
    flipped[at] ^= mask
    with pytest.raises(RemoteProtocolError):
        Delta.decode(bytes(flipped))


@pytest.mark.parametrize("extra", [b"\xc0", b"\0", BYTES])
def test_trailing_bytes_are_refused(extra):
    with pytest.raises(RemoteProtocolError):
        Delta.decode(BYTES + extra)


@pytest.mark.parametrize("extra", [None, 0, b""])
def test_one_item_more_is_refused(extra):
    signed = DELTA_.signed
    with pytest.raises(RemoteProtocolError, match="too many"):
        Delta.decode(pack(signed.header_bytes, signed.signature, DELTA_.payload, extra))


def test_a_delta_of_another_key_is_refused():
    forged = NET.delta(RUN_, 3, 0, origin=peer_of(1))
    with pytest.raises(RemoteProtocolError, match="does not verify"):
        Delta.decode(forged.encode())


def test_domain_separation_a_run_signature_is_no_delta_signature():
    signed = DELTA_.signed
    wrong = sign(key_of(0).seed, RUN, signed.header_bytes)
    with pytest.raises(RemoteProtocolError, match="does not verify"):
        SignedHeader.read(signed.header_bytes, wrong)


def test_another_payload_under_a_signed_header_is_refused():
    signed = DELTA_.signed
    with pytest.raises(RemoteProtocolError, match="not the one that was signed"):
        Delta.decode(pack(signed.header_bytes, signed.signature, OTHER.payload))


def test_a_header_of_another_payload_is_our_own_bug():
    with pytest.raises(ValueError, match="another payload"):
        Delta.make(DELTA_.header, OTHER.payload, signer(0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"run_id": bytes(31)},
        {"round": -1},
        {"round": (1 << 31) + 1},
        {"round": True},
        {"round": 1.0},
        {"origin": ""},
        {"origin": peer_of(0) + " "},
        {"origin": "x" * 65},
        {"origin": b"raw"},
        {"mechanism": "x" * 17},
        {"mechanism": "s\nvt"},
        {"spent_nano_rho": -1},
        {"spent_nano_rho": 1 << 63},
        {"releases": None},
        {"num_released": (1 << 30) + 1},
        {"ledger_head": b""},
    ],
)
def test_a_header_out_of_its_bounds_is_refused_though_its_origin_signed_it(wrong):
    data = replace(DELTA_.header, **wrong).encode()
    with pytest.raises(RemoteProtocolError):
        SignedHeader.read(data, signer(0)(data))


def test_a_long_header_is_refused_before_it_is_decoded():
    with pytest.raises(RemoteProtocolError, match="too long"):
        Header.decode(bytes(1025))


def test_a_proof_does_not_depend_on_who_saw_which_first():
    assert Proof.of(OTHER.signed, DELTA_.signed) == PROOF


@pytest.mark.parametrize(
    "other",
    [DELTA_, NET.delta(RUN_, 4, 0), NET.delta(RUN_, 3, 1), NET.delta(RUN_, 3, 0, run_id=bytes(32))],
    ids=["the same", "another round", "another origin", "another run"],
)
def test_headers_that_do_not_contradict_each_other_prove_nothing(other):
    with pytest.raises(RemoteProtocolError, match="do not contradict"):
        Proof.of(DELTA_.signed, other.signed)
    parts = [p for s in (DELTA_.signed, other.signed) for p in (s.header_bytes, s.signature)]
    with pytest.raises(RemoteProtocolError, match="do not contradict"):
        Proof.decode(pack(*parts))
