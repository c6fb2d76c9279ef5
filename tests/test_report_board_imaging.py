"""The dashboard of a hospital that trains on images: real daemons, real trainers, a browser."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, findings, need_chromium, page_of

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, run_constants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ROUNDS = 1
PATIENCE_S = 240.0
PHANTOMS = 8  # of which two are for testing: the lower one is median and worst
EXPERT, MODEL = "86,180,233", "230,159,0"
PIXELS = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const found = {};
  for (let i = 0; i < data.length; i += 4) {
    const colour = `${data[i]},${data[i + 1]},${data[i + 2]}`;
    found[colour] = (found[colour] || 0) + 1;
  }
  return found;
}"""


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Iterator[Daemon]:
    """One of two hospitals whose trainers have trained a round on made-up volumes."""
    need_chromium()
    names = ("Ashford", "Birchwood")
    hospitals = tuple(Hospital(name, 6, {"phantoms": PHANTOMS}) for name in names)
    folder = tmp_path_factory.mktemp("imaging") / "nodes"
    network = Federation(folder, Cast("hippocampus", None, hospitals, "", "", ""), epsilon="0")
    with network.running():
        constants = run_constants("none", rounds=ROUNDS, epsilon=None)
        network.make_run("imaging-1", {**constants, "quorum": 1.0, "deadline_s": 120.0}, seed=0)
        network.write_bootstrap()
        daemons = list(network.daemons.values())
        network.start_all()
        wait_for(lambda: _judged(daemons[-1]), PATIENCE_S, "the model of the run is judged")
        yield daemons[-1]


def _judged(daemon: Daemon) -> bool:
    if not (daemon.sockets / "trainer.sock").exists():
        return False
    return any(m["round"] == ROUNDS for m in daemon.private.get("/v1/metrics")["metrics"])


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@contextlib.contextmanager
def opened(browser: Any, daemon: Daemon, **options: Any) -> Iterator[Any]:
    """The page of `p2pfed dashboard`, with the pictures asked for."""
    command = [*_p2pfed(daemon), "--json", "dashboard", "--no-browser"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as serving,
        page_of(browser, **options) as page,
    ):
        page.set_default_timeout(60_000)
        try:
            page.goto(json.loads(serving.stdout.readline())["data"]["url"])
            page.click("#planes-ask")
            page.wait_for_selector("#planes-view canvas")
            yield page
            assert page.troubles == []
        finally:
            serving.send_signal(signal.SIGINT)


def _p2pfed(daemon: Daemon) -> list[str]:
    return [sys.executable, "-m", "p2pfed", "-c", str(daemon.folder / "p2pfed.toml")]


def _planes(page: Any) -> list[dict[str, int]]:
    """How many pixels of each plane have which colour."""
    return [canvas.evaluate(PIXELS) for canvas in page.locator("#planes-view canvas").all()]


def _after(page: Any, act: Any) -> list[dict[str, int]]:
    """The planes once they are drawn anew; they are put up together."""
    page.evaluate("document.querySelector('#planes-view canvas').id = 'old'")
    act()
    page.wait_for_selector("#old", state="detached")
    return _planes(page)


def test_a_real_trainers_pictures_are_drawn_with_both_outlines_and_moved_through(browser, hospital):
    with opened(browser, hospital) as page:
        middle = _planes(page)
        assert len(middle) == 3
        for plane in middle:
            assert len(plane) > 30  # shades of grey: a volume, not a blank
            assert plane[EXPERT] > 50
        assert sum(plane.get(MODEL, 0) for plane in middle) > 50
        ranks = page.locator("[data-case]").all_inner_texts()
        assert [rank.partition(":")[0] for rank in ranks] == ["best", "median, worst"]
        assert "phantom_00" in page.inner_text("#planes-tools")
        without = _after(page, lambda: page.click("[data-layer=model]"))
        assert [plane.get(MODEL, 0) for plane in without] == [0, 0, 0]
        without = _after(page, lambda: page.click("[data-layer=expert]"))
        assert [plane.get(EXPERT, 0) for plane in without] == [0, 0, 0]
        page.focus("#planes-slice")
        first = _after(page, lambda: page.keyboard.press("Home"))
        assert all(one != other for one, other in zip(first, without, strict=True))
        assert page.inner_text("#planes-view").count(", slice 1 of ") == 3
        other_case = _after(page, lambda: page.click("[data-case='1']"))
        assert other_case != without
        assert "dice" in page.inner_text("#metric-names")


def test_the_pictures_of_a_case_have_one_scale_and_fit_a_phone_in_the_dark(browser, hospital):
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
    with opened(browser, hospital, **phone) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        sagittal, coronal, axial = (c.bounding_box() for c in page.locator("canvas").all())
        assert coronal["width"] == pytest.approx(axial["width"], abs=1)  # left to right
        assert sagittal["height"] == pytest.approx(coronal["height"], abs=1)  # foot to head
        assert sagittal["width"] == pytest.approx(axial["height"], abs=1)  # back to front
        assert findings(page) == []


def test_the_report_with_images_shows_the_same_cases_from_the_disk(browser, hospital, tmp_path):
    target = tmp_path / "report.html"
    command = [*_p2pfed(hospital), "report", "-o", str(target), "--include-images"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert target.stat().st_size < 1_000_000
    with page_of(browser) as page:
        page.goto(Path(target).as_uri())
        page.wait_for_selector("#planes-view canvas")
        assert sum(plane.get(EXPERT, 0) for plane in _planes(page)) > 150
        assert page.troubles == []
