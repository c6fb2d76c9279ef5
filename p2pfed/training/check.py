"""A dry run of a task on the hospital's own data, so that what is wrong is told beforehand.

Map: `Subject` (which task, on what) -> `check`, which goes through `check_steps.STEPS` and tells
one message after the other: which step it is at, how far that is, and the `Row`s that it found.

Invariant: nothing leaves. There is no network, no ledger and no release here, and what is found
(losses, metrics, the labels' range) is for the hospital's own terminal. Whatever a task raises
becomes a row, `SystemExit` included; what ends the whole process or never ends is left to who
started it (cli/check_task), which knows from the messages at which step that was.

Not here: the steps (`check_steps`), the process (`verbs.check`), its end in the command line.
"""

from __future__ import annotations

import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from p2pfed.errors import P2PFedError
from p2pfed.training.hardware import Precision, is_out_of_memory
from p2pfed.training.task import Options
from p2pfed.training.watch import Watch

__all__ = ["Message", "Row", "Status", "Step", "Subject", "Tell", "ToldWatch", "check", "row_of"]

Message = dict[str, Any]
Tell = Callable[[Message], None]
Status = Literal["ok", "warn", "FAIL", "-"]

_PACKAGE = Path(__file__).resolve().parent.parent
_MOST_TEXT = 300  # letters of an error's text
_TOLD_EVERY = 0.1  # seconds between two messages of progress

# Part of an error's text, in small letters -> what to do.
_HINTS = (
    (("out of bounds", "device-side assert", "class values must be"), "labels"),
    (("mat1 and mat2", "to have", "must match the size", "shape", "size mismatch"), "shapes"),
    (("more than 1 value per channel",), "one"),
    (("scalar type", "same dtype", "long but got", "for argument 'mat"), "types"),
)
_DO = {
    "labels": "labels of c classes are 0 to c - 1: does the model have as many outputs as classes?",
    "shapes": "does the model take records of this shape, and give what `loss` expects?",
    "one": "batch norm cannot train on a batch of one record: use GroupNorm or InstanceNorm",
    "types": "give x as float32 (x.float()), and y in the type that the loss asks for",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked.

    Attributes:
        task: Bundled name, `module:Class`, or `loop:module:function` for a loop's model.
        data: `train.data`.
        options: `train.options`.
        device: `train.device`.
        precision: `train.precision`.
        unit: The hospital's privacy floor, "patient" or "hospital"; None where it is not known.
        allow_none: Whether the hospital takes part in runs without protection.
    """

    task: str
    data: Path | None = None
    options: Options = field(default_factory=dict)
    device: str = "auto"
    precision: Precision = "auto"
    unit: str | None = None
    allow_none: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was looked at.

    Attributes:
        check: Its name.
        status: "ok", "warn", "FAIL", or "-" where it could not be looked at.
        found: What it is, in a line.
        do: What to do about it; "" for nothing.
        facts: The same for programs.
    """

    check: str
    status: Status
    found: str
    do: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the check.

    Attributes:
        name: Of its first row, and of what a failure is told under.
        needs: Names of steps that must have passed.
        rows: Looks, and yields what it found.
        do: What to do about an error that says nothing itself.
    """

    name: str
    needs: tuple[str, ...]
    rows: Callable[[Any], Iterable[Row]]
    do: str


class ToldWatch(Watch):
    """A watch that passes progress on.

    Args:
        tell: Takes the messages.
    """

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell, self._last = tell, 0.0

    def progress(self, step: str, done: int, of: int) -> None:
        """See `Watch.progress`."""
        super().progress(step, done, of)
        now = time.monotonic()
        if now - self._last >= _TOLD_EVERY:
            self._last = now
            self._tell({"progress": step, "done": done, "of": of})


def check(subject: Any, steps: Iterable[Step], tell: Tell) -> bool:
    """Go through the steps.

    Args:
        subject: Given to each step; keeps what a later step needs of an earlier one.
        steps: In order.
        tell: Is given `{"step": NAME}` when one begins, and `{"row": {...}}` for what it found.

    Returns:
        Whether nothing failed.
    """
    passed: set[str] = set()
    sound = True
    for step in steps:
        missing = next((name for name in step.needs if name not in passed), None)
        if missing is not None:
            tell({"row": asdict(Row(step.name, "-", f"not looked at: {missing} comes first"))})
            continue
        tell({"step": step.name})
        found = _found(step, subject, tell)
        if found:
            passed.add(step.name)
        sound &= found
    return sound


def _found(step: Step, subject: Any, tell: Tell) -> bool:
    """Tell a step's rows; whether none failed."""
    sound = True
    try:
        for row in step.rows(subject):
            tell({"row": asdict(row)})
            sound &= row.status != "FAIL"
    except BaseException as error:  # noqa: BLE001 - a task may raise anything, SystemExit too
        tell({"row": asdict(row_of(step, error))})
        return False
    return sound


def row_of(step: Step, error: BaseException) -> Row:
    """What a task raised, as a row."""
    if isinstance(error, P2PFedError):
        found = ": ".join(line for line in (error.what, error.why) if line)
        return Row(step.name, "FAIL", found, error.do or step.do)
    if is_out_of_memory(error):
        return Row(
            step.name,
            "FAIL",
            "memory ran out" + _place(error),
            "a smaller batch, patch or model; or more memory (train.memory_gb)",
        )
    if isinstance(error, SystemExit):
        found = f"the task ended the process: sys.exit({error.code!r})"
        return Row(step.name, "FAIL", found + _place(error), "raise an error instead")
    text = str(error).strip().partition("\n")[0][:_MOST_TEXT]
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Row(step.name, "FAIL", found + _place(error), _hint(text.lower()) or step.do)


def _hint(text: str) -> str:
    return next((_DO[key] for parts, key in _HINTS if any(p in text for p in parts)), "")


def _place(error: BaseException) -> str:
    """Where in the hospital's own code it was raised."""
    ours = (str(_PACKAGE), sysconfig.get_paths()["stdlib"], "<")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and not frame.filename.startswith(ours)
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f" ({Path(last.filename).name}, line {last.lineno}, in {last.name})"
