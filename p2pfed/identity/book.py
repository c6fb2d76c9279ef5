"""Which rosters a node believes.

Invariants. Every believed roster is signed by k of its own stewards. One newer than all held is
believed when k stewards of the newest held one signed it as well; an older one when a held roster
names it as its `previous`. A document for which neither speaks is refused unread: strangers may
send them, and reading one takes a thousand times as long. What is believed is never forgotten:
deltas name the roster version that fixes their weight. The first roster comes from the operator's
hand, who has to know that it is the right one: a pinned network id shows a mix-up, not a forgery,
for a later version only claims it.
"""

from __future__ import annotations

from collections.abc import Callable

from p2pfed.errors import FactRejected
from p2pfed.identity.roster import Roster
from p2pfed.identity.signing import SignedDocument, fact_hash

__all__ = ["RosterBook"]


class RosterBook:
    """The believed rosters of one network; pure, the caller keeps the files.

    Args:
        network_id: The pinned network id (32 bytes), or None to take it from the first roster.
        read: Decodes a roster's payload.
    """

    def __init__(
        self,
        network_id: bytes | None = None,
        *,
        read: Callable[[bytes], Roster] = Roster.decode,
    ) -> None:
        self._read = read
        self._network_id = network_id
        self._rosters: dict[bytes, Roster] = {}
        self._signed: dict[bytes, bytes] = {}
        self._current: Roster | None = None
        self._ever_listed: set[str] = set()

    @property
    def current(self) -> Roster | None:
        """The newest believed roster."""
        return self._current

    @property
    def network_id(self) -> bytes | None:
        """Hash of the network's first roster, 32 bytes."""
        return self._network_id

    def get(self, roster_hash: bytes) -> Roster | None:
        """The believed roster with this hash."""
        return self._rosters.get(roster_hash)

    def signed(self, roster_hash: bytes) -> bytes | None:
        """The exact signed bytes of a believed roster."""
        return self._signed.get(roster_hash)

    def has_listed(self, peer_id: str) -> bool:
        """Whether any believed roster lists this peer as a member."""
        return peer_id in self._ever_listed

    def newest_first(self) -> list[Roster]:
        """All believed rosters."""
        return sorted(self._rosters.values(), key=lambda roster: -roster.version)

    @property
    def hashes(self) -> frozenset[bytes]:
        """Hashes of all believed rosters."""
        return frozenset(self._rosters)

    @property
    def missing(self) -> frozenset[bytes]:
        """Hashes of ancestors that a believed roster names and that are not held yet."""
        named = {r.previous for r in self._rosters.values() if r.version > 1}
        return frozenset(named - set(self._rosters))

    def add(self, signed: bytes, *, explain: bool = False) -> Roster | None:
        """Believe one more roster.

        Args:
            signed: The exact bytes of a signed roster document.
            explain: Read also what is refused unread, to say more exactly why; for what a person
                hands over, never for what a peer sends.

        Returns:
            The roster, or None if it was held already.

        Raises:
            FactRejected: Unsigned, signed by too few or by others, of another network, older than
                what is held and not its ancestor, or malformed. Nothing changes.
        """
        roster = self.check(signed, explain=explain)
        if roster is not None:
            self._believe(roster, signed)
        return roster

    def restore(self, signed: bytes) -> None:
        """Believe again what this node believed before its restart, in any order.

        Raises:
            FactRejected: Malformed, of another network, or not signed by its own stewards.
        """
        document = SignedDocument.parse(signed)
        roster = self._read(document.payload)
        if self._network_id not in {None, roster.network_id}:
            raise FactRejected(f"roster v{roster.version} is of another network")
        if not roster.enough_signatures(document):
            raise _too_few(_named(roster), roster, "its own")
        self._believe(roster, signed)

    def _believe(self, roster: Roster, signed: bytes) -> None:
        self._rosters[roster.hash] = roster
        self._signed[roster.hash] = signed
        self._network_id = roster.network_id
        self._ever_listed.update(m.peer_id for m in roster.members)
        if self._current is None or roster.version > self._current.version:
            self._current = roster

    def check(self, signed: bytes, *, explain: bool = False) -> Roster | None:
        """What `add` would do with these bytes, without doing it; raises FactRejected likewise."""
        document = SignedDocument.parse(signed)
        name = fact_hash(document.payload)
        if name in self._rosters:
            return None
        is_named, held = name in self.missing, self._current
        vouched = is_named or held is None or held.enough_signatures(document)
        if held is not None and not vouched and not explain:
            raise _too_few("the roster", held, f"roster v{held.version}'s")
        roster = self._read(document.payload)
        if self._network_id is not None and roster.network_id != self._network_id:
            raise FactRejected(
                f"the roster is of the network {roster.network_id.hex()[:16]}…",
                f"this node belongs to {self._network_id.hex()[:16]}…",
                "check that the bootstrap list and the roster come from the same consortium",
            )
        # An ancestor's hash vouches for what it says, not for the signatures it came with; without
        # them nobody could restore it.
        if not roster.enough_signatures(document):
            raise _too_few(_named(roster), roster, "its own")
        if held is not None and not is_named:
            self._check_newer(roster, held, vouched=vouched)
        return roster

    def _check_newer(self, roster: Roster, held: Roster, *, vouched: bool) -> None:
        if roster.version < held.version:
            raise FactRejected(
                f"roster v{roster.version} is not newer than v{held.version}",
                "a roster is never rolled back",
            )
        if not vouched:
            raise _too_few(_named(roster), held, f"roster v{held.version}'s")
        is_next = roster.version == held.version + 1
        if roster.version == held.version or (is_next and roster.previous != held.hash):
            how = "does not follow the" if is_next else "is not newer than the other"
            raise FactRejected(
                f"roster v{roster.version} {how} v{held.version} held here",
                f"two rosters v{held.version} were signed",
                "the stewards must agree on one of the two and sign two further versions on top of"
                f" it: v{held.version + 1} and v{held.version + 2}; the second is believed here",
            )


def _named(roster: Roster) -> str:
    return f"roster v{roster.version}"


def _too_few(roster: str, judge: Roster, whose: str) -> FactRejected:
    return FactRejected(
        f"{roster} is not signed by {judge.threshold} of {whose} stewards",
        "anyone could have written it",
        "ask the stewards to sign it: p2pfed steward sign FILE",
    )
