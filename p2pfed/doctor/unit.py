"""What the unit p2pfed.service says of the node: its user, and where its key lies.

The files are read as systemd reads them (unit folders in their order, then drop-ins), also where
systemd does not run. A unit that starts another configuration says nothing of this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

__all__ = ["UNIT_FOLDERS", "NodeUnit", "node_unit"]

_NAME = "p2pfed.service"
_HANDED = re.compile(r"LoadCredential(?:Encrypted)?=node\.key:(/\S+)$")
UNIT_FOLDERS = tuple(
    Path(folder, "systemd/system")
    for folder in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
)


@dataclass(frozen=True, slots=True)
class NodeUnit:
    """What a unit says.

    Attributes:
        user: `User=`; empty: root.
        key: The file that it hands to the node as `node.key`, encrypted if it ends in .cred; None
            if it hands over none.
    """

    user: str
    key: Path | None


def node_unit(config: Path, folders: Sequence[Path] | None = None) -> NodeUnit | None:
    """The unit that starts a configuration; None if there is none.

    Args:
        config: The configuration.
        folders: Where units lie, the one that counts most first; None: `UNIT_FOLDERS`.
    """
    folders = UNIT_FOLDERS if folders is None else folders
    lines = [line.strip() for text in _texts(folders) for line in text.splitlines()]
    set_to = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
    words = set_to.get("ExecStart", "").split()
    named = [Path(after) for word, after in pairwise(words) if word == "-c"]
    if not any(path.resolve() == config.resolve() for path in named):
        return None
    handed = [found for line in lines if (found := _HANDED.match(line))]
    return NodeUnit(set_to.get("User", ""), Path(handed[-1][1]) if handed else None)


def _texts(folders: Sequence[Path]) -> Iterator[str]:
    units = [folder / _NAME for folder in folders]
    first = [path for path in units if path.is_file()][:1]
    drop_ins = [sorted(folder.glob(f"{_NAME}.d/*.conf")) for folder in reversed(folders)]
    for path in [*first, *(path for each in drop_ins for path in each)] if first else []:
        try:
            yield path.read_text("utf-8", "replace")
        except OSError:
            continue
