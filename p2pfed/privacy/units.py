"""The unit of privacy: who is protected, and from which neighbouring data sets.

Map: `Unit` (whom, and how far one may move the sum) -> `Contributions` (one row per patient, per
group of patients or per hospital).

Neighbouring relations (`Unit.neighbours`). One row per patient: *zero-out*, one patient's whole
contribution is replaced by zeros. Several patients per row: removing one changes the group's row to
another one of the same bound, so the sum moves by 2 C, not C. Hospital: its whole row is replaced
by any other, 2 C as well; that covers a change of any number of its patients, so debits for a
hospital count for its patients too. The number of patients is public.

Not here: clipping and summing the rows (`clipping`), noise, budgets, how a row is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["HOSPITAL", "PATIENT", "Contributions", "PatientRows", "PrivacyUnit", "Unit"]

PrivacyUnit = Literal["patient", "hospital"]


@dataclass(frozen=True, slots=True)
class Unit:
    """Who is protected, and what neighbouring data sets are.

    Attributes:
        kind: "patient" or "hospital".
        patients_per_row: Patients whose records make one contribution together; 1 for a hospital,
            which makes one contribution whatever its size.

    Raises:
        ValueError: A hospital with groups of patients, or a group without patients.
    """

    kind: PrivacyUnit
    patients_per_row: int = 1

    def __post_init__(self) -> None:
        if self.patients_per_row < 1 or (self.kind == "hospital" and self.patients_per_row != 1):
            raise ValueError(f"patients_per_row={self.patients_per_row} for unit {self.kind!r}")

    @property
    def moves(self) -> int:
        """How many times the clipping bound a neighbour moves the sum: 1 or 2."""
        return 1 if self.kind == "patient" and self.patients_per_row == 1 else 2

    @property
    def neighbours(self) -> str:
        """The neighbouring relation, in words."""
        if self.kind == "hospital":
            return "replacement: the hospital's whole contribution is replaced by any other"
        if self.patients_per_row == 1:
            return (
                "zero-out: one patient's whole contribution is replaced by zeros; "
                "the number of patients is public"
            )
        return (
            f"replacement: one patient of a group of {self.patients_per_row} changes the group's "
            "contribution to any other; the number of patients is public"
        )


PATIENT: Final = Unit("patient")
HOSPITAL: Final = Unit("hospital")


class Contributions(Protocol):
    """One row per patient, readable more than once.

    Row i must be a function of patient i's data and of public facts only (the round's public
    model, fresh optimiser state): the privacy guarantee rests on this. The two readings need not
    agree to the bit, for each is clipped on its own. For groups of patients and for the unit
    "hospital" read "the group" and "the hospital" for "patient i".
    """

    @property
    def num_patients(self) -> int:
        """How many rows there are in all; public."""
        ...

    @property
    def num_parameters(self) -> int:
        """The length D of each row."""
        ...

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows as arrays (N, D), in any chunking."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PatientRows:
    """Contributions that are all in memory.

    Attributes:
        rows: (patients, parameters) floats.
    """

    rows: NDArray[np.floating[Any]]

    @property
    def num_patients(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    @property
    def num_parameters(self) -> int:
        """The length of each row."""
        return int(self.rows.shape[1])

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield all rows at once."""
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, refused later
            rows_ND = self.rows.astype(np.float32, copy=False)
        yield rows_ND
