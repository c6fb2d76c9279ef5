"""The fold told once more, in plain Python numbers: the product must agree with it bit for bit."""

import json
import sqlite3
import struct
from bisect import bisect_right
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate
from math import sqrt

from msgpack import unpackb


def name(data):
    return blake2b(data, digest_size=32).digest()


def signed_text(path):
    return path.read_bytes().partition(b"\n-- p2pfed signatures --\n")[0]


def decoded(payload):
    """[(index, value)] of an encoded payload."""
    layout, bits, exponent, k = struct.unpack_from("<BBHI", payload)
    entries = (len(payload) - 8) // (bits // 8 + (2 if layout == 0 else 0))
    gaps = struct.unpack_from(f"<{entries}H", payload, 8) if layout == 0 else [0] + [1] * (k - 1)
    code = f"<{entries}{'h' if bits == 16 else 'b'}"
    values = struct.unpack_from(code, payload, len(payload) - entries * bits // 8)
    pairs = zip(accumulate(gaps), values, gaps, strict=True)
    return [(i, value << exponent) for i, value, gap in pairs if gap < 65535]


def weights(members, averaging):
    """{peer id: weight} by one roster: the largest w with w**b <= n**a * M**(b - a)."""
    samples = {m["peer_id"]: m["samples"] for m in members if "train" in m["roles"]}
    samples = {peer: n for peer, n in samples.items() if n}
    power, cap = Fraction(averaging["weight_power"]), Fraction(averaging["sample_cap"])
    a, b, m = power.numerator, power.denominator, 2**20
    most = cap * sorted(samples.values())[(len(samples) - 1) // 2] if samples and cap else m
    found = {}
    for peer, n in samples.items():
        bound = max(1, min(n, int(most))) ** a * m ** (b - a)
        found[peer] = bisect_right(range(m + 1), bound, key=lambda w: w**b) - 1
    return found


def seated(members, run_id, round_, averaging):
    """Who sits in a round's committee."""

    def lot(peer):
        seed = run_id + round_.to_bytes(8, "little") + peer.encode()
        return blake2b(seed, digest_size=16, person=b"p2pfed-seat").digest()

    training = [m["peer_id"] for m in members if "train" in m["roles"] and m["samples"]]
    return set(sorted(training, key=lot)[: averaging["committee"] or 64])


def counted(data_dir, run_id, averaging):
    """Yield (round, weight, [(index, value)]) of every stored delta that counts."""
    texts = [signed_text(path) for path in sorted(data_dir.glob("rosters/v*.json"))]
    members = {name(text): json.loads(text)["members"] for text in texts}
    tables = {roster: weights(listed, averaging) for roster, listed in members.items()}
    out = [(r["peer_id"], r["from_round"]) for r in json.loads(texts[-1])["revoked"]]
    db = sqlite3.connect(data_dir / "store.db")
    for (proof,) in db.execute("SELECT proof FROM proofs WHERE run_id = ?", (run_id,)):
        _, _, round_, origin, *_ = unpackb(unpackb(proof)[0])
        out.append((origin, round_))
    for row in db.execute("SELECT header, payload FROM deltas WHERE run_id = ?", (run_id,)):
        _, _, round_, origin, roster, *_ = unpackb(row[0])
        weight = tables.get(roster, {}).get(origin, 0)
        is_out = any(origin == who and round_ >= since for who, since in out)
        if weight and not is_out and origin in seated(members[roster], run_id, round_, averaging):
            yield round_, weight, decoded(row[1])
    db.close()


def clip_factors(squares):
    """The largest a <= 2**16 with a**2 n <= 2**32 median, for each squared norm n."""
    norms = sorted(n for n in squares if n)
    median = norms[(len(norms) - 1) // 2] if norms else 0
    steps = range(2**16 + 1)
    return [bisect_right(steps, 2**32 * median, key=lambda a, n=n: a * a * n) - 1 for n in squares]


def mean_of(deltas, size, run):
    """The mean delta of a round, in units of the parameters."""
    factors = [2**16] * len(deltas)
    if run["robust"] == "clip-median":
        factors = clip_factors([sum(v * v for _, v in pairs) for _, pairs in deltas])
    sums, total = [0] * size, 2**16 * sum(weight for weight, _ in deltas)
    for (weight, pairs), factor in zip(deltas, factors, strict=True):
        for i, v in pairs:
            sums[i] += weight * factor * v
    return [float(s) / float(total << run["grid_bits"]) for s in sums]


def second_moment(outer, old, square):
    b2 = outer["beta2"]
    if outer["name"] == "fedadagrad":
        return old + square
    if outer["name"] == "fedadam":
        return old * b2 + square * (1 - b2)
    return old - square * (1 - b2) * ((old > square) - (old < square))


def reference_fold(genesis, rounds, run):
    """The model after all rounds, as integers.

    Args:
        genesis: Floats.
        rounds: For each round [(weight, [(index, value)])].
        run: The run file as a dictionary.
    """
    outer, grid = run["outer"][0], 2.0 ** run["grid_bits"]
    b1, b2, p1, p2 = outer["beta1"], outer["beta2"], 1.0, 1.0
    adaptive = outer["name"] != "fedavg"
    corrected = outer["bias_correction"] and outer["name"] in {"fedadam", "fedyogi"}
    model = [round(x * grid) for x in genesis]
    first, second = [0.0] * len(model), [0.0] * len(model)
    for deltas in rounds:
        if not deltas:
            continue
        p1, p2 = p1 * b1, p2 * b2
        root = sqrt(1 - p2) if corrected else 1.0
        rate = outer["learning_rate"] * root / (1 - p1 if corrected else 1.0)
        for i, step in enumerate(mean_of(deltas, len(model), run)):
            if adaptive:
                first[i] = first[i] * b1 + step * (1 - b1)
                second[i] = second_moment(outer, second[i], step * step)
                step = first[i] / (sqrt(second[i]) + outer["epsilon"] * root)  # noqa: PLW2901
            moved = round(step * rate * grid)
            model[i] = max(-(2**31), min(2**31 - 1, model[i] + moved))
    return model


def model_name(model):
    return name(struct.pack(f"<{len(model)}i", *model)).hex()


def reference_hash(data_dir, rounds=None):
    """Hash of the model after `rounds` rounds (default: all), from what one node has stored."""
    text = signed_text(next(data_dir.glob("runs/*.json")))
    run = json.loads(text)
    everything = list(counted(data_dir, name(text), run["averaging"][0]))
    genesis = (data_dir / "blobs" / run["genesis"]).read_bytes()
    floats = struct.iter_unpack("<f", genesis[8 + int.from_bytes(genesis[:8], "little") :])
    folded = [
        [(weight, pairs) for round_, weight, pairs in everything if round_ == r]
        for r in range(run["rounds"] if rounds is None else rounds)
    ]
    return model_name(reference_fold([x for (x,) in floats], folded, run))
