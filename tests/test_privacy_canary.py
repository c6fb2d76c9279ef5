"""Nothing but the gate's release leaves the trainer, shown by taint in two ways.

*Marks.* Every private fact of a hospital is an unmistakable number or name, and every byte that
crosses to the network side (control socket, exchange folder, the daemon's output) is searched for
each of them in every form that it might take. That the search would find a leak is shown by leaks
that are planted one by one.

*Two worlds.* Two hospitals that differ in everything private but have the same clipped sum answer,
with the same noise, with the same bytes. So the bytes are a function of the clipped sum, the noise
and public facts. (The ledger's head is blinded by the ledger's own secret instead.)

Not here: when an answer comes, which tells how long the training took.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from canary_task import LEAKS, MARKED, METRIC_NAME, OURS, Canary, fixed_release

from p2pfed.config import Settings
from p2pfed.identity.run import Gate, Outer, Run
from p2pfed.privacy import ledger as ledger_room
from p2pfed.privacy.ledger import Ledger
from p2pfed.training import round as rounds
from p2pfed.training.local import initial_vector
from p2pfed.training.plans import plan_for
from p2pfed.training.round import Hospital, Refused, Released, Skipped
from p2pfed.training.task import task_id
from p2pfed.training.vector import write_vector
from p2pfed.wire.payload import decode_payload

HERE = Path(__file__).resolve().parent
SAMPLES = 40  # of the roster: public, and not how many patients there are
MANY = 70_000  # the same for the real process, where more patients are
GRIDS = 14, 24  # bits
VIEW = initial_vector(Canary(), seed=1)
HEAD = re.compile(rb'"ledger_head": "[0-9a-f]{64}"')
BLINDED = b'"ledger_head": "..."'


def make_run(**changes):
    run = Run(
        name="canary", network_id=bytes(32), task="canary", task_id=task_id(Canary()),
        genesis=bytes(32), num_parameters=VIEW.size, rounds=3, grid_bits=14, mechanism="svt",
        unit="patient", epsilon=Fraction(10), delta=Fraction(1, 100_000), clip=Fraction(1),
        block_size=1, segment_blocks=2, select_share=Fraction(1, 5), top_fraction=Fraction(1),
        outer=Outer("fedadam", 0.05), robust="none", quorum=0.8, min_live=0.5, deadline_s=60.0,
        min_round_interval_s=0.0,
    )  # fmt: skip
    return Run.decode(replace(run, **changes).encode())


def wide_run(**changes):
    """For the real process: on a grid where noise on a mean over `MANY` patients is wide."""
    return make_run(grid_bits=24, **changes)


NONE = {"mechanism": "none", "unit": "none", "epsilon": Fraction(0), "delta": Fraction(0)}
WORTH = Gate(worth_releases=2, worth_ratio=Fraction(1000))


# --- the search ---------------------------------------------------------------------------------

FACTS = {
    "value": MARKED.value,
    "target": MARKED.target,
    "loss": MARKED.loss,
    "metric": MARKED.metric,
    "buffer": MARKED.buffer,
    "patients": MARKED.patients,
    "records": MARKED.records,
    "sick": MARKED.sick,
    "name": MARKED.patient(0),
    "any name": MARKED.name,
    "metric name": METRIC_NAME,
}
NUMBERS = "<f", ">f", "<d", ">d", "<i", ">i", "<q", ">q"
SHORT = 4  # bytes; as hexadecimal, eight digits


def packed(number):
    """The number as computers keep it, and as a whole number on a run's grid."""
    for kind in NUMBERS:
        if kind[1] in "fd" or isinstance(number, int):
            yield struct.pack(kind, number)
        elif kind[1] == "q":
            yield from (struct.pack(kind, round(number * 2**bits)) for bits in GRIDS)
    yield msgpack.packb(number)


def written(number):
    """The number as people and programs write it, to six digits or more."""
    if isinstance(number, int):
        yield from (f"{number}", f"{number:_}", f"{number:,}", f"{number:x}", f"{number:e}")
        return
    for seen in (number, float(np.float32(number)), number * 100):
        for digits in range(6, 18):
            yield from (f"{seen:.{digits}g}", f"{seen:.{digits - 1}e}")
    yield from (number.hex(), *(str(round(number * 2**bits)) for bits in GRIDS))


def base64_forms(octets):
    """What base64 makes of the bytes, wherever they begin; without the ends, which vary."""
    for before in range(3):
        whole = base64.b64encode(bytes(before) + octets + bytes(2))
        yield whole[-(-8 * before // 6) : (8 * (before + len(octets))) // 6]


def forms(fact):
    """Every form of a fact that is searched for."""
    if isinstance(fact, str):
        plain = [fact.encode()]
        yield from (fact.encode(), fact.encode("utf-16-le"), fact.encode("utf-16-be"))
        for name in ("md5", "sha1", "sha256", "sha512", "blake2b", "blake2s"):
            digest = hashlib.new(name, fact.encode()).digest()
            yield from (digest, digest.hex().encode())
    else:
        plain = list(packed(fact))
        yield from plain
        yield from (text.encode() for text in written(fact))
    for octets in plain:
        yield from (octets.hex().encode(), octets.hex().upper().encode())
        if len(octets) > SHORT + 1:
            yield from base64_forms(octets)


def searched(fact):
    """The forms as one expression; digits alone count only where no other digit stands beside."""
    parts = []
    for form in sorted(set(forms(fact)), key=len, reverse=True):
        pattern = re.escape(form)
        if form.isalnum() and form.isascii() and len(form) <= 2 * SHORT + 2:
            pattern = b"(?<![0-9A-Za-z])" + pattern + b"(?![0-9A-Za-z])"
        parts.append(pattern)
    return re.compile(b"|".join(parts), re.DOTALL)


SEARCHES = {name: searched(fact) for name, fact in FACTS.items()}


def found(*crossed):
    """Which facts can be read in these bytes."""
    return {name for name, form in SEARCHES.items() if any(form.search(part) for part in crossed)}


def found_in_heads(told):
    """The same in ledger heads, forms of eight bytes or more only: heads are random."""
    heads = [head[-65:-1] for head in HEAD.findall(told)]
    whole = b" ".join(heads) + b" ".join(bytes.fromhex(head.decode()) for head in heads)
    return {
        name
        for name, fact in FACTS.items()
        if any(form in whole for form in set(forms(fact)) if len(form) > 2 * SHORT)
    }


def test_the_search_finds_every_fact_in_every_form_and_nothing_in_what_is_public():
    for name, fact in FACTS.items():
        for form in set(forms(fact)):
            assert name in found(b'{"x": "' + form + b'"}')
            if not (form.isalnum() and form.isascii()):
                assert name in found(b"\xb7" + form + b"\xb7")
    public = {"round": MARKED.patients + 1, "spent_epsilon": 1234.5, "loss": 31337, "releases": 41}
    assert found(json.dumps(public).encode(), bytes(range(256)) * 3, VIEW.tobytes()) == set()


# --- marks: the real process --------------------------------------------------------------------


class Trainer:
    """A trainer process; keeps all that the network side can see of it.

    Args:
        folder: Its own.
        change: As `canary_task` has them; "as it is" for none.
        options: The task's.
    """

    def __init__(self, folder, change="as it is", options='world = "marked"'):
        self.folder, self.exchange = folder, folder / "exchange"
        self.exchange.mkdir()
        write_vector(self.exchange / "view.safetensors", VIEW)
        lines = ['[node]\nname = "a"\ndata_dir = "."', '[train]\ntask = "canary_task:Canary"']
        lines += ['data = "."', 'socket = "t.sock"', 'device = "cpu"', f"options = {{{options}}}"]
        lines += ["[privacy]", 'ledger = "ledger.db"', 'epsilon = "100"']
        (folder / "node.toml").write_text("\n".join(lines))
        ours, theirs = socket.socketpair()
        ours.settimeout(100)
        command = [sys.executable, "-m", "canary_task", change, "serve"]
        command += ["--config", str(folder / "node.toml"), "--exchange", str(self.exchange)]
        self._process = subprocess.Popen(
            [*command, "--control-fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        self._control, self._stream = ours, ours.makefile("rb")
        self.told = b""
        self.hello = self._read()

    def _read(self):
        line = self._stream.readline()
        self.told += line
        return json.loads(line) if line else None

    def ask(self, op="round", number=0, run=None, mood="", **more):
        (self.folder / "mood").write_text(mood)
        asked = {"op": op, "round": number, "view": "view.safetensors", "samples": MANY}
        asked |= {"scale": 1, "scale_of": 1, "run": (run or wide_run()).encode().decode(), **more}
        self._control.sendall(json.dumps(asked).encode() + b"\n")
        return self._read()

    def private(self, page):
        connection = http.client.HTTPConnection("local")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.folder / "t.sock"))
        try:
            connection.request("GET", page)
            return connection.getresponse().read()
        finally:
            connection.close()

    def stop(self):
        """End it; `output` is then what the daemon's terminal or journal has of it."""
        if not self._stream.closed:
            self._control.shutdown(socket.SHUT_WR)
            self.told += self._stream.read()
            self.output, _ = self._process.communicate(timeout=60)
            self._stream.close()
            self._control.close()

    def kill(self):
        self._process.kill()
        self.stop()

    @property
    def files(self):
        """Names and contents in the exchange folder."""
        return {path.name: path.read_bytes() for path in sorted(self.exchange.iterdir())}

    @property
    def answers(self):
        """All that was told, but the ledger's heads and where the test has put its files."""
        return HEAD.sub(BLINDED, self.told).replace(str(self.folder).encode(), b"...")

    @property
    def crossed(self):
        """Every byte that the network side could see until now, the heads aside."""
        named = [name.encode() for name in self.files]
        return [self.answers, *named, *self.files.values(), getattr(self, "output", b"")]


@pytest.fixture
def start(tmp_path):
    running = []

    def begin(name="a", *args, **more):
        folder = tmp_path / name
        folder.mkdir()
        running.append(Trainer(folder, *args, **more))
        return running[-1]

    yield begin
    for trainer in running:
        trainer.kill()


GAUSSIAN = wide_run(mechanism="gaussian", name="dense")
HOSPITAL = wide_run(mechanism="gaussian", unit="hospital", name="hospital", rounds=1)
TEXTBOOK = wide_run(mechanism="svt-textbook", name="text", gate=Gate(schedule="sequential"))
A_WHOLE_LIFE = (  # requests of every kind, good and bad, and what comes of each
    ("released", {}),
    ("released", {"number": 1, "mood": "nan"}),
    ("released", {"number": 0, "mood": "nan"}),  # once more: the stored output
    ("released", {"run": GAUSSIAN}),
    ("failed", {"run": GAUSSIAN, "number": 1, "mood": "raise"}),
    *(("failed", {"run": GAUSSIAN, "number": 1, "mood": mood}) for mood in OURS),
    # Training that says it ended in NaN counts as zeros, which are released; it comes last.
    *(
        (
            "released" if mood == "raise UpdateRejected" else "failed",
            {"run": wide_run(unit="hospital"), "number": 1, "mood": mood},
        )
        for mood in OURS
    ),
    ("failed", {"run": GAUSSIAN, "number": 1, "mood": "memory"}),
    ("released", {"run": GAUSSIAN, "number": 1, "mood": "no metrics"}),
    ("released", {"run": wide_run(gate=Gate(patients_per_row=5), name="groups"), "mood": "nan"}),
    ("released", {"run": HOSPITAL, "mood": "nan"}),
    ("exhausted", {"run": HOSPITAL, "number": 1}),
    ("released", {"run": TEXTBOOK}),
    ("skipped", {"run": wide_run(gate=WORTH, name="worth")}),
    ("refused", {"run": wide_run(**NONE)}),
    ("refused", {"run": wide_run(task_id=bytes(32))}),
    ("exhausted", {"run": wide_run(epsilon=Fraction(1000), rounds=1, name="greedy")}),
    ("failed", {"number": 3, "view": "none"}),
    ("rolled-back", {"number": 3, "heads": ["00" * 32]}),
    ("evaluated", {"op": "evaluate"}),
    ("failed", {"op": "eat"}),
)


def live(trainer):
    """Ask for all of it; returns the answers."""
    answers = [trainer.ask(**request) for _, request in A_WHOLE_LIFE]
    assert [answer["event"] for answer in answers] == [event for event, _ in A_WHOLE_LIFE]
    return answers


@pytest.mark.slow
def test_no_private_fact_crosses_in_any_form_in_any_kind_of_round(start):
    """False alarm: a form of 4 bytes in random bytes of a payload, below 1e-6; see the last line.

    Such short forms are not looked for in ledger heads, which are random too.
    """
    trainer = start()
    answers = live(trainer)
    reasons = [answer["reason"] for answer in answers if "reason" in answer]
    for part in ("worth gate said no", "the run's releases are paid for", "lifetime budget"):
        assert sum(part in reason for reason in reasons) == 1
    shown = trainer.private("/v1/metrics") + trainer.private("/v1/status")
    trainer.stop()
    # The marks are there, on the hospital's own side ...
    assert found(shown) >= {"metric", "metric name", "loss", "patients"}
    log = (trainer.folder / "t.log").read_bytes()
    assert found(log) == {"value", "patients", "name", "any name"}
    # ... and not on the other one.
    assert found(*trainer.crossed) == found_in_heads(trainer.told) == set()
    assert trainer.output == b""
    assert set(trainer.files) == {"view.safetensors"} | {
        answer["payload"] for answer in answers if answer["event"] == "released"
    }
    payloads = sum(len(content) for name, content in trainer.files.items() if "payload" in name)
    short = {form for fact in FACTS.values() for form in forms(fact) if len(form) <= SHORT}
    assert payloads * len(short) / 2**32 < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mood", "kind"),
    [("no data", "ValueError"), ("no data, raise ConfigError", "ConfigError")],
)
def test_a_trainer_that_cannot_start_keeps_its_patients_to_itself(start, tmp_path, mood, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mood").write_text(mood)
    trainer = Trainer(tmp_path / "a")
    trainer.stop()
    assert trainer.hello["event"] == "failed"
    assert trainer.hello["what"] == f"the task raised {kind} while reading its data"
    assert found(*trainer.crossed) == set()
    assert {"value", "name"} <= found((tmp_path / "a" / "t.log").read_bytes())


@pytest.mark.slow
def test_every_planted_leak_is_found(start):
    trainer = start("a", "leak")
    run = wide_run(mechanism="gaussian", rounds=len(LEAKS))
    for number, (what, fact, _) in enumerate(LEAKS):
        before = len(trainer.told), set(trainer.files)
        assert trainer.ask(number=number, run=run)["event"] == "released"
        new = [name for name in trainer.files if name not in before[1]]
        crossed = [trainer.told[before[0] :], *map(str.encode, new), *map(trainer.files.get, new)]
        if fact != "target":  # that one is printed
            assert fact in found(*crossed), what
            assert found(*crossed) <= {fact, "any name"}, what
    assert found_in_heads(trainer.told) == {"name"}
    failed = trainer.ask(number=0, run=wide_run(name="other"), mood="raise")
    assert {"value", "name", "patients"} <= found(json.dumps(failed).encode())
    trainer.stop()
    assert {"target", "value", "name", "patients"} <= found(trainer.output)


# --- two worlds ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hospitals_that_differ_in_everything_but_their_sum_send_the_same_bytes(start):
    """Process for process: the control stream, the exchange folder and the output."""
    one, other = (
        start(name, "fixed", f'world = "{name}", carrier = 0') for name in ("marked", "other")
    )
    for trainer in (one, other):
        live(trainer)
        trainer.stop()
    assert one.answers == other.answers
    assert one.files == other.files
    assert one.output == other.output == b""
    assert one.told != other.told  # the heads
    with_head = {"released", "exhausted"}
    assert one.answers.count(BLINDED) == sum(event in with_head for event, _ in A_WHOLE_LIFE)


PLANS = {
    "svt": {},
    "svt, sequential": {"gate": Gate(schedule="sequential")},
    "svt, textbook": {"mechanism": "svt-textbook", "gate": Gate(schedule="sequential")},
    "gaussian": {"mechanism": "gaussian"},
    "groups": {"mechanism": "gaussian", "gate": Gate(patients_per_row=5)},
    "worth it": {"gate": Gate(worth_releases=2, worth_ratio=Fraction(0))},
    "not worth it": {"gate": WORTH},
    "hospital": {"unit": "hospital"},
    "int8": {"mechanism": "gaussian", "clip": Fraction(1, 2), "epsilon": Fraction(50)},
}


def hospital_of(folder, world, *, carrier=1, task=Canary, **privacy):
    folder.mkdir()
    privacy = {"epsilon": "100", "ledger": folder / "ledger.db", **privacy}
    told = {"node": {"name": world, "data_dir": folder}, "privacy": privacy}
    settings = Settings.model_validate({**told, "train": {"task": "canary_task:Canary"}})
    made = task()
    data = made.data(None, {"world": world, "carrier": carrier})
    return Hospital(settings, made, data, Ledger.open(settings.ledger_path))


def answered(folder, world, run, *, carrier=1, number=2, **privacy):
    """What a hospital answers to some rounds, and what its gate released."""
    hospital = hospital_of(folder, world, carrier=carrier, **privacy)
    with hospital.ledger as ledger:
        results = [hospital.run_round(run, n, VIEW, samples=SAMPLES) for n in range(number)]
        stored = [entry.detail for entry in ledger.entries() if entry.kind in {"debit", "output"}]
    blinded = [
        replace(result, ledger_head=b"") if hasattr(result, "ledger_head") else result
        for result in results
    ]
    for entry in stored:
        entry.pop("dataset", None)  # a fingerprint under the ledger's secret
    return blinded, stored


@pytest.fixture
def same_noise(monkeypatch):
    monkeypatch.setattr(rounds, "release_round", fixed_release)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_formal_guarantee_an_answer_depends_on_the_clipped_sum_alone(tmp_path, same_noise, name):
    run = make_run(**PLANS[name])
    carrier = int(name != "hospital")  # whose batches are drawn by chance
    one = answered(tmp_path / "1", "small", run, carrier=carrier)
    other = answered(tmp_path / "2", "small-other", run, carrier=carrier)
    assert one == other
    if name == "not worth it":
        assert {type(result) for result in one[0]} == {Skipped}
    else:
        assert Released in {type(result) for result in one[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svt", "gaussian", "groups"])
def test_where_the_sums_differ_the_answers_differ(tmp_path, same_noise, name):
    """The comparison is no comparison of constants: one patient's row is seen, under the noise."""
    run = make_run(**PLANS[name])
    with_one = answered(tmp_path / "1", "small", run)
    without = answered(tmp_path / "2", "small", run, carrier=0)
    assert with_one != without


@pytest.mark.slow
def test_without_the_gate_two_worlds_differ(tmp_path, same_noise):
    run = make_run(**NONE)
    one, other = (
        answered(tmp_path / world, world, run, epsilon=0, allow_none=True)
        for world in ("small", "small-other")
    )
    assert one != other


@pytest.mark.slow
@pytest.mark.parametrize("leak", ["scale", "plan", "saturated", "refusal"])
def test_a_count_that_slips_into_an_answer_is_noticed(tmp_path, same_noise, monkeypatch, leak):
    """Planted: the live number of patients in place of the roster's, and what it may decide."""
    plan, of, real = plan_for, rounds.contributions_of, rounds.Hospital.run_round

    def leaking(hospital, run, number, view, *, samples):
        live = hospital.data.train.num_patients
        if leak == "refusal" and live > 50:
            return Refused("too many patients")
        if leak == "scale":
            monkeypatch.setattr(rounds, "contributions_of", lambda run, _: of(run, live))
        if leak == "plan":  # more patients, a coarser grid
            many = 1 << live // 3
            monkeypatch.setattr(rounds, "plan_for", lambda run, _, **more: plan(run, many, **more))
        result = real(hospital, run, number, view, samples=samples)
        return replace(result, saturated=live) if leak == "saturated" else result

    monkeypatch.setattr(rounds.Hospital, "run_round", leaking)
    run = make_run(mechanism="gaussian")
    one = answered(tmp_path / "1", "small", run)
    assert one != answered(tmp_path / "2", "small-other", run)


class Saved(Canary):
    persistent = True


@pytest.mark.slow
def test_a_saved_buffer_is_refused_under_a_mechanism_and_withheld_without_one(tmp_path):
    changes = {"task_id": task_id(Saved())}
    hospital = hospital_of(tmp_path / "a", "small", task=Saved, allow_none=True)
    with hospital.ledger:
        for mechanism in ("svt", "gaussian", "svt-textbook"):
            run = make_run(mechanism=mechanism, **changes)
            refused = hospital.run_round(run, 0, VIEW, samples=SAMPLES)
            assert isinstance(refused, Refused)
            assert "statistic" in refused.reason
            assert found(refused.reason.encode()) == set()
        released = hospital.run_round(make_run(**changes, **NONE), 0, VIEW, samples=SAMPLES)
    payload = decode_payload(released.payload, num_parameters=VIEW.size, max_released=VIEW.size)
    assert payload.values.size <= VIEW.size  # parameters alone; no room for a buffer
    assert found(released.payload) == set()


def test_the_ledgers_head_is_blinded_by_a_secret_of_its_own(tmp_path, monkeypatch):
    """The same patients at the same second: nobody can tell from a head, or check a guess by it."""
    monkeypatch.setattr(ledger_room, "time", SimpleNamespace(time=lambda: 1_700_000_000))
    ids = [MARKED.patient(number).encode() for number in range(5)]
    heads = []
    for name in ("a", "b"):
        with Ledger.open(tmp_path / name) as ledger:
            ledger.register("canary", ids)
            heads.append(ledger.head)
            raw = b"".join(entry.body for entry in ledger._journal.entries)
        assert found(raw) == set()
    assert heads[0] != heads[1]
