"""Two processes on one round do what one does, and nothing of theirs outlives the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from broken_tasks import OneByOne
from test_training_process import Trainer, start
from torch import nn

from p2pfed.privacy.clipping import Ball, clipped_sum
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.training import crew as crew_module
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.crew import Crew, Team, same_as, teller
from p2pfed.training.hardware import CPU
from p2pfed.training.home import NOTHING
from p2pfed.training.local import initial_vector
from p2pfed.training.patients import WHOLE, Part
from p2pfed.training.task import task_id
from p2pfed.training.together import contributions_together, train_together
from p2pfed.training.watch import Watch

__all__ = ["start"]  # a fixture

pytestmark = pytest.mark.slow

CONFIG = """
[node]
name = "a"
data_dir = "."
[train]
task = "breast-cancer"
device = "cpu"
options = { site = 0 }
[privacy]
epsilon = 1
"""
TOLD = same_as(
    task_id(BreastCancer()), BreastCancer().data(None, {"site": 0}).train.patient_records()
)
VIEW = initial_vector(BreastCancer(), seed=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("crew") / "p2pfed.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def patients():
    return BreastCancer().data(None, {"site": 0}).train


@pytest.fixture(scope="module")
def crew(config):
    made = Crew(config, 2, threads=1, told=TOLD)
    yield made
    made.end()


def trained(crew, patients, seed=7, task=None):
    return train_together(
        crew, task or BreastCancer(), patients, VIEW,
        seed=seed, hardware=CPU, shift=None, home=NOTHING, watch=Watch(),
    ).vector  # fmt: skip


def contributions(crew, patients, group=1):
    grouped = patients.grouped(group) if group > 1 else patients
    return contributions_together(
        crew, BreastCancer(), grouped, VIEW,
        patients_per_row=group, seed=7, hardware=CPU, watch=Watch(),
    )  # fmt: skip


def test_parts_of_a_batch_are_the_whole_batch(patients):
    whole = patients.batches(16, seed=3)
    parts = [patients.batches(16, seed=3, part=Part(rank, 3)) for rank in range(3)]
    for _ in range(12):  # the last batch of an epoch is short
        x, _ = next(whole)
        shares = [next(part)[0] for part in parts]
        assert sum(len(share) for share in shares) == len(x)
        assert {tuple(row) for share in shares for row in share.tolist()} == {
            tuple(row) for row in x.tolist()
        }
    assert WHOLE.world == 1


def same_model(ours, theirs):
    """Up to the order in which floats are summed: SGD, 20 steps."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_two_processes_train_the_model_of_one(crew, patients):
    for seed in (7, 8):
        same_model(trained(crew, patients, seed), trained(None, patients, seed))
    assert np.abs(trained(None, patients, 7) - trained(None, patients, 8)).max() > 1e-4


def test_a_process_without_records_in_a_short_batch_takes_part(crew, patients):
    class Odd(BreastCancer):
        """Every second batch has one record: the first process has it, the other has none."""

        hyper = replace(BreastCancer.hyper, batch_size=len(patients.x) - 1)

    others = patients.batches(Odd.hyper.batch_size, seed=7, part=Part(1, 2))
    assert [len(next(others)[0]) for _ in range(2)] == [len(patients.x) // 2 - 1, 0]
    same_model(trained(crew, patients, task=Odd()), trained(None, patients, task=Odd()))


@pytest.mark.parametrize("group", [1, 5])
def test_formal_guarantee_two_processes_sum_the_contributions_of_one(crew, patients, group):
    """After rounding to the grid the sums are equal, however patients were dealt out."""
    shared, alone = contributions(crew, patients, group), contributions(None, patients, group)
    assert shared.num_patients == alone.num_patients
    how = {"bound": Ball(1 << 12), "bits": 12}
    for _ in range(2):  # the gate may read twice
        apart = clipped_sum(shared, **how) - clipped_sum(alone, **how)
        assert np.abs(apart).max() <= 2  # a float's last bit may fall on the other side


def test_formal_guarantee_in_chunks_alike_the_sums_are_equal_to_the_last_bit(crew, patients):
    """A process's rows are those that this one computes of the same patients."""
    how = {"bound": Ball(1 << 12), "bits": 12}
    parts = [
        PatientContributions(BreastCancer(), VIEW, patients, seed=7, part=Part(rank, 2))
        for rank in (0, 1)
    ]
    shared = contributions(crew, patients)
    rows, own = (np.concatenate(list(each.chunks())) for each in (shared, parts[0]))
    other = np.concatenate(list(parts[1].chunks()))
    assert {r.tobytes() for r in rows} == {r.tobytes() for r in np.concatenate([own, other])}
    assert len(rows) == len(own) + len(other) == patients.num_patients
    apart = sum(clipped_sum(_Rows(each), **how) for each in (own, other))
    assert np.array_equal(clipped_sum(shared, **how), apart)


class _Rows:
    """Rows that are there already."""

    def __init__(self, rows):
        self.rows, (self.num_patients, self.num_parameters) = rows, rows.shape

    def chunks(self):
        yield self.rows.copy()


def test_a_process_that_is_killed_fails_the_round_and_the_next_has_a_new_crew(crew, patients):
    trained(crew, patients)
    [other] = crew._others
    other.kill()
    other.wait()
    with pytest.raises(RuntimeError, match="has died or did not keep up"):
        trained(crew, patients)
    assert crew._others == []
    same_model(trained(crew, patients), trained(None, patients))


def test_a_process_that_hangs_fails_the_round_and_is_ended(crew, config, patients):
    crew.end()  # a process can have one at a time
    hasty = Crew(config, 2, threads=1, told=TOLD, silence=20.0)
    try:
        trained(hasty, patients)
        [other] = hasty._others
        other.send_signal(signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="has died or did not keep up"):
            trained(hasty, patients)
        assert hasty._others == []
        assert other.returncode == -signal.SIGKILL
        same_model(trained(hasty, patients), trained(None, patients))
    finally:
        hasty.end()


def test_only_the_trainer_loses_patience(monkeypatch, tmp_path):
    """Between two rounds may lie a night, and the next one wants the processes as they are."""
    seen = {}
    monkeypatch.setattr(
        crew_module, "meet", lambda _, part, silence_s: seen.update({part.rank: silence_s})
    )
    monkeypatch.setattr(crew_module, "_told", lambda: seen["done"])  # a KeyError ends it
    with pytest.raises(KeyError):
        crew_module.follow(tmp_path / "meeting", Part(1, 2), {})
    assert seen[1] >= 365 * 86400


def test_a_process_has_one_crew_at_a_time(crew, config, patients):
    trained(crew, patients)
    second = Crew(config, 2, threads=1, told=TOLD)
    with pytest.raises(RuntimeError, match="one crew"):
        trained(second, patients)
    same_model(trained(crew, patients), trained(None, patients))


def test_a_reader_that_stops_in_the_middle_leaves_no_answer_for_the_next(crew, patients):
    reading = contributions(crew, patients).chunks()
    next(reading)
    reading.close()
    same_model(trained(crew, patients), trained(None, patients))


def test_a_process_that_has_read_other_patients_fails_the_round(crew, config, patients):
    """It would count some of them twice, and others never."""
    crew.end()  # a process is in one crew at a time
    told = same_as(b"another task", patients.patient_records())
    other = Crew(config, 2, threads=1, told=told)
    with pytest.raises(RuntimeError):
        trained(other, patients)
    assert other._others == []


def test_who_is_who_depends_on_the_patients_and_their_order(patients):
    records = patients.patient_records()
    whole = same_as(b"t", records)
    assert whole == same_as(b"t", list(records))
    assert whole != same_as(b"t", [b"new", *records])
    assert whole != same_as(b"t", records[::-1])
    assert same_as(b"t", [b"ab", b"c"]) != same_as(b"t", [b"a", b"bc"])


def test_a_process_that_dies_at_its_start_is_noticed_at_once(crew, tmp_path, patients):
    crew.end()
    hopeless = Crew(tmp_path / "no.toml", 2, threads=1, patience=600)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="exit status"):
        trained(hopeless, patients)
    assert time.monotonic() - began < 60


def test_a_parameter_that_no_loss_reaches_has_no_gradient_in_a_team(monkeypatch):
    """Zeros are not the same: weight decay and kept moments would move it."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))  # two alike processes
    reached, unreached = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    reached.grad = torch.full((3,), 4.0)
    Team(Part(0, 2)).share_gradients([reached, unreached], 4)
    assert reached.grad.tolist() == [1.0, 1.0, 1.0]
    assert unreached.grad is None


def test_shared_gradients_keep_the_layout_of_the_parameter(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor)
    parameter = nn.Parameter(torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d))
    wanted = torch.randn(2, 3, 2, 2, 2)
    parameter.grad = wanted.clone()
    Team(Part(0, 2)).share_gradients([parameter], 1)
    assert parameter.grad.stride() == parameter.stride()
    assert torch.equal(parameter.grad, wanted)


def test_what_another_process_notes_is_told_by_the_trainer_once(crew, tmp_path, monkeypatch):
    crew.end()  # a process is in one crew at a time
    here = Path(__file__).resolve().parent
    monkeypatch.setenv("PYTHONPATH", f"{here.parent}{os.pathsep}{here}")
    config = tmp_path / "p2pfed.toml"
    config.write_text(CONFIG.replace("breast-cancer", "broken_tasks:OneByOne"))
    task, notes, own = OneByOne(), [], Watch()
    train = task.data(None, {}).train
    told = same_as(task_id(task), train.patient_records())
    noting = Crew(config, 2, threads=1, told=told, note=notes.append)
    try:
        for _ in range(2):
            rows = contributions_together(
                noting, task, train, initial_vector(task, seed=0),
                patients_per_row=1, seed=7, hardware=CPU, watch=own,
            )  # fmt: skip
            assert sum(map(len, rows.chunks())) == train.num_patients
        assert own.notes == ["this model cannot be vectorised over patients: one by one"]
        assert notes == [f"in another process of the trainer: {own.notes[0]}"] * 2
        train_together(
            noting, task, train, initial_vector(task, seed=0),
            seed=7, hardware=CPU, shift=None, home=NOTHING, watch=own,
        )  # fmt: skip
        assert len(notes) == 2  # what was told is not told again
    finally:
        noting.end()


def test_a_note_that_cannot_be_kept_costs_no_round(tmp_path):
    teller(tmp_path / "gone" / "meeting", 1)("memory ran out")
    teller(tmp_path / "meeting", 1)("of two\nlines")
    assert (tmp_path / "notes-1").read_text() == "of two lines\n"


TRAINER = """
import sys
from pathlib import Path
from test_training_crew import TOLD, BreastCancer, Crew, trained
crew = Crew(Path(sys.argv[1]), 2, threads=1, told=TOLD)
trained(crew, BreastCancer().data(None, {"site": 0}).train)
print(crew._others[0].pid, flush=True)
sys.stdin.read()
"""


def test_the_others_end_with_a_trainer_that_is_killed(config):
    here = Path(__file__).resolve().parent
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
            "TMPDIR": str(config.parent),  # a trainer that is killed tidies nothing
        },
    )
    try:
        other = int(trainer.stdout.readline())
        assert Path(f"/proc/{other}").exists()
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{other}").exists() and not _is_zombie(other):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        trainer.kill()
        trainer.stdin.close()
        trainer.stdout.close()
        trainer.wait()


class Hours(BreastCancer):
    """Its data take hours to read."""

    def data(self, folder, options):
        (folder / "reading").touch()
        time.sleep(3600)


def test_a_process_that_still_reads_its_data_ends_with_the_trainer_too(tmp_path):
    config = tmp_path / "p2pfed.toml"
    named = CONFIG.replace("breast-cancer", "test_training_crew:Hours")
    config.write_text(named.replace('device = "cpu"', 'device = "cpu"\ndata = "."'))
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "p2pfed.training", "worker", "--config", str(config)]
    command += ["--meeting", str(tmp_path / "meeting"), "--rank=1", "--world=2", "--threads=1"]
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"},
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "reading").exists():
            assert worker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        worker.stdin.close()  # as the end of the trainer would
        assert worker.wait(20) == 0
    finally:
        worker.kill()
        worker.wait()


def _is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def two_processes(start, monkeypatch, tmp_path):
    """A real trainer of two processes."""
    monkeypatch.setenv("P2PFED_TRAIN__GPUS", "2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a trainer that is killed tidies nothing
    trainer = start()
    assert trainer.read()["event"] == "ready"
    return trainer


def others_of(trainer: Trainer) -> list[Path]:
    """Its children in /proc."""
    made = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (place / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z" and int(parent) == trainer.process.pid:
            made.append(place)
    return made


def test_the_other_process_of_a_trainer_holds_nothing_of_the_trainers(two_processes):
    """No ledger, no socket of node or hospital, no core of patients; a log for what it prints."""
    assert two_processes.round(0)["event"] == "released"
    [other] = others_of(two_processes)
    unix = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    held = {str(fd.readlink()) for fd in (other / "fd").iterdir()}
    assert str(two_processes.folder / "t.log") in held
    assert not [name for name in held if "ledger" in name or name.endswith(".sock")]
    assert not [name for name in held if name.removeprefix("socket:[").rstrip("]") in unix]
    for line in (other / "net" / "tcp").read_text().splitlines()[1:]:
        place, inode = line.split()[1], line.split()[9]
        if f"socket:[{inode}]" in held:
            assert place.startswith("0100007F:")  # 127.0.0.1
    environment = (other / "environ").read_bytes().split(b"\0")
    assert {b"RANK=1", b"LOCAL_RANK=1", b"WORLD_SIZE=2"} <= set(environment)
    cores = next(li for li in (other / "limits").read_text().splitlines() if "core file" in li)
    assert cores.split()[4:6] == ["0", "0"]


def test_a_trainer_outlives_its_other_process_and_pays_nothing_for_the_lost_round(two_processes):
    first = two_processes.round(0)
    [other] = others_of(two_processes)
    os.kill(int(other.name), signal.SIGKILL)
    failed = two_processes.round(1)
    assert failed["event"] == "failed"
    assert "died" in two_processes.private("/v1/status")["problem"]
    again = two_processes.round(1)
    assert (first["releases"], again["event"], again["releases"]) == (1, "released", 2)
    [new] = others_of(two_processes)
    assert new != other
    two_processes.send(op="stop")
    assert two_processes.read() is None
    two_processes.end()
    assert not new.exists() or _is_zombie(new.name)
