"""Metrics: what is in them, how they are written, and a port that rude clients cannot hold."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
import re
import socket
from itertools import combinations
from pathlib import Path

import pytest
import trio
from admin_fakes import PEER, FakeBackend, short_folder
from hypothesis import given
from hypothesis import strategies as some
from prometheus_client.parser import text_string_to_metric_families as parsed

from p2pfed.admin.prometheus import (
    CONTENT_TYPE,
    FRESH,
    Family,
    PortLimits,
    exposition,
    serve_metrics,
)
from p2pfed.admin.server import serve_admin
from p2pfed.errors import ConfigError
from p2pfed.network.events import NetworkTotals
from p2pfed.node.eventlog import EventLog
from p2pfed.node.metrics import CATALOGUE, Observed, Process, families, this_process
from p2pfed.node.store import Store

ROOT = Path(__file__).resolve().parent.parent
QUICK = PortLimits(connections=4, head_s=0.05, write_s=0.05)
TOTALS = NetworkTotals(
    bytes_sent=5,
    bytes_received=6,
    connected=1,
    breaches=2,
    refused=3,
    relayed_bytes=7,
    circuits=1,
)
NOW = dt.datetime(2027, 1, 30, tzinfo=dt.UTC)  # the roster of the fake expires a day later
OSLO = {**PEER, "model_hash": "3f" * 32, "model_round": 41}


def status(**changes):
    clock = {"round": 41, "seconds": 40.0, "waiting": 30.0}
    return {**FakeBackend().status(), "present": True, "round_seconds": clock, **changes}


def peer(**changes):
    return {**OSLO, **changes}


def observed(**changes):
    given = Observed(
        status(),
        [peer()],
        TOTALS,
        NOW,
        round_age=12.5,
        events={"peer.joined": 2},
        store_bytes=1000,
        disk_free=2000,
        process=Process(1.5, 50_000_000, 20, 1024, 1.8e9),
    )
    return dataclasses.replace(given, **changes)


def samples(families_):
    """By name and labels, as Prometheus reads the text."""
    found = {}
    for family in parsed(exposition(families_).decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} stands twice: Prometheus refuses the whole scrape"
            found[key] = sample.value
    return found


def value(name, families_=None, /, **labels):
    everything = samples(families(observed()) if families_ is None else families_)
    return everything.get((name, tuple(sorted(labels.items()))))


# --- values ------------------------------------------------------------------------------------


def test_the_values_are_those_that_the_operator_is_shown():
    assert value("p2pfed_round") == 42
    assert value("p2pfed_run_rounds") == 100
    assert value("p2pfed_peers", state="away") == 1
    assert value("p2pfed_epsilon_spent") == 3.2
    assert value("p2pfed_epsilon_limit") == 8
    assert value("p2pfed_bytes_total", peer="Oslo", direction="received") == 400_000_000
    assert value("p2pfed_round_seconds", part="training") == 10
    assert value("p2pfed_round_seconds", part="waiting") == 30
    assert value("p2pfed_peer_rtt_seconds", peer="Oslo") == 0.031
    assert value("p2pfed_releases_total") == 41
    assert value("p2pfed_roster_expires_seconds") == 86_400
    assert value("p2pfed_exchange_failures_total", reason="breach") == 2
    assert value("p2pfed_exchange_failures_total", reason="refused") == 3
    assert value("p2pfed_events_total", type="peer.joined") == 2
    assert value("process_resident_memory_bytes") == 50_000_000


def test_a_node_without_a_run_roster_or_trainer_shows_no_zeros_for_them():
    bare = status(
        run=None, roster=None, round_seconds=None, trainer={"state": "none", "restarts": 0}
    )
    known = {name for name, _ in samples(families(Observed(bare, [], TOTALS, NOW)))}
    assert "p2pfed_peers" in known
    for name in ("round", "roster_version", "trainer_up", "round_seconds", "store_bytes"):
        assert f"p2pfed_{name}" not in known


def test_the_share_of_peers_with_the_same_model_counts_those_in_the_same_round_only():
    others = [
        peer(name="Porto", model_hash="77" * 32),
        peer(name="Kyoto", model_round=40, model_hash="88" * 32),
        peer(name="Turin", state="away", model_hash="99" * 32),
        peer(name="Paris", model_hash="", model_round=None),
    ]
    seen = families(observed(peers=[peer(), *others]))
    assert value("p2pfed_model_agreement", seen) == 0.5
    assert value("p2pfed_model_agreement", families(observed(peers=others[1:]))) is None


def test_in_pairwise_mode_models_differ_and_failed_meetings_are_counted():
    run = {**status()["run"], "meetings": {"begun": 9, "failed": 4}}
    seen = families(observed(status=status(run=run)))
    assert value("p2pfed_model_agreement", seen) is None
    assert value("p2pfed_exchange_failures_total", seen, reason="meeting") == 4


def test_a_finished_run_has_no_age_of_its_round():
    run = {**status()["run"], "phase": "finished"}
    assert value("p2pfed_round_age_seconds") == 12.5
    assert value("p2pfed_round_age_seconds", families(observed(status=status(run=run)))) is None


def test_a_hospital_without_a_limit_shows_none():
    privacy = {**status()["privacy"], "epsilon": 0.0}
    seen = families(observed(status=status(privacy=privacy)))
    assert value("p2pfed_epsilon_limit", seen) is None


def test_a_trainer_is_up_only_when_it_is_ready():
    ready = families(observed(status=status(trainer={"state": "ready", "restarts": 3})))
    assert value("p2pfed_trainer_up", ready) == 1
    assert value("p2pfed_trainer_restarts_total", ready) == 3
    assert value("p2pfed_trainer_up") == 0  # "running" is a state of the fake


def test_a_peers_measure_is_there_where_it_released_one_and_this_nodes_own_never():
    measure = {"name": "dice", "round": 41, "value": 0.87}
    own = status(measure=measure, metrics={"dice": 0.728193}, share_metrics="rounded")
    seen = families(observed(status=own, peers=[peer(measure=measure)]))
    assert value("p2pfed_peer_measure", seen, peer="Oslo", name="dice") == 0.87
    assert "0.728193" not in exposition(seen).decode()
    assert exposition(families(observed())).count(b"p2pfed_peer_measure") == 0
    assert exposition(seen).count(b"0.87") == 1


def test_a_revoked_peer_whose_name_another_has_does_not_break_the_scrape():
    twins = [peer(state="revoked", sent_bytes=1), peer(peer_id="other", sent_bytes=2)]
    seen = families(observed(peers=twins))
    assert value("p2pfed_bytes_total", seen, peer="Oslo", direction="sent") == 2


def test_every_metric_of_the_catalogue_can_be_there():
    measure = {"name": "dice", "round": 41, "value": 0.87}
    run = {**status()["run"], "consensus_distance": 0.5}
    seen = observed(status=status(run=run), peers=[peer(measure=measure)])
    full = exposition(families(seen)).decode()
    assert [line.split()[2] for line in full.splitlines() if line.startswith("# TYPE")] == [
        metric.name for metric in CATALOGUE
    ]


def test_counters_are_named_so():
    for metric in CATALOGUE:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name


def test_events_are_counted_by_type_since_the_start(tmp_path):
    store = Store(tmp_path / "store.db")
    log = EventLog(store, lambda: NOW)
    log.add("peer.joined", {"peer": "Oslo"})
    log.add("peer.joined", {"peer": "Kyoto"})
    log.flush()
    assert log.counts == {"peer.joined": 2}
    assert EventLog(store, lambda: NOW).counts == {}
    store.close()


def test_the_process_is_measured_on_linux_and_left_out_elsewhere(tmp_path):
    found = this_process()
    assert found.resident_bytes > 1_000_000
    assert found.open_fds >= 3
    assert abs(found.started - dt.datetime.now(dt.UTC).timestamp()) < 100_000
    assert this_process(tmp_path) is None


# --- the text ----------------------------------------------------------------------------------


@given(some.text(min_size=1), some.floats(allow_nan=False))
def test_whatever_stands_in_a_label_is_read_back(name, number):
    name = name.encode("utf-8", "replace").decode()
    text = exposition([Family("m", "gauge", "What\\it\nis.", ("peer",), [((name,), number)])])
    (family,) = parsed(text.decode())
    assert [(s.labels, s.value) for s in family.samples] == [({"peer": name}, number)]


@pytest.mark.parametrize(
    "name",
    [
        'Oslo"} 1\np2pfed_round 999',
        "back\\slash\\",
        'quo"te',
        "\\n",
        "{}",
        "#",
        "é\u2028\x1b[2J",
        "",
    ],
)
def test_a_hostile_name_changes_no_other_metric(name):
    seen = families(observed(peers=[peer(name=name)]))
    assert value("p2pfed_round", seen) == 42
    assert value("p2pfed_bytes_total", seen, peer=name, direction="sent") == 420_000_000


def test_numbers_that_are_none_are_written_as_prometheus_reads_them():
    shown = [(("a",), math.inf), (("b",), -math.inf), (("c",), math.nan)]
    text = exposition([Family("m", "gauge", "M.", ("l",), shown)]).decode()
    assert text.splitlines()[2:] == ['m{l="a"} +Inf', 'm{l="b"} -Inf', 'm{l="c"} NaN']


# --- where it is answered ----------------------------------------------------------------------


class Measured(FakeBackend):
    def __init__(self):
        super().__init__()
        self.asked_for = 0
        self.trouble = False

    def metrics(self):
        self.asked_for += 1
        if self.trouble:
            raise RuntimeError("a bug")
        return families(observed())


@pytest.fixture
def backend():
    return Measured()


@pytest.fixture
async def port(backend, nursery):
    started = await nursery.start(
        lambda task_status: serve_metrics(
            backend, listen="127.0.0.1:0", limits=QUICK, task_status=task_status
        )
    )
    yield started
    nursery.cancel_scope.cancel()


async def ask(port, request: bytes) -> bytes:
    with trio.fail_after(30):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            answer = b""
            try:
                await stream.send_all(request)
                async for part in stream:
                    answer += part
            except trio.BrokenResourceError:
                pass
            return answer


def get(target="/metrics", *headers, method="GET", host="127.0.0.1:9464"):
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


async def test_the_admin_socket_answers_with_all_metrics(backend, nursery):
    with short_folder() as folder:
        path = folder / "a.sock"
        await nursery.start(
            lambda task_status: serve_admin(
                backend, socket=path, mode=0o600, task_status=task_status
            )
        )
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(
                b"GET /v1/metrics HTTP/1.1\r\nHost: p2pfed\r\nConnection: close\r\n\r\n"
            )
            answer = b"".join([part async for part in stream])
        nursery.cancel_scope.cancel()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == 200
    assert f"content-type: {CONTENT_TYPE}".encode() in head.lower()
    assert body == exposition(families(observed()))


async def test_the_port_answers_with_all_metrics(port):
    head, _, body = (await ask(port, get())).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Type: {CONTENT_TYPE}".encode() in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert body == exposition(families(observed()))


async def test_a_head_alone_may_be_asked_for(port):
    head, _, body = (await ask(port, get(method="HEAD"))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b""


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (get("/"), 404),
        (get("/v1/status"), 404),
        (get("/metrics/../v1/status"), 404),
        (get("//metrics"), 404),
        (get("http://evil/metrics"), 404),
        (get(method="POST"), 405),
        (get(method="DELETE"), 405),
        (get("/metrics", "Origin: http://evil"), 403),
        (get("/metrics", "referer: http://evil/"), 403),
        (get(host="rebound.evil.example:9464"), 403),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 50_000, 431),
        (b"GET /" + b"a" * 50_000, 431),
        (b"GET /metrics HTTP/1.1\r\n", 408),
        (b"", 408),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else None,
)
async def test_anything_else_is_refused_and_the_next_client_is_answered(port, request_, expected):
    answer = await ask(port, request_)
    # A client that still sends when we hang up may not see the answer.
    assert answer == b"" or status_of(answer) == expected
    assert answer or len(request_) > 4096
    assert status_of(await ask(port, get())) == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:9464", "10.1.2.3:9464"])
async def test_the_loopback_port_answers_to_addresses_and_to_its_own_name(port, host):
    assert status_of(await ask(port, get(host=host))) == 200


async def test_clients_that_hold_the_port_are_dropped_and_more_of_them_refused(port):
    idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2 * QUICK.connections)]
    await trio.sleep(0.01)
    assert await ask(port, get()) == b""
    with trio.fail_after(30):  # all of them are told that their time is up
        told = [b"".join([part async for part in stream]) for stream in idle]
    assert sorted(map(len, told))[: QUICK.connections] == [0] * QUICK.connections
    assert {status_of(answer) for answer in told if answer} == {408}
    for stream in idle:
        await stream.aclose()
    await trio.sleep(2 * QUICK.write_s)
    assert status_of(await ask(port, get())) == 200


async def test_a_client_that_never_hangs_up_after_its_answer_is_hung_up_on(port):
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(get() * 3)
        with trio.fail_after(30):
            answer = b"".join([part async for part in stream])
    assert answer.count(b"HTTP/1.1") == 1


async def test_a_client_that_resets_its_connection_harms_nobody(port):
    with socket.create_connection(("127.0.0.1", port)) as rude:
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        rude.sendall(get())
    assert status_of(await ask(port, get())) == 200


async def test_a_bug_in_a_metric_costs_a_scrape_only(port, backend, caplog):
    backend.trouble = True
    assert await ask(port, get()) == b""
    assert "bug while metrics" in caplog.text
    backend.trouble = False
    assert status_of(await ask(port, get())) == 200


async def test_whoever_asks_often_makes_no_more_work_than_once_a_second(
    backend, nursery, autojump_clock
):
    from p2pfed.admin import prometheus

    door = prometheus._Door(backend, QUICK, None)
    first = [door._current() for _ in range(100)]
    assert backend.asked_for == 1
    await trio.sleep(FRESH)
    assert door._current() == first[0]
    assert backend.asked_for == 2


async def test_a_port_that_others_reach_is_told_of_in_the_log(backend, nursery, caplog):
    bound = await nursery.start(
        lambda task_status: serve_metrics(backend, listen="0.0.0.0:0", task_status=task_status)
    )
    assert "readable by everyone" in caplog.text
    assert status_of(await ask(bound, get(host="node.hospital.example:9464"))) == 200
    nursery.cancel_scope.cancel()


async def test_the_loopback_port_warns_of_nothing(port, caplog):
    assert caplog.text == ""


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "nowhere.invalid:9464", "127.0.0.1:²", ":1"])
async def test_an_address_that_cannot_be_is_an_error_that_names_the_key(backend, listen):
    with pytest.raises(ConfigError, match=r"metrics\.listen"):
        await serve_metrics(backend, listen=listen)


async def test_a_port_that_is_taken_is_an_error_that_says_so(backend, port):
    with pytest.raises(ConfigError, match="cannot listen on"):
        await serve_metrics(backend, listen=f"127.0.0.1:{port}")


# --- what is shipped ---------------------------------------------------------------------------

BOARD = json.loads((ROOT / "bootstrap/grafana/p2pfed.json").read_text("utf-8"))
RULES = (ROOT / "bootstrap/p2pfed.rules.yml").read_text("utf-8")
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
RULE_EXPRESSIONS = re.findall(r"^ +expr: (.+)$", RULES, re.MULTILINE)
NAMES = {metric.name: set(metric.labels) for metric in CATALOGUE}


def metrics_in(expression):
    return set(re.findall(r"\b(?:p2pfed|process)_\w+", re.sub(r'"[^"]*"', '""', expression)))


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *RULE_EXPRESSIONS])
def test_the_dashboard_and_the_alerts_use_metrics_that_exist(expression):
    used = metrics_in(expression)
    assert used or "up{" in expression
    assert used <= set(NAMES)
    labels = set(re.findall(r"(\w+)=~?\"", expression)) - {"instance", "job"}
    assert labels <= set.union(set(), *(NAMES[name] for name in used))
    assert expression.count("(") == expression.count(")")


def test_a_legend_uses_labels_that_its_metric_has():
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            wanted = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"instance"}
            has = set.union(*(NAMES[name] for name in metrics_in(target["expr"])))
            assert wanted <= has, panel["title"]


def test_panels_do_not_overlap_and_stay_within_the_page():
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for one, other in combinations(BOARD["panels"], 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (one["title"], other["title"])


def test_the_dashboard_asks_for_its_data_source_and_fetches_nothing_else():
    variables = {variable["name"]: variable["type"] for variable in BOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}
    for panel in BOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert "http" not in json.dumps(BOARD)


def test_every_alert_says_what_to_do():
    assert RULES.count("- alert: ") == len(RULE_EXPRESSIONS) >= 7
    assert RULES.count("summary: ") == RULES.count("description: ") == len(RULE_EXPRESSIONS)
    assert re.findall(
        r"^ *rule_files:\n +- (.+)$", (ROOT / "bootstrap/prometheus.yml").read_text(), re.MULTILINE
    ) == ["p2pfed.rules.yml"]


def test_the_documentation_lists_every_metric_as_it_is():
    text = (ROOT / "docs/monitoring.md").read_text("utf-8")
    rows = re.findall(
        r"^\| `([a-z0-9_]+)(?:\{([a-z, ]*)\})?` \| (\w+) \| (.+) \|$", text, re.MULTILINE
    )
    told = [
        (name, tuple(labels.split(", ")) if labels else (), kind, what)
        for name, labels, kind, what in rows
    ]
    assert told == [(m.name, m.labels, m.kind, m.text) for m in CATALOGUE]
