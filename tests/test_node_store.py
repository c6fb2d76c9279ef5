"""The store and the event log: what is on the disk when, and what survives a kill or damage."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from consortium import Consortium, peer_of, some_payload

from p2pfed.errors import ConfigError
from p2pfed.node.eventlog import EventLog
from p2pfed.node.store import KeptEvent, Store
from p2pfed.wire.delta import Proof
from p2pfed.wire.payload import encode_payload

HERE = Path(__file__).resolve().parent
NOON = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)


@pytest.fixture
def consortium() -> Consortium:
    return Consortium(3)


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "store.db")
    yield opened
    opened.close()


def a_log(store: Store) -> EventLog:
    return EventLog(store, lambda: NOON)


# --- deltas ------------------------------------------------------------------------------------


def test_a_kept_delta_is_read_by_a_second_connection_at_once(tmp_path, store, consortium):
    delta = consortium.delta(consortium.run(), 3, 0)
    store.keep_delta(delta, durable=True)
    other = sqlite3.connect(tmp_path / "store.db")
    rows = other.execute("SELECT fact, round, origin, payload FROM deltas").fetchall()
    other.close()
    assert rows == [(delta.fact, 3, peer_of(0), delta.payload)]


def test_an_own_delta_is_written_with_a_full_sync_and_the_others_with_a_normal_one(
    store, consortium
):
    said: list[str] = []
    store._db.set_trace_callback(said.append)
    run = consortium.run()
    store.keep_delta(consortium.delta(run, 0, 0), durable=True)
    store.keep_delta(consortium.delta(run, 0, 1), durable=False)
    store.keep_delta(consortium.delta(run, 1, 0), durable=True)
    store._db.set_trace_callback(None)
    modes = [line.rpartition("=")[2] for line in said if line.startswith("PRAGMA")]
    inserts = [i for i, line in enumerate(said) if line.startswith("INSERT")]
    assert modes == ["FULL", "NORMAL", "FULL"]
    assert all(said[i - 1].startswith("PRAGMA synchronous=") for i in inserts)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # the last one's was FULL
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert not store._db.in_transaction  # committed, not waiting for something


WRITER = """
import sys
from pathlib import Path
from consortium import Consortium
from p2pfed.node.store import Store
c = Consortium(3)
run = c.run()
store = Store(Path(sys.argv[1]))
for r in range(10**6):
    store.keep_delta(c.delta(run, r % 20, r % 3, roster=c.roster, releases=r), durable=True)
    print(r, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 7, 40])
def test_whatever_was_kept_is_there_after_the_writer_is_killed(tmp_path, lines, consortium):
    path = tmp_path / "store.db"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
    )
    last = -1
    for _ in range(lines):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split(b"\n")
    writer.stdout.close()
    writer.wait()
    last = max([last, *(int(line) for line in rest[:-1] if line)])
    store = Store(path)
    run = consortium.run()
    kept = {signed.header.releases for signed in store.headers(run.run_id)}
    assert set(range(last + 1)) <= kept <= set(range(last + 2))
    for signed in store.headers(run.run_id):
        assert store.delta(signed.fact).header == signed.header  # signature and payload are whole
    store.close()


def test_a_delta_that_is_kept_twice_is_there_once(store, consortium):
    run = consortium.run()
    delta = consortium.delta(run, 0, 1)
    store.keep_delta(delta, durable=False)
    store.keep_delta(delta, durable=True)
    assert len(store.headers(run.run_id)) == 1
    assert store.payload(delta.fact) == encode_payload(
        some_payload(run, 0, 1), num_parameters=run.num_parameters
    )


def test_headers_are_of_one_run_and_in_the_order_of_rounds(store, consortium):
    run, other = consortium.run(), consortium.run(name="another")
    for round_ in (4, 0, 2):
        store.keep_delta(consortium.delta(run, round_, 0), durable=False)
    store.keep_delta(consortium.delta(other, 1, 0), durable=False)
    assert [s.header.round for s in store.headers(run.run_id)] == [0, 2, 4]


def test_a_header_that_rotted_on_the_disk_is_left_out_and_the_others_are_read(
    tmp_path, store, consortium
):
    run = consortium.run()
    for i in range(3):
        store.keep_delta(consortium.delta(run, 0, i), durable=False)
    rotten = consortium.delta(run, 0, 1).fact
    store._db.execute("UPDATE deltas SET signature = zeroblob(64) WHERE fact = ?", (rotten,))
    assert {s.header.origin for s in store.headers(run.run_id)} == {peer_of(0), peer_of(2)}
    store.keep_delta(consortium.delta(run, 0, 1), durable=False)  # a peer sent it again
    assert len(store.headers(run.run_id)) == 3


def test_a_payload_that_rotted_on_the_disk_is_never_folded_and_makes_room_for_the_right_one(
    store, consortium
):
    run = consortium.run()
    delta = consortium.delta(run, 0, 1)
    store.keep_delta(delta, durable=False)
    rotten = delta.payload[:-1] + bytes([delta.payload[-1] ^ 1])
    store._db.execute("UPDATE deltas SET payload = ?", (rotten,))
    with pytest.raises(ConfigError, match="damaged"):
        store.payload(delta.fact)
    assert store.headers(run.run_id) == []
    store.keep_delta(delta, durable=False)
    assert store.payload(delta.fact) == delta.payload


def test_proofs_come_back_whole_and_one_per_origin_and_run(store, consortium):
    run = consortium.run()

    def proof(round_: int, i: int) -> Proof:
        one = consortium.delta(run, round_, i)
        other = consortium.delta(run, round_, i, some_payload(run, round_, i, salt=1))
        return Proof.of(one.signed, other.signed)

    for p in (proof(3, 0), proof(5, 1), proof(2, 1)):
        store.keep_proof(p.first.header.origin, p.encode())
    found = {p.first.header.origin: p.first.header.round for p in store.proofs(run.run_id)}
    assert found == {peer_of(0): 3, peer_of(1): 2}
    assert store.proofs(consortium.run(name="another").run_id) == []


def test_addresses_and_small_facts_survive_a_restart(tmp_path, consortium):
    path = tmp_path / "store.db"
    store = Store(path)
    store.keep_addresses("a", ["/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2"])
    store.keep_addresses("a", ["/ip4/127.0.0.1/tcp/3"])
    store.remember("left", True)
    store.remember("left", False)
    store.close()
    store = Store(path)
    assert store.addresses() == {"a": ["/ip4/127.0.0.1/tcp/3"]}
    assert store.recall("left") is False
    assert store.recall("never", default=7) == 7
    store.close()


def test_nobody_else_may_read_the_store_nor_its_journal(tmp_path, consortium):
    before = os.umask(0o022)
    try:
        store = Store(tmp_path / "store.db")
        store.keep_delta(consortium.delta(consortium.run(), 0, 0), durable=True)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
        store.close()
    finally:
        os.umask(before)
    assert set(modes) >= {"store.db", "store.db-wal"}
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_damaged_store_is_a_configuration_error_in_three_lines(tmp_path, content):
    path = tmp_path / "store.db"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Store(path)
    assert str(path) in caught.value.what
    assert caught.value.why
    assert "move it away" in caught.value.do
    assert path.read_bytes() == content  # nothing of it was touched


def test_a_store_that_is_a_folder_or_lies_nowhere_is_a_configuration_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "store.db"):
        with pytest.raises(ConfigError):
            Store(path)


# --- events ------------------------------------------------------------------------------------


def test_event_numbers_only_grow_also_across_a_restart(tmp_path):
    path = tmp_path / "store.db"
    seen = []
    for start in range(3):
        store = Store(path)
        log = a_log(store)
        for i in range(4):
            log.add("kind", {"start": start, "i": i})
        seen = [event["seq"] for event in log.since(0, 100)[0]]
        store.close()
    assert seen == list(range(1, 13))


def test_a_number_that_was_shown_is_never_used_again_even_after_a_kill(tmp_path, store):
    log = a_log(store)
    log.add("shown", {})
    shown = log.since(0, 10)[0][-1]["seq"]
    log.add("never shown", {})  # and never flushed: the process is killed here
    after = a_log(store)
    after.add("after", {})
    assert after.since(0, 10)[0][-1]["seq"] > shown


def test_a_reader_who_comes_late_is_told_how_many_events_are_lost(tmp_path):
    store = Store(tmp_path / "store.db", kept_events=100)
    log = a_log(store)
    for i in range(store.kept_events + 25):
        log.add("kind", {"i": i})
    events, lost = log.since(0, 3)
    assert lost == 25
    assert [event["seq"] for event in events] == [26, 27, 28]
    assert log.since(10, 1)[1] == 15
    assert log.since(25, 1)[1] == 0
    assert log.since(store.kept_events + 25, 1) == ([], 0)
    assert log.since(10**9, 1) == ([], 0)  # a number that was never given
    assert store.event_range() == (26, store.kept_events + 25)
    store.close()


def test_the_ring_of_events_is_kept_over_a_restart_with_its_loss(tmp_path):
    path = tmp_path / "store.db"
    store = Store(path, kept_events=50)
    store.add_events(KeptEvent(n, "kind", n, json.dumps({"seq": n})) for n in range(1, 58))
    store.close()
    store = Store(path, kept_events=50)
    assert a_log(store).since(0, 1) == ([{"seq": 8}], 7)
    store.close()


def test_nothing_lost_and_nothing_there_in_a_new_store(store):
    assert store.event_range() == (1, 0)
    assert a_log(store).since(0, 10) == ([], 0)


async def test_who_waits_for_an_event_is_woken_by_the_next_one_and_not_before(
    store, autojump_clock
):
    log = a_log(store)
    log.add("first", {})
    woken = []

    async def wait(after: int) -> None:
        await log.wait_beyond(after)
        woken.append((after, trio.current_time()))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for after in (0, 1, 1, 2):
            nursery.start_soon(wait, after)
        await trio.sleep(5)
        log.add("second", {})
        await trio.sleep(5)
        log.add("third", {})
    assert sorted((a, t - start) for a, t in woken) == [(0, 0), (1, 5), (1, 5), (2, 10)]


def test_events_are_json_of_public_things_with_a_time(store):
    log = a_log(store)
    log.add("delta.released", {"round": 3})
    (event,), _ = log.since(0, 10)
    assert event == {
        "v": 1,
        "seq": 1,
        "ts": "2026-01-02T12:00:00.000000Z",
        "type": "delta.released",
        "data": {"round": 3},
    }


def test_a_witness_tells_the_newest_header_of_every_run_also_after_a_restart(tmp_path, consortium):
    path, runs = tmp_path / "store.db", [consortium.run(), consortium.run(name="earlier")]
    store = Store(path)
    held = [consortium.delta(run, r, i) for run in runs for r in (4, 0, 9) for i in (1, 2)]
    for delta in held:
        store.keep_delta(delta, durable=False)
    store.close()
    store = Store(path)
    for i in (1, 2):
        newest = {(s.header.run_id, s.header.round) for s in store.newest_headers(peer_of(i))}
        assert newest == {(run.run_id, 9) for run in runs}
        assert {s.header.origin for s in store.newest_headers(peer_of(i))} == {peer_of(i)}
    assert store.newest_headers(peer_of(0)) == []
    store.close()


def test_what_a_runs_archive_takes_is_counted_once_also_after_a_restart(tmp_path, consortium):
    path, run = tmp_path / "store.db", consortium.run()
    store, size = Store(path), 0
    for round_ in range(3):
        delta = consortium.delta(run, round_, 1)
        for _ in range(2):  # the second time it is there already
            store.keep_delta(delta, durable=False)
        size += len(delta.payload)
        assert store.archived(run.run_id) == size
    assert store.archived(bytes(32)) == 0
    store.close()
    store = Store(path)
    assert store.archived(run.run_id) == size
    store.close()
