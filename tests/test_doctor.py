"""`p2pfed doctor`: each planted fault is found, its fix is named, and mended it is found no more.

The real command on a real folder; without a daemon here, with one in `test_doctor_daemon`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sound_node import listening, sound_node, stale_socket

from p2pfed.cli.main import main
from p2pfed.doctor.finding import CHECKS
from p2pfed.doctor.ports import Endpoint
from p2pfed.errors import ConfigError
from p2pfed.identity.keys import NodeKey
from p2pfed.network.addresses import parse_direct

ROOT = Path(__file__).resolve().parent.parent
OF_THE_MACHINE = {"clock", "ledger", "memory", "open-files", "service", "gpu", "disk"}


@pytest.fixture
def node(monkeypatch):
    for name in [n for n in os.environ if n.startswith("P2PFED_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with sound_node() as made:
        yield made


@pytest.fixture
def ask(capsys, node):
    """Exit code, and by check its worst row, of the real command."""

    def asked(*flags: str) -> tuple[int, dict[str, dict[str, str]]]:
        task = () if "--task" in flags else ("--no-task",)
        code = main(["doctor", "-c", str(node.config), "--json", *task, *flags])
        answer = json.loads(capsys.readouterr().out)
        assert answer["schema"] == "p2pfed.doctor/1"
        rows = answer["data"]["checks"]
        failed = {row["check"] for row in rows if row["status"] == "FAIL"}
        assert (code, answer["ok"]) == ((9, False) if failed else (0, True))
        order = ("ok", "warn", "FAIL")
        ordered = sorted(rows, key=lambda row: order.index(row["status"]))
        return code, {row["check"]: row for row in ordered}

    return asked


def assert_found(row: dict[str, str], status: str, found: str, fix: str) -> None:
    assert row["status"] == status, row
    assert re.search(found, row["found"]), row
    assert re.search(fix, row["fix"]), row


def test_nothing_is_wrong_with_a_sound_node_and_every_check_has_its_row(ask):
    code, rows = ask()
    assert tuple(sorted(rows)) == tuple(sorted(CHECKS))
    troubled = {check for check, row in rows.items() if row["status"] != "ok"}
    assert troubled <= OF_THE_MACHINE, rows
    assert code == 0


def test_the_table_says_in_one_line_what_was_found_and_how_to_mend_it(capsys, node):
    node.key.chmod(0o644)
    code = main(["doctor", "-c", str(node.config), "--offline", "--no-task"])
    out = capsys.readouterr().out
    assert code == 9
    assert re.search(rf"^FAIL  key +{node.key} has mode 0644: .* → chmod 600 ", out, re.MULTILINE)
    assert re.search(r"^ok    config ", out, re.MULTILINE)
    assert re.search(r"^failed: key", out, re.MULTILINE)


@pytest.mark.slow
def test_the_doctor_itself_loads_neither_torch_nor_the_network(node):
    code = (
        "import sys; from p2pfed.cli.main import main; "
        f"main(['doctor', '-c', {str(node.config)!r}, '--no-task']); "
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert "pydantic" in line.split()
    assert {"torch", "libp2p", "trio", "sklearn"}.isdisjoint(line.split())


# --- own files ---------------------------------------------------------------------------------


def test_every_mistake_of_the_configuration_is_a_row(capsys, node):
    node.configure(train={"epochs": 3}, network={"relayy": True})
    code = main(["doctor", "-c", str(node.config), "--json"])
    rows = json.loads(capsys.readouterr().out)["data"]["checks"]
    told = [row["found"] for row in rows if row["check"] == "config"]
    assert code == 9
    assert len(told) == 2
    assert any("relayy" in line and "did you mean 'relay'" in line for line in told)
    assert all("p2pfed config check" in row["fix"] for row in rows if row["check"] == "config")


def test_without_a_configuration_the_first_step_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("P2PFED_CONFIG", raising=False)
    if Path("/etc/p2pfed/p2pfed.toml").exists():
        pytest.skip("this machine has a node")
    assert main(["doctor"]) == 9
    assert "p2pfed init" in capsys.readouterr().out


def test_a_key_that_others_may_read_is_found_and_fixed(ask, node):
    node.key.chmod(0o644)
    code, rows = ask()
    assert_found(rows["key"], "FAIL", "mode 0644", f"^chmod 600 {node.key}")
    code, rows = ask("--fix", "--yes")
    assert rows["key"]["status"] == "ok"
    assert stat.S_IMODE(node.key.stat().st_mode) == 0o600
    assert code == 0


def test_a_missing_and_a_damaged_key_are_told_apart(ask, node):
    kept = node.key.read_text()
    node.key.write_text(kept[:-8])
    assert_found(ask()[1]["key"], "FAIL", "is not a key file", "put your copy in place")
    node.key.unlink()
    assert_found(ask()[1]["key"], "FAIL", "there is no key", "put your copy in place.*p2pfed init")


def test_a_state_folder_that_is_open_to_others_is_found_and_fixed(ask, node):
    node.folder.chmod(0o755)
    assert_found(ask()[1]["folder"], "FAIL", "mode 0755", f"^chmod 700 {node.folder}")
    assert ask("--fix", "--yes")[1]["folder"]["status"] == "ok"
    assert stat.S_IMODE(node.folder.stat().st_mode) == 0o700


def test_a_stale_socket_is_found_and_removed(ask, node):
    path = node.folder / "admin.sock"
    stale_socket(path)
    path.chmod(0o600)
    assert_found(ask()[1]["sockets"], "warn", "nobody listens", f"^rm {path}")
    assert ask("--fix", "--yes")[1]["sockets"]["status"] == "ok"
    assert not path.exists()


def test_a_socket_that_somebody_serves_is_left_alone(ask, node):
    path = node.folder / "trainer.sock"
    with socket.socket(socket.AF_UNIX) as served:
        served.bind(str(path))
        path.chmod(0o600)
        served.listen(8)
        assert ask("--fix", "--yes")[1]["sockets"]["status"] == "ok"
        assert path.exists()
        path.chmod(0o666)
        row = ask()[1]["sockets"]
    assert_found(row, "FAIL", "mode 0666", f"^chmod 0600 {path}")


def test_nothing_is_fixed_without_a_yes(ask, capsys, node):
    node.key.chmod(0o640)
    assert main(["doctor", "-c", str(node.config), "--no-task", "--fix", "--offline"]) == 2
    assert "chmod 600" in capsys.readouterr().err
    assert stat.S_IMODE(node.key.stat().st_mode) == 0o640


def test_a_link_is_not_followed_when_fixing(ask, node, tmp_path):
    real = tmp_path / "real.key"
    shutil.copyfile(node.key, real)
    real.chmod(0o644)
    node.key.unlink()
    node.key.symlink_to(real)
    assert ask("--fix", "--yes")[1]["key"]["status"] == "FAIL"
    assert stat.S_IMODE(real.stat().st_mode) == 0o644


def test_a_process_that_holds_the_folder_and_does_not_answer_is_named(ask, node):
    import fcntl

    with (node.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        row = ask()[1]["daemon"]
    assert_found(row, "FAIL", f"process {os.getpid()} holds", f"kill {os.getpid()}$")
    assert ask()[1]["daemon"]["status"] == "ok"


def test_a_note_of_the_trainer_is_a_row_of_its_own_and_stays_with_the_private_plane(monkeypatch):
    found = importlib.import_module("p2pfed.doctor.examine")  # the package names the function so
    train = SimpleNamespace(enabled=True)
    settings = SimpleNamespace(train=train, trainer_socket=Path("/run/trainer.sock"))
    status = {"trainer": {"state": "ready", "restarts": 0}}
    scene = SimpleNamespace(status=status, settings=settings, private=True)
    told = {"problem": "", "notes": ["one by one", "memory ran out"]}
    monkeypatch.setattr(found, "_private_status", lambda _: told)
    rows = [(row.status, row.found) for row in found._trainer(scene)]
    assert rows == [("ok", "ready"), ("warn", "it notes: memory ran out")]
    monkeypatch.undo()
    scene.private = False  # as for a bug report
    assert [row.found for row in found._trainer(scene)] == ["ready"]


# --- ways --------------------------------------------------------------------------------------


def test_a_port_that_another_process_holds_is_found_and_the_process_named(ask, node):
    with listening() as taken:
        node.configure(node={"listen": [f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"]})
        row = ask()[1]["listen"]
    assert_found(row, "FAIL", rf"in use by .* \(process {os.getpid()}\)", "node.listen")
    assert ask()[1]["listen"]["status"] == "ok"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("/ip4/0.0.0.0/tcp/99999", "no address to listen on"),
        ("/dns4/example.org/tcp/4201", "no address to listen on"),
        ("/ip4/192.0.2.1/tcp/4201", "no such address"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_found(ask, node, address, found):
    node.configure(node={"listen": [address]})
    assert_found(ask("--offline")[1]["listen"], "FAIL", found, "/ip4/0.0.0.0/tcp/")


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/ip4/0.0.0.0/tcp/4201", "FAIL"),
        ("/ip4/192.0.2.7/tcp/99999", "FAIL"),
        ("/ip4/127.0.0.1/tcp/4201", "warn"),
        ("/dns4/p2p.example.org/tcp/4201", "ok"),
    ],
)
def test_an_announced_address_must_lead_here(ask, node, address, status):
    node.configure(node={"announce": [address]})
    assert ask("--offline")[1]["announce"]["status"] == status


def test_a_dead_bootstrap_peer_is_found_and_what_to_allow_named(ask, node):
    with listening() as gone:
        port = gone.getsockname()[1]
    node.write_bootstrap(port)
    assert_found(
        ask()[1]["bootstrap"], "FAIL", "h1 at 127.0.0.1:.*refused", f"TCP out to 127.0.0.1:{port}"
    )
    assert ask("--offline")[1]["bootstrap"]["status"] == "ok"
    node.write_bootstrap(node.peer_port)
    assert ask()[1]["bootstrap"]["status"] == "ok"


def test_a_bootstrap_name_that_dns_does_not_know_is_found(ask, node, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    node.write_bootstrap(4201, "/dns4/gone.invalid")
    assert_found(ask()[1]["bootstrap"], "FAIL", "gone.invalid", "getent hosts gone.invalid")


def test_a_bootstrap_peer_outside_the_allowed_networks_is_found(ask, node):
    node.configure(network={"allowed_networks": ["192.0.2.0/24"]})
    assert_found(ask()[1]["bootstrap"], "FAIL", "outside", "add its network")


def test_a_clock_that_went_back_is_found(ask, node):
    ahead = time.time() + 3600
    os.utime(node.key, (ahead, ahead))
    assert_found(ask()[1]["clock"], "FAIL", "60 min in the future", "timedatectl set-ntp true")
    os.utime(node.key)
    assert ask()[1]["clock"]["status"] != "FAIL"


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.0.2.1/tcp/4201",
        "/ip6/::1/tcp/4201",
        "/dns4/a.example/tcp/1",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/udp/4201",
        "/ip6/192.0.2.1/tcp/1",
        "/ip4/::1/tcp/1",
        "tcp/1",
        "",
    ],
)
def test_addresses_are_read_as_the_network_reads_them(address):
    try:
        known = str(parse_direct(address))
    except ConfigError:
        known = None
    mine = Endpoint.read(address)
    assert (mine and f"/{mine.kind}/{mine.host}/tcp/{mine.port}") == known


# --- what was agreed ---------------------------------------------------------------------------


def test_an_expired_roster_is_found_and_one_that_soon_expires_is_told(ask, node):
    node.hold_rosters(days=5.5)
    assert_found(ask()[1]["roster"], "warn", "expires on .*, in 5 days", "p2pfed steward extend")
    node.hold_rosters(days=-1)
    assert_found(ask()[1]["roster"], "FAIL", "expired on", "p2pfed steward extend")
    node.hold_rosters(days=60)
    assert ask()[1]["roster"]["status"] == "ok"


def test_a_roster_without_this_node_is_found(ask, node):
    node.hold_rosters(days=60, members=1)
    own_id = NodeKey.load(node.key).peer_id
    assert_found(ask()[1]["roster"], "FAIL", f"no member {own_id}", "ask a steward")


def test_a_roster_that_nobody_signed_is_found(ask, node):
    newest = max((node.folder / "rosters").iterdir())
    *lines, _ = newest.read_bytes().splitlines(keepends=True)
    newest.write_bytes(b"".join(lines))  # one signature of two
    assert_found(ask()[1]["roster"], "FAIL", "does not verify", "move it out of rosters/")
    for roster in (node.folder / "rosters").iterdir():
        roster.unlink()
    assert_found(ask()[1]["roster"], "FAIL", "no roster is held", "p2pfed join --roster FILE")


def test_a_run_without_its_first_model_and_one_that_was_changed_are_found(ask, node):
    [model] = (node.folder / "blobs").iterdir()
    model.write_bytes(bytes(161))
    assert_found(ask()[1]["run"], "warn", "waits for its first model", "--genesis FILE")
    [run] = (node.folder / "runs").iterdir()
    run.write_bytes(b"{}")
    assert_found(ask()[1]["run"], "FAIL", "does not verify", "p2pfed run accept FILE")
    (node.folder / "store.db").unlink()
    assert_found(ask()[1]["run"], "warn", "no run is accepted", "p2pfed run accept FILE")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_first_model_that_the_nodes_user_may_not_read_is_found(ask, node):
    user = 61_890
    node.folder.parent.chmod(0o711)
    for path in (node.folder, *node.folder.rglob("*")):
        os.chown(path, user, user)
    assert ask("--offline")[1]["run"]["status"] == "ok"
    [model] = (node.folder / "blobs").iterdir()
    os.chown(model, 0, 0)  # as a command of root's had left it
    model.chmod(0o600)
    _, rows = ask("--offline")
    assert_found(
        rows["run"], "FAIL", f"^{user}, who runs .* may not read", f"^chown {user} {model}"
    )


def test_a_key_that_the_service_hands_over_is_looked_at_where_it_lies(
    ask, node, monkeypatch, tmp_path
):
    key = tmp_path / "etc" / "node.key"
    key.parent.mkdir()
    node.key.rename(key)
    assert_found(ask("--offline")[1]["key"], "FAIL", "there is no key", "put your copy in place")
    (tmp_path / "p2pfed.service").write_text(
        f"[Service]\nExecStart=/opt/p2pfed node -c {node.config}\nLoadCredential=node.key:{key}\n"
    )
    monkeypatch.setattr("p2pfed.doctor.unit.UNIT_FOLDERS", (tmp_path,))
    _, rows = ask("--offline")
    assert_found(rows["key"], "ok", f"^{key}, which p2pfed.service hands to the node", "")
    assert "lists this node" in rows["roster"]["found"]  # the key was read there
    key.write_text("garbage")
    assert_found(ask("--offline")[1]["key"], "FAIL", "is not a key file", "put your copy")


# --- disk, data, ledger, task ------------------------------------------------------------------


def test_a_disk_that_is_nearly_full_is_found(ask, node, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "none", str(small)]
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a small file system can be mounted by root only")
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        shutil.copytree(node.folder, small, dirs_exist_ok=True)
        node.config = small / "p2pfed.toml"
        _, rows = ask("--offline")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert_found(rows["disk"], "FAIL", r"8\.\d+ MB free|[1-8]\.?\d* MB free", "make room")
    assert_found(rows["ledger"], "warn", "is on tmpfs", "local disk")


def test_data_that_everybody_may_read_are_found(ask, node):
    node.data.chmod(0o755)
    for parent in node.data.parents:  # the way there must be open too
        if parent.stat().st_mode & 0o001 == 0 and parent != node.data.parent:
            pytest.skip(f"{parent} is closed")
    node.data.parent.chmod(0o755)
    assert_found(ask()[1]["data"], "FAIL", "everybody", f"^chmod o= {node.data}")
    node.data.chmod(0o750)
    assert ask()[1]["data"]["status"] == "ok"


def test_data_that_the_trainers_user_may_not_read_are_found(ask, node):
    if os.geteuid() == 0:
        node.configure(train={"user": "nobody"})
    else:
        node.data.chmod(0)
    assert_found(ask()[1]["data"], "FAIL", "may not read", "^setfacl|chown")
    node.data.chmod(0o700)


def test_data_inside_the_state_folder_are_found(ask, node):
    inside = node.folder / "patients"
    inside.mkdir(mode=0o700)
    node.configure(train={"data": str(inside)})
    assert_found(ask()[1]["data"], "warn", "lies in the node's state folder", "move it")


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights are tried by root only")
def test_a_network_process_that_can_read_the_private_plane_is_found(ask, node):
    node.configure(train={"user": "nobody"})
    row = ask()[1]["users"]
    assert_found(
        row, "FAIL", "root.*privacy.ledger, train.data", "run the daemon as a user of its own"
    )
    node.configure(train={"user": "no-such-user-here"})
    code, rows = ask()
    assert code == 9
    assert any(rows[check]["status"] == "FAIL" for check in ("users", "config") if check in rows)


def test_a_damaged_ledger_is_found(ask, node):
    sound = node.ledger.read_bytes()
    at = sound.rindex(b'"register"')
    node.ledger.write_bytes(sound[: at + 2] + b"X" + sound[at + 3 :])
    assert_found(ask()[1]["ledger"], "FAIL", "does not verify", "operations.md, The ledger")
    node.ledger.write_bytes(sound)
    row = ask()[1]["ledger"]
    assert row["status"] != "FAIL"


def test_a_ledger_that_others_may_read_is_found_and_fixed(ask, node):
    node.ledger.chmod(0o644)
    assert_found(ask()[1]["ledger"], "FAIL", "mode 0644", f"^chmod 600 {node.ledger}")
    assert ask("--fix", "--yes")[1]["ledger"]["status"] != "FAIL"
    assert stat.S_IMODE(node.ledger.stat().st_mode) == 0o600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status", "found"),
    [
        ("ModelRaises", "FAIL", "no weights here"),
        ("ModelIsNan", "FAIL", "NaN|not finite|nan"),
        ("Sound", "ok", "a dry step went well"),
    ],
)
def test_a_task_that_fails_its_dry_step_is_found(ask, node, name, status, found):
    node.configure(train={"task": f"broken_tasks:{name}"})
    row = ask("--task", "--offline")[1]["task"]
    assert (row["status"], bool(re.search(found, row["found"]))) == (status, True), row


# --- the document ------------------------------------------------------------------------------


def test_the_document_explains_every_check_in_their_order():
    text = (ROOT / "docs" / "doctor.md").read_text("utf-8")
    section = text.partition("\n## The checks\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert tuple(name for name, *_ in rows) == CHECKS
    assert all(len(meaning) > 20 and mend for _, meaning, mend in rows)
