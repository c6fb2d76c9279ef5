"""`p2pfed task log`: the end of the trainer's own log, for those who may read it."""

from __future__ import annotations

import json
import os

import pytest

from p2pfed.cli.main import main


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "trainer.log"
    path.write_text("".join(f"line {number}\n" for number in range(1, 101)))
    return path


def run(capsys, folder, *arguments):
    code = main(["--socket", str(folder / "admin.sock"), "task", "log", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_last_lines_are_printed(capsys, tmp_path, log):
    code, out, _ = run(capsys, tmp_path, "-n", "2")
    assert (code, out) == (0, "line 99\nline 100\n")
    assert len(run(capsys, tmp_path)[1].splitlines()) == 50


def test_json_names_the_file(capsys, tmp_path, log):
    told = json.loads(run(capsys, tmp_path, "-n", "1", "--json")[1])
    assert (told["schema"], told["ok"]) == ("p2pfed.task-log/1", True)
    assert told["data"] == {"file": str(log), "lines": ["line 100"]}


def test_it_lies_beside_the_private_socket_that_the_configuration_names(capsys, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "t.log").write_text("here\n")
    config = tmp_path / "p2pfed.toml"
    config.write_text('[node]\ndata_dir = "."\n[train]\nsocket = "private/t.sock"\n')
    assert main(["-c", str(config), "task", "log"]) == 0
    assert capsys.readouterr().out == "here\n"


def test_what_a_terminal_would_obey_is_not_printed(capsys, tmp_path, log):
    log.write_text("\x1b[2Jgone\n")
    assert "\x1b" not in run(capsys, tmp_path)[1]


def test_a_long_log_is_read_from_its_end(capsys, tmp_path, log):
    log.write_bytes(b"x" * (3 << 20) + b"\nlast\n")
    assert run(capsys, tmp_path, "-n", "1")[1] == "last\n"


def test_no_log_yet_is_told(capsys, tmp_path):
    code, out, err = run(capsys, tmp_path)
    assert (code, out) == (5, "")
    assert len(err.splitlines()) == 3


def test_who_may_not_read_it_is_told_who_may(capsys, tmp_path, log, monkeypatch):
    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("pathlib.Path.open", closed)
    code, _, err = run(capsys, tmp_path)
    assert code == 4
    assert "sudo -u USER" in err


@pytest.mark.parametrize("lines", ["0x", "-1", "", "1e3", "1234567"])
def test_a_number_of_lines_that_is_none_is_refused(capsys, tmp_path, log, lines):
    code, _, err = run(capsys, tmp_path, f"--lines={lines}")
    assert code == 2
    assert "not a number of lines" in err
