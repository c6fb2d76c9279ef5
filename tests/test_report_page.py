"""The demo's page: one file, nothing fetched, nothing unescaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from p2pfed.report.page import demo_page


def _report(**changes):
    score = {"own": 0.9, "everyone": 0.8}
    methods = dict.fromkeys(("alone", "together_gate", "together_none", "pooled"), score)
    status = {
        "run": {"model_hash": "ab" * 32, "deltas": 7},
        "privacy": {"spent_epsilon": 1.25, "releases": 3},
        "traffic": {"sent_bytes": 4200},
    }
    report = {
        "task": "heart-disease",
        "seed": 0,
        "privacy": "mechanism svt, total ε = 10, δ = 1e-5, unit patient",
        "failures": [],
        "comparison": [{"hospital": "St Mary", "patients": 30, **methods}],
        "gate": {"St Mary": status},
    }
    return {**report, **changes}


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in {"src", "href"}]


def _read(page):
    reader = _Tags()
    reader.feed(page)
    return reader


def test_the_page_runs_no_script_and_fetches_nothing():
    reader = _read(demo_page(_report()))
    assert "script" not in reader.tags and "link" not in reader.tags
    assert all(link.startswith("#") for link in reader.links)
    assert "@import" not in demo_page(_report())


def test_names_of_hospitals_are_escaped_everywhere():
    evil = '<img src=x onerror="alert(1)">'
    report = _report(failures=[evil], privacy=evil)
    report["comparison"][0]["hospital"] = evil
    report["gate"] = {evil: report["gate"]["St Mary"]}
    assert "img" not in _read(demo_page(report)).tags


def test_a_failure_is_told_before_any_result():
    page = demo_page(_report(failures=["the hospitals' model hashes differ"]))
    assert page.index("hashes differ") < page.index("What the network is worth")


def test_the_page_says_what_protected_the_patients_and_what_each_node_said():
    page = demo_page(_report())
    assert "total ε = 10" in page and "1.25" in page and ("ab" * 12) in page
    assert re.search(r"0\.900 / 0\.800", page)


def test_equal_results_give_equal_bytes():
    drop = lambda page: re.sub(r'(id="|url\(#|href="#)[^")]*', "", page)  # noqa: E731 - svg ids vary
    assert drop(demo_page(_report())) == drop(demo_page(_report()))
