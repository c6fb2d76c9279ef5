"""The second implementation beside the document's vectors and beside the product, without sockets.

The second implementation is `second_*.py`; nothing of p2pfed is in it. Here it is held to the test
vectors of docs/protocol.md, and to what the product makes of the same rosters, deltas and proofs:
the same chain, digests and model, bit for bit, under every robust rule and outer step.

Not here: the second implementation among real nodes (`test_second_implementation.py`).
"""

from __future__ import annotations

import ast
import random
import re
import struct
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import msgpack
import numpy as np
import pytest
import second_formats as second
from consortium import Consortium, hospital, key_of, peer_of, some_payload, sparse, steward
from consortium import signed as signed_by
from nacl.signing import SigningKey
from second_facts import Facts, Rosters, lot
from second_fold import State, mixture
from second_transport import MULTISTREAM, Wrong, line, peer_id
from second_wire import file_name, frame, read_seats, write_seats

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.fold import Weighted, fold_round, genesis_state, model_hash
from p2pfed.gossip.robust import mix
from p2pfed.gossip.sums import Payloads
from p2pfed.identity.rules import Averaging, Outer
from p2pfed.identity.signing import RUN, SignedDocument
from p2pfed.wire.delta import Delta
from p2pfed.wire.payload import Payload, decode_payload, encode_payload

HERE = Path(__file__).resolve().parent
DOCUMENT = (HERE.parent / "docs" / "protocol.md").read_text("utf-8")
SEED = bytes(range(32))
GENESIS = [0.5, -0.25, 0.0, 1.0]
WORKED = [[100, 0, -50, 0], [4, -8, 0, 0]]
FEDAVG = Outer("fedavg", 1.0)
FEDADAM = Outer("fedadam", 0.01, beta1=0.9, beta2=0.99, epsilon=1e-6, bias_correction=True)


def vectors() -> dict[str, str]:
    (block,) = re.findall(r"^```vectors\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    return dict(each.split(": ") for each in block.splitlines())


# --- the document's own vectors ----------------------------------------------------------------


def test_it_imports_nothing_of_the_product_nor_of_libp2p():
    files = sorted(HERE.glob("second_*.py"))
    assert len(files) == 7
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"p2pfed", "libp2p"}, file


def payload_run(size: int, most: int, *, wide: bool = True) -> second.Run:
    """As much of a run as a payload depends on."""
    run = second.Run.__new__(second.Run)
    run.size, run.wide = size, wide
    run.says = {"num_parameters": size, "mechanism": "none", "block_size": 1, "segment_blocks": 1}
    run.says["top_fraction"] = str(most / size)
    return run


def worked(rule: str, outer: Outer) -> bytes:
    state = State(GENESIS, 12, rule, outer.encode())
    state.fold(WORKED, [50, 60])
    return state.hash()


def told_of_two() -> dict[str, bytes]:
    """The chain and the digests of two deltas of which only the names are known."""
    ones, twos, threes = (bytes([i]) * 32 for i in (1, 2, 3))
    parts = [twos, (50).to_bytes(4, "little"), threes, (60).to_bytes(4, "little")]
    round_ = second.h(twos + threes, size=16)
    return {
        "lot": lot(ones, 3, vectors()["peer id"]),
        "chain": second.h(ones + b"".join(parts), b"p2pfed-chain"),
        "round digest": round_,
        "range digest": second.h(round_ + bytes(16), size=16),
    }


def test_it_gives_the_test_vectors_of_the_document():
    key = bytes(SigningKey(SEED).verify_key)
    ones, twos, threes = (bytes([i]) * 32 for i in (1, 2, 3))
    write = second.write_payload
    wide, narrow = payload_run(4, 4), payload_run(4, 4, wide=False)
    sparse_payload = write({5: 1, 70_000: -2}, payload_run(100_000, 100))
    header = [1, ones, 3, peer_id(key), twos, threes, "svt", 1_000_000, 4, bytes(32)]
    header = msgpack.packb([*header, second.h(sparse_payload), 2])
    beat = ["beat", 7, ones, twos, b"", 3, True, 3, threes, bytes(16), ["/ip4/10.0.0.1/tcp/4001"]]
    opening = line(MULTISTREAM) + line("/p2pfed/gossip/2")
    chunks = [second.h(bytes(1 << 20)), second.h(b"\0")]
    held = ["held", ones[:4], twos[:4], False, [[3, write_seats({0, 1}, 20), threes[:4]]]]
    found: dict[str, bytes] = {
        "public key": key,
        "name of abc": second.h(b"abc"),
        "roster signature of abc": second.sign(SEED, second.ROSTER, b"abc"),
        "run signature of abc": second.sign(SEED, second.RUN, b"abc"),
        "payload sparse": sparse_payload,
        "payload dense": write(dict(enumerate((1, -2, 3, 4))), wide),
        "payload int8": write(dict(enumerate((254, -4, 2, 6))), narrow),
        "header": header,
        "header name": second.h(header),
        "header signature": second.sign(SEED, second.DELTA, header),
        **told_of_two(),
        "file name of abc": file_name(3, [second.h(b"abc")]),
        "file name of 1048577 zeros": file_name((1 << 20) + 1, chunks),
        "seats 0 1 5 of 20": write_seats({0, 1, 5}, 20),
        "seats 1 to 19 of 20": write_seats(set(range(1, 20)), 20),
        "seats 300 of 400": write_seats({300}, 400),
        "seats even of 20": write_seats(set(range(0, 20, 2)), 20),
        "beat version 1": msgpack.packb(beat),
        "beat version 2": msgpack.packb([*beat, ["dice", 3, 87]]),
        "have": msgpack.packb(["have", ones, 3, True, twos[:16]]),
        "want": msgpack.packb(["want", ones, twos[:16]]),
        "held": msgpack.packb(held),
        "opening of gossip 2": opening,
        "frame of ping": frame(msgpack.packb(["ping", 7])),
        "fold fedavg": worked("clip-median", FEDAVG),
        "fold fedadam": worked("clip-median", FEDADAM),
        "fold centred": worked("centred-clipping", FEDAVG),
        "fold neighbours": worked("nearest-neighbour-mixing", FEDAVG),
    }
    assert {"peer id": peer_id(key), **{name: v.hex() for name, v in found.items()}} == vectors()


@pytest.mark.parametrize("name", ["0 1 5 of 20", "1 to 19 of 20", "300 of 400", "even of 20"])
def test_seats_are_read_as_they_are_written(name):
    members = int(name.rpartition(" ")[2])
    packed = bytes.fromhex(vectors()[f"seats {name}"])
    assert write_seats(read_seats(packed, members), members) == packed


# --- beside the product ------------------------------------------------------------------------


def the_same(net: Consortium, run, deltas: list[Delta]) -> tuple[Facts, list]:
    """The facts as the second implementation holds them, and how the product weighs them."""
    rosters = Rosters(net.signed[0])
    for signed in net.signed[1:]:
        rosters.believe(signed)
    document = SignedDocument(run.encode())
    for seed in (bytes([200]) * 32, bytes([201]) * 32):
        document = document.signed_by(seed, RUN)
    mine = Facts(rosters, second.Run(document.encode(), rosters.newest, rosters.network_id))
    for delta in deltas:
        mine.take_delta(delta.encode())
    return mine, net.facts(run)


RULES = ["none", "clip-median", "centred-clipping", "nearest-neighbour-mixing"]
OUTERS = ["fedavg", "fedadam", "fedyogi", "fedadagrad"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("outer", OUTERS)
def test_three_rounds_of_five_hospitals_fold_to_the_same_chain_and_model(rule, outer):
    net = Consortium(5)
    optimiser = replace(FEDADAM, name=outer)
    weighing = Averaging(weight_power=Fraction(1, 2), sample_cap=Fraction("1.1"))
    run = net.run(robust=rule, outer=optimiser, averaging=weighing)
    deltas = [net.delta(run, r, i) for r in range(3) for i in range(5) if (r, i) != (1, 2)]
    check_the_same(net, run, deltas)


def check_the_same(net: Consortium, run, deltas: list[Delta]) -> Facts:
    """The second implementation's facts, if chain, digests and model are those of the product."""
    mine, theirs = the_same(net, run, deltas)
    for delta in deltas:
        proof = theirs.add(delta.signed)
        if proof is not None:
            theirs.add_proof(proof)
    held = {delta.fact: delta for delta in deltas}
    genesis = np.linspace(-1, 1, run.num_parameters, dtype=np.float32)
    mine.genesis = genesis.tolist()
    state = genesis_state(genesis, run)
    for round_ in range(run.rounds):
        counted = [
            Weighted(decoded(held[each.fact], run), each.weight) for each in theirs.counted(round_)
        ]
        check_the_mixture(mine, round_, counted, run)
        fold_round(state, counted, run)
        assert mine.digest(round_, 1) == theirs.tree.digest(round_, 1)
    assert mine.chain(run.rounds) == theirs.chain(run.rounds)
    assert mine.model(run.rounds).hash() == model_hash(state)
    end, ranges = mine.cover()
    cover = [[each.start, each.length, each.digest] for each in theirs.tree.cover()]
    assert (end, ranges) == (max(1, theirs.tree.end), cover)
    return mine


def check_the_mixture(mine: Facts, round_: int, counted: list[Weighted], run) -> None:
    """Coefficients are the same parts of the same whole."""
    if counted:
        told = mine.counting(round_)
        vectors = [delta.values for delta, _ in told]
        ours, _, whole = mixture(vectors, [weight for _, weight in told], run.robust)
        payloads = Payloads(counted, run.num_parameters)
        theirs = mix(payloads, [w.weight for w in counted], run.robust, run.num_parameters)
        parts = [Fraction(c, theirs.total) for c in theirs.coefficients]
        assert [Fraction(c, whole) for c in ours] == parts[: len(ours)]


def decoded(delta: Delta, run) -> Payload:
    return decode_payload(
        delta.payload,
        num_parameters=run.num_parameters,
        max_released=run.max_released,
        width=run.encoding.values,
    )


def test_deltas_of_members_that_a_committee_leaves_out_do_not_count():
    net = Consortium(5)
    run = net.run(averaging=Averaging(committee=2))
    deltas = [net.delta(run, r, i) for r in range(4) for i in range(5)]
    mine = check_the_same(net, run, deltas)
    seated = [{delta.origin for delta, _ in mine.counting(r)} for r in range(4)]
    assert {len(each) for each in seated} == {2}
    assert len({frozenset(each) for each in seated}) > 1


def test_who_signed_two_deltas_of_a_round_is_out_from_that_round_on():
    net = Consortium(3)
    run = net.run()
    deltas = [net.delta(run, r, i) for r in range(3) for i in range(3)]
    other = net.delta(run, 1, 2, some_payload(run, 1, 2, salt=1))
    mine = check_the_same(net, run, [*deltas, other])
    assert [len(mine.counting(r)) for r in range(3)] == [3, 2, 2]


def test_a_revoked_member_is_out_and_a_delta_weighs_by_the_roster_that_it_names():
    net = Consortium(3)
    run = net.run()
    deltas = [net.delta(run, r, i) for r in range(3) for i in range(3)]
    net.publish(net.roster.revoke(peer_of(1), reason="a test", from_round=2))
    bigger = [replace(m, samples=m.samples * 2) for m in net.roster.members]
    net.publish(net.roster.next(members=bigger))
    deltas.append(net.delta(run, 3, 0))
    mine = check_the_same(net, run, deltas)
    weights = [[weight for _, weight in mine.counting(r)] for r in range(4)]
    assert [len(each) for each in weights] == [3, 3, 2, 1]
    assert weights[3] == [100]


@pytest.mark.parametrize("width", ["int16", "int8"])
@pytest.mark.parametrize("positions", [(), (0,), (65_535,), (3, 65_538, 131_073, 196_607)])
def test_payloads_are_written_and_read_alike(width, positions):
    size, step = 196_608, 4
    released = {at: step * (i + 120) for i, at in enumerate(positions)}
    run = payload_run(size, 4, wide=width == "int16")
    written = encode_payload(sparse(released), num_parameters=size, width=width)
    assert second.write_payload(released, run) == written
    values, count = second.read_payload(written, run)
    assert {at: q for at, q in enumerate(values) if q} == released
    assert count == len(released)


@pytest.mark.parametrize("width", ["int16", "int8"])
def test_what_is_no_payload_to_the_one_is_none_to_the_other(width):
    size, most = 40, 12  # the longest sparse one is shorter than a dense one
    run, rng = payload_run(size, most, wide=width == "int16"), random.Random(1)
    bounds = {"num_parameters": size, "max_released": most, "width": width}
    taken = 0
    for case in range(500):
        released = {at: 4 * rng.randint(-60, 60) for at in rng.sample(range(size), case % 14)}
        made = sparse(released)
        if case % 5 == 0:
            made = Payload.dense(np.array([released.get(i, 0) for i in range(size)], np.int16))
        data = bytearray(encode_payload(made, num_parameters=size, width=width))
        for _ in range(rng.randint(0, 2)):
            at = rng.choice([rng.randrange(8), rng.randrange(len(data))])
            data[at] = rng.choice([0, 1, 255, data[at] ^ 1 << rng.randrange(8)])
        data = data[: rng.choice([None, None, None, -1])] + bytes(rng.choice([0, 0, 0, 1]))
        try:
            values, count = second.read_payload(bytes(data), run)
        except (Wrong, struct.error):
            with pytest.raises(RemoteProtocolError):
                decode_payload(bytes(data), **bounds)
            continue
        theirs = decode_payload(bytes(data), **bounds)
        dense = np.zeros(size, int)
        dense[theirs.indices] = theirs.values
        assert (values, count) == (dense.tolist(), theirs.values.size)
        taken += 1
    assert 80 < taken < 420


@pytest.mark.parametrize(("entries", "is_taken"), [(20, True), (21, False)])
def test_a_sparse_payload_may_be_as_long_as_a_dense_one_and_no_longer(entries, is_taken):
    gaps, values = [0] + [1] * (entries - 1), [1] * entries
    data = struct.pack(f"<BBHI{entries}H{entries}h", 0, 16, 0, entries, *gaps, *values)
    readers = [
        (Wrong, partial(second.read_payload, data, payload_run(40, 40))),
        (RemoteProtocolError, partial(decode_payload, data, num_parameters=40, max_released=40)),
    ]
    for refusal, read in readers:
        with nullcontext() if is_taken else pytest.raises(refusal):
            read()


def test_a_delta_that_was_changed_on_the_way_is_not_taken():
    net = Consortium(2)
    run = net.run()
    wire = net.delta(run, 0, 0).encode()
    mine, _ = the_same(net, run, [])
    for at in (8, len(wire) - 100, len(wire) - 1):
        changed = bytearray(wire)
        changed[at] ^= 1
        with pytest.raises((Wrong, ValueError, msgpack.UnpackException)):
            mine.take_delta(bytes(changed))
    assert not mine.deltas
    assert mine.cover() == (1, [])
    assert mine.take_delta(wire).origin == peer_of(0)


def test_a_roster_of_other_stewards_is_not_believed():
    net, foreign = Consortium(2), Consortium(2, network="another network")
    rosters = Rosters(net.signed[1])
    draft = net.roster.next(members=[*net.roster.members, hospital(7)])
    for signed in (foreign.signed[-1], SignedDocument(draft.encode()).encode()):
        with pytest.raises(Wrong):
            rosters.believe(signed)
    usurped = net.roster.next(stewards=[steward(3), steward(4)], threshold=1)
    with pytest.raises(Wrong):
        rosters.believe(signed_by(usurped.encode(), 3, 4))
    assert rosters.believe(net.signed[0]).says["version"] == 1  # the one before, by its name
    assert rosters.believe(net.publish(draft)).says["version"] == 3
    assert rosters.newest.member(key_of(7).peer_id) is not None
