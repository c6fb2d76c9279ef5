"""Processes of other users, for tests that run as root.

The interpreter or the checkout may lie in a folder that is root's alone (a home of root). Then the
process gets a mount namespace of its own, in which that folder is replaced by one that shows the
interpreter and the checkout and nothing else. Nothing of the machine itself is changed.

Map: `why_not` (what is missing here) -> `required` (who may be skipped for it) -> `Stage.command`
(words before a command); `folder_of` (a folder of theirs).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = [ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]


def _closed_above(path: Path) -> Path | None:
    """The uppermost folder on the way to `path` that others may not enter."""
    for folder in reversed([path, *path.parents]):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


class Stage:
    """Where other users' processes can run.

    Args:
        folder: An empty folder, for mounts that are seen by these processes alone.
    """

    def __init__(self, folder: Path) -> None:
        self._script = "set -e\n"
        shown = [(path, above) for path in NEEDED if (above := _closed_above(path))]
        for number, (path, _) in enumerate(shown):
            held = folder / str(number)
            held.mkdir(parents=True)
            self._script += f"mount --bind {_quoted(path)} {_quoted(held)}\n"
        for above in {above for _, above in shown}:
            self._script += f"mount -t tmpfs -o mode=755 none {_quoted(above)}\n"
        for number, (path, _) in enumerate(shown):
            self._script += f"(umask 022; mkdir -p {_quoted(path)})\n"
            self._script += f"mount --bind {_quoted(folder / str(number))} {_quoted(path)}\n"
        self._plain = not shown

    def command(self, user: int, *groups: int) -> list[str]:
        """The words before a command that a user with a group of its number shall run.

        Args:
            user: Any number.
            groups: Further groups.
        """
        who = ["setpriv", f"--reuid={user}", f"--regid={user}"]
        who += [f"--groups={','.join(map(str, groups))}"] if groups else ["--clear-groups"]
        if self._plain:
            return who
        script = self._script + f"exec {shlex.join(who)} " + '"$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


def folder_of(user: int, group: int, mode: int, path: Path) -> Path:
    """Make a folder of a user and a group; returns it."""
    path.mkdir()
    os.chown(path, user, group)
    path.chmod(mode)
    return path


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def why_not() -> str:
    """Why processes of other users cannot be had here; empty if they can."""
    if os.geteuid() != 0:
        return "only root can run processes of two users"
    with tempfile.TemporaryDirectory() as folder:
        command = [*Stage(Path(folder)).command(61_870), sys.executable, "-c", "import p2pfed"]
        try:
            subprocess.run(command, check=True, capture_output=True, cwd="/", timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            return f"no process of another user here: {said.decode(errors='replace').strip()}"
    return ""


def required(why: str) -> pytest.MarkDecorator:
    """Skip tests for what is missing here; where CI is set nothing may be missing, and they fail.

    Args:
        why: What is missing; empty if nothing is.
    """
    return pytest.mark.skipif(bool(why) and not os.environ.get("CI"), reason=why or "all is here")
