"""What a node remembers of its invite: `invited.json` in its folder, and what that is good for.

A pinned network id shows a mix-up, not a forgery: anyone can write a roster of a later version that
claims the id. So the first roster that an invited node takes must also carry the signature of the
steward who made the invite, whose fingerprint a person compared over the phone, and list the node:
an old one, which that steward had signed before, could be gone on with by stewards who were put
out since. Later rosters are judged by the one that is held (`book`).

Not here: the invite itself (`invite`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from p2pfed.errors import ConfigError, FactRejected
from p2pfed.identity.fields import encode_payload, read_payload
from p2pfed.identity.keys import write_private
from p2pfed.identity.roster import Roster
from p2pfed.identity.signing import ROSTER, SignedDocument

__all__ = ["Invited", "check_first_roster", "is_invited"]

KIND = "p2pfed.invited/1"
FILE = "invited.json"


@dataclass(frozen=True, slots=True)
class Invited:
    """Where a node was invited, and by whom.

    Attributes:
        network: The network's name.
        network_id: Hash of its first roster, 32 bytes.
        steward: Public key of the steward who made the invite, 32 bytes.
    """

    network: str
    network_id: bytes
    steward: bytes

    def write(self, folder: Path) -> None:
        """Leave it in a node's folder, 0600; raises ConfigError if one is there."""
        about = {
            "type": KIND,
            "network": self.network,
            "network_id": self.network_id.hex(),
            "steward": self.steward.hex(),
        }
        write_private(folder / FILE, encode_payload(about) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Invited | None:
        """What lies in a node's folder; None if it came without an invite.

        Raises:
            ConfigError: It cannot be read, or is damaged.
        """
        path = folder / FILE
        try:
            fields = read_payload(path.read_bytes(), KIND)
            invited = cls(
                fields.text("network", longest=64),
                fields.hex32("network_id"),
                fields.hex32("steward"),
            )
            fields.done()
        except FileNotFoundError:
            return None
        except (OSError, FactRejected) as error:
            raise ConfigError(
                f"cannot read {path}",
                str(error).partition("\n")[0],
                "without it no first roster is taken; take it from a backup",
            ) from error
        return invited

    def check(self, signed: bytes, own_id: str) -> None:
        """Raise FactRejected unless a roster is the inviting network's answer to this node."""
        document = SignedDocument.parse(signed)
        roster = Roster.decode(document.payload)
        if roster.network_id != self.network_id:
            raise FactRejected(
                f"the roster is of another network, {roster.network}",
                f"this node was invited into {self.network}, {self.network_id.hex()[:16]}…",
                "ask the steward who invited you for the approval of your request",
            )
        if self.steward not in document.signers(ROSTER, among={self.steward}):
            raise FactRejected(
                f"roster v{roster.version} does not carry the signature of who invited this node",
                "anyone can write a roster that claims to be of your network",
                "ask the steward who invited you for the approval of your request",
            )
        if roster.member(own_id) is None:
            raise FactRejected(
                f"roster v{roster.version} does not list this node",
                "it is an older one, or your request was not approved",
                "ask the steward who invited you for the approval of your request",
            )


def is_invited(folder: Path) -> bool:
    """Whether a node came with an invite, by which its first roster is judged."""
    return (folder / FILE).exists()


def check_first_roster(folder: Path, signed: bytes, own_id: str) -> None:
    """Judge the first roster of a node by its invite, if it came with one.

    Args:
        folder: The node's data directory.
        signed: The exact bytes of the roster.
        own_id: The node's peer id.

    Raises:
        FactRejected: It is of another network, not signed by the inviting steward, or without this
            node.
        ConfigError: What the node knows of its invite cannot be read.
    """
    invited = Invited.read(folder)
    if invited is not None:
        invited.check(signed, own_id)
