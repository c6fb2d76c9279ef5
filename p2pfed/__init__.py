"""p2pfed: hospitals train one model together as peers, without a server.

Importing this package loads nothing but itself; each room is imported where it is needed. What a
hospital's engineer writes against (`join`, `Task` and what belongs to it) is found here by name and
loaded when it is first asked for.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from p2pfed.training.loop import Federation, join
    from p2pfed.training.patients import Patients, Split, TaskData
    from p2pfed.training.pictures import Picture
    from p2pfed.training.task import HyperParameters, Task

__version__ = "0.1.0"

__all__ = [
    "Federation",
    "HyperParameters",
    "Patients",
    "Picture",
    "Split",
    "Task",
    "TaskData",
    "__version__",
    "join",
]

_AT = {
    "Federation": "p2pfed.training.loop",
    "HyperParameters": "p2pfed.training.task",
    "Patients": "p2pfed.training.patients",
    "Picture": "p2pfed.training.pictures",
    "Split": "p2pfed.training.patients",
    "Task": "p2pfed.training.task",
    "TaskData": "p2pfed.training.patients",
    "join": "p2pfed.training.loop",
}


def __getattr__(name: str) -> object:
    """Load what a hospital's engineer asks for."""
    if name not in _AT:
        raise AttributeError(f"module 'p2pfed' has no attribute {name!r}")
    return getattr(importlib.import_module(_AT[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
