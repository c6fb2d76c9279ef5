"""Bootstrap lists: addresses with identities, or nothing."""

from __future__ import annotations

import pytest
from consortium import peer_of

from p2pfed.errors import ConfigError
from p2pfed.identity.bootstrap import BootstrapList

ID, OTHER = peer_of(0), peer_of(1)
ADDRESS = f"/dns4/p2p.example.org/tcp/4201/p2p/{ID}"


def listing(address: str, head: str = "version = 1") -> str:
    return f'{head}\nnetwork = "n"\n[[peer]]\nname = "b"\naddrs = ["{address}"]\n'


@pytest.mark.parametrize("host", ["ip4/10.0.0.1", "ip6/::1", "dns/a.b", "dns4/a.b", "dns6/a.b"])
def test_an_address_with_an_identity_is_read(host):
    read = BootstrapList.parse(listing(f"/{host}/tcp/4201/p2p/{ID}"), "x.toml")
    assert [(p.name, p.peer_id) for p in read.peers] == [("b", ID)]


def test_a_peer_may_have_many_addresses_of_one_identity():
    text = listing(f'{ADDRESS}", "/ip4/10.0.0.1/tcp/1/p2p/{ID}')
    assert len(BootstrapList.parse(text, "x.toml").peers[0].addresses) == 2


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/10.0.0.1/tcp/4201",  # anyone could answer there
        f"/ip4/10.0.0.1/tcp/0/p2p/{ID}",
        f"/ip4/10.0.0.1/tcp/65536/p2p/{ID}",
        f"/ip4/10.0.0.1/udp/4201/quic-v1/p2p/{ID}",
        f"/ip4/10.0.0.1/tcp/4201/p2p/{ID[:-1]}",
        f"/ip4/10.0.0.1/tcp/4201/p2p/{ID} ",
        f"{ADDRESS}/p2p-circuit",
        "p2p.example.org:4201",
        "",
        f'{ADDRESS}", "/ip4/10.0.0.1/tcp/1/p2p/{OTHER}',  # two identities
    ],
)
def test_an_address_that_is_not_usable_is_refused(address):
    with pytest.raises(ConfigError, match=r"x\.toml"):
        BootstrapList.parse(listing(address), "x.toml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "version = 2",
        "version = 1\nsurprise = 1",
        "version = 1\npeer = 3",
        "version = 1\npeer = [3]",
        "version = 1\n[[peer]]\nname = 'b'",
        "version = 1\n[[peer]]\naddrs = 3",
        "version = 1\n[[peer]]\naddrs = [3]",
        f"version = 1\n[[peer]]\naddrs = ['{ADDRESS}']\nid = 3",
        "version = 1\nnetwork_id = 3",
        "version = 1\nnetwork_id = 'abc'",
        "version = ",
    ],
)
def test_what_is_no_bootstrap_list_is_refused(text):
    with pytest.raises(ConfigError, match=r"x\.toml"):
        BootstrapList.parse(text, "x.toml")


def test_an_empty_list_is_one():
    assert BootstrapList.parse("version = 1", "x.toml").peers == ()
