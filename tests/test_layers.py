"""Who may import whom: the rooms as data, checked against every module; and how long one may be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "p2pfed"

# Room -> (rooms and distributions that it may import, why no more). The standard library and the
# package itself (its version) are free to all; "*" is everything.
ROOMS = {
    "errors": ("", "the words that all rooms share"),
    "places": ("errors", "where a configuration lies has one answer"),
    "small_files": ("", "what a person names may be a pipe or have no end"),
    "tcp_table": ("", "whose an end is, the kernel says to everybody alike"),
    "config": ("errors small_files pydantic", "settings are read before anything else exists"),
    "identity": ("errors small_files nacl base58", "who signed what is decided without a network"),
    "wire": ("errors identity msgpack numpy", "formats know nothing of what is done with them"),
    "gossip": ("errors identity wire numpy", "sans-I/O: the simulator runs the very same code"),
    "privacy": ("errors numpy cryptography", "small enough to be read as a proof"),
    "training": (
        "errors config places tcp_table identity wire privacy torch numpy safetensors",
        "the private plane: it has no network",
    ),
    "tasks": (
        "errors training torch numpy sklearn monai nibabel pydicom safetensors",
        "a task sees patients and nothing else",
    ),
    "audit": (
        "errors privacy training tasks numpy torch sklearn",
        "shows on this machine that the gate does what it claims",
    ),
    "network": (
        "errors identity wire trio libp2p multiaddr cryptography",
        "bytes to and from members; what they say is not its business",
    ),
    "node": (
        "errors small_files config identity wire gossip network admin trio numpy safetensors",
        "the public plane: no torch, no patients, no privacy ledger",
    ),
    "admin": (
        "errors trio starlette hypercorn trio_typing",
        "shows what the node gives it; it cannot reach around",
    ),
    "simulate": (
        "errors gossip identity wire numpy",
        "a world for the core; training comes from outside",
    ),
    "report": ("errors numpy matplotlib networkx", "pictures of what is public already"),
    "cli": (
        "errors places small_files tcp_table admin.client config identity node rich simulate "
        "report demo privacy audit doctor",
        "one command is one call and one printer",
    ),
    "doctor": (
        "errors small_files tcp_table config identity admin.client node.archive privacy",
        "looks from outside, with and without a daemon; torch and tasks in other processes only",
    ),
    "demo": ("* -cli", "plays all parts at once, through the doors that the real ones use"),
    "__main__": ("cli", "`python -m p2pfed` is the command"),
    "__init__": ("training", "names what an engineer writes against; importing it loads nothing"),
}

# Modules of the standard library that would break what a room promises.
NO_CLOCK = {"time", "socket", "threading", "asyncio", "multiprocessing", "subprocess", "select"}
FORBIDDEN = {
    "gossip": (NO_CLOCK | {"os", "pathlib", "sqlite3"}, "time, chance and I/O come from outside"),
    "wire": (NO_CLOCK | {"os", "random", "pathlib"}, "decoding is a function of the bytes"),
    "identity": (NO_CLOCK | {"random", "secrets"}, "verifying is a function of the bytes"),
    "privacy": (NO_CLOCK - {"time"} | {"random"}, "noise comes from the keystream only"),
    "simulate": (NO_CLOCK | {"os"}, "a seed repeats a run"),
}
NEVER = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "p2pfed_scripts", "scripts"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__"}
MOST_LINES = 400


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(source: str) -> set[str]:
    """Dotted names of all modules that a source imports, at whatever depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_allowed(name: str, room: str) -> bool:
    allowed = ROOMS[room][0].split()
    top, *rest = name.split(".")
    if top in NEVER:
        return False
    if top in sys.stdlib_module_names:
        return top not in FORBIDDEN.get(room, (set(), ""))[0]
    if top == "p2pfed":
        if rest[:1] in ([room], ["__version__"]):
            return True
        top = rest[0]
        if ".".join(rest[:2]) in allowed:
            return True
    return top in allowed or ("*" in allowed and f"-{top}" not in allowed)


def breaches(source: str, room: str) -> list[str]:
    """What a module of this room imports or calls though it must not."""
    found = [name for name in sorted(imported(source)) if not is_allowed(name, room)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] * (node.func.id in NEVER_CALLED)
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        dotted = f"{node.value.id}.{node.attr}"
        hidden_chance = dotted.startswith("random.") and node.attr not in {"Random", "SystemRandom"}
        hidden_chance = hidden_chance and room in {*FORBIDDEN, "training"}
        unsafe = dotted in {"torch.load", "np.load"} or (room != "tasks" and dotted == "np.random")
        if hidden_chance or unsafe:
            found.append(dotted)
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_may(path):
    room = room_of(path)
    assert room in ROOMS, f"the room {room} has no line in the table"
    why = f"{ROOMS[room][1]}; {FORBIDDEN.get(room, ('', ''))[1]}"
    assert breaches(path.read_text("utf-8"), room) == [], why


def test_every_room_of_the_table_is_there_and_has_a_reason():
    assert {room_of(p) for p in MODULES} == set(ROOMS)
    assert all(reason for _, reason in ROOMS.values())


def test_no_module_is_longer_than_a_reader_keeps_in_mind():
    lines = {str(p.relative_to(PACKAGE)): len(p.read_text("utf-8").splitlines()) for p in MODULES}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert long == {}, "a second idea has crept in: give it a module of its own"


@pytest.mark.parametrize(
    ("room", "planted"),
    [
        ("gossip", "import trio"),
        ("gossip", "import time"),
        ("gossip", "def f():\n    import socket"),
        ("gossip", "from p2pfed.node.store import Store"),
        ("gossip", "import random\nrandom.random()"),
        ("wire", "import random"),
        ("wire", "import pickle"),
        ("identity", "from time import monotonic"),
        ("privacy", "import random"),
        ("privacy", "import numpy as np\nnp.random.default_rng()"),
        ("privacy", "from p2pfed.training.round import work"),
        ("node", "import torch"),
        ("node", "def f():\n    from p2pfed.privacy.ledger import Ledger"),
        ("node", "import p2pfed.training"),
        ("network", "from p2pfed.gossip.core import Core"),
        ("training", "import trio"),
        ("training", "from p2pfed.network import open_network"),
        ("cli", "from p2pfed.admin.server import serve_admin"),
        ("cli", "import p2pfed.admin"),
        ("cli", "import torch"),
        ("demo", "from p2pfed.cli.main import main"),
        ("errors", "import numpy"),
        ("node", "from p2pfed import join"),
        ("__init__", "import torch"),
        ("config", "eval('1')"),
        ("training", "import torch\ntorch.load('x')"),
        ("admin", "import scripts.demo"),
    ],
)
def test_a_planted_breach_is_found(room, planted):
    assert breaches(planted, room)


@pytest.mark.parametrize(
    ("room", "innocent"),
    [
        ("gossip", "import random\nrandom.Random(1)"),
        ("gossip", "from p2pfed.wire.delta import Delta"),
        ("cli", "from p2pfed.admin.client import Client"),
        ("node", "from p2pfed import __version__"),
        ("demo", "import torch"),
    ],
)
def test_what_is_allowed_is_not_reported(room, innocent):
    assert breaches(innocent, room) == []


# --- what is loaded, in real processes --------------------------------------------------------


def loaded_by(*command: str, **environment: str) -> tuple[set[str], subprocess.CompletedProcess]:
    """Top names of the modules that a fresh interpreter loaded for a command."""
    tops = "sorted({m.split('.')[0] for m in sys.modules})"
    spy = f"import atexit, sys; atexit.register(lambda: print('LOADED', *{tops}))"
    code = f"{spy}\nimport runpy\nsys.argv = {list(command)!r}\n"
    code += (
        "exec(sys.argv[1])"
        if command[0] == "-c"
        else "runpy.run_module('p2pfed', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    [line] = [text for text in result.stdout.splitlines() if text.startswith("LOADED")]
    return set(line.split()[1:]), result


@pytest.mark.slow
def test_the_daemon_never_loads_torch():
    loaded, result = loaded_by("-c", "import p2pfed.node.daemon")
    assert result.returncode == 0, result.stderr
    assert "libp2p" in loaded
    assert loaded.isdisjoint({"torch", "sklearn", "scipy", "matplotlib", "pandas"})


@pytest.mark.slow
def test_a_client_command_loads_nothing_heavy(tmp_path):
    socket = str(tmp_path / "no.sock")
    loaded, result = loaded_by("p2pfed", "peers", "--socket", socket, P2PFED_HOME=str(tmp_path))
    assert result.returncode == 3, result.stderr  # no daemon is running there
    assert "p2pfed" in loaded
    heavy = {"torch", "libp2p", "trio", "numpy", "pydantic", "starlette", "hypercorn", "nacl"}
    assert loaded.isdisjoint(heavy)


@pytest.mark.slow
def test_importing_the_package_loads_nothing_but_the_standard_library():
    loaded, _ = loaded_by("-c", "import p2pfed, p2pfed.errors, p2pfed.admin.client; dir(p2pfed)")
    mine, _ = loaded_by("-c", "pass")
    assert {m for m in loaded - mine if m not in sys.stdlib_module_names} == {"p2pfed"}
