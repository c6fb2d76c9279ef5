"""A node's own model in pairwise mode: on disk at every moment, and through real daemons."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, peer_of
from node_parts import NOON, FakeTrainer, a_node
from safetensors.numpy import load_file, save_file

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.errors import ConfigError, FactRejected
from p2pfed.gossip.events import Folded, Tick
from p2pfed.gossip.meeting_events import (
    CloseMeeting,
    Learn,
    Learnt,
    MakeStep,
    Meeting,
    Quote,
    Quoted,
    SendStep,
    StepMade,
    StepTaken,
    Survived,
    TakeStep,
    TakeStock,
)
from p2pfed.gossip.pairwise import FINE_BITS, move, quote, shares
from p2pfed.gossip.progress import Phase
from p2pfed.identity.rules import Averaging, Encoding
from p2pfed.network import FrameReceived
from p2pfed.node.checkpoints import DiskCheckpoints
from p2pfed.node.directory import file_digest
from p2pfed.node.pairing import PairModel
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.wire.meetings import Accept, Commit, Done, Propose
from p2pfed.wire.messages import Checkpoints, Witness, decode_message, encode_message
from p2pfed.wire.payload import Payload, encode_payload

SIZE = 40


class Desk:
    """One hospital's model in a folder; `other` is a second hospital's."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.genesis = folder / "first.safetensors"
        save_file({"model": np.linspace(-1, 1, SIZE, dtype=np.float32)}, self.genesis)
        rules = {"averaging": Averaging(mode="pairwise"), "encoding": Encoding(values="int8")}
        digest = file_digest(self.genesis)
        self.run = Consortium(3).run(**({"genesis": digest} | rules | changes))

    def open(self, name: str = "own", *, view: Path | None = None) -> PairModel:
        copies = self.folder / name
        copies.mkdir(exist_ok=True)
        checkpoints = DiskCheckpoints(copies, self.run)
        file = copies / "model.db"
        rng = random.Random(3)
        return PairModel(self.run, self.genesis, checkpoints, file, view, rng=rng)

    def change(self, seed: int = 0) -> bytes:
        values = np.random.default_rng(seed).integers(-120, 120, SIZE).astype(np.int16)
        payload = Payload.dense(values)
        width = self.run.encoding.values
        return encode_payload(payload, num_parameters=SIZE, width=width)


MEETING = Meeting(b"t" * 16, b"e" * 16, peer_of(1), 30, 70)


def meet(i: PairModel, j: PairModel, meeting: Meeting = MEETING) -> StepMade:
    quoted = j.perform(Quote(meeting))
    assert isinstance(quoted, Quoted)
    made = i.perform(MakeStep(meeting, quoted.vector))
    assert isinstance(made, StepMade)
    assert j.perform(TakeStep(meeting, made.step)) == StepTaken(meeting.ticket)
    return made


def total(i: PairModel, j: PairModel) -> list[int]:
    return list(30 * i.model.astype(object) + 70 * j.model.astype(object))


def test_a_fresh_model_is_the_genesis(tmp_path):
    desk = Desk(tmp_path)
    model = desk.open()
    assert model.held() == Survived()
    genesis = np.rint(np.linspace(-1, 1, SIZE, dtype=np.float32) * 4096)
    assert (model.model >> FINE_BITS).tolist() == genesis.tolist()


def test_a_meeting_conserves_the_weighted_sum_and_outlives_a_restart(tmp_path):
    desk = Desk(tmp_path)
    i, j = desk.open("i"), desk.open("j")
    assert i.perform(Learn(0, desk.change(1))) == Learnt(0)
    assert j.perform(Learn(0, desk.change(2))) == Learnt(0)
    before, apart = total(i, j), np.abs(i.model - j.model).max()
    made = meet(i, j)
    assert total(i, j) == before
    assert np.abs(i.model - j.model).max() < apart / 20
    after = i.model, j.model
    i.close()
    j.close()
    i, j = desk.open("i"), desk.open("j")
    assert [(a == b).all() for a, b in zip(after, (i.model, j.model), strict=True)] == [True] * 2
    assert i.held() == Survived(0, 0, False, (), (MEETING,))
    assert j.held() == Survived(0, 0, False)
    assert i.perform(SendStep(MEETING.ticket)) == made
    assert i.perform(CloseMeeting(MEETING.ticket)) is None
    assert i.held().made == ()
    assert i.perform(SendStep(MEETING.ticket)) is None


def test_a_step_counts_once_and_only_for_an_open_ticket(tmp_path):
    desk = Desk(tmp_path)
    i, j = desk.open("i"), desk.open("j")
    i.perform(Learn(0, desk.change(1)))
    made = meet(i, j)
    after = j.model
    assert j.perform(TakeStep(MEETING, made.step)) == StepTaken(MEETING.ticket)
    assert (j.model == after).all()


def test_the_change_of_a_round_counts_once(tmp_path):
    desk = Desk(tmp_path)
    model = desk.open()
    model.perform(Learn(0, desk.change()))
    once = model.model
    assert model.perform(Learn(0, desk.change())) == Learnt(0)
    assert (model.model == once).all()
    model.perform(Learn(1, desk.change()))
    assert (model.model != once).any()
    assert model.held().learnt == 1


def test_taking_stock_writes_the_view_and_a_copy_that_a_joiner_can_take_over(tmp_path):
    desk = Desk(tmp_path)
    view = tmp_path / "view.safetensors"
    model = desk.open(view=view)
    model.perform(Learn(0, desk.change()))
    folded = model.perform(TakeStock(1))
    assert isinstance(folded, Folded)
    on_grid = np.rint(model.model / 2.0**FINE_BITS)
    assert (load_file(view)["model"] == (on_grid / 4096).astype(np.float32)).all()
    (offer,) = model.checkpoints.offers()
    joiner = desk.open("joiner")
    place = joiner.checkpoints.place_for(offer)
    shutil.copy(model.checkpoints.find(offer.digest), place)
    joiner.adopt(1)
    assert (joiner.model == on_grid.astype(np.int64) << FINE_BITS).all()
    joiner.close()
    again = desk.open("joiner")
    assert again.held() == Survived(1, -1, False)
    assert (again.model == on_grid.astype(np.int64) << FINE_BITS).all()


def test_a_node_with_a_model_of_its_own_adopts_no_other(tmp_path):
    desk = Desk(tmp_path)
    model, other = desk.open(), desk.open("other")
    other.perform(Learn(0, desk.change(5)))
    other.perform(TakeStock(1))
    model.perform(Learn(0, desk.change(6)))
    before = model.model
    (offer,) = other.checkpoints.offers()
    place = model.checkpoints.place_for(offer)
    shutil.copy(other.checkpoints.find(offer.digest), place)
    model.adopt(1)
    assert (model.model == before).all()
    damaged = bytearray(place.read_bytes())
    damaged[-1] ^= 1
    place.write_bytes(damaged)
    with pytest.raises(FactRejected):
        model.adopt(1)


def test_old_copies_are_dropped(tmp_path):
    desk = Desk(tmp_path)
    model = desk.open()
    for round_ in range(6):
        model.perform(Learn(round_, desk.change(round_)))
        model.perform(TakeStock(round_))
    assert sorted(model.checkpoints.chains()) == [4, 5]


def test_the_journal_goes_into_the_base_and_nothing_is_lost(tmp_path):
    desk = Desk(tmp_path)
    i, j = desk.open("i"), desk.open("j")
    for n in range(30):
        i.perform(Learn(n, desk.change(n)))
        meeting = Meeting(bytes([n]) * 16, b"e" * 16, peer_of(1), 30, 70)
        meet(i, j, meeting)
        i.perform(TakeStock(n + 1))
        if n != 3:
            i.perform(CloseMeeting(meeting.ticket))
    before = i.model
    db = sqlite3.connect(tmp_path / "i" / "model.db")
    rows, base = db.execute("SELECT COUNT(*), (SELECT seq FROM base) FROM journal").fetchone()
    db.close()
    assert rows < 30
    assert base > 0
    i.close()
    i = desk.open("i")
    assert (i.model == before).all()
    assert i.held().learnt == 29
    kept = Meeting(bytes([3]) * 16, b"e" * 16, peer_of(1), 30, 70)
    assert i.held().made == (kept,)
    assert isinstance(i.perform(SendStep(kept.ticket)), StepMade)  # folded in, and still at hand


# --- what goes wrong ---------------------------------------------------------------------------


def test_at_every_moment_of_a_meeting_the_disk_holds_the_model_before_or_after(tmp_path):
    """The files are copied before each statement of SQLite's and opened as after a kill."""
    desk = Desk(tmp_path)
    i, j = desk.open("i"), desk.open("j")
    i.perform(Learn(0, desk.change(1)))
    j.perform(Learn(0, desk.change(2)))
    known = {"i": [i.model], "j": [j.model]}
    snapshots: list[tuple[str, Path]] = []

    def watch(name: str, model: PairModel) -> None:
        def copy(_statement: str) -> None:
            place = tmp_path / f"cut{len(snapshots)}"
            place.mkdir()
            for file in (tmp_path / name).glob("model.db*"):
                shutil.copy(file, place)
            snapshots.append((name, place))

        model._db.set_trace_callback(copy)

    watch("i", i)
    watch("j", j)
    meet(i, j)
    i.perform(CloseMeeting(MEETING.ticket))
    for model in (i, j):
        model._db.execute("SELECT 1")  # and once more behind the last one
        model._db.set_trace_callback(None)
    known["i"].append(i.model)
    known["j"].append(j.model)
    assert len(snapshots) > 12
    seen = {"i": set(), "j": set()}
    for name, place in snapshots:
        again = desk.open(place.name)
        moved = [(again.model == model).all() for model in known[name]].index(True)
        held = again.held()
        seen[name].add((moved, len(held.given), len(held.made)))
        again.close()
    # Before; ticket given; moved with the ticket gone. Before; moved with the step kept; closed.
    assert seen["j"] == {(0, 0, 0), (0, 1, 0), (1, 0, 0)}
    assert seen["i"] == {(0, 0, 0), (1, 0, 1), (1, 0, 0)}


def test_an_older_generation_of_the_model_changes_nothing_any_more(tmp_path):
    desk = Desk(tmp_path)
    old = desk.open()
    new = desk.open()
    assert old.perform(Learn(0, desk.change())) is None
    assert old.perform(Quote(MEETING)) is None
    assert old.perform(TakeStock(3)) is None
    assert new.held() == Survived()
    assert new.perform(Learn(0, desk.change())) == Learnt(0)
    old.close()
    assert old.perform(Learn(1, desk.change())) is None


def test_a_damaged_file_is_told_and_not_believed(tmp_path):
    desk = Desk(tmp_path)
    model = desk.open()
    model.perform(Learn(0, desk.change()))
    model._db.execute("UPDATE base SET vector = x'00'")
    model.close()
    with pytest.raises(ConfigError, match="model's file"):
        desk.open()
    shutil.rmtree(tmp_path / "own")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="model's file"):
        desk.open()


def test_a_damaged_change_in_the_journal_is_told(tmp_path):
    desk = Desk(tmp_path)
    model = desk.open()
    model.perform(Learn(0, desk.change()))
    model._db.execute("UPDATE journal SET data = x'00'")
    model.close()
    with pytest.raises(ConfigError, match="model's file"):
        desk.open()


# --- in a node ---------------------------------------------------------------------------------


RULES = {"averaging": Averaging(mode="pairwise"), "encoding": Encoding(values="int8")}


def releases(node: Any, data: bytes) -> Any:
    """An answer of the trainer's: this payload for whatever round is asked for."""

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        path = node.shell.trainer.exchange / f"{request['round']}.payload"
        path.write_bytes(data)
        return {
            "event": "released",
            "round": request["round"],
            "run_id": node.shell.run.run_id.hex(),
            "mechanism": "none",
            "payload": path.name,
            "ledger_head": "00" * 32,
            "spent_nano_rho": 0,
            "releases": 1,
        }

    return answer


async def test_a_node_trains_on_its_own_model_and_meets_a_peer(tmp_path):
    """Hospital 0 is the node; hospital 1 is played by the test."""
    desk = Desk(tmp_path)
    config, pair = "allow_none = true", Consortium(2)
    async with a_node(tmp_path / "node", trains=True, config=config, consortium=pair) as node:
        exchange = tmp_path / "exchange"
        exchange.mkdir()
        node.shell.trainer = FakeTrainer(exchange, releases(node, desk.change(4)))
        told: list[Any] = []
        node.network.on_send = lambda _peer, frame: told.append(decode_message(frame))
        await node.with_run(min_live=0.1, genesis=desk.run.genesis, **RULES)
        run, model = node.shell.run, node.shell.model
        assert isinstance(model, PairModel)
        genesis = model.model

        def tick() -> bool:
            node.shell.feed(Tick(NOON))
            return bool([m for m in told if isinstance(m, Propose)])

        def heard(message: Any) -> None:
            node.network.tell.send_nowait(FrameReceived(peer_of(1), encode_message(message)))

        node.beat_of(1)
        heard(Witness(()))
        heard(Checkpoints(run.run_id, ()))
        await node.until(lambda: node.core.progress is not None and peer_is_here(node))
        await node.until(lambda: not node.core.why_not_contributing())
        node.core.progress.phase = Phase.WAITING  # it has waited long enough for a copy
        await node.until(tick)
        learnt = model.model
        assert (learnt != genesis).any()
        (proposal,) = [m for m in told if isinstance(m, Propose)]
        rng = np.random.default_rng(1)
        other = learnt + (rng.integers(-50, 50, SIZE) << FINE_BITS)
        ticket = b"t" * 16
        heard(
            Accept(run.run_id, proposal.exchange, ticket, quote(other, genesis, "int8", rng.bytes))
        )
        await node.until(lambda: bool([m for m in told if isinstance(m, Commit)]))
        (commit,) = [m for m in told if isinstance(m, Commit)]
        n_0, n_1 = 50, 60
        before = n_0 * learnt + n_1 * other
        move(other, commit.step, shares(n_0, n_1)[1], "int8")
        assert (n_0 * model.model + n_1 * other == before).all()
        assert len(model.held().made) == 1
        heard(Done(run.run_id, ticket))
        await node.until(lambda: not model.held().made)
        assert node.operator.status()["run"]["meetings"]["begun"] == 1
        assert "change.learnt" in node.kinds()


def peer_is_here(node: Any) -> bool:
    peer = node.core.membership.get(peer_of(1))
    return peer is not None and peer.is_present


async def test_a_run_accepted_again_goes_on_with_the_same_model(tmp_path):
    async with a_node(tmp_path, trains=True, config="allow_none = true") as node:
        node.shell.trainer = FakeTrainer(tmp_path)
        await node.with_run(min_live=0.1, **RULES)
        first = node.shell.model
        first.perform(Learn(0, Desk(tmp_path).change()))
        moved = first.model
        await node.operator.accept_run(node.signed_run(min_live=0.1, **RULES), node.genesis)
        await node.until(lambda: node.shell.model is not first)
        assert (node.shell.model.model == moved).all()
        assert first.perform(Learn(1, Desk(tmp_path).change())) is None


# --- real daemons ------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_daemons_train_in_pairs_through_a_kill_and_a_late_joiner(tmp_path):
    sites = 4
    names = ("North", "South", "East", "Brook")
    sizes = [
        BreastCancer().data(None, {"site": i, "sites": sites}).train.num_patients
        for i in range(sites)
    ]
    hospitals = tuple(
        Hospital(name, size, {"site": i, "sites": sites})
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    )
    federation = Federation(
        tmp_path / "nodes", Cast("breast-cancer", None, hospitals, "", "", ""), epsilon="0"
    )
    rounds = 12
    constants = run_constants("none", rounds=rounds, epsilon=Fraction(0)) | RULES
    run = federation.make_run("pairs", constants | {"min_round_interval_s": 0.5}, seed=0)
    federation.write_bootstrap()
    daemons = list(federation.daemons.values())
    *first, late = daemons
    south = federation.daemons["South"]

    def line(daemon: Daemon) -> dict[str, Any]:
        status = daemon.status()
        return (status or {}).get("run") or {"round": -1, "phase": ""}

    def events(daemon: Daemon, kind: str) -> list[dict[str, Any]]:
        found = daemon.client.stream("/v1/events?since=0&limit=20000")
        return [e["data"] for e in found if e["type"] == kind]

    with federation.running():
        roster = federation.stewards.admit([d.member for d in daemons])
        for daemon in first:
            federation.start(daemon)
            federation.enrol(daemon, roster)
        wait_for(lambda: all(line(d)["round"] >= 3 for d in first), 90, "three rounds")
        federation.kill(south)
        federation.start(late)
        federation.enrol(late, roster)
        federation.start(south)
        wait_for(lambda: all(line(d)["phase"] == "finished" for d in daemons), 120, "the end")
        wait_for(lambda: not any(open_meetings(d.folder, run) for d in daemons), 40, "all closed")
        assert events(late, "join.checkpoint")
        assert all(line(d)["meetings"]["begun"] > 8 for d in daemons)
        assert all(line(d)["consensus_distance"] >= 0 for d in daemons)
        assert not any(events(d, "meeting.half") + events(d, "peer.blamed") for d in daemons)
        time.sleep(3)  # the last stock is taken
        models = np.array([federation.final_model(d, run) for d in daemons])
    genesis = load_file(tmp_path / "nodes" / "genesis.safetensors")["model"]
    moved = np.linalg.norm(models.mean(axis=0) - genesis)
    apart = max(np.linalg.norm(m - models.mean(axis=0)) for m in models)
    assert moved > 0.1
    assert apart < 0.02 * moved
    for daemon in daemons:
        assert "Traceback" not in (daemon.folder / "daemon.log").read_text()


def open_meetings(folder: Path, run: Any) -> int:
    db = sqlite3.connect(folder / "checkpoints" / run.run_id.hex() / "model.db", timeout=10)
    with closing(db):
        count = "SELECT (SELECT COUNT(*) FROM given) + (SELECT COUNT(*) FROM made)"
        return int(db.execute(count).fetchone()[0])
