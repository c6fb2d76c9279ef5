"""The ceremony of joining through the real commands, and every mistake that people make in it."""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import stat
from pathlib import Path

import pytest
from admin_fakes import FakeBackend, daemon, empty_home
from transcripts import stage
from typed_commands import Commands

from p2pfed.cli.approval import Approval
from p2pfed.cli.main import main
from p2pfed.config import load_settings
from p2pfed.errors import ConfigError
from p2pfed.identity.book import RosterBook
from p2pfed.identity.invite import Invite, Request
from p2pfed.identity.keys import NodeKey, StewardKey
from p2pfed.identity.signing import SignedDocument

ADDRESS = "/dns4/p2p.anna.example/tcp/4201"


class Desk(Commands):
    """A folder with a network of one steward, ana, and the commands run in it."""

    def __init__(self, folder: Path, capsys, monkeypatch) -> None:
        super().__init__(capsys)
        self.folder, self._patch = folder, monkeypatch
        self.found("r1.json", "ana")

    def found(self, out: str, *names: str, threshold: int = 1, network: str = "heart") -> None:
        for name in names:
            if not (self.folder / f"{name}.key").exists():
                self.ok("steward", "key", "new", f"{name}.key")
        stewards = [f"--steward={name}={name}.key" for name in names]
        lasts = ["--threshold", threshold, "--expires", "365d", "--out", out]
        self.ok("steward", "found", "--network", network, *stewards, *lasts)
        for name in names[:threshold]:
            self.ok("steward", "sign", out, "--key", f"{name}.key")

    def refused(self, *arguments, code: int = 7) -> list[str]:
        """The three lines of an error."""
        got, out, err = self.run(*arguments)
        assert got == code, (got, out, err)
        lines = err.splitlines()
        assert len(lines) == 3, err
        return lines

    def invite(self, roster: str = "r1.json", name: str = "St Anna", key: str = "ana", **more):
        options = [part for flag, value in more.items() for part in (f"--{flag}", value)]
        what = ["invite", "create", roster, "--for", name, "--key", f"{key}.key", *options]
        return self.data(*what)["invite"]

    def answer(self, invite: str, folder: str = "anna", *more) -> Path:
        task = ["--task", "breast-cancer", "--epsilon", 8, "--samples", 184]
        self.ok("init", "--invite", invite, "--dir", folder, *task, *more)
        return self.folder / folder / "request.txt"

    def approval(self, request, roster: str = "r1.json", out: str = "r2.json", key: str = "ana"):
        requests = request if isinstance(request, list) else [request]
        where = ["--roster", roster, "--out", out, "--key", f"{key}.key", "--yes"]
        return ("invite", "approve", *requests, *where)

    def at(self, moment: dt.timedelta) -> None:
        """Set this machine's clock, as the commands see it."""
        now = dt.datetime.now(dt.UTC).replace(microsecond=0) + moment
        for module in ("invite", "invite_approve"):
            self._patch.setattr(f"p2pfed.cli.{module}._now", lambda: now)

    def roster(self, file: str) -> dict:
        return self.data("roster", "show", file)


@pytest.fixture
def desk(capsys, monkeypatch):
    with empty_home(monkeypatch) as folder:
        monkeypatch.setenv("P2PFED_HOME", str(folder / "state"))
        yield Desk(folder, capsys, monkeypatch)


# --- the ceremony --------------------------------------------------------------------------------


def test_an_invited_hospital_comes_into_the_roster(desk):
    request = desk.answer(desk.invite())
    told = desk.ok(*desk.approval(request))
    key = NodeKey.load(desk.folder / "anna" / "node.key")
    assert desk.roster("r2.json")["members"] == [
        {
            "name": "St Anna",
            "peer_id": key.peer_id,
            "roles": ["train", "relay"],
            "samples": 184,
        }
    ]
    assert "next: send it to St Anna, to run: p2pfed join r2.json" in told
    assert desk.ok("roster", "verify", "r2.json", "--against", "r1.json").startswith(
        "ok: roster v2"
    )


def test_init_pins_the_network_and_gives_away_no_key(desk):
    invite = desk.invite()
    told = desk.data(
        *("init", "--invite", invite, "--dir", "anna", "--task", "breast-cancer"),
        *("--epsilon", 8, "--samples", 184, "--announce", ADDRESS),
    )
    settings = load_settings(desk.folder / "anna" / "p2pfed.toml")
    assert settings.network.id == desk.roster("r1.json")["network_id"]
    assert settings.node.name == "St Anna"
    assert settings.node.announce == (ADDRESS,)
    seed = NodeKey.load(desk.folder / "anna" / "node.key").seed.hex()
    assert seed not in json.dumps(told)
    assert told["request"] == (desk.folder / "anna" / "request.txt").read_text().strip()
    assert Path(settings.ledger_path).parent.is_dir()


def test_both_sides_see_the_same_two_numbers(desk):
    invite = desk.invite()
    made = desk.data(
        *("init", "--invite", invite, "--dir", "anna"),
    )
    asked = desk.ok(*desk.approval(desk.folder / "anna" / "request.txt"))
    assert made["network_fingerprint"] in asked
    assert made["node_fingerprint"] in asked
    other = desk.invite("r2.json", "Ben")
    again = desk.data("init", "--invite", other, "--dir", "ben")
    assert again["network_fingerprint"] == made["network_fingerprint"]
    assert again["node_fingerprint"] != made["node_fingerprint"]


def test_a_node_without_a_task_asks_for_no_weight(desk):
    desk.ok("init", "--invite", desk.invite(), "--dir", "anna")
    desk.ok(*desk.approval(desk.folder / "anna" / "request.txt"))
    (member,) = desk.roster("r2.json")["members"]
    assert (member["roles"], member["samples"]) == (["relay", "bootstrap"], 0)


def test_the_steward_decides_on_the_roles(desk):
    request = desk.answer(desk.invite())
    desk.ok(*desk.approval(request), "--roles", "train")
    assert desk.roster("r2.json")["members"][0]["roles"] == ["train"]
    assert (
        "known: train, relay, bootstrap"
        in desk.run(
            *desk.approval(desk.answer(desk.invite("r2.json", "Ben"), "ben"), "r2.json", "r3.json"),
            *("--roles", "king"),
        )[2]
    )


def test_several_requests_are_approved_at_once(desk):
    requests = [desk.answer(desk.invite(name=name), name) for name in ("A", "B", "C")]
    desk.ok(*desk.approval(requests))
    assert [m["name"] for m in desk.roster("r2.json")["members"]] == ["A", "B", "C"]


def test_with_two_of_three_stewards_the_second_signs_the_approval_in_place(desk):
    desk.found("k1.json", "ben", "eva", "kim", threshold=2)
    request = desk.answer(desk.invite("k1.json", key="ben"))
    (desk.folder / "peers.toml").write_text(
        f'version = 1\n[[peer]]\nname = "x"\naddrs = ["{ADDRESS}/p2p/{peer()}"]\n'
    )
    told = desk.ok(
        *desk.approval(request, "k1.json", "k2.json", key="ben"), "--bootstrap", "peers.toml"
    )
    assert "1 more needed out of: eva, kim" in told and "next: send" not in told
    assert desk.refused("roster", "verify", "k2.json")[0].startswith("roster v2 is not signed by 2")
    desk.ok("steward", "sign", "k2.json", "--key", "eva.key")
    assert desk.ok("roster", "verify", "k2.json", "--against", "k1.json")
    assert "x" in Approval.parse((desk.folder / "k2.json").read_text()).bootstrap


def peer() -> str:
    return NodeKey(bytes(32)).peer_id


def test_the_approval_brings_the_bootstrap_list_and_the_new_address_is_added_to_it(desk):
    request = desk.answer(desk.invite(), "anna", "--announce", ADDRESS)
    desk.ok(*desk.approval(request), "--bootstrap", "peers.toml")
    first = Approval.parse((desk.folder / "r2.json").read_text())
    assert ADDRESS in first.bootstrap  # its own: two who are admitted at once find each other
    request = desk.answer(desk.invite("r2.json", "Ben"), "ben")
    desk.ok(*desk.approval(request, "r2.json", "r3.json"), "--bootstrap", "peers.toml")
    second = Approval.parse((desk.folder / "r3.json").read_text())
    assert f"{ADDRESS}/p2p/{desk.roster('r2.json')['members'][0]['peer_id']}" in second.bootstrap


def test_a_node_can_be_joined_with_the_approval_alone(desk):
    request = desk.answer(desk.invite(), "anna", "--announce", ADDRESS)
    desk.ok(*desk.approval(request), "--bootstrap", "peers.toml")
    ben = desk.answer(desk.invite("r2.json", "Ben"), "ben")
    desk.ok(*desk.approval(ben, "r2.json", "r3.json"), "--bootstrap", "peers.toml")
    backend = FakeBackend()
    with daemon(backend, desk.folder / "admin.sock"):
        desk.ok("--socket", "admin.sock", "join", "r3.json")
        desk.ok("--socket", "admin.sock", "join", "--roster", "r3.json")
    (_, (roster, lists)), again = backend.asked
    assert again[1] == (roster, lists)
    assert RosterBook().add(roster).version == 3
    assert [listed["peer"][0]["name"] for listed in lists] == ["St Anna"]


def test_a_file_is_read_whatever_its_name_begins_with(desk):
    desk.invite(out="p2pfed1-anna")
    desk.ok("init", "--invite", "p2pfed1-anna", "--dir", "p2pfed")
    desk.ok(*desk.approval("p2pfed/request.txt"))


# --- mistakes with an invite ---------------------------------------------------------------------


def test_a_typo_in_an_invite_is_told_and_nothing_is_made(desk):
    invite = desk.invite()
    told = desk.refused("init", "--invite", invite[:-7] + "aaaaaaa", "--dir", "anna", code=2)
    assert told[0] == "there is a typo in the invite"
    assert not (desk.folder / "anna").exists()


def test_a_name_that_is_not_the_invited_one_is_refused(desk):
    told = desk.refused("init", "--invite", desk.invite(), "--name", "St Anne", code=2)
    assert told[0] == "the invite is for St Anna, not for St Anne"


def test_an_invite_that_has_ended_is_refused_at_the_hospital(desk):
    desk.at(-dt.timedelta(days=8))
    invite = desk.invite()
    told = desk.refused("init", "--invite", invite, "--dir", "anna")
    assert told[0].startswith("the invite for St Anna ended at")
    assert told[1].startswith("this machine's clock shows")
    assert not (desk.folder / "anna").exists()


def test_a_hospital_that_trains_must_say_on_how_many_patients(desk):
    invite = desk.invite()
    told = desk.refused("init", "--invite", invite, "--task", "x", "--epsilon", "8", code=2)
    assert told[0] == "--samples is missing"
    code, _, err = desk.run("init", "--dir", "anna")
    assert code == 2 and "--name is missing" in err


def test_init_that_fails_leaves_nothing_and_can_be_tried_again(desk):
    invite = desk.invite()
    many = [part for i in range(5) for part in ("--announce", f"/dns4/a{i}/tcp/1")]
    code, _, _ = desk.run("init", "--invite", invite, "--dir", "anna", *many)
    assert code == 2
    assert not (desk.folder / "anna").exists()
    assert not (desk.folder / "state").exists()
    desk.ok("init", "--invite", invite, "--dir", "anna")


def test_two_open_invites_for_one_name_are_refused(desk):
    desk.invite()
    told = desk.refused("invite", "create", "r1.json", "--for", "St Anna", "--key", "ana.key")
    assert told[0].startswith("St Anna has an open invite")
    desk.ok("invite", "revoke", "St Anna", "--key", "ana.key")
    desk.invite()


def test_a_member_is_not_invited_again(desk):
    desk.ok(*desk.approval(desk.answer(desk.invite())))
    told = desk.refused("invite", "create", "r2.json", "--for", "St Anna", "--key", "ana.key")
    assert told[0] == "St Anna is a member already, see roster v2"


@pytest.mark.parametrize("ttl", ["0d", "91d", "7", "1y", "-1d", "99999d", "1s", "30min"])
def test_an_invite_lasts_hours_or_days_from_one_hour_to_90_days(desk, ttl):
    told = desk.refused(
        *("invite", "create", "r1.json", "--for", "x", "--key", "ana.key", f"--ttl={ttl}"), code=2
    )
    assert told[1].startswith("1h at least, 90d at most")


WHAT_TRAINING_NEEDS = {
    "--samples": ("--samples", "157"),
    "--data": ("--data", "."),
    "--epsilon": ("--epsilon", "8"),
    "--option": ("--option", "site=0"),
}


@pytest.mark.parametrize("flag", WHAT_TRAINING_NEEDS)
def test_what_only_training_needs_is_refused_without_a_task(desk, flag):
    given = ("init", "--invite", desk.invite(), "--dir", "anna", *WHAT_TRAINING_NEEDS[flag])
    what, why, do = desk.refused(*given, code=2)
    assert what == f"{flag} without --task"
    assert "bootstrap-only" in why and f"leave {flag} away" in do
    assert not (desk.folder / "anna").exists()
    told = desk.refused("init", "--name", "St Anna", *WHAT_TRAINING_NEEDS[flag], code=2)
    assert told[0] == what


def test_an_invited_node_without_a_task_is_told_what_it_is(desk):
    told = desk.ok("init", "--invite", desk.invite(), "--dir", "anna")
    assert "bootstrap-only node" in told and "init --task" in told
    assert "set [train]" not in told  # its request would still say that it has no patients


def test_a_peer_id_in_what_is_announced_is_refused_before_the_invite_is_used(desk):
    address = f"{ADDRESS}/p2p/12D3KooWOther"
    given = ("init", "--invite", desk.invite(), "--dir", "anna", "--announce", address)
    what, _, do = desk.refused(*given, code=2)
    assert what.endswith("names a peer id") and do == f"give --announce {ADDRESS}"
    assert not (desk.folder / "anna").exists()


@pytest.mark.parametrize("words", [["join"], ["join", "--roster"]])
def test_an_invite_or_a_request_given_to_join_is_recognised(desk, words):
    invite = desk.invite()
    what, _, do = desk.refused(*words, invite, code=2)
    assert what.startswith("this is an invite: p2pfed1-") and "p2pfed init --invite" in do
    request = desk.answer(invite).read_text().strip()
    what, _, do = desk.refused(*words, request, code=2)
    assert what.startswith("this is a request: p2pfedreq1-") and "invite approve" in do


def test_the_first_hospital_may_be_one_that_cannot_be_dialled(desk):
    request = desk.answer(desk.invite())
    told = desk.ok(*desk.approval(request), "--bootstrap", "peers.toml")
    assert "# there is no bootstrap list peers.toml" in told
    assert "--addr /dns4/HOST/tcp/4201/p2p/PEERID" in told  # without the id it would be refused
    assert Approval.parse((desk.folder / "r2.json").read_text()).bootstrap is None
    assert [m["name"] for m in desk.roster("r2.json")["members"]] == ["St Anna"]


def test_who_is_no_steward_cannot_invite(desk):
    desk.ok("steward", "key", "new", "eve.key")
    told = desk.refused("invite", "create", "r1.json", "--for", "x", "--key", "eve.key")
    assert told[0] == "this key is of no steward of heart, roster v1"


def test_nobody_is_invited_on_a_roster_that_is_not_signed_yet(desk):
    stewards = ["--steward", "ana=ana.key", "--threshold", 1]
    desk.ok("steward", "found", "--network", "x", *stewards, "--out", "draft")
    told = desk.refused("invite", "create", "draft", "--for", "x", "--key", "ana.key")
    assert told[0] == "roster v1 is not signed by 1 of its stewards"


def test_nobody_is_invited_on_an_expired_roster(desk):
    desk.at(dt.timedelta(days=366))
    told = desk.refused("invite", "create", "r1.json", "--for", "x", "--key", "ana.key")
    assert told[0].startswith("roster v1 expired at")


def test_an_invite_file_is_private_and_replaces_nothing(desk):
    desk.invite(out="anna.invite")
    assert stat.S_IMODE((desk.folder / "anna.invite").stat().st_mode) == 0o600
    told = desk.refused(
        *("invite", "create", "r1.json", "--for", "B", "--key", "ana.key"),
        *("--out", "anna.invite"),
        code=2,
    )
    assert told[0] == "anna.invite exists already"
    assert [e["name"] for e in desk.data("invite", "list", "--key", "ana.key")] == ["St Anna"]


# --- mistakes with a request ---------------------------------------------------------------------


def test_an_invite_is_used_once(desk):
    invite = desk.invite()
    desk.ok(*desk.approval(desk.answer(invite)))
    thief = desk.answer(invite, "thief")
    for roster in ("r1.json", "r2.json"):
        told = desk.refused(*desk.approval(thief, roster, "r3.json"))
        assert told[0].startswith("the invite for St Anna was used before, at")
        assert told[2].startswith("call the hospital")
    assert not (desk.folder / "r3.json").exists()


def test_two_answers_to_one_invite_are_not_admitted_at_once(desk):
    invite = desk.invite()
    first, second = desk.answer(invite), desk.answer(invite, "thief")
    told = desk.refused(*desk.approval([first, second]))
    assert told[0] == "two requests answer the one invite for St Anna"
    for folder in ("anna", "thief"):
        assert NodeKey.load(desk.folder / folder / "node.key").peer_id in told[1]
    assert told[2].startswith("call St Anna")
    assert not (desk.folder / "r2.json").exists()
    assert [e["state"] for e in desk.data("invite", "list", "--key", "ana.key")] == ["open"]


def test_one_request_that_is_given_twice_is_named(desk):
    request = desk.answer(desk.invite())
    told = desk.refused(*desk.approval([request, request]))
    assert told[0] == "the request of St Anna was given twice"
    assert told[2] == "give it once"


def test_two_invites_answered_with_one_key_are_named(desk):
    first = desk.answer(desk.invite(name="A"), "a")
    key = NodeKey.load(desk.folder / "a" / "node.key")
    invite = Invite.parse(desk.invite(name="B"))
    second = Request.make(invite, key.seed, key.public_key, samples=1, roles=("train",))
    told = desk.refused(*desk.approval([first, second.encode()]))
    assert told[0] == "the requests of A and B are of the same key"


def test_the_same_request_is_approved_again_when_the_file_was_lost(desk):
    request = desk.answer(desk.invite())
    desk.ok(*desk.approval(request))
    first = (desk.folder / "r2.json").read_bytes()
    told = desk.refused(*desk.approval(request, "r2.json", "r3.json"))
    assert told[0] == "St Anna is a member already, see roster v2"
    record = desk.folder / "ana.key.invites"
    kept = json.loads(record.read_text())
    for newest in (kept["newest"], []):  # [] if the machine went down before it was noted
        (desk.folder / "r2.json").unlink()
        record.write_text(json.dumps({**kept, "newest": newest}))
        desk.ok(*desk.approval(request))
        assert (desk.folder / "r2.json").read_bytes() == first
    told = desk.refused(*desk.approval(request, out="r2c.json"), "--roles", "train")
    assert told[0] == "this is roster v1; you have approved v2 already"
    assert "approve the same requests with the same flags" in told[2]


def test_an_invite_is_noted_as_used_before_the_roster_exists(desk, monkeypatch):
    request = desk.answer(desk.invite())

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("p2pfed.cli.invite_approve.write_new", power_cut)
    assert main([str(word) for word in desk.approval(request)]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(desk.folder)
    assert not (desk.folder / "r2.json").exists()
    (entry,) = json.loads((desk.folder / "ana.key.invites").read_text())["invites"]
    assert entry["used"] != "-"


def test_a_revoked_invite_is_refused(desk):
    request = desk.answer(desk.invite())
    desk.ok("invite", "revoke", "St Anna", "--key", "ana.key")
    assert desk.refused(*desk.approval(request))[0].startswith("the invite for St Anna was revoked")
    assert desk.data("invite", "list", "--key", "ana.key")[0]["state"] == "revoked"


def test_an_invite_that_was_used_cannot_be_revoked_any_more(desk):
    desk.ok(*desk.approval(desk.answer(desk.invite())))
    number = desk.data("invite", "list", "--key", "ana.key")[0]["number"]
    told = desk.refused("invite", "revoke", number, "--key", "ana.key")
    assert "steward revoke" in told[2]
    code, _, err = desk.run("invite", "revoke", "St Anna", "--key", "ana.key")
    assert code == 5 and "no open invite for St Anna" in err


def test_an_invite_that_has_ended_is_refused_at_the_steward_too(desk):
    request = desk.answer(desk.invite())
    desk.at(dt.timedelta(days=8))
    told = desk.refused(*desk.approval(request))
    assert told[0].startswith("the invite for St Anna ended at")
    assert told[1].startswith("this machine's clock shows")


def test_a_clock_that_is_behind_is_noticed(desk):
    desk.invite()
    desk.at(-dt.timedelta(days=1))
    told = desk.refused("invite", "create", "r1.json", "--for", "B", "--key", "ana.key")
    assert told[0].startswith("this machine's clock shows")
    assert told[2].startswith("set the clock")


def test_a_clock_that_was_ahead_locks_nobody_out(desk):
    desk.at(dt.timedelta(days=300))
    desk.invite(name="Dora")
    desk.at(dt.timedelta(0))
    told = desk.refused("invite", "create", "r1.json", "--for", "Emil", "--key", "ana.key")
    number = desk.data("invite", "list", "--key", "ana.key")[0]["number"]
    assert f"the invite for Dora, number {number}, was made with this key at" in told[1]
    assert f"p2pfed invite revoke {number} --key KEYFILE" in told[2]
    desk.ok("invite", "revoke", number, "--key", "ana.key")
    desk.invite(name="Emil")
    desk.ok(*desk.approval(desk.answer(desk.invite(name="Dora"), "dora")))


def test_the_request_to_another_steward_is_refused(desk):
    desk.found("k1.json", "ben", "eva")
    request = desk.answer(desk.invite("k1.json", key="ben"))
    told = desk.refused(*desk.approval(request, "k1.json", key="eva"), code=5)
    assert told[0].startswith("no invite ") and told[0].endswith("was made with this key")


def test_the_roster_of_another_network_is_refused(desk):
    desk.found("other.json", "ana", network="lung")
    told = desk.refused(*desk.approval(desk.answer(desk.invite()), "other.json"))
    assert told[0] == "the invite for St Anna is into another network, heart"


def test_a_request_with_a_typo_or_changed_on_its_way_is_refused(desk):
    line = desk.answer(desk.invite()).read_text().strip()
    assert desk.refused(*desk.approval(line[:-1]), code=2)[0] == "there is a typo in the request"
    assert desk.refused(*desk.approval(desk.invite(name="B")), code=2)[0] == (
        "this is an invite, no request"
    )


def test_a_name_or_key_that_is_taken_is_refused(desk):
    request = desk.answer(desk.invite())
    desk.ok(
        *("steward", "add", "r1.json", "--name", "St Anna", "--peer-id", peer()),
        *("--samples", 1, "--out", "by-hand.json"),
    )
    desk.ok("steward", "sign", "by-hand.json", "--key", "ana.key")
    told = desk.refused(*desk.approval(request, "by-hand.json"))
    assert told[0] == "St Anna in roster v2 has the same name or key"


def test_a_revoked_node_does_not_come_back_by_its_old_request(desk):
    request = desk.answer(desk.invite())
    desk.ok(*desk.approval(request))
    desk.ok(
        *("steward", "revoke", "r2.json", "St Anna", "--reason", "key lost", "--forget"),
        *("--out", "r3.json"),
    )
    desk.ok("steward", "sign", "r3.json", "--key", "ana.key")
    told = desk.refused(*desk.approval(request, "r3.json", "r4.json"))
    assert told[0] == "St Anna's key was revoked: key lost"


def test_an_older_roster_than_the_one_approved_is_refused(desk):
    desk.ok(*desk.approval(desk.answer(desk.invite())))
    told = desk.refused("invite", "create", "r1.json", "--for", "Ben", "--key", "ana.key")
    assert told[0] == "this is roster v1; you have approved v2 already"


def test_another_roster_of_the_version_approved_is_refused(desk):
    desk.found("k1.json", "ana", "ben")
    desk.ok(*desk.approval(desk.answer(desk.invite("k1.json")), "k1.json"))
    desk.ok("steward", "extend", "k1.json", "--expires", "700d", "--out", "other-2.json")
    desk.ok("steward", "sign", "other-2.json", "--key", "ben.key")
    told = desk.refused("invite", "create", "other-2.json", "--for", "B", "--key", "ana.key")
    assert told[0] == "this is another roster v2 than the one you approved"
    assert "if it is not yours, give the v3 that they sign on top of theirs" in told[2]
    desk.ok("steward", "extend", "other-2.json", "--expires", "800d", "--out", "r3.json")
    desk.ok("steward", "sign", "r3.json", "--key", "ben.key")
    desk.invite("r3.json", name="B")


def test_without_a_yes_nothing_is_written(desk):
    request = desk.answer(desk.invite())
    before = sorted(p.name for p in desk.folder.iterdir())
    told = desk.refused(*desk.approval(request)[:-1], code=2)
    assert told[0] == "this needs a yes, and there is no terminal to ask on"
    assert sorted(p.name for p in desk.folder.iterdir()) == before
    assert desk.data("invite", "list", "--key", "ana.key")[0]["state"] == "open"


def test_two_stewards_commands_at_once_do_not_race(desk):
    desk.invite()
    with (desk.folder / "ana.key").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        told = desk.refused("invite", "create", "r1.json", "--for", "B", "--key", "ana.key")
    assert told[0] == "another command is using ana.key"


# --- the record ----------------------------------------------------------------------------------


def test_the_record_is_private_and_holds_no_secret(desk):
    invite = desk.invite()
    record = desk.folder / "ana.key.invites"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    text = record.read_text()
    assert Invite.parse(invite).secret.hex() not in text
    assert StewardKey.load(desk.folder / "ana.key").seed.hex() not in text


@pytest.mark.parametrize("content", ["", "{", '{"type": "p2pfed.invites/1"}', "[]"])
def test_a_damaged_record_stops_everything(desk, content):
    request = desk.answer(desk.invite())
    desk.ok("steward", "extend", "r1.json", "--out", "next.json")
    (desk.folder / "ana.key.invites").write_text(content)
    for words in (
        ("invite", "list", "--key", "ana.key"),
        ("invite", "create", "r1.json", "--for", "B", "--key", "ana.key"),
        desk.approval(request),
        ("steward", "sign", "next.json", "--key", "ana.key"),
    ):
        assert "is no record of invites" in desk.refused(*words, code=2)[0]


def test_the_list_says_what_became_of_each(desk):
    assert desk.ok("invite", "list", "--key", "ana.key") == "no invite was made with this key\n"
    desk.invite(name="A")
    desk.ok(*desk.approval(desk.answer(desk.invite(name="B"), "b")))
    lines = desk.ok("invite", "list", "--key", "ana.key").splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["A", "heart", "open"],
        ["B", "heart", "used"],
    ]


def test_a_key_has_one_record_by_whatever_name_it_is_called(desk):
    request = desk.answer(desk.invite())
    desk.ok(*desk.approval(request))
    (desk.folder / "keys").mkdir()
    (desk.folder / "keys" / "me").symlink_to(desk.folder / "ana.key")
    assert desk.data("invite", "list", "--key", "keys/me") == desk.data(
        "invite", "list", "--key", "ana.key"
    )
    told = desk.refused("invite", "create", "r1.json", "--for", "B", "--key", "keys/me")
    assert told[0] == "this is roster v1; you have approved v2 already"
    assert not (desk.folder / "keys" / "me.invites").exists()


def test_a_record_from_before_signatures_were_kept_goes_on_being_one(desk):
    desk.invite(name="A")
    record = desk.folder / "ana.key.invites"
    kept = json.loads(record.read_text())
    del kept["signed"]
    record.write_text(json.dumps(kept))
    assert "A" in desk.ok("invite", "list", "--key", "ana.key")
    desk.ok(*desk.approval(desk.answer(desk.invite(name="B"), "b")))
    assert json.loads(record.read_text())["signed"]


# --- two stewards at once ------------------------------------------------------------------------


@pytest.fixture
def two(desk):
    """A network of ana and bob, who both must sign; each has approved another request."""
    desk.found("k1.json", "ana", "bob", threshold=2)
    for key, name in (("ana", "A"), ("bob", "B")):
        request = desk.answer(desk.invite("k1.json", name=name, key=key), name)
        desk.ok(*desk.approval(request, "k1.json", f"{name}2.json", key))
    return desk


def test_no_steward_signs_a_second_roster_of_a_version_unless_insisting(two):
    for file, key in (("B2.json", "ana"), ("A2.json", "bob")):
        before = (two.folder / file).read_bytes()
        told = two.refused("steward", "sign", file, "--key", f"{key}.key")
        mine = two.roster("A2.json" if key == "ana" else "B2.json")["hash"][:16]
        assert told[0] == f"you signed another roster v2 of heart: {mine}…"
        assert two.roster(file)["hash"][:16] in told[1]
        assert "agree with the other stewards on one" in told[2]
        assert (two.folder / file).read_bytes() == before
    two.ok("steward", "sign", "B2.json", "--key", "ana.key", "--instead")  # they agreed on bob's
    two.ok("roster", "verify", "B2.json", "--against", "k1.json")
    assert two.refused("steward", "sign", "A2.json", "--key", "bob.key")
    assert two.refused("steward", "sign", "A2.json", "--key", "ana.key")  # hers counts no more
    two.ok(*two.approval(two.folder / "A" / "request.txt", "B2.json", "A3.json"))
    two.ok("steward", "sign", "A3.json", "--key", "bob.key")
    assert [m["name"] for m in two.roster("A3.json")["members"]] == ["B", "A"]


def test_what_was_signed_at_the_desk_is_not_approved_otherwise(two):
    two.ok("steward", "sign", "B2.json", "--key", "ana.key", "--instead")
    again = two.approval(two.folder / "A" / "request.txt", "k1.json", "A2b.json")
    told = two.refused(*again)
    assert "v2" in told[0]
    assert not (two.folder / "A2b.json").exists()
    two.ok(*again, "--instead")


def test_the_same_roster_is_signed_again_and_other_versions_freely(two):
    two.ok("steward", "sign", "A2.json", "--key", "ana.key")
    two.ok("steward", "sign", "k1.json", "--key", "ana.key")
    two.ok("steward", "sign", "B2.json", "--key", "ana.key", "--instead")
    two.ok("steward", "extend", "B2.json", "--expires", "700d", "--out", "B3.json")
    two.ok("steward", "sign", "B3.json", "--key", "ana.key")
    two.ok("steward", "sign", "B3.json", "--key", "bob.key")


def test_a_signature_is_noted_before_it_exists(two, monkeypatch):
    def power_cut(*_):
        raise KeyboardInterrupt

    two.ok("steward", "extend", "B2.json", "--expires", "700d", "--out", "B3.json")
    monkeypatch.setattr("p2pfed.cli.steward.replace_file", power_cut)
    assert main(["steward", "sign", "B3.json", "--key", "ana.key"]) == 130
    signed = json.loads((two.folder / "ana.key.invites").read_text())["signed"]
    assert two.roster("B3.json")["hash"] in {entry["hash"] for entry in signed}
    assert two.roster("B3.json")["signed_by"] == []


# --- approvals -----------------------------------------------------------------------------------


def test_what_is_no_approval_is_left_alone_and_a_damaged_one_is_refused():
    assert Approval.parse("anything") is None
    whole = Approval("r", "b", None)
    assert Approval.parse(whole.encode().decode()) == whole
    for text in (
        '{"type": "p2pfed.approval/1"',
        '{"type": "p2pfed.approval/1"}',
        '{"type": "p2pfed.approval/1", "roster": 1, "bootstrap": null, "run": null}',
        '{"type": "p2pfed.approval/1", "roster": "", "bootstrap": 1, "run": null}',
        '{"type": "p2pfed.approval/1", "roster": "", "bootstrap": null, "run": null, "x": 1}',
        '{"type": "p2pfed.approval/1", "roster": "\\ud800", "bootstrap": null, "run": null}',
        '{"type": "p2pfed.approval/1", "roster": "", "bootstrap": null, "run": "\\udfff"}',
    ):
        with pytest.raises(ConfigError, match="the approval is malformed"):
            Approval.parse(text)


def test_a_run_is_accepted_from_the_approval_only_if_it_brings_one(desk):
    desk.ok(*desk.approval(desk.answer(desk.invite())))
    told = desk.refused("--socket", "none", "run", "accept", "r2.json", code=5)
    assert told[0] == "this approval brings no run"


# --- roster --------------------------------------------------------------------------------------


def test_diff_tells_in_words_what_changes(desk):
    desk.ok(*desk.approval(desk.answer(desk.invite())))
    member = desk.roster("r2.json")["members"][0]["peer_id"]
    short = f"{member[:8]}…{member[-4:]}"
    assert desk.ok("roster", "diff", "r1.json", "r2.json").splitlines() == [
        "heart: roster v1 -> v2",
        f"  St Anna comes in ({short}; train, relay; 184 patients)",
    ]
    desk.ok("steward", "key", "new", "ben.key")
    desk.ok(
        *("steward", "revoke", "r2.json", "St Anna", "--reason", "left", "--from-round", 7),
        *("--out", "r3.json"),
    )
    desk.ok(
        "steward", "rotate", "r3.json", "--add", "ben=ben.key", "--threshold", 2, "--out", "r3b"
    )
    changes = desk.data("roster", "diff", "r2.json", "r3b")["changes"]
    assert [(c["what"], c["change"], c["name"]) for c in changes] == [
        ("member", "removed", "St Anna"),
        ("revoked", "added", "St Anna"),
        ("steward", "added", "ben"),
        ("threshold", "changed", ""),
    ]
    assert "from round 7 on do not count (left)" in changes[1]["text"]
    assert desk.ok("roster", "diff", "r2.json", "r2.json").endswith("  they say the same\n")


def test_diff_names_changed_patients_roles_and_expiry(desk):
    draft = ["steward", "add", "r1.json", "--name", "A", "--peer-id", peer()]
    desk.ok(*draft, "--samples", 10, "--out", "a.json")
    desk.ok(*draft, "--samples", 12, "--roles", "train,bootstrap", "--out", "b.json")
    desk.ok("steward", "extend", "b.json", "--expires", "400d", "--out", "c.json")
    assert desk.ok("roster", "diff", "a.json", "c.json").splitlines()[1] == (
        "  A: 10 patients become 12; roles +bootstrap -relay"
    )
    assert "35d" in desk.ok("roster", "diff", "a.json", "c.json").splitlines()[2]


def test_rosters_of_two_networks_are_not_compared(desk):
    desk.found("other.json", "ana", network="lung")
    assert desk.refused("roster", "diff", "r1.json", "other.json")[0] == (
        "the rosters are of two networks, heart and lung"
    )
    assert desk.refused("roster", "diff", "a", "b", "c", code=2)[0] == "two rosters are compared"


def test_the_daemons_roster_is_shown_compared_and_replaced(desk):
    desk.ok(*desk.approval(desk.answer(desk.invite())))
    backend = FakeBackend()
    backend.signed_roster = (desk.folder / "r1.json").read_text()
    with daemon(backend, desk.folder / "admin.sock"):
        at = ("--socket", "admin.sock", "roster")
        assert desk.ok(*at, "show") == desk.ok("roster", "show", "r1.json")
        assert "St Anna comes in" in desk.ok(*at, "diff", "r2.json")
        assert desk.refused(*at, "publish", "r2.json")[0] == "roster v3 is not newer"
    ((kind, signed),) = backend.asked
    assert kind == "roster"
    assert (
        SignedDocument.parse(signed).payload
        == SignedDocument.parse(
            Approval.parse((desk.folder / "r2.json").read_text()).roster.encode()
        ).payload
    )


def test_publish_says_whether_anything_changed(desk, monkeypatch):
    for changed, words in ((True, "roster v2 is in force here;"), (False, "nothing changed:")):
        answer = {"version": 2, "changed": changed}
        monkeypatch.setattr("p2pfed.admin.client.Client.post", lambda *_, a=answer: a)
        assert desk.ok("--socket", "x", "roster", "publish", "r1.json").startswith(words)


# --- real daemons --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_new_member_brings_the_roster_to_peers_that_have_not_seen_it(desk):
    """North and South hold v3; East joins with v4 and knows North; South gets it by gossip."""
    with stage(desk.folder) as played:

        def run(command: str) -> str:
            return played.run("the desk", command)

        newest = "r1.json"
        for version, name in enumerate(("North", "South", "East"), 2):
            place, port = name.lower(), 4200 + version
            run(f"p2pfed invite create {newest} --for {name} --key ana.key --out {place}.invite")
            run(
                f"p2pfed init --invite {place}.invite --dir {place}"
                f" --listen /ip4/127.0.0.1/tcp/{port}"
                + (f" --announce /ip4/127.0.0.1/tcp/{port}" if name == "North" else "")
            )
            out = f"r{version}.json"
            told = run(
                f"p2pfed invite approve {place}/request.txt --roster {newest} --key ana.key"
                f" --bootstrap peers.toml --out {out} --yes"
            )
            assert f"approved: {out}, roster v{version}" in told
            newest = out
            run(f"p2pfed node -c {place}/p2pfed.toml")
            assert run(f"p2pfed -c {place}/p2pfed.toml join {out}").startswith("joining")
        assert run("p2pfed -c east/p2pfed.toml wait --for peers=2 --timeout 60s") == ""
        for place in ("north", "south"):
            assert run(f"p2pfed -c {place}/p2pfed.toml roster show").startswith("heart  roster v4")


@pytest.mark.slow
def test_an_invited_daemon_takes_no_roster_but_of_who_invited_it(desk):
    desk.ok("init", "--invite", desk.invite(), "--dir", "anna", "--listen", "/ip4/127.0.0.1/tcp/0")
    desk.ok(*desk.approval(desk.folder / "anna" / "request.txt"))
    desk.found("other.json", "eve", network="heart")
    text = (desk.folder / "r2.json").read_text()
    real = json.loads(Approval.parse(text).roster.partition("\n-- p2pfed")[0])
    key = StewardKey.load(desk.folder / "eve.key")
    forged = {**real, "stewards": [{"name": "ana", "key": key.public_key.hex()}]}
    (desk.folder / "forged.json").write_text(json.dumps(forged))
    desk.ok("steward", "sign", "forged.json", "--key", "eve.key")
    desk.ok("roster", "verify", "forged.json")
    with stage(desk.folder) as played:
        played.run("anna", "p2pfed node -c anna/p2pfed.toml")
        for file, why in (("other.json", "another network"), ("forged.json", "signature of who")):
            for words in (f"join {file}", f"roster publish {file}"):
                told = played.run("anna", f"p2pfed -c anna/p2pfed.toml {words}")
                assert why in told.splitlines()[0], told
        assert "joining" in played.run("anna", "p2pfed -c anna/p2pfed.toml join r2.json")
