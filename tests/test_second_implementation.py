"""A peer written from docs/protocol.md alone, as a member beside a real daemon with a trainer.

The second implementation is `second_*.py`; nothing of p2pfed is in it. Over real sockets they shake
hands, see each other alive, exchange rosters and deltas, fold each other's, and end on the same
hash; a checkpoint of the one is the state of the other in every bit. What this proves is the
document: whoever reads it can do the same in another language. One daemon for all tests of this
file, in the order of the file.

Not here: the second implementation beside the product's functions (`test_second_formats.py`),
other clients of the same streams (`test_network_interop.py`).
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import second_formats as second
import trio
from consortium import peer_of
from nacl.signing import SigningKey
from second_muxer import dial, listen
from second_peer import Peer
from second_transport import peer_id
from second_wire import fetch_file

from p2pfed.demo.federation import Federation
from p2pfed.demo.plan import Cast, Hospital, run_constants
from p2pfed.identity.roster import Member
from p2pfed.identity.rules import Encoding, Outer
from p2pfed.wire.delta import Delta
from p2pfed.wire.payload import decode_payload

pytestmark = pytest.mark.slow

SEED = bytes(range(32))
ROUNDS = 3


class Net:
    """A daemon with a trainer, and a roster that lists the second implementation too."""

    def __init__(self, folder: Path) -> None:
        cast = Cast(
            "breast-cancer", None, (Hospital("North", 184, {"site": 0, "sites": 3}),), "", "", ""
        )
        self.federation = Federation(folder, cast, epsilon="0")
        self.node = self.federation.first
        constants = run_constants("none", rounds=ROUNDS, epsilon=Fraction(0))
        constants |= {
            "deadline_s": 600.0,  # nobody goes on without the other
            "min_live": 0.9,
            "robust": "centred-clipping",
            "outer": Outer("fedadam", 0.05),
            "encoding": Encoding("int8"),
            "top_fraction": Fraction(1, 4),
        }
        self.run = self.federation.make_run("second", constants, seed=0)
        self.federation.write_bootstrap()
        self.peer_id = peer_id(bytes(SigningKey(SEED).verify_key))

    def start(self) -> None:
        member = Member("Second", self.peer_id, ("train",), 120)
        roster = self.federation.stewards.admit([self.node.member, member])
        self.federation.start(self.node)
        self.federation.enrol(self.node, roster)

    def peer(self, telling=lambda _: None, *, seed: bytes = SEED, **more) -> Peer:
        """The second implementation, as its operator starts it: with the roster and the run."""
        signed = (self.federation.folder / "run.json").read_bytes()
        return Peer(seed, self.federation.stewards.signed, signed, telling, **more)

    @asynccontextmanager
    async def talking(self, peer: Peer, seed: bytes = SEED):
        """Connected, with the first model at hand; the node waits for this peer's deltas."""
        with trio.fail_after(280):
            async with (
                dial("127.0.0.1", self.node.port, self.node.key.peer_id, seed) as connection,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(peer.talk, connection)
                await until(lambda: peer.beat)
                await peer.fetch_genesis()
                peer.contributes = True
                await peer.say_beat()
                yield
                nursery.cancel_scope.cancel()

    async def get(self, path: str):
        return await trio.to_thread.run_sync(partial(self.node.client.get, path))

    async def seen(self, condition, name: str = "Second") -> dict:
        """What the node says of a member, once it lists it and a condition of it holds."""
        while True:
            found = [p for p in await self.get("/v1/peers") if p["name"] == name]
            if found and condition(found[0]):
                return found[0]
            await trio.sleep(0.05)


async def until(condition) -> None:
    """Poll; `Net.talking` bounds it."""
    while not condition():  # noqa: ASYNC110 - of what comes on a socket nobody is told
        await trio.sleep(0.02)


async def speaks_up(peer: Peer, round_: int) -> None:
    """Have the node tell the hash of its model of a round, which a beat does every 10 s anyway."""
    while peer.beat[6] != round_ or not peer.beat[7]:
        await peer.say("doubted", False)
        await trio.sleep(0.5)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    made = Net(tmp_path_factory.mktemp("second") / "net")
    with made.federation.running():
        made.start()
        yield made


@pytest.mark.parametrize(
    ("versions", "common"), [((1,), 1), ((2, 1), 2), ((4, 3, 2), 2)], ids=["old", "same", "newer"]
)
async def test_a_node_shakes_hands_with_it_and_sees_it_alive(net, versions, common):
    peer = net.peer(versions=versions)
    async with net.talking(peer):
        assert peer.version == common
        assert peer.rosters.network_id == net.run.network_id
        assert peer.beat[2] == peer.run.run_id == net.run.run_id
        await speaks_up(peer, 0)
        seen = await net.seen(lambda it: it["contributes"] and it["wire_version"] == common)
    assert seen["state"] == "alive"
    assert seen["model_hash"] == peer.facts.model(0).hash().hex()
    assert peer.beat[7] == peer.facts.model(0).hash()


async def test_the_roster_before_is_fetched_by_its_name_and_a_new_one_as_soon_as_it_is_there(net):
    stewards, peer = net.federation.stewards, net.peer()
    before = len(peer.rosters.held)
    async with net.talking(peer):
        relay = Member("Relay", peer_of(9), ("relay",), 0)
        signed = stewards.admit([relay])
        post = partial(net.node.client.post, "/v1/roster", {"signed": signed.decode()})
        await trio.to_thread.run_sync(post)
        await until(lambda: stewards.roster.hash in peer.rosters.held)
    assert peer.rosters.newest.name == stewards.roster.hash
    assert peer.rosters.newest.member(peer_of(9)) is not None
    assert len(peer.rosters.held) > before


async def test_a_stranger_that_brings_a_roster_which_lists_it_is_a_member_from_then_on(net):
    seed = bytes([7]) * 32
    third = Member("Third", peer_id(bytes(SigningKey(seed).verify_key)), ("relay",), 0)
    signed = net.federation.stewards.admit([third])  # and the node has not heard of it
    assert "Third" not in {peer["name"] for peer in await net.get("/v1/peers")}
    peer = net.peer(seed=seed)
    async with net.talking(peer, seed):
        await net.seen(lambda it: it["state"] == "alive", "Third")
    status = await net.get("/v1/status")
    assert (
        status["roster"]["version"] == second.read_document(signed, second.ROSTER).says["version"]
    )


async def test_it_is_dialled_where_its_beat_says_that_it_listens(net):
    came: list[bool] = []
    caller, called = net.peer(), net.peer()

    async def take(connection) -> None:
        came.append(connection.dialled)
        await called.talk(connection)

    async with trio.open_nursery() as nursery:
        port = await nursery.start(listen, SEED, take)
        caller.addresses = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{net.peer_id}"]
        async with net.talking(caller):
            await net.seen(lambda it: it["addresses"] == caller.addresses)
        with trio.fail_after(280):
            await until(lambda: called.beat)
            await net.seen(lambda it: it["state"] == "alive")
        nursery.cancel_scope.cancel()
    assert came == [False]
    assert called.version == 2


def released(round_: int, run: second.Run) -> dict[int, int]:
    """What the second implementation says it has learnt: every fifth coordinate, in eights."""
    return {i: 8 * ((i * 37 + 11 * round_) % 200 - 100) for i in range(round_, run.size, 5)}


async def test_they_fold_each_others_deltas_and_end_on_the_same_hash(net):
    peer = net.peer()
    async with net.talking(peer):
        for round_ in range(ROUNDS):
            peer.round = round_
            await peer.offer(released(round_, peer.run))
            await until(lambda at=round_: len(peer.facts.of_round(at)) == 2)
            peer.round = round_ + 1
            await peer.say_beat()
            while (await net.get("/v1/status"))["run"]["model_round"] <= round_:  # noqa: ASYNC110
                await trio.sleep(0.05)
        await speaks_up(peer, ROUNDS)
        status = await net.get("/v1/status")
    model = peer.facts.model(ROUNDS)
    assert peer.beat[7] == model.hash()
    assert status["run"]["model_hash"] == model.hash().hex()
    assert (status["run"]["deltas"], status["run"]["own_deltas"]) == (2 * ROUNDS, ROUNDS)
    for (_, origin), delta in peer.facts.deltas.items():
        check_values_are_those_of_the_product(delta, net.run)
        assert origin in {net.peer_id, net.node.key.peer_id}
    weights = {d.origin: weight for d, weight in peer.facts.counting(0)}
    assert weights == {net.peer_id: 120, net.node.key.peer_id: 184}


def check_values_are_those_of_the_product(delta: second.Delta, run) -> None:
    product = decode_payload(
        Delta.decode(delta.wire).payload,
        num_parameters=run.num_parameters,
        max_released=run.max_released,
        width="int8",
    )
    dense = np.zeros(run.num_parameters)
    dense[product.indices] = product.values
    np.testing.assert_array_equal(
        np.array(delta.values) * 2.0**-run.grid_bits, dense * 2.0**-run.grid_bits
    )
    assert np.any(dense)


async def test_who_comes_with_nothing_finds_all_by_digests_and_has_the_chain_and_state(net):
    told: list[list] = []
    peer = net.peer(told.append)
    async with net.talking(peer):
        await until(lambda: len(peer.facts.deltas) == 2 * ROUNDS)
        before, unknown = len(told), bytes(16 * 300)
        names = [delta.name[:16] for delta in peer.facts.deltas.values()]
        await peer.say("want", peer.run.run_id, unknown + b"".join(names))  # too long for the first
        await until(lambda: any(m[0] == "facts" and len(m[1]) == len(names) for m in told[before:]))
        await peer.say("ask-checkpoints", peer.run.run_id)
        await until(lambda: any(message[0] == "checkpoints" for message in told))
        (offers,) = [message[2] for message in told if message[0] == "checkpoints"]
        newest = max(offers)
        round_, chain, name, size = newest
        file = await fetch_file(peer.connection, name)
    assert (round_, len(file)) == (ROUNDS, size)
    assert chain == peer.facts.chain(ROUNDS)
    state = peer.facts.model(ROUNDS)
    length = int.from_bytes(file[:8], "little")
    head, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    kept = json.loads(head["__metadata__"]["p2pfed"])
    assert kept == {
        "beta1_power": state.power1.hex(),
        "beta2_power": state.power2.hex(),
        "chain": chain.hex(),
        "round": ROUNDS,
    }
    for key, kind, values in (
        ("model", "<i4", state.model),
        ("first", "<f8", state.first),
        ("second", "<f8", state.second),
    ):
        start, end = head[key]["data_offsets"]
        np.testing.assert_array_equal(np.frombuffer(data[start:end], kind), values)
