"""Strict reading: what stewards signed is what counts, or nothing does."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from consortium import Consortium
from fair_clock import FairClock
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import FactRejected
from p2pfed.identity.fields import Fields, read_payload
from p2pfed.identity.roster import Roster
from p2pfed.identity.run import Run

NET = Consortium()
RUN = json.loads(NET.run().encode())
ROSTER = json.loads(NET.roster.encode())


def altered(document, *path_and_value):
    """The document with one place replaced, as bytes."""
    *path, value = path_and_value
    copy = json.loads(json.dumps(document))
    place = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(copy).encode()


@pytest.mark.parametrize("key", sorted(RUN))
def test_a_run_without_one_of_its_keys_is_refused(key):
    with pytest.raises(FactRejected, match=key if key != "type" else "is not a"):
        Run.decode(json.dumps({k: v for k, v in RUN.items() if k != key}).encode())


@pytest.mark.parametrize("key", sorted(ROSTER))
def test_a_roster_without_one_of_its_keys_is_refused(key):
    with pytest.raises(FactRejected, match=key if key != "type" else "is not a"):
        Roster.decode(json.dumps({k: v for k, v in ROSTER.items() if k != key}).encode())


@pytest.mark.parametrize(
    "data",
    [
        altered(RUN, "surprise", 1),
        altered(RUN, "outer", 0, "surprise", 1),
        altered(ROSTER, "surprise", 1),
        altered(ROSTER, "members", 0, "surprise", 1),
        altered(ROSTER, "stewards", 0, "surprise", 1),
    ],
)
def test_an_unknown_key_is_refused_by_name(data):
    kind = Run if b"p2pfed.run" in data else Roster
    with pytest.raises(FactRejected, match="unknown key 'surprise'"):
        kind.decode(data)


@pytest.mark.parametrize("kind", [Run, Roster])
def test_a_doubled_key_is_refused(kind):
    payload = (NET.run() if kind is Run else NET.roster).encode()
    doubled = payload.replace(b'"type"', b'"type": "x", "type"', 1)
    with pytest.raises(FactRejected, match=r"stands twice|is not a"):
        kind.decode(doubled)


@pytest.mark.parametrize("wrong", [True, False, 1.0, "1", None, [], {}, -1, 0, 10**30])
@pytest.mark.parametrize("key", ["num_parameters", "rounds", "grid_bits", "block_size"])
def test_only_an_integer_in_range_is_an_integer(key, wrong):
    with pytest.raises(FactRejected, match=key):
        Run.decode(altered(RUN, key, wrong))


@pytest.mark.parametrize("wrong", [True, "0.5", None, [], -0.1, 1.1, 10**400])
def test_only_a_number_in_range_is_a_number(wrong):
    with pytest.raises(FactRejected, match="quorum"):
        Run.decode(altered(RUN, "quorum", wrong))


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_what_is_not_finite_is_no_number(text):
    payload = json.dumps(RUN | {"quorum": 12345}).encode().replace(b"12345", text)
    with pytest.raises(FactRejected):
        Run.decode(payload)


@pytest.mark.parametrize(
    "wrong",
    [0.5, 1, True, None, "", "x", "nan", "inf", "-1", "2", "1/2", " 0.5", "1_0", "\u0660.\u0665"],
)
def test_only_a_quoted_decimal_in_range_is_an_exact_number(wrong):
    with pytest.raises(FactRejected, match="select_share"):
        Run.decode(altered(RUN, "select_share", wrong))


@pytest.mark.parametrize("bomb", ["1e-999999999", "1e999999999", "0e-99999999"])
def test_an_exponent_bomb_is_refused_at_once(bomb):
    clock = FairClock()
    with pytest.raises(FactRejected, match="select_share"):
        Run.decode(altered(RUN, "select_share", bomb))
    assert clock.within(0.2)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.floats(1e-90, 1e15) | st.just(0.0))
def test_every_decimal_that_we_write_is_read_exactly(value):
    fields = Fields({"x": repr(value)}, "test")
    assert fields.fraction("x", low=Fraction(0), high=Fraction(10**16)) == Fraction(repr(value))


@pytest.mark.parametrize(
    "wrong", [None, 5, "", "00" * 31, "00" * 33, "AB" * 32, "zz" * 32, " " * 64]
)
def test_only_64_lower_case_hex_digits_are_a_hash(wrong):
    with pytest.raises(FactRejected, match="task_id"):
        Run.decode(altered(RUN, "task_id", wrong))


@pytest.mark.parametrize("wrong", [None, 5, "", "x" * 65, "a\nb", "a\u202eb", "\ud800", "\x1b[2J"])
def test_only_short_printable_text_is_a_name(wrong):
    with pytest.raises(FactRejected, match="name"):
        Run.decode(altered(RUN, "name", wrong))


@pytest.mark.parametrize(
    "wrong", [None, "train", ["train", "train"], ["boss"], [["train"]], [None]]
)
def test_only_distinct_known_roles_are_roles(wrong):
    with pytest.raises(FactRejected, match="roles"):
        Roster.decode(altered(ROSTER, "members", 0, "roles", wrong))


@pytest.mark.parametrize("wrong", [None, {}, "x", [1], [[]], [None], 5])
def test_only_a_list_of_objects_is_a_list_of_members(wrong):
    with pytest.raises(FactRejected):
        Roster.decode(altered(ROSTER, "members", wrong))


@pytest.mark.parametrize(
    "wrong", ["", "soon", "2027-01-01", "2027-02-30T00:00:00Z", "2027-01-01T00:00:00+00:00"]
)
def test_only_a_utc_moment_is_an_expiry(wrong):
    with pytest.raises(FactRejected, match="expires"):
        Roster.decode(altered(ROSTER, "expires", wrong))


@pytest.mark.parametrize("wrong", ["sgd", None, [], 1])
def test_an_unknown_choice_is_refused(wrong):
    with pytest.raises(FactRejected, match="robust"):
        Run.decode(altered(RUN, "robust", wrong))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b'"p2pfed.run/1"',
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"type": ' + b"9" * 10_000 + b"}",
        b'{"type": "p2pfed.roster/1"}',
        json.dumps(RUN).encode("utf-16"),
        json.dumps(RUN).encode("utf-8-sig"),
    ],
)
def test_what_is_not_this_document_is_refused(payload):
    with pytest.raises(FactRejected):
        read_payload(payload, "p2pfed.run/1")


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(data):
    for kind in (Run, Roster):
        with pytest.raises(FactRejected):
            kind.decode(data)
