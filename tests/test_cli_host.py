"""Commands on files of this machine: init, config, bootstrap, node; no daemon answers here."""

from __future__ import annotations

import importlib.util
import json
import re
import stat
import sys
import types
from pathlib import Path

import pytest

from p2pfed.cli.main import main
from p2pfed.config import Settings, load_settings
from p2pfed.identity.keys import NodeKey, peer_id_of

_spec = importlib.util.spec_from_file_location(
    "admin_fakes", Path(__file__).with_name("admin_fakes.py")
)
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)

ADDRESS = f"/ip4/127.0.0.1/tcp/4201/p2p/{peer_id_of(bytes(32))}"


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    with fakes.empty_home(monkeypatch) as path:
        yield path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


# --- init --------------------------------------------------------------------------------------


def test_init_makes_a_private_folder_a_private_key_and_a_configuration_that_loads(capsys, folder):
    code, out, _ = run(capsys, "init", "--name", 'St "Mary" ü', "--dir", "node")
    assert code == 0
    assert stat.S_IMODE((folder / "node").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "node/node.key").stat().st_mode) == 0o600
    settings = load_settings(folder / "node/p2pfed.toml")
    assert settings.node.name == 'St "Mary" ü'
    assert settings.node.data_dir == folder / "node"
    assert not settings.train.enabled
    assert NodeKey.load(folder / "node/node.key").peer_id in out


def test_init_for_training_needs_a_budget(capsys, folder):
    code, _, err = run(capsys, "init", "--name", "x", "--dir", "node", "--task", "heart-disease")
    assert code == 2 and "privacy.epsilon: missing" in err
    assert not (folder / "node").exists()
    (folder / "data").mkdir()
    assert (
        run(
            capsys,
            "init",
            "--name",
            "x",
            "--dir",
            "node",
            "--task",
            "heart-disease",
            "--data",
            "data",
            "--epsilon",
            "8",
            "--listen",
            "/ip4/127.0.0.1/tcp/1",
            "--option",
            "site=3",
            "--option",
            "a b=c",
        )[0]
        == 0
    )
    settings = load_settings(folder / "node/p2pfed.toml")
    assert settings.train.options == {"site": 3, "a b": "c"}
    assert (settings.train.task, settings.train.data) == ("heart-disease", folder / "data")
    assert settings.privacy.epsilon == 8
    assert settings.node.listen == ("/ip4/127.0.0.1/tcp/1",)


def test_init_never_overwrites(capsys, folder):
    assert run(capsys, "init", "--name", "x", "--dir", "node")[0] == 0
    before = {p.name: p.read_bytes() for p in (folder / "node").iterdir()}
    for missing in ("node.key", "p2pfed.toml"):
        code, _, err = run(capsys, "init", "--name", "y", "--dir", "node")
        assert code == 2 and "exists already" in err
        assert {p.name: p.read_bytes() for p in (folder / "node").iterdir()} == before
        (folder / "node" / missing).unlink()
        del before[missing]


def test_init_does_not_put_a_key_where_others_look(capsys, folder):
    (folder / "empty").mkdir(mode=0o755)
    assert run(capsys, "init", "--name", "x", "--dir", "empty")[0] == 0
    assert stat.S_IMODE((folder / "empty").stat().st_mode) == 0o700
    (folder / "used").mkdir(mode=0o755)
    (folder / "used/file").touch()
    code, _, err = run(capsys, "init", "--name", "x", "--dir", "used")
    assert code == 2 and "chmod 700" in err
    assert [p.name for p in (folder / "used").iterdir()] == ["file"]


def test_the_configuration_of_init_names_every_key_there_is(capsys, folder):
    run(capsys, "init", "--name", "x", "--dir", "node")
    text = (folder / "node/p2pfed.toml").read_text()
    sections = dict(re.findall(r"(?ms)^\[(\w+)\](.*?)(?=^\[|\Z)", text))
    assert set(sections) == set(Settings.model_fields)
    for section, body in sections.items():
        keys = set(re.findall(r"(?m)^(?:# )?(\w+) = ", body))
        assert keys == set(Settings.model_fields[section].annotation.model_fields), section


def test_a_name_that_no_configuration_takes_is_refused_and_leaves_nothing(capsys, folder):
    code, _, err = run(capsys, "init", "--name", "x" * 65, "--dir", "node")
    assert code == 2 and "node.name" in err
    assert not (folder / "node").exists()


@pytest.mark.parametrize("wrong", [("--listen", "nope"), ("--announce", "/ip4/10.0.0.1/udp/1")])
def test_an_address_that_is_none_is_refused_and_nothing_is_written(capsys, folder, wrong):
    code, _, err = run(capsys, "init", "--name", "x", "--dir", "node", *wrong)
    what, why, do = err.splitlines()
    assert code == 2 and what == "the configuration that these arguments make has 1 mistake"
    assert f"node.{wrong[0][2:]}.0" in why and "/ip4/192.0.2.1/tcp/4201" in why
    assert do == "nothing was written; correct the arguments: p2pfed init -h"
    assert not (folder / "node").exists()


def test_a_failed_init_takes_away_the_folders_that_it_made_and_no_others(capsys, folder):
    (folder / "there").mkdir(mode=0o700)
    for place in ("a/b/node", "there"):
        assert run(capsys, "init", "--name", "x", "--dir", place, "--listen", "nope")[0] == 2
    assert not (folder / "a").exists()
    assert list((folder / "there").iterdir()) == []


# --- config ------------------------------------------------------------------------------------


def test_config_check_lists_all_mistakes_at_once(capsys, folder):
    (folder / "p2pfed.toml").write_text('[node]\nnam = "x"\n[log]\nlevel = "loud"\n')
    code, _, err = run(capsys, "config", "check")
    assert code == 2
    assert "did you mean 'name'?" in err and "log.level" in err and "node.data_dir" in err
    assert run(capsys, "config", "check", "missing.toml")[0] == 2


def test_without_any_configuration_the_next_step_is_told(capsys, folder, monkeypatch):
    monkeypatch.setattr("p2pfed.places.PLACES", ("p2pfed.toml",))
    code, _, err = run(capsys, "config", "check")
    assert code == 2 and "p2pfed init" in err


def test_config_show_fills_in_the_defaults(capsys, folder):
    run(capsys, "init", "--name", "x", "--dir", "node")
    code, out, _ = run(capsys, "config", "show", "node/p2pfed.toml")
    assert code == 0
    assert f'socket = "{folder}/node/admin.sock"' in out
    data = json.loads(run(capsys, "config", "show", "node/p2pfed.toml", "--json")[1])["data"]
    assert data["privacy"]["unit"] == "patient"
    assert run(capsys, "config", "check", "node/p2pfed.toml")[1].endswith("is right\n")


# --- node --------------------------------------------------------------------------------------


def test_node_hands_checked_settings_to_the_daemon_and_returns_its_code(
    capsys, folder, monkeypatch
):
    given = []
    fake = types.ModuleType("p2pfed.node.daemon")
    fake.run_node = lambda settings: given.append(settings) or 7
    monkeypatch.setitem(sys.modules, "p2pfed.node", types.ModuleType("p2pfed.node"))
    monkeypatch.setitem(sys.modules, "p2pfed.node.daemon", fake)
    assert run(capsys, "node", "-c", "missing.toml")[0] == 2
    run(capsys, "init", "--name", "x", "--dir", "node")
    assert run(capsys, "node", "-c", "node/p2pfed.toml", "--socket", folder / "s.sock")[0] == 7
    [settings] = given
    assert settings.admin_socket == folder / "s.sock"


def test_a_machine_without_any_name_server_is_told_so(capsys, folder, monkeypatch):
    """Libp2p asks for one as soon as it is imported."""
    from dns.resolver import NoResolverConfiguration

    def missing(name):
        raise NoResolverConfiguration("no nameservers")

    fake = types.ModuleType("p2pfed.node.daemon")
    fake.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "p2pfed.node.daemon", fake)
    run(capsys, "init", "--name", "x", "--dir", "node")
    code, _, told = run(capsys, "node", "-c", "node/p2pfed.toml")
    assert code == 1  # the unit tries again
    assert "knows no name server" in told
    assert "nameserver 127.0.0.1" in told


def test_a_socket_path_that_is_too_long_is_told_before_anything_starts(capsys, folder):
    run(capsys, "init", "--name", "x", "--dir", "node")
    code, _, err = run(capsys, "node", "-c", "node/p2pfed.toml", "--socket", "/" + "x" * 120)
    assert code == 2 and "may have 107" in err


# --- bootstrap ---------------------------------------------------------------------------------


def test_a_bootstrap_list_is_edited_without_losing_comments(capsys, folder):
    assert (
        run(
            capsys,
            "bootstrap",
            "add",
            "b.toml",
            "--name",
            "Oslo",
            "--addr",
            ADDRESS,
            "--network",
            "cardio",
        )[0]
        == 0
    )
    text = (folder / "b.toml").read_text() + "# a comment\n"
    (folder / "b.toml").write_text(text)
    assert run(capsys, "bootstrap", "add", "b.toml", "--name", "Kyoto", "--addr", ADDRESS)[0] == 0
    assert run(capsys, "bootstrap", "add", "b.toml", "--name", "Kyoto", "--addr", ADDRESS)[0] == 2
    assert "Kyoto" in run(capsys, "bootstrap", "list", "b.toml")[1]
    assert run(capsys, "bootstrap", "rm", "b.toml", "Kyoto")[0] == 0
    assert run(capsys, "bootstrap", "rm", "b.toml", "Kyoto")[0] == 5
    assert (folder / "b.toml").read_text().strip() == text.strip()
    assert run(capsys, "bootstrap", "check", "b.toml")[1] == "ok, peers: 1, in b.toml\n"


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/127.0.0.1/tcp/4201",
        "127.0.0.1:4201",
        "/ip4/127.0.0.1/tcp/0/p2p/x",
        "/ip4/127.0.0.1/tcp/4201/p2p/12D3KooWnonsense",
        ADDRESS.replace("4201", "70000"),
        ADDRESS.replace("/tcp/", "/udp/"),
    ],
)
def test_an_address_without_an_identity_is_refused_and_nothing_written(capsys, folder, address):
    code, _, err = run(capsys, "bootstrap", "add", "b.toml", "--name", "x", "--addr", address)
    assert code == 2, err
    assert not (folder / "b.toml").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "version = 2",
        "version = 1\nextra = 1",
        "version = 1\npeer = 3",
        "version = [",
        "version = 1\npeer = [3]",
        'version = 1\nnetwork_id = "xyz"',
        'version = 1\n[[peer]]\nname = "x"',
        'version = 1\n[[peer]]\naddrs = ["x"]',
    ],
)
def test_a_list_that_is_wrong_is_refused(capsys, folder, text):
    (folder / "b.toml").write_text(text)
    code, _, err = run(capsys, "bootstrap", "check", "b.toml")
    assert code == 2 and "Traceback" not in err


def test_the_demo_gets_its_options(capsys, monkeypatch):
    given = []
    fake = types.ModuleType("p2pfed.demo.story")
    fake.run_demo = lambda options: given.append(options) or 0
    monkeypatch.setitem(sys.modules, "p2pfed.demo", types.ModuleType("p2pfed.demo"))
    monkeypatch.setitem(sys.modules, "p2pfed.demo.story", fake)
    assert run(capsys, "demo", "--data", "d", "--rounds", "5", "--json")[0] == 0
    assert given == [
        {
            "data": "d",
            "seed": 0,
            "out": "p2pfed-demo",
            "epsilon": "10",
            "rounds": 5,
            "json": True,
        }
    ]


def test_init_writes_the_ledgers_path_down_so_that_no_environment_moves_the_budget(
    capsys, folder, monkeypatch
):
    monkeypatch.setenv("P2PFED_HOME", str(folder / "here"))
    code, _, _ = run(
        capsys, "init", "--name", "x", "--dir", "node", "--task", "breast-cancer", "--epsilon", "3"
    )
    assert code == 0
    monkeypatch.setenv("P2PFED_HOME", str(folder / "elsewhere"))
    assert load_settings(folder / "node/p2pfed.toml").ledger_path == folder / "here/ledger.db"
