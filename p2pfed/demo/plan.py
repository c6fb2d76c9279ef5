"""Who takes part in the demo, on what data, with which constants.

Two casts: five hospitals on the Wisconsin breast cancer data (the default), or the four hospitals
of the UCI heart disease data and a bootstrap-only node. The run constants are public choices, made
on simulated federations of the same tasks; none is taken from a hospital's patients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from p2pfed.errors import ConfigError
from p2pfed.identity.run import Outer

__all__ = [
    "ROUNDS",
    "ROUNDS_WITHOUT",
    "Cast",
    "Hospital",
    "breast_cancer",
    "heart_disease",
    "run_constants",
]

ROUNDS = 40  # with the gate; the budget is spread over them
ROUNDS_WITHOUT = 30


@dataclass(frozen=True, slots=True)
class Hospital:
    """One node of the demo.

    Attributes:
        name: Its name, also that of its folder.
        samples: Patients that it trains on, public; 0 for a node without data.
        options: The task's options for it.
    """

    name: str
    samples: int
    options: dict[str, str | int] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it has data."""
        return self.samples > 0


@dataclass(frozen=True, slots=True)
class Cast:
    """All that differs between the two demos.

    Attributes:
        task: Name of the task.
        data: Folder of the data, or None.
        hospitals: Five nodes; the first is the bootstrap peer.
        killed: Who is killed with SIGKILL and comes back.
        late: Who joins late.
        leaver: Who leaves for good.
    """

    task: str
    data: Path | None
    hospitals: tuple[Hospital, ...]
    killed: str
    late: str
    leaver: str

    def hospital(self, name: str) -> Hospital:
        """The hospital with this name."""
        return next(h for h in self.hospitals if h.name == name)


def breast_cancer() -> Cast:
    """Five hospitals of unequal size on the data that scikit-learn carries."""
    from p2pfed.tasks.breast_cancer import BreastCancer  # noqa: PLC0415 - torch, only when needed

    names = ("Ashford", "Birchwood", "Cedar Hill", "Dunmore", "Elmsley")
    hospitals = []
    for site, name in enumerate(names):
        options: dict[str, str | int] = {"site": site, "sites": len(names)}
        patients = BreastCancer().data(None, options).train.num_patients
        hospitals.append(Hospital(name, patients, options))
    return Cast("breast-cancer", None, tuple(hospitals), "Birchwood", "Elmsley", "Dunmore")


def heart_disease(folder: Path) -> Cast:
    """The four hospitals of the UCI heart disease data and a bootstrap-only node.

    Raises:
        ConfigError: The folder does not hold the four files.
    """
    from p2pfed.tasks.heart_disease import HeartDisease  # noqa: PLC0415 - torch, only when needed

    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder",
            "the demo looks there for processed.cleveland.data and three more files",
            "leave --data out for the data that comes with scikit-learn",
        )
    hospitals = [Hospital("Bootstrap", 0)]
    for site in ("cleveland", "hungarian", "switzerland", "va"):
        patients = HeartDisease().data(folder, {"site": site}).train.num_patients
        name = "VA" if site == "va" else site.capitalize()
        hospitals.append(Hospital(name, patients, {"site": site}))
    return Cast("heart-disease", folder, tuple(hospitals), "Hungarian", "Switzerland", "VA")


def run_constants(mechanism: str, *, rounds: int, epsilon: Fraction) -> dict[str, Any]:
    """The constants of a demo run that do not come from the network or the task."""
    private = mechanism != "none"
    return {
        "rounds": rounds,
        "grid_bits": 14,
        "mechanism": mechanism,
        "unit": "patient" if private else "none",
        "epsilon": epsilon if private else Fraction(0),
        "delta": Fraction(1, 100_000) if private else Fraction(0),
        "clip": Fraction(1),
        "block_size": 1,
        "segment_blocks": 2,
        "select_share": Fraction(1, 5),
        "top_fraction": Fraction(1),
        "outer": Outer("fedadam", 0.05) if private else Outer("fedavg", 1.0),
        "robust": "none",  # five honest hospitals; clipping to the median costs the large ones
        "quorum": 0.8,
        "min_live": 0.5,
        "deadline_s": 10.0,
        "min_round_interval_s": 1.0 if private else 0.2,  # the story needs time to happen in
    }
