"""The trainer process over a real socket pair: answers, private numbers, crashes and restarts."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from p2pfed.identity.run import Outer, Run
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training.handover import read_view
from p2pfed.training.local import initial_vector
from p2pfed.training.task import task_id
from p2pfed.training.vector import read_vector, write_vector
from p2pfed.wire.payload import decode_payload

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
CANARY = 0.728_193_645_546_372  # a metric that must be seen on the private socket alone


class Canary(BreastCancer):
    """Its metrics are a planted number, its loss does what a file named `mood` asks for."""

    def __init__(self):
        self._folder = None

    def data(self, folder, options):
        self._folder = folder
        if (folder / "mood").exists() and (folder / "mood").read_text() == "secret data":
            raise ValueError(f"patient {CANARY}")
        return super().data(None, {"site": 0})

    def metrics(self, model, split):
        print(f"a task may print {CANARY}")
        return {"accuracy": CANARY}

    def loss(self, output, target):
        mood = self._folder / "mood"
        wish = mood.read_text() if mood.exists() else ""
        if wish == "slow":
            (self._folder / "started").touch()
            time.sleep(60)
        if wish == "memory":
            raise torch.OutOfMemoryError(f"tried to allocate {CANARY}")
        if wish == "large":
            raise MemoryError(CANARY)
        if wish == "broken":
            raise ValueError(f"patient {CANARY}")
        return super().loss(output, target)


def make_run(**changes):
    run = Run(
        name="first", network_id=bytes(32), task="canary", task_id=TASK_ID, genesis=bytes(32),
        num_parameters=31, rounds=30, grid_bits=14, mechanism="svt", unit="patient",
        epsilon=Fraction(10), delta=Fraction(1, 100_000), clip=Fraction(1), block_size=1,
        segment_blocks=2, select_share=Fraction(1, 5), top_fraction=Fraction(1, 2),
        outer=Outer("fedadam", 0.05), robust="none", quorum=0.8, min_live=0.5, deadline_s=60.0,
        min_round_interval_s=0.0,
    )  # fmt: skip
    return replace(run, **changes).encode().decode()


TASK_ID = task_id(Canary())
AS_EVER = {"samples": 116, "scale": 1, "scale_of": 1}


class Trainer:
    """A trainer process and our end of its control socket; keeps every byte that it sent."""

    def __init__(self, folder, **privacy):
        self.folder = folder
        self.exchange = folder / "exchange"
        self.exchange.mkdir(exist_ok=True)
        self.socket = folder / "t.sock"
        lines = ['[node]\nname = "a"\ndata_dir = "."', "[train]"]
        lines += ['task = "test_training_process:Canary"', 'data = "."', 'socket = "t.sock"']
        lines += ['device = "cpu"', "[privacy]", 'epsilon = "10"']
        privacy = {"ledger": '"ledger.db"', **privacy}
        lines += [f"{key} = {value}" for key, value in privacy.items() if value is not None]
        config = folder / "node.toml"
        config.write_text("\n".join(lines))
        ours, theirs = socket.socketpair()
        ours.settimeout(200)
        command = [sys.executable, "-m", "p2pfed.training", "serve", "--config", str(config)]
        command += ["--control-fd", str(theirs.fileno()), "--exchange", str(self.exchange)]
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env={
                **os.environ,
                "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
                "P2PFED_HOME": str(folder / "home" / "state"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        self.control, self._stream, self.seen = ours, ours.makefile("rb"), b""

    def read(self):
        line = self._stream.readline()
        self.seen += line
        return json.loads(line) if line else None

    def send(self, **request):
        self.control.sendall(json.dumps(request).encode() + b"\n")

    def ask(self, **request):
        self.send(**request)
        return self.read()

    def round(self, number=0, run=None, view="view.safetensors", **more):
        asked = {"run": run or make_run(), "round": number, "view": view, **AS_EVER, **more}
        return self.ask(op="round", **asked)

    def mood(self, wish):
        (self.folder / "mood").write_text(wish)

    def private(self, page):
        connection = http.client.HTTPConnection("local")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.socket))
        try:
            connection.request("GET", page)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def kill(self):
        self.process.kill()
        return self.end()

    def end(self):
        """Wait for the process and give back what it wrote to its standard output and error."""
        self.process.wait(30)
        if not self.process.stdout.closed:
            self.output = self.process.stdout.read().decode()
        for held in (self._stream, self.control, self.process.stdout):
            held.close()
        return self.output


@pytest.fixture
def start(tmp_path):
    running = []
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    write_vector(exchange / "view.safetensors", initial_vector(BreastCancer(), seed=1))

    def begin(**privacy):
        running.append(Trainer(tmp_path, **privacy))
        return running[-1]

    yield begin
    for trainer in running:
        trainer.kill()


def test_a_trainer_says_what_it_is_releases_evaluates_and_stops(start):
    trainer = start()
    ready = trainer.read()
    assert ready == {
        "event": "ready", "task": "breast-cancer", "task_id": TASK_ID.hex(),
        "num_parameters": 31, "device": "cpu",
    }  # fmt: skip
    answer = trainer.round(0)
    assert answer["event"] == "released"
    assert set(answer) == {
        "event", "round", "run_id", "payload", "mechanism", "spent_nano_rho", "spent_epsilon",
        "releases", "ledger_head", "saturated", "releases_left",
    }  # fmt: skip
    payload = (trainer.exchange / answer["payload"]).read_bytes()
    assert decode_payload(payload, num_parameters=31, max_released=16).indices.size > 0
    assert trainer.ask(op="evaluate", view="view.safetensors", round=1) == {
        "event": "evaluated", "round": 1,
    }  # fmt: skip
    trainer.send(op="stop")
    assert trainer.read() is None
    assert trainer.end() == ""
    assert trainer.process.returncode == 0
    assert not trainer.socket.exists()


def test_nothing_private_crosses_the_control_socket(start):
    """A planted metric, printed and in exceptions too, is seen on the private socket only."""
    trainer = start()
    trainer.read()
    events = [trainer.round(0)["event"]]
    for number, wish in enumerate(("memory", "large", "broken"), 1):
        trainer.mood(wish)
        events.append(trainer.round(number)["event"])
        assert str(CANARY) in trainer.private("/v1/status")["problem"]
    trainer.mood("")
    events.append(trainer.round(4)["event"])
    trainer.ask(op="evaluate", view="view.safetensors", round=4)
    metrics = trainer.private("/v1/metrics")["metrics"]
    assert {"round": 0, "values": {"accuracy": CANARY}} in metrics
    status = trainer.private("/v1/status")
    assert {"load", "data", "compute", "gate", "peers"} >= set(status["rounds"][0]["seconds"])
    assert status["rounds"][0]["seconds"]["gate"] > 0
    trainer.send(op="stop")
    assert trainer.read() is None
    assert events == ["released", "failed", "failed", "failed", "released"]
    for form in (str(CANARY), str(CANARY)[2:14], np.float64(CANARY).tobytes().hex()):
        assert form.encode() not in trainer.seen
    for word in (b"accuracy", b"loss", b"seconds", b"patient"):
        assert word not in trainer.seen
    assert str(CANARY) not in trainer.end()
    log = trainer.folder / "t.log"
    assert f"a task may print {CANARY}" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_requests_that_cannot_be_read_are_answered_and_survived(start, tmp_path):
    trainer = start()
    trainer.read()
    write_vector(trainer.exchange / "short.safetensors", np.zeros(30, np.float32))
    write_vector(trainer.exchange / "nan.safetensors", np.full(31, np.nan, np.float32))
    write_vector(tmp_path / "outside.safetensors", np.zeros(31, np.float32))
    for line in (b"\n", b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"op": 3}\n', b'{"op": "eat"}\n',
                 b"[" * 100_000 + b"\n", b'{"op": "round"}\n', b"x" * (3 << 20) + b"\n",
                 ):  # fmt: skip
        trainer.control.sendall(line)
        assert trainer.read()["event"] == "failed"
    for view in (
        "none",
        "short.safetensors",
        "nan.safetensors",
        "../outside.safetensors",
        "/etc/passwd",
        ".",
        "\0",
    ):
        assert trainer.round(0, view=view)["event"] == "failed"
    assert trainer.round(0, run="{}")["event"] == "failed"
    for scale in ({"scale_of": 0}, {"scale": -1}, {"scale": 1.5}, {"scale": True}, {"scale": None}):
        assert trainer.round(0, **scale)["event"] == "failed"
    assert trainer.round(0, scale=2)["event"] == "refused"  # the run does not scale
    trainer.send(op="round", run=make_run(), round=True, view="view.safetensors", **AS_EVER)
    assert trainer.read()["event"] == "failed"
    assert trainer.round(0, run=make_run(task_id=bytes(32)))["event"] == "refused"
    assert trainer.private("/v1/ledger")["releases"] == 0
    assert trainer.round(0)["event"] == "released"


def test_the_view_may_bring_the_mean_of_the_round_before(start):
    trainer = start()
    trainer.read()
    view, mean = read_view(trainer.exchange / "view.safetensors", 31)
    assert mean is None
    both = {"model": view, "mean": np.zeros(31, np.float32)}
    save_file(both, trainer.exchange / "both.safetensors", metadata={"mean_round": "0"})
    assert trainer.round(1, view="both.safetensors")["event"] == "released"
    save_file(both, trainer.exchange / "nameless.safetensors")
    assert trainer.round(2, view="nameless.safetensors")["event"] == "failed"


def test_the_network_process_learns_when_the_budget_is_spent(start):
    trainer = start()
    trainer.read()
    run = make_run(rounds=2)
    events = [trainer.round(r, run)["event"] for r in (0, 1, 2)]
    assert events == ["released", "released", "exhausted"]
    ledger = trainer.private("/v1/ledger")
    assert ledger["releases"] == 2
    assert ledger["spent"]["epsilon"] <= ledger["limit"]["epsilon"] == 10
    assert [e["kind"] for e in ledger["entries"]][-2:] == ["debit", "output"]


def test_sigkill_and_restart_give_the_same_stored_payload(start):
    trainer = start()
    trainer.read()
    first = trainer.round(0)
    stored = (trainer.exchange / first["payload"]).read_bytes()
    trainer.mood("slow")
    trainer.send(op="round", run=make_run(), round=1, view="view.safetensors", **AS_EVER)
    while not (trainer.folder / "started").exists():
        time.sleep(0.01)
    trainer.kill()  # in the middle of round 1: its socket file and ledger stay as they are
    assert trainer.process.returncode == -signal.SIGKILL
    trainer.mood("")
    (trainer.exchange / first["payload"]).unlink()
    again = start()
    assert again.read()["event"] == "ready"
    assert again.round(0) == first
    assert (again.exchange / first["payload"]).read_bytes() == stored
    assert again.round(1)["releases"] == 2


def test_a_round_ends_with_its_network_process(start):
    trainer = start()
    trainer.read()
    trainer.mood("slow")
    trainer.send(op="round", run=make_run(), round=0, view="view.safetensors", **AS_EVER)
    while not (trainer.folder / "started").exists():
        time.sleep(0.01)
    trainer._stream.close()
    trainer.control.close()
    assert trainer.process.wait(20) == 1
    trainer.mood("")
    assert start().read()["event"] == "ready"  # the ledger is free again


def test_a_trainer_that_cannot_start_says_why_without_a_patients_value(start, tmp_path):
    (tmp_path / "mood").write_text("secret data")
    trainer = start()
    failed = trainer.read()
    assert failed["event"] == "failed"
    assert "ValueError" in failed["what"]
    assert str(CANARY) not in json.dumps(failed)
    assert str(CANARY) not in trainer.end()
    assert str(CANARY) in (tmp_path / "t.log").read_text()
    assert trainer.process.returncode == 1


@pytest.mark.parametrize("what", ["folder", "link"])
def test_a_log_that_is_no_file_of_ours_is_refused(start, tmp_path, what):
    log, elsewhere = tmp_path / "t.log", tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    log.mkdir() if what == "folder" else log.symlink_to(elsewhere)
    trainer = start()
    assert "cannot write the trainer's log" in trainer.read()["what"]
    assert trainer.process.wait(30) == 1
    assert elsewhere.read_text() == "kept"


def test_the_ledgers_own_folder_is_made_and_one_that_was_named_is_not(start, tmp_path):
    named = start(ledger='"missing/ledger.db"')
    assert "cannot be opened" in named.read()["what"]
    assert not (tmp_path / "missing").exists()
    named.end()
    assert start(ledger=None).read()["event"] == "ready"
    assert (tmp_path / "home" / "state").stat().st_mode & 0o777 == 0o700


def test_a_second_trainer_on_one_ledger_is_refused_and_the_first_lives(start):
    first = start()
    first.read()
    second = start()
    assert second.read()["event"] == "failed"
    assert second.process.wait(30) == 1
    assert first.round(0)["event"] == "released"


def describe(*arguments):
    command = [sys.executable, "-m", "p2pfed.training", "describe", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=HERE.parent
    )


def test_describe_writes_a_genesis_and_prints_its_facts(tmp_path):
    file = tmp_path / "genesis.safetensors"
    facts = json.loads(describe("breast-cancer", "--genesis", file, "--seed", 7).stdout)
    assert facts == {
        "task": "breast-cancer",
        "task_id": task_id(BreastCancer()).hex(),
        "genesis": hashlib.blake2b(file.read_bytes(), digest_size=32).hexdigest(),
        "num_parameters": 31,
    }
    assert (read_vector(file, 31) == initial_vector(BreastCancer(), seed=7)).all()


def test_describe_names_a_mistake(tmp_path):
    unknown = describe("no-such", "--genesis", tmp_path / "g")
    assert unknown.returncode == 2
    assert "bundled are heart-disease, breast-cancer" in unknown.stderr
    nowhere = describe("breast-cancer", "--genesis", tmp_path / "none" / "g")
    assert nowhere.returncode == 2
    assert "Traceback" not in nowhere.stderr


@pytest.mark.slow
def test_a_ledger_that_does_not_know_what_peers_have_seen_pays_for_nothing(start):
    trainer = start()
    trainer.read()
    heads = [trainer.round(number, heads=[])["ledger_head"] for number in range(2)]
    assert trainer.round(2, heads=heads)["event"] == "released"
    before = trainer.private("/v1/ledger")
    answer = trainer.round(3, heads=[*heads, "ab" * 32])
    assert answer["event"] == "rolled-back"
    assert "older" in answer["reason"]
    assert trainer.private("/v1/ledger") == before
    for wrong in ("ab", [3], ["xy"], {"a": 1}):
        assert trainer.round(3, heads=wrong)["event"] == "failed"
    assert trainer.private("/v1/ledger") == before
