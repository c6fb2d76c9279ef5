"""Units, users and images in bootstrap/: what systemd accepts, and that they and the docs agree."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import distribution
from pathlib import Path

import pytest
from admin_fakes import short_folder
from packaging.requirements import Requirement

from p2pfed.cli.enrol import next_steps
from p2pfed.config import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bootstrap"
IMAGES = FOLDER / "containers"
UNITS = sorted(FOLDER.glob("*.service"))
PROGRAM = "/opt/p2pfed/.venv/bin/p2pfed"
CONFIG = Path("/etc/p2pfed/p2pfed.toml")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze"
)


class _Unit(configparser.RawConfigParser):
    """A systemd unit; a key that stands twice keeps its last value."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, comment_prefixes=("#",), interpolation=None)
        self.optionxform = str
        self.read(path, "utf-8")


def service(name: str) -> dict[str, str]:
    return dict(_Unit(FOLDER / f"{name}.service")["Service"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    """The example for a hospital, on a machine that has its users."""
    text = (FOLDER / "hospital.toml").read_text("utf-8")
    path = tmp_path_factory.mktemp("etc") / "p2pfed.toml"
    path.write_text(text.replace('"p2pfed-trainer"', f'"{os.geteuid()}"'))
    return load_settings(path)


@needs_systemd
@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.name)
def test_systemd_finds_nothing_wrong_with_a_unit(unit, tmp_path):
    there = tmp_path / "p2pfed"  # the program, which is not installed here
    there.symlink_to("/bin/true")
    for each in UNITS:
        (tmp_path / each.name).write_text(each.read_text("utf-8").replace(PROGRAM, str(there)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "p2pfed" not in done.stderr


@needs_systemd
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"),
    [("p2pfed", 20), ("p2pfed-trainer", 20), ("p2pfed-bootstrap", 20), ("p2pfed-wait-online", 35)],
)
def test_a_unit_is_exposed_no_more_than_it_must_be(name, most):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={most}", "--no-pager",
         FOLDER / f"{name}.service"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:]


def test_node_and_trainer_are_two_users_who_meet_in_one_group():
    node, trainer = service("p2pfed"), service("p2pfed-trainer")
    assert (node["User"], trainer["User"]) == ("p2pfed", "p2pfed-trainer")
    assert node["SupplementaryGroups"] == trainer["Group"] == "p2pfed-trainer"
    made = (FOLDER / "sysusers.d" / "p2pfed.conf").read_text("utf-8")
    assert re.findall(r"^([um]) (\S+) (\S+)", made, re.MULTILINE) == [
        ("u", "p2pfed", "-"),
        ("u", "p2pfed-trainer", "-"),
        ("m", "p2pfed", "p2pfed-trainer"),
    ]


def test_the_units_start_the_two_halves_with_one_configuration():
    assert service("p2pfed")["ExecStart"] == f"{PROGRAM} node -c {CONFIG}"
    assert service("p2pfed-trainer")["ExecStart"] == f"{PROGRAM} trainer -c {CONFIG}"


@pytest.mark.parametrize("name", ["p2pfed", "p2pfed-bootstrap"])
def test_a_reload_reads_the_configuration_that_the_unit_was_started_with(name):
    unit = service(name)
    config = unit["ExecStart"].removeprefix(f"{PROGRAM} node -c ")
    assert unit["ExecReload"] == f"{PROGRAM} -c {config} config reload"


def test_no_boot_waits_for_a_peer_unless_a_service_asks_for_it():
    assert not _Unit(FOLDER / "p2pfed-wait-online.service").has_section("Install")


def test_patients_are_given_to_the_trainers_user_and_never_to_the_group_that_the_node_is_in():
    told = (ROOT / "docs" / "service.md").read_text("utf-8")
    assert "chgrp" not in told
    assert "chown -R p2pfed-trainer: /srv/p2pfed" in told
    assert "-/srv/p2pfed" in service("p2pfed")["InaccessiblePaths"].split()


def test_the_paths_of_units_configuration_and_documents_agree(settings):
    node, trainer = service("p2pfed"), service("p2pfed-trainer")
    state = Path("/var/lib") / trainer["StateDirectory"]
    assert settings.node.data_dir == Path("/var/lib") / node["StateDirectory"]
    assert settings.admin_socket.parent == Path("/run") / node["RuntimeDirectory"]
    assert str(settings.loop_socket.parent) == node["ReadWritePaths"]
    private = (settings.trainer_socket, settings.ledger_path, settings.trainer_state)
    assert {path.parent for path in private} == {state}
    assert node["InaccessiblePaths"] == f"-{state} {trainer['ReadOnlyPaths']}"
    folders = (FOLDER / "tmpfiles.d" / "p2pfed.conf").read_text("utf-8")
    assert f"d {settings.loop_socket.parent} 2750 p2pfed p2pfed-trainer" in folders
    assert f"d {CONFIG.parent} 0750 root p2pfed-trainer" in folders
    key = node["LoadCredential"].removeprefix("node.key:")
    told = (ROOT / "docs" / "service.md").read_text("utf-8")
    for path in (CONFIG, key, settings.admin_socket, settings.loop_socket, state, "/srv/p2pfed"):
        assert f"| `{path}` |" in told, path
    for path in (settings.ledger_path, settings.trainer_socket):
        assert path.name in told
    example = (FOLDER / "hospital.toml").read_text("utf-8")
    assert f'"{trainer["ReadOnlyPaths"].removeprefix("-")}"' in example


def test_what_the_trainer_needs_is_not_taken_from_it_and_the_network_is():
    trainer = service("p2pfed-trainer")
    assert trainer["PrivateNetwork"] == "yes"
    assert trainer["IPAddressDeny"] == "any"
    # several processes of one trainer look for their loopback by netlink (getifaddrs)
    assert {"AF_UNIX", "AF_INET", "AF_NETLINK"} <= set(trainer["RestrictAddressFamilies"].split())
    hurts_cuda = {"PrivateDevices", "MemoryDenyWriteExecute", "ProcSubset"}
    assert set(trainer).isdisjoint(hurts_cuda | {"RemoveIPC", "PrivateIPC"})
    assert "PrivateIPC" not in service("p2pfed")
    assert "PrivateUsers" not in service("p2pfed")  # it must tell users apart


@pytest.mark.parametrize("name", ["p2pfed", "p2pfed-bootstrap"])
def test_a_daemon_is_watched_ends_gracefully_and_is_not_restarted_in_vain(name):
    wanted = {
        "Type": "notify",
        "NotifyAccess": "main",
        "WatchdogSec": "60",
        "KillSignal": "SIGINT",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2 7",
        "StateDirectoryMode": "0700",
        "ProtectSystem": "strict",
        "UMask": "0077",
        "LimitCORE": "0",
    }
    found = service(name)
    assert {key: found.get(key) for key in wanted} == wanted


def test_an_invited_bootstrap_node_is_told_to_accept_the_run_as_its_readme_says():
    args = Namespace(task=None, samples=None, name="B", announce=[])
    made = dict.fromkeys(
        ("peer_id", "key", "config", "request_file", "request", "network", "network_fingerprint"),
        "x",
    )
    lines = next_steps(args, {**made, "node_fingerprint": "y"})
    assert lines[-2:] == [
        "  p2pfed -c x join APPROVAL   (the file from the steward)",
        "  p2pfed -c x run accept APPROVAL",
    ]
    told = (FOLDER / "README.md").read_text("utf-8")
    assert "join for-bootstrap-1.json" in told
    assert "run accept for-bootstrap-1.json" in told


def test_the_service_page_keeps_what_an_invite_is_good_for(settings):
    told = (ROOT / "docs" / "service.md").read_text("utf-8")
    assert "p2pfed init --invite" in told
    assert f"answer/invited.json {settings.node.data_dir}/invited.json" in told
    assert "^id = " in told and (FOLDER / "hospital.toml").read_text("utf-8").count("\nid = ") == 1
    folders = (FOLDER / "tmpfiles.d" / "p2pfed.conf").read_text("utf-8")
    assert f"d {settings.node.data_dir} 0700 p2pfed p2pfed" in folders


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["node", "trainer"])
def test_an_image_copies_what_is_there_pins_its_base_and_is_no_root(name):
    text = (IMAGES / f"{name}.Containerfile").read_text("utf-8").replace("\\\n", " ")
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"\S+:3\.11\.\d+-slim-bookworm", base) for base in bases)
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    users = re.findall(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
    assert users == [("10001", "10001") if name == "node" else ("10002", "10002")]
    assert "--require-hashes" in text
    torch = "requirements-torch.txt" in text
    assert torch == (name == "trainer")


def test_the_compose_file_names_files_that_are_there_and_no_latest_tag():
    text = (IMAGES / "compose.yaml").read_text("utf-8")
    for file in re.findall(r"dockerfile: (\S+)", text):
        assert (ROOT / file).is_file()
    assert re.findall(r"context: (\S+)", text) == ["../..", "../.."]
    assert (IMAGES / "../..").resolve() == ROOT
    images = re.findall(r"image: (\S+)", text)
    assert len(images) == 2
    assert all(re.search(r":\d+\.\d+\.\d+$", image) for image in images)
    assert "network_mode: none" in text
    assert "ipc:" not in text.replace("`ipc:`", "")  # podman-compose leaves it out
    assert "shm_size: 64mb" in text  # less than exchange_folder wants: it takes the volume of both
    assert 'o: "uid=10001,gid=10002,mode=2750,' in text
    assert text.count("cap_drop: [ALL]") == text.count("read_only: true") == 2


def test_both_images_mount_what_the_example_configuration_names(settings):
    text = (IMAGES / "compose.yaml").read_text("utf-8")
    mounted = set(re.findall(r":(/[^:\s\"]+)", text))
    private = (settings.trainer_socket, settings.ledger_path, settings.trainer_state)
    for path in (settings.node.data_dir, settings.loop_socket.parent, CONFIG.parent):
        assert str(path) in mounted
    assert {str(path.parent) for path in private} <= mounted
    assert f"- node-run:{settings.admin_socket.parent}\n" in text  # podman has no uid= for a tmpfs


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _needed(name: str, found: set[str]) -> None:
    """Add a package and all that it needs here, without extras."""
    if name not in found:
        found.add(name)
        for requirement in map(Requirement, distribution(name).requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                _needed(_normal(requirement.name), found)


def test_the_nodes_image_has_all_that_a_daemon_needs_and_nothing_of_torch():
    names = {
        line
        for line in (IMAGES / "node.txt").read_text("utf-8").split("\n")
        if line and not line.startswith("#")
    }
    done = subprocess.run(
        [sys.executable, IMAGES / "lock_of.py", ROOT / "requirements.lock", IMAGES / "node.txt"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert set(re.findall(r"^(\S+)==", done.stdout, re.MULTILINE)) == names
    wanted: set[str] = set()
    first = (
        "base58 cryptography hypercorn libp2p msgpack multiaddr numpy pydantic pynacl rich"
        " safetensors starlette trio"
    )
    for name in first.split():
        _needed(name, wanted)
    assert wanted <= {_normal(name) for name in names}
    assert names.isdisjoint({"torch", "scikit-learn", "monai", "matplotlib", "pytest"})


def test_a_package_that_the_lock_does_not_have_is_an_error(tmp_path):
    (tmp_path / "names").write_text("trio\nno-such-thing\n")
    done = subprocess.run(
        [sys.executable, IMAGES / "lock_of.py", ROOT / "requirements.lock", tmp_path / "names"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "no-such-thing" in done.stderr


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "sklearn", "monai", "matplotlib", "scipy", "pandas"}:
            raise ImportError(f"{name} is not in the node's image")

sys.meta_path.insert(0, Blocked())
from p2pfed.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_daemon_starts_answers_and_ends_without_torch(tmp_path):
    folder = tmp_path / "node"
    program = [sys.executable, "-c", BLOCKED]
    words = ["init", "--name", "A", "--dir", str(folder), "--listen", "/ip4/127.0.0.1/tcp/0"]
    subprocess.run([*program, *words], check=True, capture_output=True, timeout=60)
    with short_folder() as short:
        admin = str(short / "admin.sock")
        command = [*program, "node", "-c", str(folder / "p2pfed.toml"), "--socket", admin]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            try:
                first = process.stderr.readline()  # it says that it is ready
                assert b"node.ready" in first, first
                told = subprocess.run(
                    [*program, "--socket", admin, "status", "--json"],
                    check=True, capture_output=True, timeout=60,
                )  # fmt: skip
                assert b'"ok": true' in told.stdout
                process.terminate()
                process.stderr.read()
                assert process.wait(30) == 0
            finally:
                process.kill()
