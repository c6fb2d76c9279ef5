"""The simulated consortium: keys, stewards who sign rosters, members with their sample counts.

Everything is a function of the scenario and the seed. Rosters are signed for real, and read by the
nodes as real ones are.
"""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Iterable

from p2pfed.identity.keys import NodeKey, StewardKey, peer_id_of
from p2pfed.identity.roster import MAX_SAMPLES, Member, Roster, Steward
from p2pfed.identity.signing import ROSTER, SignedDocument, fact_hash
from p2pfed.simulate.scenario import Scenario

__all__ = ["Cast"]

EXPIRES = dt.datetime(2126, 1, 1, tzinfo=dt.UTC)


class Cast:
    """See the module docstring.

    Attributes:
        seeds: Secret key of each member, 32 bytes.
        peers: Its peer id.
        rosters: Rosters that were published, oldest first.
        signed: Their signed bytes.
    """

    def __init__(self, scenario: Scenario, seed: int) -> None:
        names = [f"{seed}/h{i}" for i in range(scenario.members)]
        self.seeds = [fact_hash(name.encode()) for name in names]
        self.public_keys = [NodeKey(one).public_key for one in self.seeds]
        self.peers = [peer_id_of(key) for key in self.public_keys]
        self.samples = _samples(scenario, seed)
        self._stewards = [fact_hash(f"{seed}/steward {i}".encode()) for i in range(3)]
        first = Roster.found(
            "simulated",
            stewards=[
                Steward(f"steward {i}", StewardKey(seed).public_key)
                for i, seed in enumerate(self._stewards)
            ],
            threshold=2,
            expires=EXPIRES,
        )
        self.rosters: list[Roster] = []
        self.signed: list[bytes] = []
        self._publish(first)
        listed = [i for i in range(scenario.members) if i not in scenario.unlisted]
        self._publish(self.rosters[0].next(members=[self._member(i) for i in listed]))

    def _member(self, i: int) -> Member:
        return Member(f"h{i}", self.peers[i], ("train",), self.samples[i])

    def _publish(self, draft: Roster) -> None:
        payload = draft.encode()
        document = SignedDocument(payload)
        for steward in self._stewards[:2]:
            document = document.signed_by(steward, ROSTER)
        self.rosters.append(Roster.decode(payload))
        self.signed.append(document.encode())

    def add(self, members: Iterable[int]) -> None:
        """Sign a roster that lists these members as well; who was revoked never comes back."""
        now = self.rosters[-1]
        gone = {one.peer_id for one in now.revoked}
        new = [
            i for i in members if now.member(self.peers[i]) is None and self.peers[i] not in gone
        ]
        if new:
            self._publish(now.next(members=[*now.members, *map(self._member, new)]))

    def revoke(self, members: Iterable[int], from_round: int) -> None:
        """Sign rosters without these members, one version each."""
        for i in members:
            if self.rosters[-1].member(self.peers[i]) is not None:
                draft = self.rosters[-1].revoke(
                    self.peers[i], reason="simulated", from_round=from_round
                )
                self._publish(draft)


def _samples(scenario: Scenario, seed: int) -> list[int]:
    if scenario.samples:
        return list(scenario.samples)
    chance = random.Random(f"{seed}/samples")  # noqa: S311 - a simulation, not a secret
    drawn = (chance.lognormvariate(0.0, scenario.sigma) for _ in range(scenario.members))
    return [max(1, min(MAX_SAMPLES, round(scenario.median * factor))) for factor in drawn]
