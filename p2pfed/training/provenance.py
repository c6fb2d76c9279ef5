"""What a model file says of where it comes from, read with care.

The facts are those of `GET /v1/model`: the daemon takes them from signed documents and from what it
has folded. A file itself is not signed, and may come from anywhere: so each fact is checked for its
kind and its length here, and whoever shows one escapes it. Two hospitals know that they hold the
same model by comparing `model_hash`.

Not here: tensors (`model_file`), the text that people read (`card`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from p2pfed.errors import ConfigError

__all__ = ["Kind", "Provenance"]

Kind = Literal["common", "exported", "mine", "tuned"]
_KINDS = ("common", "exported", "mine", "tuned")

FORMAT = 1  # of the facts; see node/provenance.py
_LONGEST_TEXT = 300
_MOST_FACTS = 1 << 22  # bytes of JSON; a thousand hospitals take 60 kB
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a model comes from; see the module docstring.

    Attributes:
        kind: common: the flat vector as the daemon gives it; exported: its tensors by name; mine:
            these and what stays at this hospital; tuned: fine-tuned on this hospital's patients.
            The last two are functions of patients that nothing protects.
        task: As the run names it.
        task_id: 64 hexadecimal digits.
        run: Its name.
        run_id: 64 hexadecimal digits.
        round: The model before this round: so many rounds are in it.
        rounds: How many the run has.
        deltas: How many updates of each hospital are in the model; None where not known.
        deltas_known_from: Updates of earlier rounds are in it too, but were not counted.
        model_hash: Of the common model; 64 hexadecimal digits.
        chain: Stands for the set of facts that the model was folded from; 64 hexadecimal digits.
        averaging: The run's mode.
        mechanism: How updates were protected; "none": not at all.
        unit: Who was protected.
        relation: What "one more or less" means for it.
        epsilon: The run's ceiling, for each hospital on its own.
        delta: The same.
        spent_epsilon: Of the hospital that gave the file, so far.
        releases: Of that hospital.
        network: Name of the consortium.
        network_id: 64 hexadecimal digits.
        roster_version: In force when the file was made.
        roster_hash: 64 hexadecimal digits, or "" where there was none.
        node: Name of the hospital that gave the file.
        peer_id: Its peer id.
        p2pfed: Its version of this program.
        tuning: How a tuned model was made; "" for others.
    """

    kind: Kind
    task: str
    task_id: str
    run: str
    run_id: str
    round: int
    rounds: int
    deltas: Mapping[str, int] | None
    deltas_known_from: int
    model_hash: str
    chain: str
    averaging: str
    mechanism: str
    unit: str
    relation: str
    epsilon: float
    delta: float
    spent_epsilon: float
    releases: int
    network: str
    network_id: str
    roster_version: int
    roster_hash: str
    node: str
    peer_id: str
    p2pfed: str
    tuning: str = ""

    @classmethod
    def parse(cls, text: str | None, *, name: str) -> Provenance:
        """Read the facts of a file.

        Args:
            text: The file's metadata `p2pfed`; None where it has none.
            name: The file, for the text of an error.

        Raises:
            ConfigError: There are none, or one of them is not what it should be.
        """
        if text is None:
            raise ConfigError(
                f"{name} does not say which task and run it belongs to",
                "it was not made by p2pfed model fetch, export or tune",
                "fetch the common model: p2pfed model fetch -o FILE",
            )
        try:
            facts = json.loads(text) if len(text) <= _MOST_FACTS else None
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise _unlike(name, "they are no JSON object")
        if facts.get("v", FORMAT) != FORMAT:
            raise _unlike(name, "they are of another version of p2pfed")
        taken = {key: facts.get(key, default) for key, default in (("kind", "common"), _UNTUNED)}
        for key, fits in _FACTS.items():
            value = taken.setdefault(key, facts.get(key))
            if not fits(value):
                raise _unlike(name, f"{key} is missing, or is not what it should be")
        return cls(**taken)

    def as_json(self) -> str:
        """The metadata `p2pfed` of a file that is made of this one."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def short(self) -> str:
        """One line for people; not escaped."""
        kind = {"tuned": "model tuned here", "mine": "model with what stays here"}
        what = kind.get(self.kind, "common model")
        return f"{what}, run {self.run} after {self.round} of {self.rounds} rounds"


def _unlike(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"{name} does not say where it comes from in a way that can be read",
        why,
        "fetch it anew: p2pfed model fetch -o FILE",
    )


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT


def _hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _counts(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(_text(k) and _count(v) for k, v in value.items())


_UNTUNED = ("tuning", "")
_FACTS: Mapping[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in _KINDS,
    **dict.fromkeys(("task_id", "run_id", "model_hash", "chain", "network_id"), _hash),
    "roster_hash": lambda value: value == "" or _hash(value),
    **dict.fromkeys(("task", "run", "averaging", "mechanism", "unit", "relation"), _text),
    **dict.fromkeys(("network", "node", "peer_id", "p2pfed", "tuning"), _text),
    **dict.fromkeys(("round", "rounds", "deltas_known_from", "releases"), _count),
    "roster_version": _count,
    **dict.fromkeys(("epsilon", "delta", "spent_epsilon"), _amount),
    "deltas": _counts,
}
