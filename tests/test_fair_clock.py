"""The clock by which tests hold real processes to bounds."""

from __future__ import annotations

import fair_clock
import pytest
from fair_clock import FairClock, waited


class Machine:
    """A machine whose time passes as the test says, and what its kernel tells of it."""

    def __init__(self, folder):
        self.folder = folder
        self.now = 100.0
        self.stall(cpu=7.0, io=0.5)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def stall(self, *, cpu, io):
        for name, seconds in (("cpu", cpu), ("io", io)):
            (self.folder / name).write_text(
                f"some avg10=0.00 avg60=2.80 avg300=20.16 total={round(seconds * 1e6)}\n"
                "full avg10=0.00 avg60=0.00 avg300=0.00 total=99999999\n"
            )


@pytest.fixture
def machine(tmp_path, monkeypatch):
    made = Machine(tmp_path)
    monkeypatch.setattr(fair_clock, "time", made)
    monkeypatch.setattr(waited, "__defaults__", (tmp_path,))
    return made


def test_on_a_machine_that_keeps_up_a_bound_is_as_strict_as_it_is_written(machine):
    clock = FairClock()
    machine.now += 3.0
    assert clock.within(3.0)
    assert not clock.within(2.9)


def test_time_in_which_something_waited_is_not_counted(machine):
    clock = FairClock()
    machine.now += 5.0
    assert not clock.within(3.0)
    machine.stall(cpu=8.5, io=1.5)  # 1.5 and 1.0 s more, which may be the same seconds
    assert clock.within(5.6)
    assert not clock.within(5.5)


def test_where_the_kernel_tells_nothing_all_time_counts(machine):
    for file in machine.folder.iterdir():
        file.unlink()
    assert waited(machine.folder) == {"cpu": 0.0, "io": 0.0}
    clock = FairClock()
    machine.now += 3.0
    assert not clock.within(2.9)
