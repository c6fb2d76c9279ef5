"""How long a peer may be silent: by its path, and by what others say of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfed.gossip.membership import Liveness
from p2pfed.gossip.silence import ASKED, Doubt, RoundTrip, away_after, suspect_after

LIVE = Liveness()
SECONDS = st.floats(1e-4, 60.0)


def path(*rtts: float) -> RoundTrip:
    made = RoundTrip()
    for rtt in rtts:
        made.measure(rtt)
    return made


def confirmed(by: int) -> Doubt:
    return Doubt(0.0, unheard_by={f"p{i}" for i in range(by)})


def test_the_round_trip_time_is_smoothed_as_tcp_does():
    """RFC 6298, section 2: the first sample R gives SRTT = R, RTTVAR = R / 2."""
    assert path().timeout == 0.0
    assert path(0.2).timeout == pytest.approx(0.2 + 4 * 0.1)
    second = path(0.2, 0.3)
    assert second.deviation == pytest.approx(0.75 * 0.1 + 0.25 * 0.1)
    assert second.smoothed == pytest.approx(0.875 * 0.2 + 0.125 * 0.3)
    assert path(*[0.2] * 50).timeout == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(
    ("rtts", "seconds"),
    [
        ([], 2.5),  # nothing measured yet
        ([0.001] * 20, 2.5),  # a LAN
        ([0.3] * 40, 2.9),  # a continent away, and steady
        ([0.2, 0.4] * 20, 4.0),  # the same with jitter
        ([4.0, 7.0] * 20, 7.25),  # a hundred times slower than others
    ],
)
def test_a_peer_is_suspect_when_its_path_does_not_explain_its_silence(rtts, seconds):
    assert suspect_after(LIVE, path(*rtts)) == pytest.approx(seconds, abs=0.3)


def test_two_beats_may_be_missing_and_a_segment_lost_twice():
    assert suspect_after(LIVE, RoundTrip(0.5, 0.0)) == 2 * 1.0 + 3 * 0.5


@pytest.mark.parametrize(("by", "seconds"), [(0, 14.5), (1, 11.25), (2, 9.35), (3, 8.0), (9, 8.0)])
def test_each_that_does_not_hear_it_either_brings_the_verdict_forward(by, seconds):
    assert away_after(LIVE, path(0.001), confirmed(by)) == pytest.approx(seconds, abs=0.01)


def test_slow_timers_keep_their_own_proportions():
    """A province with beats once a minute, and a test with short patience."""
    slow = Liveness(beat_interval=60, suspect_after=200, away_after=400)
    assert suspect_after(slow, path(0.1)) == 200
    assert away_after(slow, path(0.1), confirmed(0)) == 400
    assert away_after(slow, path(0.1), confirmed(3)) == 320
    hasty = Liveness(away_after=6.0)
    assert suspect_after(hasty, path(9.0)) == 3.0
    assert away_after(hasty, path(9.0), confirmed(3)) == 6.0


@given(st.lists(SECONDS, max_size=30), st.integers(0, 2 * ASKED))
def test_property_whoever_says_what_the_verdicts_stay_within_their_bounds(rtts, by):
    suspect = suspect_after(LIVE, path(*rtts))
    away = away_after(LIVE, path(*rtts), confirmed(by))
    assert LIVE.suspect_after <= suspect <= LIVE.away_after / 2
    assert LIVE.away_least <= away <= LIVE.away_after + 1e-9
    assert away <= away_after(LIVE, path(*rtts), confirmed(max(0, by - 1)))
