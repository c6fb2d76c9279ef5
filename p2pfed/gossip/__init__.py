"""The sans-I/O core: `handle(event, now) -> [effect]`, and the fold that every node computes alike.

    core.py          composes the parts below into one state machine
    events.py        what comes in (events) and what goes out (effects)
    membership.py    who is alive, suspect, away, left or revoked
    heartbeat.py     beats, goodbyes, addresses, and whom to talk to
    introduction.py  what a beat of ours says, and what another's means for our run
    neighbours.py    with whom a node of a large network is connected
    claims.py        what is said of members that are not neighbours; rumours.py tells it on
    attendance.py    who counts as there in a run
    facts.py         the believed facts of a run: which deltas count, with what weight
    digests.py       the tree of digests over rounds
    intake.py        facts are checked, believed, stored and announced
    sync.py          anti-entropy: ask for what is missing only
    spread.py        deltas of open rounds, by seat; seating.py says who sits where
    asked.py         what was asked of whom, so that nothing is sent twice
    rounds.py        when a round starts and ends, without barriers
    progress.py      one node's way through the rounds
    joining.py       which checkpoint a joiner may believe
    fold.py          the fold itself: exact integer sums, then the outer optimiser
    replay.py        the fold continued from the newest state that stands for the right facts
    robust.py        clipping every delta to the median norm of its round

No clock, socket, file, thread or hidden random number is used in this package; a test holds that.
"""
