"""Why this node releases nothing now, in words for its operator; empty while it does.

The core says what the protocol forbids (`gossip.release`), and its beats tell the others. What only
the operator sees comes before and after that: a node that left, a trainer that was paused or is
awaited, a run that is over.
"""

from __future__ import annotations

from p2pfed.gossip.progress import Phase
from p2pfed.node.shell import Shell

__all__ = ["why_not"]


def why_not(shell: Shell) -> str:
    """The first reason that holds; what a person can change comes first.

    Args:
        shell: The node.
    """
    return (
        _nobody_trains(shell)
        or shell.core.why_not_contributing()
        or _nothing_left(shell)
        or _trainer_trouble(shell)
    )


def _nobody_trains(shell: Shell) -> str:
    """Nothing comes without a person."""
    if not shell.present:
        return "this node has left the network"
    trainer = shell.trainer
    if trainer is None or not (trainer.paused or trainer.hint):
        return ""
    return "training is paused" if trainer.paused else trainer.state


def _nothing_left(shell: Shell) -> str:
    """No round asks for this node any more."""
    progress = shell.core.progress
    finished = progress is not None and progress.phase is Phase.FINISHED
    return "the run is finished" if finished else ""


def _trainer_trouble(shell: Shell) -> str:
    trainer = shell.trainer
    if trainer is None or trainer.state == "ready":
        return ""
    return f"the trainer is {trainer.state}"
