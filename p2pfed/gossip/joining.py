"""Which checkpoint a joiner may believe.

A joiner asks its peers which checkpoints they hold, and takes the newest that is vouched for, in
every bit, by the one it fetches from and at least two other training members of the roster, or by
all where it has fewer: who answers first says nothing about who is right. What
it believes is replaced by its own fold once its archive is complete (`RunFacts.archive_complete`).
Without such a checkpoint it folds from the genesis, which is always right and only slower.

Checkpoints lie at rounds divisible by growing powers of two, so that peers a few rounds apart hold
the same ones, at ages 1, 2, 4, 8, ... rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from p2pfed.wire.messages import CheckpointOffer

__all__ = ["VOUCHERS", "checkpoint_interval", "kept_rounds", "trusted_checkpoint"]

VOUCHERS = 3  # the one it is fetched from and two others


def kept_rounds(newest: int, every: int) -> frozenset[int]:
    """The rounds whose checkpoints are kept when the model is at `newest`: O(log newest) of them.

    Args:
        newest: Round of the newest model.
        every: Checkpoints are made at multiples of this, see `checkpoint_interval`.
    """
    kept, step = {0}, every
    while step <= newest:
        last = newest - newest % step
        kept |= {last, max(0, last - step)}
        step *= 2
    return frozenset(kept)


def checkpoint_interval(num_parameters: int) -> int:
    """Rounds between checkpoints, the same on every node, so that they hold the same ones.

    Every round for small models; rarer as writing 20 bytes a parameter begins to cost more than
    replaying a few rounds.
    """
    return max(1, num_parameters >> 20)


def trusted_checkpoint(
    offers: Mapping[str, Iterable[CheckpointOffer]], *, needed: int = VOUCHERS
) -> tuple[CheckpointOffer, tuple[str, ...]] | None:
    """The newest checkpoint that enough peers offer identically.

    Args:
        offers: What each answering peer holds.
        needed: How many must offer it.

    Returns:
        The offer and the peers that hold it, or None if there is none beyond the genesis.
    """
    holders: dict[CheckpointOffer, list[str]] = {}
    for peer, held in sorted(offers.items()):
        for offer in set(held):
            holders.setdefault(offer, []).append(peer)
    good = [o for o, peers in holders.items() if len(peers) >= max(1, needed) and o.round > 0]
    if not good:
        return None
    best = max(good, key=lambda o: (o.round, o.digest, o.chain, o.size))
    return best, tuple(holders[best])
