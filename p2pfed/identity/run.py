"""The run file: what one training run is, signed by k stewards; its hash is the run id.

It fixes everything that every hospital must share for the fold to be one function: the task and
its genesis vector, the grid, the clip (a public constant, never taken from patients), the privacy
mechanism with its ceiling, the outer optimiser and the rules of the rounds. What a hospital alone
decides (its folder, its device, a lower budget) is in its own configuration.

A hospital accepts a run by name after it was shown `leaving`: what will leave the building.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

from p2pfed.errors import FactRejected
from p2pfed.identity.fields import Fields, encode_payload, read_payload
from p2pfed.identity.roster import Roster
from p2pfed.identity.rules import ROBUST, Averaging, Encoding, Gate, Outer, decimal
from p2pfed.identity.signing import RUN, SignedDocument, fact_hash

__all__ = [
    "MECHANISMS",
    "Averaging",
    "Encoding",
    "Gate",
    "Outer",
    "Run",
    "check_kept_run",
    "check_signed_run",
]

T = TypeVar("T")

KIND = "p2pfed.run/1"
MECHANISMS = ("svt", "svt-textbook", "gaussian", "none")
UNITS = ("patient", "hospital", "none")
MAX_PARAMETERS = 1 << 30
MAX_DELTA_BYTES = 16 << 20  # of one frame, see wire/codec.py
_HEAD_BYTES = 400  # header, signature and framing of one delta, see wire/delta.py
_GAP_BYTES = 2  # in front of each value of a sparse payload, see wire/payload.py
_LONGEST_GAP = 0xFFFF  # each one that is passed over costs an entry


@dataclass(frozen=True, slots=True)
class Run:
    """One training run; see the module docstring.

    Attributes:
        name: What people call the run.
        network_id: The network it belongs to, 32 bytes.
        task: Name of the task as installed at each hospital.
        task_id: Hash of the task's code, hyper-parameters and tensor shapes, 32 bytes.
        genesis: BLAKE2b-256 of the safetensors file with the first model, 32 bytes.
        num_parameters: Length of the flat parameter vector.
        rounds: How many rounds are planned; the budget is spread over them.
        grid_bits: Model and delta values are multiples of 2**-grid_bits.
        mechanism: `svt`, `svt-textbook`, `gaussian` or `none`.
        unit: `patient` or `hospital`; `none` with mechanism `none`.
        epsilon: Ceiling of the whole run per unit; 0 with mechanism `none`.
        delta: Its delta; 0 with mechanism `none`.
        clip: L2 bound C of one contribution.
        block_size: Coordinates per test of the sparse vector technique.
        segment_blocks: At most one block in so many is released.
        select_share: Share of the budget that pays for the selection.
        top_fraction: Share of coordinates sent with mechanisms `none` and `gaussian`.
        outer: The outer optimiser.
        robust: Rule against outliers: `clip-median`, `centred-clipping`,
            `nearest-neighbour-mixing` or `none`.
        quorum: Share of the live weight whose deltas end a round early.
        min_live: Share of the roster's weight that must be alive to start a round.
        deadline_s: Longest wait for a round's deltas, seconds.
        min_round_interval_s: Shortest time between two round starts, seconds.
        gate: What the privacy gates do beyond the above.
        encoding: How deltas are written.
        averaging: Who is averaged with whom, and with what weight.
        run_id: Hash of the payload; not part of it.
    """

    name: str
    network_id: bytes
    task: str
    task_id: bytes
    genesis: bytes
    num_parameters: int
    rounds: int
    grid_bits: int
    mechanism: str
    unit: str
    epsilon: Fraction
    delta: Fraction
    clip: Fraction
    block_size: int
    segment_blocks: int
    select_share: Fraction
    top_fraction: Fraction
    outer: Outer
    robust: str
    quorum: float
    min_live: float
    deadline_s: float
    min_round_interval_s: float
    gate: Gate = field(default_factory=Gate)
    encoding: Encoding = field(default_factory=Encoding)
    averaging: Averaging = field(default_factory=Averaging)
    run_id: bytes = field(default=b"", compare=False)

    @classmethod
    def decode(cls, payload: bytes) -> Run:
        """Read a run file from its signed payload.

        Raises:
            FactRejected: The payload is not a well-formed run file.
        """
        fields = read_payload(payload, KIND)
        zero, one = Fraction(0), Fraction(1)
        run = cls(
            name=fields.text("name", longest=64),
            network_id=fields.hex32("network_id"),
            task=fields.text("task", longest=64),
            task_id=fields.hex32("task_id"),
            genesis=fields.hex32("genesis"),
            num_parameters=fields.integer("num_parameters", low=1, high=MAX_PARAMETERS),
            rounds=fields.integer("rounds", low=1, high=1_000_000),
            grid_bits=fields.integer("grid_bits", low=4, high=24),
            mechanism=fields.one_of("mechanism", MECHANISMS),
            unit=fields.one_of("unit", UNITS),
            epsilon=fields.fraction("epsilon", low=zero, high=Fraction(1000)),
            delta=fields.fraction("delta", low=zero, high=Fraction(1, 100)),
            clip=fields.fraction("clip", low=Fraction(1, 10**6), high=Fraction(10**6)),
            block_size=fields.integer("block_size", low=1, high=1 << 16),
            segment_blocks=fields.integer("segment_blocks", low=1, high=1 << 16),
            select_share=fields.fraction("select_share", low=zero, high=one),
            top_fraction=fields.fraction("top_fraction", low=zero, high=one),
            outer=_read_one(fields, "outer", Outer.read),
            robust=fields.one_of("robust", ROBUST),
            quorum=fields.number("quorum", low=0.0, high=1.0),
            min_live=fields.number("min_live", low=0.0, high=1.0),
            deadline_s=fields.number("deadline_s", low=0.1, high=1e7),
            min_round_interval_s=fields.number("min_round_interval_s", low=0.0, high=1e7),
            gate=_read_one(fields, "gate", Gate.read),
            encoding=_read_one(fields, "encoding", Encoding.read),
            averaging=_read_one(fields, "averaging", Averaging.read),
            run_id=fact_hash(payload),
        )
        fields.done()
        run._check()
        return run

    def encode(self) -> bytes:
        """The payload to be signed; called once by whoever makes the run."""
        self._check()
        data: dict[str, Any] = {
            "type": KIND,
            "name": self.name,
            "network_id": self.network_id.hex(),
            "task": self.task,
            "task_id": self.task_id.hex(),
            "genesis": self.genesis.hex(),
            "num_parameters": self.num_parameters,
            "rounds": self.rounds,
            "grid_bits": self.grid_bits,
            "mechanism": self.mechanism,
            "unit": self.unit,
            "epsilon": decimal(self.epsilon),
            "delta": decimal(self.delta),
            "clip": decimal(self.clip),
            "block_size": self.block_size,
            "segment_blocks": self.segment_blocks,
            "select_share": decimal(self.select_share),
            "top_fraction": decimal(self.top_fraction),
            "outer": [self.outer.encode()],
            "robust": self.robust,
            "quorum": self.quorum,
            "min_live": self.min_live,
            "deadline_s": self.deadline_s,
            "min_round_interval_s": self.min_round_interval_s,
            "gate": [self.gate.encode()],
            "encoding": [self.encoding.encode()],
            "averaging": [self.averaging.encode()],
        }
        return encode_payload(data)

    def _check(self) -> None:
        private = self.mechanism != "none"
        if private != (self.unit != "none"):
            raise FactRejected(
                f"mechanism {self.mechanism!r} with unit {self.unit!r}",
                "a mechanism protects a unit; no mechanism protects none",
            )
        if private and not (self.epsilon > 0 and self.delta > 0):
            raise FactRejected("a private run needs epsilon > 0 and delta > 0")
        if self.mechanism.startswith("svt") and not 0 < self.select_share < 1:
            raise FactRejected("svt needs 0 < select_share < 1", "selection and values both cost")
        self._check_gate()
        self.outer.check()
        self.averaging.check()
        self._check_pairwise()
        self._check_memory()
        if self.message_bytes > MAX_DELTA_BYTES:
            raise FactRejected(
                f"an update of this run may have {self.message_bytes} bytes",
                f"at most {MAX_DELTA_BYTES} fit into one message",
                "release fewer coordinates a round, or choose a smaller model",
            )

    def _check_gate(self) -> None:
        gate = self.gate
        if self.unit != "patient" and gate.patients_per_row != 1:
            raise FactRejected(
                f"patients_per_row {gate.patients_per_row} with unit {self.unit!r}",
                "only patients make contributions in groups",
            )
        if self.mechanism == "gaussian" and not self.top_fraction > 0:
            raise FactRejected("gaussian needs top_fraction > 0", "1 sends every coordinate")
        if not gate.worth_releases:
            return
        if self.mechanism not in {"svt", "gaussian"} or gate.worth_releases > self.rounds:
            raise FactRejected(
                f"worth_releases {gate.worth_releases} of {self.rounds} rounds, mechanism"
                f" {self.mechanism!r}",
                "asking whether a round is worth its budget needs a bound on an update's length",
                "use svt or gaussian, and at most as many releases as rounds",
            )
        if not 0 < gate.worth_share < 1:
            raise FactRejected("0 < worth_share < 1 is needed", "asking and releasing both cost")

    def _check_pairwise(self) -> None:
        if self.averaging.mode != "pairwise":
            return
        if self.mechanism != "none":
            raise FactRejected(
                f"averaging mode 'pairwise' with mechanism {self.mechanism!r}",
                "every meeting of two peers would be one more look at the patients, paid for once"
                " each, and the model of one round would leak through the next",
                "use mode 'set', in which a release happens once, or mechanism 'none'",
            )
        if self.robust != "none" or self.outer.is_adaptive or self.averaging.committee:
            raise FactRejected(
                "averaging mode 'pairwise' with a robust rule, an outer optimiser or a committee",
                "a pair sees two models; these rules are over all deltas of a round",
                "use robust 'none', outer 'fedavg' and committee 0, or mode 'set'",
            )

    def _check_memory(self) -> None:
        """What a hospital remembers from round to round outside the ledger needs no mechanism."""
        if self.encoding.error_feedback and self.mechanism != "none":
            raise FactRejected(
                f"error feedback with mechanism {self.mechanism!r}",
                "what a release left out is not public: the next round would depend on it unpaid",
                "switch error feedback off, or use mechanism 'none'",
            )
        dense = self.mechanism == "none" and self.top_fraction == 1
        if self.averaging.drift_correction and not (dense and self.averaging.mode == "set"):
            raise FactRejected(
                "drift correction with a mechanism, with top_fraction < 1 or in pairs",
                "it compares one's own step with the public mean; noise and sparsity ruin that",
                "switch drift correction off, or use mechanism 'none' with top_fraction 1",
            )

    @property
    def releases(self) -> int:
        """Over how many rounds the budget is spread."""
        return self.gate.worth_releases or self.rounds

    @property
    def cutoff(self) -> int:
        """The most blocks that one update releases under `svt`, or numbers under `svt-textbook`."""
        size = self.block_size if self.mechanism == "svt" else 1
        blocks = -(-self.num_parameters // size)
        return -(-blocks // self.segment_blocks)

    @property
    def max_released(self) -> int:
        """The most coordinates that one delta can carry."""
        if self.mechanism == "svt":
            return min(self.num_parameters, self.cutoff * self.block_size)
        if self.mechanism == "svt-textbook":
            return self.cutoff
        return max(1, -int(-self.num_parameters * self.top_fraction // 1))

    @property
    def bytes_per_round(self) -> int:
        """What leaves in one round: at most one delta, or in pairs about so much.

        A pair's node starts `exchanges` meetings a round and is met about as often.
        """
        meetings = 2 * self.averaging.exchanges if self.averaging.mode == "pairwise" else 1
        return meetings * self.message_bytes

    @property
    def message_bytes(self) -> int:
        """The most bytes that one delta can have, with its header, signature and framing.

        Sparse (an index and a value per coordinate) or dense, whichever is shorter at worst; in
        pairs the whole model with an exponent for every 256 values.
        """
        value = 1 if self.encoding.values == "int8" else 2
        if self.averaging.mode == "pairwise":
            return _HEAD_BYTES + value * self.num_parameters + -(-self.num_parameters // 256)
        entries = self.max_released + self.num_parameters // _LONGEST_GAP
        sparse = (_GAP_BYTES + value) * entries
        return _HEAD_BYTES + min(sparse, value * self.num_parameters)

    def leaving(self, roster: Roster) -> dict[str, Any]:
        """What will leave the building if this run is accepted, for people to read.

        Returns:
            mode, bytes_per_round (most; in pairs about), releases (most), epsilon (whole run),
            epsilon_of_one_round, delta, mechanism, unit, rounds and the names of all members, who
            receive every delta.
        """
        return {
            "mode": self.averaging.mode,
            "bytes_per_round": self.bytes_per_round,
            "coordinates_per_round": self.max_released,
            "num_parameters": self.num_parameters,
            "rounds": self.rounds,
            "releases": self.releases,
            "mechanism": self.mechanism,
            "unit": self.unit,
            "epsilon": float(self.epsilon),
            "epsilon_of_one_round": _epsilon_of_one_round(self),
            "delta": float(self.delta),
            "receivers": [m.name for m in roster.members],
        }


def check_signed_run(signed: bytes, roster: Roster) -> Run:
    """Read a run file that k stewards of `roster` signed, for the roster's network.

    Raises:
        FactRejected: Too few signatures, another network, or malformed.
    """
    document = SignedDocument.parse(signed)
    run = Run.decode(document.payload)
    if run.network_id != roster.network_id:
        raise FactRejected(
            f"run {run.name!r} is of the network {run.network_id.hex()[:16]}…",
            f"this node belongs to {roster.network_id.hex()[:16]}…",
        )
    known = {s.key for s in roster.stewards}
    if len(document.signers(RUN, among=known)) < roster.threshold:
        raise FactRejected(
            f"run {run.name!r} is not signed by {roster.threshold} stewards of the roster",
            "anyone could have written it",
            "ask the stewards to sign it: p2pfed run sign FILE",
        )
    return run


def check_kept_run(signed: bytes, rosters: Iterable[Roster]) -> Run:
    """Read a run file that was accepted earlier: k stewards of any believed roster signed it.

    The stewards may have changed since; what was agreed stays agreed.

    Args:
        signed: The exact bytes of the file.
        rosters: All believed rosters, newest first; at least one.

    Raises:
        FactRejected: No roster vouches for it.
    """
    refusals = []
    for roster in rosters:
        try:
            return check_signed_run(signed, roster)
        except FactRejected as error:
            refusals.append(error)
    raise refusals[0]


def _epsilon_of_one_round(run: Run) -> float:
    """What one round alone costs at the run's delta, about: for people to read.

    The rounds share the run's zCDP equally, rho = (sqrt(epsilon + L) - sqrt(L))**2 / releases with
    L = ln(1/delta), and epsilon = rho + 2 sqrt(rho L) (Bun and Steinke 2016, Proposition 1.3): more
    than epsilon / rounds, because composition is cheaper than its parts.
    """
    if not run.delta:
        return 0.0
    log = -math.log(run.delta)
    rho = (math.sqrt(float(run.epsilon) + log) - math.sqrt(log)) ** 2 / run.releases
    return rho + 2 * math.sqrt(rho * log)


def _read_one(fields: Fields, key: str, read: Callable[[Fields], T]) -> T:
    found = fields.many(key, read, most=1)
    if not found:
        raise FactRejected(f"{KIND}: {key} is empty", "expected a list of one object")
    return found[0]
