"""Real daemons: one whose whole state was put back to an older day spends nothing more."""

from __future__ import annotations

import shutil
from fractions import Fraction

import pytest

from p2pfed.demo.federation import Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.privacy.ledger import Ledger

pytestmark = pytest.mark.slow


def round_of(daemon) -> int:
    status = daemon.status()
    return status["run"]["round"] if status and status["run"] else -1


def reason(daemon) -> str:
    status = daemon.status()
    return status["contributing"]["reason"] if status else ""


def own_deltas(daemon) -> int:
    status = daemon.status()
    return status["run"]["own_deltas"] if status and status["run"] else -1


def test_a_node_whose_state_was_put_back_is_told_so_by_the_others_before_it_pays(tmp_path):
    hospitals = tuple(
        Hospital(name, size, {"site": site, "sites": 3})
        for site, (name, size) in enumerate({"North": 184, "South": 142, "Brook": 102}.items())
    )
    cast = Cast("breast-cancer", None, hospitals, "", "", "")
    federation = Federation(tmp_path / "nodes", cast, epsilon="10")
    constants = run_constants("svt", rounds=400, epsilon=Fraction(10))
    constants |= {"deadline_s": 2.0, "min_round_interval_s": 0.5}
    federation.make_run("long", constants, seed=0)
    federation.write_bootstrap()
    north, south, brook = federation.daemons.values()
    backup = tmp_path / "backup"
    with federation.running():
        roster = federation.stewards.admit([d.member for d in (north, south, brook)])
        for daemon in (north, south, brook):
            federation.start(daemon)
            federation.enrol(daemon, roster)
        wait_for(lambda: round_of(north) >= 2, 60, "the first rounds")
        federation.stop(north)
        shutil.copytree(north.folder, backup)  # store, ledger and all
        federation.start(north)
        wait_for(lambda: own_deltas(north) > 0, 60, "its store")
        released = own_deltas(north)
        wait_for(lambda: own_deltas(north) >= released + 3, 60, "releases after the backup")
        federation.kill(north)

        shutil.rmtree(north.folder)
        shutil.copytree(backup, north.folder)
        federation.start(north)
        wait_for(lambda: "older than what this node" in reason(north), 60, "the refusal")
        before = round_of(south)
        wait_for(lambda: round_of(south) >= before + 3, 60, "the others' rounds")
        wait_for(lambda: round_of(north) >= before + 2, 60, "North goes on receiving")
        assert "older than what this node" in reason(north)
    with Ledger.open(north.folder / "ledger.db") as now, Ledger.open(backup / "ledger.db") as then:
        assert [e.kind for e in now.entries()] == [e.kind for e in then.entries()]
        assert "debit" in [e.kind for e in now.entries()]
