"""The fold told once more, in plain Python numbers: the product must agree with it bit for bit."""

import json
import sqlite3
import struct
from hashlib import blake2b
from itertools import accumulate
from math import floor, sqrt

from msgpack import unpackb


def name(data):
    return blake2b(data, digest_size=32).digest()


def signed_text(path):
    return path.read_bytes().partition(b"\n-- p2pfed signatures --\n")[0]


def counted(data_dir, run_id):
    """Yield (round, weight, [(index, value)]) of every stored delta that counts."""
    texts = [signed_text(path) for path in sorted(data_dir.glob("rosters/v*.json"))]
    members = [(name(text), m) for text in texts for m in json.loads(text)["members"]]
    weights = {(h, m["peer_id"]): m["samples"] for h, m in members if "train" in m["roles"]}
    out = [(r["peer_id"], r["from_round"]) for r in json.loads(texts[-1])["revoked"]]
    db = sqlite3.connect(data_dir / "store.db")
    for (proof,) in db.execute("SELECT proof FROM proofs WHERE run_id = ?", (run_id,)):
        _, _, round_, origin, *_ = unpackb(unpackb(proof)[0])
        out.append((origin, round_))
    for row in db.execute("SELECT header, payload FROM deltas WHERE run_id = ?", (run_id,)):
        _, _, round_, origin, roster, *_ = unpackb(row[0])
        weight, k = weights.get((roster, origin), 0), int.from_bytes(row[1][:4], "little")
        gaps = struct.unpack_from(f"<{k}H", row[1], 4)
        values = struct.unpack_from(f"<{k}h", row[1], 4 + 2 * k)
        entries = zip(accumulate(gaps), values, gaps, strict=True)
        if weight and not any(origin == who and round_ >= since for who, since in out):
            yield round_, weight, [(i, value) for i, value, gap in entries if gap < 65535]
    db.close()


def reference_hash(data_dir, rounds=None):
    """Hash of the model after `rounds` rounds (default: all), from what one node has stored."""
    text = signed_text(next(data_dir.glob("runs/*.json")))
    run, everything = json.loads(text), list(counted(data_dir, name(text)))
    outer, grid = run["outer"][0], 2.0 ** run["grid_bits"]
    b1, b2, p1, p2 = outer["beta1"], outer["beta2"], 1.0, 1.0
    genesis = (data_dir / "blobs" / run["genesis"]).read_bytes()
    floats = struct.iter_unpack("<f", genesis[8 + int.from_bytes(genesis[:8], "little") :])
    model = [round(x * grid) for (x,) in floats]
    first, second = [0.0] * len(model), [0.0] * len(model)
    for r in range(run["rounds"] if rounds is None else rounds):
        deltas = [(weight, pairs) for round_, weight, pairs in everything if round_ == r]
        if not deltas:
            continue
        squares = [sum(v * v for _, v in pairs) for _, pairs in deltas]
        median = sorted(squares)[(len(squares) - 1) // 2]
        sums, total = [0] * len(model), sum(weight for weight, _ in deltas)
        for (weight, pairs), square in zip(deltas, squares, strict=True):
            clip = run["robust"] == "clip-median" and square > median
            factor = floor(sqrt(median) / sqrt(square) * 2**30) if clip else 2**30
            for i, v in pairs:
                sums[i] += weight * (v * factor >> 30)
        p1, p2 = p1 * b1, p2 * b2
        for i, s in enumerate(sums):
            step, root = s / total / grid, 1.0
            if outer["name"] == "fedadam":
                first[i] = first[i] * b1 + (1 - b1) * step
                second[i] = second[i] * b2 + (1 - b2) * (step * step)
                root = sqrt(second[i] / (1 - p2)) + outer["epsilon"]
                step = first[i] / (1 - p1)
            moved = round(outer["learning_rate"] * step / root * grid)
            model[i] = max(-(2**31), min(2**31 - 1, model[i] + moved))
    return name(struct.pack(f"<{len(model)}i", *model)).hex()
