"""The stewards' desk through the real commands: k of n, drafts, revocation, rotation, runs."""

from __future__ import annotations

import datetime as dt
import importlib.util
import os
import stat
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from typed_commands import Commands

from p2pfed.cli import roster_file
from p2pfed.cli.runs import _of_hospital
from p2pfed.errors import FactRejected
from p2pfed.identity.book import RosterBook
from p2pfed.identity.keys import NodeKey, peer_id_of
from p2pfed.identity.run import Run, check_signed_run
from p2pfed.identity.signing import SignedDocument, fact_hash

_spec = importlib.util.spec_from_file_location(
    "admin_fakes", Path(__file__).with_name("admin_fakes.py")
)
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)

PEERS = [peer_id_of(bytes([i]) * 32) for i in range(5)]


class Desk(Commands):
    """A folder with the keys of a, b, c and d, and the commands run in it."""

    def __init__(self, folder: Path, capsys) -> None:
        super().__init__(capsys)
        self.folder = folder
        self.keys = {
            name: self.data("steward", "key", "new", f"{name}.key")["public_key"] for name in "abcd"
        }

    def found(self, out: str = "v1", *, threshold: int = 2, expires: str = "365d") -> str:
        stewards = [f"--steward={name}={self.keys[name]}" for name in "abc"]
        return self.ok(
            "steward",
            "found",
            "--network",
            "cardio",
            *stewards,
            "--threshold",
            threshold,
            "--expires",
            expires,
            "--out",
            out,
        )

    def sign(self, file: str, *names: str) -> str:
        return [self.ok("steward", "sign", file, "--key", f"{n}.key") for n in names][-1]

    def add(self, base: str, out: str, number: int = 0, *more) -> str:
        return self.ok(
            "steward",
            "add",
            base,
            "--name",
            f"H{number}",
            "--peer-id",
            PEERS[number],
            "--samples",
            100,
            "--out",
            out,
            *more,
        )

    def bytes(self, file: str) -> bytes:
        return (self.folder / file).read_bytes()


@pytest.fixture
def desk(capsys, monkeypatch):
    with fakes.short_folder() as folder:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(folder))
        for name in [n for n in os.environ if n.startswith("P2PFED_")]:
            monkeypatch.delenv(name)
        yield Desk(folder, capsys)


# --- keys --------------------------------------------------------------------------------------


def test_a_steward_key_is_private_and_never_overwritten(desk):
    assert stat.S_IMODE((desk.folder / "a.key").stat().st_mode) == 0o600
    assert desk.data("steward", "key", "show", "a.key")["public_key"] == desk.keys["a"]
    before = desk.bytes("a.key")
    code, _, err = desk.run("steward", "key", "new", "a.key")
    assert code == 2 and len(err.splitlines()) == 3
    assert desk.bytes("a.key") == before


def test_a_key_that_others_can_read_does_not_sign(desk):
    desk.found()
    (desk.folder / "a.key").chmod(0o640)
    before = desk.bytes("v1")
    code, _, err = desk.run("steward", "sign", "v1", "--key", "a.key")
    assert code == 2 and "chmod 600" in err
    assert desk.bytes("v1") == before


# --- k of n ------------------------------------------------------------------------------------


def test_a_roster_is_believed_from_the_kth_signature_on(desk):
    assert "0 of 2 signatures of its own stewards; 2 more needed" in desk.found()
    assert desk.run("steward", "verify", "v1")[0] == 7
    assert "1 of 2 signatures" in desk.sign("v1", "a")
    assert "1 of 2 signatures" in desk.sign("v1", "a")  # twice is once
    assert desk.run("steward", "verify", "v1")[0] == 7
    assert "signed by 2" in desk.sign("v1", "b")
    assert "signed by a, b" in desk.ok("steward", "verify", "v1")
    book = RosterBook()
    assert book.add(desk.bytes("v1")).network == "cardio"
    assert desk.data("steward", "show", "v1")["network_id"] == book.network_id.hex()


def test_a_stranger_can_sign_but_does_not_count(desk):
    desk.found()
    assert "not of its stewards" in desk.sign("v1", "d")
    desk.sign("v1", "a")
    assert desk.run("steward", "verify", "v1")[0] == 7


def test_a_changed_byte_is_noticed(desk):
    desk.found()
    desk.sign("v1", "a", "b")
    (desk.folder / "v1").write_bytes(desk.bytes("v1").replace(b"cardio", b"cardia"))
    code, _, err = desk.run("steward", "verify", "v1")
    assert code == 7 and len(err.splitlines()) == 3


def test_an_expired_roster_is_refused(desk, monkeypatch):
    desk.found(expires="9d")
    desk.sign("v1", "a", "b")
    in_ten_days = dt.datetime.now(dt.UTC) + dt.timedelta(days=10)
    with monkeypatch.context() as later:
        later.setattr(roster_file, "_now", lambda: in_ten_days)
        code, _, err = desk.run("steward", "verify", "v1")
    assert code == 7 and "roster v1 expired on 20" in err and "extend" in err
    desk.ok("steward", "extend", "v1", "--expires", "30d", "--out", "v2")
    desk.sign("v2", "a", "c")
    desk.ok("steward", "verify", "v2")


def test_an_expiry_that_is_over_is_refused(desk):
    desk.found()
    code, _, err = desk.run("steward", "extend", "v1", "--expires", "2020-01-31", "--out", "v2")
    assert code == 2 and err.startswith("2020-01-31 is over\n")
    assert not (desk.folder / "v2").exists()


def test_an_older_roster_is_refused(desk):
    desk.found()
    desk.sign("v1", "a", "b")
    desk.add("v1", "v2")
    desk.sign("v2", "a", "b")
    desk.ok("steward", "verify", "v2", "--against", "v1")
    assert desk.run("steward", "verify", "v1", "--against", "v2")[0] == 7


# --- drafts and members ------------------------------------------------------------------------


def test_a_draft_is_amended_and_a_signed_roster_is_followed(desk):
    desk.found("d0")
    desk.add("d0", "d1", 0)
    desk.add("d1", "d2", 1, "--roles", "relay")
    draft = desk.data("steward", "show", "d2")
    assert draft["version"] == 1 and [m["name"] for m in draft["members"]] == ["H0", "H1"]
    desk.sign("d2", "a", "b")
    before = desk.bytes("d2")
    desk.add("d2", "v2", 2)
    assert desk.bytes("d2") == before
    following = desk.data("steward", "show", "v2")
    assert (following["version"], following["previous"]) == (2, draft["hash"])
    assert following["network_id"] == draft["hash"]
    desk.sign("v2", "b", "c")
    book = RosterBook()
    book.add(desk.bytes("d2"))
    assert book.add(desk.bytes("v2")).version == 2


def test_a_revoked_member_is_out_from_a_round_on(desk):
    desk.found("d0")
    desk.add("d0", "v1", 0)
    desk.sign("v1", "a", "b")
    desk.ok(
        "steward", "revoke", "v1", "H0", "--reason", "key lost", "--from-round", 7, "--out", "v2"
    )
    data = desk.data("steward", "show", "v2")
    assert data["members"] == []
    assert data["revoked"] == [{"peer_id": PEERS[0], "reason": "key lost", "from_round": 7}]
    assert "key lost" in desk.ok("steward", "show", "v2")
    code = desk.run(
        "steward", "revoke", "v2", "H0", "--reason", "x", "--from-round", 0, "--out", "v3"
    )[0]
    assert code == 5  # it has no name any more


def test_a_member_can_be_forgotten_also_after_it_was_revoked(desk):
    desk.found("d0")
    desk.add("d0", "v1", 0)
    desk.sign("v1", "a", "b")
    gone = ("--reason", "left the study")
    desk.ok("steward", "revoke", "v1", "H0", *gone, "--from-round", 7, "--out", "v2")
    desk.sign("v2", "a", "b")
    assert desk.run("steward", "revoke", "v2", PEERS[0], *gone, "--from-round", 9)[0] != 0
    desk.ok("steward", "revoke", "v2", PEERS[0], *gone, "--forget", "--out", "v3")
    [revoked] = desk.data("steward", "show", "v3")["revoked"]
    assert (revoked["peer_id"], revoked["from_round"]) == (PEERS[0], 0)
    desk.sign("v3", "a", "b")
    both = ("--from-round", 3, "--forget")
    assert desk.run("steward", "revoke", "v1", "H0", *gone, *both, "--out", "v9")[0] == 2


def test_a_forgotten_key_cannot_come_back_and_bring_its_updates_with_it(desk):
    desk.found("d0")
    desk.add("d0", "v1", 0)
    desk.sign("v1", "a", "b")
    desk.ok("steward", "revoke", "v1", "H0", "--reason", "x", "--forget", "--out", "v2")
    desk.sign("v2", "a", "b")
    code, _, told = desk.run(
        "steward", "add", "v2", "--name", "H0", "--peer-id", PEERS[0], "--samples", 9, "--out", "v3"
    )
    assert code != 0
    assert "new key" in told


@pytest.mark.parametrize(
    "change",
    [
        ("--peer-id", "12D3KooWnonsense"),
        ("--roles", "king"),
        ("--samples", "-1"),
        ("--samples", "2000000"),
        ("--name", "H0"),
        ("--name", ""),
        ("--name", "a\nb"),
    ],
)
def test_a_member_that_no_node_would_accept_is_refused_and_nothing_written(desk, change):
    desk.found("d0")
    desk.add("d0", "v1", 0)
    options = {"--name": "H1", "--peer-id": PEERS[1], "--roles": "train", "--samples": "5"}
    options[change[0]] = change[1]
    arguments = [f"{key}={value}" for key, value in options.items()]
    code, _, err = desk.run("steward", "add", "v1", *arguments, "--out", "v2")
    assert code == 7, err
    assert not (desk.folder / "v2").exists()


def test_nothing_is_overwritten(desk):
    desk.found("v1")
    before = desk.bytes("v1")
    code, _, err = desk.run("steward", "extend", "v1", "--expires", "9d", "--out", "v1")
    assert code == 2 and "exists already" in err
    assert desk.bytes("v1") == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("--steward", "a=123", "--threshold", "1"),
        ("--steward", "x", "--threshold", "1"),
        ("--steward", f"a={'0' * 64}", "--threshold", "x"),
        ("--steward", f"a={'0' * 64}", "--threshold", "1", "--expires", "soon"),
        ("--steward", f"a={'0' * 64}", "--threshold", "1", "--expires", "2020-01-31"),
        ("--steward", f"a={'0' * 64}", "--threshold", "1", "--expires", "0d"),
        ("--steward", f"a={'0' * 64}", "--threshold", "1", "--expires", "99999d", "--out", "/no/f"),
    ],
)
def test_a_founder_who_mistypes_is_told(desk, arguments):
    code, _, err = desk.run("steward", "found", "--network", "n", "--out", "v1", *arguments)
    assert code == 2 and 1 <= len(err.splitlines()) <= 3
    assert not (desk.folder / "v1").exists()


def test_a_threshold_that_nobody_can_reach_is_refused(desk):
    code, _, err = desk.run(
        "steward",
        "found",
        "--network",
        "n",
        "--out",
        "v1",
        "--steward",
        f"a={desk.keys['a']}",
        "--threshold",
        2,
    )
    assert code == 7 and "2 of 1" in err


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100, b"x" * 100_000, b"[" * 60_000])
def test_a_file_that_is_no_roster_is_refused(desk, content):
    (desk.folder / "junk").write_bytes(content)
    for command in ("show", "verify"):
        code, _, err = desk.run("steward", command, "junk")
        assert code == 7 and "Traceback" not in err


# --- rotation ----------------------------------------------------------------------------------


def test_a_lost_steward_key_is_replaced_by_k_signatures_of_the_old_set(desk):
    desk.found()
    desk.sign("v1", "a", "b")
    told = desk.ok(
        "steward", "rotate", "v1", "--remove", "c", "--add", f"d={desk.keys['d']}", "--out", "v2"
    )
    assert "2 more needed out of: a, b, d" in told
    assert "the stewards of v1; 2 more needed out of: a, b, c" in told
    desk.sign("v2", "a", "d")  # enough of the new set, only one of the old
    book = RosterBook()
    book.add(desk.bytes("v1"))
    with pytest.raises(FactRejected, match="not signed by 2 of roster v1's"):
        book.add(desk.bytes("v2"))
    assert desk.run("steward", "verify", "v2", "--against", "v1")[0] == 7
    desk.sign("v2", "b")
    desk.ok("steward", "verify", "v2", "--against", "v1")
    assert book.add(desk.bytes("v2")).version == 2


def test_thieves_with_fewer_than_k_keys_cannot_take_the_network(desk):
    desk.found()
    desk.sign("v1", "a", "b")
    desk.ok(
        "steward", "rotate", "v1", "--remove", "a", "--remove", "b", "--threshold", 1, "--out", "v2"
    )
    desk.sign("v2", "c")  # one stolen key, enough for the new set of one
    desk.ok("steward", "verify", "v2")
    assert desk.run("steward", "verify", "v2", "--against", "v1")[0] == 7


def test_a_rotation_that_changes_nothing_or_names_nobody_is_refused(desk):
    desk.found()
    assert desk.run("steward", "rotate", "v1", "--out", "v2")[0] == 2
    assert desk.run("steward", "rotate", "v1", "--remove", "z", "--out", "v2")[0] == 5


# --- run files ---------------------------------------------------------------------------------

DESCRIBE = """
import json, pathlib, sys
task, genesis = sys.argv[2], sys.argv[4]
if task == "unknown":
    print("no task unknown", file=sys.stderr); sys.exit(2)
pathlib.Path(genesis).write_bytes(b"model")
facts = {"task": task, "task_id": "07" * 32, "genesis": sys.argv[5], "num_parameters": 10}
print(json.dumps(facts))
"""


@pytest.fixture
def task(desk, monkeypatch):
    """The private plane's answer, without torch: a real process with the same arguments."""
    script = desk.folder / "describe.py"
    script.write_text(DESCRIBE)
    real = subprocess.run

    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "p2pfed.training", "describe"]
        genesis = fact_hash(b"model").hex()
        return real([sys.executable, script, *command[3:], genesis], **options)

    monkeypatch.setattr(subprocess, "run", run)
    desk.found("d0")
    desk.add("d0", "roster", 0)
    desk.sign("roster", "a", "b")
    return desk


def create(desk, *more) -> tuple[int, str, str]:
    return desk.run(
        "run",
        "create",
        "--roster",
        "roster",
        "--task",
        "heart",
        "--out",
        "run",
        "--genesis",
        "genesis",
        *more,
    )


@pytest.mark.slow
def test_a_run_is_made_signed_and_shown(task):
    assert create(task, "--epsilon", "2.5", "--rounds", 20, "--segment-blocks", 2)[0] == 0
    run = Run.decode(SignedDocument.parse(task.bytes("run")).payload)
    assert (float(run.epsilon), run.rounds, run.unit) == (2.5, 20, "patient")
    assert (run.num_parameters, run.genesis) == (10, fact_hash(b"model"))
    assert "1 more needed" in task.ok("run", "sign", "run", "--key", "a.key", "--roster", "roster")
    roster = RosterBook().add(task.bytes("roster"))
    with pytest.raises(FactRejected):
        check_signed_run(task.bytes("run"), roster)
    assert "enough" in task.ok("run", "sign", "run", "--key", "c.key", "--roster", "roster")
    assert check_signed_run(task.bytes("run"), roster).name == "heart"
    told = task.ok("run", "show", "run", "--roster", "roster")
    assert "at most ε 2.5, δ 1e-5 in all; one round alone: about ε 0.5377" in told
    assert "receivers       H0" in told and "5 of 10 values" in told
    assert task.run("steward", "sign", "run", "--key", "a.key")[0] == 7  # not a roster


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--epsilon", "x"), 2),
        (("--epsilon", "1/3"), 7),
        (("--mechanism", "laplace"), 2),
        (("--rounds", "0"), 7),
        (("--select-share", "1"), 7),
        (("--task", "unknown"), 2),
        (("--roster", "missing"), 2),
        (("--epsilon", "0"), 7),
        (("--quorum", "7"), 7),
    ],
)
def test_a_run_that_makes_no_sense_is_not_written(task, options, code):
    found, _, err = create(task, *options)
    assert found == code, err
    assert not (task.folder / "run").exists()


@pytest.mark.slow
def test_a_run_without_protection_must_be_asked_for_by_name_and_says_so(task):
    assert create(task, "--mechanism", "none")[0] == 0
    assert "protection      NONE" in task.ok("run", "show", "run", "--roster", "roster")


@pytest.fixture
def accepting(task, monkeypatch):
    """A signed run, its genesis, and a daemon that holds the roster."""
    assert create(task)[0] == 0
    task.ok("run", "sign", "run", "--key", "a.key")
    task.ok("run", "sign", "run", "--key", "b.key")
    backend = fakes.FakeBackend()
    backend.signed_roster = task.bytes("roster").decode()
    with fakes.daemon(backend, task.folder / "admin.sock"):
        monkeypatch.setenv("P2PFED_SOCKET", str(task.folder / "admin.sock"))
        yield task, backend


@pytest.mark.slow
def test_accepting_shows_what_leaves_and_hands_over_exact_bytes_and_genesis(accepting):
    desk, backend = accepting
    (desk.folder / "blobs").mkdir()  # as a daemon makes them
    (desk.folder / "store.db").touch()
    told = desk.ok("run", "accept", "run", "--genesis", "genesis", "--yes")
    assert told.index("what leaves the building") < told.index("accepted run heart")
    assert "at most ε 10," in told  # what the run may take, and what this hospital gives:
    assert "  this hospital   stops at its own ε 8, over all runs (privacy.epsilon)" in told
    blob = desk.folder / "blobs" / fact_hash(b"model").hex()
    assert backend.asked == [("run", (desk.bytes("run"), blob))]
    assert blob.read_bytes() == b"model"
    assert stat.S_IMODE(blob.stat().st_mode) == 0o600


@pytest.mark.parametrize(("own", "told"), [(8.0, 1), (10.0, 0), (12.0, 0), (None, 0)])
def test_a_hospitals_own_limit_is_told_where_it_is_the_lower_one(own, told):
    made = SimpleNamespace(mechanism="svt", epsilon=Fraction(10))
    assert len(list(_of_hospital({"epsilon": own}, made))) == told
    bare = SimpleNamespace(mechanism="none", epsilon=Fraction(0))
    assert list(_of_hospital({"epsilon": own}, bare)) == []


@pytest.mark.slow
def test_without_a_terminal_nobody_is_asked_and_nothing_accepted(accepting, monkeypatch):
    desk, backend = accepting
    code, out, err = desk.run("run", "accept", "run")
    assert code == 2 and "--yes" in err and "what leaves the building" in out
    assert backend.asked == []


@pytest.mark.slow
def test_a_no_at_the_terminal_accepts_nothing(accepting, monkeypatch):
    desk, backend = accepting
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", lambda: "n\n", raising=False)
    assert desk.run("run", "accept", "run")[0] == 7
    assert backend.asked == []
    monkeypatch.setattr(sys.stdin, "readline", lambda: "y\n", raising=False)
    assert desk.run("run", "accept", "run")[0] == 0
    assert len(backend.asked) == 1


@pytest.mark.slow
def test_an_unsigned_run_or_a_wrong_genesis_never_reaches_the_daemon(accepting):
    desk, backend = accepting
    (desk.folder / "genesis").write_bytes(b"another model")
    code, _, err = desk.run("run", "accept", "run", "--genesis", "genesis", "--yes")
    assert code == 7 and "is not the first model" in err
    payload = SignedDocument.parse(desk.bytes("run")).payload
    (desk.folder / "bare").write_bytes(payload)
    code, _, err = desk.run("run", "accept", "bare", "--yes")
    assert code == 7 and "not signed by 2" in err
    assert backend.asked == []


# --- from init to a roster ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_line_that_init_prints_works_at_the_stewards_desk(desk):
    import shlex

    told = desk.ok("init", "--name", "St Mary", "--dir", "node")
    line = next(row for row in told.splitlines() if "steward add" in row)
    desk.found("d0")
    words = [{"ROSTER": "d0", "NEXT": "v1"}.get(w, w) for w in shlex.split(line)]
    assert words[0] == "p2pfed"
    desk.ok(*words[1:])
    [member] = desk.data("steward", "show", "v1")["members"]
    key = NodeKey.load(desk.folder / "node" / "node.key")
    assert (member["name"], member["peer_id"]) == ("St Mary", key.peer_id)
