"""A node's folder in which the doctor has nothing to mend, and ways to spoil it.

Two members (`consortium`): this node and a bootstrap peer, which is a socket that takes connections
and says nothing. The roster is good for a hundred days from now, whenever that is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from admin_fakes import short_folder
from consortium import Consortium, key_of, peer_of

from p2pfed.identity.filehash import ChunkList
from p2pfed.identity.keys import write_private
from p2pfed.identity.run import Run
from p2pfed.privacy.ledger import Ledger

TASK = "broken_tasks:Sound"


def listening() -> socket.socket:
    """A TCP socket that takes connections on loopback."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen(16)
    return taken


def free_port() -> int:
    with listening() as taken:
        return taken.getsockname()[1]


class SoundNode:
    """The folder, its parts, and the doctor's findings about it."""

    def __init__(self, folder: Path, peer_port: int) -> None:
        self.folder = folder / "node"
        self.folder.mkdir(mode=0o700)
        self.data = folder / "data"
        self.data.mkdir(mode=0o750)
        self.config = self.folder / "p2pfed.toml"
        self.key = self.folder / "node.key"
        self.ledger = self.folder / "ledger.db"
        self.port = free_port()
        self.peer_port = peer_port
        self.consortium = Consortium(2)
        write_private(self.key, f"p2pfed-node-key-1\n{key_of(0).seed.hex()}\n".encode())
        for name in ("rosters", "runs", "blobs"):
            (self.folder / name).mkdir(mode=0o700)
        self.hold_rosters(days=100)
        self.write_bootstrap(peer_port)
        self.accept()
        with Ledger.open(self.ledger) as ledger:
            ledger.register("a data set", [b"a", b"b"])
        self.configure()

    def hold_rosters(self, *, days: float, members: int = 2) -> None:
        """Keep a newer roster that expires in so many days and lists the first members."""
        made = self.consortium
        expires = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=days)
        made.publish(made.roster.next(expires=expires, members=made.roster.members[-members:]))
        for roster, signed in zip(made.rosters, made.signed, strict=True):
            name = f"v{roster.version:010d}-{roster.hash.hex()[:16]}.json"
            (self.folder / "rosters" / name).write_bytes(signed)

    def write_bootstrap(self, port: int, host: str = "/ip4/127.0.0.1") -> None:
        """One list that names the peer at a port, and this node, which is not dialled."""
        peers = {"h1": f"{host}/tcp/{port}/p2p/{peer_of(1)}"}
        peers["me"] = f"/ip4/127.0.0.1/tcp/1/p2p/{peer_of(0)}"
        blocks = [
            f"[[peer]]\nname = {json.dumps(name)}\naddrs = [{json.dumps(address)}]\n"
            for name, address in peers.items()
        ]
        head = (
            f'version = 1\nnetwork = "t"\nnetwork_id = "{self.consortium.rosters[0].hash.hex()}"\n'
        )
        (self.folder / "bootstrap.toml").write_text(head + "".join(blocks))

    def accept(self) -> None:
        """A run with its first model."""
        genesis = self.folder / "genesis"
        genesis.write_bytes(bytes(160))
        with genesis.open("rb") as file:
            digest = ChunkList.of(file).name
        genesis.rename(self.folder / "blobs" / digest.hex())
        signed = self.consortium.signed_run(genesis=digest)
        run = Run.decode(self.consortium.run_draft(genesis=digest).encode())
        (self.folder / "runs" / f"{run.run_id.hex()}.json").write_bytes(signed)
        store = self.folder / "store.db"
        store.touch(mode=0o600)
        with contextlib.closing(sqlite3.connect(store)) as db, db:
            db.execute("CREATE TABLE remembered (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            db.execute("INSERT INTO remembered VALUES ('run', ?)", (json.dumps(run.run_id.hex()),))

    def configure(self, **changed: dict[str, Any]) -> None:
        """Write the configuration, with keys of a section replaced or added."""
        sections: dict[str, dict[str, Any]] = {
            "node": {
                "name": "h0",
                "data_dir": ".",
                "listen": [f"/ip4/0.0.0.0/tcp/{self.port}"],
            },
            "network": {"bootstrap": ["bootstrap.toml"]},
            "train": {"task": TASK, "data": str(self.data), "device": "cpu"},
            "privacy": {"epsilon": "8", "allow_none": True, "ledger": "ledger.db"},
        }
        for section, keys in changed.items():
            sections.setdefault(section, {}).update(keys)
        lines = []
        for section, keys in sections.items():
            lines += [f"[{section}]", *(f"{key} = {_toml(v)}" for key, v in keys.items())]
        self.config.write_text("\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


@contextlib.contextmanager
def sound_node() -> Iterator[SoundNode]:
    """A sound node in a short folder, with its peer taking connections."""
    with short_folder() as folder, listening() as peer:
        yield SoundNode(folder, peer.getsockname()[1])


def stale_socket(path: Path) -> None:
    """What a process leaves that was killed while it listened."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(path))
