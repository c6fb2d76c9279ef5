"""The upload cap: a debt that time pays off."""

from __future__ import annotations

import random

import pytest

from p2pfed.network.pace import Pace


def bulk_sent(pace: Pace, seconds: float, sizes: list[int]) -> int:
    """Bytes of bulk that go in ``seconds`` if each send is made as soon as it may be."""
    now, sent = 0.0, 0
    for size in sizes:
        now += pace.delay(now)
        if now >= seconds:
            return sent
        pace.spend(size, now)
        sent += size
    raise AssertionError("too few sizes")


def test_without_a_cap_nothing_ever_waits():
    pace = Pace()
    pace.spend(1 << 40, 0.0)
    assert pace.delay(0.0) == 0


def test_the_first_send_does_not_wait():
    assert Pace(1000).delay(5.0) == 0


def test_what_was_sent_is_paid_off_by_time_alone():
    pace = Pace(1000)
    pace.spend(500, 10.0)
    assert pace.delay(10.0) == pytest.approx(0.5)
    assert pace.delay(10.3) == pytest.approx(0.2)
    assert pace.delay(10.5) == 0
    assert pace.delay(99.0) == 0


def test_debts_add_up():
    pace = Pace(1000)
    for _ in range(4):
        pace.spend(250, 0.0)
    assert pace.delay(0.0) == pytest.approx(1.0)


def test_a_quiet_hour_earns_nothing():
    pace = Pace(1000)
    pace.spend(1000, 0.0)
    pace.spend(1000, 3600.0)
    assert pace.delay(3600.0) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_property_bulk_keeps_to_the_rate_over_a_minute_whatever_the_sizes(seed):
    rng = random.Random(seed)
    rate, largest = rng.choice([20_000, 1_000_000]), 65_535
    sizes = [rng.randint(1, largest) for _ in range(10_000)]
    sent = bulk_sent(Pace(rate), 60.0, sizes)
    assert rate * 60 <= sent <= rate * 60 + largest


def test_urgent_bytes_that_do_not_wait_hold_bulk_back_by_as_much():
    pace = Pace(1000)
    pace.spend(100, 0.0)
    pace.spend(400, 0.0)  # urgent: sent though there is a debt
    assert pace.delay(0.0) == pytest.approx(0.5)
