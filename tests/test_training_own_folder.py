"""Where a task may keep files of patients: the trainer's own folder, whoever reads the data."""

from __future__ import annotations

import stat
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from p2pfed.config import load_settings
from p2pfed.training import process
from p2pfed.training.place import Place
from p2pfed.training.verbs import worker

CONFIG = """
[node]
name = "a"
data_dir = "."
[train]
task = "hippocampus"
device = "cpu"
options = { phantoms = 4, cache = "disk" }
[privacy]
epsilon = 1
ledger = "ledger.db"
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    for name in ("HOME", "XDG_CACHE_HOME", "CACHE_DIRECTORY", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WORLD_SIZE", "1")  # the trainer sets it
    path = tmp_path / "p2pfed.toml"
    path.write_text(CONFIG)
    yield path
    torch.set_num_threads(threads)


def by_the_trainer(config, monkeypatch):
    exchange = config.parent / "exchange"
    exchange.mkdir()
    with process._opened(load_settings(config), exchange):
        pass


def by_another_process_of_the_trainer(config, monkeypatch):
    monkeypatch.setattr(worker, "end_with_the_trainer", lambda: None)
    monkeypatch.setattr(
        worker, "signal", SimpleNamespace(signal=lambda *_: None, SIGINT=0, SIG_IGN=0)
    )
    monkeypatch.setattr(worker.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(worker, "follow", lambda *_, **__: None)
    meeting = config.parent / "meeting"
    worker.run(Namespace(config=config, meeting=meeting, rank=1, world=2, threads=1))


def by_a_command(config, monkeypatch):
    assert Place.opened(Namespace(config=config, task=None)).data.train.num_patients == 3


@pytest.mark.slow
@pytest.mark.parametrize("read", [by_the_trainer, by_another_process_of_the_trainer, by_a_command])
def test_images_that_were_read_lie_in_the_trainers_own_folder_alone(config, monkeypatch, read):
    read(config, monkeypatch)
    folder = config.parent / "trainer"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list((folder / "volumes").glob("*.safetensors"))) == 4
    assert len(list(config.parent.rglob("*.safetensors"))) == 4
