"""The client commands: what they print, where, and with which exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pfed.cli.main import COMMANDS, main
from p2pfed.cli.observe import privacy_words, time_split
from p2pfed.cli.privacy import _of_ledger, _said
from p2pfed.cli.text import took

_spec = importlib.util.spec_from_file_location(
    "admin_fakes", Path(__file__).with_name("admin_fakes.py")
)
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)


LEDGER = {"releases": 2, "entries": [{"seq": 1, "kind": "debit"}, {"seq": 2, "kind": "debit"}]}


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    with fakes.short_folder() as path:
        monkeypatch.chdir(path)
        monkeypatch.setenv("HOME", str(path))
        for name in list(os.environ):
            if name.startswith("P2PFED_"):
                monkeypatch.delenv(name)
        yield path


@pytest.fixture
def backend():
    return fakes.FakeBackend()


@pytest.fixture
def socket(folder, backend):
    with fakes.daemon(backend, folder / "admin.sock"):
        yield str(folder / "admin.sock")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def process(*arguments: str, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "p2pfed", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        **options,
    )


# --- status, peers, privacy --------------------------------------------------------------------


def test_status_fits_a_screen(capsys, socket, backend):
    backend.health = ["clock differs from Kyoto by 4.1 s", "evil \x1b[2J name"]
    code, out, err = run(capsys, "--socket", socket, "status")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "St Mary   12D3KooW…mnop   up 3d 4h",
        "network   cardio-eu   roster v7, until 2027-01-31   5 members, 2 of 3 stewards",
        "run       heart-1 (heart-disease)   round 42/100   training   160 deltas",
        "model     3f3f3f3f3f3f after round 41",
        "sharing   contributing",
        "privacy   svt per patient (zero-out)   ε 3.2 of 8 spent (δ 1e-5)   41 releases",
        "          lasts to the end of the run",
        "peers     1 alive · 1 away · 1 left      traffic  ↑1.2 GB ↓1.1 GB",
        "trainer   running",
        "# warning: clock differs from Kyoto by 4.1 s",
        "# warning: evil \N{REPLACEMENT CHARACTER}[2J name",
    ]


def test_a_budget_that_ends_before_the_run_does_is_told_with_the_round(backend):
    assert privacy_words(backend.privacy(), 100)[1] == "lasts to the end of the run"
    assert privacy_words(backend.privacy(), 261)[1] == "stops by itself at round ≈ 260"


def test_status_of_a_relay_says_what_passes_through_it(capsys, socket, backend):
    backend.relay = {"circuits": 3, "relayed_bytes": 12_000_000}
    out = run(capsys, "--socket", socket, "status")[1]
    assert "relay     3 circuits, 12 MB passed on, unread" in out.splitlines()


def test_status_says_why_a_node_does_not_contribute(capsys, socket, backend):
    backend.contributing = {"yes": False, "reason": "budget spent"}
    out = run(capsys, "--socket", socket, "status")[1]
    assert "not contributing: budget spent; still receiving" in out


def test_status_shouts_when_nothing_protects_the_updates(capsys, socket, backend):
    backend.mechanism = "none"
    assert "UNPROTECTED" in run(capsys, "--socket", socket, "status")[1]


def test_status_of_a_node_that_knows_nothing_yet(capsys, socket, backend, monkeypatch):
    whole = backend.status()
    empty = {
        **whole,
        "network": None,
        "roster": None,
        "run": None,
        "sharing": False,
        "contributing": {"yes": False, "reason": ""},
        "privacy": {"mechanism": None},
    }
    monkeypatch.setattr("p2pfed.admin.client.Client.get", lambda *_: empty)
    code, out, _ = run(capsys, "--socket", socket, "status")
    assert code == 0
    assert "no roster yet: p2pfed join" in out
    assert "not contributing: sharing is off; still receiving" in out
    empty["present"] = False  # who has left receives nothing
    code, out, _ = run(capsys, "--socket", socket, "status")
    assert code == 1 and "not contributing: sharing is off\n" in out


def test_the_private_socket_is_joined_on_the_client_side(capsys, folder, backend):
    import http.server
    import socketserver
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = {
                "/v1/metrics": {"metrics": [{"round": 3, "values": {"accuracy": 0.8734}}]},
                "/v1/ledger": LEDGER,
                "/v1/status": {
                    "progress": {"step": "local steps", "done": 37, "of": 100, "seconds": 75.2},
                    "rounds": [{"round": 3, "seconds": {"data": 1, "compute": 6, "peers": 3}}],
                    "notes": ["one by one", "memory ran out: 4 patients at a time from now on"],
                },
            }
            body = json.dumps(answer[self.path]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self):
            return "unix"

        def log_message(self, *_):
            pass

    with (
        fakes.daemon(backend, folder / "admin.sock"),
        socketserver.UnixStreamServer(str(folder / "trainer.sock"), Handler) as private,
    ):
        thread = threading.Thread(target=private.serve_forever, args=(0.01,))
        thread.start()
        try:
            arguments = ("--socket", folder / "admin.sock")
            told = run(capsys, *arguments, "status")[1]
            assert "private   accuracy 0.8734  after round 3   (stays" in told
            assert "running   local steps 37/100, 1 min so far" in told
            assert "time      compute 60%  peers 30%  data 10%   of 10 s, round 3" in told
            assert (
                "# the trainer notes: memory ran out: 4 patients at a time from now on   (1 more:"
                " p2pfed task log)\n"
            ) in told
            assert told.count("one by one") == 0
            data = json.loads(run(capsys, *arguments, "status", "--json")[1])["data"]
            assert data["private"]["ledger"] == LEDGER
            told = run(capsys, *arguments, "privacy")[1]
            assert "          2 records, the last: debit\n" in told
            assert "=" not in told and "nano" not in told  # it is for people
        finally:
            private.shutdown()
            thread.join()


def test_privacy_says_in_words_what_the_data_set_may_spend_and_has_spent():
    data = {
        **fakes.FakeBackend().privacy(),
        "epsilon": 8.0,
        "run_epsilon": 10.0,
        "share_metrics": "rounded",
    }
    entry = {"kind": "output", "at": 1795919086, "round": 41, "rho_nano": 5}
    told = {
        "spent": {"epsilon": 3.25, "nano_rho": 123456789},
        "limit": {"epsilon": 8.0, "nano_rho": 987654321},
        "releases": 41,
        "unprotected": 1,
        "head": "ab" * 32,
        "entries": [entry, entry],
    }
    assert list(_said(data)) == [
        "spent     svt per patient (zero-out)   ε 3.2 of 8 spent (δ 1e-5)   41 releases",
        "          stops by itself at round ≈ 260",
        "budget    ε 8 (δ 1e-5), of this data set for its whole life, over all runs",
        "run       at most ε 10; this hospital stops at its own ε 8",
        "metric    the main one, two digits, goes to all members; outside ε",
    ]
    assert list(_of_ledger(told)) == [
        "",
        "ledger    on this machine only; all of it: p2pfed privacy ledger",
        "          ε 3.25 of 8 spent, 41 releases",
        "# warning: 1 of them left WITHOUT noise: no ε protects them",
        "          2 records, the last: output of round 41 at 2026-11-29 02:24 UTC",
        f"head      {'ab' * 32}",
    ]
    assert len(list(_of_ledger({}))) == 2  # nothing is known, and nothing breaks


def test_a_round_of_less_than_a_second_is_told_in_milliseconds():
    rounds = [{"round": 3, "seconds": {"compute": 0.05, "data": 0.035}}]
    assert time_split({"rounds": rounds}) == "compute 59%  data 41%   of 85 ms, round 3"
    assert [took(s) for s in (0, 0.9994, 0.9996, 61)] == ["0 s", "999 ms", "1 s", "1 min"]


def test_peers_is_a_table_and_one_peer_a_list_of_fields(capsys, socket):
    code, out, _ = run(capsys, "--socket", socket, "peers")
    assert code == 0
    assert out.splitlines() == [
        "NAME  STATE  ROUND  RTT    PATH    SENT    RECV    MODEL    METRIC  SEEN",
        "Oslo  alive  42     31 ms  direct  420 MB  400 MB  abababa  -       2 s",
    ]
    assert "samples" in run(capsys, "--socket", socket, "peers", "Oslo")[1]
    assert run(capsys, "--socket", socket, "peers", "a/b c")[0] == 0


@pytest.mark.parametrize(
    ("command", "schema"),
    [
        ("status", "status"),
        ("peers", "peers"),
        ("peers Oslo", "peer"),
        ("privacy", "privacy"),
        ("version", "version"),
        ("bootstrap list", "bootstrap"),
        ("run list", "runs"),
        ("share off", "share"),
        ("block Oslo", "block"),
        ("unblock Oslo", "block"),
        ("leave", "leave"),
        ("join", "join"),
    ],
)
def test_json_is_one_envelope_with_a_schema(capsys, socket, command, schema):
    code, out, err = run(capsys, "--socket", socket, *command.split(), "--json")
    envelope = json.loads(out)
    assert (code, err) == (0, "")
    assert set(envelope) == {"schema", "ok", "data"}
    assert envelope["schema"] == f"p2pfed.{schema}/1"
    assert envelope["ok"] is True


def test_actions_reach_the_daemon(capsys, socket, backend, folder):
    (folder / "roster").write_text("the roster")
    (folder / "peers.toml").write_text('version = 1\n[[peer]]\nname = "Oslo"\naddrs = ["/x"]\n')
    assert run(capsys, "--socket", socket, "share", "off")[0] == 0
    code, _, _ = run(
        capsys, "--socket", socket, "join", "--roster", "roster", "--bootstrap", "peers.toml"
    )
    assert code == 0
    assert run(capsys, "--socket", socket, "block", "Oslo")[0] == 0
    assert run(capsys, "--socket", socket, "unblock", "Oslo")[0] == 0
    assert run(capsys, "--socket", socket, "leave")[0] == 0
    assert "p2pfed task resume" in run(capsys, "--socket", socket, "task", "pause")[1]
    assert run(capsys, "--socket", socket, "task", "resume")[0] == 0
    assert backend.asked == [
        ("share", False),
        ("join", (b"the roster", [{"version": 1, "peer": [{"name": "Oslo", "addrs": ["/x"]}]}])),
        ("block", ("Oslo", True)),
        ("block", ("Oslo", False)),
        ("leave", None),
        ("pause", True),
        ("pause", False),
    ]


# --- events, wait ------------------------------------------------------------------------------


def test_events_are_lines_and_can_be_chosen(capsys, socket, backend):
    backend.lost_before = 2
    backend.emit("peer.joined", name="Oslo")
    backend.emit("round.started", round=4)
    out = run(capsys, "--socket", socket, "events")[1]
    assert out.splitlines() == [
        "… 2 older events are no longer held",
        "     3  2026-01-02T03:04:05Z  peer.joined  name=Oslo",
        "     4  2026-01-02T03:04:05Z  round.started  round=4",
    ]
    out = run(capsys, "--socket", socket, "events", "--type", "round.*", "--since", "2", "--json")[
        1
    ]
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["round.started"]


def test_wait_ends_when_all_conditions_hold(capsys, socket):
    waiting = ("--socket", socket, "wait", "--for", "peers=1", "--for", "round=42")
    assert run(capsys, *waiting)[0] == 0
    code, _, err = run(capsys, *waiting, "--for", "round=43", "--timeout", "0.02s")
    assert code == 6
    assert "it stands at peers=1, round=42" in err


def test_wait_waits_for_a_daemon_too(capsys, folder):
    code, _, _ = run(
        capsys, "--socket", folder / "a.sock", "wait", "--for", "peers=1", "--timeout", "0.02"
    )
    assert code == 3


@pytest.mark.parametrize("what", [("--for", "epsilon=3"), ("--for", "peers=x"), ()])
def test_wait_refuses_what_it_does_not_know(capsys, socket, what):
    assert run(capsys, "--socket", socket, "wait", *what)[0] == 2


@pytest.mark.parametrize("timeout", ["soon", "-1s", "nan", "", "1e99"])
def test_wait_refuses_a_timeout_that_is_no_time(capsys, socket, timeout):
    assert (
        run(capsys, "--socket", socket, "wait", "--for", "peers=1", f"--timeout={timeout}")[0] == 2
    )


# --- errors ------------------------------------------------------------------------------------


def test_an_error_is_three_lines_on_standard_error(capsys, folder):
    code, out, err = run(capsys, "--socket", folder / "a.sock", "peers")
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 3


def test_with_json_an_error_is_an_envelope_too(capsys, socket):
    code, out, err = run(capsys, "--socket", socket, "peers", "nobody", "--json")
    assert code == 5
    assert json.loads(out) == {
        "schema": "p2pfed.error/1",
        "ok": False,
        "data": {
            "title": "no peer nobody",
            "detail": "nothing is known under that name",
            "hint": "see: p2pfed peers",
            "exit_code": 5,
        },
    }
    assert err.splitlines()[0] == "no peer nobody"


@pytest.mark.parametrize(
    "arguments",
    [
        ["statsu"],
        ["status", "--nope"],
        ["share"],
        ["share", "maybe"],
        ["peers", "a", "b"],
        ["steward"],
        ["steward", "nope"],
        ["config"],
        ["--nope"],
        ["events", "--since", "x"],
        ["events", "--since", "-4"],
        ["demo", "--nodes", "6"],
        ["join", "--roster", "missing"],
        ["--config", "missing.toml", "status"],
    ],
)
def test_wrong_arguments_are_told_in_three_lines_or_less_and_exit_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert 1 <= len(err.splitlines()) <= 3
    assert "Traceback" not in err


def test_a_mistyped_command_gets_a_suggestion(capsys):
    assert "did you mean 'status'?" in run(capsys, "statsu")[2]


def test_a_bug_is_a_short_message_unless_debugging(capsys, monkeypatch, socket):
    monkeypatch.setattr("p2pfed.cli.observe.peer_row", lambda *_: 1 / 0)
    code, _, err = run(capsys, "--socket", socket, "peers")
    assert code == 1
    assert "ZeroDivisionError" in err and "P2PFED_DEBUG=1" in err and "Traceback" not in err
    monkeypatch.setenv("P2PFED_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["--socket", socket, "peers"])


def test_every_command_explains_itself_and_client_commands_name_their_endpoint(capsys):
    code, out, _ = run(capsys, "-h")
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in out
        code, text, _ = run(capsys, command, "-h")
        assert code == 0
        assert text.startswith(f"usage: p2pfed {command}")
    for command in (
        "status",
        "peers",
        "privacy",
        "events",
        "wait",
        "join",
        "leave",
        "share",
        "block",
        "unblock",
        "version",
        "run list",
        "run accept",
        "bootstrap list",
        "task pause",
        "task resume",
    ):
        assert "/v1/" in run(capsys, *command.split(), "-h")[1], command


def test_no_command_prints_the_overview(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert "p2pfed COMMAND -h" in out


# --- finding the socket ------------------------------------------------------------------------


def test_the_socket_is_found_like_the_daemon_finds_it(capsys, socket, folder, monkeypatch):
    assert run(capsys, "peers")[0] == 3  # nothing says where
    config = folder / "p2pfed.toml"
    config.write_text('[node]\nname = "x"\ndata_dir = "."\n')
    assert run(capsys, "peers")[0] == 0  # ./p2pfed.toml
    monkeypatch.chdir("/")
    assert run(capsys, "peers", "-c", config)[0] == 0
    assert run(capsys, "-c", config, "peers")[0] == 0
    monkeypatch.setenv("P2PFED_CONFIG", str(config))
    assert run(capsys, "peers")[0] == 0
    monkeypatch.setenv("P2PFED_CONFIG", "")
    monkeypatch.setenv("P2PFED_SOCKET", socket)
    assert run(capsys, "peers")[0] == 0
    assert run(capsys, "--socket", "/nowhere", "peers")[0] == 3  # the flag goes first
    monkeypatch.delenv("P2PFED_SOCKET")
    place = folder / ".config" / "p2pfed"
    place.mkdir(parents=True)
    (place / "p2pfed.toml").write_text(
        f'[node]\nname = "x"\ndata_dir = "/x"\n[admin]\nsocket = "{socket}"\n'
    )
    assert run(capsys, "peers")[0] == 0
    monkeypatch.setenv("P2PFED_ADMIN__SOCKET", "/nowhere")
    assert run(capsys, "peers")[0] == 3


def test_a_configuration_that_is_broken_is_named(capsys, folder):
    (folder / "p2pfed.toml").write_text("[node\n")
    code, _, err = run(capsys, "peers")
    assert code == 2
    assert "p2pfed.toml" in err
    (folder / "p2pfed.toml").write_text('[node]\nname = "x"\n')
    assert run(capsys, "peers")[0] == 2


# --- real processes ----------------------------------------------------------------------------

HEAVY = ("torch", "libp2p", "trio", "numpy", "pydantic", "rich", "click", "nacl", "starlette")


@pytest.mark.slow
@pytest.mark.parametrize(("peers", "dialled", "told"), [(0, 0, 0), (2, 0, 1), (2, 1, 0)])
def test_who_joins_without_an_address_of_anybody_is_told(
    capsys, socket, backend, monkeypatch, peers, dialled, told
):
    async def join(**_):
        return {"member": True, "peers": peers, "dialled": dialled}

    monkeypatch.setattr(backend, "join", join)
    code, out, _ = run(capsys, "--socket", socket, "join")
    assert code == 0 and out.count("join --bootstrap FILE") == told


@pytest.mark.parametrize("command", ["status", "peers", "privacy", "events", "share off", "join"])
def test_client_commands_load_nothing_heavy(socket, command):
    source = (
        "import sys\nfrom p2pfed.cli.main import main\ncode = main(sys.argv[1:])\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, "--socket", socket, *command.split()],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.slow
def test_following_ends_with_130_on_ctrl_c(socket, backend):
    backend.emit("node.ready")
    with process("--socket", socket, "events", "-f") as follower:
        assert "node.ready" in follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        assert follower.wait(10) == 130
        assert follower.stderr.read() == ""


@pytest.mark.slow
def test_a_broken_pipe_is_quiet(socket, backend):
    for i in range(3000):
        backend.emit("round.started", round=i)
    with process("--socket", socket, "events") as reader:
        reader.stdout.readline()
        reader.stdout.close()
        assert reader.wait(10) == 0
        assert reader.stderr.read() == ""


@pytest.mark.slow
def test_a_terminal_without_unicode_still_gets_its_table(socket):
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, "-m", "p2pfed", "--socket", socket, "status"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=30,
    )
    assert "3.2 of 8 spent" in done.stdout
