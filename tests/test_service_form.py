"""The service form as its people use it: root, the socket's group, operators, the trainer's user.

A fake daemon behind a socket of a group, its configuration in a folder of the trainer's group, its
state in a folder of the node's user; the real command line as real users.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from admin_fakes import FakeBackend, daemon, short_folder
from consortium import Consortium
from other_users import Stage, folder_of, required, why_not

from p2pfed import places
from p2pfed.cli import locate
from p2pfed.cli.files import replace_file
from p2pfed.identity.filehash import file_hash

NODE, TRAINER, MEMBER, STRANGER, GROUP = range(61_881, 61_886)  # users that no machine has
NOT_HERE = why_not()
pytestmark = [pytest.mark.slow, required(NOT_HERE)]

# The command line on a machine whose service lies elsewhere.
DRIVER = """
import sys
from p2pfed import places
from p2pfed.cli import locate
config, socket = sys.argv[1:3]
places.PLACES = ("p2pfed.toml", "~/.config/p2pfed/p2pfed.toml", config)
places.SERVICE_SOCKET = locate.SERVICE_SOCKET = socket
from p2pfed.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


class Service:
    """Folders with the owners of docs/service.md, and the command line as any user."""

    def __init__(self, base: Path) -> None:
        base.chmod(0o711)
        self.base = base
        self.etc = folder_of(0, TRAINER, 0o750, base / "etc")
        self.state = folder_of(NODE, NODE, 0o700, base / "state")
        self.blobs = self.state / "blobs"
        self.blobs.mkdir(mode=0o700)
        os.chown(self.blobs, NODE, NODE)
        (self.state / "store.db").touch()
        self.run = folder_of(NODE, GROUP, 0o750, base / "run")
        self.socket = self.run / "admin.sock"
        self.config = self.etc / "p2pfed.toml"
        self.config.write_text(
            f'[node]\nname = "x"\ndata_dir = "{self.state}"\n[admin]\nsocket = "{self.socket}"\n'
            f'[train]\nuser = "{TRAINER}"\ntask = "breast-cancer"\n[privacy]\nepsilon = 8\n'
        )
        os.chown(self.config, 0, TRAINER)
        self.config.chmod(0o640)
        stage = Stage(base / "stage")
        self.root: list[str] = []
        self.member = stage.command(MEMBER, GROUP)
        self.stranger = stage.command(STRANGER)
        self.trainer = stage.command(TRAINER)

    def cli(
        self, who: list[str], *words: object, cwd: str | Path = "/"
    ) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("P2PFED_")}
        driver = [sys.executable, "-c", DRIVER, str(self.config), str(self.socket)]
        return subprocess.run(
            [*who, *driver, *map(str, words)], check=False, cwd=cwd, capture_output=True, text=True,
            timeout=60, stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip

    def refused(self, code: int, who: list[str], *words: object) -> list[str]:
        """The three lines of an error."""
        done = self.cli(who, *words)
        lines = done.stderr.splitlines()
        assert (done.returncode, len(lines)) == (code, 3), done.stderr
        assert "bug" not in done.stderr and "p2pfed init" not in done.stderr
        return lines


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def service(backend):
    if NOT_HERE:
        pytest.fail(NOT_HERE)
    with short_folder() as base:
        made = Service(base)
        with daemon(backend, made.socket, mode=0o660, group=str(GROUP)):
            yield made


# --- where the daemon is, for whom -------------------------------------------------------------


def test_a_member_of_the_group_asks_the_service_without_reading_its_configuration(service):
    done = service.cli(service.member, "status", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["name"] == "St Mary"
    service.etc.chmod(0o755)  # now it is the file alone that is closed
    assert service.cli(service.member, "peers").returncode == 0
    service.config.unlink()
    assert service.cli(service.member, "peers").returncode == 0


def test_a_stranger_is_told_what_is_closed_and_not_to_make_a_node(service):
    what, why, do = service.refused(4, service.stranger, "status")
    assert what == f"cannot look into {service.etc}: permission denied"
    assert f"nor is {service.socket} to be seen" in why
    assert "systemctl status p2pfed" in do and "--socket" in do


def test_a_configuration_that_was_named_is_never_passed_over(service):
    for named in (service.config, service.etc / "nothing.toml"):
        what, *_ = service.refused(4, service.member, "-c", named, "status")
        assert what == f"cannot look into {service.etc}: permission denied"
    service.etc.chmod(0o755)
    what, *_ = service.refused(4, service.member, "-c", service.config, "status")
    assert what == f"cannot read {service.config}: permission denied"


def test_the_doctor_sends_who_may_not_read_the_configuration_to_root(service):
    for mode in (0o750, 0o755):
        service.etc.chmod(mode)
        what, _, do = service.refused(4, service.member, "doctor", "--offline")
        assert "permission denied" in what
        assert "sudo p2pfed doctor" in do


def test_a_folder_of_somebody_else_in_which_one_stands_hides_no_configuration(service):
    closed = service.base / "roots"
    closed.mkdir(mode=0o700)  # as after: sudo -u, in root's home
    done = service.cli(service.trainer, "config", "path", cwd=closed)
    assert (done.returncode, done.stdout.strip()) == (0, str(service.config))


def test_the_places_of_the_service_are_those_of_its_example():
    example = (Path(__file__).resolve().parent.parent / "bootstrap/hospital.toml").read_text()
    assert f'socket = "{places.SERVICE_SOCKET}"' in example
    assert f'socket = "{places.SERVICE_PRIVATE}"' in example
    assert locate._beside(places.SERVICE_SOCKET) == places.SERVICE_PRIVATE


def test_who_joins_with_a_first_roster_that_nothing_vouches_for_is_warned(
    service, backend, monkeypatch
):
    async def join(**_):
        return {"network": "n", "network_id": "ab" * 32, "member": True, "vouched": vouched}

    monkeypatch.setattr(backend, "join", join)
    for vouched in (False, True):
        done = service.cli(service.root, "-c", service.config, "join")
        assert done.returncode == 0, done.stderr
        assert ("nothing vouched" in done.stdout) == (not vouched)
        assert (f'network.id = "{"ab" * 32}"' in done.stdout) == (not vouched)


# --- a first model from the operator's hand ----------------------------------------------------


@pytest.fixture
def offered(service, backend) -> list[object]:
    """The words that accept a run, with its first model as a file of root's."""
    consortium = Consortium(2)
    backend.signed_roster = consortium.signed[-1].decode()
    first = service.base / "genesis"
    first.write_bytes(bytes(160))
    first.chmod(0o600)
    run = service.base / "run.json"
    run.write_bytes(consortium.signed_run(genesis=file_hash(bytes(160))))
    return ["run", "accept", run, "--genesis", first, "--yes"]


def last_genesis(backend: FakeBackend) -> Path:
    kind, (_, genesis) = backend.asked[-1]
    assert kind == "run"
    return genesis


def test_a_first_model_that_root_brings_belongs_to_the_nodes_user(service, backend, offered):
    blob = service.blobs / file_hash(bytes(160)).hex()
    blob.touch(mode=0o600)  # root's, as an older version left it
    done = service.cli(service.root, "-c", service.config, *offered)
    assert done.returncode == 0, done.stderr
    assert last_genesis(backend) == blob
    seen = blob.stat()
    assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (NODE, NODE, 0o600)
    assert blob.read_bytes() == bytes(160)
    assert list(service.blobs.iterdir()) == [blob]


def test_root_follows_no_link_that_the_nodes_user_has_put_there(service, backend, offered):
    trap = service.base / "trap"
    trap.mkdir(mode=0o755)
    service.blobs.rmdir()
    service.blobs.symlink_to(trap)
    done = service.cli(service.root, "-c", service.config, *offered)
    assert done.returncode == 0, done.stderr
    assert list(trap.iterdir()) == []
    assert last_genesis(backend) == service.base / "genesis"


def test_an_operator_names_a_file_that_the_daemon_reads_itself(service, backend, offered):
    backend.operators = frozenset({MEMBER})
    (service.base / "genesis").chmod(0o644)
    for name in ((), ("--socket", service.socket)):
        done = service.cli(service.member, *name, *offered)
        assert done.returncode == 0, done.stderr
        assert last_genesis(backend) == service.base / "genesis"
    assert list(service.blobs.iterdir()) == []
    assert list(service.run.iterdir()) == [service.socket]


# --- the task's code ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("model", "evaluate"), ("model", "tune"), ("model", "pictures", "--out", "p"),
        ("model", "export", "--out", "e"), ("predict", "--in", "x", "--out", "o"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_tasks_code_does_not_run_as_root_where_the_trainer_is_another_user(service, words):
    what, why, do = service.refused(7, service.root, "-c", service.config, *words)
    assert "would run as root" in what
    assert f"train.user is {TRAINER}" in why
    assert f"sudo -u {TRAINER} p2pfed" in do and "p2pfed model fetch" in do


def test_nor_is_it_checked_as_root(service):
    what, _, do = service.refused(7, service.root, "-c", service.config, "task", "check")
    assert "would run as root" in what
    assert do == f"sudo -u {TRAINER} p2pfed task check"


def test_a_task_that_is_named_needs_no_configuration_of_a_service_beside_it(service):
    done = service.cli(
        service.stranger, "predict", "--model", "tuned", "--task", "no-such", "--in", "x",
        "--out", "o",
    )  # fmt: skip
    assert "permission denied" not in done.stderr
    assert "no-such" in done.stderr


def test_a_file_that_is_made_anew_is_the_owners_alone(tmp_path):
    old = os.umask(0)
    try:
        replace_file(tmp_path / "new", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
