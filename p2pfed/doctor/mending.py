"""The few repairs that are safe: a key or folder that is too open, a socket that nobody serves.

Invariant: nothing gets wider, nothing of another user is touched (except by root, whose narrowing
harms nobody), no link is followed, and a socket is removed only if nobody listens on it now.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from p2pfed.doctor.finding import Finding, Mend
from p2pfed.doctor.seen import answers, look

__all__ = ["described", "mend", "to_mend"]


def to_mend(findings: Iterable[Finding]) -> list[Mend]:
    """What can be repaired here."""
    return [found.mend for found in findings if found.mend is not None]


def described(one: Mend) -> str:
    """What a repair does, in the words of a shell."""
    return f"rm {one.path}" if one.mode is None else f"chmod {one.mode:o} {one.path}"


def mend(one: Mend) -> str:
    """Do one repair; empty if it is done, else why it is not."""
    try:
        return _remove(one) if one.mode is None else _narrow(one, one.mode)
    except OSError as error:
        return error.strerror or str(error)


def _narrow(one: Mend, mode: int) -> str:
    descriptor = os.open(one.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if os.geteuid() not in {0, found.st_uid}:
            return "it is not yours"
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & mode)
    finally:
        os.close(descriptor)
    return ""


def _remove(one: Mend) -> str:
    seen = look(one.path)
    if seen.kind != "socket" or one.path.is_symlink():
        return "it is no socket any more"
    if os.geteuid() not in {0, seen.uid}:
        return "it is not yours"
    if answers(one.path) is not False:
        return "somebody listens on it now"
    one.path.unlink()
    return ""
