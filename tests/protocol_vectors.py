"""The test vectors of docs/protocol.md, computed by the code: name -> value as it is written there.

`python tests/protocol_vectors.py` prints them. What is a hash, a signature or an encoding is of
fixed inputs, which the document names.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from io import BytesIO

import numpy as np
import trio
from consortium import Consortium, sparse
from wire_script import Script

from p2pfed.gossip.digests import DigestTree
from p2pfed.gossip.fold import Weighted, fold_round, genesis_state, model_hash
from p2pfed.gossip.robust import mix
from p2pfed.gossip.sums import Payloads
from p2pfed.identity.filehash import ChunkList, file_hash
from p2pfed.identity.keys import NodeKey
from p2pfed.identity.rules import Outer
from p2pfed.identity.signing import DELTA, ROSTER, RUN, fact_hash, sign
from p2pfed.network import multistream
from p2pfed.network.framing import write_frame
from p2pfed.wire.beat import Beat
from p2pfed.wire.delta import Header
from p2pfed.wire.measure import Measure
from p2pfed.wire.messages import Have, Want, encode_message
from p2pfed.wire.payload import Payload, encode_payload
from p2pfed.wire.seats import encode_seats
from p2pfed.wire.spreading import Held, Ping, Portion
from p2pfed.wire.versions import VERSIONS, gossip_protocol

SEED = bytes(range(32))
ONES, TWOS, THREES = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32
BEAT = Beat(
    sequence=7,
    network_id=ONES,
    run_id=TWOS,
    task_id=b"",
    round=3,
    contributes=True,
    model_round=3,
    model_hash=THREES,
    documents=bytes(16),
    addresses=("/ip4/10.0.0.1/tcp/4001",),
    measure=Measure("dice", 3, 87),
)
FOLD_RUN = {
    "num_parameters": 4,
    "grid_bits": 12,
    "robust": "clip-median",
    "outer": Outer("fedavg", 1.0),
}
GENESIS = np.array([0.5, -0.25, 0.0, 1.0], np.float32)
WEIGHTED = (Weighted(sparse({0: 100, 2: -50}), 50), Weighted(sparse({0: 4, 1: -8}), 60))


def fold_example(**changes):
    """The worked example of the fold: the mixture, and the state after one round."""
    run = Consortium(2).run(**(FOLD_RUN | changes))
    state = genesis_state(GENESIS, run)
    mixture = mix(Payloads(WEIGHTED, 4), [w.weight for w in WEIGHTED], run.robust, 4)
    fold_round(state, list(WEIGHTED), run)
    return mixture, state


def _header() -> Header:
    return Header(
        run_id=ONES,
        round=3,
        origin=NodeKey(SEED).peer_id,
        roster_hash=TWOS,
        view_hash=THREES,
        mechanism="svt",
        spent_nano_rho=1_000_000,
        releases=4,
        ledger_head=bytes(32),
        payload_hash=fact_hash(_sparse_payload()),
        num_released=2,
    )


def _sparse_payload() -> bytes:
    return encode_payload(sparse({5: 1, 70_000: -2}), num_parameters=100_000)


def _round_digests() -> DigestTree:
    tree = DigestTree()
    for fact in (TWOS, THREES):
        tree.add(2, fact)
    return tree


async def _streams() -> dict[str, bytes]:
    proposal, frame = Script(b""), Script(b"")
    await multistream.announce(proposal, gossip_protocol(VERSIONS[-1]))
    await write_frame(frame, encode_message(Ping(7)), stall=1)
    return {"opening of gossip 2": proposal.written, "frame of ping": frame.written}


def _lot(peer: str) -> bytes:
    text = ONES + (3).to_bytes(8, "little") + peer.encode()
    return hashlib.blake2b(text, digest_size=16, person=b"p2pfed-seat").digest()


def _chain() -> bytes:
    told = b"".join((TWOS, (50).to_bytes(4, "little"), THREES, (60).to_bytes(4, "little")))
    return hashlib.blake2b(ONES + told, digest_size=32, person=b"p2pfed-chain").digest()


def vectors() -> dict[str, str]:
    """All of them, in the document's order."""
    key, header = NodeKey(SEED), _header()
    adam = Outer("fedadam", 0.01, beta1=0.9, beta2=0.99, epsilon=1e-6, bias_correction=True)
    found: dict[str, bytes | str] = {
        "public key": key.public_key,
        "peer id": key.peer_id,
        "name of abc": fact_hash(b"abc"),
        "roster signature of abc": sign(SEED, ROSTER, b"abc"),
        "run signature of abc": sign(SEED, RUN, b"abc"),
        "payload sparse": _sparse_payload(),
        "payload dense": encode_payload(
            Payload.dense(np.array([1, -2, 3, 4], np.int16)), num_parameters=4
        ),
        "payload int8": encode_payload(
            Payload.dense(np.array([254, -4, 2, 6], np.int16)), num_parameters=4, width="int8"
        ),
        "header": header.encode(),
        "header name": fact_hash(header.encode()),
        "header signature": sign(SEED, DELTA, header.encode()),
        "lot": _lot(key.peer_id),
        "chain": _chain(),
        "round digest": _round_digests().digest(2, 1),
        "range digest": _round_digests().digest(2, 2),
        "file name of abc": file_hash(b"abc"),
        "file name of 1048577 zeros": ChunkList.of(BytesIO(bytes((1 << 20) + 1))).name,
        "seats 0 1 5 of 20": encode_seats(0b100011, 20),
        "seats 1 to 19 of 20": encode_seats((1 << 20) - 2, 20),
        "seats 300 of 400": encode_seats(1 << 300, 400),
        "seats even of 20": encode_seats(int("01" * 10, 2), 20),
        "beat version 1": encode_message(BEAT, 1),
        "beat version 2": encode_message(BEAT, 2),
        "have": encode_message(Have(ONES, 3, full=True, names=TWOS[:16])),
        "want": encode_message(Want(ONES, TWOS[:16])),
        "held": encode_message(
            Held(ONES[:4], TWOS[:4], False, (Portion(3, encode_seats(3, 20), THREES[:4]),))
        ),
        **trio.run(_streams),
        "fold fedavg": model_hash(fold_example()[1]),
        "fold fedadam": model_hash(fold_example(outer=adam)[1]),
        "fold centred": model_hash(fold_example(robust="centred-clipping")[1]),
        "fold neighbours": model_hash(fold_example(robust="nearest-neighbour-mixing")[1]),
    }
    return {name: v if isinstance(v, str) else v.hex() for name, v in found.items()}


if __name__ == "__main__":
    for label, value in vectors().items():
        print(f"{label}: {value}")
    mixture, state = fold_example()
    print(mixture, state.model.tolist(), float(Fraction(1)))
