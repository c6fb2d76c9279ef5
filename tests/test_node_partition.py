"""Five real daemons that lose each other for a while, and one hospital that wants to be forgotten.

One federation for all tests of this file, in the order of the file. A partition is made as an
operator would: both sides block each other, so that connections are refused.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from reference_fold import reference_hash

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.identity.roster import Revocation
from p2pfed.identity.rules import Averaging
from p2pfed.privacy.ledger import Ledger

pytestmark = pytest.mark.slow

ROUNDS = 60
HOT = 4  # rounds


class Net:
    """Five hospitals in two cities."""

    def __init__(self, folder: Path) -> None:
        sizes = {"Ash": 120, "Beech": 90, "Cedar": 80, "Dogwood": 70, "Elm": 60}
        hospitals = [
            Hospital(name, size, {"site": site, "sites": len(sizes)})
            for site, (name, size) in enumerate(sizes.items())
        ]
        cast = Cast("breast-cancer", None, tuple(hospitals), "", "", "")
        self.federation = Federation(folder / "nodes", cast, epsilon="20")
        self.all: list[Daemon] = list(self.federation.daemons.values())
        self.west, self.east = self.all[:2], self.all[2:]
        constants = run_constants("svt", rounds=ROUNDS, epsilon=Fraction(20))
        constants |= {
            "deadline_s": 2.0,
            "min_round_interval_s": 0.5,
            "min_live": 0.2,  # both sides go on by themselves
            "robust": "clip-median",
            "averaging": Averaging(hot_rounds=HOT, late_interval_s=2.0),
        }
        self.run = self.federation.make_run("cut", constants, seed=0)
        self.federation.write_bootstrap()

    def start(self) -> None:
        roster = self.federation.stewards.admit([d.member for d in self.all])
        for daemon in self.all:
            self.federation.start(daemon)
            self.federation.enrol(daemon, roster)

    def run_of(self, daemon: Daemon) -> dict:
        status = daemon.status()
        assert status is not None, f"{daemon.name} does not answer"
        return status["run"] or {"round": -1, "model_hash": "", "phase": "", "deltas": 0}

    def rounds(self, daemons: list[Daemon]) -> list[int]:
        return [self.run_of(d)["round"] for d in daemons]

    def cut(self, on: bool) -> None:
        for one, others in ((self.west, self.east), (self.east, self.west)):
            for daemon in one:
                for other in others:
                    daemon.client.post("/v1/block", {"peer": other.name, "on": on})

    def part_for(self, rounds: int) -> None:
        """Cut the two cities off from each other while both go on for so many rounds."""
        self.cut(True)
        began = {d.name: self.run_of(d)["round"] for d in self.all}
        wait_for(
            lambda: all(self.run_of(d)["round"] >= began[d.name] + rounds for d in self.all),
            120,
            "both sides go on",
        )
        held = [{fact for fact, _, _ in stored(d)} for d in (self.west[0], self.east[0])]
        assert held[0] - held[1]
        assert held[1] - held[0]
        self.cut(False)

    def wait_until_merged(self) -> None:
        """All hold all that was released so far."""
        before = {fact for d in self.all for fact, _, _ in stored(d)}
        wait_for(
            lambda: all(before <= {fact for fact, _, _ in stored(d)} for d in self.all),
            60,
            "everyone gets the other side's deltas",
        )


def stored(daemon: Daemon) -> list[tuple[bytes, int, str]]:
    with contextlib.closing(sqlite3.connect(daemon.folder / "store.db")) as db:
        assert db.execute("SELECT COUNT(*) FROM proofs").fetchone() == (0,)
        return db.execute("SELECT fact, round, origin FROM deltas").fetchall()


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    made = Net(tmp_path_factory.mktemp("cut"))
    with made.federation.running():
        made.start()
        wait_for(lambda: min(made.rounds(made.all)) >= 3, 90, "the run begins")
        yield made


def test_a_partition_shorter_than_the_hot_rounds_merges(net):
    net.part_for(HOT - 2)
    net.wait_until_merged()


def test_a_partition_longer_than_the_hot_rounds_merges(net):
    net.part_for(2 * HOT + 2)
    net.wait_until_merged()


def test_one_who_asks_for_it_is_forgotten_by_a_network_that_goes_on(net):
    """Also its deltas that are older than three times the hot rounds."""
    wait_for(lambda: min(net.rounds(net.all)) >= 4 * HOT + 2, 120, "old deltas exist")
    gone = net.all[4]
    stewards = net.federation.stewards
    draft = stewards.roster.next(
        members=[m for m in stewards.roster.members if m.name != gone.name],
        revoked=[Revocation(gone.key.peer_id, "left the study", 0)],
    )
    stewards.roster, signed = stewards._signed(draft)
    net.all[0].client.post("/v1/roster", {"signed": signed.decode()})  # one node is told
    stay = net.all[:4]
    wait_for(
        lambda: all((d.status() or {})["roster"]["version"] == draft.version for d in stay),
        30,
        "the others hear of it",
    )
    assert all(
        gone.name not in {p["name"] for p in d.client.get("/v1/peers") if p["state"] == "alive"}
        for d in stay
    )


def test_at_the_end_all_hold_one_model_that_never_had_the_member(net, tmp_path):
    stay, gone = net.all[:4], net.all[4]

    def ended() -> bool:
        runs = [net.run_of(d) for d in stay]
        done = all(r["phase"] == "finished" and r["model_round"] == ROUNDS for r in runs)
        return done and len({r["model_hash"] for r in runs}) == 1

    wait_for(ended, 150, "the run ends on one hash")
    common = net.run_of(stay[0])["model_hash"]
    for daemon in net.all:
        net.federation.stop(daemon)
    for daemon in stay:
        assert reference_hash(daemon.folder) == common, daemon.name
    never = tmp_path / "never"
    shutil.copytree(stay[0].folder, never)
    with contextlib.closing(sqlite3.connect(never / "store.db")) as db:
        theirs = db.execute("DELETE FROM deltas WHERE origin = ?", (gone.key.peer_id,)).rowcount
        db.commit()
    assert theirs > 2 * HOT
    assert reference_hash(never) == common


def test_nobody_spent_budget_twice_for_a_round(net):
    facts = {row for daemon in net.all for row in stored(daemon)}
    per_round = Counter((round_, origin) for _, round_, origin in facts)
    assert set(per_round.values()) == {1}
    for daemon in net.all:
        released = [r for _, r, origin in facts if origin == daemon.key.peer_id]
        with Ledger.open(daemon.folder / "ledger.db") as ledger:
            kinds = Counter(entry.kind for entry in ledger.entries())
            rounds = [e.detail["round"] for e in ledger.entries() if e.kind == "debit"]
        assert len(rounds) == len(set(rounds)), daemon.name
        assert kinds["debit"] == kinds["output"] >= len(released) > 2 * HOT, daemon.name
