"""The JSON that programs rely on: each command's fields and types are pinned in data/json.

A field may be added: run this file and test_cli_schemas_private with P2PFED_PIN=1, which writes
what is new, and look at the difference. A field that goes or changes its type raises the version of
its schema (`p2pfed.cli.text.VERSIONS`), and its file is written anew.
"""

from __future__ import annotations

import ast
import itertools
import json
import shlex
import signal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import admin_fakes as fakes
import pytest
from commands_page import SCHEMAS, leaves, page
from json_pins import (
    PINS,
    VARIANTS,
    asking,
    names_pinned_in,
    pinned,
    pinned_line,
    read_line,
    unconventional,
)
from small_scenario import SMALL

from p2pfed.cli import monitor, text
from p2pfed.cli.board_data import Feed
from p2pfed.cli.loopback import Loopback
from p2pfed.cli.main import COMMANDS, main
from p2pfed.demo import story
from p2pfed.demo.federation import Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.training.local import initial_vector
from p2pfed.training.task import load_task

ROOT = Path(__file__).resolve().parent.parent

# command -> why its --json is not pinned
UNPINNED = {"top": "it is a screen: with --json it says which commands give what it shows"}


@pytest.fixture
def answer(capsys):
    """Runs a command with --json, and gives its envelope."""
    return asking(capsys)


@pytest.fixture
def folder(monkeypatch):
    with fakes.empty_home(monkeypatch) as path:
        monkeypatch.setenv("P2PFED_HOME", str(path / "state"))
        yield path


# --- commands that work on files ---------------------------------------------------------------


def test_files_of_a_node_and_lists_of_peers(folder, answer):
    pinned("init", answer("init --name Oslo --dir node"))
    pinned("config-check", answer("config check node/p2pfed.toml"))
    pinned("config-show", answer("config show node/p2pfed.toml"))
    pinned("config-path", answer("-c node/p2pfed.toml config path"))
    pinned("version", answer("version --socket nowhere.sock"))
    (folder / "trainer.log").write_text("round 3\n")
    pinned("task-log", answer("--socket admin.sock task log"))
    from p2pfed.identity.keys import NodeKey

    peer = NodeKey.create(folder / "other.key").peer_id
    add = f"bootstrap add peers.toml --name Oslo --addr /ip4/127.0.0.1/tcp/4201/p2p/{peer}"
    pinned("bootstrap-add", answer(add + " --network n --network-id " + "ab" * 32))
    pinned("bootstrap-list", answer("bootstrap list peers.toml"))
    pinned("bootstrap-check", answer("bootstrap check peers.toml"))
    pinned("bootstrap-rm", answer("bootstrap rm peers.toml Oslo"))
    pinned("task-new", answer("task new mine"))
    pinned(
        "privacy-plan",
        answer("privacy plan --patients 300 --parameters 1000 --epsilon 8 --rounds 5"),
    )
    pinned("error", answer("status --socket nowhere.sock", code=3))


def test_files_of_the_stewards(folder, answer):
    from p2pfed.identity.keys import NodeKey

    peer = NodeKey.create(folder / "node.key").peer_id
    made = answer("steward key new a.key")
    pinned("steward-key", made)
    key = made["data"]["public_key"]
    pinned(
        "steward-found",
        answer(f"steward found --network n --steward a={key} --threshold 1 --out 1.json"),
    )
    pinned("steward-sign", answer("steward sign --key a.key 1.json"))
    add = f"steward add 1.json --out 2.json --name Oslo --peer-id {peer} --samples 3"
    pinned("steward-add", answer(add))
    answer("steward sign --key a.key 2.json")
    pinned("steward-show", answer("steward show 2.json"))
    pinned("steward-extend", answer("steward extend 2.json --out 3.json"))
    pinned(
        "steward-revoke",
        answer("steward revoke 2.json Oslo --out 4.json --reason closed --from-round 9"),
    )
    pinned("roster-diff", answer("roster diff 2.json 4.json"))
    pinned("roster-show", answer("roster show 2.json"))
    pinned("steward-verify", answer("steward verify 2.json --against 1.json"))
    pinned("roster-verify", answer("roster verify 2.json --against 1.json"))
    other = answer("steward key new b.key")["data"]["public_key"]
    pinned("steward-rotate", answer(f"steward rotate 2.json --add b={other} --out 5.json"))


def test_how_a_hospital_is_invited(folder, answer):
    answer("steward key new a.key")
    answer("steward found --network n --steward a=a.key --threshold 1 --out 1.json")
    answer("steward sign --key a.key 1.json")
    made = answer("invite create 1.json --for Oslo --key a.key")
    pinned("invite-create", made)
    invited = answer(
        "init --dir oslo --task breast-cancer --epsilon 8 --samples 9 --invite",
        made["data"]["invite"],
    )
    pinned("init-invited", invited)
    pinned("invite-list", answer("invite list --key a.key"))
    approve = "invite approve oslo/request.txt --roster 1.json --out 2.json --key a.key --yes"
    pinned("invite-approve", answer(approve))
    pinned("invite-list", answer("invite list --key a.key"))
    answer("invite create 2.json --for Kyoto --key a.key")
    pinned("invite-revoke", answer("invite revoke Kyoto --key a.key"))


def test_a_scenario_that_is_played(folder, capsys):
    (folder / "small.toml").write_text(f'title = "Small"\n{SMALL}')
    assert main(["simulate", "small.toml", "--json", "-"]) == 0
    pinned("simulate", read_line(capsys.readouterr().out))


def test_a_gap_in_the_events(folder, capsys):
    backend = fakes.FakeBackend()
    backend.lost_before = 2
    backend.emit("round.started", round=4)
    with fakes.daemon(backend, folder / "a.sock"):
        assert main(["--socket", "a.sock", "events", "--json"]) == 0
    gap, _ = map(read_line, capsys.readouterr().out.splitlines())
    pinned_line("events-gap", gap)


# --- commands that ask a daemon ----------------------------------------------------------------


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A real daemon that trains alone, beside one without data, after three rounds."""
    hospitals = (Hospital("Gate", 0), Hospital("Oslo", 184, {"site": 0, "sites": 3}))
    cast = Cast("breast-cancer", None, hospitals, "", "", "")
    federation = Federation(tmp_path_factory.mktemp("net") / "nodes", cast, epsilon="10")
    constants = run_constants("svt", rounds=1000, epsilon=Fraction(10))
    with federation.running():
        federation.make_run("heart-1", constants, seed=0)
        federation.write_bootstrap()
        federation.start_all()
        trained = federation.daemons["Oslo"]

        def ready() -> bool:
            status = trained.status()
            run = status and status["run"]
            return bool(run and run["round"] >= 3 and run["own_deltas"] and status["round_seconds"])

        wait_for(ready, 90, "three rounds")
        yield trained


@pytest.mark.slow
def test_a_real_daemons_streams_are_one_object_a_line(hospital, capsys, monkeypatch):
    words = ["-c", str(hospital.folder / "p2pfed.toml")]
    capsys.readouterr()
    assert main([*words, "events", "--json"]) == 0
    for line in capsys.readouterr().out.splitlines():
        event = read_line(line)
        assert isinstance(event["data"], dict)
        assert list(unconventional(event["data"])) == []
        pinned_line("events", {**event, "data": None})  # whose fields are each type's own

    class Short:
        """The daemon's socket, which ends a stream after some lines."""

        def stream(self, path: str) -> Any:
            return itertools.islice(hospital.client.stream(path), 3)

    monkeypatch.setattr(monitor, "admin_client", lambda _: Short())
    assert main([*words, "monitor", "--level", "debug", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in map(read_line, lines):
        assert set(line) <= {"ts", "level", "logger", "message", "event", "fields", "exception"}
        pinned_line("monitor", {key: line[key] for key in ("ts", "level", "logger", "message")})


# pin -> command
READS = {
    "status": "status",
    "peers": "peers",
    "peer": "peers Gate",
    "privacy": "privacy",
    "privacy-ledger": "privacy ledger",
    "version": "version",
    "whoami": "whoami",
    "id": "id",
    "bootstrap-list": "bootstrap list",
    "run-list": "run list",
    "roster-show-daemon": "roster show",
    "wait": "wait --for peers=1",
    "task-log": "task log",
}
WRITES = {
    "share": "share on",
    "block": "block Gate",
    "unblock": "unblock Gate",
    "config-reload": "config reload",
    "task-pause": "task pause",
    "task-resume": "task resume",
    "leave": "leave",
    "join": "join",
}


@pytest.mark.slow
def test_a_real_daemons_answers(hospital, answer, monkeypatch):
    place = f"-c {shlex.quote(str(hospital.folder / 'p2pfed.toml'))} "
    for name, command in READS.items():
        pinned(name, answer(place + command))
    pinned("model-fetch", answer(place + "model fetch --out", hospital.folder / "m.safetensors"))
    pinned("report", answer(place + "report --include-private --out", hospital.folder / "r.html"))
    monkeypatch.setattr(Loopback, "serve_forever", lambda *_, **__: None)  # ended at once
    monkeypatch.setattr(Feed, "start", lambda _: None)
    pinned("dashboard", answer(place + "dashboard --no-browser"))
    run = hospital.folder.parent / "run.json"
    roster = hospital.folder.parent / "roster.json"
    roster.write_text(hospital.client.get("/v1/roster")["signed"])
    pinned("roster-publish", answer(place + f"roster publish {roster}"))
    pinned("run-show", answer(f"run show {run} --roster {roster}"))
    pinned("run-accept", answer(place + f"run accept {run} --yes"))
    for name, command in WRITES.items():
        pinned(name, answer(place + command))


@pytest.mark.slow
def test_a_node_that_has_left_is_not_ok(hospital, answer):
    place = f"-c {shlex.quote(str(hospital.folder / 'p2pfed.toml'))} "
    answer(place + "leave")
    try:
        pinned("status", answer(place + "status", code=1))
    finally:
        answer(place + "join")


@pytest.fixture
def as_before():
    """What the demo does at a signal, it does no longer."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_what_the_demo_tells_at_its_end(hospital, answer, as_before, monkeypatch, tmp_path):
    vector = initial_vector(load_task("breast-cancer"), seed=0)
    told = story.Outcome(vector, {"Oslo": hospital.status()}, ())
    monkeypatch.setattr(story, "_with_gate", lambda *_, **__: told)  # test_demo has the whole
    monkeypatch.setattr(story, "ROUNDS_WITHOUT", 2)
    monkeypatch.setattr(story, "_without_privacy", lambda *_, **__: told)
    said = answer("demo --out", tmp_path / "demo")
    for network in ("gate", "none"):  # a hospital's status, which has its own pin
        assert said["data"][network] == told.statuses
        said["data"][network] = dict.fromkeys(told.statuses)
    pinned("demo", said)


# --- errors ------------------------------------------------------------------------------------


def test_every_command_tells_a_wrong_option_as_one_object(answer):
    for words in answering().values():
        pinned("error", answer(f"{words} --no-such-option", code=2))


def test_every_command_that_asks_a_daemon_says_as_one_object_that_none_is_there(folder, answer):
    for name, command in {**READS, **WRITES}.items():
        if name not in {"version", "privacy-ledger", "task-log"}:  # they do without one
            at_once = " --timeout 0" if name == "wait" else ""
            pinned("error", answer(f"--socket nowhere.sock {command}{at_once}", code=3))


# --- the pins and the page ---------------------------------------------------------------------


def pins() -> dict[str, Any]:
    """Every pin by its name."""
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(PINS.glob("*.json"))}


@cache
def answering() -> dict[str, str]:
    """The commands that have --json: what their pin is called -> their words."""
    return {
        words.replace(" ", "-"): words
        for words, _, parser in leaves()
        if any("--json" in action.option_strings for action in parser._actions)
    }


def command_of(pin: str) -> str:
    """The words of the command whose answer is pinned under this name."""
    return VARIANTS[pin] if pin in VARIANTS else answering()[pin]


def test_every_command_with_json_is_pinned_or_says_why_not():
    assert len(answering()) > 60
    assert set(answering()) - set(pins()) == {words.replace(" ", "-") for words in UNPINNED}
    assert set(pins()) - set(answering()) == set(VARIANTS)
    assert {command_of(pin) for pin in VARIANTS} - {""} <= set(answering().values())


def test_every_pin_is_held_up_by_a_test():
    tests = [ROOT / "tests" / f"test_cli_schemas{part}.py" for part in ("", "_private")]
    assert set().union(*map(names_pinned_in, tests)) == set(pins())


def test_every_pin_is_of_the_version_that_the_program_prints():
    for pin, told in pins().items():
        if told["schema"] is None:  # a line of a stream
            assert "per line" in SCHEMAS[command_of(pin)]
            continue
        name = told["schema"].removeprefix("p2pfed.").partition("/")[0]
        assert told["schema"] == f"p2pfed.{name}/{text.VERSIONS.get(name, 1)}", pin


def test_every_pin_is_of_the_schema_that_the_page_tells_of_its_command():
    for pin, told in pins().items():
        if told["schema"] is not None and command_of(pin):
            name = told["schema"].removeprefix("p2pfed.").partition("/")[0]
            assert name in SCHEMAS[command_of(pin)].replace(",", "").split(), pin


def test_a_schema_has_one_shape_whatever_command_prints_it():
    shapes: dict[str, list[Any]] = {}
    for told in pins().values():
        shapes.setdefault(told["schema"], []).append(told["data"])
    del shapes[None]  # type: ignore[arg-type] # lines of streams
    for schema, several in shapes.items():
        assert len({isinstance(shape, list) for shape in several}) == 1, schema
        fields = [set(shape[0] if isinstance(shape, list) else shape) for shape in several]
        assert set.intersection(*fields) == min(fields, key=len), schema  # fields are only added


def test_the_page_of_the_commands_is_what_the_parsers_say():
    written = (ROOT / "docs" / "commands.md").read_text("utf-8")
    assert written == page(), "run: python tests/commands_page.py > docs/commands.md"


def test_every_command_is_a_row_of_the_page():
    found = [words for words, _, _ in leaves()]
    assert {words.split()[0] for words in found} == set(COMMANDS)
    assert len(found) == len(set(found))
    assert set(SCHEMAS) <= set(found)


def test_every_schema_that_the_program_prints_is_on_the_page():
    printed = set()
    for file in (ROOT / "p2pfed" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                place = {"emit": 1, "envelope": 0}.get(node.func.id)
                if place is not None and isinstance(node.args[place], ast.Constant):
                    printed.add(node.args[place].value)
    told = {word for cell in SCHEMAS.values() for word in cell.replace(",", "").split()}
    assert printed - {"error"} <= told
