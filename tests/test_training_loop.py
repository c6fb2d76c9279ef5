"""A training loop of the hospital's own: its `for`, its `sync`, and what crosses to the daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from loop_daemon import LoopDaemon, a_run, asking, has_trainer, loops_federation, protected
from torch import nn

import p2pfed
from p2pfed.demo.federation import wait_for
from p2pfed.demo.plan import run_constants
from p2pfed.errors import (
    BudgetExhausted,
    ConfigError,
    DaemonNotRunning,
    PolicyError,
    PrivacyError,
    StateInUse,
    TrainerError,
    UpdateRejected,
    VersionMismatch,
)
from p2pfed.identity.rules import Averaging
from p2pfed.privacy.ledger import Ledger
from p2pfed.training.loop_task import LoopPatients, LoopTask, load_loop
from p2pfed.training.task import task_id
from p2pfed.training.vector import get_vector, read_vector

HERE = Path(__file__).resolve().parent
CANARY = 0.728_193_645_546_372  # a loss that must be seen on the private socket alone
PATIENTS = [f"record {number}" for number in range(40)]
FIVE = np.array([0.5, -0.25, 1.0, 0.0, 0.125], np.float32)
WITH_BUDGET = 'epsilon = "1000"'


class Net(nn.Module):
    """Five shared parameters, two that stay at home if asked for, and a buffer."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 1)
        self.head = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(1))


HEAD = ("head.*",)


@pytest.fixture
def model():
    return nn.Linear(4, 1)


@pytest.fixture
def start(tmp_path):
    begun = []

    def begin(**how):
        begun.append(LoopDaemon(tmp_path, **how))
        return begun[-1]

    yield begin
    for daemon in begun:
        daemon.close()


@pytest.fixture
def daemon(start):
    return start()


def task_of(model, version="", private=()):
    return LoopTask(lambda: model, version=version, private=private)


def one_run(model, **constants):
    return a_run(task_of(model), 5, **constants)


def join(daemon, model, **how):
    return p2pfed.join(model, config=daemon.config, **how)


def shift(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


# --- a round ---------------------------------------------------------------------------------


def test_a_loop_gets_the_networks_model_in_place_and_releases_what_training_changed(daemon, model):
    run = one_run(model)
    weight = model.weight

    def script(call):
        call.round(run, 0, FIVE)
        call.round(run, 2, FIVE / 2)
        call.evaluate(3, -FIVE)
        assert call.hear() is None

    daemon.serve(script)
    numbers, told = [], []
    with join(daemon, model) as fed:
        for number in fed:
            assert (get_vector(model) == FIVE / (1 if number == 0 else 2)).all()
            assert model.weight is weight
            shift(model, 0.25)
            numbers.append(number)
            told.append(fed.sync())
        assert fed.rounds == 3
    daemon.done()
    assert (numbers, told) == ([0, 2], ["released", "released"])
    assert (get_vector(model) == -FIVE).all()  # the run is over, and this is its model
    first, second, last = daemon.answers
    assert (first["event"], first["round"], first["mechanism"]) == ("released", 0, "none")
    assert (daemon.released(first, run) == 0.25).all()
    assert second["round"] == 2
    assert last == {"event": "evaluated", "round": 3}


def test_the_daemon_is_told_what_a_spawned_trainer_tells_it(daemon, model):
    hello = {}

    def script(call):
        hello.update(call.hello)

    daemon.serve(script)
    with join(daemon, model):
        daemon.done()
    assert hello == {
        "event": "ready", "task": "loop", "task_id": task_id(task_of(model)).hex(),
        "num_parameters": 5, "device": "cpu",
    }  # fmt: skip


def test_loss_and_counts_are_seen_on_the_private_socket_alone(daemon, model, capfd):
    run = one_run(model)
    daemon.serve(lambda call: call.round(run, 0, FIVE))
    with join(daemon, model) as fed:
        for _ in fed:
            fed.sync(n_samples=73_129, loss=torch.tensor(CANARY, dtype=torch.float64))
            break
        daemon.done()
        shown = daemon.private("metrics")["metrics"]
        rounds = daemon.private("status")["rounds"]
    assert shown == [{"round": 0, "values": {"loss": CANARY, "n_samples": 73_129.0}}]
    assert [r["event"] for r in rounds] == ["released"]
    assert "compute" in rounds[0]["seconds"]
    payload = (daemon.exchange / daemon.answers[0]["payload"]).read_bytes()
    for text in (b"73129", str(CANARY).encode(), b"loss", b"seconds"):
        assert text not in daemon.seen + payload
    assert capfd.readouterr() == ("", "")  # a guest says nothing


@pytest.mark.slow  # torch loads much with the first optimiser
def test_what_stays_at_home_and_the_optimiser_are_left_as_they_are(daemon):
    torch.manual_seed(1)
    model = Net()
    run = a_run(task_of(model, private=HEAD), 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []

    def script(call):
        call.round(run, 0, FIVE)
        call.round(run, 1, FIVE)
        call.evaluate(3, FIVE)

    daemon.serve(script)
    with join(daemon, model, private_parameters=HEAD) as fed:
        for _ in fed:
            seen.append((model.head.weight.item(), model.seen.item()))
            optimizer.zero_grad()
            model.head(model.trunk(torch.ones(1, 4))).square().sum().backward()
            optimizer.step()
            model.seen += 1
            seen.append((model.head.weight.item(), model.seen.item()))
            fed.sync()
    daemon.done()
    assert seen[1] == seen[2] != seen[0]
    assert len(optimizer.state) == 4
    assert daemon.released(daemon.answers[0], run).size == 5


def test_metrics_judge_the_networks_model_in_evaluation_mode_and_leave_no_trace(daemon):
    model = nn.Sequential(nn.Linear(4, 1), nn.Dropout())
    model[1].eval()
    run = a_run(task_of(model), 5)
    modes = []

    def judged(given):
        modes.append((given.training, given[1].training, torch.is_grad_enabled()))
        return {"loss": given[0].bias.item(), "accuracy": CANARY}

    def script(call):
        call.round(run, 0, FIVE)
        call.evaluate(3, 2 * FIVE)

    daemon.serve(script)
    with join(daemon, model, metrics=judged) as fed:
        for _ in fed:
            shift(model, 1.0)
            fed.sync(loss=3)
        shown = daemon.private("metrics")["metrics"]
    daemon.done()
    assert modes == [(False, False, False)] * 2
    assert (model.training, model[1].training) == (True, False)
    assert [(m["round"], m["values"]["loss"]) for m in shown] == [(0, 3), (0, 0.125), (3, 0.25)]
    assert str(CANARY).encode() not in daemon.seen


def test_a_loop_that_comes_after_the_last_round_gets_the_networks_model_and_ends(daemon, model):
    run = one_run(model)

    def script(call):
        call.evaluate(2, FIVE, run=run.encode().decode())
        call.evaluate(3, 2 * FIVE, run=run.encode().decode())

    daemon.serve(script)
    with join(daemon, model) as fed:
        assert list(fed) == []
    daemon.done()
    assert (get_vector(model) == 2 * FIVE).all()


def test_a_round_that_was_released_before_is_given_again_without_training(daemon, model):
    run = one_run(model)
    for _ in range(2):
        daemon.serve(lambda call: (call.round(run, 0, FIVE), call.evaluate(3, FIVE)))
        trained = 0
        with join(daemon, model) as fed:
            for _ in fed:
                shift(model, 0.5)
                fed.sync()
                trained += 1
        daemon.done()
    assert trained == 0
    first, _, again, _ = daemon.answers
    assert again == first
    assert (daemon.released(again, run) == 0.5).all()


# --- mistakes in the loop --------------------------------------------------------------------


def test_a_body_without_sync_is_told_at_the_next_round_and_can_still_hand_it_in(daemon, model):
    run = one_run(model)
    daemon.serve(lambda call: call.round(run, 0, FIVE))
    with join(daemon, model) as fed:
        rounds = iter(fed)
        next(rounds)
        shift(model, 0.5)
        with pytest.raises(TrainerError, match="round 0 was not handed in") as caught:
            next(rounds)
        assert "call fed.sync(" in caught.value.do
        assert fed.sync() == "released"
    daemon.done()


def test_sync_twice_or_outside_of_the_loop_is_told(daemon, model):
    run = one_run(model)
    daemon.serve(lambda call: call.round(run, 0, FIVE))
    with join(daemon, model) as fed:
        with pytest.raises(TrainerError, match="no round is under way"):
            fed.sync()
        for _ in fed:
            fed.sync()
            with pytest.raises(TrainerError, match="no round is under way"):
                fed.sync()
            break
    daemon.done()


def test_a_figure_that_is_no_number_is_the_callers_mistake_and_costs_no_round(daemon, model):
    run = one_run(model)
    daemon.serve(lambda call: call.round(run, 0, FIVE))
    with join(daemon, model) as fed:
        for _ in fed:
            with pytest.raises(ValueError, match="could not convert"):
                fed.sync(loss="small")
            assert fed.sync(loss=1) == "released"
            break
    daemon.done()


def test_a_model_that_did_not_change_is_noted_for_the_hospital_alone(daemon, model, caplog):
    run = one_run(model)
    daemon.serve(lambda call: call.round(run, 0, FIVE))
    with join(daemon, model) as fed:
        for _ in fed:
            fed.sync()
            break
        daemon.done()
        [note] = daemon.private("status")["notes"]
    assert "has not changed" in note
    assert b"has not changed" not in daemon.seen


def test_nan_is_refused_without_a_mechanism_and_the_round_skipped(daemon, model):
    run = one_run(model)

    def script(call):
        call.round(run, 0, FIVE)
        call.round(run, 1, FIVE)

    daemon.serve(script)
    with join(daemon, model) as fed:
        rounds = iter(fed)
        next(rounds)
        shift(model, float("nan"))
        with pytest.raises(UpdateRejected, match="NaN or infinity") as caught:
            fed.sync()
        assert "learning rate" in caught.value.do
        assert next(rounds) == 1
        assert (get_vector(model) == FIVE).all()
        fed.sync()
    daemon.done()
    assert [a["event"] for a in daemon.answers] == ["skipped", "released"]


# --- budgets and policy ----------------------------------------------------------------------


def spent_by(daemon):
    with Ledger.open(daemon.folder / "ledger.db") as ledger:
        return [e.kind for e in ledger.entries() if e.kind in {"debit", "output"}]


def test_under_a_mechanism_the_hospital_is_protected_and_its_patients_pay(start, model):
    daemon = start(privacy=WITH_BUDGET)
    run = one_run(model, **protected())
    daemon.serve(lambda call: call.round(run, 0, FIVE))
    with join(daemon, model, patients=PATIENTS) as fed:
        for _ in fed:
            shift(model, 0.5)
            assert fed.sync() == "released"
            break
        daemon.done()
        shown = daemon.private("ledger")
    [answer] = daemon.answers
    assert answer["mechanism"] == "gaussian"
    assert 0 < answer["spent_epsilon"] < 8
    assert shown["releases"] == 1
    debit = next(e for e in shown["entries"] if e["kind"] == "debit")
    assert debit["unit"] == "hospital"
    assert b"record" not in daemon.seen


@pytest.mark.parametrize(
    ("constants", "patients", "why"),
    [
        (protected(), None, "did not say whose"),
        (protected("patient"), PATIENTS, "one contribution for the whole hospital"),
        ({"averaging": Averaging(drift_correction=True)}, PATIENTS, "corrects every local step"),
        ({"task_id": bytes(32)}, PATIENTS, "another version of the task"),
    ],
    ids=["nobody named", "unit patient", "drift correction", "another task"],
)
def test_a_run_that_a_loop_cannot_serve_is_refused_before_training_and_unpaid(
    start, model, constants, patients, why
):
    daemon = start(privacy=WITH_BUDGET + "\nallow_none = true")
    run = one_run(model, **constants)
    daemon.serve(lambda call: call.round(run, 0, FIVE))
    with (
        join(daemon, model, patients=patients) as fed,
        pytest.raises(PolicyError, match="does not take part") as caught,
    ):
        next(iter(fed))
    daemon.done()
    assert why in caught.value.why
    assert daemon.answers[0]["event"] == "refused"
    assert why in daemon.answers[0]["reason"]
    assert spent_by(daemon) == []


def test_a_spent_budget_ends_the_releases_before_training_and_the_model_follows(start, model):
    daemon = start(privacy='epsilon = "0.1"')
    run = one_run(model, **protected())

    def script(call):
        call.round(run, 0, FIVE)
        call.evaluate(1, FIVE)
        call.evaluate(3, 2 * FIVE)

    daemon.serve(script)
    with join(daemon, model, patients=PATIENTS) as fed:
        with pytest.raises(BudgetExhausted, match="the budget is spent") as caught:
            next(iter(fed))
        assert "lifetime budget" in caught.value.why
        assert list(fed) == []
        assert (get_vector(model) == 2 * FIVE).all()
    daemon.done()
    assert [a["event"] for a in daemon.answers] == ["exhausted", "evaluated", "evaluated"]
    assert spent_by(daemon) == []


def test_the_budget_of_the_run_holds_as_well(start, model):
    daemon = start(privacy=WITH_BUDGET)
    run = one_run(model, **protected(rounds=1))

    def script(call):
        call.round(run, 0, FIVE)
        call.round(run, 1, FIVE)

    daemon.serve(script)
    with join(daemon, model, patients=PATIENTS) as fed:
        rounds = iter(fed)
        next(rounds)
        fed.sync()
        with pytest.raises(BudgetExhausted) as caught:
            next(rounds)
        assert "never passes its epsilon" in caught.value.why
    daemon.done()
    assert [a["event"] for a in daemon.answers] == ["released", "exhausted"]


def test_nan_under_a_mechanism_is_not_told_to_anybody(start, model):
    daemon = start(privacy=WITH_BUDGET)
    run = one_run(model, **protected())
    daemon.serve(lambda call: call.round(run, 0, FIVE))
    with join(daemon, model, patients=PATIENTS) as fed:
        for _ in fed:
            shift(model, float("nan"))
            assert fed.sync() == "released"
            break
        daemon.done()
        status = daemon.private("status")
    assert status["rounds"][0]["unusable_patients"] == 1
    assert any("zeros took the place" in note for note in status["notes"])
    assert set(daemon.answers[0]) == {
        "event", "round", "run_id", "payload", "mechanism", "spent_nano_rho", "spent_epsilon",
        "releases", "ledger_head", "saturated", "releases_left",
    }  # fmt: skip


def test_a_ledger_that_forgot_a_release_stops_the_loop(daemon, model):
    run = one_run(model)
    daemon.serve(lambda call: call.ask(**asking(daemon, run, 0, FIVE) | {"heads": ["ab" * 32]}))
    with join(daemon, model) as fed, pytest.raises(PrivacyError, match="nothing may be released"):
        next(iter(fed))
    daemon.done()
    assert daemon.answers[0]["event"] == "rolled-back"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("record 1", "one text"),
        ([], "empty"),
        (["a", 7], "holds a int"),
        (["a", ""], "an empty name"),
    ],
)
def test_patients_without_proper_names_are_refused(given, problem):
    with pytest.raises(ConfigError, match=problem):
        LoopPatients.named(given)


def test_a_patient_that_is_named_twice_is_one_patient():
    assert LoopPatients.named(["a", b"b", "a"]).patient_records() == (b"a", b"b")


def test_p2pfed_cannot_train_or_evaluate_in_place_of_a_loop(model):
    task, patients = task_of(model), LoopPatients([b"a"])
    for asked in (
        lambda: task.data(None, {}),
        lambda: task.loss(torch.ones(1), torch.ones(1)),
        lambda: task.metrics(model, None),
        lambda: patients.batches(1, seed=0),
        lambda: patients.stacked([0], seed=0),
        lambda: patients.grouped(2),
    ):
        with pytest.raises(ConfigError, match="of its own"):
            asked()


# --- identity --------------------------------------------------------------------------------


def test_the_version_and_the_shared_tensors_are_a_loops_identity():
    ids = {
        "as it is": task_id(task_of(nn.Linear(4, 1))),
        "another version": task_id(task_of(nn.Linear(4, 1), "2")),
        "another shape": task_id(task_of(nn.Linear(5, 1))),
        "another name": task_id(task_of(nn.Sequential(nn.Linear(4, 1)))),
        "another type": task_id(task_of(nn.Linear(4, 1, dtype=torch.float64))),
        "more at home": task_id(task_of(nn.Linear(4, 1), private=("bias",))),
    }
    assert len(set(ids.values())) == len(ids)
    assert task_id(task_of(nn.Linear(4, 1))) == ids["as it is"]


def test_what_stays_at_home_may_differ_between_hospitals():
    class Other(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 9)

    mine, theirs = task_of(Net(), private=HEAD), task_of(Other(), private=HEAD)
    assert task_id(mine) == task_id(theirs)


def test_half_precision_parameters_are_refused():
    with pytest.raises(ConfigError, match="weight is bfloat16"):
        task_of(nn.Linear(4, 1).to(torch.bfloat16))


def test_a_pattern_that_fits_nothing_is_refused(model):
    with pytest.raises(ConfigError, match="fits no parameter"):
        task_of(model, private=("hea.*",))


PRIVATE_PARAMETERS = HEAD


def build():
    return Net()


def not_a_model():
    return 7


def test_the_stewards_description_names_the_same_task():
    spec = f"loop:{__name__}:build"
    assert task_id(load_loop(spec)) == task_id(task_of(Net(), private=HEAD))
    assert task_id(load_loop(f"{spec}:2")) == task_id(task_of(Net(), "2", HEAD))


@pytest.mark.parametrize(
    "spec",
    [
        "loop",
        "loop:",
        "loop:os",
        "loop:no_such_module:build",
        "loop:os:no_such_function",
        f"loop:{__name__}:not_a_model",
        f"loop:{__name__}:CANARY",
    ],
)
def test_what_names_no_model_is_refused(spec):
    with pytest.raises(ConfigError):
        load_loop(spec)


# --- joining ---------------------------------------------------------------------------------


def test_a_node_that_starts_its_task_itself_says_what_to_change(start, model):
    daemon = start(task="breast-cancer")
    with pytest.raises(ConfigError, match=r"train.task is 'breast-cancer'") as caught:
        join(daemon, model)
    assert 'task = "loop"' in caught.value.do
    assert str(daemon.config) in caught.value.do


def test_no_daemon_is_told_and_can_be_waited_for(daemon, model):
    daemon.stop_listening()
    with pytest.raises(DaemonNotRunning, match=r"loop\.sock"):
        join(daemon, model)
    with pytest.raises(DaemonNotRunning):
        join(daemon, model, wait=0.01)
    assert not (daemon.folder / "ledger.db").exists()


def test_the_configuration_is_found_as_the_commands_find_it(daemon, model, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.delenv("P2PFED_CONFIG", raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no configuration of a p2pfed node"):
        p2pfed.join(model)
    for there, named in ((tmp_path, None), (tmp_path / "empty", str(daemon.config))):
        monkeypatch.chdir(there)
        if named:
            monkeypatch.setenv("P2PFED_CONFIG", named)
        daemon.serve(lambda call: None)
        p2pfed.join(model).close()
        daemon.done()


@pytest.mark.parametrize(
    ("welcome", "error", "text"),
    [
        (
            {"op": "busy", "what": "a loop of process 7 has joined", "why": "one", "do": "end it"},
            StateInUse,
            "process 7",
        ),
        ({"op": "refused", "what": "paused", "why": "", "do": ""}, PolicyError, "paused"),
        ({"event": "failed", "what": "no room", "why": "", "do": ""}, TrainerError, "no room"),
        (b"", TrainerError, "without a word"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", VersionMismatch, "another way"),
        (b"[1]\n", VersionMismatch, "another way"),
        ({"op": "welcome"}, VersionMismatch, "another way"),
    ],
    ids=["busy", "refused", "failed", "silent end", "not JSON", "no object", "no folder"],
)
def test_a_daemon_that_does_not_welcome_is_told_in_its_words(daemon, model, welcome, error, text):
    def script(call):
        assert call.hello is None

    daemon.serve(script, welcome)
    with pytest.raises(error, match=text):
        join(daemon, model)
    daemon.done()


def test_a_second_join_in_one_process_takes_the_place_of_the_first(daemon, model):
    for _ in range(2):
        daemon.serve(lambda call: call.hear())
    first = join(daemon, model)
    second = join(daemon, model)  # the ledger is free again
    first.close()
    second.close()
    daemon.done()


def test_a_ledger_in_use_is_told_to_both(daemon, model):
    heard = {}
    daemon.serve(lambda call: heard.update(call.hello))
    with Ledger.open(daemon.folder / "ledger.db"), pytest.raises(StateInUse):
        join(daemon, model)
    daemon.done()
    assert heard["event"] == "failed"
    assert heard["what"]


# --- a daemon that goes ----------------------------------------------------------------------


def test_a_daemon_that_goes_in_the_middle_of_a_round_is_told_and_nothing_is_spent(start, model):
    daemon = start(privacy=WITH_BUDGET)
    run = one_run(model, **protected())
    daemon.serve(lambda call: call.send(**asking(daemon, run, 0, FIVE)))
    with join(daemon, model, patients=PATIENTS) as fed:
        for _ in fed:
            daemon.done()
            with pytest.raises(TrainerError, match="the daemon has gone") as caught:
                fed.sync()
            break
        assert "nothing was spent" in caught.value.why
        with pytest.raises(TrainerError, match="the daemon has gone"):
            next(iter(fed))
    assert spent_by(daemon) == []


def test_a_loop_that_waits_joins_the_daemon_that_comes_back(daemon, model):
    run = one_run(model)
    daemon.serve(lambda call: call.send(**asking(daemon, run, 0, FIVE)))
    told = []
    with join(daemon, model, wait=30) as fed:
        for number in fed:
            if not told:
                daemon.done()  # it has gone
                daemon.serve(lambda call: (call.round(run, 0, FIVE), call.evaluate(3, FIVE)))
            assert number == 0
            shift(model, 0.5)
            told.append(fed.sync())
    daemon.done()
    assert told == ["lost", "released"]
    assert (daemon.released(daemon.answers[0], run) == 0.5).all()


def test_a_daemon_that_says_stop_ends_the_loop_with_words(daemon, model):
    daemon.serve(lambda call: call.send(op="stop"))
    with join(daemon, model) as fed, pytest.raises(TrainerError, match="has gone") as caught:
        next(iter(fed))
    daemon.done()
    assert "wait=600" in caught.value.do


def test_what_is_no_request_is_answered_and_survived(daemon, model):
    run = one_run(model)

    def script(call):
        for line in (b"garbage\n", b"[]\n", b'{"op": "dance"}\n', b"x" * (1 << 20) + b"xx\n"):
            call.connection.sendall(line)
            assert call.hear()["event"] == "failed"
        assert call.ask(op="round", round=0, view="../secret", run="")["event"] == "failed"
        good = asking(daemon, run, 0, FIVE)
        assert call.ask(**good | {"run": "{}"})["event"] == "failed"
        assert call.ask(**good | {"view": "missing"})["event"] == "failed"
        assert call.round(run, 0, FIVE[:3])["event"] == "failed"
        assert call.evaluate(1, FIVE * np.nan)["event"] == "failed"
        assert call.round(run, 0, FIVE)["event"] == "released"

    daemon.serve(script)
    with join(daemon, model) as fed:
        for _ in fed:
            fed.sync()
            break
        daemon.done()


# --- real processes --------------------------------------------------------------------------


NET = "from torch import nn\ndef build():\n    return nn.Linear(4, 1)\n"


def run_script(daemon, code, *, start_only=False):
    """A program of the user's, with the model as `build` of the module `net`."""
    (daemon.folder / "net.py").write_text(NET)
    (daemon.folder / "train.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "train.py"],
        cwd=daemon.folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "P2PFED_CONFIG": str(daemon.config)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if start_only:
        return process
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


LOOP = """\
import net, p2pfed, torch
model = net.build()
fed = p2pfed.join(model)
for number in fed:
    with torch.no_grad():
        model.bias += 0.5
    {in_between}
    fed.sync(loss=1.0)
print("the end of the program")
"""


@pytest.mark.slow
def test_a_loop_that_is_killed_loses_its_round_and_the_next_one_contributes(daemon, model):
    run = one_run(model)
    gone = []

    def until_it_dies(call):
        call.send(**asking(daemon, run, 0, FIVE))
        gone.append(call.hear())

    daemon.serve(until_it_dies)
    kill = "__import__('os').kill(__import__('os').getpid(), 9)"
    code, _ = run_script(daemon, LOOP.format(in_between=kill))
    assert code == -signal.SIGKILL
    daemon.done()
    assert gone == [None]
    assert (daemon.folder / "trainer.sock").exists()  # left behind, and replaced by the next

    daemon.serve(lambda call: (call.round(run, 0, FIVE), call.evaluate(3, FIVE)))
    code, output = run_script(daemon, LOOP.format(in_between="pass"))
    daemon.done()
    assert (code, output) == (0, "the end of the program\n")
    assert daemon.released(daemon.answers[0], run).tolist() == [0, 0, 0, 0, 0.5]


@pytest.mark.slow
def test_a_real_daemon_outlives_a_killed_loop_and_takes_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}{os.pathsep}{tmp_path}")
    (tmp_path / "net.py").write_text(NET)
    federation = loops_federation(tmp_path / "nodes", Anna=100)
    [anna] = federation.daemons.values()
    constants = run_constants("none", rounds=8, epsilon=Fraction(0)) | {"deadline_s": 5.0}
    federation.make_run("loops", constants, seed=0)
    federation.write_bootstrap()
    kill = "number == 2 and __import__('os').kill(__import__('os').getpid(), 9)"

    def program(in_between):
        return subprocess.Popen(
            [sys.executable, "-c", LOOP.format(in_between=in_between)],
            env={**os.environ, "P2PFED_CONFIG": str(anna.folder / "p2pfed.toml")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    with federation.running():
        federation.start(anna)
        first = program(kill)
        wait_for(lambda: has_trainer(anna), 60, "the loop joins")
        federation.enrol(anna, federation.stewards.admit([anna.member]))
        first.communicate(timeout=60)
        assert first.returncode == -signal.SIGKILL
        status = anna.status()
        assert (status["run"]["round"], status["run"]["own_deltas"]) == (2, 2)
        output, _ = program("pass").communicate(timeout=60)
        assert output == "the end of the program\n"
        status = anna.status()
    assert status["run"]["round"] == 8
    assert 2 < status["run"]["own_deltas"] < 8  # all but the lost round, or two on a busy machine


@pytest.mark.slow
def test_a_program_that_just_ends_leaves_neither_threads_nor_sockets(daemon, model):
    run = one_run(model)
    heard = []

    def script(call):
        call.round(run, 0, FIVE)
        heard.append(call.hear())

    daemon.serve(script)
    code, output = run_script(
        daemon, LOOP.format(in_between="pass").replace("\nprint", "\n    break\nprint")
    )
    daemon.done()
    assert (code, output) == (0, "the end of the program\n")
    assert heard == [None]
    assert not (daemon.folder / "trainer.sock").exists()


@pytest.mark.slow
def test_processes_that_the_program_forked_do_not_hold_the_connection(daemon, model):
    run = one_run(model)
    heard, readable = [], daemon.folder / "pipe"
    os.mkfifo(readable)

    def script(call):
        call.send(**asking(daemon, run, 0, FIVE))
        heard.append(call.hear())

    daemon.serve(script)
    fork = (
        "child = __import__('os').fork(); child or open('pipe').read(); __import__('os')._exit(0)"
    )
    process = run_script(daemon, LOOP.format(in_between=fork), start_only=True)
    daemon.done()  # the program has gone, and its child has not: it waits at the pipe
    assert heard == [None]
    readable.write_text("")  # would block for ever without a reader
    process.communicate(timeout=30)


@pytest.mark.slow
def test_describe_gives_the_stewards_what_a_loop_then_says_of_itself(daemon, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nPRIVATE_PARAMETERS = ('1.*',)\n"
        "def build():\n    return nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1))\n"
    )
    command = [sys.executable, "-m", "p2pfed.training", "describe", "loop:net:build:2"]
    command += ["--genesis", str(tmp_path / "first.safetensors"), "--seed", "3"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)}, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1))
    assert told["task"] == "loop:net:build:2"
    assert told["task_id"] == task_id(task_of(model, "2", ("1.*",))).hex()
    assert told["num_parameters"] == 5
    assert read_vector(tmp_path / "first.safetensors", 5).shape == (5,)
