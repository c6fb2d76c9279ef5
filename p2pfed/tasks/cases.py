"""Which files a hospital's imaging cases have, as they lie on disk; which patient, which part.

Map: `find_cases` (a folder -> `Case`s with labels), `unlabelled_cases` (what to predict) ->
`of_site` (made hospitals out of one folder). Four layouts:

* nnU-Net: `dataset.json`, `imagesTr/NAME_0000.nii.gz` (`_0001` is the second channel),
  `labelsTr/NAME.nii.gz`, `imagesTs`; and the Medical Segmentation Decathlon's, one file a case
  without a number;
* `images/NAME.nii.gz` and `labels/NAME.nii.gz`;
* a folder per case: `CASE/image/` with a DICOM series (or `CASE/image.nii.gz`) and
  `CASE/label.nii.gz`; several channels are `image_0000`, `image_0001`;
* for prediction also a folder of NIfTI files, one such file, or one series.

`patients.csv` beside them, with the columns `case,patient` and perhaps `part` (train or test), says
which cases are one patient's; without it each case is a patient, whose name is the case's. Files
whose name begins with a dot are passed over.

Invariant: cases come in the order of their names. A patient has one name in all tasks, networks and
made hospitals (the task's name is no part of it), for the ledger knows a patient by the name alone;
and the part that a patient is in is a function of that name (or written down in `patients.csv`),
never of the other patients.

Not here: reading the files (`scans`, `dicom`, `volumes`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from p2pfed.errors import ConfigError
from p2pfed.tasks.dicom import series_files
from p2pfed.tasks.scans import SUFFIXES
from p2pfed.tasks.sites import is_test

__all__ = ["Case", "find_cases", "of_site", "unlabelled_cases"]

# Goes before a patient's name where a part or a made hospital is drawn. Any constant would do; with
# this one the hospitals that docs/imaging.md measures stay the same.
_DRAWN = b"hippocampus/"


@dataclass(frozen=True, slots=True)
class Case:
    """One examination.

    Attributes:
        name: As its files are called; private.
        images: One file or DICOM folder per channel.
        label: The expert's labels; None where there are none.
        patient: Whose it is: a stable name for the ledger, the same in all tasks.
        test: Whether its patient only tests.
        by_file: Whether nothing but the files' name says whose it is.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: bytes
    test: bool
    by_file: bool = False


def find_cases(folder: Path, *, channels: int, classes: int) -> list[Case]:
    """All cases with labels, in the order of their names.

    Args:
        folder: In one of the layouts of the module docstring.
        channels: How many images each case has.
        classes: How many classes besides the background the task has.

    Raises:
        ConfigError: None of the layouts, an image without label or the other way round, a channel
            is missing, or `dataset.json` or `patients.csv` is wrong.
    """
    if not folder.is_dir():
        raise ConfigError(f"train.data: {folder} is not a folder")
    described = folder / "dataset.json"
    if described.is_file():
        endings = _check_description(described, channels=channels, classes=classes)
        found = _pairs(folder / "imagesTr", folder / "labelsTr", endings, channels)
    elif (folder / "images").is_dir():
        found = _pairs(folder / "images", folder / "labels", SUFFIXES, channels)
    else:
        found = _folders(folder, channels)
    if not found:
        raise ConfigError(
            f"train.data: no case in {folder}",
            "neither nnU-Net's folders, images/ and labels/, nor CASE/image and CASE/label.nii.gz",
        )
    _check_complete(found, channels)
    cases = [
        Case(name, images, label, os.fsencode(name), test=False, by_file=True)
        for name, (images, label) in sorted(found.items())
    ]
    return _with_patients(cases, folder / "patients.csv")


def unlabelled_cases(source: Path, *, channels: int) -> dict[str, tuple[Path, ...]]:
    """What to predict: the images of each case by its name, in order.

    Args:
        source: A NIfTI file, a DICOM series' folder, a folder of NIfTI files (nnU-Net's names where
            there are several channels), or any folder that `find_cases` takes; of nnU-Net's,
            `imagesTs` where it is there.
        channels: How many images each case has.

    Raises:
        ConfigError: There is none, or a channel is missing.
    """
    if _ending(source, SUFFIXES) and source.is_file() and channels == 1:
        return {_stem(source, SUFFIXES): (source,)}
    if not source.is_dir():
        raise ConfigError("nothing to predict", "neither a NIfTI file nor a folder")
    for inner in ("imagesTs", "imagesTr", "images"):
        if (source / inner).is_dir():
            source = source / inner
            break
    found = {name: images for name, (images, _) in _folders(source, channels).items() if images}
    if not found:
        found = _channels_of(source, SUFFIXES, channels)
    if not found and channels == 1 and series_files(source):
        found = {source.name: (source,)}
    if not found or any(len(images) != channels for images in found.values()):
        raise ConfigError(
            "nothing to predict, or channels are missing", f"the task takes {channels} per case"
        )
    return dict(sorted(found.items()))


def of_site(cases: Sequence[Case], site: int, sites: int) -> list[Case]:
    """The cases of one of several made hospitals, whose sizes fall threefold to the last.

    Those who train and those who test are each put in the order of a hash of their names and cut
    by number; a patient has all his cases in one place. This makes hospitals out of a public
    folder; a real one has its own.

    Args:
        cases: Of the whole folder.
        site: Which one, 0..sites-1.
        sites: How many.

    Raises:
        ConfigError: There are fewer patients that train, or that test, than hospitals.
    """
    mine: set[bytes] = set()
    for test in (False, True):
        names = {c.patient for c in cases if c.test == test}
        patients = sorted(names, key=lambda p: (_draw(_DRAWN + p, b"p2pfed-site"), p))
        if len(patients) < sites:
            raise ConfigError(
                f"train.options.sites is {sites}",
                f"{len(patients)} patients {'test' if test else 'train'}: one for each at least",
                "make fewer hospitals of the folder",
            )
        ends = _ends(len(patients), sites)
        mine |= set(patients[ends[site] : ends[site + 1]])
    return [case for case in cases if case.patient in mine]


def _ends(count: int, sites: int) -> list[int]:
    """Where to cut so many patients; no part is empty, and the first is three times the last."""
    weights = [3 * (sites - 1) - 2 * k for k in range(sites)] if sites > 1 else [1]
    sums = [sum(weights[:k]) for k in range(sites + 1)]
    ends = [count * s // sums[-1] for s in sums]
    if all(low < high for low, high in pairwise(ends)):
        return ends
    return [k + (count - sites) * s // sums[-1] for k, s in enumerate(sums)]


def _draw(name: bytes, purpose: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=purpose).digest(), "big")


Found = dict[str, tuple[tuple[Path, ...], Path | None]]


def _check_description(path: Path, *, channels: int, classes: int) -> tuple[str, ...]:
    """Compare nnU-Net's `dataset.json` with the task; its file ending, or the usual ones."""
    try:
        facts: Any = json.loads(path.read_text("utf-8"))
        names = facts.get("channel_names", facts.get("modality", {}))
        labels: Mapping[str, Any] = facts.get("labels", {})
        ending = facts.get("file_ending")
        counts = len(names) or channels, len(labels) or classes + 1
        numbered = not labels or _are_numbers_from_zero(labels)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is not nnU-Net's", type(error).__name__) from None
    if counts != (channels, classes + 1):
        raise ConfigError(
            f"{path} describes {counts[0]} channels and {counts[1]} labels",
            f"the task takes {channels} and {classes + 1}, the background counted",
        )
    if not numbered:
        raise ConfigError(
            f"{path}: the labels are not the numbers 0 to {classes}, one each",
            "regions, which are lists of several numbers, are not trained here",
            "write labels that exclude each other, numbered without a gap",
        )
    if ending is not None and ending not in SUFFIXES:
        raise ConfigError(f"{path} names another file_ending", f"read are {', '.join(SUFFIXES)}")
    return (ending,) if ending else SUFFIXES


def _are_numbers_from_zero(labels: Mapping[str, Any]) -> bool:
    """Whether labels are 0, 1, …: as values (nnU-Net) or as keys (its first version, Decathlon)."""
    numbers, values = set(range(len(labels))), list(labels.values())
    if set(labels) == set(map(str, numbers)):
        return True
    return all(type(value) is int for value in values) and set(values) == numbers


def _pairs(images: Path, labels: Path, endings: Sequence[str], channels: int) -> Found:
    if not images.is_dir() or not labels.is_dir():
        raise ConfigError(f"train.data lacks {images.name} or {labels.name}", str(images.parent))
    experts = {_stem(p, endings): p for p in _files(labels, endings)}
    found: Found = {
        name: (files, experts.pop(name, None))
        for name, files in _channels_of(images, endings, channels).items()
    }
    return found | {name: ((), path) for name, path in experts.items()}


def _channels_of(
    folder: Path, endings: Sequence[str], channels: int
) -> dict[str, tuple[Path, ...]]:
    """The images of each case: NAME_0000, NAME_0001 …, or NAME where there is one channel only."""
    files = {_stem(path, endings): path for path in _files(folder, endings)}
    numbered: dict[str, tuple[Path, ...]] = {}
    for stem in files:
        if stem.endswith("_0000"):
            name = stem[: -len("_0000")]
            parts = [files.get(f"{name}_{c:04d}") for c in range(channels)]
            numbered[name] = tuple(part for part in parts if part is not None)
    if numbered or channels > 1:
        return numbered
    return {stem: (path,) for stem, path in files.items()}


def _folders(folder: Path, channels: int) -> Found:
    """One folder per case."""
    stems = ["image"] if channels == 1 else [f"image_{c:04d}" for c in range(channels)]
    found: Found = {}
    for case in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        label = next((case / f"label{e}" for e in SUFFIXES if (case / f"label{e}").is_file()), None)
        options = ([case / stem, *(case / f"{stem}{e}" for e in SUFFIXES)] for stem in stems)
        chosen = [next((p for p in paths if p.exists()), None) for paths in options]
        images = tuple(path for path in chosen if path is not None)
        if images or label:
            found[case.name] = (images, label)
    return found


def _check_complete(found: Found, channels: int) -> None:
    lonely = sum(label is None for _, label in found.values())
    if lonely:
        raise ConfigError(
            "train.data: there are cases without a label",
            "each needs one to train or to test with",
            "label them, or move their images elsewhere",
        )
    short = sum(len(images) != channels for images, _ in found.values())
    if short:
        raise ConfigError(
            "train.data: there are cases that lack an image or a channel of it",
            f"the task takes {channels} per case",
        )


def _with_patients(cases: Sequence[Case], table: Path) -> list[Case]:
    if not table.is_file():
        return [replace(case, test=is_test(_DRAWN + case.patient)) for case in cases]
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
            rows = {row["case"]: row for row in csv.DictReader(file)}
        patients = {name: row["patient"].strip() for name, row in rows.items()}
        parts = {patients[name]: (row.get("part") or "").strip() for name, row in rows.items()}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError) as error:
        raise ConfigError(
            f"cannot read {table}", type(error).__name__, "its columns are case,patient[,part]"
        ) from None
    if any(parts[patients[name]] != (row.get("part") or "").strip() for name, row in rows.items()):
        raise ConfigError(f"{table}: a patient is in both parts", "the test would not be one")
    if any(not patients.get(case.name) for case in cases):
        raise ConfigError(f"{table}: a case has no patient", "each case of the folder needs a line")
    if set(parts.values()) - {"", "train", "test"}:
        raise ConfigError(f"{table}: a part is neither train nor test")

    def of(case: Case) -> Case:
        name = patients[case.name].encode()
        part = parts[patients[case.name]]
        test = part == "test" if part else is_test(_DRAWN + name)
        return replace(case, patient=name, test=test, by_file=False)

    return [of(case) for case in cases]


def _files(folder: Path, endings: Sequence[str]) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and _ending(p, endings))


def _ending(path: Path, endings: Sequence[str]) -> str:
    """Which of these the name ends with; "" for none, and for hidden files."""
    if path.name.startswith("."):
        return ""
    return next((ending for ending in endings if path.name.endswith(ending)), "")


def _stem(path: Path, endings: Sequence[str]) -> str:
    return path.name[: -len(_ending(path, endings))]
