"""`p2pfed bugreport`: what is in the archive, and above all what is not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import Self

import pytest
from admin_fakes import PEER, FakeBackend, daemon
from consortium import peer_of
from sound_node import sound_node

from p2pfed.cli.bugreport import _tail
from p2pfed.cli.main import main
from p2pfed.doctor.redaction import Pseudonyms, cut_out, every_text
from p2pfed.identity.keys import NodeKey
from p2pfed.privacy.ledger import Ledger

CANARY = "MRN-CANARY-4711"
FILES = ["README.txt", "versions.json", "daemon.json", "events.json", "config.json", "doctor.json"]
FILES += ["log.json"]


class Backend(FakeBackend):
    """The fake with what a real node tells besides."""

    def reachability(self):
        return {
            "mode": "auto",
            "visited": "",
            "relay_wanted": True,
            "relays": [],
            "possible_relays": 0,
            "connections": {"direct_in": 0, "direct_out": 1, "relayed": 0},
        }


@pytest.fixture
def node(monkeypatch):
    for name in [n for n in os.environ if n.startswith("P2PFED_")]:
        monkeypatch.delenv(name)
    with sound_node() as made:
        yield made


def report(node, tmp_path, *flags) -> dict[str, str]:
    """The texts in the archive."""
    out = tmp_path / "report.zip"
    out.unlink(missing_ok=True)
    assert main(["bugreport", "-c", str(node.config), "-o", str(out), *flags]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    with zipfile.ZipFile(out) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_archive_holds_what_it_says_and_is_closed_to_others(capsys, node, tmp_path):
    files = report(node, tmp_path)
    told = capsys.readouterr().out
    assert list(files) == FILES
    assert all(name in told for name in FILES)
    assert "mode 0600" in told
    for name in FILES[1:]:
        json.loads(files[name])
        assert name in files["README.txt"]
    assert json.loads(files["versions.json"])["libraries"]["libp2p"]["installed"] == "0.8.1"
    assert "cannot reach the daemon" in files["daemon.json"]


def test_nothing_is_overwritten(capsys, node, tmp_path):
    out = tmp_path / "report.zip"
    out.write_text("mine")
    assert main(["bugreport", "-c", str(node.config), "-o", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_the_answers_of_a_daemon_and_its_last_thousand_events_are_in_it(node, tmp_path):
    backend = Backend()
    for number in range(1300):
        backend.emit("round.finished", round=number)
    with daemon(backend, node.folder / "admin.sock"):
        files = report(node, tmp_path)
    told = json.loads(files["daemon.json"])
    assert told["status"]["name"] == "St Mary"
    assert told["peers"][0]["name"] == "Oslo"
    events = json.loads(files["events.json"])
    assert [event["data"]["round"] for event in events] == list(range(300, 1300))
    checks = {row["check"]: row["status"] for row in json.loads(files["doctor.json"])["checks"]}
    assert checks["daemon"] == "ok"


def plant(node) -> list[str]:
    """Put marks wherever private facts are, and say which."""
    data = node.data.parent / f"{CANARY}-images"
    (data / f"{CANARY}-patient").mkdir(parents=True)
    (data / f"{CANARY}-patient" / "scan.nii").write_text(CANARY)
    with Ledger.open(node.ledger) as ledger:
        ledger.register(CANARY, [CANARY.encode()])
    (node.folder / "trainer.log").write_text(f"{CANARY} loss 31337.125\n")
    (node.folder / "trainer").mkdir()
    (node.folder / "trainer" / f"{CANARY}.safetensors").write_text(CANARY)
    log = node.folder / "daemon.log"
    log.write_text(f"cannot read {data}/{CANARY}-patient/scan.nii\nround 3 began\n")
    node.configure(
        train={"data": str(data), "options": {"cohort": f"{CANARY}-cohort", "site": 3}},
        log={"file": str(log)},
    )
    seed = NodeKey.load(node.key).seed.hex()
    return [CANARY, seed, "31337.125"]


class Listening:
    """A trainer's socket that notices whether anybody asks it anything."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen(8)
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def was_asked(self) -> bool:
        """Whether anybody has sent a request; a connection alone asks nothing."""
        while True:
            try:
                came, _ = self._socket.accept()
            except BlockingIOError:
                return False
            with came:
                came.settimeout(1)
                if came.recv(1):
                    return True


def test_no_mark_of_the_private_plane_is_in_the_archive(node, tmp_path):
    marks = plant(node)
    with Listening(node.folder / "trainer.sock") as trainer:
        with daemon(Backend(), node.folder / "admin.sock"):
            files = report(node, tmp_path)
        assert not trainer.was_asked()
    whole = "\n".join(files.values())
    assert [mark for mark in marks if mark in whole] == []
    assert "round 3 began" in files["log.json"]
    assert "cannot read [train.data]" in files["log.json"]
    config = json.loads(files["config.json"])
    assert config["train"]["options"] == {"cohort": "[redacted]", "site": "[redacted]"}
    assert config["train"]["data"] == config["privacy"]["ledger"] == "[redacted]"


def test_a_configuration_with_mistakes_tells_its_wrong_keys_and_no_value(node, tmp_path):
    marks = plant(node)
    node.configure(train={"data": f"/nowhere/{CANARY}", "epochs": CANARY})
    files = report(node, tmp_path)
    whole = "\n".join(files.values())
    assert [mark for mark in marks if mark in whole] == []
    assert "train.epochs" in json.dumps(json.loads(files["config.json"])["mistakes_in"])
    assert "not made" in json.loads(files["doctor.json"])["checks"]


def test_what_lies_in_the_place_of_the_log_and_is_none_is_not_packed_and_not_waited_for(
    node, tmp_path
):
    secret, log = tmp_path / "secret", node.folder / "daemon.log"
    secret.write_text(f"{CANARY} of the person who makes the report\n")
    node.configure(log={"file": str(log)})
    log.symlink_to(secret)
    files = report(node, tmp_path)
    assert CANARY not in "".join(files.values())
    assert "cannot be read" in files["log.json"]
    log.unlink()
    os.mkfifo(log)
    assert "no regular file" in report(node, tmp_path)["log.json"]
    log.unlink()
    log.write_text("round 3 began\n")
    assert "round 3 began" in report(node, tmp_path)["log.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_packs_no_more_of_a_log_than_the_daemons_user_may_read(tmp_path):
    theirs, roots, daemon_user = Path(tempfile.mkdtemp()), tmp_path / "var", 61871
    try:
        roots.mkdir(mode=0o755)
        (roots / "daemon.log").write_text(CANARY)
        (roots / "daemon.log").chmod(0o600)
        (theirs / "kept").symlink_to(roots)
        (theirs / "planted.log").write_text(CANARY)
        (theirs / "own.log").write_text("round 3 began\n")
        for path in (theirs, theirs / "own.log"):
            os.chown(path, daemon_user, daemon_user)
        for name in ("kept/daemon.log", "planted.log"):
            assert CANARY not in "".join(_tail(theirs / name, theirs))
        assert _tail(theirs / "own.log", theirs) == ["round 3 began"]
        assert os.geteuid() == 0
    finally:
        shutil.rmtree(theirs)


def test_an_anonymous_archive_names_nobody(node, tmp_path):
    backend = Backend()
    backend.make_peers = lambda: [{**PEER, "peer_id": peer_of(1)}]
    backend.health = ["clock differs from Oslo at 192.0.2.77"]
    backend.emit("peer.joined", peer="12D3KooW" + "A" * 44, addresses=["/ip4/203.0.113.9/tcp/4201"])
    # A directory service knows her, and does not list its users.
    backend.emit("admin.write", uid=70_123, user="berta", endpoint="POST /v1/share", outcome="done")
    backend.emit("admin.write", uid=995, user="daemon", endpoint="POST /v1/share", outcome="done")
    node.configure(node={"name": "Charité"}, admin={"operators": ["alice"]})
    names = ["St Mary", "Oslo", "cardio-eu", "Charité", "192.0.2.77", "203.0.113.9", "alice"]
    names.insert(0, "berta")
    names += [peer_of(1), "12D3KooWAAAA", NodeKey.load(node.key).peer_id, socket.gethostname()]
    with daemon(backend, node.folder / "admin.sock"):
        open_, closed = report(node, tmp_path), report(node, tmp_path, "--anonymous")
    whole = "\n".join(open_.values())
    assert [name for name in names[:7] if name not in whole] == []
    whole = "\n".join(closed.values())
    assert "daemon.json" in whole  # a service's name is nobody's
    assert [name for name in names if name in whole] == []
    told = json.loads(closed["daemon.json"])
    assert told["peers"][0]["name"] in told["status"]["health"][0]  # the same one everywhere


# --- redaction ---------------------------------------------------------------------------------


def test_what_hangs_on_a_private_path_goes_with_it():
    clean = cut_out({"/data/hearts": "[train.data]", "/": "never"})
    assert (
        clean("cannot read /data/hearts/Doe_John/1.nii: gone") == "cannot read [train.data]: gone"
    )
    assert clean("/data/heart and /") == "/data/heart and /"


def test_pseudonyms_are_the_same_everywhere_and_leave_words_times_and_versions_alone():
    change = Pseudonyms(["Oslo", "Os"])
    value = {"Oslo": ["Oslo at 192.0.2.1", "Oslogate 12:30:45", "0.8.1 of 127.0.0.1"], "n": 3}
    assert every_text(value, change) == {
        "name-1": ["name-1 at address-1", "Oslogate 12:30:45", "0.8.1 of 127.0.0.1"],
        "n": 3,
    }
    assert change("2001:db8::7 is not 192.0.2.1") == "address-2 is not address-1"
    assert change("/dns4/p2p.oslo.example/tcp/1") == "/dns4/address-3/tcp/1"
