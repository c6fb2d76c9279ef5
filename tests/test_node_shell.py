"""The shell around the core: effects in order, outcomes of training, peers that cannot hurt it."""

from __future__ import annotations

import datetime as dt
import logging
import os
import sqlite3
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import trio
import trio.testing
from consortium import Consortium, key_of, peer_of, sparse
from node_parts import FakeTrainer, a_node, plan

from p2pfed.errors import TrainerError
from p2pfed.gossip.events import (
    Disconnect,
    Keep,
    Note,
    Released,
    Send,
    SendStored,
    StopDialling,
    StoreDelta,
    StoreRoster,
    Tick,
    Train,
    TrainingEnded,
)
from p2pfed.network import FrameReceived
from p2pfed.node.shell import Shell
from p2pfed.wire.codec import MAX_FRAME
from p2pfed.wire.delta import Delta
from p2pfed.wire.messages import Facts, decode_message, encode_message
from p2pfed.wire.payload import encode_payload

PAYLOAD = encode_payload(sparse({1: 5, 7: -3}), num_parameters=40)


def answered(request: dict, folder: Path, **changes) -> dict:
    """What the real trainer would answer to a round."""
    (folder / "it.payload").write_bytes(changes.pop("data", PAYLOAD))
    answer = {
        "event": "released",
        "round": request["round"],
        "run_id": changes.pop("run_id", ""),
        "payload": "it.payload",
        "mechanism": "none",
        "spent_nano_rho": 5,
        "spent_epsilon": 0.5,
        "releases": 1,
        "ledger_head": "cd" * 32,
        "saturated": 0,
        "releases_left": 3,
    }
    return answer | changes


class Script:
    """In the place of the core's `handle`: fixed effects, and what came in."""

    def __init__(self, monkeypatch, node, *effects) -> None:
        self.came: list = []
        self.effects = list(effects)
        monkeypatch.setattr(node.core, "handle", self)

    def __call__(self, event, now):
        self.came.append(event)
        effects, self.effects = self.effects, []
        return effects


# --- order -------------------------------------------------------------------------------------


async def test_an_own_delta_is_on_the_disk_before_anyone_hears_of_it(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        delta = node.consortium.delta(node.consortium.run(), 0, 0)
        seen: list[list] = []

        def on_send(peer: str, frame: bytes) -> None:
            other = sqlite3.connect(node.directory.store)
            seen.append(other.execute("SELECT fact FROM deltas").fetchall())
            seen.append(node.store._db.execute("PRAGMA synchronous").fetchone())
            other.close()

        node.network.on_send = on_send
        Script(monkeypatch, node, StoreDelta(delta, own=True), Send(peer_of(1), b"have"))
        node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
        assert seen == [[(delta.fact,)], (2,)]  # 2 = FULL


async def test_effects_are_performed_in_the_order_given(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        Script(
            monkeypatch,
            node,
            Send("a", b"1"),
            Keep("b", ("/ip4/127.0.0.1/tcp/1",)),
            StopDialling("b"),
            Keep("b", (), has_left=True),
            Send("a", b"2"),
            Note("kind", {"x": 1}),
        )
        node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
        assert node.network.asked == [
            ("send", "a", b"1"),
            ("keep", "b", ("/ip4/127.0.0.1/tcp/1",)),
            ("stop", "b"),
            ("keep seldom", "b", ()),
            ("send", "a", b"2"),
        ]
        assert node.store.addresses() == {"b": ["/ip4/127.0.0.1/tcp/1"]}
        assert node.kinds() == ["kind"]


async def test_a_believed_roster_is_a_file_before_its_members_are_looked_at(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        Script(
            monkeypatch, node, StoreRoster(2, b"\x01" * 32, b"signed"), Disconnect("a", "", False)
        )
        node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
        assert node.directory.rosters() == [b"signed"]
        await node.until(lambda: len(node.network.asked) == 2)
        assert set(node.network.asked) == {("recheck",), ("disconnect", "a")}


async def test_a_node_that_has_left_dials_nobody(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        node.shell.present = False
        Script(monkeypatch, node, Keep("b", ("/ip4/127.0.0.1/tcp/1",)))
        node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
        assert node.network.asked == []


async def test_stored_facts_are_sent_whole_in_frames_that_every_peer_accepts(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        run = node.consortium.run(num_parameters=300_000)
        deltas = [
            node.consortium.delta(run, r, 1, sparse(dict.fromkeys(range(200_000), r + 1)))
            for r in range(5)
        ]
        for delta in deltas:
            node.store.keep_delta(delta, durable=False)
        wanted = SendStored("a", tuple(d.fact for d in deltas), tuple(node.consortium.signed))
        Script(monkeypatch, node, wanted)
        node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
        frames = [frame for _, frame in node.network.of("send")]
        messages = [decode_message(frame) for frame in frames]
        assert all(isinstance(m, Facts) for m in messages)
        assert all(len(frame) <= MAX_FRAME for frame in frames)
        sent = [Delta.decode(d).fact for m in messages for d in m.deltas]
        assert sent == [d.fact for d in deltas]
        assert [r for m in messages for r in m.rosters] == node.consortium.signed


# --- bugs and rude peers -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["core", "effect"])
async def test_a_bug_in_handling_a_frame_costs_the_peer_its_connection_and_not_the_node(
    tmp_path, monkeypatch, caplog, where
):
    async with a_node(tmp_path) as node:
        await node.with_run()
        handle = node.core.handle

        def buggy(event, now):
            if getattr(event, "frame", b"") == b"bad":
                if where == "core":
                    raise RuntimeError("a bug")
                return [SendStored("a", (b"\x01" * 32,))]  # a delta that is not in the store
            return handle(event, now)

        monkeypatch.setattr(node.core, "handle", buggy)
        node.network.tell.send_nowait(FrameReceived(peer_of(1), b"bad"))
        node.beat_of(2)
        await node.until(lambda: node.operator.peer(peer_of(2))["state"] == "alive")
        assert ("disconnect", peer_of(1)) in node.network.asked
        assert ("disconnect", peer_of(2)) not in node.network.asked
        errors = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert len(errors) == 1
        assert errors[0].exc_info  # with its traceback


@pytest.mark.parametrize("frame", [b"", b"\xc0", b"\xff" * 1000, b"\x93\x01\x02\x03", b"\x80"])
async def test_garbage_of_a_member_is_its_own_fault_and_changes_nothing(tmp_path, frame):
    async with a_node(tmp_path) as node:
        await node.with_run()
        before = node.public_state()
        node.network.tell.send_nowait(FrameReceived(peer_of(1), frame))
        await node.until(lambda: node.network.of("disconnect"))
        assert node.network.of("disconnect") == [(peer_of(1),)]
        assert node.kinds()[-1] == "peer.blamed"
        assert node.public_state() == before


async def test_an_update_that_is_over_the_bounds_or_of_the_wrong_shape_is_never_stored(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run(top_fraction=Fraction(1, 4))
        run = node.shell.run
        wrong = [
            # outside of the model
            node.consortium.delta(replace(run, num_parameters=41), 0, 1, sparse({40: 1})),
            node.consortium.delta(run, 0, 1, sparse(dict.fromkeys(range(11), 1))),  # 10 are allowed
            node.consortium.delta(run, 0, 1, sparse({1: 1}), num_released=2),
            node.consortium.delta(run, 0, 1, sparse({1: 1}), mechanism="svt"),
            node.consortium.delta(run, run.rounds, 1, sparse({1: 1})),
        ]
        for n, delta in enumerate(wrong, start=1):
            frame = encode_message(Facts((delta.encode(),), (), ()))
            sender = peer_of(1 + n % 2)  # who sends too much of it is refused for a while
            node.network.tell.send_nowait(FrameReceived(sender, frame))
            await node.until(lambda n=n: len(node.network.of("disconnect")) == n)
        assert node.store.headers(run.run_id) == []
        foreign = node.consortium.delta(node.consortium.run(name="b"), 0, 1, sparse({1: 1}))
        frame = encode_message(Facts((foreign.encode(),), (), ()))
        node.network.tell.send_nowait(FrameReceived(peer_of(1), frame))  # no fault, only not ours
        good = node.consortium.delta(run, 0, 1, sparse(dict.fromkeys(range(10), 1)))
        frame = encode_message(Facts((good.encode(),), (), ()))
        node.network.tell.send_nowait(FrameReceived(peer_of(1), frame))
        await node.until(lambda: node.store.headers(run.run_id))
        assert node.store._db.execute("SELECT fact FROM deltas").fetchall() == [(good.fact,)]
        assert len(node.network.of("disconnect")) == len(wrong)


# --- training ----------------------------------------------------------------------------------


async def outcome_of(node, monkeypatch, answer):
    """The event that the core gets for one Train with this answer."""
    node.shell.trainer = FakeTrainer(node.folder, answer)
    script = Script(monkeypatch, node, Train(3, 116))
    node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
    await node.until(lambda: len(script.came) == 2)
    return script.came[1]


async def test_a_release_is_handed_to_the_core_with_what_it_cost(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        await node.with_run()
        run_id = node.shell.run.run_id.hex()
        event = await outcome_of(node, monkeypatch, lambda r: answered(r, tmp_path, run_id=run_id))
        assert event == Released(
            round=3,
            payload=PAYLOAD,
            num_released=2,
            mechanism="none",
            spent_nano_rho=5,
            releases=1,
            ledger_head=b"\xcd" * 32,
        )
        assert not (tmp_path / "it.payload").exists()
        (request,) = node.shell.trainer.requests
        assert (request["op"], request["round"], request["samples"]) == ("round", 3, 116)
        assert node.operator.privacy()["spent_epsilon"] == 0.5
        assert node.store.recall("spent")["releases"] == 1


BAD_RELEASES = {
    "of another round": {"round": 2},
    "of another run": {"run_id": "00" * 32},
    "of another mechanism": {"mechanism": "svt"},
    "with half a head": {"ledger_head": "cd" * 31},
    "with a head of letters": {"ledger_head": "no"},
    "with a head that is a number": {"ledger_head": 7},
    "with a negative budget": {"spent_nano_rho": -1},
    "with a budget of words": {"spent_nano_rho": "5"},
    "with an endless number": {"releases": 1 << 64},
    "with a payload that is not there": {"payload": "other.payload"},
    "with no payload": {"payload": None},
    "with a broken payload": {"data": b"\x01\x00\x00\x00"},
    "with an empty payload": {"data": b""},
    "outside of the model": {"data": encode_payload(sparse({40: 1}), num_parameters=41)},
    "without an event": {"event": None},
}


@pytest.mark.parametrize("changes", BAD_RELEASES.values(), ids=BAD_RELEASES)
async def test_a_release_that_was_not_asked_for_is_never_signed(tmp_path, monkeypatch, changes):
    async with a_node(tmp_path) as node:
        await node.with_run()
        right = {"run_id": node.shell.run.run_id.hex()}
        event = await outcome_of(
            node, monkeypatch, lambda r: answered(r, tmp_path, **right | changes)
        )
        assert isinstance(event, TrainingEnded)
        assert event.round == 3
        assert event.outcome in {"failed", "None"}
        assert event.reason


async def test_a_payload_is_only_ever_read_in_the_exchange_folder(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_bytes(PAYLOAD)
    async with a_node(tmp_path / "node") as node:
        await node.with_run()
        run_id = node.shell.run.run_id.hex()
        event = await outcome_of(
            node,
            monkeypatch,
            lambda r: answered(r, tmp_path / "node", run_id=run_id, payload="../secret"),
        )
        assert isinstance(event, TrainingEnded)
        assert secret.exists()


@pytest.mark.parametrize("what", ["link", "pipe", "endless"])
async def test_a_payload_is_a_file_of_bounded_size_and_never_a_link_or_a_pipe(
    tmp_path, monkeypatch, what
):
    secret, place = tmp_path / "secret", tmp_path / "node" / "a.payload"
    secret.write_bytes(PAYLOAD)
    async with a_node(tmp_path / "node") as node:
        await node.with_run()
        run_id = node.shell.run.run_id.hex()

        def answer(request):
            told = answered(request, tmp_path / "node", run_id=run_id, payload=place.name)
            place.unlink(missing_ok=True)
            if what == "link":
                place.symlink_to(secret)
            elif what == "pipe":
                os.mkfifo(place)
                held.append(os.open(place, os.O_RDWR))  # or a reader would wait for ever
                os.write(held[0], PAYLOAD)
                os.set_blocking(held[0], False)
            else:
                place.touch()
                os.truncate(place, 1 << 40)  # a hole
            return told

        held: list[int] = []
        event = await outcome_of(node, monkeypatch, answer)
        assert isinstance(event, TrainingEnded)
        assert secret.read_bytes() == PAYLOAD
        assert not held or os.read(held[0], 1 << 16) == PAYLOAD  # nobody has read it
        for descriptor in held:
            os.close(descriptor)


@pytest.mark.parametrize(
    ("answer", "outcome", "reason"),
    [
        (TrainerError("the trainer died while it was working"), "failed", "died"),
        ({"event": "failed", "what": "out of memory"}, "failed", "out of memory"),
        ({"event": "skipped", "reason": "NaN"}, "skipped", "NaN"),
        ({"event": "refused", "reason": "unit"}, "refused", "unit"),
        ({}, "failed", "event"),
    ],
)
async def test_training_that_fails_is_told_to_the_core_with_its_reason(
    tmp_path, monkeypatch, answer, outcome, reason
):
    async with a_node(tmp_path) as node:
        await node.with_run()
        event = await outcome_of(node, monkeypatch, answer)
        assert (event.round, event.outcome) == (3, outcome)
        assert reason in event.reason


async def test_without_a_trainer_training_has_failed_at_once(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        await node.with_run()
        script = Script(monkeypatch, node, Train(0, 1))
        node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
        await node.until(lambda: len(script.came) == 2)
        assert script.came[1].outcome == "failed"


async def test_what_was_trained_for_a_run_that_is_no_longer_active_is_dropped(
    tmp_path, monkeypatch
):
    async with a_node(tmp_path) as node:
        await node.with_run()
        old = node.shell.run

        def other_run_meanwhile(request):
            node.shell.run = node.consortium.run(name="another")
            return answered(request, tmp_path, run_id=old.run_id.hex())

        node.shell.trainer = FakeTrainer(tmp_path, other_run_meanwhile)
        script = Script(monkeypatch, node, Train(3, 116))
        node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
        await node.until(lambda: node.shell.run is not old)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert len(script.came) == 1


# --- folding and fetching ----------------------------------------------------------------------


async def test_a_fold_ends_with_the_offers_and_then_the_hash(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        await node.with_run()
        script = Script(monkeypatch, node, plan(node, 2))
        node.shell.feed(Tick(dt.datetime.now(dt.UTC)))
        await node.until(lambda: len(script.came) == 3)
        assert [type(e).__name__ for e in script.came] == ["Tick", "CheckpointsChanged", "Folded"]
        assert script.came[2].round == 2
        assert [o.round for o in script.came[1].offers] == [
            o.round for o in node.shell.model.checkpoints.offers()
        ]


async def test_a_file_is_fetched_from_the_first_peer_that_gives_it(tmp_path):
    async with a_node(tmp_path) as node:
        node.network.files["b", b"d" * 32] = b"data"
        got = await node.shell.fetch(("a", "b", "c"), b"d" * 32, tmp_path / "it", max_bytes=10)
        assert got
        assert [peer for peer, _ in node.network.of("fetch")] == ["a", "b"]
        assert (tmp_path / "it").read_bytes() == b"data"
        assert not await node.shell.fetch(("a", "c"), b"d" * 32, tmp_path / "no", max_bytes=10)
        assert not await node.shell.fetch(("b",), b"d" * 32, tmp_path / "no", max_bytes=3)


async def test_the_shell_starts_with_what_is_stored_of_the_run(tmp_path):
    async with a_node(tmp_path) as node:
        await node.with_run()
        run = node.shell.run
        for r in range(3):
            node.store.keep_delta(node.consortium.delta(run, r, 0), durable=True)
            node.store.keep_delta(node.consortium.delta(run, r, 1), durable=False)
    async with a_node(tmp_path) as again:
        assert isinstance(again.shell, Shell)
        again.operator.resume()
        await again.until(lambda: again.shell.run is not None)
        line = again.operator.status()["run"]
        assert (line["deltas"], line["own_deltas"], line["round"]) == (6, 3, 2)


def test_the_keys_of_the_tests_are_the_members_of_the_roster():
    assert key_of(0).peer_id in {m.peer_id for m in Consortium(1).roster.members}
