"""Where a node's configuration is looked for: one answer for the commands and for `p2pfed.join`.

A loop that found another file than the commands would spend another node's budget. A place that we
may not look into is not an empty one: it is told apart.

The sockets of the documented service are here too, for those who may use it and may not read the
configuration: members of the group `p2pfed` (docs/service.md).
"""

from __future__ import annotations

import os

from p2pfed.errors import NotPermitted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "PLACES",
    "SERVICE_PRIVATE",
    "SERVICE_SOCKET",
    "is_there",
    "usual_configuration",
    "usual_place",
]

PLACES = ("p2pfed.toml", "~/.config/p2pfed/p2pfed.toml", "/etc/p2pfed/p2pfed.toml")
SERVICE_SOCKET = "/run/p2pfed/admin.sock"
SERVICE_PRIVATE = "/var/lib/p2pfed-trainer/trainer.sock"


def is_there(path: str) -> bool:
    """Whether there is a configuration at a path.

    Raises:
        NotPermitted: Its folder is closed to us.
    """
    try:
        os.stat(path)  # noqa: PTH116 - the commands' start is measured, and pathlib takes long
    except PermissionError as error:
        raise NotPermitted(
            f"cannot look into {os.path.dirname(path) or '.'}: permission denied",  # noqa: PTH120
            "the node's configuration is there, which says where everything is",
            f"run it as root; or, if the group may use it: p2pfed --socket {SERVICE_SOCKET} ...",
        ) from error
    except OSError:
        return False
    return True


def usual_configuration() -> Path | None:
    """`usual_place` as a path; raises likewise."""
    from pathlib import Path  # noqa: PLC0415 - see there

    found = usual_place()
    return None if found is None else Path(found)


def usual_place() -> str | None:
    """The first of the usual places where there is a configuration.

    The folder that we stand in and our home may be somebody else's (sudo keeps both): closed, they
    hold nothing for us.

    Raises:
        NotPermitted: There is none elsewhere, and the machine's own place is closed to us.
    """
    for place in PLACES:
        path = os.path.expanduser(place)  # noqa: PTH111
        try:
            if is_there(path):
                return path
        except NotPermitted:
            if place == PLACES[-1]:
                raise
    return None
