"""A headless Chromium for tests, and the dashboard served to it from a thread.

`page_of` fails a test for anything on the console, for a content policy that was violated, and for
a request to anywhere but the page's own place.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pfed.cli.board_data import Feed
from p2pfed.cli.dashboard import board_of, serve, shown_pictures
from p2pfed.cli.locate import admin_client
from p2pfed.cli.loopback import Loopback

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
]


def need_chromium() -> str:
    """The path of Chromium; skips the test without one, except in CI."""
    missing = ""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        missing = "playwright for Python is not installed: pip install p2pfed[test]"
    if not CHROMIUM:
        missing = "there is no Chromium: scripts/browser installs one"
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    return str(CHROMIUM)


def findings(page: Any) -> list[str]:
    """What axe-core holds for serious or critical; skips the test without it, except in CI."""
    try:
        import axe_playwright_python as axe
    except ImportError:
        missing = "axe-playwright-python is not installed: pip install p2pfed[test]"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    script = Path(axe.__file__).parent / "axe.min.js"
    page.evaluate(script.read_text("utf-8"))  # past the content policy, unlike a script tag
    found = page.evaluate("() => axe.run()")["violations"]
    bad = [v for v in found if v["impact"] in {"serious", "critical"}]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in bad]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser, closed at the end."""
    path = need_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page_of(browser: Any, **options: Any) -> Iterator[Any]:
    """A page in a context of its own; `page.troubles` lists what must not have happened."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(15_000)
    troubles: list[str] = []
    page.requests = []
    page.troubles = troubles
    page.on("console", lambda m: troubles.append(m.text) if m.type in {"error", "warning"} else 0)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.add_init_script(
        "document.addEventListener('securitypolicyviolation',"
        " e => console.error('policy: ' + e.violatedDirective + ' ' + e.blockedURI))"
    )
    try:
        yield page
    finally:
        context.close()


def arguments(socket: Path, **more: Any) -> argparse.Namespace:
    """What the commands are given."""
    given = {"socket": str(socket), "config": None, "json": False, "evaluation": None}
    return argparse.Namespace(**{**given, **more})


@contextlib.contextmanager
def served(socket: Path, **more: Any) -> Iterator[Loopback]:
    """The dashboard of the daemon at a socket, as the command serves it."""
    args = arguments(socket, **more)
    feed = Feed(admin_client(args))
    feed.start()
    with serve(0, board_of(args), feed, lambda: shown_pictures(args)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            feed.stop()
            server.shutdown()
            thread.join()
