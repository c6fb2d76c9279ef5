"""Real daemons of two adjacent versions of the wire in one run, some of which share their measure.

`Old` speaks version 1 only, as the release before did; `New` and `Shy` speak all that this release
does. `New` and `Old` let all members know their main metric, `Shy` does not.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from p2pfed.demo.federation import START_DEADLINE, Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants

pytestmark = pytest.mark.slow

ROUNDS = 4
RESTRICTED = """
import functools, sys
from p2pfed.node import daemon
daemon.open_network = functools.partial(daemon.open_network, versions=(1,))
from p2pfed.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
# A tree of the release before, where there is one: then `Old` is that release and not restricted.
BEFORE = os.environ.get("P2PFED_RELEASE_BEFORE", "")


class Mixed(Federation):
    """A federation whose member `Old` is of the release before."""

    def begin_old(self, daemon: Daemon) -> None:
        file = str(daemon.folder / "p2pfed.toml")
        how = ["-m", "p2pfed"] if BEFORE else ["-c", RESTRICTED]
        with (daemon.folder / "daemon.log").open("ab") as log:
            daemon.process = subprocess.Popen(
                [sys.executable, *how, "node", "-c", file],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=BEFORE or None,
            )
        wait_for(lambda: daemon.status() is not None, START_DEADLINE, f"{daemon.name} starts")


def share_measures(daemon: Daemon) -> None:
    file = daemon.folder / "p2pfed.toml"
    text = file.read_text("utf-8")
    assert "[privacy]\n" in text
    file.write_text(text.replace("[privacy]\n", '[privacy]\nshare_metrics = "rounded"\n'), "utf-8")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The three after the last round of their run."""
    hospitals = tuple(
        Hospital(name, 140 - 20 * site, {"site": site, "sites": 3})
        for site, name in enumerate(("New", "Shy", "Old"))
    )
    cast = Cast("breast-cancer", None, hospitals, "", "", "")
    federation = Mixed(tmp_path_factory.mktemp("mixed") / "nodes", cast, epsilon="10")
    new, shy, old = federation.daemons.values()
    share_measures(new)
    share_measures(old)
    constants = run_constants("svt", rounds=ROUNDS, epsilon=10)
    constants |= {"deadline_s": 5.0, "min_round_interval_s": 0.5}
    federation.make_run("mixed", constants, seed=0)
    federation.write_bootstrap()
    with federation.running():
        roster = federation.stewards.admit([d.member for d in federation.daemons.values()])
        for daemon in (new, shy):
            federation.start(daemon)
        federation.begin_old(old)
        for daemon in federation.daemons.values():
            federation.enrol(daemon, roster)
        for daemon in federation.daemons.values():
            wait_for(
                lambda d=daemon: (
                    (d.status() or {})["run"] is not None
                    and d.status()["run"]["phase"] == "finished"
                ),
                150,
                f"{daemon.name} finishes",
            )
        wait_for(lambda: "measure" in told_of(shy, "New"), 30, "the last beats arrive")
        yield federation


def told_of(daemon: Daemon, name: str) -> dict:
    """What a daemon knows of another one, without what it does not know."""
    (line,) = (peer for peer in daemon.client.get("/v1/peers") if peer["name"] == name)
    return {key: value for key, value in line.items() if value is not None}


def test_both_releases_end_with_one_model(mixed):
    runs = [daemon.status()["run"] for daemon in mixed.daemons.values()]
    assert {run["round"] for run in runs} == {ROUNDS}
    assert len({run["deltas"] for run in runs}) == 1
    assert all(run["own_deltas"] > 0 for run in runs)  # one that joins late misses the first
    assert len({run["model_hash"] for run in runs}) == 1


def test_each_pair_speaks_its_highest_common_version(mixed):
    new, shy, old = mixed.daemons.values()
    assert told_of(new, "Shy")["wire_version"] == told_of(shy, "New")["wire_version"] == 2
    assert told_of(new, "Old")["wire_version"] == told_of(shy, "Old")["wire_version"] == 1
    if not BEFORE:
        assert told_of(old, "New")["wire_version"] == told_of(old, "Shy")["wire_version"] == 1
    for daemon in mixed.daemons.values():
        assert not daemon.client.get("/v1/status")["health"]


def test_a_measure_reaches_who_speaks_version_2_and_is_shown_as_shared(mixed):
    new, shy, old = mixed.daemons.values()
    measure = told_of(shy, "New")["measure"]
    assert measure["name"] == "loss"
    assert 0 <= measure["round"] <= ROUNDS
    assert measure["value"] == round(measure["value"], 2)
    assert new.client.get("/v1/status")["measure"]["name"] == "loss"
    assert new.client.get("/v1/status")["privacy"]["share_metrics"] == "rounded"
    for daemon in (new, shy):
        assert "measure" not in told_of(daemon, "Old")
    assert "measure" not in told_of(old, "New")


def test_the_last_measure_told_is_that_of_the_last_model(mixed):
    new, shy, _ = mixed.daemons.values()
    wait_for(
        lambda: told_of(shy, "New")["measure"]["round"] == ROUNDS, 30, "the last model is evaluated"
    )
    (own,) = (
        line["values"]["loss"]
        for line in new.private.get("/v1/metrics")["metrics"]
        if line["round"] == ROUNDS
    )
    assert told_of(shy, "New")["measure"]["value"] == round(own, 2)


def test_a_hospital_that_shares_no_metric_tells_none_even_to_its_own_network_process(mixed):
    new, shy, _ = mixed.daemons.values()
    assert shy.private.get("/v1/metrics")["metrics"]
    assert shy.client.get("/v1/status")["measure"] is None
    assert shy.client.get("/v1/status")["privacy"]["share_metrics"] == "off"
    assert "measure" not in told_of(new, "Shy")
