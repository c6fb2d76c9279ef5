"""The quick reader of plain TOML files says what tomllib says, or nothing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfed.cli.locate import admin_client
from p2pfed.cli.plain_toml import plain_toml
from p2pfed.cli.template import configuration

PIECES = st.sampled_from(
    [
        *"[]{}=\"#,.\\-_ \t\r\n'",
        *("a", "b", "node", "true", "false", "null", "NaN", "inf", "0", "1", "-1", "+1", "1e3"),
        *(
            "1_0",
            "01",
            "0x1",
            "2026-01-01",
            '"""',
            "'''",
            "\\u0041",
            "\\n",
            "\\ud800",
            "\\/",
            "é",
            "\x7f",
            "\ufeff",
        ),
        *(' = "x"\n', "[a]\n", "a = 1\n", 'b = ["x", "y"] # z\n', "[[a]]\n", "a.b = 1\n"),
        *('c = { a = 1, "b" = "x" }\n', "d = {}\n", '"e" = false\n', "-a_ = -1.5e3\n"),
    ]
)


def loaded(text: str) -> object:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return "wrong"


@given(st.lists(PIECES, max_size=14).map("".join))
def test_whatever_the_text_the_answer_is_that_of_tomllib_or_none(text):
    said = plain_toml(text)
    assert said is None or repr(said) == repr(loaded(text))  # repr: 1 is not True, nor 1.0


@pytest.mark.parametrize(
    "text",
    [
        "[a",
        "a = {",
        "a = { b = { c = 1 } }",
        "a = { b = 1",
        "a = 1\na = 2",
        "[a]\n[a]",
        "a = 1\n[a]",
        "[a] b = 1",
        "a = 1 b",
        "a = null",
        "a = NaN",
        "a = [1, [2]]",
        'a = "x\n"',
        'a = "\\/"',
        'a = "\\ud83d\\ude00"',
        'a = "\\x"',
        'a = "\\"',
        "a = 'x'",
        'a = """\n[b]\nc = 1\n"""',
        "a = [\n  1,\n]",
        "a.b = 1",
        "[a.b]",
        "[[a]]",
        "a = 2026-01-01",
        "= 1",
        '"" = 1',
        "a = " + "[" * 100_000,
    ],
)
def test_what_is_not_plain_or_wrong_is_left_to_tomllib(text):
    assert plain_toml(text) is None


def test_the_configuration_that_init_writes_is_plain():
    text = configuration(
        name="Hôpital de Genève",
        listen=["/ip4/0.0.0.0/tcp/4201", "/ip6/::/tcp/4201"],
        announce=["/dns4/example.org/tcp/4201"],
        network_id="ab" * 32,
        task="hippocampus",
        data="/srv/images # 2",
        epsilon="8",
        options={"site": 1, "name": "b c"},
        ledger="/var/lib/p2pfed/ledger.db",
    )
    said = plain_toml(text)
    assert said == tomllib.loads(text)
    assert said["train"]["options"] == {"site": 1, "name": "b c"}


def test_a_command_that_finds_its_daemon_by_a_configuration_loads_neither_tomllib_nor_pathlib(
    tmp_path,
):
    (tmp_path / "p2pfed.toml").write_text('[node]\ndata_dir = "."\n')
    source = (
        "import sys\nfrom p2pfed.cli.main import main\ncode = main(['status'])\n"
        "print('LOADED', *{'pathlib', 'tomllib', 'typing', 'json'} & set(sys.modules))\n"
        "sys.exit(code)"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": "", "HOME": str(tmp_path)},
    )
    assert done.returncode == 3, done.stderr
    assert str(tmp_path / "admin.sock") in done.stderr
    assert done.stdout.split() == ["LOADED", "json"]


@pytest.mark.parametrize(
    "said", ["a.sock", "./a/./b.sock", "../up.sock", "/abs//a.sock", "~/home.sock", "a/../b.sock"]
)
@pytest.mark.parametrize("quoted", ['"{}"', "'{}'"])  # plain; and for tomllib
def test_a_socket_lies_where_pathlib_would_join_it(tmp_path, monkeypatch, said, quoted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    file = tmp_path / "conf" / "p2pfed.toml"
    file.write_text(f'[node]\ndata_dir = "."\n[admin]\nsocket = {quoted.format(said)}\n')
    expected = str(file.parent / Path(said).expanduser())
    for named in (str(file), "conf/p2pfed.toml", "./conf/p2pfed.toml"):
        assert admin_client(Namespace(socket=None, config=named)).path == expected
    file.write_text(f"[node]\ndata_dir = {quoted.format(said)}\n")
    assert admin_client(Namespace(socket=None, config=str(file))).path == expected + "/admin.sock"
