"""What the tab key offers: by the parsers themselves, in a real bash, and fast."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import admin_fakes as fakes
import pytest
from fair_clock import FairClock

from p2pfed.cli import complete
from p2pfed.cli.completion import SCRIPTS
from p2pfed.cli.main import COMMANDS, main
from p2pfed.tasks import BUNDLED

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(monkeypatch):
    with fakes.empty_home(monkeypatch) as path:
        yield path


@pytest.fixture
def socket(folder):
    backend = fakes.FakeBackend()
    backend.make_peers = lambda: [
        {**fakes.PEER, "name": name} for name in ("Oslo", "St Mary", "evil\x1b[2J")
    ]
    with fakes.daemon(backend, folder / "admin.sock"):
        yield str(folder / "admin.sock")


def offered(capsys, *words: str) -> list[str]:
    assert main(["__complete", *words]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return told.out.splitlines()


def test_the_first_word_is_a_command(capsys):
    assert offered(capsys, "bash", "") == [*COMMANDS, "help"]
    assert offered(capsys, "zsh", "st") == ["status", "steward"]
    assert offered(capsys, "fish", "help", "wa") == ["wait"]
    assert offered(capsys, "fish", "nope", "") == []


def test_options_of_a_command_and_of_its_subcommands(capsys):
    assert offered(capsys, "bash", "peers", "--st") == ["--state"]
    assert {"--socket", "--json"} <= set(offered(capsys, "bash", "status", "--"))
    assert "--no-color" in offered(capsys, "bash", "--")
    assert "--as-seen" not in offered(capsys, "bash", "status", "-")
    assert offered(capsys, "bash", "task", "") == ["new", "check", "log", "pause", "resume"]
    assert "--only" in offered(capsys, "bash", "privacy", "audit", "--")  # learns its options late
    assert offered(capsys, "bash", "task", "nope", "--") == []


def test_choices_stand_in_place_of_a_value(capsys):
    assert offered(capsys, "bash", "share", "") == ["on", "off"]
    assert offered(capsys, "bash", "peers", "--state", "a") == ["alive", "away"]
    assert offered(capsys, "zsh", "peers", "--state=a") == ["--state=alive", "--state=away"]
    assert offered(capsys, "bash", "peers", "--state", "=", "a") == ["alive", "away"]


def test_bash_gets_what_follows_its_own_word_breaks(capsys):
    assert offered(capsys, "zsh", "wait", "--for", "run=") == ["run=finished"]
    assert offered(capsys, "bash", "wait", "--for", "run", "=") == ["finished"]
    assert offered(capsys, "bash", "wait", "--for", "run", "=", "fin") == ["finished"]
    assert "peers=" in offered(capsys, "bash", "wait", "--for", "")


def test_tasks_are_those_that_come_with_the_program(capsys):
    assert offered(capsys, "bash", "privacy", "audit", "--task", "") == list(BUNDLED)


def test_files_and_folders_are_left_to_the_shell(capsys):
    assert offered(capsys, "bash", "node", "-c", "") == [":files"]
    assert offered(capsys, "bash", "-c", "") == [":files"]
    assert offered(capsys, "bash", "init", "--dir", "") == [":folders"]


def test_peers_are_asked_of_the_socket_and_steer_no_terminal(capsys, socket):
    assert offered(capsys, "zsh", "--socket", socket, "peers", "") == ["Oslo", "St Mary"]
    assert offered(capsys, "zsh", "block", "--socket", socket, "O") == ["Oslo"]
    assert offered(capsys, "bash", "--socket", socket, "peers", "St\\ M") == ["St Mary"]
    assert offered(capsys, "bash", "--socket", socket, "peers", '"St M') == ["St Mary"]


def test_no_daemon_and_no_sense_are_no_candidates(capsys, folder):
    assert offered(capsys, "bash", "peers", "") == []
    assert offered(capsys, "bash", "--socket", "/nowhere", "peers", "") == []
    assert offered(capsys, "bash", "-c", "missing.toml", "peers", "") == []
    assert main(["__complete", "csh", "x"]) == 2
    assert main(["__complete"]) == 2


@pytest.mark.slow
def test_a_daemon_that_does_not_answer_holds_the_tab_key_up_for_300_ms(capsys, folder):
    import socket as sockets

    with sockets.socket(sockets.AF_UNIX) as silent:
        silent.bind(str(folder / "silent.sock"))
        silent.listen()
        clock = FairClock()
        assert offered(capsys, "bash", "--socket", "silent.sock", "peers", "") == []
        assert clock.elapsed > 0.25
        assert clock.within(2)


# --- the scripts -------------------------------------------------------------------------------

_ASK = """
eval "$(p2pfed completion bash)"
complete -p p2pfed >/dev/null || exit 9
COMP_WORDS=("${@}"); COMP_CWORD=$(($# - 1))
_p2pfed
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def program(folder) -> Path:
    """A folder for PATH with the command p2pfed."""
    place = folder / "bin"
    place.mkdir()
    (place / "p2pfed").write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m p2pfed "$@"\n'
    )
    (place / "p2pfed").chmod(0o755)
    return place


def bash(program: Path, *words: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", _ASK, "bash", "p2pfed", *words],
        env={**os.environ, "PATH": f"{program}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_real_bash_completes(program, socket):
    assert bash(program, "sta") == ["status"]
    assert bash(program, "peers", "--state", "aw") == ["away"]
    assert bash(program, "wait", "--for", "task", "=") == ["ready"]
    assert bash(program, "--socket", socket, "peers", "") == ["Oslo", "St\\ Mary"]


@pytest.mark.slow
@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script_is_one_that_its_shell_reads(shell, tmp_path):
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed here")
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell])
    subprocess.run([found, "-n", str(script)], check=True, capture_output=True, timeout=30)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_script_knows_both_words_for_the_shell_and_closes_what_it_opens(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text == SCRIPTS[shell]
    assert f"__complete {shell}" in text
    assert ":files" in text and ":folders" in text
    for opening, closing in ("{}", "[]"):
        assert text.count(opening) == text.count(closing)
    assert text.count('"') % 2 == 0
    if shell == "fish":
        words = text.partition("\n")[2].split()  # without the comment
        opened = sum(words.count(word) for word in ("function", "for", "switch"))
        assert words.count("end") == opened


def test_completing_loads_only_the_commands_own_module():
    source = (
        "import sys\nfrom p2pfed.cli.main import main\n"
        "main(['__complete', 'bash', 'peers', '--'])\n"
        "print(sorted(m for m in sys.modules if m.startswith('p2pfed.cli.')), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    loaded = {name.rpartition(".")[2] for name in ast.literal_eval(done.stderr)}
    assert loaded == {"complete", "locate", "main", "observe", "options", "plain_toml", "text"}


def test_every_kind_of_value_is_a_function_or_a_word_that_the_scripts_know():
    for kind in complete._KINDS.values():
        assert callable(kind) or kind in {":files", ":folders"}
