"""The parts of a run file: the privacy gate, encoding, averaging, the outer optimiser.

Each is a frozen value with defaults that need no thought, read and written as one JSON object. What
the rules mean is told where they are carried out: `gossip/outer.py`, `gossip/robust.py`,
`gossip/weights.py`, `gossip/rounds.py`, `gossip/pairwise.py`, `wire/payload.py`,
`training/local.py`, and `units.py`, `clipping.py`, `svt.py` and `worth.py` in `privacy/`.

Invariant: what `read` returns is within bounds; rules that contradict each other, or the run's
mechanism, are refused by `Run`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from p2pfed.errors import FactRejected
from p2pfed.identity.fields import Fields

__all__ = [
    "MODES",
    "OUTERS",
    "ROBUST",
    "SCHEDULES",
    "Averaging",
    "Encoding",
    "Gate",
    "Outer",
    "decimal",
]

OUTERS = ("fedavg", "fedadam", "fedyogi", "fedadagrad")
ROBUST = ("clip-median", "centred-clipping", "nearest-neighbour-mixing", "none")
MODES = ("set", "pairwise")
SCHEDULES = ("auto", "segmented", "sequential")  # of the sparse vector technique
VALUES = ("int16", "int8")
WEIGHT_POWERS = (Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1))
MIN_EPSILON = 1e-12  # keeps the root of the adaptive optimisers away from 0


@dataclass(frozen=True, slots=True)
class Outer:
    """The outer optimiser that every node applies to the round's mean delta.

    Attributes:
        name: `fedavg` (plain step), or one of Reddi et al. 2021 (arXiv:2003.00295, Algorithm 2):
            `fedadam`, `fedyogi`, `fedadagrad`.
        learning_rate: Step; 1.0 makes `fedavg` the classic sample-weighted average.
        beta1: Decay of the first moment; used by the adaptive ones.
        beta2: Decay of the second moment; used by `fedadam` and `fedyogi`.
        epsilon: Added to the root of the second moment (tau in the paper).
        bias_correction: Divide the moments by 1 - beta**t (Kingma and Ba 2015, Algorithm 1); the
            paper's own algorithm does not. Used by `fedadam` and `fedyogi`.
    """

    name: str
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-6
    bias_correction: bool = True

    @property
    def is_adaptive(self) -> bool:
        """Whether it keeps moments."""
        return self.name != "fedavg"

    @classmethod
    def read(cls, fields: Fields) -> Outer:
        """Read it from a run file.

        Raises:
            FactRejected: Malformed or out of bounds.
        """
        outer = cls(
            name=fields.one_of("name", OUTERS),
            learning_rate=fields.number("learning_rate", low=0.0, high=1e3),
            beta1=fields.number("beta1", low=0.0, high=1.0),
            beta2=fields.number("beta2", low=0.0, high=1.0),
            epsilon=fields.number("epsilon", low=0.0, high=1.0),
            bias_correction=fields.flag("bias_correction"),
        )
        fields.done()
        return outer

    def encode(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    def check(self) -> None:
        """Refuse constants under which the step could divide by zero.

        Raises:
            FactRejected: They are such.
        """
        stable = self.beta1 < 1 and self.beta2 < 1 and self.epsilon >= MIN_EPSILON
        if self.is_adaptive and not stable:
            raise FactRejected(
                f"{self.name} needs beta1 < 1, beta2 < 1 and epsilon >= {MIN_EPSILON}",
                "it would divide by zero, and hospitals would no longer hold the same model",
            )


@dataclass(frozen=True, slots=True)
class Gate:
    """What the privacy gate of every hospital does, beyond mechanism, budget and clip.

    Attributes:
        patients_per_row: Patients that make one contribution together. Above 1 one patient may
            change a whole contribution into another, so the noise doubles.
        schedule: How `svt` goes through the blocks; `auto` takes the cheaper way.
        block_reach: In the sequential schedule (and for `svt-textbook`, whose blocks are single
            numbers) a contribution's block is clipped to this many times its even share.
        worth_releases: 0, or how many rounds are to be released: then a round is released only if
            its update is worth it, and the budget is spread over these instead of all rounds.
        worth_share: Share of a release's budget that pays for asking.
        worth_ratio: How many times the length of its noise an update must have.
    """

    patients_per_row: int = 1
    schedule: str = "auto"
    block_reach: Fraction = Fraction(2)
    worth_releases: int = 0
    worth_share: Fraction = Fraction(1, 10)
    worth_ratio: Fraction = Fraction(1)

    def relation(self, unit: str) -> str:
        """How neighbouring data sets differ, in one word; `privacy.units` says it in full."""
        if unit == "none":
            return "none"
        return "zero-out" if unit == "patient" and self.patients_per_row == 1 else "replacement"

    @classmethod
    def read(cls, fields: Fields) -> Gate:
        """Read it from a run file.

        Raises:
            FactRejected: Malformed or out of bounds.
        """
        gate = cls(
            patients_per_row=fields.integer("patients_per_row", low=1, high=1 << 20),
            schedule=fields.one_of("schedule", SCHEDULES),
            block_reach=fields.fraction("block_reach", low=Fraction(1, 100), high=Fraction(10**6)),
            worth_releases=fields.integer("worth_releases", low=0, high=1_000_000),
            worth_share=fields.fraction("worth_share", low=Fraction(0), high=Fraction(1)),
            worth_ratio=fields.fraction("worth_ratio", low=Fraction(0), high=Fraction(1000)),
        )
        fields.done()
        return gate

    def encode(self) -> dict[str, Any]:
        """As a JSON object."""
        texts = ("block_reach", "worth_share", "worth_ratio")
        return {**asdict(self), **{name: decimal(getattr(self, name)) for name in texts}}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a delta is written.

    Attributes:
        values: `int16`, or `int8`: eight significant bits with one exponent per delta.
        error_feedback: What top-k or int8 left out is added to the next round's update (Seide et
            al. 2014; Karimireddy et al. 2019, arXiv:1901.09847). Only with mechanism `none`: under
            noise it feeds noise back, and it remembers patients from round to round.
    """

    values: str = "int16"
    error_feedback: bool = False

    @classmethod
    def read(cls, fields: Fields) -> Encoding:
        """Read it from a run file.

        Raises:
            FactRejected: Malformed or out of bounds.
        """
        encoding = cls(
            values=fields.one_of("values", VALUES), error_feedback=fields.flag("error_feedback")
        )
        fields.done()
        return encoding

    def encode(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Averaging:
    """Who is averaged with whom, and with what weight.

    Attributes:
        mode: `set` (the model is a fold of all deltas, the same everywhere) or `pairwise` (random
            pairs average their models; only with mechanism `none`).
        weight_power: A member with n samples weighs n**p; 0, 0.25, 0.5, 0.75 or 1.
        sample_cap: n counts at most as this many times the roster's median; 0 is no cap.
        committee: How many members release in a round; 0 means all up to 64 and 64 beyond.
        participation_scaling: A member that took part in a share q of the last rounds scales its
            delta by min(4, 1/q). Helps only at small learning rates.
        drift_correction: Local steps are corrected by the public mean step (Scaffold, Karimireddy
            et al. 2020, arXiv:1910.06378, without its second message). Dense and without noise.
        hot_rounds: Deltas older than this many rounds are folded in rarely.
        late_interval_s: Seconds between two folds of such old deltas.
        exchanges: Meetings per round that a node starts in `pairwise` mode.
    """

    mode: str = "set"
    weight_power: Fraction = Fraction(1)
    sample_cap: Fraction = Fraction(0)
    committee: int = 0
    participation_scaling: bool = False
    drift_correction: bool = False
    hot_rounds: int = 50
    late_interval_s: float = 900.0
    exchanges: int = 4

    @classmethod
    def read(cls, fields: Fields) -> Averaging:
        """Read it from a run file.

        Raises:
            FactRejected: Malformed or out of bounds.
        """
        averaging = cls(
            mode=fields.one_of("mode", MODES),
            weight_power=fields.fraction("weight_power", low=Fraction(0), high=Fraction(1)),
            sample_cap=fields.fraction("sample_cap", low=Fraction(0), high=Fraction(1000)),
            committee=fields.integer("committee", low=0, high=1024),
            participation_scaling=fields.flag("participation_scaling"),
            drift_correction=fields.flag("drift_correction"),
            hot_rounds=fields.integer("hot_rounds", low=2, high=10_000),
            late_interval_s=fields.number("late_interval_s", low=0.0, high=1e7),
            exchanges=fields.integer("exchanges", low=1, high=64),
        )
        fields.done()
        return averaging

    def encode(self) -> dict[str, Any]:
        """As a JSON object."""
        data = asdict(self)
        data["weight_power"] = decimal(self.weight_power)
        data["sample_cap"] = decimal(self.sample_cap)
        return data

    def check(self) -> None:
        """Refuse weights that cannot be computed in whole numbers.

        Raises:
            FactRejected: The power is not a quarter.
        """
        if self.weight_power not in WEIGHT_POWERS:
            raise FactRejected(
                f"weight_power is {float(self.weight_power)}",
                "weights are computed in whole numbers, exactly",
                "choose 0, 0.25, 0.5, 0.75 or 1",
            )


def decimal(value: Fraction) -> str:
    """A fraction as the decimal that a run file holds.

    Raises:
        FactRejected: It has no short decimal form.
    """
    text = repr(float(value))
    if Fraction(text) != value:
        raise FactRejected(f"{value} is not a short decimal", "write it as e.g. 0.25")
    return text
