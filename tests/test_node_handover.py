"""The hand-over of a view: slots that are written in place, and never under a reader's eyes."""

from __future__ import annotations

import fcntl
import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from p2pfed.errors import ConfigError, UpdateRejected
from p2pfed.gossip.fold import ModelState, view_of
from p2pfed.node import handover
from p2pfed.node.handover import DATA_BEGINS, Handover, Mean
from p2pfed.training.handover import read_view

SIZE = 70_000  # more than a chunk
NONE = np.zeros(0)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "view.safetensors"


def model(number: int, size: int = SIZE) -> np.ndarray:
    return np.full(size, number << 12, np.int32)


def write(hand: Handover, number: int, **more: Mean) -> None:
    hand.write(model(number), grid_bits=12, **more)


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("size", [1, SIZE, (1 << 20) + 5])
def test_the_view_is_the_folded_model_bit_for_bit_and_any_reader_of_safetensors_takes_it(
    place, size
):
    grid = np.random.default_rng(1).integers(-(2**31), 2**31, size, dtype=np.int32)
    mean = np.random.default_rng(2).normal(size=size).astype(np.float32)
    Handover(place).write(grid, grid_bits=17, mean=Mean(12, mean))
    told = load_file(place)
    assert told["model"].tobytes() == view_of(ModelState(0, grid, NONE, NONE), 17).tobytes()
    assert told["mean"].tobytes() == mean.tobytes()
    with safe_open(place, framework="numpy") as file:
        assert file.metadata() == {"mean_round": "12"}
    read, found = read_view(place, size)
    assert read.tobytes() == told["model"].tobytes()
    assert (found.round, found.values.tobytes()) == (12, mean.tobytes())


def test_without_readers_two_files_are_written_in_turn_and_no_other_is_made(place):
    hand = Handover(place)
    write(hand, 1)
    write(hand, 2)
    files, seen = inodes(place.parent), []
    for number in range(3, 9):
        write(hand, number)
        seen.append(place.stat().st_ino)
        assert (load_file(place)["model"] == number).all()
    assert len(files) == 2
    assert inodes(place.parent) == files == set(seen)
    assert all(a != b for a, b in itertools.pairwise(seen))


def test_what_a_trainer_holds_does_not_change_however_often_is_folded(place):
    hand, held = Handover(place), []
    for number in range(12):
        write(hand, number)
        held.append(read_view(place, SIZE)[0])
    for number, view in enumerate(held):
        assert (view == number).all()


def test_a_slot_is_written_again_as_soon_as_its_reader_is_gone(place):
    hand = Handover(place)
    write(hand, 1)
    view, _ = read_view(place, SIZE)
    first = place.stat().st_ino
    write(hand, 2)
    write(hand, 3)
    assert first != place.stat().st_ino
    three = inodes(place.parent)
    assert len(three) == 3
    part = view[5:9]  # a part of it is enough to hold it
    del view
    write(hand, 4)
    assert (part == 1).all()
    del part
    write(hand, 5)
    assert place.stat().st_ino == first
    assert inodes(place.parent) == three


def test_a_reader_that_keeps_everything_costs_the_node_no_more_than_its_slots(place):
    hand = Handover(place)
    held = []
    for number in range(10):
        write(hand, number)
        held.append(read_view(place, SIZE))
    assert len(inodes(place.parent)) <= 4


def test_a_view_is_as_long_as_its_tensors_whether_a_mean_comes_with_it_or_not(place):
    hand, mean = Handover(place), np.ones(SIZE, np.float32)
    for number in range(8):
        with_mean = number % 3 == 1
        write(hand, number, **({"mean": Mean(number, mean)} if with_mean else {}))
        assert place.stat().st_size == DATA_BEGINS + 4 * SIZE * (2 if with_mean else 1)
        view, found = read_view(place, SIZE)
        assert (view == number).all()
        assert (found is not None) == with_mean


def test_the_slots_go_with_their_hand_over_and_the_view_stays(place):
    hand = Handover(place)
    write(hand, 1)
    write(hand, 2)
    del hand
    gc.collect()
    assert [path.name for path in place.parent.iterdir()] == ["view.safetensors"]
    assert (read_view(place, SIZE)[0] == 2).all()
    again = Handover(place)
    again.write(model(3, 9), grid_bits=12)
    assert (read_view(place, 9)[0] == 3).all()


def test_slots_whose_files_somebody_removed_are_made_anew(place):
    hand = Handover(place)
    write(hand, 1)
    write(hand, 2)
    for path in place.parent.glob(".view*"):
        path.unlink()
    for number in range(3, 7):
        write(hand, number)
        assert (read_view(place, SIZE)[0] == number).all()


def test_a_slot_that_somebody_cut_short_is_made_anew(place):
    hand = Handover(place)
    write(hand, 1)
    write(hand, 2)
    for path in place.parent.glob(".view*"):
        if not path.samefile(place):
            os.truncate(path, 100)
    write(hand, 3)  # would be a SIGBUS
    assert (read_view(place, SIZE)[0] == 3).all()


def test_a_daemon_that_dies_while_it_writes_leaves_the_view_before(place):
    dies = f"""
import os, sys
from pathlib import Path
import numpy as np
from p2pfed.node import handover
hand = handover.Handover(Path(sys.argv[1]))
for number in (1, 2):
    hand.write(np.full({SIZE}, number << 12, np.int32), grid_bits=12)
handover.np.copyto = lambda *_, **__: os.kill(os.getpid(), 9)
hand.write(np.full({SIZE}, 3 << 12, np.int32), grid_bits=12)
"""
    ended = subprocess.run([sys.executable, "-c", dies, place], timeout=60, check=False)
    assert ended.returncode == -9
    assert (read_view(place, SIZE)[0] == 2).all()
    write(Handover(place), 4)
    assert (read_view(place, SIZE)[0] == 4).all()


def test_a_write_that_fails_half_way_leaves_the_view_before_and_the_next_one_is_whole(
    place, monkeypatch
):
    hand = Handover(place)
    write(hand, 1)
    write(hand, 2)
    with monkeypatch.context() as patch:
        patch.setattr(handover.np, "copyto", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(hand, 3)
    assert (read_view(place, SIZE)[0] == 2).all()
    assert inodes(place.parent) == {place.stat().st_ino}
    for number in (4, 5):
        before = read_view(place, SIZE)[0]
        write(hand, number)
        assert (before == {4: 2, 5: 4}[number]).all()
        assert (read_view(place, SIZE)[0] == number).all()


def _interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_folder_without_room_is_told_with_what_to_do(place, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handover.os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="284096 bytes") as told:
        write(Handover(place), 1)
    assert told.value.why == "No space left on device"
    assert not list(place.parent.iterdir())


def test_a_file_that_loses_its_name_between_opening_and_locking_is_not_what_is_read(
    place, monkeypatch
):
    hand = Handover(place)
    write(hand, 1)
    lock, times = fcntl.flock, []

    def lock_late(file, how):
        if how & fcntl.LOCK_SH and not times:
            times.append(1)
            write(hand, 2)
            write(hand, 3)  # into the file that the reader has just opened
            write(hand, 4)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    view, _ = read_view(place, SIZE)
    assert times
    assert (view == 4).all()


def test_a_file_that_is_being_written_is_never_read(place):
    write(Handover(place), 1)
    with place.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UpdateRejected, match="cannot read"):
            read_view(place, SIZE)
    assert (read_view(place, SIZE)[0] == 1).all()


@pytest.mark.slow
def test_a_trainer_that_is_killed_gives_its_view_back(place):
    hand = Handover(place)
    write(hand, 1)
    first = place.stat().st_ino
    reads = (
        "import sys; from pathlib import Path; from p2pfed.training.handover import read_view\n"
        f"view = read_view(Path(sys.argv[1]), {SIZE})\n"
        "print('read', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", reads, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as trainer:
        assert trainer.stdout.readline() == b"read\n"
        for number in (2, 3, 4):
            write(hand, number)
            assert place.stat().st_ino != first
        trainer.kill()
    write(hand, 5)
    assert place.stat().st_ino == first


def test_a_view_may_be_read_by_the_group_where_the_folder_is_shared_with_it_and_else_by_nobody(
    tmp_path,
):
    for mode, expected in ((0o2770, 0o640), (0o700, 0o600)):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        hand = Handover(folder / "view.safetensors")
        write(hand, 1)
        assert (folder / "view.safetensors").stat().st_mode & 0o7777 == expected
