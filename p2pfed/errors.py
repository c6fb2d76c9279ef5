"""Every deliberate exception of p2pfed; one branch per decision of the one who catches it.

    P2PFedError
    |- ConfigError            operator's file, flag or path          -> exit 2, name the key
    |- PolicyError            refused by policy or signature         -> exit 7
    |  |- FactRejected        a roster, run or delta does not verify -> keep what we hold
    |  `- StateInUse          another daemon owns this directory     -> exit 7, name its process
    |- PeerError              one peer                               -> drop it, the node lives
    |  |- PeerUnreachable     no answer within the deadline          -> back off, try again
    |  `- RemoteProtocolError their bug or attack                    -> disconnect, count
    |- PrivacyError           the gate refuses                       -> exit 7
    |  |- BudgetExhausted     nothing was spent                      -> contribute no more, receive
    |  |- LedgerCorrupt       refuse every release                   -> a human is needed
    |  `- UpdateRejected      NaN, infinity or shape; nothing spent  -> skip the round
    |- TrainerError           the trainer died or timed out          -> restart with back-off
    |- CheckFailed            a check of `p2pfed doctor`             -> exit 9
    |- StoreFailed            the node's disk: full, failing, damaged -> stop, start again later
    `- AdminError             the admin socket said no
       |- DaemonNotRunning    nothing listens on the socket          -> exit 3
       |- NotPermitted        the socket or the daemon refuses us    -> exit 4
       |- NotFound            no such peer or endpoint               -> exit 5
       |- TimedOut            it took too long                       -> exit 6
       `- VersionMismatch     client and daemon do not understand    -> exit 8

An error is told in three lines: what happened, why, and what to do. A ValueError raised by a
library function is the caller's bug and stays a ValueError; an AssertionError is ours.
"""

from __future__ import annotations

__all__ = [
    "AdminError",
    "BudgetExhausted",
    "CheckFailed",
    "ConfigError",
    "DaemonNotRunning",
    "FactRejected",
    "LedgerCorrupt",
    "NotFound",
    "NotPermitted",
    "P2PFedError",
    "PeerError",
    "PeerUnreachable",
    "PolicyError",
    "PrivacyError",
    "RemoteProtocolError",
    "StateInUse",
    "StoreFailed",
    "TimedOut",
    "TrainerError",
    "UpdateRejected",
    "VersionMismatch",
]


class P2PFedError(Exception):
    """Base of every deliberate error.

    Args:
        what: What happened, one line, with the value that was wrong.
        why: Why it is refused, one line; may be empty.
        do: What the reader should do, one line; may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        super().__init__(what, why, do)
        self.what = what
        self.why = why
        self.do = do

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.do) if line)


class ConfigError(P2PFedError):
    """The operator's file, flag or path is wrong."""

    exit_code = 2


class PolicyError(P2PFedError):
    """Refused by policy: not in the roster, expired, not accepted, not signed."""

    exit_code = 7


class FactRejected(PolicyError):
    """A roster, run file or delta does not verify; what we hold already is kept."""


class StateInUse(PolicyError):
    """Another live daemon owns the data directory or the socket."""


class PeerError(P2PFedError):
    """Something is wrong with one peer; the node itself is fine."""


class PeerUnreachable(PeerError):
    """The peer did not answer within the deadline."""


class RemoteProtocolError(PeerError):
    """The peer broke the protocol: their bug or an attack."""


class NoCommonProtocol(RemoteProtocolError):
    """The peer speaks nothing of what was proposed; where versions were, that is no breach."""


class PrivacyError(P2PFedError):
    """The privacy gate refuses."""

    exit_code = 7


class BudgetExhausted(PrivacyError):
    """The release would pass the lifetime budget; nothing was spent."""


class LedgerCorrupt(PrivacyError):
    """The ledger does not verify; every release is refused until a human has looked."""


class UpdateRejected(PrivacyError):
    """An update holds NaN, infinity or has the wrong shape; nothing was spent."""


class TrainerError(P2PFedError):
    """The trainer process died, timed out or reported a failure."""


class CheckFailed(P2PFedError):
    """A check of `p2pfed doctor` failed; its table says which, and how to mend it."""

    exit_code = 9


class StoreFailed(P2PFedError):
    """The node's store cannot be read or written: its disk is full, failing or damaged."""


class AdminError(P2PFedError):
    """The admin socket refused a request."""


class DaemonNotRunning(AdminError):
    """Nothing listens on the admin socket."""

    exit_code = 3


class NotPermitted(AdminError):
    """The caller may not use the socket or this endpoint."""

    exit_code = 4


class NotFound(AdminError):
    """No such peer, run or endpoint."""

    exit_code = 5


class TimedOut(AdminError):
    """The daemon or the awaited condition took longer than the deadline."""

    exit_code = 6


class VersionMismatch(AdminError):
    """The client and the daemon do not understand each other."""

    exit_code = 8
