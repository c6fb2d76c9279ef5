"""Scenario files: everything wrong is told at once, in words that say what would be right."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_scenario import SMALL

from p2pfed.errors import ConfigError
from p2pfed.simulate.happenings import DOINGS
from p2pfed.simulate.scenario import bundled, load_scenario, read_scenario

ROOT = Path(__file__).resolve().parent.parent


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        read_scenario(text, "mine")
    error = raised.value
    lines = error.why.splitlines()
    assert error.what == f"the scenario mine has {len(lines)} mistake" + "s" * (len(lines) > 1)
    assert "docs/simulate.md" in error.do
    return lines


def test_all_mistakes_of_a_file_are_told_at_once_with_what_would_be_right():
    found = mistakes(
        """
        until_s = "long"
        colour = "red"
        [members]
        count = 4
        late = ["h9"]
        byzantine = { equivocate = ["h1"], flip = ["h1"] }
        [training]
        kind = "softmx"
        seconds = [3, 1]
        [run]
        roundz = 3
        deadline_s = -1
        outer = { name = "sgd" }
        task = "mine"
        [network]
        loss = 2
        [timers]
        away_after_s = 1
        [churn]
        crash_every_s = true
        [check]
        agree = 1
        [[event]]
        at_s = 1e9
        do = "partition"
        members = ["h0-h1", "h7", "hx", "h1"]
        [[event]]
        do = "hail"
        [[event]]
        at_s = 5
        do = "crash"
        """
    )
    expected = [
        "until_s: 'long' is wrong; a number from 1 to 1e+08 is expected",
        "members.late: there is no member 'h9'; members are h0 to h3; ranges are written h0-h2",
        "members.byzantine.flip: h1 does 'equivocate' already; one lie each",
        "training.kind: 'softmx' is unknown; did you mean 'softmax'?",
        "training.seconds: [3, 1] is wrong; two numbers [least, most] are expected",
        "network.loss: 2 is wrong; a number from 0 to 0.9 is expected",
        "timers: a peer would be given up before it could beat;"
        " beat_interval_s < suspect_after_s < away_after_s is expected",
        "check.agree: 1 is wrong; true or false is expected",
        "run.roundz: there is no such key; did you mean 'rounds'?",
        "run.task: there is no such key",
        "churn.crash_every_s: True is wrong; a number from 0 up is expected",
        "event[0].at_s: 1000000000.0 is wrong; a number from 0 to 600 is expected",
        "event[0].members: there is no member 'h7'; members are h0 to h3; ranges are written h0-h2",
        "event[0].members: there is no member 'hx'; members are h0 to h3; ranges are written h0-h2",
        "event[0].members: a member stands twice",
        "event[1].at_s: is missing; when does it happen?",
        "event[2].members: is missing; to whom does 'crash' happen?",
        "colour: there is no such key",
    ]
    assert set(expected) - set(found) == set()
    rest = sorted(line.partition(":")[0] for line in set(found) - set(expected))
    assert rest == ["event[1].do", "run.deadline_s", "run.outer.name"]  # words of the run file


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("until_s = nan", "until_s: nan is wrong"),
        ("until_s = 0", "until_s: 0 is wrong"),
        (f"until_s = {'9' * 400}", "until_s: 999"),
        (f"[churn]\ncrash_every_s = {'9' * 400}", "churn.crash_every_s: 999"),
        (f"[training]\nseconds = [1, {'9' * 400}]", "training.seconds: [1, 999"),
        (f"[run]\nepsilon = {'9' * 400}", "run.epsilon: '999"),
        ("[run]\nepsilon = inf", "run.epsilon: 'inf' is wrong"),
        ("[run]\nrounds = 2.5", "run.rounds: 2.5 is wrong"),
        ("[run]\naveraging = { mode = 'pairwise' }\nrobust = 'none'", "run"),
        ("[members]\ncount = 2\nsamples = [1]", "members.samples: [1] is wrong; an integer, 2"),
        ("[members]\ncount = 1025", "members.count: 1025 is wrong; an integer from 1 to 1024"),
        ("[members]\ncount = 1\nbyzantine = { flip = ['h0'] }", "members: nobody honest"),
        ("[members]\nunlisted = ['h1']", "members.unlisted: no event adds h1; do = 'add'"),
        ("[check]\nfull_fold_every = 2\n[training]\nkind = 'quadratic'", "check.full_fold_every"),
        ("members = 3", "members: 3 is no table; write it as [members]"),
        ("event = 3", "event: is no list of tables; write each as [[event]]"),
        ("title = 5", "title: 5 is wrong; a text is expected"),
        ('title = "a\\u001b[2J"', "title: "),
    ],
)
def test_one_mistake_is_one_line_that_names_its_key(text, told):
    [line] = mistakes(text)
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ("at_s = 601\ndo = 'heal'", "at_s: 601 is wrong; a number from 0 to 600"),
        ("at_s = -1\ndo = 'heal'", "at_s: -1 is wrong"),
        ("at_s = 9\ndo = 'heal'\nsilent = true", "silent: there is no such key"),
        ("at_s = 9\ndo = 'clog'\nmembers = ['h0']\nuntil_s = 8", "until_s: 8 is wrong; a number"),
        ("at_s = 9\ndo = 'flap'\nmembers = ['h0']\nperiod_s = 0", "period_s: 0 is wrong"),
        ("at_s = 9\ndo = 'clock'\nmembers = ['h0']\nrate = 0", "rate: 0 is wrong"),
        ("at_s = 9\ndo = 'crash'\nmembers = 'h0'", "members: 'h0' is wrong; a list like"),
        ("at_s = 9\ndo = 'crash'\nmembers = { some = 6 }", "members.some: 6 is wrong"),
        ("at_s = 9\ndo = 'start'\nmembers = { some = 1 }", "members: the seed chooses among"),
        ("at_s = 9\ndo = 'one-way'\nmembers = ['h0']\nto = ['h5']", "to: there is no member 'h5'"),
    ],
)
def test_a_mistake_in_an_event_names_the_event(event, told):
    good = "[[event]]\nat_s = 300\ndo = 'heal'\n"  # later, and first in the file
    [line] = mistakes(f"{good}[[event]]\n{event}")
    assert line.startswith(f"event[1].{told}")


def test_who_is_added_must_be_unlisted_and_the_event_is_counted_as_the_file_does():
    late = "[[event]]\nat_s = 300\ndo = 'heal'\n"
    [line] = mistakes(f"{late}[[event]]\nat_s = 9\ndo = 'add'\nmembers = ['h1']")
    assert line == "event[1]: adds a member that is listed; name it in members.unlisted"


@pytest.mark.parametrize("text", ["until_s = ", "a = 1\na = 2", f"until_s = {'9' * 5000}"])
def test_what_is_not_toml_is_told_with_its_line(text):
    with pytest.raises(ConfigError) as raised:
        read_scenario(text, "mine", file="mine.toml")
    assert raised.value.what == "mine.toml is not TOML"
    assert raised.value.why
    assert raised.value.do


def test_a_scenario_that_is_not_there_is_told_with_where_to_look(tmp_path):
    for where in ("no-such-scenario", str(tmp_path / "none.toml"), str(tmp_path)):
        with pytest.raises(ConfigError) as raised:
            load_scenario(where)
        assert where in raised.value.what
        assert raised.value.why
        assert raised.value.do == "run: p2pfed simulate --list"
    (tmp_path / "latin.toml").write_bytes(b'title = "\xfc"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_scenario(str(tmp_path / "latin.toml"))


@pytest.mark.parametrize("name", sorted(bundled()))
def test_every_bundled_scenario_parses_and_has_a_title_of_its_own(name):
    scenario = load_scenario(name)
    assert scenario.name == name
    assert 10 < len(scenario.title) <= 100
    assert scenario.title != name
    assert set(scenario.lies) < set(range(scenario.members))


def test_the_bundled_scenarios_play_everything_that_can_happen_and_every_lie():
    scenarios = [load_scenario(name) for name in bundled()]
    done = {event.do for scenario in scenarios for event in scenario.events}
    missing = {word.rstrip("*") for word in DOINGS} - done
    assert missing == {"restart", "clog"}  # crashes restart themselves; clogs come from churn
    assert any(s.churn.clog_every_s for s in scenarios)
    lies = {lie for scenario in scenarios for lie in scenario.lies.values()}
    assert lies == {"equivocate", "far-ahead", "hasty", "flip", "replay", "garbage", "miscount"}


def test_the_scenarios_are_installed_with_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    patterns = setup["options.package_data"]["p2pfed"].split()
    installed = {path for pattern in patterns for path in (ROOT / "p2pfed").glob(pattern)}
    scenarios = {*(ROOT / "p2pfed" / "simulate" / "scenarios").iterdir()}
    assert scenarios
    assert scenarios <= installed


def test_a_scenario_says_only_what_differs():
    scenario = read_scenario("", "empty")
    assert (scenario.title, scenario.members, scenario.samples) == ("empty", 5, (100,) * 5)
    assert scenario.until_s == 600
    small = read_scenario(SMALL, "small")
    assert (small.run["rounds"], small.liveness.gossip_interval) == (6, 2.0)


def test_ranges_name_every_member_between_and_events_are_in_the_order_of_time():
    text = "[members]\ncount = 6\nlate = ['h0', 'h2-h4']\n"
    text += "[[event]]\nat_s = 9\ndo = 'heal'\n[[event]]\nat_s = 3\ndo = 'heal'\n"
    scenario = read_scenario(text, "mine")
    assert scenario.late == (0, 2, 3, 4)
    assert [event.at_s for event in scenario.events] == [3, 9]


ODD = [
    *("-1", "0", "1e400", "nan", "true", '""', '"x"', "[]", "{}", "[[]]", "[1, 'a']", "9" * 330),
    *("1979-05-27", "{ some = 1 }", "'h0'", "['h0']", "{ x = {} }"),
]
TABLES = {
    "members": "count samples median sigma late unlisted byzantine",
    "training": "kind seconds",
    "run": "rounds epsilon clip outer encoding averaging num_parameters min_live top_fraction",
    "network": "latency_s loss spike spike_s contacts",
    "timers": "tick_s sync_s beat_interval_s full_mesh neighbours",
    "check": "full_fold_every every_s patience agree sample_s",
    "churn": "until_s crash_every_s down_s clog_s",
    "[event]": "at_s do members to silent period_s down_s effects latency_s",
}
KEYS = [(table, key) for table, keys in TABLES.items() for key in keys.split()]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ODD), min_size=1, max_size=3))
def test_property_no_value_makes_the_reader_fail_otherwise_than_by_telling_mistakes(values):
    text = "".join(f"[{table}]\n{key} = {value}\n" for (table, key), value in values.items())
    try:
        told: object = read_scenario(text, "odd").members
    except ConfigError as error:
        told = error.why
    assert told
