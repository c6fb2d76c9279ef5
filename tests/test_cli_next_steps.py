"""Whatever is wrong, an error says what, why and what to do next, and names the file.

Commands run in this process, on files; none of them needs a daemon.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from p2pfed import errors
from p2pfed.cli.main import main, three_lines
from p2pfed.errors import P2PFedError

ROOT = Path(__file__).resolve().parent.parent

# A file that is not what a command wants, and what its name then stands for.
WRONG = {
    "missing": None,
    "folder": "",
    "empty": b"",
    "garbage": b"garbage",
    "binary": bytes(range(256)),
    "other": b'{"payload": "{}", "signatures": []}',
}

# Commands that read a file, which comes where the braces are.
READERS = [
    "join {}",
    "join --bootstrap {}",
    "run sign {} --key ana.key",
    "run show {} --roster r1.json",
    "run show run.json --roster {}",
    "steward sign {} --key ana.key",
    "steward sign r1.json --key {}",
    "steward key show {}",
    "steward verify {}",
    "steward show {}",
    "steward add {} --name N --peer-id X --samples 1 --out n",
    "steward extend {} --out n",
    "invite create {} --for X --key ana.key",
    "invite create r1.json --for X --key {}",
    "invite list --key {}",
    "roster show {}",
    "roster verify {}",
    "roster diff r1.json {}",
    "roster publish {}",
    "bootstrap list {}",
    "bootstrap rm {} X",
    "bootstrap check {}",
    "config check {}",
    "config show {}",
    "node -c {}",
    "-c {} status",
    "task check {}",
    "privacy ledger {}",
    "privacy ledger --verify {}",
]


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("P2PFED_CONFIG", "P2PFED_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("p2pfed.places.PLACES", ("p2pfed.toml",))
    main(["steward", "key", "new", "ana.key"])
    found = "--network n --steward ana=ana.key --threshold 1 --out r1.json"
    main(["steward", "found", *found.split()])
    (tmp_path / "run.json").write_text((tmp_path / "r1.json").read_text())
    for name, data in WRONG.items():
        if name == "folder":
            (tmp_path / name).mkdir()
        elif data is not None:
            (tmp_path / name).write_bytes(data)
            (tmp_path / name).chmod(0o600)
    capsys.readouterr()
    return tmp_path


def told(capsys, *arguments: str) -> tuple[int, list[str], dict]:
    """The exit code, the lines of the error, and the same as JSON."""
    code = main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    main([*arguments, "--json"])
    out = capsys.readouterr().out
    return code, lines, json.loads(out) if out else {}


@pytest.mark.parametrize("command", READERS)
def test_a_file_that_is_not_what_it_should_be_is_named_and_a_next_step_is_told(
    capsys, folder, command
):
    for wrong in WRONG:
        code, lines, answer = told(capsys, *command.format(wrong).split())
        assert code in {2, 3, 5, 7}, (command, wrong, lines)
        if code == 3 and "daemon" in lines[0]:
            continue  # it can be read: what is in it is for the daemon to judge
        assert len(lines) == 3 or "mistakes" in lines[0], (command, wrong, lines)
        assert wrong in lines[0] or "task check" in command, (command, wrong, lines)
        if command != "node -c {}":  # which has no --json
            assert answer["data"]["hint"] == lines[-1], (command, wrong)


def test_every_error_of_the_commands_and_of_the_socket_has_its_own_reason():
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type)}
    without = []
    for file in (*(ROOT / "p2pfed/cli").glob("*.py"), *(ROOT / "p2pfed/admin").glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call) or getattr(call.func, "id", "") not in kinds:
                continue
            why = call.args[1] if len(call.args) > 1 else ast.Constant("")
            if isinstance(why, ast.Constant) and not why.value:
                without.append(f"{file.name}:{call.lineno}")
    assert without == []


@pytest.mark.parametrize("code", range(10))
def test_an_error_without_a_reason_or_with_a_name_of_two_lines_still_has_three(code):
    error = P2PFedError("the name 'a\nb'", "", "do\nthis")
    error.exit_code = code
    told = three_lines(error, ["status"])
    assert (told.what, told.do) == ("the name 'a b'", "do this")
    assert told.why and "\n" not in told.why


def test_the_doctor_too_names_a_configuration_that_is_no_toml(capsys, folder):
    main(["-c", "garbage", "doctor"])
    assert "p2pfed config check garbage" in capsys.readouterr().out


def test_the_next_step_for_a_stewards_key_is_to_make_one(capsys, folder):
    code, lines, _ = told(capsys, "steward", "sign", "r1.json", "--key", "missing")
    assert code == 2 and lines[-1].endswith("p2pfed steward key new FILE")


def test_an_error_without_a_next_step_of_its_own_leads_to_the_help(capsys, folder):
    threshold = "--network n --steward ana=ana.key --threshold 3 --out r2.json"
    code, lines, answer = told(capsys, "steward", "found", *threshold.split())
    assert code == 7 and lines[-1] == answer["data"]["hint"] == "see: p2pfed steward -h"


def test_a_daemon_that_cannot_start_leads_to_the_doctor(capsys, folder):
    (folder / "p2pfed.toml").write_text(
        '[node]\nname = "x"\ndata_dir = "empty/in-a-file"\n[train]\nenabled = false\n'
    )
    code, lines, _ = told(capsys, "node")
    assert code == 2 and lines[-1] == "p2pfed doctor looks closer", lines


@pytest.mark.parametrize(
    ("command", "usage"),
    [("model evaluate --nope x", "p2pfed model evaluate"), ("run list x", "p2pfed run list")],
)
def test_a_subcommand_tells_what_it_does_not_know_with_its_own_usage(capsys, command, usage):
    code, lines, _ = told(capsys, *command.split())
    assert code == 2 and lines[0].startswith(f"{usage}: unrecognized arguments: ")
    assert lines[1].startswith(f"usage: {usage} ") and lines[2] == f"run: {usage} -h"


def test_a_choice_that_is_missing_is_called_by_its_choices(capsys):
    assert told(capsys, "share")[1][0].endswith("the following arguments are required: on|off")
