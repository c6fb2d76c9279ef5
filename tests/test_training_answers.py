"""What one trainer answers round after round: early stop, lost rounds, time, and what it notes.

Real hospital, ledger and gate; the network process is the requests alone.
"""

from __future__ import annotations

import json

import broken_tasks
import pytest
from test_training_round import NONE, make_run, make_settings

from p2pfed.errors import ConfigError, PrivacyError
from p2pfed.privacy.ledger import Ledger
from p2pfed.training.answers import Answers
from p2pfed.training.control import Request
from p2pfed.training.early import Plateau
from p2pfed.training.local import initial_vector
from p2pfed.training.record import Record
from p2pfed.training.round import Hospital
from p2pfed.training.task import task_id
from p2pfed.training.watch import Watch


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Desk:
    """A hospital of six patients, what it answers and what its private socket shows."""

    def __init__(self, folder, ledger, task, *, patience=0, policy=(), **run):
        self.task, self.clock = task, Clock()
        self.watch = Watch(self.clock)
        settings = make_settings(folder, **{"epsilon": "100", "allow_none": True, **dict(policy)})
        hospital = Hospital(
            settings, task, task.data(None, {}), ledger, watch=self.watch, state=folder / "home"
        )
        self.record = Record("cpu", self.watch)
        plateau = Plateau(patience, larger_is_better=task.larger_is_better)
        self.exchange = folder / "exchange"
        self.exchange.mkdir()
        self.answers = Answers(hospital, self.exchange.resolve(), plateau, self.record, self.clock)
        facts = {"task": task.name, "task_id": task_id(task), "num_parameters": 4}
        self.run = make_run(**facts, **run)
        self.view = initial_vector(task, seed=0)

    def request(self, number):
        line = {"op": "round", "run": self.run.encode().decode(), "round": number, "view": "v"}
        line |= {"samples": 6, "scale": 1, "scale_of": 1}
        return Request(json.dumps(line).encode(), self.answers.exchange)

    def round(self, number):
        """As the trainer does it: asked, answered, judged."""
        asked = self.request(number)
        run = self.answers.turn_to(asked)
        answer = self.answers.why_not(asked, run)
        if answer is None:
            try:
                answer = self.answers.to_round(asked, run, self.view, None)
            except Exception as error:  # noqa: BLE001 - as the trainer does
                answer = self.answers.failure(error, asked)
        self.answers.evaluate(number, self.view)
        return answer

    @property
    def status(self):
        return self.record.views["/v1/status"]()


@pytest.fixture
def desk(tmp_path):
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        yield lambda task, **how: Desk(tmp_path, ledger, task, **how)


class NoBetter(broken_tasks.Sound):
    """Whatever was learned, it is as good as before."""

    def metrics(self, model, patients):
        return {"accuracy": 0.5}


def test_early_stop_skips_the_rounds_after_a_plateau_without_a_mechanism(desk):
    told = desk(NoBetter(), patience=2, **NONE)
    answers = [told.round(number) for number in range(5)]
    assert [answer["event"] for answer in answers] == ["released"] * 3 + ["skipped"] * 2
    assert "early stop" in answers[-1]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["svt", "gaussian"])
def test_formal_guarantee_no_hospital_stops_early_under_a_mechanism(desk, mechanism):
    """That it stops would tell, unpaid, of the patients who decided it."""
    told = desk(NoBetter(), patience=1, mechanism=mechanism)
    assert [told.round(number)["event"] for number in range(4)] == ["released"] * 4
    assert told.answers._plateau.reached


def test_where_no_unprotected_run_is_allowed_none_learns_whether_a_model_is_better(desk):
    told = desk(NoBetter(), patience=1, policy={"allow_none": False}, **NONE)
    assert [told.round(number)["event"] for number in range(3)] == ["refused"] * 3


def made_up(told, number, **how):
    told.run = make_run(
        name=f"made up {number}",
        task=told.run.task,
        task_id=told.run.task_id,
        num_parameters=4,
        **how,
    )


def test_scores_are_shared_for_the_rounds_of_a_run_and_for_few_runs(desk):
    told = desk(NoBetter(), policy={"share_metrics": "rounded"}, rounds=30, **NONE)
    for number in (0, 1, 31, 1000, 30):
        told.round(number)
    assert told.answers.shared["measure"]["round"] == 30
    shared = 0
    for number in range(20):
        made_up(told, number, **NONE)
        told.round(0)
        shared += "measure" in told.answers.shared
    assert shared == 7


def test_what_fails_again_and_again_is_shown_and_does_not_fill_the_disk(desk, caplog):
    told = desk(NoBetter(), **NONE)
    for number in range(300):
        told.answers.failure(ValueError(f"no {number}"))
    assert len(caplog.records) == 101
    assert "no 299" in str(told.status["problem"])
    told.clock.now += 3600
    told.answers.failure(ValueError("once more"))
    assert len(caplog.records) == 102


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "..", "", "a/b", "\x00", "\ud800", "x" * 300, "v\n"]
)
def test_a_view_that_is_no_name_of_a_file_of_the_exchange_folder_is_not_looked_up(name, tmp_path):
    line = {"op": "round", "round": 0, "view": name, "run": ""}
    with pytest.raises(ConfigError):
        Request(json.dumps(line).encode(), tmp_path)


def test_a_run_that_is_no_text_is_a_bad_request(tmp_path):
    line = {"op": "round", "round": 0, "view": "v", "run": "\ud800"}
    with pytest.raises(ConfigError, match="not a text"):
        Request(json.dumps(line).encode(), tmp_path).run()


def test_another_run_is_not_stopped_by_the_plateau_of_the_one_before(desk):
    told = desk(NoBetter(), patience=1, **NONE)
    assert [told.round(number)["event"] for number in range(3)] == ["released"] * 2 + ["skipped"]
    told.run = make_run(
        name="second", task=told.run.task, task_id=told.run.task_id, num_parameters=4, **NONE
    )
    assert told.round(0)["event"] == "released"


class Slow(broken_tasks.Sound):
    """Takes 5 s to train and 7 s to judge, by the hospital's clock; may fail."""

    clock, fails, last = None, False, None

    def loss(self, output, target):
        if self.fails:
            self.clock.now += 100
            raise ValueError("patient R-1001")
        return super().loss(output, target)

    def metrics(self, model, patients):
        self.last = None if self.progress is None else self.progress(1, 3)
        self.seen = self.watch.shown
        self.clock.now += 7
        return {"accuracy": 0.5}


@pytest.fixture
def slow(desk):
    told = desk(Slow(), **NONE)
    told.task.clock, told.task.watch = told.clock, told.watch
    return told


def test_the_time_of_an_evaluation_is_a_kind_of_its_own(slow):
    slow.round(0)
    slow.round(1)
    assert slow.status["rounds"][1]["seconds"]["evaluation"] == 7


def test_a_lost_round_keeps_its_time_to_itself(slow):
    slow.task.fails = True
    assert slow.round(0)["event"] == "failed"
    slow.task.fails = False
    assert slow.round(1)["event"] == "released"
    lost, made = slow.status["rounds"]
    assert (lost["round"], lost["run"], lost["event"]) == (0, "first", "failed")
    assert sum(lost["seconds"].values()) == pytest.approx(100)
    assert sum(made["seconds"].values()) == pytest.approx(7)  # the judging in between
    assert "R-1001" not in json.dumps(lost)


def test_a_task_says_how_far_an_evaluation_is(slow):
    slow.round(0)
    assert slow.task.seen == {"step": "evaluation", "done": 1, "of": 3, "seconds": 0}
    assert slow.status["progress"] == {}
    assert slow.task.progress is None


def test_what_failed_but_a_round_is_not_shown_as_one(desk):
    told = desk(broken_tasks.Sound(), **NONE)
    told.answers.failure(PrivacyError("no"))
    asked = Request(b'{"op": "evaluate", "round": 3, "view": "v"}', told.answers.exchange)
    told.answers.failure(PrivacyError("no"), asked)
    assert told.status["rounds"] == []


def test_a_lost_round_of_no_readable_run_has_no_name(desk):
    told = desk(broken_tasks.Sound(), **NONE)
    line = b'{"op": "round", "run": "{}", "round": 3, "view": "v"}'
    told.answers.failure(PrivacyError("no"), Request(line, told.answers.exchange))
    [lost] = told.status["rounds"]
    assert (lost["round"], lost["run"], lost["event"]) == (3, "", "failed")


@pytest.mark.parametrize("mechanism", ["svt", "gaussian"])
def test_formal_guarantee_zeros_for_nan_are_noted_for_the_hospital_and_told_to_nobody(
    desk, mechanism
):
    told = desk(broken_tasks.LossIsNan(), mechanism=mechanism)
    sound = {"event", "round", "run_id", "payload", "mechanism", "spent_nano_rho", "spent_epsilon"}
    answer = told.round(0)
    assert set(answer) == sound | {"releases", "ledger_head", "saturated", "releases_left"}
    assert answer["releases"] == 1
    [note] = told.status["notes"]
    assert note.startswith("6 of 6 contributions held NaN or infinity: zeros took their place")
    assert told.status["rounds"][0]["unusable_patients"] == 6
    told.round(0)  # given again: nothing is computed, nothing new is to be said
    assert told.watch.said == 1


def test_zeros_for_the_change_of_a_whole_hospital_are_noted_too(desk):
    told = desk(broken_tasks.LossIsNan(), mechanism="gaussian", unit="hospital")
    assert told.round(0)["event"] == "released"
    [note] = told.status["notes"]
    assert "the model held NaN or infinity: zeros took the place of its change" in note


def test_a_sound_round_notes_nothing(desk):
    told = desk(broken_tasks.Sound(), mechanism="gaussian")
    assert told.round(0)["event"] == "released"
    assert told.status["notes"] == []
