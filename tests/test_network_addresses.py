"""Addresses and networks: what parses, what it means, and what is refused."""

from __future__ import annotations

import ipaddress

import pytest
from circuit_fakes import IDS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pfed.errors import ConfigError
from p2pfed.network.addresses import (
    Circuit,
    Direct,
    Networks,
    pack,
    parse_address,
    parse_direct,
    unpack,
)

RELAY, PEER, OTHER = IDS["r"], IDS["a"], IDS["b"]
PLACES = [
    "/ip4/192.0.2.1/tcp/4001",
    "/ip6/2001:db8::1/tcp/4001",
    "/dns/hospital.example/tcp/1",
    "/dns4/hospital.example/tcp/65535",
    "/dns6/hospital.example/tcp/4001",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_direct_address_is_read_and_written_back(place):
    plain = parse_direct(place)
    assert str(plain) == place
    assert parse_address(place, PEER) == plain
    named = parse_address(f"{place}/p2p/{PEER}", PEER)
    assert named == Direct(plain.kind, plain.host, plain.port, PEER)
    assert str(named) == f"{place}/p2p/{PEER}"


@pytest.mark.parametrize("place", PLACES)
def test_a_circuit_address_names_the_relay_where_it_is_and_the_peer(place):
    text = f"{place}/p2p/{RELAY}/p2p-circuit"
    circuit = parse_address(text, PEER)
    assert circuit == Circuit(RELAY, PEER, parse_direct(f"{place}/p2p/{RELAY}", RELAY))
    assert str(circuit) == f"{text}/p2p/{PEER}"
    assert parse_address(str(circuit), PEER) == circuit


def test_a_circuit_address_without_the_relays_place_is_for_who_has_a_link_to_it():
    text = f"/p2p/{RELAY}/p2p-circuit/p2p/{PEER}"
    circuit = parse_address(text, PEER)
    assert circuit == Circuit(RELAY, PEER)
    assert str(circuit) == text


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/",
        "nonsense",
        "192.0.2.1:4001",
        "/ip4/192.0.2.256/tcp/4001",
        "/ip4/192.0.2.1",
        "/ip4/192.0.2.1/udp/4001/quic-v1",
        "/ip4/192.0.2.1/tcp/4001/ws",
        "/ip4/192.0.2.1/tcp/70000",
        "/dns4/a b/tcp/4001",
        "/unix/tmp/socket",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{OTHER}",
        f"/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{RELAY}/p2p-circuit/p2p/{OTHER}",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/4001/p2p-circuit/p2p/{PEER}",
        f"/p2p/{RELAY}/p2p-circuit/p2p/{OTHER}/p2p-circuit/p2p/{PEER}",
        f"/p2p/{RELAY}/p2p-circuit/p2p/{PEER}/tcp/1",
        f"/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N/p2p-circuit/p2p/{PEER}",
        "/p2p-circuit",
        f"/ip4/192.0.2.1/udp/4001/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
        "/ip4/192.0.2.1/tcp/4001" * 100,
    ],
)
def test_an_address_that_leads_nowhere_or_to_another_is_a_config_error(address):
    with pytest.raises(ConfigError, match="is not a usable address"):
        parse_address(address, PEER)


def test_an_address_to_listen_on_names_nobody():
    with pytest.raises(ConfigError, match="is not a usable address"):
        parse_direct(f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}")


@given(st.text(max_size=60) | st.from_regex(r"(/(ip4|ip6|dns|tcp|p2p|p2p-circuit|\w{1,8})){1,6}"))
@example("/ip4/192.0.2.1/tcp/\ud800")
@example("/ip6/fe80::1%eth0/tcp/1")
@settings(max_examples=25)
def test_property_any_text_parses_to_the_same_value_again_or_is_a_config_error(text):
    try:
        address = parse_address(text, PEER)
    except ConfigError:
        return
    assert parse_address(str(address), PEER) == address


@pytest.mark.parametrize("place", PLACES)
def test_the_binary_form_comes_back(place):
    named = parse_direct(f"{place}/p2p/{RELAY}", RELAY)
    assert unpack(pack(named), RELAY) == named


@given(st.binary(max_size=80))
@settings(max_examples=50)
def test_property_any_bytes_are_an_address_of_the_peer_or_a_config_error(data):
    try:
        address = unpack(data, RELAY)
    except ConfigError:
        return
    assert address.peer in (None, RELAY)


def test_bytes_that_name_another_peer_are_refused():
    with pytest.raises(ConfigError):
        unpack(pack(parse_direct(f"{PLACES[0]}/p2p/{OTHER}", OTHER)), RELAY)


@pytest.mark.parametrize(
    ("address", "is_wildcard"),
    [
        ("/ip4/0.0.0.0/tcp/4001", True),
        ("/ip6/::/tcp/4001", True),
        ("/ip4/192.0.2.1/tcp/0", True),
        ("/ip4/192.0.2.1/tcp/4001", False),
        ("/dns4/hospital.example/tcp/4001", False),
    ],
)
def test_an_address_to_listen_on_everywhere_is_not_one_to_dial(address, is_wildcard):
    assert parse_direct(address).is_wildcard is is_wildcard


@pytest.mark.parametrize(
    ("networks", "inside", "outside"),
    [
        (["10.0.0.0/8"], ["10.1.2.3", "::ffff:10.1.2.3"], ["11.0.0.1", "::ffff:11.0.0.1", "::1"]),
        (["192.0.2.7"], ["192.0.2.7"], ["192.0.2.8"]),
        (["2001:db8::/32"], ["2001:db8:1::5"], ["2001:db9::1", "10.0.0.1"]),
        (["::ffff:10.0.0.0/104"], ["10.200.0.1", "::ffff:10.200.0.1"], ["11.0.0.1"]),
        (["fe80::/10"], ["fe80::1", "fe80::1%eth0"], ["fd00::1"]),
        (["0.0.0.0/0"], ["203.0.113.9", "::ffff:203.0.113.9"], ["2001:db8::1"]),
        (["::/0"], ["2001:db8::1"], ["203.0.113.9", "::ffff:203.0.113.9"]),
        (["10.0.0.0/8", "::1"], ["::1", "10.0.0.1"], ["127.0.0.1"]),
        ([], [], ["10.0.0.1", "::1"]),
        (["10.0.0.0/8"], [], ["", "hospital.example", "/tmp/socket"]),
    ],
)
def test_an_ip_address_lies_in_the_networks_or_not(networks, inside, outside):
    listed = Networks(networks)
    assert [ip for ip in inside + outside if listed.contains(ip)] == inside
    assert bool(listed) is bool(networks)


@given(st.ip_addresses(v=4), st.integers(0, 32), st.ip_addresses(v=4))
@settings(max_examples=50)
def test_property_both_forms_of_an_ipv4_address_are_one(base, prefix, ip):
    network = ipaddress.ip_network((base, prefix), strict=False)
    listed, mapped = Networks([str(network)]), Networks([f"::ffff:{network[0]}/{prefix + 96}"])
    for address in (str(ip), f"::ffff:{ip}", ipaddress.ip_address(f"::ffff:{ip}").exploded):
        assert listed.contains(address) is mapped.contains(address) is (ip in network)


def test_every_wrong_network_is_named_with_the_setting_it_comes_from():
    with pytest.raises(ConfigError) as caught:
        Networks(["10.0.0.1/8", "192.0.2.0/24", "hospital", "10.0.0.0/33"], key="members_from")
    text = str(caught.value)
    assert "members_from" in text
    assert "has host bits set" in text
    assert all(repr(wrong) in text for wrong in ("10.0.0.1/8", "hospital", "10.0.0.0/33"))
    assert "192.0.2.0/24'" not in text
