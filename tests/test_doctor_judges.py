"""What the doctor's judges say of facts that a test machine does not have: pure, no files."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pytest
from consortium import Consortium

from p2pfed.doctor import agreed, machine, own, paths, ports, private
from p2pfed.doctor.left import LeftFolder, left_folders
from p2pfed.doctor.seen import Seen, User
from p2pfed.doctor.unit import NodeUnit, node_unit
from p2pfed.errors import DaemonNotRunning, NotPermitted, TimedOut

GB = 10**9
PLACE = Path("/var/lib/p2pfed")
NODE, TRAINER = (User(name, uid, uid, frozenset({uid})) for name, uid in (("p2pfed", 7), ("tr", 8)))
LINKS = {"direct_in": 0, "direct_out": 2, "relayed": 0}
MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:26 / /dev/shm rw - tmpfs tmpfs rw
31 22 0:40 / /mnt/with\\040blank rw shared:1 - nfs4 server:/x rw
"""


@pytest.mark.parametrize(
    ("free", "needed", "status"),
    [(GB // 10, 0, "FAIL"), (GB, 0, "ok"), (GB, GB, "warn"), (3 * GB, GB, "ok")],
)
def test_a_disk_must_hold_what_the_run_may_take(free, needed, status):
    found = machine.disk(free, needed, PLACE)
    assert found.status == status
    assert status == "ok" or "make room" in found.fix


@pytest.mark.parametrize(
    ("kept", "behind", "status"),
    [(True, 0, "ok"), (None, 0, "ok"), (False, 0, "warn"), (True, 600, "FAIL"), (True, 60, "ok")],
)
def test_a_clock_must_be_kept_and_not_go_back(kept, behind, status):
    assert machine.clock(machine.Clock(kept, behind)).status == status


@pytest.mark.parametrize(
    ("found", "wanted", "status"),
    [
        (machine.Gpus(("H200, 140 GiB",), 1), "auto", "ok"),
        (machine.Gpus(("H200, 140 GiB",), 0), "auto", "FAIL"),
        (machine.Gpus(None, 0), "cuda", "FAIL"),
        (machine.Gpus(None, None), "auto", "ok"),
        (machine.Gpus(None, None), "cpu", "ok"),
        (machine.Gpus(None, None, "cpu"), "cuda", "FAIL"),
        (machine.Gpus(None, None, "cuda:0"), "cuda", "ok"),
        (machine.Gpus(None, None, "cpu"), "auto", "ok"),
    ],
)
def test_a_gpu_that_is_asked_for_must_be_seen_by_torch(found, wanted, status):
    assert machine.gpu(found, wanted).status == status


def test_memory_is_told_for_a_trainer_only():
    little = (16 * GB, GB // 2)
    assert machine.memory(little, 0, trains=True).status == "warn"
    assert machine.memory(little, 0, trains=False).status == "ok"
    assert machine.memory((16 * GB, 8 * GB), 32, trains=True).status == "warn"
    assert machine.memory(None, 0, trains=True).status == "ok"


def test_files_must_suffice_for_all_members():
    assert machine.open_files(256, 64).status == "warn"
    assert "LimitNOFILE=4096" in machine.open_files(256, 64).fix
    assert machine.open_files(1024, 64).status == "ok"
    assert machine.open_files(None, 1000).status == "ok"


def test_a_unit_that_is_not_enabled_is_told_and_no_unit_is_no_fault():
    assert machine.service(machine.Unit(systemd=True, loaded=True)).status == "warn"
    assert machine.service(machine.Unit(systemd=True)).status == "ok"
    assert machine.service(machine.Unit(systemd=False)).status == "ok"
    enabled = machine.Unit(systemd=True, loaded=True, enabled=True, active=True)
    assert machine.service(enabled).found.endswith("runs")
    trainer = machine.Unit(systemd=True, name="p2pfed-trainer.service", loaded=True)
    assert machine.service(trainer).fix == "systemctl enable --now p2pfed-trainer"
    gone = machine.service(replace(trainer, loaded=False)).found
    assert gone == "there is no p2pfed-trainer.service: after a reboot nobody starts the trainer"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/var/lib/x", "ext4"), ("/dev/shm/x", "tmpfs"), ("/mnt/with blank/ledger.db", "nfs4")],
)
def test_the_file_system_of_a_path_is_that_of_its_deepest_mount(path, kind):
    assert private.file_system(Path(path), MOUNTS) == kind


def ledger(**facts):
    seen = Seen(PLACE / "ledger.db", "file", facts.pop("mode", 0o600), 7, 7)
    return list(private.ledger(private.LedgerFacts(seen, facts.pop("system", "ext4"), **facts)))


def test_a_ledger_on_a_file_system_that_may_forget_is_told_beside_its_state():
    spent = private.Budget(records=12, spent=3.2, limit=8.0, left=40)
    rows = ledger(system="nfs4", budget=spent)
    assert [row.status for row in rows] == ["warn", "ok"]
    assert "ε 3.2 of 8 spent, 40 releases left" in rows[1].found


def test_a_budget_that_is_used_up_is_told_without_advice_to_refill_it():
    [row] = ledger(budget=private.Budget(records=12, spent=7.9, limit=8.0, left=0))
    assert row.status == "warn"
    assert "no further release fits" in row.found
    assert "only the hospital" in row.fix


def reached(**facts):
    told = {
        "mode": "auto",
        "visited": "",
        "relay_wanted": True,
        "relays": [],
        "possible_relays": 0,
        "connections": LINKS,
    }
    return paths.reach({**told, **facts}, [4201])


def test_who_reaches_this_node_is_judged_by_what_it_has_seen():
    assert paths.reach(None, [4201]).status == "ok"
    nobody = reached(connections=dict.fromkeys(LINKS, 0))
    assert (nobody.status, nobody.found) == ("warn", "no peer is connected")
    assert reached(visited="outside", relay_wanted=False).status == "ok"
    assert reached(visited="near", relay_wanted=False).status == "ok"
    assert "reached through Oslo" in reached(relays=[{"name": "Oslo", "peer_id": "x"}]).found
    closed = reached()
    assert closed.status == "warn"
    assert "open TCP 4201" in closed.fix and "network.relay = true" in closed.fix
    assert 'network.reach = "auto"' in reached(mode="never").fix


def port(error, holder=None, text="/ip4/0.0.0.0/tcp/4201"):
    return paths.Port(text, ports.Endpoint.read(text), error, holder)


@pytest.mark.parametrize(
    ("one", "pid", "status"),
    [
        (port(0), None, "ok"),
        (port(errno.EADDRINUSE, (42, "p2pfed")), 42, "ok"),
        (port(errno.EADDRINUSE, None), 42, "ok"),
        (port(errno.EADDRINUSE, None), None, "FAIL"),
        (port(errno.EADDRINUSE, (43, "nginx")), 42, "FAIL"),
        (port(0), 42, "FAIL"),
        (port(errno.EACCES, None, "/ip4/0.0.0.0/tcp/443"), None, "FAIL"),
    ],
)
def test_a_port_is_free_or_our_own_daemons(one, pid, status):
    assert [row.status for row in paths.listen([one], pid)] == [status]


def test_some_silent_bootstrap_peers_are_a_warning_and_all_a_failure():
    end = ports.Endpoint("ip4", "192.0.2.1", 4201)
    answers = paths.Dialled("a", end, known=True, allowed=True, problem="")
    silent = paths.Dialled("b", end, known=True, allowed=True, problem="no answer within 3 s")

    def status(*tried, connected=0):
        rows = paths.bootstrap(tried, lists=1, connected=connected, offline=False)
        return [row.status for row in rows]

    assert status(answers) == ["ok"]
    assert status(answers, silent) == ["warn"]
    assert status(silent) == ["FAIL"]
    assert status(silent, connected=2) == ["warn"]


def test_two_users_must_be_two_and_apart():
    def status(wanted, trainer, open_to_node=()):
        return own.users(NODE, wanted, trainer, open_to_node=list(open_to_node)).status

    assert status("", None) == "ok"
    assert status("tr", TRAINER) == "ok"
    assert status("tr", None) == "FAIL"
    assert status("p2pfed", NODE) == "FAIL"
    assert status("tr", TRAINER, ["train.data"]) == "FAIL"
    row = own.users(NODE, "tr", TRAINER, open_to_node=["train.data"])
    assert row.fix == "take it away: chown -R tr: PATH && chmod -R go= PATH"


def test_a_key_handed_over_by_the_service_needs_no_rights_of_the_node():
    seen = Seen(PLACE / "node.key", "file", 0o600, 0, 0)
    assert own.key(seen, "", NODE, readable=False, runs=True).status == "ok"
    refused = own.key(seen, "", NODE, readable=False, runs=False)
    assert (refused.status, refused.fix) == ("FAIL", "chown p2pfed /var/lib/p2pfed/node.key")


def test_a_key_that_the_service_hands_over_is_no_less_a_key():
    def row(mode, problem=""):
        seen = Seen(Path("/etc/p2pfed/node.key"), "file", mode, 0, 0)
        return own.key(seen, problem, NODE, readable=False, runs=False, handed=True)

    assert row(0o600).status == "ok"
    assert "p2pfed.service hands to the node" in row(0o600).found
    assert row(0o640).fix.startswith("chmod 600 /etc/p2pfed/node.key")
    assert row(0o600, "it is no key").status == "FAIL"
    missing = Seen(Path("/etc/p2pfed/node.key"), "missing")
    gone = own.key(missing, "", NODE, readable=False, runs=False, handed=True)
    assert (gone.status, gone.found) == ("FAIL", "there is no key at /etc/p2pfed/node.key")


UNIT = (Path(__file__).resolve().parent.parent / "bootstrap/p2pfed.service").read_text("utf-8")
CONFIG = Path("/etc/p2pfed/p2pfed.toml")


def test_the_unit_says_whose_key_lies_where(tmp_path):
    assert node_unit(CONFIG, [tmp_path]) is None
    (tmp_path / "p2pfed.service").write_text(UNIT)
    assert node_unit(CONFIG, [tmp_path]) == NodeUnit("p2pfed", Path("/etc/p2pfed/node.key"))
    assert node_unit(Path("/home/ana/p2pfed.toml"), [tmp_path]) is None
    drop_in = tmp_path / "p2pfed.service.d"
    drop_in.mkdir()
    encrypted = "/etc/p2pfed/node.key.cred"
    (drop_in / "a.conf").write_text(
        f"[Service]\nLoadCredentialEncrypted=node.key:{encrypted}\nUser=n\n"
    )
    assert node_unit(CONFIG, [tmp_path]) == NodeUnit("n", Path(encrypted))
    other = tmp_path / "other"
    other.mkdir()
    (other / "p2pfed.service").write_text("[Service]\nExecStart=p2pfed node -c /x.toml\n")
    assert node_unit(CONFIG, [other, tmp_path]) is None  # that one goes first


def test_a_network_that_nothing_vouched_for_is_a_warning_with_the_line_to_write():
    roster = Consortium(2).roster
    now = roster.expires - dt.timedelta(days=100)
    [row] = agreed.roster(roster, "", "", now, vouched=False)
    assert row.status == "warn"
    assert f'network.id = "{roster.network_id.hex()}"' in row.fix
    [row] = agreed.roster(roster, "", "", now)
    assert row.status == "ok"


def test_models_that_killed_daemons_left_in_memory_are_named_and_those_in_use_are_not(tmp_path):
    left, used = tmp_path / f"p2pfed-7-{'a' * 24}", tmp_path / f"p2pfed-7-{'b' * 24}"
    for folder in (left, used, tmp_path / "of somebody"):
        folder.mkdir()
        (folder / "view").write_bytes(bytes(2_000_000))
        os.link(folder / "view", folder / ".slot")  # as a slot has two names
    (tmp_path / f"p2pfed-7-{'c' * 24}").touch()
    (tmp_path / "p2pfed-crew-abcdef").mkdir()  # of a trainer that lives
    with holding(used):
        assert left_folders(tmp_path) == [LeftFolder(left, 2_000_000)]
    assert [one.path for one in left_folders(tmp_path)] == [left, used]
    [row] = machine.left([LeftFolder(left, 2_000_000)])
    assert (row.check, row.status) == ("memory", "warn")
    assert "2 MB" in row.found
    assert row.fix.startswith(f"rm -r {left}")
    assert list(machine.left([])) == []


@contextlib.contextmanager
def holding(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


@pytest.mark.parametrize(
    ("state", "restarts", "problem", "status"),
    [
        ("ready", 0, "", "ok"),
        ("ready", 2, "", "warn"),
        ("starting", 0, "", "ok"),
        ("starting", 3, "it died", "FAIL"),
        ("paused", 0, "", "warn"),
        ("waiting for the trainer to join", 0, "", "warn"),
    ],
)
def test_the_trainer_is_judged_by_its_state_and_its_restarts(state, restarts, problem, status):
    told = {"state": state, "restarts": restarts}
    assert private.trainer(told, problem, trains=True, log=PLACE).status == status


def test_a_problem_of_several_lines_is_told_in_one():
    row = private.trainer(
        {"state": "starting", "restarts": 1}, "it died\nwith a word\nor two", trains=True, log=PLACE
    )
    assert row.found.endswith("last problem: it died; with a word; or two")


def test_the_newest_note_of_the_trainer_is_told():
    assert list(private.noted([])) == []
    [row] = private.noted(["one by one", "memory ran out"])
    assert (row.check, row.status, row.found) == ("trainer", "warn", "it notes: memory ran out")
    assert row.fix == "all of them: p2pfed task log"


def test_other_versions_are_told():
    def rows(daemon, peers=(), pins=()):
        return [(row.status, row.found) for row in agreed.versions("1.0", daemon, peers, pins)]

    assert rows(None) == [("ok", "p2pfed 1.0")]
    assert rows("1.0", [{"version": "1.1"}]) == [("ok", "p2pfed 1.0; peers also 1.1")]
    assert [status for status, _ in rows("0.9")] == ["warn"]
    assert [status for status, _ in rows("1.0", pins=["libp2p 0.9 instead of 0.8.1"])] == ["FAIL"]


def test_a_daemon_that_is_stuck_forbidden_or_absent_is_told_apart():
    def row(silence, holder=None):
        found = own.daemon("", silence, holder, PLACE / "p2pfed.toml")
        return found.status, found.fix

    assert row(DaemonNotRunning("nobody")) == (
        "ok",
        "start it: p2pfed node -c /var/lib/p2pfed/p2pfed.toml",
    )
    assert row(TimedOut("no answer"), 42) == ("FAIL", "look at its log; then end it: kill 42")
    assert row(TimedOut("no answer", "", "try again")) == ("warn", "try again")
    assert row(NotPermitted("no", "", "usermod"), 42) == ("warn", "usermod")
