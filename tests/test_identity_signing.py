"""Signatures over exact bytes; one format never passes for another."""

from __future__ import annotations

import pytest
from consortium import STEWARD_SEEDS, Consortium, signed
from hypothesis import given
from hypothesis import strategies as st

from p2pfed.errors import FactRejected
from p2pfed.identity.keys import NodeKey
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import check_signed_run
from p2pfed.identity.signing import (
    DELTA,
    MAX_SIGNED_BYTES,
    ROSTER,
    RUN,
    SignedDocument,
    fact_hash,
    sign,
    verifies,
)

SEED = STEWARD_SEEDS[0]
PUBLIC = NodeKey(SEED).public_key
FORMATS = [DELTA, ROSTER, RUN]


@pytest.mark.parametrize("made", FORMATS)
@pytest.mark.parametrize("shown", FORMATS)
def test_domain_separation_a_signature_is_of_one_format(made, shown):
    assert verifies(PUBLIC, shown, b"text", sign(SEED, made, b"text")) == (made == shown)


def test_domain_separation_a_roster_signature_never_verifies_as_a_run():
    net = Consortium()
    payload = net.run_draft().encode()
    with pytest.raises(FactRejected, match="not signed by 2"):
        check_signed_run(signed(payload, 0, 1, person=ROSTER), net.roster)
    assert check_signed_run(signed(payload, 0, 1, person=RUN), net.roster).name == "a run"


def test_domain_separation_a_run_signature_never_verifies_as_a_roster():
    net = Consortium()
    payload = net.roster.next().encode()
    document = SignedDocument.parse(signed(payload, 0, 1, 2, person=RUN))
    assert not net.roster.enough_signatures(document)


@given(st.binary(min_size=1, max_size=80), st.data())
def test_bytes_altered_by_one_bit_do_not_verify(payload, data):
    signature = sign(SEED, RUN, payload)
    bit = data.draw(st.integers(0, 8 * (len(payload) + len(signature)) - 1))
    altered = bytearray(payload + signature)
    altered[bit // 8] ^= 1 << bit % 8
    payload_, signature_ = bytes(altered[: len(payload)]), bytes(altered[len(payload) :])
    assert verifies(PUBLIC, RUN, payload, signature)
    assert not verifies(PUBLIC, RUN, payload_, signature_)


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(32), bytes(33), b"\x01" + bytes(31)])
@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65)])
def test_keys_and_signatures_that_are_none_do_not_verify(key, signature):
    assert not verifies(key, RUN, b"text", signature)


def test_a_steward_who_signs_twice_counts_once():
    net = Consortium()
    payload = net.roster.next().encode()
    twice = SignedDocument(payload).signed_by(SEED, ROSTER).signed_by(SEED, ROSTER)
    assert len(twice.signatures) == 1
    pair = twice.signatures[0]
    doubled = SignedDocument(payload, (pair, pair, pair))
    assert len(doubled.signers(ROSTER)) == 1
    assert not net.roster.enough_signatures(doubled)


def test_signatures_of_strangers_do_not_count():
    net = Consortium()
    document = SignedDocument(net.roster.next().encode())
    for seed in (SEED, *STEWARD_SEEDS[3:]):
        document = document.signed_by(seed, ROSTER)
    assert len(document.signers(ROSTER)) == 3
    assert not net.roster.enough_signatures(document)


@given(st.binary(max_size=200).map(lambda b: b.replace(b"\n", b" ")), st.sets(st.integers(0, 4)))
def test_a_document_reads_back_as_it_was_written(payload, by):
    document = SignedDocument(payload)
    for i in sorted(by):
        document = document.signed_by(STEWARD_SEEDS[i], RUN)
    again = SignedDocument.parse(document.encode())
    assert again == document
    assert len(again.signers(RUN)) == len(by)


@pytest.mark.parametrize(
    "tail",
    [
        b"x\n",
        b"\n",
        b"00 11 22\n",
        b"zz zz\n",
        b"\xff \xff\n",
        b"00\n",
    ],
)
def test_a_malformed_signature_line_is_refused(tail):
    with pytest.raises(FactRejected, match="malformed"):
        SignedDocument.parse(b"{}\n-- p2pfed signatures --\n" + tail)


def test_a_document_that_is_too_long_is_refused_before_it_is_read():
    with pytest.raises(FactRejected, match="at most"):
        SignedDocument.parse(b" " * (MAX_SIGNED_BYTES + 1))


def test_too_many_signatures_are_refused():
    line = b"00" * 32 + b" " + b"00" * 64 + b"\n"
    with pytest.raises(FactRejected, match="more than 64"):
        SignedDocument.parse(b"{}\n-- p2pfed signatures --\n" + line * 65)


def test_the_name_of_a_fact_is_the_hash_of_its_bytes():
    net = Consortium()
    assert net.roster.hash == fact_hash(SignedDocument.parse(net.signed[-1]).payload)
    assert Roster.decode(net.roster.encode()).hash == net.roster.hash
