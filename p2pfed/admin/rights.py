"""Who may do what on the admin socket: a pure rule over user ids, and where the ids come from.

The kernel says who is at the other end (SO_PEERCRED, read in `server`); nothing that a client sends
can change that. The rule:

    root, and the user that the daemon runs as   all: read, write, and end it (by a signal)
    a user in `admin.operators`                  write: whatever the socket offers
    anybody else who can connect                 read

Who can connect at all is a matter of the socket's mode and group (`admin.mode`, `admin.group`).
Reading is GET and HEAD. No endpoint ends the daemon, changes the configuration or raises a privacy
budget: that takes the file, and so its owner.

Source: Tailscale's `ipn/ipnauth` (root, own user and one operator write, the others read).
Not here: what a browser's page sends, which is refused before (`app`).
"""

from __future__ import annotations

import difflib
import enum
import grp
import pwd
from collections.abc import Iterable
from dataclasses import dataclass

from p2pfed.errors import ConfigError, NotPermitted

__all__ = [
    "NOBODY",
    "Caller",
    "Right",
    "group_number",
    "may",
    "operator_ids",
    "refusal",
    "right_of",
    "user_name",
]

_READING = frozenset({"GET", "HEAD"})


class Right(enum.Enum):
    """What a caller may do; each includes the ones before."""

    READ = "read"
    WRITE = "write"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end, as the kernel says.

    Attributes:
        uid: User id; -1 where nobody said.
        pid: Process id when it connected; 0 where it is of another PID namespace.
    """

    uid: int
    pid: int = 0


NOBODY = Caller(-1)


def right_of(uid: int, *, owner: int, operators: Iterable[int]) -> Right:
    """The rule.

    Args:
        uid: Of the caller.
        owner: The user that the daemon runs as.
        operators: Those of `admin.operators`.
    """
    if uid in {0, owner}:
        return Right.ALL
    return Right.WRITE if uid in operators else Right.READ


def may(right: Right, method: str) -> bool:
    """Whether a request of this method is allowed with this right."""
    return method in _READING or right is not Right.READ


def refusal(name: str, uid: int, endpoint: str, *, owner: str) -> NotPermitted:
    """The three lines for who may only read.

    Args:
        name: The caller's user name.
        uid: The caller's user id.
        endpoint: Method and path that were asked for.
        owner: Name of the user that the daemon runs as.
    """
    return NotPermitted(
        f"{name} (uid {uid}) may only read: {endpoint} is refused",
        f"root, {owner} and the users in admin.operators may change things here",
        f"run: sudo -u {owner} p2pfed ...   (or add {name!r} to admin.operators in the daemon's"
        " configuration, then as root or its user: p2pfed config reload)",
    )


# --- names and numbers -------------------------------------------------------------------------


def operator_ids(names: Iterable[str]) -> frozenset[int]:
    """The user ids of `admin.operators`; a number stands for itself.

    Raises:
        ConfigError: Some names are unknown here; all of them are told.
    """
    found, mistakes = set(), []
    for name in names:
        if _is_number(name):
            found.add(int(name))
            continue
        try:
            found.add(pwd.getpwnam(name).pw_uid)
        except (KeyError, ValueError):  # ValueError: a zero byte in it
            near = _near(name, (user.pw_name for user in pwd.getpwall()))
            mistakes.append(f"admin.operators: there is no user {name!r} on this machine{near}")
    if mistakes:
        raise ConfigError(
            f"admin.operators names {len(mistakes)} unknown user{'s' * (len(mistakes) > 1)}",
            "\n".join(mistakes),
            "correct the configuration: names or numbers of users of this machine",
        )
    return frozenset(found)


def group_number(name: str) -> int:
    """The id of a group by name or number.

    Raises:
        ConfigError: There is no such group.
    """
    if _is_number(name):
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError) as error:
        near = _near(name, (group.gr_name for group in grp.getgrall()))
        raise ConfigError(
            f"admin.group: there is no group {name!r} on this machine{near}",
            "the socket cannot be given to it",
            f"make it: sudo groupadd --system {name}   (or correct admin.group)",
        ) from error


def user_name(uid: int) -> str:
    """A user's name, or the number where the machine has none; may ask a directory service."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError, ValueError):
        return str(uid)


def _is_number(text: str) -> bool:
    """Whether it can be the number of a user or group; the highest means "nobody" to the kernel."""
    return text.isascii() and text.isdigit() and len(text) < 11 and int(text) < 2**32 - 1


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
