"""A reader of the daemon's log: more verbose than the log itself, bounded, from any thread."""

from __future__ import annotations

import logging
from contextlib import aclosing

import pytest
import trio

from p2pfed.errors import ConfigError
from p2pfed.node import logtap
from p2pfed.node.logs import LogHandler, Plain, as_text
from p2pfed.node.logtap import follow_log, log_level

logger = logging.getLogger("p2pfed.test")


class Written:
    """A log file that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)

    def close(self) -> None:
        pass


@pytest.fixture
def written():
    root, file = logging.getLogger(), Written()
    handler = LogHandler(Plain(), as_text, file)
    handler.setLevel(logging.WARNING)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    return file


async def started(lines, sink, count):
    async with aclosing(lines):
        async for line in lines:
            sink.append(line)
            if len(sink) >= count:
                return


async def test_a_reader_sees_more_than_the_log_which_stays_as_it_is(written, nursery):
    seen: list[dict] = []
    nursery.start_soon(started, follow_log(log_level("debug")), seen, 3)
    await trio.testing.wait_all_tasks_blocked()
    logger.debug("a fine point of %s", "h1")
    logger.info("event", extra={"event": "event", "fields": {"round": 3}})
    await trio.to_thread.run_sync(logger.warning, "from a thread")
    with trio.fail_after(30):
        while len(seen) < 3:  # noqa: ASYNC110 - of threads nobody is told
            await trio.sleep(0.005)
    assert [(line["level"], line["message"]) for line in seen] == [
        ("debug", "a fine point of h1"),
        ("info", "event round=3"),
        ("warning", "from a thread"),
    ]
    assert set(seen[0]) == {"ts", "level", "logger", "message"}
    assert len(written.lines) == 1
    assert "from a thread" in written.lines[0]
    await trio.testing.wait_all_tasks_blocked()
    assert logging.getLogger().level == logging.WARNING  # the reader has gone
    assert not logtap._readers


async def test_a_slow_reader_loses_the_oldest_and_is_told_how_many(written, monkeypatch):
    monkeypatch.setattr(logtap, "KEPT", 3)
    async with aclosing(follow_log(logging.INFO)) as lines, trio.open_nursery() as nursery:
        seen: list[dict] = []
        nursery.start_soon(started, lines, seen, 4)
        await trio.testing.wait_all_tasks_blocked()
        for i in range(10):
            logger.info("line %d", i)
    assert seen[0] == {"type": "gap", "lost": 7}
    assert [line["message"] for line in seen[1:]] == ["line 7", "line 8", "line 9"]


async def test_what_the_log_may_not_hold_no_reader_sees(written):
    logging.getLogger().handlers[-1].plain = Plain()
    seen: list[dict] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(started, follow_log(logging.INFO), seen, 1)
        await trio.testing.wait_all_tasks_blocked()
        logger.info("weights %s", [0.25, 0.5, 0.75, 1.0, 1.25])
    assert "0.5" not in seen[0]["message"]


@pytest.mark.parametrize("text", ["", "DEBUG", "trace", "10"])
def test_an_unknown_level_is_a_mistake_of_the_caller(text):
    with pytest.raises(ConfigError, match="is no level"):
        log_level(text)
