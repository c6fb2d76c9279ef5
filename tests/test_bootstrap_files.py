"""The files in bootstrap/ are what a node, an operator and systemd accept."""

from __future__ import annotations

import configparser
import tomllib
from pathlib import Path

import pytest

from p2pfed.config import load_settings
from p2pfed.identity.bootstrap import BootstrapList

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bootstrap"


def test_the_example_list_parses_and_names_two_peers():
    path = FOLDER / "example.toml"
    listed = BootstrapList.parse(path.read_text("utf-8"), str(path))
    assert [peer.name for peer in listed.peers] == ["Bootstrap 1", "St Anna"]
    assert len({peer.peer_id for peer in listed.peers}) == 2


def test_the_example_configuration_loads_and_trains_nothing():
    settings = load_settings(FOLDER / "p2pfed.toml")
    assert not settings.train.enabled
    assert settings.network.rejoin
    assert settings.admin_socket == settings.node.data_dir / "admin.sock"


class _Unit(configparser.RawConfigParser):
    """A systemd unit; keys may stand twice, the last one is kept."""

    def __init__(self) -> None:
        super().__init__(strict=False, comment_prefixes=("#",), interpolation=None)
        self.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their case


@pytest.fixture(scope="module")
def unit() -> _Unit:
    read = _Unit()
    read.read(FOLDER / "p2pfed-bootstrap.service", "utf-8")
    return read


def test_the_unit_starts_the_node_with_the_configuration_in_its_data_directory(unit):
    program, *arguments = unit["Service"]["ExecStart"].split()
    configuration = tomllib.loads((FOLDER / "p2pfed.toml").read_text("utf-8"))
    assert program.endswith("/.venv/bin/p2pfed")
    assert arguments == ["node", "-c", configuration["node"]["data_dir"] + "/p2pfed.toml"]
    assert unit["Service"]["StateDirectory"] == Path(configuration["node"]["data_dir"]).name


def test_the_unit_has_neither_privileges_nor_foreign_files(unit):
    wanted = {
        "User": "p2pfed",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateDevices": "yes",
        "UMask": "0077",
        "StateDirectoryMode": "0700",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    }
    service = dict(unit["Service"])
    assert {key: service.get(key) for key in wanted} == wanted


def test_a_wrong_configuration_is_not_tried_again_and_again(unit):
    assert unit["Service"]["Restart"] == "on-failure"
    assert unit["Service"]["RestartPreventExitStatus"] == "2 7"
