"""Whether others hear a member that is silent to us, up to `full_mesh` members.

Who finds somebody suspect asks three others that are there when they last heard it (`AskHeard`),
once a beat; what they answer (`Heard`) is hearsay and weighed as such:

* a word that somebody else had of it later than we did: it lives, and its silence counts from that
  word, whose age counts from the question, for an answer may have waited for us. If the word is so
  much later that our own path must be broken, the connection is given up, so that it is dialled
  anew; the member stays suspect;
* no word for as long as would make it suspect: a confirmation, and it is away sooner (`silence`).

The suspect is told so (`Doubted`), by the one that doubts it and by those that are asked and hear
it. It speaks up at once with a beat to all.

Invariants: answers count from those that were asked only, each once; a liar can keep a silent
member suspect, or have it away a little sooner, and do nothing to one that we hear; a node speaks
up, and tells each suspect, once a beat at most.

Source: indirect probes and refutation of SWIM (Das, Gupta, Motivala 2002, sections 3.1 and 4.2);
"buddy system" of Lifeguard (Dadgar, Phillips, Currey 2018, section IV.C, arXiv 1707.00788).
Not here: a crowd, where claims do the same (`claims`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from p2pfed.gossip.events import Disconnect, Effect, Note, Send
from p2pfed.gossip.membership import Membership, Peer, State
from p2pfed.gossip.silence import ASKED
from p2pfed.wire.messages import encode_message
from p2pfed.wire.spreading import MAX_AGE, MAX_ASKED, AskHeard, Doubted, Heard

__all__ = ["Probing"]

SELDOM = 4  # beats between questions about one that is suspect for long
REMEMBERED = 16  # questions that may still be answered


@dataclass(slots=True)
class _Question:
    asked_at: float
    about: frozenset[str]
    owed_by: set[str]


class Probing:
    """See the module docstring.

    Args:
        membership: The table of peers.
        rng: Chance for choosing whom to ask.
    """

    def __init__(self, membership: Membership, rng: random.Random) -> None:
        self._membership = membership
        self._live = membership.liveness
        self._rng = rng
        self._next = float("-inf")
        self._sequence = 0
        self._questions: dict[int, _Question] = {}
        self._told: dict[str, float] = {}  # suspect of others -> when we told it so
        self._spoke_up = float("-inf")

    def tick(self, now: float) -> list[Effect]:
        """Let time pass: ask about those that are suspect, and tell them."""
        if self._membership.is_crowd or now < self._next:
            return []
        suspects = self._membership.suspects()[:MAX_ASKED]
        if not suspects:
            return []
        beat = self._live.beat_interval
        fresh = any(now - s.doubt.since < self._live.away_after for s in suspects if s.doubt)
        self._next = now + (beat if fresh else SELDOM * beat)
        others = [p for p in self._membership.present() if p.state is State.ALIVE]
        helpers = self._rng.sample(others, min(ASKED, len(others)))
        about = tuple(s.peer_id for s in suspects)
        self._sequence += 1
        owed_by = {helper.peer_id for helper in helpers}
        self._questions[self._sequence] = _Question(now, frozenset(about), owed_by)
        self._questions.pop(self._sequence - REMEMBERED, None)
        question = encode_message(AskHeard(self._sequence, about))
        told = encode_message(Doubted(first_hand=True))
        effects: list[Effect] = [Send(helper.peer_id, question) for helper in helpers]
        return effects + [Send(s.peer_id, told) for s in suspects if s.connected]

    def on_question(self, sender: Peer, message: AskHeard, now: float) -> list[Effect]:
        """Say when we heard whom, as far as we can tell; tell those that we hear of the doubt."""
        keeps_up = self._membership.health.keeps_up(now)
        ages: list[tuple[str, int]] = []
        effects: list[Effect] = []
        for peer_id in message.peers:
            peer = self._membership.get(peer_id)
            if peer is None or peer is sender or peer.state is State.REVOKED:
                continue
            if keeps_up and peer.silent_from == peer.last_heard > float("-inf"):
                age = int(1000 * (now - peer.last_heard))
                ages.append((peer_id, min(age, MAX_AGE)))
            if self._membership.hears(peer) and self._may_tell(peer_id, now):
                effects.append(Send(peer_id, encode_message(Doubted(first_hand=False))))
        if ages:
            effects.append(
                Send(sender.peer_id, encode_message(Heard(message.sequence, tuple(ages))))
            )
        return effects

    def _may_tell(self, peer_id: str, now: float) -> bool:
        if now < self._told.get(peer_id, float("-inf")) + self._live.beat_interval:
            return False
        self._told[peer_id] = now
        return True

    def is_doubted(self, sender: Peer, message: Doubted, now: float) -> bool:
        """We are suspect; whether to speak up now. In a crowd nobody says so who is honest."""
        if self._membership.is_crowd:
            return False
        if message.first_hand:
            self._membership.health.doubted(sender.peer_id)
        if now < self._spoke_up + self._live.beat_interval:
            return False
        self._spoke_up = now
        return True

    def on_answer(self, sender: Peer, message: Heard, now: float) -> list[Effect]:
        """Weigh when somebody else heard a suspect."""
        question = self._questions.get(message.sequence)
        if question is None or sender.peer_id not in question.owed_by:
            return []
        question.owed_by.discard(sender.peer_id)
        effects: list[Effect] = []
        for peer_id, milliseconds in message.ages:
            peer = self._membership.get(peer_id)
            if peer is None or peer.doubt is None or peer_id not in question.about:
                continue
            age = milliseconds / 1000
            peer.doubt.heard_at = max(peer.doubt.heard_at, question.asked_at - age)
            if age >= self._live.suspect_after:
                peer.doubt.unheard_by.add(sender.peer_id)
            else:
                peer.doubt.unheard_by.discard(sender.peer_id)
                effects += self._renewed(peer, sender, now)
            self._membership.reconsider()
        return effects

    def _renewed(self, peer: Peer, by: Peer, now: float) -> list[Effect]:
        """Hang up on a path that is broken: others hear the peer, and it is long silent to us."""
        assert peer.doubt is not None
        broken_from = max(peer.silent_from, peer.linked_at) + self._membership.patience(peer)
        if not peer.connected or peer.doubt.heard_at < broken_from:
            return []
        peer.linked_at = now  # the next connection has its time too
        names = {"peer": peer.peer_id, "name": peer.name, "heard_by": by.name}
        return [
            Note("peer.unheard", names),
            Disconnect(peer.peer_id, "silent to us, while others hear it", blame=False),
        ]
