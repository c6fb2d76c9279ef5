"""A trainer bounds itself; each test looks at a process that did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from p2pfed.training.limits import MOST_KILLABLE

pytestmark = pytest.mark.slow

PROGRAM = """
import json, resource, sys
from pathlib import Path
from p2pfed.config import load_settings
from p2pfed.training.limits import keep_within
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)
keep_within(load_settings(Path(sys.argv[1])))
try:
    taken = len(bytearray(600_000_000))
except MemoryError:
    taken = 0
score = Path("/proc/self/oom_score_adj")
print(json.dumps({
    "limit": resource.getrlimit(resource.RLIMIT_DATA),
    "taken": taken,
    "score": int(score.read_text()) if score.exists() else None,
}))
"""


def bounded(folder: Path, memory_gb: str, before: int = 0) -> dict:
    file = folder / "p2pfed.toml"
    file.write_text(
        '[node]\nname = "h"\ndata_dir = "."\n'
        f'[train]\ntask = "breast-cancer"\nmemory_gb = {memory_gb}\n[privacy]\nepsilon = "3"\n'
    )
    command = [sys.executable, "-c", PROGRAM, str(file), str(before)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


def test_a_trainer_over_its_limit_gets_a_memory_error(tmp_path):
    found = bounded(tmp_path, "0.4")
    assert found["limit"] == [400_000_000, 400_000_000]
    assert found["taken"] == 0


def test_without_a_limit_it_gets_what_the_machine_has(tmp_path):
    found = bounded(tmp_path, "0")
    assert found["limit"] == [-1, -1]
    assert found["taken"] == 600_000_000


def test_a_stricter_limit_of_the_system_stands(tmp_path):
    found = bounded(tmp_path, "50", before=500_000_000)
    assert found["limit"] == [500_000_000, 500_000_000]


def test_the_trainer_is_the_first_that_a_machine_without_memory_kills(tmp_path):
    found = bounded(tmp_path, "0")
    if found["score"] is None:
        pytest.skip("this system has no /proc/self/oom_score_adj")
    assert found["score"] == MOST_KILLABLE
