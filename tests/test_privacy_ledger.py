"""The ledger: what it counts, what it refuses, and what survives damage. Real files throughout."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import (
    BudgetExhausted,
    ConfigError,
    LedgerCorrupt,
    P2PFedError,
    PrivacyError,
    StateInUse,
)
from p2pfed.privacy.accountant import Budget, Cost, epsilon_spent
from p2pfed.privacy.journal import Journal
from p2pfed.privacy.ledger import Ledger
from p2pfed.privacy.records import DataSetId, ReleaseKey

BUDGET = Budget(3.0, 1e-5)
CAP = BUDGET.rho_nano
PATIENTS = [b"patient %d" % i for i in range(20)]


def key(number, run=b"run"):
    return ReleaseKey(run, number)


def pay(ledger, dataset, number, rho_nano=CAP // 4, budget=BUDGET, run=b"run", **changes):
    cost = Cost(rho_nano, None) if rho_nano else Cost.nothing()
    terms = {"mechanism": "svt", "unit": "patient", "relation": "zero-out", "cost": cost, **changes}
    return ledger.debit(dataset, key=key(number, run), budget=budget, **terms)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger"


@pytest.fixture
def ledger(path):
    with Ledger.open(path) as opened:
        yield opened


def test_debits_and_outputs_survive_reopening(path):
    with Ledger.open(path) as ledger:
        dataset = ledger.register("heart", PATIENTS)
        stored = ledger.store_output(pay(ledger, dataset, 1), b"noisy")
        pay(ledger, dataset, 2)
        before = ledger.spent(dataset, delta=1e-5), ledger.entries()
    with Ledger.open(path) as ledger:
        assert ledger.register("heart", reversed(PATIENTS)) == dataset
        assert (ledger.spent(dataset, delta=1e-5), ledger.entries()) == before
        assert ledger.output(key(1)) == stored
        assert ledger.output(key(2)) is None
    spent = before[0]
    assert (spent.rho_nano, spent.debits, spent.releases) == (2 * (CAP // 4), 2, 1)
    assert spent.epsilon == epsilon_spent({Cost(CAP // 4, None): 2}, 1e-5)
    assert stored.payload == b"noisy"
    assert stored.spent.rho_nano == CAP // 4
    assert stored.spent.head != spent.head
    assert len(spent.head) == 32


def test_the_budget_is_never_passed_and_a_refusal_writes_nothing(ledger):
    dataset = ledger.register("heart", PATIENTS)
    for number in range(4):
        pay(ledger, dataset, number)
    before = ledger.entries()
    with pytest.raises(BudgetExhausted, match="epsilon"):
        pay(ledger, dataset, 4)
    assert ledger.entries() == before
    assert ledger.spent(dataset, delta=BUDGET.delta).epsilon <= BUDGET.epsilon


def test_the_last_nano_rho_can_be_spent(ledger):
    dataset = ledger.register("heart", PATIENTS)
    pay(ledger, dataset, 1, CAP)
    with pytest.raises(BudgetExhausted):
        pay(ledger, dataset, 2, 1)


def test_a_lower_budget_later_wins(ledger):
    dataset = ledger.register("heart", PATIENTS)
    pay(ledger, dataset, 1)
    with pytest.raises(BudgetExhausted):
        pay(ledger, dataset, 2, budget=Budget(1.0, 1e-5))
    pay(ledger, dataset, 2)


@pytest.mark.parametrize(
    "patients",
    [PATIENTS, [*PATIENTS, b"one more"], PATIENTS[1:], PATIENTS[:1], [b"x", b"y", PATIENTS[7]]],
    ids=["renamed", "one more", "one less", "one alone", "one among strangers"],
)
def test_another_name_run_mechanism_or_choice_of_patients_does_not_refill(ledger, patients):
    pay(ledger, ledger.register("heart", PATIENTS), 1, CAP)
    other = ledger.register("another name", patients)
    assert ledger.spent(other, delta=1e-5).rho_nano == CAP
    with pytest.raises(BudgetExhausted):
        pay(ledger, other, 1, 1, run=b"another run", mechanism="gaussian")


def test_moving_the_file_does_not_refill(path, tmp_path):
    with Ledger.open(path) as ledger:
        pay(ledger, ledger.register("heart", PATIENTS), 1, CAP)
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "renamed")
    with Ledger.open(moved) as ledger, pytest.raises(BudgetExhausted):
        pay(ledger, ledger.register("heart", PATIENTS), 2, 1)


def test_strangers_have_their_own_budget(ledger):
    pay(ledger, ledger.register("heart", PATIENTS), 1, CAP)
    strangers = ledger.register("heart", [b"a", b"b"])
    assert ledger.spent(strangers, delta=1e-5).rho_nano == 0
    pay(ledger, strangers, 2, CAP)
    both = ledger.register("merged", [*PATIENTS, b"a"])
    assert ledger.spent(both, delta=1e-5).rho_nano == 2 * CAP


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.sets(st.integers(0, 5), min_size=1), st.integers(1, CAP)), max_size=12)
)
def test_formal_guarantee_no_patient_ever_spends_more_than_the_budget(tmp_path_factory, requests):
    spent = dict.fromkeys(range(6), 0)
    with Ledger.open(tmp_path_factory.mktemp("ledger") / "ledger") as ledger:
        for number, (patients, rho_nano) in enumerate(requests):
            dataset = ledger.register("any", [PATIENTS[i] for i in patients])
            try:
                pay(ledger, dataset, number, rho_nano)
            except BudgetExhausted:
                continue
            for patient in patients:
                spent[patient] += rho_nano
            told = ledger.spent(dataset, delta=1e-5).rho_nano
            assert max(spent[patient] for patient in patients) <= told <= CAP
    assert max(spent.values()) <= CAP


def test_an_output_is_never_drawn_twice(ledger):
    dataset = ledger.register("heart", PATIENTS)
    debit = pay(ledger, dataset, 1)
    ledger.store_output(debit, b"first")
    with pytest.raises(PrivacyError, match="already"):
        ledger.store_output(debit, b"second")
    with pytest.raises(PrivacyError, match="already"):
        pay(ledger, dataset, 1)
    assert ledger.output(key(1)).payload == b"first"


def test_a_debit_without_output_stays_spent_and_a_new_draw_needs_a_new_one(ledger):
    dataset = ledger.register("heart", PATIENTS)
    lost, second = pay(ledger, dataset, 1), pay(ledger, dataset, 1)
    assert (lost.attempt, second.attempt) == (1, 2)
    with pytest.raises(PrivacyError, match="newer debit"):
        ledger.store_output(lost, b"late")
    ledger.store_output(second, b"drawn")
    spent = ledger.spent(dataset, delta=1e-5)
    assert (spent.debits, spent.releases, spent.rho_nano) == (2, 1, 2 * (CAP // 4))


def test_a_release_without_privacy_is_remembered(ledger):
    dataset = ledger.register("heart", PATIENTS)
    ledger.store_output(pay(ledger, dataset, 1, 0, mechanism="none"), b"raw")
    spent = ledger.spent(dataset, delta=1e-5)
    assert (spent.rho_nano, spent.releases, spent.unprotected) == (0, 1, 1)
    for rho_nano, mechanism in ((0, "svt"), (1, "none")):
        with pytest.raises(ValueError, match="does not fit"):
            pay(ledger, dataset, 2, rho_nano, mechanism=mechanism)


def test_unknown_and_empty_data_sets_are_refused(ledger):
    with pytest.raises(PrivacyError, match="not in this ledger"):
        pay(ledger, DataSetId(bytes(32)), 1)
    with pytest.raises(PrivacyError, match="not in this ledger"):
        ledger.spent(DataSetId(bytes(32)), delta=1e-5)
    with pytest.raises(PrivacyError, match="no patients"):
        ledger.register("empty", [])


def test_entries_show_neither_secret_nor_fingerprints(ledger):
    dataset = ledger.register("heart", PATIENTS)
    pay(ledger, dataset, 1)
    entries = ledger.entries()
    assert [entry.kind for entry in entries] == ["open", "register", "debit"]
    assert entries[2].detail["rho_nano"] == CAP // 4
    for entry in entries:
        assert not {"secret", "patients"} & set(entry.detail)
        assert ledger._secret.hex() not in str(entry)


def test_the_write_ahead_log_is_empty_after_every_record(path, ledger):
    """SQLite reads a damaged log as a shorter one: nothing may rest in it."""
    dataset = ledger.register("heart", PATIENTS)
    ledger.store_output(pay(ledger, dataset, 1), bytes(10_000))
    assert path.with_name("ledger-wal").stat().st_size == 0


def test_the_files_are_for_their_owner_only(path):
    with Ledger.open(path) as ledger:
        pay(ledger, ledger.register("heart", PATIENTS), 1)
        for file in path.parent.iterdir():
            assert file.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="640"):
        Ledger.open(path)


OPEN_IT = """
import sys
from pathlib import Path
from p2pfed.errors import P2PFedError
from p2pfed.privacy.ledger import Ledger
try:
    Ledger.open(Path(sys.argv[1])).close()
except P2PFedError as error:
    print(type(error).__name__)
"""


def test_a_second_opener_is_refused(path, ledger):
    with pytest.raises(StateInUse, match="open elsewhere"):
        Ledger.open(path)
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(StateInUse, match="open elsewhere"):
        Ledger.open(link)
    ledger.close()
    Ledger.open(path).close()


@pytest.mark.slow
def test_a_second_process_is_refused(path, ledger):
    said = subprocess.run(
        [sys.executable, "-c", OPEN_IT, path], capture_output=True, text=True, check=True
    )
    assert said.stdout == "StateInUse\n"


def test_a_forked_child_cannot_spend(path, ledger):
    dataset = ledger.register("heart", PATIENTS)
    child = os.fork()
    if child == 0:
        try:
            pay(ledger, dataset, 1)
        except PrivacyError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    pay(ledger, dataset, 1)


# -- damage ---------------------------------------------------------------------------------------


def filled(path):
    with Ledger.open(path) as ledger:
        dataset = ledger.register("heart", PATIENTS)
        for number in range(3):
            ledger.store_output(pay(ledger, dataset, number, 1000), b"%d" % number * 900)
        return state_of(ledger)


def state_of(ledger):
    outputs = [ledger.output(key(number)) for number in range(3)]
    return ledger.entries(), ledger._secret, ledger._patients, outputs


def reopened(path):
    with Ledger.open(path) as ledger:
        return state_of(ledger)


def flip(path, offset, bit):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def outcome_of_a_flip(path, copy, healthy, state, offset):
    copy.write_bytes(healthy)
    copy.chmod(0o600)
    flip(copy, offset, offset % 8)
    try:
        return "harmless" if reopened(copy) == state else "believed"  # SQLite may not use a byte
    except PrivacyError:
        return "refused"
    finally:
        for rest in path.parent.glob(copy.name + "-*"):
            rest.unlink()


@pytest.mark.slow
def test_a_flipped_bit_is_refused_or_without_effect(path):
    state = filled(path)
    healthy = path.read_bytes()
    copy = path.with_name("copy")
    seen = {
        outcome_of_a_flip(path, copy, healthy, state, offset)
        for offset in range(17, len(healthy), len(healthy) // 40)
    }
    assert "refused" in seen
    assert "believed" not in seen


@pytest.mark.slow
def test_every_seventh_byte_flipped_is_refused_or_without_effect(path):
    state = filled(path)
    healthy = path.read_bytes()
    copy = path.with_name("copy")
    for offset in range(0, len(healthy), 7):
        assert outcome_of_a_flip(path, copy, healthy, state, offset) != "believed", offset


TAMPERING = {
    "a changed body": "UPDATE entries SET body = replace(body, '1000', '0001') WHERE seq = 3",
    "a changed chain": "UPDATE entries SET chain = zeroblob(32) WHERE seq = 4",
    "a changed digest": "UPDATE entries SET digest = zeroblob(32) WHERE seq = 4",
    "a lost entry": "DELETE FROM entries WHERE seq = 5",
    "a lost tail": "DELETE FROM entries WHERE seq >= 7",
    "a lost everything": "DELETE FROM entries",
    "swapped entries": "UPDATE entries SET body = (SELECT e.body FROM entries AS e"
    " WHERE e.seq = 14 - entries.seq) WHERE seq IN (6, 8)",
    "a number for a body": "UPDATE entries SET body = 5 WHERE seq = 3",
    "a text for a body": "UPDATE entries SET body = CAST(body AS TEXT) || '' WHERE seq = 3",
    "a lost tip": "DELETE FROM tip",
    "a changed payload": "UPDATE payloads SET payload = zeroblob(900) WHERE seq = 4",
    "a lost payload": "DELETE FROM payloads WHERE seq = 6",
    "a lost table": "DROP TABLE entries",
}


@pytest.mark.parametrize("statement", TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_is_refused(path, statement):
    state = filled(path)
    db = sqlite3.connect(path)
    db.execute(statement)
    db.commit()
    db.close()
    if "CAST" in statement:  # the same bytes under another type still verify
        assert reopened(path) == state
    else:
        with pytest.raises(LedgerCorrupt, match="does not verify"):
            reopened(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 4096, -1])
def test_a_cut_file_is_refused(path, keep):
    filled(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LedgerCorrupt, match="does not verify"):
        reopened(path)


def test_garbage_is_refused(path):
    path.write_bytes(b"garbage" * 1000)
    path.chmod(0o600)
    with pytest.raises(LedgerCorrupt, match="does not verify"):
        Ledger.open(path)


def test_a_log_without_its_file_is_refused(path):
    path.with_name("ledger-wal").write_bytes(b"something")
    with pytest.raises(LedgerCorrupt, match="log remains"):
        Ledger.open(path)


def test_an_interrupted_creation_starts_again(path):
    path.with_name("ledger.new").write_bytes(b"half")
    with Ledger.open(path) as ledger:
        assert len(ledger.entries()) == 1


def test_a_record_of_a_newer_version_is_refused(path):
    with Ledger.open(path) as ledger:
        ledger._journal.append(b'{"kind": "refund", "at": 0}')
    with pytest.raises(LedgerCorrupt, match="refund"):
        Ledger.open(path)
    with pytest.raises(LedgerCorrupt, match="refund"):
        Ledger.open(path)  # and the lock was freed


def test_records_of_another_version_are_told_as_such(path):
    journal = Journal.open(path)
    journal.append(b'{"kind": "open", "version": 1, "secret": "00", "at": 0}')
    journal.close()
    for _ in range(2):  # the lock was freed
        with pytest.raises(LedgerCorrupt, match="records are of version 1") as caught:
            Ledger.open(path)
    assert caught.value.why == "this version of p2pfed reads version 2"


@pytest.mark.parametrize(("number", "told"), [(0, 1), (3, 3)])
def test_a_file_of_another_format_is_told_as_such(path, number, told):
    """Format 1 had no number in its header, and another chain."""
    filled(path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {number}")
    db.close()
    with pytest.raises(LedgerCorrupt, match=f"{path} has format {told}") as caught:
        reopened(path)
    assert "reads format 2" in caught.value.why
    assert "never delete it" in caught.value.do


def test_the_chain_is_made_of_digests_so_that_no_body_is_needed_to_follow_it(path):
    """Recomputed by hand from what an auditor may see."""
    filled(path)
    db = sqlite3.connect(path)
    rows = db.execute("SELECT seq, body, digest, chain FROM entries ORDER BY seq").fetchall()
    payloads = dict(db.execute("SELECT seq, payload FROM payloads"))
    db.close()
    head = bytes(32)
    for seq, body, digest, chain in rows:
        of_body = blake2b(body, digest_size=32, person=b"p2pfed-body").digest()
        linked = head + seq.to_bytes(8, "little") + of_body + digest
        head = blake2b(linked, digest_size=32, person=b"p2pfed-ledger").digest()
        assert head == chain
        payload = payloads.get(seq, b"")
        of_payload = blake2b(payload, digest_size=32, person=b"p2pfed-payload").digest()
        assert digest == (of_payload if payload else b"")
    assert len(payloads) == 3


# -- failing storage -----------------------------------------------------------------------------


def in_child(work):
    """Run `work` in a forked child; return what it wrote."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = work()
        except P2PFedError as error:
            said = f"{type(error).__name__}: {error.what}"
        except BaseException as error:  # noqa: BLE001 -- told to the parent
            said = repr(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_a_full_disk_gives_a_clear_error_and_loses_nothing(path):
    filled(path)

    def work():
        with Ledger.open(path) as ledger:
            dataset = ledger.register("heart", PATIENTS)
            debit = pay(ledger, dataset, 9)
            room = path.stat().st_size + 5000
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            with pytest.raises(PrivacyError, match="cannot be opened or written"):
                ledger.store_output(debit, bytes(10**6))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            with pytest.raises(PrivacyError, match="no more records"):  # it may be on disk or not
                ledger.store_output(debit, b"small")
            assert ledger.output(key(9)) is None
            return "as it should"

    assert in_child(work) == "as it should"
    with Ledger.open(path) as ledger:
        assert ledger.output(key(9)) is None
        spent = ledger.spent(ledger.register("heart", PATIENTS), delta=1e-5)
        assert spent.rho_nano == 3000 + CAP // 4


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_that_cannot_be_written_gives_a_clear_error(path, exists):
    if exists:
        filled(path)
        path.chmod(0o400)
    outer = {folder: folder.stat().st_mode for folder in path.parents[:3]}

    def work():
        if os.getuid() == 0:  # root may write anywhere: become nobody
            if exists:
                os.chown(path, 65534, 65534)
            os.setuid(65534)
        Ledger.open(path).close()
        return "opened"

    try:
        for folder in outer:
            folder.chmod(0o555)
        said = in_child(work)
    finally:
        for folder, mode in outer.items():
            folder.chmod(mode)
    assert said == f"PrivacyError: ledger {path} cannot be opened or written"


@pytest.mark.parametrize(
    ("place", "why"), [("missing/ledger", "cannot be opened"), (".", "not a file")]
)
def test_a_place_that_is_no_place_gives_a_clear_error(tmp_path, place, why):
    with pytest.raises(PrivacyError, match=why):
        Ledger.open(tmp_path / place)
