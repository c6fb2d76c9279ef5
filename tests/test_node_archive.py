"""The forecast of a run's archive: what it takes at worst, and when the operator is warned."""

from __future__ import annotations

import pytest
from consortium import Consortium, peer_of
from node_parts import a_node

from p2pfed.gossip.events import Received
from p2pfed.identity.rules import Averaging
from p2pfed.node.archive import MARGIN, Archive, forecast
from p2pfed.wire.messages import Facts, encode_message


def test_the_forecast_is_rounds_times_members_times_the_longest_delta():
    net = Consortium(5)
    short, long = (forecast(net.run(rounds=n), net.roster) for n in (10, 110))
    each = (long - short) / (100 * 5)
    assert net.run().bytes_per_round <= each <= net.run().bytes_per_round + 1024


def test_only_the_committee_counts_where_there_is_one():
    net = Consortium(100)
    run = net.run(rounds=1000)
    drawn = net.run(rounds=1000, averaging=Averaging(committee=8))
    base = forecast(net.run(rounds=1000, averaging=Averaging(committee=1)), net.roster)
    one = (forecast(drawn, net.roster) - base) / 7
    assert forecast(run, net.roster) == pytest.approx(base + 63 * one)  # 64 of 100


def test_a_warning_comes_when_the_rest_of_the_archive_does_not_fit_with_room_to_spare():
    assert Archive(10_000, 0, MARGIN + 10_000).warning == ""
    assert "free" in Archive(10_000, 0, MARGIN + 9_999).warning
    assert Archive(10_000, 9_000, MARGIN + 1_000).warning == ""
    assert Archive(10_000, 20_000, MARGIN).missing_bytes == 0


async def test_accepting_a_run_and_the_status_tell_what_the_archive_takes(tmp_path, monkeypatch):
    async with a_node(tmp_path) as node:
        await node.with_run()
        shown = node.operator.status()["run"]["archive"]
        assert shown["forecast_bytes"] == forecast(node.shell.run, node.consortium.roster)
        assert shown["held_bytes"] == 0
        delta = node.consortium.delta(node.shell.run, 0, 1)
        frame = encode_message(Facts((delta.encode(),), (), ()))
        node.shell.feed(Received(peer_of(1), frame))
        shown = node.operator.status()["run"]["archive"]
        assert shown["held_bytes"] == len(delta.payload)
        assert not [line for line in node.operator.status()["health"] if "free" in line]

        full = type("Usage", (), {"free": 1000})()
        monkeypatch.setattr("p2pfed.node.archive.shutil.disk_usage", lambda _: full)
        assert [line for line in node.operator.status()["health"] if "free" in line]
        answer = await node.operator.accept_run(node.signed_run(), node.genesis)
        assert answer["archive"]["free_bytes"] == 1000
        assert "disk" in answer["archive"]["warning"]
        assert "archive.short" in node.kinds()
