"""What the trainer answered to a round, as an event for the core.

Invariant: a release becomes one only if it is what was asked for, lies in the exchange folder and
decodes within the run's bounds; whatever else the trainer says is the end of a training without
one.

Not here: asking (`shell`), signing (`gossip/release`).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from p2pfed.errors import RemoteProtocolError
from p2pfed.gossip.events import Released, TrainingEnded
from p2pfed.identity.run import Run
from p2pfed.wire.payload import decode_payload, max_payload_bytes

__all__ = ["outcome_of", "public_spending"]

_SPENDING = ("mechanism", "spent_nano_rho", "spent_epsilon", "releases", "releases_left")


def public_spending(answer: dict[str, Any]) -> dict[str, Any]:
    """What an answer says was spent so far; empty if it says nothing."""
    if "spent_nano_rho" not in answer:
        return {}
    return {key: answer[key] for key in _SPENDING if key in answer}


def outcome_of(
    answer: dict[str, Any], run: Run, round_: int, exchange: Path
) -> Released | TrainingEnded:
    """The event that an answer stands for; the payload's file is read and removed.

    Args:
        answer: What the trainer said.
        run: The run of the round.
        round_: The round that was asked for.
        exchange: The folder where a payload lies.

    Raises:
        KeyError, TypeError, ValueError: It says something that it should not.
        RemoteProtocolError: The payload is over the bounds.
        OSError: The payload is not there, or a link.
    """
    if answer["event"] != "released":
        reason = answer.get("reason") or answer.get("what") or "no reason given"
        return TrainingEnded(round_, str(answer["event"]), str(reason))
    head = bytes.fromhex(answer["ledger_head"])
    meant = (round_, run.run_id.hex(), run.mechanism, 32)
    if (answer["round"], answer["run_id"], answer["mechanism"], len(head)) != meant:
        raise ValueError("the trainer released something that it was not asked for")
    width = run.encoding.values
    path = exchange / Path(answer["payload"]).name
    payload = _read(path, max_payload_bytes(run.num_parameters, run.max_released, width))
    path.unlink()
    decoded = decode_payload(
        payload,
        num_parameters=run.num_parameters,
        max_released=run.max_released,
        width=width,
    )
    return Released(
        round=round_,
        payload=payload,
        num_released=decoded.values.size,
        mechanism=str(answer["mechanism"]),
        spent_nano_rho=_whole(answer, "spent_nano_rho"),
        releases=_whole(answer, "releases"),
        ledger_head=head,
    )


def _read(path: Path, most: int) -> bytes:
    """A file of at most `most` bytes; the folder may be another user's, too.

    Not through a link, and without a wait, should it be a pipe: this is the event loop.
    """

    def no_link(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    with open(path, "rb", opener=no_link) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise RemoteProtocolError(f"what the trainer gave is no payload of up to {most} bytes")
        return file.read(most)


def _whole(answer: dict[str, Any], key: str) -> int:
    value = answer[key]
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"the trainer's {key} is not a whole number")
    return value
