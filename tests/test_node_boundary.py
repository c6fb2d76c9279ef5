"""What the network process says where it could open what is the trainer's alone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from other_users import Stage, folder_of, required, why_not
from trio.testing import MockClock

from p2pfed.config import load_settings
from p2pfed.node.boundary import LOOK_EVERY, Boundary

NODE, TRAINER = 61_875, 61_876  # users that no machine has


def configuration(folder: Path, user: str) -> Path:
    path = folder / "p2pfed.toml"
    path.write_text(
        f'[node]\nname = "St Mary"\ndata_dir = "node"\n[train]\n{user}task = "breast-cancer"\n'
        f'data = "{folder}/data"\nstate = "{folder}/state"\n'
        f'[privacy]\nepsilon = 8\nledger = "{folder}/ledger.db"\n'
    )
    return path


def test_what_can_be_opened_is_told_by_its_key_until_it_cannot(tmp_path, caplog):
    data, ledger = tmp_path / "data", tmp_path / "ledger.db"
    boundary = Boundary({"train.data": data, "privacy.ledger": ledger})
    boundary.look()
    assert boundary.health() == []
    data.mkdir()
    boundary.look()
    boundary.look()
    [line] = boundary.health()
    assert "could open train.data:" in line
    assert "p2pfed doctor" in line
    assert str(data) not in line
    data.rmdir()
    boundary.look()
    assert boundary.health() == []
    assert [record.levelno for record in caplog.records] == 2 * [logging.WARNING]


async def test_it_is_looked_for_again_and_again(tmp_path, autojump_clock: MockClock):
    data = tmp_path / "data"
    boundary = Boundary({"train.data": data})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(boundary.watch)
        for act, told in [(data.mkdir, True), (data.rmdir, False), (data.mkdir, True)]:
            act()
            while bool(boundary.health()) != told:  # noqa: ASYNC110 - the clock is virtual
                await trio.sleep(LOOK_EVERY)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("user", ["", f'user = "{os.geteuid()}"\n'])
async def test_one_user_for_both_has_no_boundary_to_keep(user, tmp_path):
    (tmp_path / "data").mkdir()
    boundary = Boundary.of(load_settings(configuration(tmp_path, user)))
    await boundary.watch()  # ends at once
    boundary.look()
    assert boundary.health() == []


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder that others may pass through; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@required(why_not())
@pytest.mark.slow
def test_patients_that_a_group_may_read_are_open_to_a_member_of_the_group(base, tmp_path):
    folder_of(TRAINER, TRAINER, 0o750, base / "data")
    folder_of(TRAINER, TRAINER, 0o700, base / "state")
    path = configuration(base, f'user = "{TRAINER}"\n')
    program = (
        "import sys; from pathlib import Path; from p2pfed.config import load_settings;"
        "from p2pfed.node.boundary import Boundary;"
        "b = Boundary.of(load_settings(Path(sys.argv[1]))); b.look(); print(b.health())"
    )
    as_member = Stage(tmp_path / "stage").command(NODE, TRAINER)

    def told() -> str:
        command = [*as_member, sys.executable, "-c", program, str(path)]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd="/", timeout=60
        ).stdout

    assert "could open train.data:" in told()
    (base / "data").chmod(0o700)
    assert told() == "[]\n"
