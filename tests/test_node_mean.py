"""The view of a run with drift correction brings the last round's mean delta to the trainer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from consortium import Consortium, some_payload
from safetensors.numpy import save_file

from p2pfed.gossip.events import Fold
from p2pfed.identity.rules import Averaging, Outer
from p2pfed.identity.run import Run
from p2pfed.node.checkpoints import DiskCheckpoints
from p2pfed.node.directory import file_digest
from p2pfed.node.model import Model
from p2pfed.node.store import Store
from p2pfed.training.handover import read_view

NET = Consortium(3)
CORRECTED = Averaging(drift_correction=True)


class Lab:
    """One node's fold on real files, and the trainer's look at its view."""

    def __init__(self, folder, *, averaging=CORRECTED, outer="fedavg"):
        genesis = folder / "genesis"
        save_file({"model": np.zeros(40, np.float32)}, genesis)
        draft = NET.run_draft(averaging=averaging, outer=Outer(outer, 0.5))
        self.run = Run.decode(replace(draft, genesis=file_digest(genesis)).encode())
        self.store = Store(folder / "store.db")
        (folder / "checkpoints").mkdir()
        self.view = folder / "view.safetensors"
        self.facts = NET.facts(self.run)
        self.start = lambda: Model(
            self.run,
            genesis,
            DiskCheckpoints(folder / "checkpoints", self.run),
            self.store,
            self.view,
        )
        self.model = self.start()

    def hold(self, round_, *hospitals):
        for i in hospitals:
            delta = NET.delta(self.run, round_, i)
            self.store.keep_delta(delta, durable=False)
            self.facts.add(delta.signed)

    def seen(self, round_):
        """What the trainer reads after a fold up to this round."""
        chains = tuple(self.facts.chain(r) for r in range(round_ + 1))
        counted = tuple(self.facts.counted(r) for r in range(round_))
        self.model.fold(Fold(round_, chains, counted))
        return read_view(self.view, 40)

    def mean(self, round_, *hospitals):
        total, weights = np.zeros(40), 0
        for counted, i in zip(self.facts.counted(round_), hospitals, strict=True):
            payload = some_payload(self.run, round_, i)
            total[payload.indices] += payload.values * float(counted.weight)
            weights += counted.weight
        return total / weights / 2.0**self.run.grid_bits


@pytest.fixture
def lab_with(tmp_path):
    labs = []

    def make(**how):
        labs.append(Lab(tmp_path, **how))
        return labs[-1]

    yield make
    for lab in labs:
        lab.store.close()


@pytest.mark.parametrize("outer", ["fedavg", "fedadam"])
def test_the_view_brings_the_mean_of_the_last_round_before_the_outer_step(lab_with, outer):
    lab = lab_with(outer=outer)
    lab.hold(0, 0, 1, 2)
    lab.hold(1, 1)
    before, mean = lab.seen(1)
    assert mean.round == 0
    np.testing.assert_allclose(mean.values, lab.mean(0, *_order(lab, 0)), rtol=1e-6)
    if outer == "fedavg":
        np.testing.assert_allclose(before, 0.5 * mean.values, atol=2.0**-lab.run.grid_bits)
    _, mean = lab.seen(2)
    assert mean.round == 1
    np.testing.assert_allclose(mean.values, lab.mean(1, 1), rtol=1e-6)


def test_a_late_delta_is_in_the_mean_of_its_round(lab_with):
    lab = lab_with()
    lab.hold(0, 0)
    lab.seen(1)
    lab.hold(0, 1, 2)
    _, mean = lab.seen(1)
    assert mean.round == 0
    np.testing.assert_allclose(mean.values, lab.mean(0, *_order(lab, 0)), rtol=1e-6)


def test_a_round_without_deltas_has_no_mean_and_neither_has_a_start_from_a_checkpoint(lab_with):
    lab = lab_with()
    assert lab.seen(0)[1] is None
    lab.hold(0, 0)
    assert lab.seen(1)[1].round == 0
    assert lab.seen(1)[1].round == 0  # nothing new to fold: it is still the newest
    assert lab.seen(2)[1] is None
    lab.hold(2, 0)
    assert lab.seen(3)[1].round == 2
    lab.model = lab.start()
    assert lab.seen(3)[1] is None


def test_a_run_without_drift_correction_hands_over_the_model_alone(lab_with):
    lab = lab_with(averaging=Averaging())
    lab.hold(0, 0, 1)
    assert lab.seen(1)[1] is None


def _order(lab, round_):
    """Which hospitals' deltas count, in the order of `counted`."""
    names = {NET.delta(lab.run, round_, i).fact: i for i in range(3)}
    return [names[counted.fact] for counted in lab.facts.counted(round_)]
