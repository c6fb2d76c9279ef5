"""Spreading the deltas of open rounds: whose do you hold, by seat.

A round in which something arrived is *warm* for a few contacts. In each, a node shows one neighbour
whose deltas it holds of its warm rounds (`Held`); the other asks for those that it lacks (`Wanted`)
and says which of its own are lacking there (`Held` as an answer), which are asked for in turn.
Payloads go as answers only. One message a contact, however many deltas are new: the talk of a round
grows with log(members) contacts of members / 8 bytes, not with deltas times neighbours.

Where both hold deltas of the same seats and yet not the same ones (an origin signed two, or an
origin is not on the roster that both hold), the names are listed (`Have`), which finds the proof.

Invariants: a delta is asked of one peer at a time; an answer is never answered but by a `Wanted`;
nothing here believes anything.

Source: push-pull rumour mongering (Demers et al. 1987, section 1.4; Karp et al. 2000), with all
rumours of a round in one message, as one bit each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pfed.gossip.asked import MAX_WANTED, Asked, Key
from p2pfed.gossip.events import Effect, Send, SendStored
from p2pfed.gossip.facts import RunFacts
from p2pfed.gossip.seating import Plan, Seating
from p2pfed.wire.messages import NAME_BYTES, Have, encode_message
from p2pfed.wire.seats import decode_seats, encode_seats, seats_in
from p2pfed.wire.spreading import PREFIX_BYTES, Held, Portion, Wanted

__all__ = ["Spread"]

WARM_ROUNDS = 8  # the newest ones; what is older is found by the digests
NEWEST_ROUNDS = 2  # shown in each contact, warm or not
PORTIONS = 16  # rounds in one message
AGE_SHARE = 8  # contacts are an eighth of a round's age apart: a burst goes fast, a trickle slowly


@dataclass(slots=True)
class _Warm:
    contacts: int  # how many are left
    since: float | None = None


class Spread:
    """See the module docstring.

    Args:
        seating: The seats of the believed rosters.
        asked: What was asked of whom; shared with the exchange by name.
        is_set_aside: Whether a delta of this round and origin is held back.
    """

    def __init__(
        self, seating: Seating, asked: Asked, is_set_aside: Callable[[int, str], bool]
    ) -> None:
        self._seating = seating
        self._asked = asked
        self._is_set_aside = is_set_aside
        self._facts: RunFacts | None = None
        self._warm: dict[int, _Warm] = {}
        self._bits: dict[tuple[bytes, int], tuple[int, int]] = {}
        self._next_contact = float("-inf")

    def take_run(self, facts: RunFacts) -> None:
        """From now on the deltas of this run are spread."""
        self._facts = facts
        self._warm.clear()
        self._bits.clear()

    # --- what is new -----------------------------------------------------------------------------

    def added(self, round_: int, origin: str, contacts: int) -> None:
        """A delta was added: tell of its round in so many of the next contacts."""
        self._note(round_, origin)
        self._warm.setdefault(round_, _Warm(0)).contacts = contacts
        if len(self._warm) > WARM_ROUNDS:
            del self._warm[min(self._warm)]

    @property
    def is_warm(self) -> bool:
        """Whether there is anything new."""
        return bool(self._warm)

    def is_due(self, now: float) -> bool:
        """Whether a neighbour is to be contacted about a warm round."""
        return bool(self._warm) and now >= self._next_contact

    def contact(self, peer: str, now: float, *, brisk: float) -> list[Effect]:
        """Show a neighbour what we hold of the warm rounds, and of the newest ones.

        Args:
            peer: The neighbour.
            now: The core's clock, seconds.
            brisk: The least time between two contacts about warm rounds, seconds.
        """
        if self._facts is None:
            return []
        rounds, age = sorted(self._warm), 0.0
        for round_ in rounds:
            warm = self._warm[round_]
            warm.since = now if warm.since is None else warm.since
            age = now - warm.since
            warm.contacts -= 1
            if warm.contacts <= 0:
                del self._warm[round_]
        self._next_contact = now + max(brisk, age / AGE_SHARE)
        end = self._facts.tree.end
        newest = range(max(0, end - NEWEST_ROUNDS), end)
        return self.show(peer, sorted({*rounds, *newest}))

    def show(self, peer: str, rounds: Iterable[int]) -> list[Effect]:
        """Tell a peer whose deltas we hold of these rounds."""
        plan = self._seating.current()
        if self._facts is None or plan is None:
            return []
        tree = self._facts.tree
        portions = [
            Portion(
                round_,
                encode_seats(self._held(plan, round_), plan.size),
                tree.digest(round_, 1)[:PREFIX_BYTES],
            )
            for round_ in rounds
        ]
        return [
            self._send(peer, self._said(plan, portions[at : at + PORTIONS], is_answer=False))
            for at in range(0, len(portions), PORTIONS)
        ]

    # --- answers ---------------------------------------------------------------------------------

    def on_held(self, peer: str, held: Held, now: float) -> list[Effect]:
        """Ask for what we lack; say what the other side lacks.

        Raises:
            RemoteProtocolError: The seats are not of that roster.
        """
        facts = self._facts
        if facts is None or held.run != facts.run.run_id[:PREFIX_BYTES]:
            return []
        portions = [p for p in held.portions[:PORTIONS] if p.round < facts.run.rounds]
        plan = self._seating.of(held.roster)
        if plan is None:  # one of us is behind; until the rosters are exchanged names must do
            return [] if held.is_answer else [self.list_names(peer, p.round) for p in portions[:2]]
        wanted, lacking, differing = [], [], []
        for portion in portions:
            theirs = decode_seats(portion.seats, plan.size)
            ours = self._held(plan, portion.round)
            ask = self._to_ask(peer, plan, portion.round, theirs & ~ours, now)
            if ask:
                wanted.append(Portion(portion.round, encode_seats(ask, plan.size)))
            if held.is_answer:
                continue
            if ours & ~theirs:
                lacking.append(Portion(portion.round, encode_seats(ours & ~theirs, plan.size)))
            digest = facts.tree.digest(portion.round, 1)[:PREFIX_BYTES]
            if ours == theirs and portion.digest not in {b"", digest}:
                differing.append(portion.round)
        effects: list[Effect] = []
        if wanted:
            message = Wanted(held.run, held.roster, tuple(wanted))
            effects.append(self._send(peer, message))
        if lacking:
            effects.append(self._send(peer, self._said(plan, lacking, is_answer=True)))
        return effects + [self.list_names(peer, round_) for round_ in differing[:2]]

    def on_wanted(self, peer: str, wanted: Wanted) -> list[Effect]:
        """Answer with the deltas that we hold.

        Raises:
            RemoteProtocolError: The seats are not of that roster.
        """
        facts, plan = self._facts, self._seating.of(wanted.roster)
        if facts is None or plan is None or wanted.run != facts.run.run_id[:PREFIX_BYTES]:
            return []
        found: list[bytes] = []
        for portion in wanted.portions[:PORTIONS]:
            seats = decode_seats(portion.seats, plan.size) & self._held(plan, portion.round)
            for seat in seats_in(seats)[: MAX_WANTED - len(found)]:
                entry = facts.entry(portion.round, plan.members[seat])
                found += [entry.fact] if entry is not None else []
        return [SendStored(peer, tuple(found))] if found else []

    def list_names(self, peer: str, round_: int) -> Effect:
        """Tell a peer the names of all that we hold of a round."""
        assert self._facts is not None
        names = b"".join(sorted(f[:NAME_BYTES] for f in self._facts.tree.facts(round_)))
        return self._send(peer, Have(self._facts.run.run_id, round_, True, names))

    # --- small things ----------------------------------------------------------------------------

    def _to_ask(self, peer: str, plan: Plan, round_: int, missing: int, now: float) -> int:
        assert self._facts is not None
        ask = 0
        asked: list[Key] = []
        room = self._asked.room(peer) if missing else 0
        for seat in seats_in(missing):
            origin = plan.members[seat]
            key = (round_, origin)
            if len(asked) >= room:
                break
            if self._facts.holds(round_, origin):
                continue  # held, but out of the set: its origin is proven to equivocate
            if self._asked.may_ask(key, peer, now) and not self._is_set_aside(round_, origin):
                ask |= 1 << seat
                asked.append(key)
        self._asked.ask(asked, peer, now)
        return ask

    def _held(self, plan: Plan, round_: int) -> int:
        """The seats whose deltas of a round are in the set; kept until the round changes."""
        assert self._facts is not None
        version = self._facts.tree.version(round_)
        known, bits = self._bits.get((plan.prefix, round_), (-1, 0))
        if known == version:
            return bits
        bits = 0
        for entry in self._facts.entries(round_):
            if entry.origin in plan.seat and not self._facts.is_banned(entry.origin, round_):
                bits |= 1 << plan.seat[entry.origin]
        while len(self._bits) >= 4 * WARM_ROUNDS:
            del self._bits[next(iter(self._bits))]
        self._bits[plan.prefix, round_] = (version, bits)
        return bits

    def _note(self, round_: int, origin: str) -> None:
        """Keep the known seats up to date, so that a burst does not recount them."""
        facts, plan = self._facts, self._seating.current()
        if facts is None or plan is None or facts.is_banned(origin, round_):
            return
        version = facts.tree.version(round_)
        known, bits = self._bits.get((plan.prefix, round_), (-1, 0))
        if known == version - 1 and origin in plan.seat:
            self._bits[plan.prefix, round_] = (version, bits | 1 << plan.seat[origin])

    def _said(self, plan: Plan, portions: list[Portion], *, is_answer: bool) -> Held:
        assert self._facts is not None
        run = self._facts.run.run_id[:PREFIX_BYTES]
        return Held(run, plan.prefix, is_answer, tuple(portions))

    def _send(self, peer: str, message: Held | Wanted | Have) -> Send:
        return Send(peer, encode_message(message))
