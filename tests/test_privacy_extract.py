"""What an auditor sees of a ledger, and which lies are found. Real ledger files throughout."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from hashlib import blake2b

import pytest

from p2pfed.errors import (
    BudgetExhausted,
    ConfigError,
    LedgerCorrupt,
    P2PFedError,
    PrivacyError,
    StateInUse,
)
from p2pfed.privacy import extract as extract_module
from p2pfed.privacy.accountant import NANO, Budget, Cost
from p2pfed.privacy.extract import (
    Extract,
    as_told,
    decode_export,
    encode_export,
    read_ledger,
)
from p2pfed.privacy.ledger import Ledger
from p2pfed.privacy.records import ReleaseKey
from p2pfed.privacy.review import review
from p2pfed.privacy.units import HOSPITAL, PATIENT
from p2pfed.privacy.worth import WORTH

BUDGET = Budget(8.0, 1e-5)
SHARE = Cost.zcdp(Fraction(BUDGET.rho_nano // 40, NANO))
PURE = Cost.pure(Fraction(1, 20))
RUN = b"\x3f" * 32


def patients(first, last):
    return [b"patient number %d" % i for i in range(first, last)]


def pay(ledger, dataset, number, *, run=RUN, cost=SHARE, mechanism="svt", unit=PATIENT):
    return ledger.debit(
        dataset,
        key=ReleaseKey(run, number),
        cost=cost,
        mechanism=mechanism,
        unit=unit.kind,
        relation=unit.neighbours,
        budget=BUDGET,
    )


def fill(path):
    """Two data sets that share patients, one that does not; a crash; all mechanisms."""
    with Ledger.open(path) as ledger:
        first = ledger.register("heart", patients(0, 20))
        for number in range(3):
            ledger.store_output(pay(ledger, first, number), b"noisy %d" % number)
        pay(ledger, first, 3)  # crashed before its output
        ledger.store_output(pay(ledger, first, 3), b"noisy again")
        second = ledger.register("heart, new export", patients(15, 40))
        third = ledger.register("lungs", patients(100, 130))
        more = {"run": b"\x77" * 32, "unit": HOSPITAL}
        textbook = pay(ledger, second, 0, cost=PURE, mechanism="svt-textbook", **more)
        ledger.store_output(textbook, b"few noisy numbers")
        plain = pay(ledger, third, 1, cost=Cost.nothing(), mechanism="none", **more)
        ledger.store_output(plain, b"the naked truth")
        pay(ledger, third, 2, cost=PURE, mechanism=WORTH, **more)
        ledger.store_output(pay(ledger, third, 2, **more), b"worth it")
        return [first, second, third]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    return path, fill(path)


@pytest.fixture
def path(filled, tmp_path):
    return shutil.copy(filled[0], tmp_path / "ledger.db") and tmp_path / "ledger.db"


@pytest.fixture(scope="module")
def extract(filled):
    return read_ledger(filled[0])


@pytest.fixture(scope="module")
def export(extract):
    return encode_export(extract)


def sealed(lines):
    """An export of these lines with a fitting seal: what a liar would send."""
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    seal = blake2b(data, digest_size=32, person=b"p2pfed-export").hexdigest()
    return data + json.dumps({"end": len(lines) - 1, "seal": seal}).encode() + b"\n"


def digest(data, person):
    return blake2b(data, digest_size=32, person=person).digest()


def linked(lines):
    """The same lines with the chain made anew, by hand: what a liar who knows the format does."""
    head = bytes(32)
    for line in lines[1:]:
        body = line.get("body", "").encode()
        of_body = bytes.fromhex(line.get("body_digest", "")) or digest(body, b"p2pfed-body")
        number = line["seq"].to_bytes(8, "little")
        of_payload = bytes.fromhex(line.get("digest", ""))
        head = digest(head + number + of_body + of_payload, b"p2pfed-ledger")
        line["chain"] = head.hex()
    lines[0] |= {"records": len(lines) - 1, "head": head.hex()}
    return lines


def lines_of(export):
    return [json.loads(line) for line in export.splitlines()[:-1]]


# --- reading -----------------------------------------------------------------------------------


def test_reading_changes_nothing_and_leaves_nothing(path, tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(extract_module.tempfile, "tempdir", str(place))
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(tmp_path.iterdir())
    assert len(read_ledger(path).records) == 20
    after = path.read_bytes(), path.stat().st_mtime_ns, sorted(tmp_path.iterdir())
    assert before == after
    assert list(place.iterdir()) == []


def test_the_records_are_those_of_the_ledger(path, extract):
    with Ledger.open(path) as ledger:
        entries, head = ledger.entries(), ledger.head
    assert extract.head == head
    for record, entry in zip(extract.records, entries, strict=True):
        shown = {k: v for k, v in record.fields.items() if k not in {"kind", "at", "shares_with"}}
        assert (record.seq, record.chain, shown) == (entry.seq, entry.chain, entry.detail)


def test_a_write_ahead_log_that_a_crash_left_is_read_too(path, tmp_path):
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    head = read_ledger(path).head
    body = json.dumps({"kind": "open", "at": 1}).encode()
    chain = digest(
        head + (21).to_bytes(8, "little") + digest(body, b"p2pfed-body"), b"p2pfed-ledger"
    )
    with sqlite3.connect(path, isolation_level=None) as db:
        db.execute("PRAGMA wal_autocheckpoint=0")
        db.execute("BEGIN")
        db.execute("INSERT INTO entries VALUES(21, ?, x'', ?)", (body, chain))
        db.execute("UPDATE tip SET seq = 21, chain = ?", (chain,))
        db.execute("COMMIT")
        for name in ("ledger.db", "ledger.db-wal"):
            shutil.copy(tmp_path / name, crashed / name)
    db.close()
    assert (crashed / "ledger.db-wal").stat().st_size > 0
    assert read_ledger(crashed / "ledger.db").records[-1].chain == chain


@pytest.mark.slow
def test_a_ledger_that_a_trainer_has_open_is_refused_by_its_process(path):
    code = (
        "import sys, pathlib\nfrom p2pfed.privacy.ledger import Ledger\n"
        "with Ledger.open(pathlib.Path(sys.argv[1])):\n    print('open', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout.readline() == "open\n"
        with pytest.raises(StateInUse, match=rf"process {trainer.pid}") as caught:
            read_ledger(path)
        assert "p2pfed task pause" in caught.value.do
        trainer.communicate("\n")
    assert len(read_ledger(path).records) == 20


def test_a_ledger_that_changes_meanwhile_is_not_believed(path, monkeypatch):
    real = shutil.copyfile

    def slow(source, target):
        real(source, target)
        os.utime(source, ns=(1, 1))

    monkeypatch.setattr(extract_module.shutil, "copyfile", slow)
    with pytest.raises(StateInUse, match="changed while it was read"):
        read_ledger(path)


def test_a_missing_ledger_is_not_made(tmp_path):
    with pytest.raises(ConfigError, match="no ledger at"):
        read_ledger(tmp_path / "ledger.db")
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_others_may_read_is_refused_with_its_own_name(path):
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 644") as caught:
        read_ledger(path)
    assert str(path) in caught.value.what
    assert caught.value.do == f"chmod 600 {path}"


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_ledger_is_corrupt_and_named(path, size):
    os.truncate(path, size)
    with pytest.raises(LedgerCorrupt) as caught:
        read_ledger(path)
    assert str(path) in caught.value.what


def test_a_changed_record_is_corrupt(path):
    data = path.read_bytes()
    assert data.count(b'"mechanism": "none"') == 1
    path.write_bytes(data.replace(b'"mechanism": "none"', b'"mechanism": "nine"'))
    with pytest.raises(LedgerCorrupt, match="does not verify"):
        read_ledger(path)


def test_a_folder_and_a_failing_disk_are_told(path, tmp_path, monkeypatch):
    with pytest.raises(PrivacyError, match="cannot be read"):
        read_ledger(tmp_path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(extract_module.shutil, "copyfile", fail)
    with pytest.raises(PrivacyError, match="cannot be read") as caught:
        read_ledger(path)
    assert caught.value.why == "Input/output error"


# --- the export --------------------------------------------------------------------------------


def test_an_export_says_what_the_ledger_says(extract, export):
    read = decode_export(export, name="x")
    assert read.records == extract.records
    assert read.head == extract.head
    assert (extract.hidden, read.hidden) == ((1, 2, 12, 13), (1, 2, 12, 13))
    assert review(read, name="x") == review(extract, name="x")


def test_an_export_holds_no_secret_and_no_patient(filled, export):
    db = sqlite3.connect(filled[0])
    bodies = [json.loads(body) for (body,) in db.execute("SELECT body FROM entries")]
    payloads = [bytes(payload) for (payload,) in db.execute("SELECT payload FROM payloads")]
    db.close()
    [secret] = [body["secret"] for body in bodies if body["kind"] == "open"]
    joined = [body["patients"] for body in bodies if body["kind"] == "register"]
    fingerprints = [one[i : i + 32] for one in joined for i in range(0, len(one), 32)]
    assert len(fingerprints) == 75
    text = export.decode()
    for hidden in [secret, *fingerprints]:
        assert hidden not in text
        assert hidden[:16] not in text
    assert not any(payload in export for payload in payloads)


def test_a_hidden_body_can_be_opened_on_site(filled, export):
    db = sqlite3.connect(filled[0])
    bodies = dict(db.execute("SELECT seq, body FROM entries"))
    db.close()
    read = decode_export(export, name="x")
    assert all(
        record.body_digest == digest(bodies[record.seq], b"p2pfed-body") for record in read.records
    )
    assert read.records[1].fields["name"] == json.loads(bodies[2])["name"]


def test_every_flipped_byte_is_found(export):
    for place in range(0, len(export), 97):
        changed = bytearray(export)
        changed[place] ^= 1
        with pytest.raises(LedgerCorrupt):
            decode_export(bytes(changed), name="x")


@pytest.mark.slow
def test_every_flipped_bit_is_found(export):
    for place in range(len(export)):
        changed = bytearray(export)
        changed[place] ^= 1 << place % 8
        with pytest.raises(LedgerCorrupt):
            decode_export(bytes(changed), name="x")


def test_a_flipped_byte_of_a_record_names_it(export):
    place = export.index(b'\\"rho_nano\\"') + 20
    changed = export[:place] + bytes([export[place] ^ 1]) + export[place + 1 :]
    with pytest.raises(LedgerCorrupt, match=r"record 3 \(line 4\)"):
        decode_export(changed, name="x")


def test_every_removed_line_is_found_and_named(export):
    lines = export.splitlines(keepends=True)
    for missing in range(1, len(lines) - 1):
        with pytest.raises(LedgerCorrupt, match=f"record {missing} is missing"):
            decode_export(b"".join(lines[:missing] + lines[missing + 1 :]), name="x")
    with pytest.raises(LedgerCorrupt, match="it is no export"):
        decode_export(b"".join(lines[1:]), name="x")


def test_every_truncation_is_told_as_one(export):
    lines = export.splitlines(keepends=True)
    for kept in range(1, len(lines)):
        whole = b"".join(lines[:kept])
        for cut in (whole, whole + lines[kept][:30]):
            with pytest.raises(LedgerCorrupt, match="cut off"):
                decode_export(cut, name="x")
    with pytest.raises(LedgerCorrupt, match="cut off"):
        decode_export(export[:-1], name="x")


@pytest.mark.parametrize("data", [b"", b"\n", b"\x00\xff" * 50, b"[" * 100_000, b"{}\n{}\n"])
def test_what_is_no_export_is_told_as_such(data):
    with pytest.raises(LedgerCorrupt, match="it is no export"):
        decode_export(data, name="x")


def test_a_liar_who_seals_again_is_found_by_the_chain(export):
    for seq in (3, 4, 9, 14, 20):
        lines = lines_of(export)
        lines[seq]["body"] = lines[seq]["body"].replace('"at": 1', '"at": 2')
        with pytest.raises(LedgerCorrupt, match=f"record {seq} "):
            decode_export(sealed(lines), name="x")
    lines = lines_of(export)
    lines[4]["digest"] = "00" * 32
    with pytest.raises(LedgerCorrupt, match="record 4 "):
        decode_export(sealed(lines), name="x")
    lines = lines_of(export)
    for name in ("chain", "body_digest"):  # of a hidden record
        lines = lines_of(export)
        lines[12][name] = "00" * 32
        with pytest.raises(LedgerCorrupt, match="record 12 "):
            decode_export(sealed(lines), name="x")


@pytest.mark.parametrize(
    "change",
    [
        {"seq": "3"},
        {"seq": True},
        {"chain": "zz"},
        {"chain": 3},
        {"body": None},
        {"body": "[]"},
        {"body": "[" * 100_000},
        {"digest": 1},
        {"digest": "00"},
        {"hidden": {}, "body_digest": "00" * 32},
        {"hidden": {"kind": "debit", "at": 1}, "body_digest": "00" * 32},
        {"hidden": {"kind": ["open"], "at": 1}, "body_digest": "00" * 32},
        {"hidden": {"kind": "open", "at": "x"}, "body_digest": "00" * 32},
        {"hidden": {"kind": "open", "at": 1}, "body_digest": "00" * 64},
        {"hidden": {"kind": "open", "at": 1}, "body_digest": ""},
        {"hidden": {"kind": "open", "at": 1}},
    ],
)
def test_a_line_that_is_no_record_is_found(export, change):
    lines = lines_of(export)
    lines[3] |= change
    with pytest.raises(LedgerCorrupt, match=r"record 3 |line 4 is no record"):
        decode_export(sealed(lines), name="x")


def test_two_digests_are_never_taken_for_one(export):
    """A hidden output, its body's digest and its payload's put together: the chain would fit."""
    lines = lines_of(export)
    body = lines[4].pop("body")
    both = digest(body.encode(), b"p2pfed-body").hex() + lines[4].pop("digest")
    lines[4] |= {"hidden": {"kind": "register", "at": 1}, "body_digest": both}
    with pytest.raises(LedgerCorrupt, match="line 5 is no record"):
        decode_export(sealed(lines), name="x")


def without_the_last_release(lines):
    return lines[:-2]


def with_other_records_before_a_hidden_one(lines):
    """Record 11 at another time, so that all totals still fit; record 12 is hidden."""
    lines[11]["body"] = lines[11]["body"].replace('"at": ', '"at": 1')
    return lines


def with_another_hidden_body(lines):
    lines[2]["body_digest"] = "00" * 32
    return lines


@pytest.mark.parametrize(
    "lie",
    [
        without_the_last_release,
        with_other_records_before_a_hidden_one,
        with_another_hidden_body,
    ],
)
def test_a_liar_who_makes_the_chain_anew_is_found_by_the_head_alone(export, extract, lie):
    """The chain has no key. So a head from a signed delta has to be compared, and finds it."""
    forged = decode_export(sealed(linked(lie(lines_of(export)))), name="x")
    review(forged, name="x")
    with pytest.raises(LedgerCorrupt, match="no record has the head"):
        forged.at_head(extract.head)


def test_a_liar_who_keeps_the_head_cannot_change_what_stands_before_a_hidden_record(export):
    """The link of a hidden record is recomputed too: the lie has nowhere to hide."""
    lines = linked(with_other_records_before_a_hidden_one(lines_of(export)))
    truth = lines_of(export)
    lines[0], lines[12:] = truth[0], truth[12:]
    with pytest.raises(LedgerCorrupt, match=r"record 12 \(line 13\) was changed"):
        decode_export(sealed(lines), name="x")


def test_making_the_chain_anew_by_hand_gives_the_ledgers_own(export):
    assert sealed(linked(lines_of(export))) == export


def test_what_is_said_of_a_hidden_body_is_bound_by_its_digest_alone(export, extract):
    """A name is believed until the hospital opens the body on site: then the digest tells."""
    lines = lines_of(export)
    lines[2]["hidden"]["name"] = "somebody else"
    forged = decode_export(sealed(lines), name="x")
    assert forged.at_head(extract.head) == 20
    assert forged.records[1].fields["name"] == "somebody else"
    assert forged.records[1].body_digest == extract.records[1].body_digest


def hide(line):
    """Pass a debit off as a registration: its body's digest fits the chain."""
    of_body = digest(line["body"].encode(), b"p2pfed-body").hex()
    shown = {"kind": "register", "at": 1, "dataset": "ee", "name": "", "shares_with": []}
    return {
        "seq": line["seq"],
        "chain": line["chain"],
        "body_digest": of_body,
        "hidden": shown,
    }


@pytest.fixture
def two_lost(tmp_path):
    """Lines of an export: records 5 and 8 are debits whose output a crash took; and its head."""
    path = tmp_path / "ledger.db"
    with Ledger.open(path) as ledger:
        dataset = ledger.register("heart", patients(0, 5))
        for number in (0, 2):
            ledger.store_output(pay(ledger, dataset, number), b"noisy")
            pay(ledger, dataset, number + 1)
        head = ledger.head
    return lines_of(encode_export(read_ledger(path))), head


def test_a_debit_that_is_passed_off_as_hidden_contradicts_the_next_output(two_lost):
    lines, head = two_lost
    lines[5] = hide(lines[5])
    forged = decode_export(sealed(lines), name="x")
    assert forged.at_head(head) == 8
    with pytest.raises(LedgerCorrupt, match="record 7") as caught:
        review(forged, name="x")
    assert "it says spent" in caught.value.why


def test_a_debit_after_the_last_output_can_be_passed_off_as_hidden(two_lost):
    """The limit of an export, as the module says: only the body itself, on site, would tell."""
    lines, head = two_lost
    lines[8] = hide(lines[8])
    forged = decode_export(sealed(lines), name="x")
    assert forged.at_head(head) == 8
    assert review(forged, name="x").datasets[0].debits == 3


def test_an_output_cannot_be_passed_off_as_hidden(export):
    lines = lines_of(export)
    lines[4] = hide(lines[4])
    with pytest.raises(LedgerCorrupt, match="record 4 "):
        decode_export(sealed(lines), name="x")


def test_an_older_head_is_that_of_an_earlier_record(extract):
    assert extract.at_head(extract.head) == 20
    assert extract.at_head(extract.records[6].chain) == 7
    with pytest.raises(LedgerCorrupt, match="another ledger"):
        extract.at_head(bytes(32))
    assert Extract(()).head == bytes(32)


# --- adding up ---------------------------------------------------------------------------------


def test_the_totals_are_those_of_the_ledger(path, filled, extract):
    found = review(extract, name="x")
    with Ledger.open(path) as ledger:
        for one, dataset in zip(found.datasets, filled[1], strict=True):
            spent = ledger.spent(dataset, delta=1e-5)
            assert one.id == dataset.hex()
            told = one.rho_nano, one.epsilon, one.route, one.debits, one.releases, one.unprotected
            assert told == (
                spent.rho_nano,
                spent.epsilon,
                spent.route,
                spent.debits,
                spent.releases,
                spent.unprotected,
            )
    first, second, third = found.datasets
    assert first.shares_with == (second.id,)
    assert second.shares_with == (first.id,)
    assert third.shares_with == ()
    assert (third.unprotected, first.limit) == (1, BUDGET)
    assert [one.name for one in found.datasets] == ["heart", "heart, new export", "lungs"]


def test_the_epsilon_after_each_record_grows_and_ends_at_the_total(extract):
    found = review(extract, name="x")
    for one in found.datasets:
        after = [row.epsilon for row in found.rows if row.dataset == one.id and row.epsilon]
        assert after == sorted(after)
    assert found.rows[-1].epsilon == found.datasets[2].epsilon
    assert found.rows[0].epsilon is None


@pytest.mark.slow
def test_any_ledger_adds_up(tmp_path):
    """Eight random ledgers, of fixed seeds; totals as the ledger's own."""
    for seed in range(8):
        chance, path = random.Random(seed), tmp_path / f"{seed}.db"
        with Ledger.open(path) as ledger:
            sets = []
            for number in range(chance.randint(1, 25)):
                if not sets or chance.random() < 0.2:
                    start = chance.randrange(30)
                    sets.append(ledger.register(f"{number}", patients(start, start + 8)))
                cost = chance.choice([SHARE, PURE])
                debit = pay(ledger, chance.choice(sets), chance.randrange(10**9), cost=cost)
                if chance.random() < 0.8:
                    ledger.store_output(debit, b"%d" % number)
            spent = {one.hex(): ledger.spent(one, delta=1e-5) for one in sets}
        found = review(decode_export(encode_export(read_ledger(path)), name="x"), name="x")
        for one in found.datasets:
            told = spent[one.id]
            assert (one.rho_nano, one.debits, one.releases) == (
                told.rho_nano,
                told.debits,
                told.releases,
            )
            assert one.epsilon == (told.epsilon if one.limit else 0.0)


@pytest.mark.slow
def test_the_forecast_comes_true(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger.open(path) as ledger:
        dataset = ledger.register("heart", patients(0, 5))
        for number in range(36):
            pay(ledger, dataset, number)
    [one] = review(read_ledger(path), name="x").datasets
    assert one.last_round == 35 + one.left
    with Ledger.open(path) as ledger:
        for number in range(36, one.last_round + 1):
            pay(ledger, dataset, number)
        with pytest.raises(BudgetExhausted):
            pay(ledger, dataset, one.last_round + 1)
    [one] = review(read_ledger(path), name="x").datasets
    assert one.left == 0


def test_a_forecast_counts_the_worth_gate_and_names_no_round(extract):
    third = review(extract, name="x").datasets[2]
    assert third.last_round is None
    alone = BUDGET.rho_nano // SHARE.rho_nano - 1
    assert 0 < third.left < alone


def test_a_data_set_without_debits_has_no_limit_yet(tmp_path):
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.register("heart", patients(0, 5))
    [one] = review(read_ledger(tmp_path / "ledger.db"), name="x").datasets
    assert (one.limit, one.epsilon, one.debits, one.left) == (None, 0.0, 0, None)


def changed(extract, seq, **fields):
    records = list(extract.records)
    records[seq - 1] = replace(records[seq - 1], fields={**records[seq - 1].fields, **fields})
    return Extract(tuple(records))


@pytest.mark.parametrize(
    ("seq", "fields", "why"),
    [
        (3, {"rho_nano": 1}, "it says spent"),
        (3, {"dataset": "ff"}, "not registered"),
        (3, {"attempt": 2}, "attempts"),
        (3, {"epsilon": 0.1}, "beyond its limit"),
        (3, {"delta": 2.0}, "not understood"),
        (3, {"rho_nano": -1}, "not understood"),
        (3, {"rho_nano": None}, "not understood"),
        (3, {"run": []}, "not understood"),
        (4, {"told": 0.1}, "less than"),
        (4, {"debits": 0}, "it says debits"),
        (4, {"releases": 7}, "it says releases"),
        (4, {"unprotected": 1}, "it says unprotected"),
        (4, {"debit": 99}, "not understood"),
        (6, {"debit": 3}, "its output already"),
        (11, {"debit": 9}, "not the newest"),
        (5, {"round": 0}, "its output already"),
        (12, {"shares_with": []}, "it says spent"),
        (12, {"shares_with": ["ee"]}, "unknown data set"),
        (1, {"version": 3}, "of version 3, this version of p2pfed reads 2"),
        (12, {"kind": "open"}, "opened once"),
        (12, {"kind": "refund"}, "unknown"),
    ],
)
def test_records_that_contradict_each_other_are_found(extract, seq, fields, why):
    with pytest.raises(LedgerCorrupt, match="does not add up") as caught:
        review(changed(extract, seq, **fields), name="x")
    assert why in caught.value.why


def test_a_ledger_that_told_more_than_was_spent_is_right(extract):
    review(changed(extract, 4, told=7.0), name="x")


# --- what a trainer tells ----------------------------------------------------------------------


def told_by(path):
    with Ledger.open(path) as ledger:
        shown = [
            {"seq": e.seq, "kind": e.kind, "at": e.at, "chain": e.chain.hex(), **e.detail}
            for e in ledger.entries()
        ]
    return json.loads(json.dumps(shown))


def test_a_trainer_tells_the_same_records_and_totals_that_are_never_too_low(path, extract):
    told = as_told(told_by(path))
    assert told.head == extract.head
    assert len(told.hidden) == 20
    assert all(record.body_digest == b"" for record in told.records)
    exact = review(extract, name="x").datasets
    for one, other in zip(exact, review(told, name="x", at_most=True).datasets, strict=True):
        assert (other.id, other.name) == (one.id, one.name)
        assert other.epsilon >= one.epsilon
        assert other.rho_nano >= one.rho_nano


def test_one_data_set_of_a_trainer_is_told_exactly(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger.open(path) as ledger:
        dataset = ledger.register("heart", patients(0, 5))
        ledger.store_output(pay(ledger, dataset, 0), b"noisy")
    told = review(as_told(told_by(path)), name="x", at_most=True).datasets
    assert told == review(read_ledger(path), name="x").datasets


@pytest.mark.parametrize("answer", [None, 3, [3], [{}], [{"seq": 1, "kind": "open"}]])
def test_an_answer_without_sense_is_told_as_such(answer):
    with pytest.raises(P2PFedError, match="makes no sense"):
        as_told(answer)
