"""`p2pfed privacy audit`: one line per finding, what it says about proof, exit codes, pictures."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from p2pfed.audit import inversion, membership, victims
from p2pfed.audit.findings import Finding
from p2pfed.cli import audit as command
from p2pfed.cli.options import Parser
from p2pfed.errors import ConfigError


def run(*arguments):
    parser = Parser(prog="p2pfed privacy audit")
    command.audit(parser)
    args = parser.parse_args(arguments, namespace=SimpleNamespace(json=False))
    return args.run(args)


def held(name, *, passed=True):
    return Finding(name, "it must hold", "it was measured", passed)


@pytest.fixture
def parts(monkeypatch):
    """The other checks replaced: part -> what it finds; `parts["quick"]` lists what was asked."""
    told = {name: [held(name)] for name in command.PARTS}
    told["quick"] = []
    for part, module in command.PARTS.items():
        fake = ModuleType(module)

        def findings(quick, part=part):
            told["quick"].append(quick)
            return told[part]

        fake.findings = findings
        monkeypatch.setitem(sys.modules, f"p2pfed.audit.{module}", fake)
    return told


@pytest.fixture
def attacks(monkeypatch):
    """The attacks replaced by their outline; holds what they were asked."""
    asked = {}

    def hospital(task, *, folder, site):
        asked.update(task=task, folder=folder, site=site)
        return "patients"

    def play_all(rows, *, quick):
        asked["quick"] = quick
        yield "game"

    def invert(whole, *, count, epsilon):
        asked["count"] = count
        return {}

    monkeypatch.setattr(victims, "hospital", hospital)
    monkeypatch.setattr(victims, "rows_of", lambda whole: "rows")
    monkeypatch.setattr(membership, "play_all", play_all)
    monkeypatch.setattr(membership, "finding", lambda game: held("membership"))
    monkeypatch.setattr(inversion, "invert", invert)
    monkeypatch.setattr(
        inversion, "findings", lambda found, *, what, epsilon: [held(f"inversion/{what}")]
    )
    return asked


def test_every_part_runs_and_tells_each_finding_on_one_line(parts, attacks, capsys):
    assert run() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "passed  law: it must hold. Found: it was measured"
    assert [line.split(":")[0] for line in out[:6]] == [
        "passed  law",
        "passed  samplers",
        "passed  distinguishing",
        "passed  membership",
        "passed  inversion/breast-cancer",
        "passed  inversion/digits",
    ]
    assert out[6].startswith("Failing to invert or to tell members apart is no proof of privacy;")
    assert out[7:] == ["6 claims held"]


def test_a_claim_that_did_not_hold_makes_the_exit_code_1(parts, attacks, capsys):
    parts["samplers"] = [held("samplers/laplace", passed=False)]
    assert run() == 1
    out = capsys.readouterr().out
    assert "FAILED  samplers/laplace: " in out
    assert out.splitlines()[-1] == "6 claims, 1 FAILED"


def test_json_is_one_envelope_that_holds_the_findings(parts, attacks, capsys):
    parts["law"] = [held("law", passed=False)]
    assert run("--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["schema"], said["ok"]) == ("p2pfed.privacy-audit/1", False)
    assert len(said["data"]["findings"]) == 6
    assert said["data"]["findings"][0] == {
        "name": "law",
        "claim": "it must hold",
        "found": "it was measured",
        "passed": False,
    }
    assert "no proof of privacy" in said["data"]["no_proof"]


@pytest.mark.parametrize("part", [*command.PARTS, command.ATTACKS])
def test_one_part_alone(part, parts, attacks, capsys):
    assert run("--only", part) == 0
    first = "membership" if part == command.ATTACKS else part
    assert capsys.readouterr().out.splitlines()[0].startswith(f"passed  {first}: ")
    assert len(parts["quick"]) == (part != command.ATTACKS)
    assert bool(attacks) == (part == command.ATTACKS)


def test_quick_reaches_every_part(parts, attacks):
    run("--quick")
    assert parts["quick"] == [True, True, True]
    assert (attacks["quick"], attacks["count"]) == (True, command.DIGITS_QUICK)
    run()
    assert parts["quick"][3:] == [False, False, False]
    assert (attacks["quick"], attacks["count"]) == (False, command.DIGITS)


def test_with_a_folder_of_data_the_heart_patients_are_attacked(parts, attacks, tmp_path):
    run("--data", str(tmp_path), "--site", "va")
    assert (attacks["task"], attacks["folder"], attacks["site"]) == (
        "heart-disease",
        tmp_path,
        "va",
    )
    run("--data", str(tmp_path), "--task", "breast-cancer")
    assert attacks["task"] == "breast-cancer"


def test_heart_disease_without_its_files_says_which_option_is_missing():
    with pytest.raises(ConfigError, match="--data"):
        run("--only", "attacks", "--task", "heart-disease")


def test_a_folder_for_pictures_that_cannot_be_made_is_told_before_any_work(
    parts, attacks, tmp_path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the folder"):
        run("--out", str(tmp_path / "file" / "pictures"))
    assert not parts["quick"] and not attacks


@pytest.mark.slow
def test_the_real_attacks_draw_for_their_owner_alone_and_say_so(tmp_path, capsys, monkeypatch):
    """Few people, so that the verdicts behind the gate are left to chance and not looked at."""
    monkeypatch.setattr(command, "PATIENTS", 4)
    monkeypatch.setattr(command, "DIGITS_QUICK", 4)
    monkeypatch.setattr(membership, "play_all", lambda rows, quick: [open_game(rows)])
    folder = tmp_path / "pictures"
    run("--only", "attacks", "--quick", "--out", str(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    written = sorted(p.name for p in folder.iterdir())
    assert written == ["inversion.png", "membership.png", "records.png"]
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in folder.iterdir())
    out = capsys.readouterr().out
    assert "The pictures show real records: they stay on this machine" in out
    assert out.count("drawn: ") == 3
    for name in ("membership/none", "inversion/breast-cancer/none", "inversion/digits/none"):
        assert f"passed  {name}: " in out


def open_game(rows):
    target = membership.most_exposed(rows)
    return membership.play(rows, target, victims.plan("none", rows.shape[1]), 5)
