"""Heart disease at four hospitals: 13 features, is a coronary artery narrowed by half?

Data: UCI Heart Disease (Janosi, Steinbrunn, Pfisterer, Detrano 1988, CC BY 4.0), the four files
`processed.SITE.data` in `train.data`; `train.options.site` names the hospital. Rows, features and
split are those of the benchmark FLamby (Ogier du Terrail et al. 2022, arXiv:2210.04620): columns
slope, ca and thal dropped, rows with a missing value dropped, 486 patients train and 254 test.

Two things differ from the benchmark, for the guarantee's sake. The normalisation uses the public
constants below, never a hospital's own mean and deviation, which every patient of it moves
(measured, logistic regression on all patients: accuracy .79 with the constants, .74 with each
hospital's own figures). And the split, stratified by label in the benchmark, is written down here
row by row: it is public and fixed. A cholesterol or blood pressure of 0 means
"not measured" and is put at the reference value.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

import torch

from p2pfed.errors import ConfigError
from p2pfed.tasks.logistic import LogisticTask
from p2pfed.training.task import HyperParameters, Options, Split, TaskData

__all__ = ["HeartDisease"]

# Rows of the file; bit i is set where row i is a test patient (FLamby, random_state 43).
TEST_ROWS = {
    "cleveland": (
        303,
        0x27D73800471F06489219A5A80E2150180C29358003E1081203A0ADC05123B9A3CD0405012020,
    ),
    "hungarian": (
        294,
        0x18BA044500620405C8B7A2404425882222C330960722010515001C104C857041D174420110,
    ),
    "switzerland": (123, 0x60000044200402A80440004A80000),
    "va": (200, 0x2A2D1700000180101100601504A960800900D4620900004462),
}
# Column, reference value, scale: round clinical figures for adults sent to angiography.
AGE, SEX, PAIN, PRESSURE, CHOLESTEROL, SUGAR, ECG, RATE, ANGINA, DEPRESSION = range(10)
LABEL = 13
SCALES = (
    (AGE, 55.0, 10.0),  # years
    (SEX, 0.5, 0.5),
    (PRESSURE, 130.0, 20.0),  # mmHg, at rest
    (CHOLESTEROL, 240.0, 60.0),  # mg/dl
    (SUGAR, 0.5, 0.5),  # fasting above 120 mg/dl
    (RATE, 140.0, 25.0),  # beats per minute, the highest under load
    (ANGINA, 0.5, 0.5),  # under load
    (DEPRESSION, 1.0, 1.0),  # mm of ST under load
)
LEVELS = (
    (PAIN, 2.0),
    (PAIN, 3.0),
    (PAIN, 4.0),
    (ECG, 1.0),
    (ECG, 2.0),
)  # the first level is implied
NOT_MEASURED_AS_ZERO = (PRESSURE, CHOLESTEROL)


class HeartDisease(LogisticTask):
    """See the module docstring; option `site`: cleveland, hungarian, switzerland or va."""

    name = "heart-disease"
    num_features = 13
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=10, batch_size=16, learning_rate=0.05
    )

    def data(self, folder: Path | None, options: Options) -> TaskData[Split]:
        """Read one hospital's file; see `Task.data`."""
        site = str(options.get("site", ""))
        if site not in TEST_ROWS:
            raise ConfigError(
                f"train.options.site is {site!r}", f"expected one of {', '.join(TEST_ROWS)}"
            )
        if folder is None:
            raise ConfigError("train.data is missing", "it must name the folder of the UCI files")
        path = folder / f"processed.{site}.data"
        try:
            with path.open(newline="", encoding="ascii") as file:
                rows = [row for row in csv.reader(file) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"cannot read {path}", type(error).__name__) from error
        count, test_bits = TEST_ROWS[site]
        if len(rows) != count or any(len(row) != LABEL + 1 for row in rows):
            raise ConfigError(
                f"{path} is not the published file", f"that has {count} rows of 14 columns"
            )
        used = {i: [*row[: LABEL - 3], row[LABEL]] for i, row in enumerate(rows)}
        complete = {i: _features(row, path, i) for i, row in used.items() if "?" not in row}
        return TaskData(
            train=_split(site, {i: f for i, f in complete.items() if not test_bits >> i & 1}),
            test=_split(site, {i: f for i, f in complete.items() if test_bits >> i & 1}),
        )


def _features(used: list[str], path: Path, row: int) -> list[float]:
    """The 13 features and the label of one row, from that row and constants alone."""
    try:
        raw = [float(value) for value in used]
    except ValueError:
        raise ConfigError(f"{path}: row {row + 1} holds something other than numbers") from None
    features = []
    for column, reference, scale in SCALES:
        missing = column in NOT_MEASURED_AS_ZERO and raw[column] == 0
        features.append(0.0 if missing else (raw[column] - reference) / scale)
    features += [1.0 if raw[column] == level else -1.0 for column, level in LEVELS]
    return [*features, float(raw[-1] > 0)]


def _split(site: str, rows: dict[int, list[float]]) -> Split:
    table = torch.tensor(list(rows.values()), dtype=torch.float32)
    ids = tuple(f"uci-heart-disease/{site}/{row}".encode() for row in rows)
    return Split(table[:, :-1], table[:, -1], torch.arange(len(table)), ids)
