"""Patients in a table: one CSV file with features, a label and whose record it is.

Invariant: a row becomes a record by that row and public constants alone, and who tests follows from
a hash of the patient's name: no patient moves another one's record. A mistake is told by its line
and column, never by the value.

Not here: a model (see `p2pfed task new --template tabular`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from p2pfed.errors import ConfigError
from p2pfed.tasks.sites import is_test
from p2pfed.training.task import Split, TaskData

__all__ = ["read_table"]

Scales = Mapping[str, tuple[float, float]]
_Record = tuple[list[float], float]
_FILE = "patients.csv"


def read_table(
    folder: Path | None, features: Scales, *, label: str = "label", patient: str = "patient"
) -> TaskData[Split]:
    """The patients of `patients.csv` in a folder.

    Args:
        folder: `train.data`; it may also name the file itself.
        features: Column -> centre and scale, public constants (of the literature, of the
            consortium); x is (value - centre) / scale.
        label: Column of the target, a number.
        patient: Column of the patient's stable name (the record number); a patient may have
            several rows.

    Returns:
        x (N, features) and y (N,), float32. About a fourth of the patients test.

    Raises:
        ConfigError: No such file, a column is missing, a field holds no number, or one of the two
            parts is empty.
    """
    rows = _rows(folder, [*features, label, patient])
    parts: dict[bool, dict[str, list[_Record]]] = {False: {}, True: {}}
    for number, row in enumerate(rows, start=2):  # line 1 names the columns
        values = [
            (_number(row, column, number) - centre) / scale
            for column, (centre, scale) in features.items()
        ]
        name = (row[patient] or "").strip()
        if not name:
            raise ConfigError(f"train.data: line {number} of the table names no {patient}")
        record = (values, _number(row, label, number))
        parts[is_test(name.encode())].setdefault(name, []).append(record)
    if not all(parts.values()):
        raise ConfigError(
            f"the table has no patient who {'tests' if parts[False] else 'trains'}",
            "who tests follows from a hash of the name: with few patients it may be nobody",
            "add patients",
        )
    return TaskData(train=_split(parts[False]), test=_split(parts[True]))


def _rows(folder: Path | None, columns: list[str]) -> list[dict[str, str | None]]:
    if folder is None:
        raise ConfigError("train.data is missing", f"it must name the folder of {_FILE}")
    path = folder / _FILE if folder.is_dir() else folder
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            there = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}", type(error).__name__) from error
    missing = [column for column in columns if column not in there]
    if missing:
        raise ConfigError(
            f"{path.name} has no column {missing[0]!r}",
            f"the task reads {', '.join(columns)}",
            "the first line must name the columns, with commas between",
        )
    return rows


def _number(row: Mapping[str, str | None], column: str, line: int) -> float:
    try:
        value = float(row[column] or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"train.data: line {line} of the table holds no number in {column}",
            "every record needs all of them",
            "drop the line, or fill the field in with a public constant",
        )
    return value


def _split(patients: Mapping[str, list[_Record]]) -> Split:
    records = [record for each in patients.values() for record in each]
    owners = [owner for owner, each in enumerate(patients.values()) for _ in each]
    return Split(
        x=torch.tensor([values for values, _ in records], dtype=torch.float32),
        y=torch.tensor([target for _, target in records], dtype=torch.float32),
        patient=torch.tensor(owners),
        patient_ids=tuple(name.encode() for name in patients),
    )
