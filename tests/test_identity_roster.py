"""Rosters, and which of them a node believes."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from dataclasses import replace

import pytest
from consortium import EXPIRES, Consortium, founded, hospital, peer_of, signed, steward
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import FactRejected
from p2pfed.identity.book import RosterBook
from p2pfed.identity.roster import Member, Revocation, Roster
from p2pfed.identity.signing import SignedDocument


def held(book: RosterBook) -> int:
    return book.current.version if book.current is not None else 0


# --- one document ------------------------------------------------------------------------------


def test_a_roster_reads_back_as_it_was_written():
    net = Consortium(3)
    draft = net.roster.revoke(peer_of(1), reason="sold", from_round=7)
    again = Roster.decode(draft.encode())
    assert again == draft
    assert [m.name for m in again.members] == ["h0", "h2"]
    assert again.revoked == (Revocation(peer_of(1), "sold", 7),)


def test_the_network_id_is_the_hash_of_the_first_roster():
    net = Consortium(2)
    assert net.rosters[0].network_id == net.rosters[0].hash
    assert {r.network_id for r in net.rosters} == {net.rosters[0].hash}
    assert net.book().network_id == net.rosters[0].hash
    assert net.rosters[1].previous == net.rosters[0].hash


def test_the_first_roster_cannot_claim_another_network():
    payload = json.loads(founded().encode())
    payload["network_id"] = "11" * 32
    with pytest.raises(FactRejected, match="network"):
        Roster.decode(json.dumps(payload).encode())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"members": [hospital(0), hospital(0, name="other")]}, "peer id stands twice"),
        ({"members": [hospital(0), hospital(1, name="h0")]}, "member name stands twice"),
        ({"stewards": [steward(0), replace(steward(0), name="x")]}, "steward key stands twice"),
        ({"stewards": [steward(0)]}, "threshold is 2 of 1"),
        ({"threshold": 4}, "threshold is 4 of 3"),
        ({"revoked": [Revocation(peer_of(0), "x", 0)]}, "both a member and revoked"),
    ],
)
def test_a_roster_that_contradicts_itself_is_neither_made_nor_read(change, told):
    draft = Consortium(2).roster.next(**change)
    with pytest.raises(FactRejected, match=told):
        draft.encode()


@pytest.mark.parametrize("version", [1, 2])
def test_only_the_first_roster_has_no_previous_one(version):
    net = Consortium(2)
    wrong = {1: {"previous": "11" * 32}, 2: {"previous": "00" * 32}}[version]
    payload = json.loads(net.rosters[version - 1].encode()) | wrong
    with pytest.raises(FactRejected, match="previous"):
        Roster.decode(json.dumps(payload).encode())


def test_only_a_member_can_be_revoked():
    with pytest.raises(FactRejected, match="not a member"):
        Consortium(2).roster.revoke(peer_of(9), reason="x", from_round=0)


@pytest.mark.parametrize(
    ("member", "trains"),
    [
        (Member("a", "p", ("train",), 1), True),
        (Member("a", "p", ("train", "relay"), 1), True),
        (Member("a", "p", ("relay", "bootstrap"), 1), False),
        (Member("a", "p", (), 1), False),
        (Member("a", "p", ("train",), 0), False),
    ],
)
def test_only_the_role_train_with_samples_has_weight(member, trains):
    assert member.trains == trains


def test_a_roster_expires_at_its_moment():
    roster = founded()
    assert not roster.is_expired(EXPIRES - dt.timedelta(seconds=1))
    assert roster.is_expired(EXPIRES)


# --- believing -------------------------------------------------------------------------------


def test_k_of_n_one_signature_of_three_is_not_enough():
    net = Consortium(2)
    draft = net.roster.next(members=[hospital(0)])
    for by in ([0], [1], [2], [3, 4], [0, 3]):
        with pytest.raises(FactRejected, match="not signed by 2"):
            net.book().add(signed(draft.encode(), *by))


@pytest.mark.parametrize("by", [(0, 1), (0, 2), (1, 2), (0, 1, 2), (2, 4, 1)])
def test_k_of_n_any_two_of_three_are_enough(by):
    net = Consortium(2)
    book = net.book()
    assert book.add(signed(net.roster.next().encode(), *by)) is not None
    assert held(book) == 3


def test_an_unsigned_roster_is_refused():
    net = Consortium(2)
    with pytest.raises(FactRejected, match="not signed"):
        net.book().add(net.roster.next().encode())
    with pytest.raises(FactRejected, match="not signed"):
        RosterBook().add(founded().encode())


def test_the_version_only_grows():
    net = Consortium(2)
    old = net.roster.next(members=[hospital(0)])
    net.grow(hospital(5))
    net.grow(hospital(6))
    book = net.book()
    with pytest.raises(FactRejected, match=r"not newer|does not follow"):
        book.add(signed(old.encode()))
    assert held(book) == 4


def test_a_second_roster_of_one_version_is_refused():
    net = Consortium(2)
    one, other = net.roster.next(), net.roster.next(members=[hospital(9)])
    book = net.book()
    book.add(signed(one.encode()))
    with pytest.raises(FactRejected, match="not newer"):
        book.add(signed(other.encode()))


def test_a_roster_on_top_of_an_unknown_fork_is_refused():
    net = Consortium(2)
    fork = Roster.decode(net.roster.next(members=[hospital(9)]).encode())
    net.grow(hospital(5))
    book = net.book()
    with pytest.raises(FactRejected, match="does not follow") as told:
        book.add(signed(fork.next().encode()))
    assert "v4 and v5; the second is believed here" in told.value.do
    fourth = Roster.decode(fork.next().encode())
    assert book.add(signed(fourth.next().encode())) is not None  # and with it, by hash, the fork
    assert book.add(signed(fourth.encode())) is not None
    assert book.add(signed(fork.encode())) is not None


def test_rotation_needs_k_of_the_old_set_and_of_the_new():
    net = Consortium(2)
    new = [steward(i) for i in (2, 3, 4)]
    payload = net.roster.next(stewards=new).encode()
    for by in ([3, 4], [2, 3, 4], [0, 1], [0, 1, 3], [0, 3, 4]):
        with pytest.raises(FactRejected, match="not signed by 2"):
            net.book().add(signed(payload, *by))
    for by in ([0, 1, 3, 4], [0, 2, 4], [1, 2, 3]):
        assert net.book().add(signed(payload, *by)) is not None


def test_after_a_rotation_the_old_stewards_can_sign_nothing():
    net = Consortium(2)
    net.publish(net.roster.next(stewards=[steward(i) for i in (2, 3, 4)]), 0, 1, 3, 4)
    payload = net.roster.next().encode()
    with pytest.raises(FactRejected, match="not signed by 2"):
        net.book().add(signed(payload, 0, 1))
    assert net.book().add(signed(payload, 3, 4)) is not None


def test_a_skipped_rotation_is_not_believed_until_the_step_between_arrives():
    net = Consortium(2)
    net.publish(net.roster.next(stewards=[steward(i) for i in (2, 3, 4)]), 0, 1, 3, 4)
    net.publish(net.roster.next(), 3, 4)
    book = net.book(1, 2)
    with pytest.raises(FactRejected, match="v2's stewards"):
        book.add(net.signed[3])
    book.add(net.signed[2])
    book.add(net.signed[3])
    assert held(book) == 4


def test_another_network_is_refused():
    ours, theirs = Consortium(2), Consortium(2, network="another network")
    for book in (ours.book(), RosterBook(ours.rosters[0].hash)):
        with pytest.raises(FactRejected, match="of the network"):
            book.add(theirs.signed[-1])
        with pytest.raises(FactRejected, match="of the network"):
            book.add(theirs.signed[0])


def test_backfill_an_ancestor_is_believed_because_a_held_roster_names_it():
    net = Consortium(2)
    net.grow(hospital(5))
    book = net.book(3)
    assert book.missing == {net.rosters[1].hash}
    book.add(net.signed[1])
    book.add(net.signed[0])
    assert book.missing == frozenset()
    assert book.hashes == {r.hash for r in net.rosters}
    assert held(book) == 3


def test_whatever_is_believed_is_restored_an_ancestor_without_its_signatures_is_not_believed():
    """Its hash does not cover them: a peer could keep this node from ever starting again."""
    net = Consortium(2)
    book = RosterBook()
    book.add(net.signed[1])
    bare = net.rosters[0].encode()
    for stripped in (bare, SignedDocument(bare).encode(), signed(bare, 0)):
        with pytest.raises(FactRejected, match="its own"):
            book.add(stripped)
    assert book.missing == {net.rosters[0].hash}
    book.add(net.signed[0])
    again = RosterBook()
    for roster_hash in sorted(book.hashes):
        again.restore(book.signed(roster_hash) or b"")
    assert again.hashes == book.hashes


def test_what_is_held_already_is_no_news():
    net = Consortium(2)
    book = net.book()
    assert book.add(net.signed[0]) is None
    assert book.check(net.signed[1]) is None


def test_looking_changes_nothing():
    net = Consortium(2)
    book = net.book(1)
    assert book.check(net.signed[1]) is not None
    assert held(book) == 1
    assert book.get(net.rosters[1].hash) is None


def test_what_is_refused_changes_nothing():
    net = Consortium(2)
    book = net.book()
    before = (book.hashes, book.current, book.network_id)
    for wrong in (b"", b"{}", net.roster.next().encode(), Consortium(1, network="x").signed[1]):
        with pytest.raises(FactRejected):
            book.add(wrong)
    assert (book.hashes, book.current, book.network_id) == before


@settings(max_examples=15)
@given(st.permutations(range(5)))
def test_the_order_in_which_rosters_come_does_not_matter(order):
    """Offered again and again, as peers do, every version is believed in the end."""
    net = Consortium(2)
    for i in range(3):
        net.grow(hospital(5 + i))
    book = RosterBook(net.rosters[0].hash)
    for version in order * len(order):
        try:
            book.add(net.signed[version])
        except FactRejected:
            assert book.get(net.rosters[version].hash) is None
    assert book.hashes == {r.hash for r in net.rosters}
    assert book.current == net.roster


# --- after a restart ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_what_was_believed_is_restored_in_any_order(order):
    net = Consortium(2)
    net.publish(net.roster.next(stewards=[steward(i) for i in (2, 3, 4)]), 0, 1, 3, 4)
    book = RosterBook(net.rosters[0].hash)
    for version in order:
        book.restore(net.signed[version])
    assert book.hashes == {r.hash for r in net.rosters}
    assert book.current == net.roster


def test_a_damaged_or_foreign_file_is_not_restored():
    net = Consortium(2)
    book = RosterBook(net.rosters[0].hash)
    for wrong in (
        net.signed[1].replace(b'"h0"', b'"h7"'),
        net.rosters[1].encode(),
        net.signed[1][:100],
        Consortium(2, network="x").signed[1],
    ):
        with pytest.raises(FactRejected):
            book.restore(wrong)
    assert book.current is None
