"""A hospital that can dial and cannot be dialled, and a peer that is started anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital

pytestmark = pytest.mark.slow

PATIENCE_S = 120.0  # a hang guard


@pytest.fixture
def net(tmp_path) -> Iterator[Federation]:
    """Ashford can be dialled, Birchwood cannot; neither trains."""
    hospitals = tuple(Hospital(name, 0) for name in ("Ashford", "Birchwood"))
    made = Federation(
        tmp_path / "nodes", Cast("breast-cancer", None, hospitals, "", "", ""), epsilon="8"
    )
    far = made.daemons["Birchwood"]
    config = far.folder / "p2pfed.toml"
    listens = f'listen = ["/ip4/127.0.0.1/tcp/{far.port}"]'
    assert listens in config.read_text()
    config.write_text(config.read_text().replace(listens, "listen = []"))
    with made.running():
        made.write_bootstrap()
        roster = made.stewards.admit([daemon.member for daemon in made.daemons.values()])
        for daemon in made.daemons.values():
            made.start(daemon)
            daemon.client.post("/v1/join", {"roster": roster.decode()})
        yield made


def seen(by: Daemon) -> str:
    """What a daemon says of its only peer."""
    [peer] = by.client.get("/v1/peers")
    return str(peer["state"])


def test_a_peer_that_is_stopped_and_started_is_found_again_by_one_that_nobody_can_dial(net):
    near, far = net.daemons.values()
    wait_for(lambda: seen(near) == seen(far) == "alive", PATIENCE_S, "they meet")
    net.stop(near)
    wait_for(lambda: seen(far) == "left", PATIENCE_S, "it said goodbye")
    net.start(near)
    wait_for(lambda: seen(near) == seen(far) == "alive", PATIENCE_S, "they meet again")
