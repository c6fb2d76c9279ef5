"""The dashboard's page: its bytes, the time to its first paint from cold, rounds of a history."""

from __future__ import annotations

import contextlib
import statistics
import sys
from pathlib import Path

from rows import Row, parser, show

from p2pfed.cli.dashboard import FILES, board_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from board_fakes import Board, sockets
from browser import chromium, page_of, served

TIMES = 5
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def main() -> int:
    """Measure and print; returns the exit code."""
    args = parser(__doc__).parse_args()
    size = sum(len(board_file(name)) for name in FILES)
    show([Row("page", size / 1000, "kB", "goal: at most 300")], as_json=args.json)
    paints, drawn = zip(*(_cold() for _ in range(TIMES)), strict=True)
    rows = [
        Row("first paint, cold", statistics.median(paints), "ms", "goal: below 1000"),
        Row("all panels drawn", statistics.median(drawn), "ms", "from the same moment"),
    ]
    show(rows, as_json=args.json)
    return 0


def _cold() -> tuple[float, float]:
    """A browser that was never started before, and its first page, in ms."""
    with contextlib.ExitStack() as stack:
        socket, _ = stack.enter_context(sockets(Board()))
        server = stack.enter_context(served(socket))
        page = stack.enter_context(page_of(stack.enter_context(chromium())))
        page.goto(server.address)
        page.wait_for_selector("#strip svg")
        return page.evaluate(PAINT), page.evaluate("performance.now()")


if __name__ == "__main__":
    sys.exit(main())
