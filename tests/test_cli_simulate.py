"""`p2pfed simulate`: results, the command that replays a broken seed, errors, what is loaded."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from small_scenario import SMALL

from p2pfed.cli.main import main
from p2pfed.simulate.node import Ledger
from p2pfed.simulate.play import Result
from p2pfed.simulate.scenario import bundled

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SMALL.replace("rounds = 6", "rounds = 3").replace("until_s = 60", "until_s = 20")
    (tmp_path / "small one.toml").write_text(f'title = "Three rounds"\n{text}', "utf-8")
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["simulate", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def plant_a_bug(monkeypatch) -> None:
    """Every release is one more than what was debited."""

    def keep(ledger, round_, payload):
        ledger.outputs[round_] = (payload, ledger.debits + 1, ledger.head)

    monkeypatch.setattr(Ledger, "keep", keep)


def test_each_seed_is_one_line_and_the_last_line_says_that_everything_held(capsys):
    code, out, err = run(capsys, "small one.toml", "--seeds", "2")
    assert (code, err) == (0, "")
    one, two, last = out.splitlines()
    assert one.startswith("seed 0: 3 rounds, 9 releases, 0.0 node-hours, ")
    assert two.startswith("seed 1: 3 rounds, 9 releases, ")
    assert one.rpartition("trace ")[2] != two.rpartition("trace ")[2]
    assert last == "small one: 2 seeds, 0.0 node-hours: every invariant held"


def test_seeds_are_counted_or_named_and_a_range_holds_both_ends(capsys):
    for words, seeds in (
        (["--seeds", "1"], ["0"]),
        (["--seeds", "7-8"], ["7", "8"]),
        (["--seed", "7"], ["7"]),
    ):
        code, out, _ = run(capsys, "small one.toml", "--no-trace", *words)
        assert code == 0
        assert [line.split()[1].rstrip(":") for line in out.splitlines()[:-1]] == seeds
        assert "trace" not in out


def test_a_broken_invariant_is_told_with_the_command_that_replays_it(capsys, monkeypatch):
    plant_a_bug(monkeypatch)
    code, out, err = run(capsys, "small one.toml", "--seeds", "4-5")
    assert code == 1
    assert out == "small one: 2 seeds, 0.0 node-hours: 2 BROKE: [4, 5]\n"
    broke, where, replay, *_ = err.splitlines()
    assert broke.startswith("seed 4 BROKE: h")
    assert broke.endswith("released 2 times and debited 1")
    assert where.startswith("at ")
    assert where.endswith(", scenario small one.toml")
    assert replay == "replay: p2pfed simulate 'small one.toml' --seed 4"

    program, *words = shlex.split(replay.removeprefix("replay: "))
    assert program == "p2pfed"
    code, again = main(words), capsys.readouterr().err
    assert code == 1
    assert again.splitlines() == [broke, where, replay]


def test_a_core_that_raises_is_told_with_its_traceback(capsys, monkeypatch):
    def debit(_ledger, _round):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Ledger, "debit", debit)
    code, _, err = run(capsys, "small one.toml")
    assert code == 1
    assert "seed 0 BROKE: a core raised ZeroDivisionError: planted" in err
    assert "in debit" in err


@pytest.mark.parametrize("where", ["-", "results.json"])
def test_the_json_result_has_its_schema(capsys, folder, where):
    code, out, _ = run(capsys, "small one.toml", "--seeds", "2", "--json", where)
    assert code == 0
    text = out if where == "-" else (folder / where).read_text("utf-8")
    told = json.loads(text, parse_constant=pytest.fail)  # neither NaN nor Infinity
    assert (told["schema"], told["ok"]) == ("p2pfed.simulation/1", True)
    data = told["data"]
    assert data.keys() == {"scenario", "title", "members", "gossip_interval_s", "seeds"}
    assert (data["title"], data["members"], data["gossip_interval_s"]) == ("Three rounds", 3, 2)
    assert [seed["seed"] for seed in data["seeds"]] == [0, 1]
    for seed in data["seeds"]:
        assert seed.keys() == {field.name for field in fields(Result)}
        assert seed["points"][-1].keys() == {
            *("t", "nodes", "models", "round_least", "round_median", "round_most"),
            *("score_worst", "score_best", "bytes_per_round", "fact_bytes_per_round"),
        }
        assert seed["coverage"] == sorted(seed["coverage"])


def test_the_json_result_of_a_broken_seed_says_so(capsys, monkeypatch):
    plant_a_bug(monkeypatch)
    code, out, err = run(capsys, "small one.toml", "--json", "-")
    told = json.loads(out)
    assert (code, told["ok"]) == (1, False)
    assert told["data"]["seeds"][0]["broken"].endswith("released 2 times and debited 1")
    assert "replay: " in err


@pytest.mark.slow
def test_plots_are_drawn_also_into_a_folder_that_was_not_there(capsys, folder):
    code, *_ = run(capsys, "small one.toml", "--plots", "new/plots")
    assert code == 0
    names = {path.name for path in (folder / "new/plots").iterdir()}
    assert names == {"consensus.png", "coverage.png", "bytes.png"}


# --- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no scenario is named"),
        (["no-such"], "there is no scenario 'no-such'"),
        (["none.toml"], "cannot read the scenario none.toml"),
        (["small one.toml", "--seeds", "0"], "--seeds '0' names no seed"),
        (["small one.toml", "--seeds", "9-3"], "--seeds '9-3' names no seed"),
        (["small one.toml", "--seeds", "few"], "--seeds 'few'"),
        (["small one.toml", "--seeds", "9999999"], "--seeds '9999999' names no seed"),
        (["small one.toml", "--seed", "1-2"], "--seed '1-2'"),
        (["small one.toml", "--json", "no/where.json"], "cannot write no/where.json"),
        (["small one.toml", "--plots", "small one.toml"], "cannot make the folder small one.toml"),
        (
            ["small one.toml", "--sceeds", "3"],
            "p2pfed simulate: unrecognized arguments: --sceeds 3",
        ),
    ],
)
def test_wrong_arguments_are_told_in_at_most_three_lines(capsys, words, told):
    code, out, err = run(capsys, *words)
    assert code == 2
    assert err.splitlines()[0].startswith(told)
    assert 2 <= len(err.splitlines()) <= 3
    if "--json" not in words:
        assert out == ""


def test_a_scenario_with_mistakes_is_refused_with_all_of_them(capsys, folder):
    (folder / "bad.toml").write_text("until = 3\n[network]\nloss = 7\n", "utf-8")
    code, out, err = run(capsys, "bad.toml")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "bad.toml has 2 mistakes",
        "network.loss: 7 is wrong; a number from 0 to 0.9 is expected",
        "until: there is no such key; did you mean 'until_s'?",
        "correct the file; what a scenario may say is told in docs/simulate.md",
    ]


# --- the list ----------------------------------------------------------------------------------


def test_the_list_names_every_scenario_with_its_title(capsys):
    code, out, err = run(capsys, "--list")
    assert (code, err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert rows == bundled()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--list"], ["partition-short", "--seeds", "no"]])
def test_it_loads_neither_torch_nor_libp2p_nor_trio(words):
    heavy = ("torch", "libp2p", "trio", "matplotlib", "pydantic", "starlette", "p2pfed.node")
    source = (
        "import sys\nfrom p2pfed.cli.main import main\ncode = main(sys.argv[1:])\n"
        f"print('LOADED', sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, "simulate", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.splitlines()[-1] == "LOADED []"
