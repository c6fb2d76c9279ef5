"""A member of a p2pfed network that is a stock py-libp2p host; led by test_network_interop.py.

The host, its Noise and its yamux are the library's, with nothing of `p2pfed.network` beneath the
streams. The commands are those of `node.mjs`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.host.ping import PingService
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from p2pfed.errors import PeerUnreachable
from p2pfed.identity.filehash import file_hash
from p2pfed.network.blob import BlobServer, receive_blob
from p2pfed.network.framing import read_frame, write_frame

GOSSIP, BLOB = "/p2pfed/gossip/1", "/p2pfed/blob/1"
STALL = 30.0


class Bytes:
    """A stock stream as the formats want it: an end is `b""`."""

    def __init__(self, stream) -> None:
        self._stream = stream

    async def read(self, n: int) -> bytes:
        try:
            return await self._stream.read(n)
        except StreamEOF:
            return b""

    async def write(self, data: bytes | memoryview) -> None:
        await self._stream.write(bytes(data))


class Member:
    """The commands; each is a method of that name."""

    def __init__(self, host, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._blobs = BlobServer(stall=STALL)
        self._heard, self._hearing = trio.open_memory_channel[bytes](100)
        self._gossip = {}
        host.set_stream_handler(GOSSIP, self._serve_gossip)
        host.set_stream_handler(BLOB, self._serve_blob)

    async def dial(self, address: str) -> str:
        info = info_from_p2p_addr(Multiaddr(address))
        await self._host.connect(info)
        return str(info.peer_id)

    async def ping(self, peer: str) -> float:
        (milliseconds,) = await PingService(self._host).ping(ID.from_base58(peer))
        return milliseconds / 1000

    async def identify(self, peer: str) -> dict:
        stream = Bytes(await self._host.new_stream(ID.from_base58(peer), ["/ipfs/id/1.0.0"]))
        answer = bytearray()
        while piece := await stream.read(4096):
            answer += piece
        told = parse_identify_response(bytes(answer))
        return {
            "peer": str(ID.from_pubkey(deserialize_public_key(told.public_key))),
            "agent": told.agent_version,
            "protocols": list(told.protocols),
            "listen": [str(Multiaddr(packed)) for packed in told.listen_addrs],
            "observed": str(Multiaddr(told.observed_addr)),
        }

    async def send(self, peer: str, payload: str) -> None:
        if peer not in self._gossip:
            stream = await self._host.new_stream(ID.from_base58(peer), [GOSSIP])
            self._gossip[peer] = Bytes(stream)
        await write_frame(self._gossip[peer], bytes.fromhex(payload), stall=STALL)

    async def hear(self) -> str:
        return (await self._hearing.receive()).hex()

    async def offer(self, bytes: int) -> dict:  # noqa: A002  # the command's word
        body = os.urandom(bytes)
        name = file_hash(body).hex()
        (self._folder / name).write_bytes(body)
        return {"name": name, "sha256": hashlib.sha256(body).hexdigest()}

    async def fetch(self, peer: str, name: str) -> dict:
        stream = await self._host.new_stream(ID.from_base58(peer), [BLOB])
        destination = self._folder / "fetched"
        await receive_blob(
            Bytes(stream), bytes.fromhex(name), destination, max_bytes=1 << 30, stall=STALL
        )
        body = destination.read_bytes()
        return {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}

    async def _serve_gossip(self, stream) -> None:
        with contextlib.suppress(PeerUnreachable):  # the peer ended it
            while True:
                frame = await read_frame(Bytes(stream), max_bytes=16 << 20, stall=STALL)
                await self._heard.send(frame)

    async def _serve_blob(self, stream) -> None:
        def find(name: bytes) -> Path | None:
            path = self._folder / name.hex()
            return path if path.is_file() else None

        await self._blobs.serve(Bytes(stream), find)
        await stream.close()


def say(line: dict) -> None:
    print(json.dumps(line), flush=True)


async def main(folder: Path) -> None:
    keys = create_new_key_pair(os.urandom(32))
    noise = NoiseTransport(keys, noise_privkey=create_x25519_key_pair().private_key)
    host = new_host(key_pair=keys, sec_opt={NOISE: noise}, muxer_opt={YAMUX: Yamux})
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        member = Member(host, folder)
        say({"peer": str(host.get_id()), "address": str(host.get_addrs()[0])})
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            what = json.loads(line)
            try:
                say({"done": await getattr(member, what.pop("command"))(**what)})
            except Exception as error:  # noqa: BLE001  # told to the test, which fails
                say({"failed": repr(error)})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        trio.run(main, Path(name))
