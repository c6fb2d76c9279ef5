"""The dashboard and the report as people meet them: in a headless Chromium."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import board_fakes
import pytest
from board_fakes import HOSTILE, ROUND, Board, sockets
from browser import chromium, findings, page_of, served

from p2pfed.cli.main import main

pytestmark = pytest.mark.slow

PANELS = ("metric", "privacy", "topology", "bytes", "strip")


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def board():
    return Board()


@pytest.fixture
def live(board):
    with sockets(board) as (socket, token), served(socket) as server:
        server.emit = lambda kind, **data: token.run_sync_soon(lambda: board.emit(kind, **data))
        yield server


@pytest.fixture
def page(browser, live):
    with page_of(browser) as opened:
        opened.goto(live.address)
        opened.wait_for_selector("#peers table")
        yield opened
        assert opened.troubles == []
        assert all(url.startswith((live.address[:20], "data:")) for url in opened.requests)


@pytest.fixture
def report(tmp_path):
    def made(*options: str) -> Path:
        target = tmp_path / "report.html"
        with sockets(Board()) as (socket, _):
            assert main(["--socket", str(socket), "report", "-o", str(target), *options]) == 0
        return target

    return made


def test_all_panels_are_drawn_and_the_token_leaves_the_address(page):
    for panel in PANELS:
        assert page.locator(f"#{panel} svg").count() == 1, panel
    assert page.inner_text("#title") == "St Mary in cardio-eu"
    assert "0.873" in page.inner_text("#tiles")
    assert "2 of 2" in page.inner_text("#tiles")
    assert "token" not in page.url
    page.wait_for_selector("#live-text:text-is('live')")


def test_an_event_arrives_without_a_reload(page, board, live):
    page.wait_for_selector("#live-text:text-is('live')")
    board.round = ROUND + 1
    live.emit("round.started", round=ROUND + 1)
    page.wait_for_selector(f"text=round {ROUND + 1} began")
    page.wait_for_selector(f"#tiles .big:has-text('{ROUND + 1} of')")


def test_a_hostile_name_is_text_and_nothing_else(page):
    page.wait_for_timeout(200)
    assert HOSTILE in page.inner_text("#peers")
    assert page.locator("main img").count() == 0
    assert "owned" not in page.title()


def test_both_themes_hold_and_the_choice_is_kept(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) != before
    page.reload()
    page.wait_for_selector("#peers table")
    assert page.evaluate("document.documentElement.getAttribute('data-theme')") == "dark"


def test_the_systems_dark_theme_is_followed(browser, live):
    with page_of(browser, color_scheme="dark") as page:
        page.goto(live.address)
        page.wait_for_selector("#peers table")
        assert page.evaluate("document.documentElement.getAttribute('data-theme')") == "dark"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, live, theme):
    with page_of(browser, color_scheme=theme, reduced_motion="reduce") as page:
        page.goto(live.address)
        page.wait_for_selector("#peers table")
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        page.click("#planes-ask")
        page.wait_for_selector("#planes-view canvas")
        assert findings(page) == []


def test_on_a_phone_nothing_sticks_out(browser, live):
    with page_of(browser, viewport={"width": 360, "height": 740}, has_touch=True) as page:
        page.goto(live.address)
        page.wait_for_selector("#peers table")
        page.click("#planes-ask")
        page.wait_for_selector("#planes-view canvas")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#strip svg").bounding_box()["width"] <= 360


def test_the_keyboard_reaches_everything(page):
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "(document.activeElement.id || document.activeElement.getAttribute('data-metric')"
                " || document.activeElement.textContent.slice(0, 30)).trim()"
            )
        )
    assert seen[0] == "Skip to the content"
    for wanted in ("theme", "accuracy", "auc", "Measures as a table", "peers", "planes-ask"):
        assert wanted in seen
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_tables_open_and_another_measure_can_be_chosen(page):
    page.click("text=Measures as a table")
    assert "0.8731" in page.inner_text("#table-metric")
    page.click("text=auc")
    assert page.get_attribute("[data-metric=auc]", "aria-pressed") == "true"
    assert "auc" in page.get_attribute("#metric svg", "aria-label")
    page.click("text=Rounds as a table")
    assert "Klinikum" in page.inner_text("#table-strip")


def test_the_measure_that_others_share_comes_first_and_nobody_is_said_to_hide_it(browser, board):
    first, *others = board_fakes.peers()
    first["measure"] = {"name": "auc", "round": 3, "value": 0.9}
    board.make_peers = lambda: [first, *others]
    with sockets(board) as (socket, _), served(socket) as server, page_of(browser) as page:
        page.goto(server.address)
        page.wait_for_selector("#metric svg")
        assert page.locator("#metric-names button").all_inner_texts() == ["auc", "accuracy"]
        assert page.locator("#tiles dt").all_inner_texts()[2].lower() == "auc"
        assert "auc" in page.get_attribute("#metric svg", "aria-label")
        page.click("[data-metric=accuracy]")
        said = page.inner_text("#say-metric")
        assert "Oslo University Hospital does not share this one, but auc;" in said
        assert f"Klinikum München, Hôpital de Genève, {HOSTILE[:23]}… share none." in said


def test_a_measure_of_another_name_is_not_shown_under_the_name_of_ours(page, board):
    assert "accuracy" in page.inner_text("#peers thead")
    first, *others = board_fakes.peers()
    first["measure"] = {"name": "loss", "round": 3, "value": 0.14}
    board.make_peers = lambda: [first, *others]
    page.wait_for_selector("#peers thead >> text=loss")  # by itself, at the next look
    assert "accuracy" not in page.inner_text("#peers thead")
    assert "0.14" in page.inner_text("#peers tbody")


def test_pictures_come_when_asked_and_are_moved_through_by_the_keyboard(page):
    assert page.locator("canvas").count() == 0
    page.click("#planes-ask")
    page.wait_for_selector("#planes-view canvas")
    assert page.locator("#planes-view canvas").count() == 3
    assert "slice 3 of 5" in page.inner_text("#planes-view")
    page.focus("#planes-slice")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("text=axial, slice 4 of 5")
    page.click("[data-case='2']")
    page.wait_for_selector("canvas[aria-label*='worst case']")


def test_a_second_browser_is_shut_out(browser, live):
    with page_of(browser) as first, page_of(browser) as second:
        first.goto(live.address)
        first.wait_for_selector("#peers table")
        second.goto(live.address)
        assert "used already" in second.inner_text("body")


def test_when_the_daemon_goes_the_page_says_so_and_comes_back_by_itself(browser, board):
    with sockets(board) as (socket, _), served(socket) as server, page_of(browser) as page:
        page.goto(server.address)
        page.wait_for_selector("#peers table")
        socket.rename(socket.with_suffix(".away"))
        page.wait_for_selector("text=the daemon does not answer")
        assert "St Mary" in page.inner_text("#title")
        socket.with_suffix(".away").rename(socket)
        page.wait_for_selector(".live.on")


def test_the_command_serves_the_page_and_the_page_says_when_it_has_ended(browser, board):
    words = ["--socket", "", "--json", "dashboard", "--no-browser"]
    with sockets(board) as (socket, _), page_of(browser) as page:
        words[1] = str(socket)
        command = [sys.executable, "-m", "p2pfed", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as serving:
            try:
                page.goto(json.loads(serving.stdout.readline())["data"]["url"])
                page.wait_for_selector("#peers table")
            finally:
                serving.send_signal(signal.SIGINT)
            assert serving.wait(10) == 130
        page.wait_for_selector("text=the dashboard has ended")


def test_a_page_of_another_site_cannot_read_the_dashboard(browser, live):
    with page_of(browser) as page:
        page.goto(live.address)
        page.wait_for_selector("#peers table")
        other = page.context.new_page()
        other.goto("data:text/html,<title>evil</title>")
        place = live.address.partition("?")[0]
        got = other.evaluate(
            "(u) => fetch(u + 'api/snapshot', {credentials: 'include'}).then((r) => r.text(),"
            " () => 'refused')",
            place,
        )
        assert got == "refused"


def test_a_report_opens_from_the_disk_and_asks_for_nothing(browser, report):
    target = report("--include-private", "--include-images")
    assert target.stat().st_size < 1_000_000
    with page_of(browser) as page:
        page.goto(target.as_uri())
        page.wait_for_selector("#peers table")
        page.wait_for_selector("#planes-view canvas")
        for panel in PANELS:
            assert page.locator(f"#{panel} svg").count() == 1, panel
        assert "as of" in page.inner_text("#live-text")
        page.click("#theme")
        page.click("[data-case='1']")
        page.wait_for_selector("canvas[aria-label*='median case']")
        assert findings(page) == []
        asked = [u for u in page.requests if not u.startswith(("file:", "data:"))]
        assert (asked, page.troubles) == ([], [])


def test_a_report_without_private_numbers_says_what_is_left_out(browser, report):
    with page_of(browser) as page:
        page.goto(report().as_uri())
        page.wait_for_selector("#peers table")
        assert "left out of this report" in page.inner_text("#tiles")
        assert not page.is_visible("#planes")
        assert page.troubles == []


def test_the_first_paint_comes_within_a_second(browser, live):
    with page_of(browser) as page:
        page.goto(live.address)
        page.wait_for_selector("#peers table")
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert paint < 1000
