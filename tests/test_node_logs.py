"""The daemon's log: nothing private passes, and nothing that happens to its file stops anybody."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from p2pfed.errors import ConfigError
from p2pfed.node import logs
from p2pfed.node.logfile import RETRY, LogFile
from p2pfed.node.logs import HIDDEN, LogHandler, Plain, as_json, as_text, begin_logging, set_level

DATA = Path("/srv/hospital data/mri")


def record(message, *args, exc_info=None, **extra):
    made = logging.LogRecord("p2pfed.x", logging.WARNING, "x.py", 1, message, args, exc_info)
    made.created = 1_767_322_645.25
    made.__dict__.update(extra)
    return made


def plain(message, *args, **extra):
    return Plain([DATA]).record(record(message, *args, **extra))


@pytest.fixture
def logger():
    """A logger of the test's own; its like are as they were afterwards."""
    return logging.getLogger("p2pfed.test")


def settings(folder, **log):
    values = {"level": "info", "format": "auto", "file": folder / "p2pfed.log"} | log
    return SimpleNamespace(log=SimpleNamespace(**values), train=SimpleNamespace(data=DATA))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what passes -------------------------------------------------------------------------------


def test_a_record_says_when_in_utc_to_the_millisecond_how_bad_who_and_what():
    moment = dt.datetime.fromtimestamp(1_767_322_645.25, dt.UTC)
    assert plain("round %d of %s", 7, "heart") == {
        "ts": moment.strftime("%Y-%m-%dT%H:%M:%S.250Z"),
        "level": "warning",
        "logger": "p2pfed.x",
        "message": "round 7 of heart",
    }


def test_an_event_and_its_fields_are_fields_of_their_own():
    found = plain("peer.joined", event="peer.joined", fields={"peer": "Oslo", "round": 3})
    assert found["event"] == "peer.joined"
    assert found["fields"] == {"peer": "Oslo", "round": 3}


@pytest.mark.parametrize("value", [None, True, 7, 0.25, "Oslo", ["a", "b"]])
def test_plain_values_pass_as_they_are(value):
    assert Plain().value(value) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.full((3, 4), 0.728193, np.float32), "<ndarray float32 (3, 4)>"),
        (np.float64(0.728193), "<float64 float64 ()>"),
        (np.float32(0.728193), "<float32 float32 ()>"),
        (b"MRN-77", "<6 bytes>"),
        (memoryview(b"MRN-77"), "<6 bytes>"),
        ([0.728193, 1.0], "<list of 2>"),
        ((728193, 1, 2), "<tuple of 3>"),
        ({"MRN-77": 1}, "<dict of 1>"),
        (["MRN-77"] * 33, "<list of 33>"),
        (object(), "<object>"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (stat.S_IFREG.__class__, "<type>"),
    ],
)
def test_a_value_that_may_be_data_is_named_by_its_kind_and_size(value, shown):
    assert Plain().value(value) == shown
    assert plain("got %s", value)["message"] == f"got {shown}"
    assert plain("got", fields={"value": value})["fields"] == {"value": shown}


def test_a_tensor_is_named_by_its_kind_and_size():
    class Tensor:  # this process must not need torch
        dtype, shape = "torch.float32", (2, 2)

        def __str__(self):
            return "0.728193"

    assert Plain().value(Tensor()) == "<Tensor torch.float32 (2, 2)>"


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.2, 0.3, 0.728193]",
        "array([1. , 2.5, -3e-4, 0.728193])",
        "0.728193 1 2 3",
        "0.728193;1;2;3",
    ],
)
def test_a_row_of_numbers_in_a_text_is_blotted_out(text):
    assert "728193" not in plain(f"failed at {text}")["message"]


@pytest.mark.parametrize(
    "text", ["at 127.0.0.1:4201", "round 3, 4 peers", "2026-01-02T03:04:05Z", "v1.2.3 sent 1 2 3"]
)
def test_addresses_times_and_a_few_numbers_stay(text):
    assert plain(text)["message"] == text


@pytest.mark.parametrize(
    "args",
    [
        ("cannot read /srv/hospital data/mri/MRN 77.nii.gz: denied",),
        ("cannot read %s", "/srv/hospital data/mri/MRN 77.nii.gz"),
        ("cannot read %s", DATA / "MRN 77.nii.gz"),
        ("cannot read %r", DATA / "MRN 77.nii.gz"),
        ("cannot read %s", FileNotFoundError(2, "no such file", str(DATA / "MRN 77.nii.gz"))),
        ("cannot read %(path)s", {"path": DATA / "MRN 77.nii.gz"}),
        ("cannot read %s", ["/srv/hospital data/mri/MRN 77.nii.gz"]),
    ],
)
def test_nothing_below_the_hospitals_data_is_named(args):
    message = plain(*args)["message"]
    assert HIDDEN in message
    assert "MRN" not in message
    assert "mri" not in message


def test_the_data_is_hidden_also_by_the_path_that_a_link_stands_for(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    hide = Plain([tmp_path / "link"])
    assert hide.text(f"no {tmp_path / 'real' / 'MRN 77'}") == f"no {HIDDEN}"
    assert hide.text(f"no {tmp_path / 'link' / 'MRN 77'}") == f"no {HIDDEN}"


def test_a_path_beside_the_data_is_named():
    assert plain("no /srv/other/file")["message"] == "no /srv/other/file"


def test_a_long_text_is_cut_and_so_is_a_long_message():
    assert len(Plain().value("x" * 10_000)) == logs.LONGEST_TEXT
    assert len(plain("y" * 10_000)["message"]) == logs.LONGEST_MESSAGE


def test_a_path_that_reaches_over_the_cut_is_hidden_whole():
    text = "x" * (logs.LONGEST_TEXT - 10) + f" {DATA}/MRN 77"
    assert "hospital" not in Plain([DATA]).text(text)


def test_a_template_whose_values_were_replaced_is_still_told():
    assert plain("got %d of %s", np.int64(77), "Oslo")["message"].endswith("<int64 int64 ()> Oslo")


def test_an_exception_is_one_field_with_frames_and_without_values_of_variables():
    def of_a_patient():
        patient = {"MRN-77": 0.728193}
        raise ConfigError("the task failed", f"see {DATA}/MRN-77") from KeyError(len(patient))

    try:
        of_a_patient()
    except ConfigError:
        told = plain("bug", exc_info=sys.exc_info())["exception"]
    assert "of_a_patient" in told
    assert "ConfigError: the task failed" in told
    assert f"see {HIDDEN}" in told
    assert "0.728193" not in told.replace('patient = {"MRN-77": 0.728193}', "")


def test_an_error_that_cannot_say_what_it_is_is_named_by_its_type():
    class Wicked(Exception):
        def __str__(self):
            raise RuntimeError

    assert Plain().value(Wicked()) == "Wicked"


# --- forms -------------------------------------------------------------------------------------


def test_a_peers_text_begins_no_line_of_its_own_and_moves_no_cursor():
    wicked = "Oslo\n2026-01-01T00:00:00.000Z ERROR p2pfed: all is lost\x1b[2J\u2028\r"
    for form in (as_text, as_json):
        line = form(plain("peer %s", wicked, fields={"peer": wicked}))
        assert line.isprintable()
        assert len(line.splitlines()) == 1


def test_the_text_form_shows_fields_and_indents_the_exception():
    try:
        int("x")
    except ValueError:
        made = plain("bug", exc_info=sys.exc_info(), fields={"peer": "Oslo", "to": ["a", "b"]})
    head, *rest = as_text(made).splitlines()
    assert head.endswith("WARNING p2pfed.x: bug peer=Oslo to=a,b")
    assert rest
    assert all(line.startswith("    ") for line in rest)


# --- the file ----------------------------------------------------------------------------------


class Standard:
    """A pipe in the place of standard error."""

    def __init__(self):
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)

    def lines(self):
        try:
            return os.read(self.read, 1 << 16).decode().splitlines()
        except BlockingIOError:
            return []


@pytest.fixture
def standard():
    made = Standard()
    yield made
    os.close(made.read)
    os.close(made.write)


@pytest.fixture
def file(tmp_path, standard):
    clock = SimpleNamespace(now=0.0)
    made = LogFile(
        tmp_path / "log" / "p2pfed.log",
        lambda told: told["message"],
        descriptor=standard.write,
        now=lambda: clock.now,
    )
    made.clock, made.path = clock, tmp_path / "log" / "p2pfed.log"
    yield made
    made.close()


def test_the_file_is_made_with_its_folder_for_its_owner_alone(file):
    file.write("one")
    assert file.path.read_text() == "one\n"
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


def test_a_file_that_others_could_read_is_closed_to_them(file):
    file.path.parent.mkdir()
    file.path.touch(mode=0o644)
    file.write("one")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_a_rotated_file_keeps_its_lines_and_a_new_one_goes_on(file):
    file.write("one")
    file.path.rename(file.path.with_suffix(".1"))
    file.write("two")
    assert file.path.with_suffix(".1").read_text() == "one\n"
    assert file.path.read_text() == "two\n"


def test_a_removed_folder_is_made_again(file, standard):
    file.write("one")
    shutil.rmtree(file.path.parent)
    file.write("two")
    assert file.path.read_text() == "two\n"
    assert standard.lines() == []


def test_a_file_that_cannot_be_opened_is_told_once_and_standard_error_takes_over(file, standard):
    file.path.parent.write_text("in the way")
    file.write("one")
    file.write("two")
    told, *lines = standard.lines()
    assert told.startswith("cannot write the log file")
    assert lines == ["one", "two"]
    file.path.parent.unlink()
    file.write("three")  # not every line tries
    assert standard.lines() == ["three"]
    file.clock.now = RETRY
    file.write("four")
    assert file.path.read_text() == "four\n"
    assert standard.lines() == [f"logging to {file.path} again"]


def test_a_pipe_without_a_reader_holds_nobody_up(file, standard):
    file.path.parent.mkdir()
    os.mkfifo(file.path)
    file.write("one")
    assert standard.lines()[-1] == "one"


def test_lines_that_a_full_disk_does_not_take_are_counted_and_told(file, monkeypatch):
    file.write("one")
    write, full = os.write, OSError(28, "No space left on device")
    taken = iter([3])

    def short(descriptor, data):
        room = next(taken, 0)
        if not room:
            raise full
        return write(descriptor, data[:room])

    monkeypatch.setattr(os, "write", short)
    file.write("twotwo")
    file.write("three")
    monkeypatch.setattr(os, "write", write)
    file.write("four")
    expected = ["one", "two", "2 log records could not be written", "four"]
    assert file.path.read_text().splitlines() == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_device_that_is_always_full_stops_nobody():
    file = LogFile(Path("/dev/full"), as_json)
    file.write("one")
    file.write("two")
    file.close()


def test_a_standard_error_that_nobody_reads_any_more_stops_nobody():
    read, write = os.pipe()
    os.close(read)
    LogFile(None, as_json, descriptor=write).write("one")
    os.close(write)


def test_a_record_that_cannot_be_written_down_is_told_without_its_arguments(tmp_path):
    def broken(told):
        if told["message"] == "MRN-77":
            raise RuntimeError("MRN-77")
        return as_json(told)

    path = tmp_path / "log"
    handler = LogHandler(Plain(), broken, LogFile(path, broken))
    handler.handle(record("%s", "MRN-77"))
    handler.close()
    assert [line["message"] for line in lines_of(path)] == ["a record of p2pfed.x is lost"]


# --- the process -------------------------------------------------------------------------------


def test_a_file_gets_json_and_one_handler_however_often_it_begins(tmp_path, logger):
    begin_logging(settings(tmp_path))
    begin_logging(settings(tmp_path))
    logger.info("one")
    assert [line["message"] for line in lines_of(tmp_path / "p2pfed.log")] == ["one"]


def test_the_form_can_be_chosen(tmp_path, logger):
    begin_logging(settings(tmp_path, format="text"))
    logger.info("one")
    assert (tmp_path / "p2pfed.log").read_text().endswith("INFO    p2pfed.test: one\n")


@pytest.mark.parametrize(("terminal", "begins"), [(True, "20"), (False, "{")])
def test_standard_error_gets_text_on_a_terminal_and_json_elsewhere(
    terminal, begins, standard, logger, monkeypatch, tmp_path
):
    monkeypatch.setattr(logs, "_is_terminal", lambda: terminal)
    handler = begin_logging(settings(tmp_path, file=None))
    handler._file._aside = standard.write
    logger.info("one")
    assert standard.lines()[0].startswith(begins)


def test_the_journal_is_told_how_bad_each_line_is(standard, logger, monkeypatch, tmp_path):
    found = os.fstat(standard.write)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    with open(standard.write, "w", closefd=False) as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        handler = begin_logging(settings(tmp_path, file=None, format="text"))
        handler._file._aside = standard.write
        logger.info("one")
        logger.error("two", exc_info=ValueError("three"))
    begins = [line[:3] for line in standard.lines()]
    assert begins[:2] == ["<6>", "<3>"]
    assert set(begins[2:]) == {"<3>"}  # of the exception


@pytest.mark.parametrize("stream", ["", "1:2", "junk"])
def test_a_standard_error_that_is_not_the_journal_gets_no_priorities(
    stream, standard, logger, monkeypatch, tmp_path
):
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    handler = begin_logging(settings(tmp_path, file=None))
    handler._file._aside = standard.write
    logger.info("one")
    assert standard.lines()[0].startswith("{")


def test_the_level_can_be_changed_while_it_runs(tmp_path, logger):
    begin_logging(settings(tmp_path, level="warning"))
    logger.info("one")
    set_level("debug")
    logger.debug("two")
    set_level("error")
    logger.warning("three")
    assert [line["message"] for line in lines_of(tmp_path / "p2pfed.log")] == ["two"]


def test_libraries_are_quiet_unless_debug_is_asked_for(tmp_path, logger):
    begin_logging(settings(tmp_path))
    library = logging.getLogger("hypercorn.error")
    library.info("one")
    library.warning("two")
    set_level("debug")
    library.debug("three")
    assert [line["message"] for line in lines_of(tmp_path / "p2pfed.log")] == ["two", "three"]


def test_warnings_go_the_same_way():
    program = (
        "import warnings, pathlib, types\n"
        "from p2pfed.node.logs import begin_logging\n"
        "S = types.SimpleNamespace\n"
        "begin_logging(S(log=S(level='info', format='json', file=None),"
        " train=S(data=pathlib.Path('/srv/mri'))))\n"
        "warnings.warn('no /srv/mri/MRN-77')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    told = json.loads(run.stderr)
    assert told["logger"] == "py.warnings"
    assert f"no {HIDDEN}" in told["message"]
    assert "MRN-77" not in run.stderr
