"""Bulk files over streams in memory: checked chunk by chunk, resumed anywhere, whole or absent."""

from __future__ import annotations

import io
import struct

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import FactRejected, PeerUnreachable, RemoteProtocolError
from p2pfed.identity import filehash
from p2pfed.identity.filehash import ChunkList, chunk_hash, file_hash
from p2pfed.network import blob

CHUNK = 1000


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(filehash, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(blob, "CHUNK_BYTES", CHUNK)


BODY = bytes(range(256)) * 40  # ten chunks and a bit


class Tape:
    """A stream that plays given bytes, then ends, and records what is written."""

    def __init__(self, heard: bytes = b"") -> None:
        self.heard = bytearray(heard)
        self.written = bytearray()
        self.longest = 0

    async def read(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.longest = max(self.longest, n)
        taken = bytes(self.heard[:n])
        del self.heard[: len(taken)]
        return taken

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.longest = max(self.longest, len(data))
        self.written += data


def list_of(body: bytes) -> ChunkList:
    return ChunkList.of(io.BytesIO(body))


def answer(body: bytes, *, first: int | None = None, cut: int | None = None) -> bytes:
    """What an honest peer sends; with `first` the list is not wanted."""
    chunks = list_of(body)
    head = struct.pack("!Q", len(body)) + (chunks.hashes if first is None else b"")
    return head + body[CHUNK * (first or 0) :][:cut]


def asked(tape: Tape) -> tuple[int, bool]:
    """The first chunk and whether the list was wanted."""
    magic, name, first, listed = struct.unpack("!4s32sQ?", bytes(tape.written))
    assert (magic, name) == (b"PFB2", file_hash(BODY))
    return first, listed


async def receive(tape: Tape, destination, max_bytes: int = 1 << 20, body: bytes = BODY) -> None:
    name = file_hash(body)
    await blob.receive_blob(tape, name, destination, max_bytes=max_bytes, stall=1.0)


def left(folder) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


# -- the name ----------------------------------------------------------------------------------


def test_a_file_of_one_chunk_is_named_by_its_plain_hash():
    assert file_hash(b"x" * CHUNK) == chunk_hash(b"x" * CHUNK)
    assert file_hash(b"") == chunk_hash(b"")


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_the_name_of_bytes_is_the_name_of_the_file(size):
    body = BODY[:size]
    assert list_of(body).name == file_hash(body)
    assert list_of(body).num_good(io.BytesIO(body)) == len(list_of(body))


@given(st.binary(max_size=4 * CHUNK), st.data())
@settings(max_examples=50, deadline=None)
def test_any_change_of_a_file_changes_its_name_and_is_found_in_its_chunk(body, data):
    other = bytearray(body) or bytearray(b"x")
    at = data.draw(st.integers(0, len(other) - 1))
    other[at] ^= 1 + data.draw(st.integers(0, 254))
    assert file_hash(bytes(other)) != file_hash(body)
    if body:
        assert list_of(body).num_good(io.BytesIO(bytes(other))) == at // CHUNK


def test_the_length_is_part_of_a_long_files_name():
    chunks = list_of(BODY)
    assert ChunkList(len(BODY) + 1, chunks.hashes).name != chunks.name
    with pytest.raises(FactRejected):
        ChunkList(len(BODY) + CHUNK, chunks.hashes)


# -- fetching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, len(BODY)])
async def test_a_file_arrives_whole_and_leaves_nothing_beside_it(tmp_path, size):
    body = BODY[:size]
    await receive(Tape(answer(body)), tmp_path / "genesis", body=body)
    assert (tmp_path / "genesis").read_bytes() == body
    assert [path.name for path in tmp_path.iterdir()] == ["genesis"]


@pytest.mark.parametrize("cut", [0, 1, 999, 1000, 5000, len(BODY) - 1])
async def test_a_cut_fetch_goes_on_at_the_chunk_where_it_ended_at_any_peer(tmp_path, cut):
    with pytest.raises(PeerUnreachable):
        await receive(Tape(answer(BODY, cut=cut)), tmp_path / "genesis")
    assert not (tmp_path / "genesis").exists()
    second = Tape(answer(BODY, first=cut // CHUNK))
    await receive(second, tmp_path / "genesis")
    assert asked(second) == (cut // CHUNK, False)
    assert (tmp_path / "genesis").read_bytes() == BODY
    assert left(tmp_path) == [""]


async def test_a_fetch_that_was_whole_but_not_published_asks_for_no_chunk(tmp_path):
    partial = blob._Partial(tmp_path / "genesis", file_hash(BODY))
    partial.accept(list_of(BODY))
    partial.data.write_bytes(BODY)
    tape = Tape(answer(BODY, first=11))
    await receive(tape, tmp_path / "genesis")
    assert asked(tape) == (11, False)
    assert (tmp_path / "genesis").read_bytes() == BODY


async def test_a_liar_is_found_at_its_first_wrong_chunk_and_the_right_ones_are_kept(tmp_path):
    lie = answer(BODY[:3500] + b"!" + BODY[3501:])
    honest_list = struct.pack("!Q", len(BODY)) + list_of(BODY).hashes
    tape = Tape(honest_list + lie[len(honest_list) :])
    with pytest.raises(RemoteProtocolError, match="chunk 3"):
        await receive(tape, tmp_path / "genesis")
    assert len(tape.heard) >= len(BODY) - 5000  # nothing beyond the wrong chunk was read
    await receive(Tape(answer(BODY, first=3)), tmp_path / "genesis")
    assert (tmp_path / "genesis").read_bytes() == BODY


async def test_a_wrong_list_is_refused_before_any_chunk_and_nothing_is_kept(tmp_path):
    tape = Tape(answer(BODY[:-1] + b"!"))
    with pytest.raises(RemoteProtocolError, match="list"):
        await receive(tape, tmp_path / "genesis")
    assert len(tape.heard) == len(BODY)
    assert left(tmp_path) == []


async def test_who_says_another_length_later_on_is_found_out(tmp_path):
    with pytest.raises(PeerUnreachable):
        await receive(Tape(answer(BODY, cut=2500)), tmp_path / "genesis")
    with pytest.raises(RemoteProtocolError, match="says"):
        await receive(Tape(struct.pack("!Q", len(BODY) + 1) + BODY[2000:]), tmp_path / "genesis")
    await receive(Tape(answer(BODY, first=2)), tmp_path / "genesis")


async def test_a_short_file_of_the_wrong_length_or_content_is_refused_and_forgotten(tmp_path):
    body = b"asked for"
    for told, sent in ((9, b"other one"), (8, b"asked fo"), (10, b"asked for!")):
        lie = struct.pack("!Q", told) + chunk_hash(body) + sent
        with pytest.raises(RemoteProtocolError, match="chunk 0"):
            await receive(Tape(lie), tmp_path / "genesis", body=body)
        assert left(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, _: data.write_bytes(b"!" + data.read_bytes()[1:]),
        lambda data, _: data.write_bytes(data.read_bytes() + b"more than came"),
        lambda data, _: data.unlink(),
        lambda _, kept: kept.write_bytes(kept.read_bytes()[:-1]),
        lambda _, kept: kept.write_bytes(b""),
        lambda _, kept: kept.write_bytes(b"\xff" * 40),
        lambda _, kept: kept.unlink(),
    ],
)
async def test_a_partial_file_that_rotted_costs_no_honest_peer_its_name(tmp_path, damage):
    with pytest.raises(PeerUnreachable):
        await receive(Tape(answer(BODY, cut=4200)), tmp_path / "genesis")
    damage(next(tmp_path.glob("*.part")), next(tmp_path.glob("*.list")))
    chunks = tmp_path / "held"
    chunks.write_bytes(BODY)
    server, tape = blob.BlobServer(stall=1.0), Tape()

    class Loop(Tape):  # whatever is asked for is served by an honest peer
        async def write(self, data: bytes) -> None:
            tape.heard += data
            await server.serve(tape, {file_hash(BODY): chunks}.get)
            self.heard += tape.written

    await receive(Loop(), tmp_path / "genesis")
    assert (tmp_path / "genesis").read_bytes() == BODY


async def test_a_file_over_the_limit_is_refused_before_its_list_is_read(tmp_path):
    tape = Tape(struct.pack("!Q", 2**63) + bytes(100))
    with pytest.raises(RemoteProtocolError, match="limit"):
        await receive(tape, tmp_path / "genesis")
    assert len(tape.heard) == 100
    assert left(tmp_path) == []


async def test_a_failed_fetch_leaves_an_older_file_as_it_was(tmp_path):
    (tmp_path / "genesis").write_bytes(b"older")
    with pytest.raises(RemoteProtocolError):
        await receive(Tape(answer(b"x" * len(BODY))), tmp_path / "genesis")
    assert (tmp_path / "genesis").read_bytes() == b"older"


async def test_a_peer_that_drips_bytes_does_not_hold_a_fetch_for_ever(tmp_path, autojump_clock):
    class Drip(Tape):
        async def read(self, n: int) -> bytes:
            if len(self.heard) <= len(BODY):
                await trio.sleep(0.9)  # always within the stall
                n = 1
            return await super().read(n)

    with pytest.raises(PeerUnreachable, match="chunk"):
        await receive(Drip(answer(BODY)), tmp_path / "genesis")
    assert trio.current_time() < 10


def test_only_one_unfinished_file_is_kept_in_a_folder(tmp_path):
    for name in ("a", "b"):
        for suffix in ("part", "list"):
            (tmp_path / f".{name}.0123.{suffix}").touch()
    (tmp_path / "a").touch()
    blob.drop_partials(tmp_path, keep=tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.0123.list", ".b.0123.part", "a"]
    blob.drop_partials(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# -- serving -----------------------------------------------------------------------------------


def request(first: int, *, listed: bool, name: bytes | None = None) -> Tape:
    return Tape(struct.pack("!4s32sQ?", b"PFB2", name or file_hash(BODY), first, listed))


@pytest.mark.parametrize("first", [0, 3, 10, 11, 2**63])
@pytest.mark.parametrize("listed", [True, False])
async def test_a_file_is_served_from_the_asked_chunk_on(tmp_path, first, listed):
    (tmp_path / "held").write_bytes(BODY)
    tape = request(first, listed=listed)
    await blob.BlobServer(stall=1.0).serve(tape, lambda _: tmp_path / "held")
    hashes = list_of(BODY).hashes if listed else b""
    assert bytes(tape.written) == struct.pack("!Q", len(BODY)) + hashes + BODY[first * CHUNK :]


@pytest.mark.parametrize("path", [None, "gone", "rotted"])
async def test_a_file_that_is_not_held_gone_or_rotted_is_said_to_be_absent(tmp_path, path):
    (tmp_path / "rotted").write_bytes(BODY[:-1])
    tape = request(0, listed=True)
    await blob.BlobServer(stall=1.0).serve(tape, lambda _: path and tmp_path / path)
    with pytest.raises(PeerUnreachable, match="does not hold"):
        await receive(Tape(bytes(tape.written)), tmp_path / "genesis")


async def test_a_file_is_hashed_once_for_many_askers_and_few_lists_are_kept(tmp_path, monkeypatch):
    server, hashed = blob.BlobServer(stall=1.0), []
    real = blob._list_of
    monkeypatch.setattr(blob, "_list_of", lambda path: hashed.append(path) or real(path))
    bodies = [bytes([n]) * 10 for n in range(20)]
    for body in bodies:
        (tmp_path / file_hash(body).hex()).write_bytes(body)
        for _ in range(3):
            await server.serve(
                request(0, listed=True, name=file_hash(body)), lambda n: tmp_path / n.hex()
            )
    assert len(hashed) == len(bodies)
    assert len(server._lists) <= 8


async def test_a_request_without_the_magic_bytes_is_a_breach():
    with pytest.raises(RemoteProtocolError, match="magic"):
        await blob.BlobServer(stall=1.0).serve(Tape(bytes(45)), lambda _: None)


async def test_neither_side_holds_more_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.undo()  # real chunks
    body = bytes(5 << 20)
    (tmp_path / "held").write_bytes(body)
    tape = Tape(struct.pack("!4s32sQ?", b"PFB2", file_hash(body), 0, True))
    await blob.BlobServer(stall=1.0).serve(tape, lambda _: tmp_path / "held")
    assert tape.longest <= 1 << 20
    back = Tape(bytes(tape.written))
    await receive(back, tmp_path / "got", max_bytes=1 << 30, body=body)
    assert back.longest <= 1 << 20
