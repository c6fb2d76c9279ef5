"""What became of every round: from the deltas that are held and the event log."""

from __future__ import annotations

import datetime as dt
import json
from types import SimpleNamespace

import pytest
import trio
from board_fakes import Board, sockets

from p2pfed.admin.client import Client
from p2pfed.errors import ConfigError, NotFound
from p2pfed.node.eventlog import EventLog
from p2pfed.node.history import History
from p2pfed.node.store import Store

RUN = bytes(range(32))


class Node:
    """As much of a node as a history looks at; its clock goes on by 10 s an event."""

    def __init__(self, folder):
        self.store = Store(folder / "store.db")
        self.now = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
        self.log = EventLog(self.store, self._wall)
        self.run = SimpleNamespace(run_id=RUN, rounds=100)
        self.held: dict[int, set[str]] = {}
        facts = SimpleNamespace(origins=lambda r: self.held.get(r, set()))
        self.core = SimpleNamespace(own_id="me", progress=SimpleNamespace(round=0, facts=facts))
        self.history = History(self)

    def _wall(self):
        self.now += dt.timedelta(seconds=10)
        return self.now

    def play(self, round_, *origins):
        self.core.progress.round = round_ + 1
        self.log.add("round.started", {"round": round_})
        self.log.add("model.folded", {"round": round_, "hash": f"h{round_}"})
        self.log.add("privacy.spent", {"round": round_, "spent_epsilon": 0.5 + round_})
        self.held[round_] = set(origins)
        self.log.add("round.finished", {"round": round_, "deltas": 1, "missing": []})


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    made.log.add("run.started", {"run": "heart", "id": RUN.hex()})
    yield made
    made.store.close()


async def test_a_round_tells_who_contributed_and_what_it_came_to(node):
    node.play(0, "me", "oslo")
    node.play(1, "oslo")
    told = await node.history.since(0, 100)
    assert (told["run"], told["round"], told["rounds"]) == (RUN.hex(), 2, 100)
    first, second, now = told["history"]
    assert [told["members"][i] for i in first["origins"]] == ["me", "oslo"]
    assert (first["model_hash"], first["seconds"], first["epsilon"]) == ("h0", 30.0, 0.5)
    assert (first["released"], second["released"]) == (True, False)
    assert now == {"round": 2, "origins": [], "model_hash": None, "seconds": None,
                   "released": False, "epsilon": None}  # fmt: skip


async def test_a_late_delta_is_there_at_the_next_look(node):
    node.play(0, "me")
    await node.history.since(0, 100)
    node.held[0].add("late")
    told = await node.history.since(0, 100)
    assert sorted(told["members"][i] for i in told["history"][0]["origins"]) == ["late", "me"]


async def test_what_was_said_of_another_run_is_not_of_this_one(node):
    node.play(0, "me")
    await node.history.since(0, 100)
    node.run = SimpleNamespace(run_id=bytes(32), rounds=5)
    node.core.progress.round, node.held = 0, {}
    node.log.add("run.started", {"run": "second", "id": bytes(32).hex()})
    told = await node.history.since(0, 100)
    assert told["history"][0]["model_hash"] is None
    assert told["rounds"] == 5


async def test_a_history_is_read_anew_after_a_restart(node, tmp_path):
    node.play(0, "me")
    node.log.flush()
    again = History(node)
    assert (await again.since(0, 100))["history"][0]["model_hash"] == "h0"


async def test_without_a_run_there_is_none(node):
    node.run = node.core.progress = None
    assert (await node.history.since(0, 100))["history"] == []


async def test_the_newest_rounds_are_told_where_there_are_more_than_asked_for(node):
    for r in range(6):
        node.play(r, "me")
    assert [h["round"] for h in (await node.history.since(0, 3))["history"]] == [4, 5, 6]
    assert [h["round"] for h in (await node.history.since(5, 100))["history"]] == [5, 6]


async def test_a_clock_that_was_set_back_gives_no_negative_time(node):
    node.log.add("round.started", {"round": 0})
    node.now -= dt.timedelta(hours=1)
    node.log.add("round.finished", {"round": 0})
    assert (await node.history.since(0, 9))["history"][0]["seconds"] == 0.0


async def test_while_ten_thousand_rounds_are_told_others_have_their_turn(node):
    node.held = {r: {"me", *"abcd"} for r in range(10_000)}
    node.core.progress.round = 9_999
    turns = 0

    async def another():
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(another)
        told = await node.history.since(0, 10_000)
        nursery.cancel_scope.cancel()
    assert len(told["history"]) == 10_000
    assert len(json.dumps(told)) < 2_000_000
    assert turns >= 10


@pytest.mark.slow
def test_the_endpoint_takes_a_round_and_refuses_what_is_none():
    with sockets(Board(), private=False) as (socket, _):
        client = Client(socket)
        assert client.get("/v1/history?since=40")["history"][0]["round"] == 40
        with pytest.raises(ConfigError, match="is not a number"):
            client.get("/v1/history?since=x")


@pytest.mark.slow
def test_a_backend_without_a_history_has_no_such_endpoint():
    class Old(Board):
        history = None

    with sockets(Old(), private=False) as (socket, _), pytest.raises(NotFound):
        Client(socket).get("/v1/history")
