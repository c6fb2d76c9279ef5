"""Hostile input at every layer: short runs, and what was found once is fed again."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_input import Layer
from fuzzing import LAYERS, play, replay

from p2pfed.errors import RemoteProtocolError

KEPT = sorted((Path(__file__).with_name("data") / "fuzz").glob("*.hex"))


@pytest.mark.parametrize("name", LAYERS)
def test_a_few_hundred_hostile_frames_bring_out_nothing_but_deliberate_errors(name):
    tally = play(name, 300, seed="quick")
    assert tally.failure is None
    assert tally.accepted > 10
    assert tally.rejected > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_20000_hostile_frames_bring_out_nothing_but_deliberate_errors(name):
    tally = play(name, 20_000, seed="tests")
    assert tally.failure is None
    assert tally.accepted > 1000
    assert tally.rejected > 1000


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_an_input_that_was_kept_does_no_harm(path):
    tally = replay(path.name.partition("-")[0], bytes.fromhex(path.read_text("ascii")))
    assert tally.failure is None


def test_the_same_seed_is_the_same_run_and_another_one_is_not():
    runs = [(t.accepted, t.rejected) for t in (play("yamux", 2000, seed) for seed in "112")]
    assert runs[0] == runs[1] != runs[2]


def layer_that(check, monkeypatch):
    async def whole(data: bytes) -> tuple[int, int]:
        check(data)
        return 1, 0

    monkeypatch.setitem(LAYERS, "broken", Layer(lambda rng: rng.randbytes(4), whole))


def test_an_unexpected_exception_is_a_failure_and_its_input_is_told(monkeypatch):
    def check(data: bytes) -> None:
        if data[0] == 7:
            raise KeyError(data[1])

    layer_that(check, monkeypatch)
    failure = play("broken", 100_000, seed="1").failure
    assert failure is not None
    assert failure.data[0] == 7
    assert "KeyError" in failure.what
    assert replay("broken", failure.data).failure is not None


def test_a_deliberate_error_that_nobody_caught_is_a_failure_too(monkeypatch):
    def check(_: bytes) -> None:
        raise RemoteProtocolError("not where it may come out")

    layer_that(check, monkeypatch)
    assert play("broken", 10, seed="1").failure is not None


def test_memory_that_grows_is_a_failure(monkeypatch):
    kept = []
    layer_that(lambda data: kept.append(data * 25_000), monkeypatch)
    failure = play("broken", 100_000, seed="1").failure
    assert failure is not None
    assert "memory" in failure.what or "at once" in failure.what


@pytest.mark.slow
def test_an_input_that_never_ends_is_a_failure(monkeypatch):
    def check(_: bytes) -> None:
        while True:
            pass

    layer_that(check, monkeypatch)
    failure = play("broken", 10, seed="1").failure
    assert failure is not None
    assert "TooLong" in failure.what
