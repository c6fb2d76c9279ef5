"""Invites and requests: what is read back, what is told as a typo, and what does not verify."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import re
import stat
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import ConfigError, FactRejected, PolicyError
from p2pfed.identity.invite import Invite, Request
from p2pfed.identity.invited import Invited, check_first_roster
from p2pfed.identity.keys import NodeKey, StewardKey, peer_id_of
from p2pfed.identity.roster import Member, Roster, Steward
from p2pfed.identity.signing import ROSTER, SignedDocument, sign

NOW = dt.datetime(2026, 11, 28, 23, 10, tzinfo=dt.UTC)
ANA = StewardKey(bytes([1]) * 32)
EVE = StewardKey(bytes([66]) * 32)
NODE = NodeKey(bytes([2]) * 32)
ST_ANNA = Member("St Anna", NODE.peer_id, ("train",), 1)


def invite(key: StewardKey = ANA, **changes) -> Invite:
    about = {
        "network_id": bytes([7]) * 32,
        "network": "cardio",
        "name": "St Anna ü",
        "number": bytes(range(8)),
        "expires": NOW + dt.timedelta(days=7),
    }
    return Invite.make(key, **{**about, **changes})


def answer(to: Invite, key: NodeKey = NODE, **changes) -> Request:
    about = {"samples": 120, "roles": ("relay", "train"), "addresses": ("/dns4/a.org/tcp/4201",)}
    return Request.make(to, key.seed, key.public_key, **{**about, **changes})


# --- lines -------------------------------------------------------------------------------------


def test_an_invite_is_read_back_and_fits_a_mail():
    made = invite()
    line = made.encode()
    assert Invite.parse(line) == made
    assert re.fullmatch(r"p2pfed1-[a-z2-7]+", line)
    assert len(line) < 320


def test_a_request_is_read_back():
    made = answer(invite())
    assert Request.parse(made.encode()) == made
    assert made.peer_id == NODE.peer_id
    assert made.roles == ("train", "relay")


def test_mail_may_break_a_line_quote_it_and_change_its_capitals():
    line = invite().encode()
    broken = "\r\n".join(f"> {line[i : i + 60]}" for i in range(0, len(line), 60))
    assert Invite.parse(f"  {broken.upper()}\n") == invite()


@given(st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_every_single_typo_is_told_as_a_typo(data):
    line = invite().encode()
    at = data.draw(st.integers(len("p2pfed1-"), len(line) - 1))
    letter = data.draw(
        st.sampled_from("abcdefghijklmnopqrstuvwxyz234567189").filter(line[at].__ne__)
    )
    with pytest.raises(ConfigError, match="typo in the invite"):
        Invite.parse(line[:at] + letter + line[at + 1 :])


def test_a_line_that_was_cut_or_doubled_is_told_as_a_typo():
    line = answer(invite()).encode()
    for wrong in (line[:-1], line[: len(line) // 2], line + "a", "p2pfedreq1-", "p2pfedreq1-aa"):
        with pytest.raises(ConfigError, match="typo in the request"):
            Request.parse(wrong)


def test_an_invite_in_the_place_of_a_request_is_named():
    with pytest.raises(ConfigError, match="this is an invite, no request"):
        Request.parse(invite().encode())
    with pytest.raises(ConfigError, match="this is a request, no invite"):
        Invite.parse(answer(invite()).encode())
    for text in ("", "anna.invite", "x" * 100_000, "p2pfed1-" + "a" * 100_000):
        with pytest.raises(ConfigError, match="is no invite"):
            Invite.parse(text)


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_bytes_that_a_stranger_made_with_a_right_checksum_are_one_of_our_errors(data):
    check = hashlib.blake2b(data, digest_size=4, person=b"p2pfed-typo").digest()
    letters = base64.b32encode(data + check).decode().rstrip("=").lower()
    for kind, prefix in ((Invite, "p2pfed1-"), (Request, "p2pfedreq1-")):
        with pytest.raises((ConfigError, FactRejected)):
            kind.parse(prefix + letters)


def test_a_line_of_another_version_says_so():
    line = invite().encode()
    raw = _bytes_of(line, "p2pfed1-")
    newer = b"\x02" + raw[1:-4]
    with pytest.raises(ConfigError, match="another version"):
        Invite.parse("p2pfed1-" + _letters(newer))


def _bytes_of(line: str, prefix: str) -> bytes:
    letters = line.removeprefix(prefix).upper()
    return base64.b32decode(letters + "=" * (-len(letters) % 8))


def _letters(data: bytes) -> str:
    check = hashlib.blake2b(data, digest_size=4, person=b"p2pfed-typo").digest()
    return base64.b32encode(data + check).decode().rstrip("=").lower()


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "ü" * 64 + "x", "\ud800", "𝄞" * 64])
def test_a_name_that_no_roster_takes_makes_no_invite(name):
    with pytest.raises(ConfigError, match="the name"):
        invite(name=name).encode()


# --- invites -----------------------------------------------------------------------------------


def test_every_byte_of_an_invite_is_under_the_stewards_signature():
    raw = _bytes_of(invite().encode(), "p2pfed1-")[:-4]
    for at in range(1, len(raw)):
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        with pytest.raises((FactRejected, ConfigError)):
            Invite.parse("p2pfed1-" + _letters(changed))


def test_a_secret_follows_from_key_and_number_and_shows_in_no_repr():
    assert invite().secret == invite(name="other").secret
    assert invite().secret != invite(number=bytes(8)).secret
    assert invite().secret != invite(EVE).secret
    assert repr(invite().secret) not in repr(invite())
    assert len(invite().secret) == 20


def test_the_fingerprint_is_the_network_and_the_steward_and_nothing_else():
    assert re.fullmatch(r"\d{4}( \d{4}){5}", invite().fingerprint)
    assert invite().fingerprint == invite(name="other", number=bytes(8)).fingerprint
    assert invite().fingerprint != invite(EVE).fingerprint
    assert invite().fingerprint != invite(network_id=bytes(32)).fingerprint


def test_an_invite_ends_and_says_what_this_machines_clock_shows():
    invite().check_date(NOW + dt.timedelta(days=7, seconds=-1))
    with pytest.raises(PolicyError) as told:
        invite().check_date(NOW + dt.timedelta(days=7))
    assert "2026-12-05 23:10 UTC" in told.value.what
    assert "clock shows 2026-12-05 23:10 UTC" in told.value.why
    assert told.value.do


# --- requests ----------------------------------------------------------------------------------


def test_a_request_answers_its_own_invite_and_no_other():
    answer(invite()).check(invite())
    for other in (
        invite(number=bytes(8)),
        invite(network_id=bytes(32)),
        invite(EVE),
        invite(name="other"),
        invite(expires=NOW),
    ):
        with pytest.raises(FactRejected, match="does not answer the invite"):
            answer(invite()).check(other)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 121},
        {"roles": ("train",)},
        {"name": "St Anne"},
        {"addresses": ()},
        {"public_key": EVE.public_key},
        {"number": bytes(8)},
        {"proof": bytes(32)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_request_that_was_changed_on_its_way_is_refused(change):
    changed = Request.parse(replace(answer(invite()), **change).encode())
    with pytest.raises(FactRejected, match="does not answer"):
        changed.check(invite())


def test_who_knows_the_secret_cannot_ask_in_the_name_of_another_node():
    made = answer(invite())
    stolen = replace(made, public_key=EVE.public_key)
    proven = replace(stolen, proof=stolen._proof(invite()))
    with pytest.raises(FactRejected, match="not signed by the node"):
        proven.check(invite())


def test_who_knows_the_secret_cannot_ask_under_another_name():
    mine = invite()
    request = Request.make(
        replace(mine, name="Other"), NODE.seed, NODE.public_key, samples=1, roles=("train",)
    )
    renamed = replace(request, proof=b"", signature=b"")
    proof = renamed._proof(mine)
    signature = sign(NODE.seed, b"p2pfed-request", renamed._told(mine, proof))
    with pytest.raises(FactRejected, match="the request is of Other, the invite is for St Anna"):
        replace(renamed, proof=proof, signature=signature).check(mine)


def test_the_number_read_over_the_phone_is_another_for_every_change():
    first = answer(invite())
    others = [
        answer(invite(), NodeKey(bytes([3]) * 32)),
        answer(invite(), samples=121),
        answer(invite(number=bytes(8))),
    ]
    numbers = {request.fingerprint for request in [first, *others]}
    assert len(numbers) == 4
    assert first.fingerprint == Request.parse(first.encode()).fingerprint


@pytest.mark.parametrize(
    "wrong",
    [{"samples": -1}, {"samples": (1 << 20) + 1}, {"addresses": ("/dns4/a/tcp/1",) * 5}],
)
def test_a_request_that_no_roster_takes_is_not_made(wrong):
    with pytest.raises(ConfigError):
        answer(invite(), **wrong)


# --- the first roster ----------------------------------------------------------------------------


def roster(*signers: StewardKey, stewards=(ANA,), members=()) -> bytes:
    """Version 2 of a network founded by Ana, signed by these."""
    founder = [Steward("ana", ANA.public_key)]
    later = NOW + dt.timedelta(days=300)
    first = Roster.decode(
        Roster.found("cardio", stewards=founder, threshold=1, expires=later).encode()
    )
    draft = first.next(
        members=members, stewards=[Steward(f"s{i}", k.public_key) for i, k in enumerate(stewards)]
    )
    document = SignedDocument(draft.encode())
    for key in signers:
        document = document.signed_by(key.seed, ROSTER)
    return document.encode()


def network_id() -> bytes:
    return Roster.decode(SignedDocument.parse(roster()).payload).network_id


def test_an_invited_node_takes_the_first_roster_that_the_inviting_steward_signed(tmp_path):
    Invited("cardio", network_id(), ANA.public_key).write(tmp_path)
    assert stat.S_IMODE((tmp_path / "invited.json").stat().st_mode) == 0o600
    check_first_roster(tmp_path, roster(ANA, members=[ST_ANNA]), NODE.peer_id)


def test_an_older_roster_which_does_not_list_the_node_is_refused(tmp_path):
    # Stewards who were put out since could sign what follows it.
    Invited("cardio", network_id(), ANA.public_key).write(tmp_path)
    other = Member("Other", peer_id_of(bytes(32)), ("train",), 1)
    for members in ([], [other]):
        with pytest.raises(FactRejected, match="does not list this node"):
            check_first_roster(tmp_path, roster(ANA, members=members), NODE.peer_id)


def test_a_forged_roster_that_claims_the_network_is_refused(tmp_path):
    Invited("cardio", network_id(), ANA.public_key).write(tmp_path)
    forged = roster(EVE, stewards=(EVE,))
    assert Roster.decode(SignedDocument.parse(forged).payload).network_id == network_id()
    with pytest.raises(FactRejected, match="signature of who invited"):
        check_first_roster(tmp_path, forged, NODE.peer_id)


def test_the_roster_of_another_network_is_refused(tmp_path):
    Invited("cardio", bytes(32), ANA.public_key).write(tmp_path)
    with pytest.raises(FactRejected, match="another network"):
        check_first_roster(tmp_path, roster(ANA), NODE.peer_id)


def test_a_node_without_an_invite_takes_any_first_roster(tmp_path):
    check_first_roster(tmp_path, b"whatever", NODE.peer_id)
    assert Invited.read(tmp_path) is None


def test_a_damaged_memory_of_the_invite_takes_no_roster(tmp_path):
    (tmp_path / "invited.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot read"):
        check_first_roster(tmp_path, roster(ANA), NODE.peer_id)
