"""The first model of a run on this node's disk: is it whole, and taking it from an operator's file.

Invariant: a file that cannot be read, whatever the reason, is a file that is not there: it is asked
of the peers again, and why is told. It never ends the daemon, whose next start would meet it again.

Not here: its numbers (`checkpoints.read_genesis`), asking the peers (`operator`).
"""

from __future__ import annotations

from pathlib import Path

from p2pfed.errors import FactRejected
from p2pfed.identity.run import Run
from p2pfed.node.checkpoints import read_genesis
from p2pfed.node.directory import file_digest, write_durably

__all__ = ["most_bytes", "take_genesis", "why_absent"]

_HEADER_ROOM = 1 << 20  # a safetensors header may be as long


def most_bytes(run: Run) -> int:
    """The longest genesis file of a run."""
    return 4 * run.num_parameters + _HEADER_ROOM


def why_absent(blob: Path, digest: bytes) -> str | None:
    """None if the file is there and whole; else why not, empty if nobody has brought it yet.

    One that rotted is removed. One that cannot be read is left: what is fetched takes its place,
    and until then a person may mend it.
    """
    try:
        if file_digest(blob) == digest:
            return None
        blob.unlink()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{blob} cannot be read: {error.strerror or error}"
    return "the file that was here was damaged"


def take_genesis(run: Run, source: Path, blob: Path) -> None:
    """Copy the genesis to its place from a file that the operator names.

    Raises:
        FactRejected: It is not the run's, or cannot be read or copied.
    """
    try:
        if not source.is_file() or source.stat().st_size > most_bytes(run):
            raise FactRejected(  # a pipe or a device would be read for ever
                f"{source} is not the genesis of run {run.name!r}",
                f"the daemon finds no file of at most {most_bytes(run)} bytes there",
                "put it where the daemon may read it; or leave it out: it then asks its peers",
            )
        read_genesis(source, run)
        write_durably(blob, source.read_bytes())
    except OSError as error:
        raise FactRejected(
            f"the daemon cannot read the genesis {source}",
            error.strerror or str(error),
            "accept as root or as the daemon's user, or put the file where that user may read it;"
            " or leave it out: the daemon then asks its peers",
        ) from error
