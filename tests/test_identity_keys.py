"""A node's key: its file, and the peer id that it gives."""

from __future__ import annotations

import stat

import pytest
from consortium import key_of, peer_of
from libp2p.crypto.ed25519 import Ed25519PublicKey
from libp2p.peer.id import ID

from p2pfed.errors import ConfigError, FactRejected
from p2pfed.identity.keys import (
    NodeKey,
    StewardKey,
    peer_id_of,
    public_key_of,
    write_private,
)


@pytest.mark.parametrize("i", [0, 1, 255, 2**64, 2**248])
def test_our_peer_id_is_libp2ps_own(i):
    public = NodeKey((i + 1).to_bytes(32, "big")).public_key
    theirs = ID.from_pubkey(Ed25519PublicKey.from_bytes(public)).to_string()
    assert peer_id_of(public) == theirs
    assert public_key_of(theirs) == public


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3KooW",
        peer_of(0)[:-1],
        peer_of(0) + "1",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # sha2-256: an RSA peer
        peer_of(0).replace("K", "0"),  # not in the alphabet
        peer_of(0) + "é",
        peer_of(0) * 100,
    ],
)
def test_what_is_not_the_id_of_an_ed25519_key_is_refused(text):
    with pytest.raises(FactRejected):
        public_key_of(text)


@pytest.mark.parametrize("padded", ["{} ", " {}", "{}\n", "{}\t", "1{}"])
def test_a_key_has_one_spelling_only(padded):
    """Two spellings of one identity would be two origins with one key."""
    with pytest.raises(FactRejected):
        public_key_of(padded.format(peer_of(0)))


@pytest.mark.parametrize("kind", [NodeKey, StewardKey])
def test_a_key_file_is_private_and_reads_back(tmp_path, kind):
    path = tmp_path / "key"
    key = kind.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kind.load(path) == key
    assert key.seed.hex() not in repr(key)


def test_two_keys_differ(tmp_path):
    assert NodeKey.create(tmp_path / "a").seed != NodeKey.create(tmp_path / "b").seed


def test_a_key_is_never_overwritten(tmp_path):
    path = tmp_path / "key"
    key = NodeKey.create(path)
    with pytest.raises(ConfigError, match="exists already"):
        NodeKey.create(path)
    with pytest.raises(ConfigError, match="exists already"):
        write_private(path, b"x")
    assert NodeKey.load(path) == key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o777, 0o610])
def test_a_key_that_others_could_touch_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    NodeKey.create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
        NodeKey.load(path)


def test_a_missing_key_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="p2pfed init"):
        NodeKey.load(tmp_path / "key")


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot write"):
        NodeKey.create(tmp_path / "no" / "key")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"p2pfed-node-key-1\n",
        b"p2pfed-node-key-1\n" + b"0" * 62,
        b"p2pfed-node-key-1\n" + b"0" * 66,
        b"p2pfed-node-key-1\n" + b"x" * 64,
        b"p2pfed-node-key-2\n" + b"0" * 64,
        b"0" * 64,
        b"p2pfed-node-key-1\n" + b"0" * 64 + b"\nmore",
    ],
)
def test_a_malformed_key_file_is_refused(tmp_path, text):
    path = tmp_path / "key"
    write_private(path, text)
    with pytest.raises(ConfigError):
        NodeKey.load(path)


def test_a_stewards_key_runs_no_node(tmp_path):
    StewardKey.create(tmp_path / "steward")
    with pytest.raises(ConfigError, match="not a key file"):
        NodeKey.load(tmp_path / "steward")


def test_the_builders_keys_are_stable():
    assert peer_of(0) == key_of(0).peer_id
    assert peer_of(0) == "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"


# --- a key that the service manager hands over ---------------------------------------------------


@pytest.fixture
def credential(tmp_path, monkeypatch):
    """A key in the folder of this process's credentials."""
    NodeKey.create(tmp_path / "node.key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    return tmp_path / "node.key"


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600])
def test_a_credential_may_show_the_mask_of_its_access_list(credential, mode):
    credential.chmod(mode)
    assert NodeKey.load(credential).peer_id.startswith("12D3")


@pytest.mark.parametrize("mode", [0o444, 0o404, 0o460, 0o450, 0o666])
def test_a_credential_that_is_wider_than_that_is_refused(credential, mode):
    credential.chmod(mode)
    with pytest.raises(ConfigError, match="others on this machine"):
        NodeKey.load(credential)


def test_a_key_beside_the_credentials_is_held_to_the_strict_rule(credential, tmp_path, monkeypatch):
    credential.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="mode 0440"):
        NodeKey.load(credential)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match="mode 0440"):
        NodeKey.load(credential)


def test_a_credential_of_another_user_is_refused(credential, monkeypatch):
    credential.chmod(0o440)
    owner = credential.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    if owner == 0:
        assert NodeKey.load(credential).peer_id  # root, who hands them out
    else:
        with pytest.raises(ConfigError, match="others on this machine"):
            NodeKey.load(credential)
