"""Settings: every mistake at once, in words that name the key."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest

from p2pfed.config import SOCKET_PATH_BYTES, default_state_dir, load_settings
from p2pfed.errors import ConfigError

MINIMAL = """
[node]
name = "hospital"
data_dir = "state"
[train]
task = "heart"
[privacy]
epsilon = 3
"""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("P2PFED_"):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path):
    def to_file(text: str, name: str = "p2pfed.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return to_file


def mistakes(path: Path, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_minimal_file_is_enough(write, tmp_path):
    settings = load_settings(write(MINIMAL))
    assert settings.node.data_dir == tmp_path / "state"
    assert settings.key_file == tmp_path / "state" / "node.key"
    assert settings.admin_socket == tmp_path / "state" / "admin.sock"
    assert settings.trainer_socket == tmp_path / "state" / "trainer.sock"
    assert settings.privacy.epsilon == 3
    assert settings.file == tmp_path / "p2pfed.toml"
    assert settings.network.rejoin


def test_settings_cannot_be_changed_afterwards(write):
    settings = load_settings(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        settings.node.name = "other"


def test_a_missing_file_says_how_to_make_one(tmp_path):
    assert "p2pfed init" in mistakes(tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["[node", "a = ", "\ufffd = = 1"])
def test_what_is_not_toml_is_told_with_its_place_and_file(write, text):
    file = write(text)
    told = mistakes(file)
    assert "(at " in told and f"p2pfed config check {file}" in told


def test_what_cannot_be_read_is_told(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in mistakes(tmp_path / "binary.toml")
    assert "cannot read" in mistakes(tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[privacy]\nepsylon = 1", "privacy.epsylon: unknown key (did you mean 'epsilon'?)"),
        ("[node]\nlistenn = []", "node.listenn: unknown key (did you mean 'listen'?)"),
        ("[nodes]\nx = 1", "nodes: unknown key (did you mean 'node'?)"),
        ("[log]\nzzz = 1", "log.zzz: unknown key"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(write, line, told):
    text = MINIMAL
    section = line.partition("\n")[0]
    if section in text:
        text = text.replace(section, line, 1)
    else:
        text += line
    assert told in mistakes(write(text))


def test_all_mistakes_are_told_at_once(write):
    text = mistakes(
        write(
            """
            surprise = 1
            [node]
            name = ""
            dta_dir = "x"
            [admin]
            mode = "0777"
            [privacy]
            epsilon = "much"
            delta = 2
            unit = "visit"
            [log]
            level = "loud"
            """
        )
    )
    assert "9 mistakes" in text
    for key in (
        "surprise",
        "node.name",
        "node.dta_dir",
        "node.data_dir",
        "admin.mode",
        "privacy.epsilon",
        "privacy.delta",
        "privacy.unit",
        "log.level",
    ):
        assert f"{key}:" in text


def test_networks_and_limits_of_the_network_are_read(write):
    file = write(
        """
        [node]
        name = "h"
        data_dir = "state"
        [network]
        relay = true
        reach = "never"
        allowed_networks = ["10.0.0.0/8", "2001:db8::/32"]
        upload_limit_mbit = 2.5
        [train]
        enabled = false
        """
    )
    network = load_settings(file).network
    assert network.relay
    assert network.reach == "never"
    assert network.allowed_networks == ("10.0.0.0/8", "2001:db8::/32")
    assert network.upload_limit_mbit == 2.5


def test_how_a_hospital_trains_is_read_and_has_defaults(write, tmp_path, monkeypatch):
    train = load_settings(write(MINIMAL)).train
    assert (train.device, train.gpus, train.precision) == ("auto", "auto", "auto")
    assert (train.patience, train.longest_round, train.memory_gb) == (0, 86400.0, 0.0)
    settings = load_settings(write(MINIMAL))
    assert settings.loop_socket == tmp_path / "state" / "loop.sock"
    assert settings.trainer_state == tmp_path / "state" / "trainer"
    keys = """
        device = "xpu"
        gpus = 3
        precision = "bf16"
        patience = 5
        longest_round = 90.5
        memory_gb = 12.5
        loop_socket = "l.sock"
        state = "mine"
    """
    settings = load_settings(write(MINIMAL.replace('task = "heart"', f'task = "heart"\n{keys}')))
    train = settings.train
    assert (train.device, train.gpus, train.precision) == ("xpu", 3, "bf16")
    assert (train.patience, train.longest_round, train.memory_gb) == (5, 90.5, 12.5)
    monkeypatch.setenv("P2PFED_TRAIN__GPUS", "2")
    assert load_settings(write(MINIMAL)).train.gpus == 2
    assert settings.loop_socket == tmp_path / "l.sock"
    assert settings.trainer_state == tmp_path / "mine"


@pytest.mark.parametrize(
    "line",
    [
        'device = "tpu"',
        "gpus = 0",
        'gpus = "all"',
        "gpus = true",
        'precision = "fp16"',
        "patience = -1",
        "patience = true",
        "longest_round = 0",
        "longest_round = inf",
        "memory_gb = -1",
        "memory_gb = nan",
    ],
)
def test_what_is_no_way_to_train_is_told_by_its_key(write, line):
    text = mistakes(write(MINIMAL.replace('task = "heart"', f'task = "heart"\n{line}')))
    assert f"train.{line.split()[0]}" in text


def test_what_is_no_network_is_told_with_the_reason(write):
    text = mistakes(
        write(
            """
            [node]
            name = "h"
            data_dir = "state"
            [network]
            reach = "perhaps"
            allowed_networks = ["10.0.0.1/8", "clinic"]
            upload_limit_mbit = -1
            """
        )
    )
    assert "network.allowed_networks.0: 10.0.0.1/8 has host bits set" in text
    assert "network.allowed_networks.1: 'clinic' does not appear to be" in text
    assert "network.reach:" in text
    assert "network.upload_limit_mbit:" in text


def test_all_mistakes_about_this_machine_are_told_at_once(write):
    text = mistakes(
        write(
            """
            [node]
            name = "h"
            data_dir = "state"
            [network]
            bootstrap = ["nowhere.toml"]
            [train]
            data = "no/data"
            """
        )
    )
    assert "4 mistakes" in text
    for told in ("train.task: missing", "privacy.epsilon: missing", "no/data", "nowhere.toml"):
        assert told in text


def test_the_lifetime_budget_has_no_default(write):
    assert "privacy.epsilon: missing" in mistakes(write(MINIMAL.replace("epsilon = 3", "")))
    allowed = MINIMAL.replace("epsilon = 3", "allow_none = true")
    assert load_settings(write(allowed)).privacy.epsilon == 0
    bootstrap = MINIMAL.replace("epsilon = 3", "").replace('task = "heart"', "enabled = false")
    assert not load_settings(write(bootstrap)).train.enabled


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        ("0.1", Fraction(1, 10)),
        ('"0.1"', Fraction(1, 10)),
        ("3", Fraction(3)),
        ("1e-3", Fraction(1, 1000)),
    ],
)
def test_the_budget_is_exact(write, value, exact):
    settings = load_settings(write(MINIMAL.replace("epsilon = 3", f"epsilon = {value}")))
    assert settings.privacy.epsilon == exact


@pytest.mark.parametrize(
    "value",
    ["true", "inf", "nan", "-1", '"x"', '""', '"1/0"', "1001", "[1]", "{}", '"1e999999999"'],
)
def test_what_is_no_budget_is_refused(write, value):
    text = mistakes(write(MINIMAL.replace("epsilon = 3", f"epsilon = {value}")))
    assert "privacy.epsilon" in text


def test_the_environment_overrides_the_file_and_a_flag_overrides_both(write, monkeypatch, tmp_path):
    path = write(MINIMAL)
    monkeypatch.setenv("P2PFED_NODE__NAME", "from the environment")
    monkeypatch.setenv("P2PFED_NODE__DATA_DIR", "elsewhere")
    monkeypatch.setenv("P2PFED_LOG__LEVEL", "debug")
    monkeypatch.setenv("P2PFED_NETWORK__REJOIN", "false")
    monkeypatch.setenv("P2PFED_HOME", str(tmp_path))  # of another kind
    settings = load_settings(path)
    assert settings.node.name == "from the environment"
    assert settings.node.data_dir == tmp_path / "elsewhere"
    assert settings.log.level == "debug"
    assert not settings.network.rejoin
    settings = load_settings(path, flags={"node.name": "from a flag"})
    assert settings.node.name == "from a flag"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("P2PFED_PRIVACY__EPSILON", "1000"),
        ("P2PFED_PRIVACY__ALLOW_NONE", "true"),
        ("P2PFED_PRIVACY__LEDGER", "/tmp/fresh.db"),
        ("p2pfed_privacy__epsilon", "1000"),
    ],
)
def test_the_environment_never_touches_the_privacy_budget(write, monkeypatch, name, value):
    path = write(MINIMAL)
    before = load_settings(path).privacy
    monkeypatch.setenv(name, value)
    assert load_settings(path).privacy == before


def test_a_mistake_in_the_environment_is_told_like_one_in_the_file(write, monkeypatch):
    monkeypatch.setenv("P2PFED_ADMIN__MODE", "0777")
    monkeypatch.setenv("P2PFED_ADMIN__SOCKT", "x")
    text = mistakes(write(MINIMAL))
    assert "admin.mode" in text
    assert "did you mean 'socket'" in text


@pytest.mark.parametrize("where", ["environment", "flag"])
def test_a_section_that_is_no_table_is_told_and_not_a_crash(write, monkeypatch, where):
    path = write("log = 3\n" + MINIMAL)
    flags = {"log.level": "debug"} if where == "flag" else {}
    if where == "environment":
        monkeypatch.setenv("P2PFED_LOG__LEVEL", "debug")
    assert "log:" in mistakes(path, flags=flags)


def test_relative_paths_are_anchored_at_the_file_wherever_we_stand(write, monkeypatch, tmp_path):
    (tmp_path / "list.toml").touch()
    (tmp_path / "patients").mkdir()
    text = MINIMAL.replace('data_dir = "state"', 'data_dir = "state"\nkey_file = "k/key"')
    text = text.replace('task = "heart"', 'task = "heart"\ndata = "patients"\nsocket = "t.sock"')
    text = text.replace("epsilon = 3", 'epsilon = 3\nledger = "l.db"')
    text += '[network]\nbootstrap = ["list.toml"]\n[admin]\nsocket = "/run/a.sock"\n'
    path = write(text)
    monkeypatch.chdir("/")
    settings = load_settings(path)
    assert settings.key_file == tmp_path / "k" / "key"
    assert settings.train.data == tmp_path / "patients"
    assert settings.trainer_socket == tmp_path / "t.sock"
    assert settings.ledger_path == tmp_path / "l.db"
    assert settings.network.bootstrap == (tmp_path / "list.toml",)
    assert settings.admin_socket == Path("/run/a.sock")
    monkeypatch.chdir(tmp_path)
    assert load_settings(Path("p2pfed.toml")) == settings


def test_a_home_is_expanded_and_an_unknown_one_told(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = load_settings(write(MINIMAL.replace('"state"', '"~/state"')))
    assert settings.node.data_dir == tmp_path / "home" / "state"
    assert "nobody-here" in mistakes(write(MINIMAL.replace('"state"', '"~nobody-here/state"')))


@pytest.mark.parametrize("key", ["admin.socket", "train.socket", "train.loop_socket"])
def test_a_socket_path_that_the_system_would_cut_off_is_refused(write, tmp_path, key):
    room = SOCKET_PATH_BYTES - len(str(tmp_path)) - 1
    fits, long = "s" * room, "s" * (room + 1)
    assert load_settings(write(MINIMAL), flags={key: fits}).node.name == "hospital"
    text = mistakes(write(MINIMAL), flags={key: long})
    assert key in text
    assert str(SOCKET_PATH_BYTES) in text


def test_the_length_of_a_socket_path_is_counted_in_bytes(write, tmp_path):
    name = "ü" * ((SOCKET_PATH_BYTES - len(str(tmp_path))) // 2 + 1)
    assert "admin.socket" in mistakes(write(MINIMAL), flags={"admin.socket": name})


def test_a_new_data_directory_is_no_new_budget(write, monkeypatch, tmp_path):
    """The ledger belongs to the hospital, not to a node's folder."""
    monkeypatch.setenv("P2PFED_HOME", str(tmp_path / "home"))
    one = load_settings(write(MINIMAL))
    other = load_settings(write(MINIMAL.replace('"state"', '"another state"'), "other.toml"))
    assert one.ledger_path == other.ledger_path == tmp_path / "home" / "ledger.db"


@pytest.mark.parametrize(
    ("home", "state", "root", "expected"),
    [
        ("/a", "/b", True, "/a"),
        ("", "/b", True, "/var/lib/p2pfed"),
        ("", "/b", False, "/b/p2pfed"),
        ("", "", False, "/home/x/.local/state/p2pfed"),
    ],
)
def test_where_state_lives(monkeypatch, home, state, root, expected):
    monkeypatch.setenv("P2PFED_HOME", home)
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    assert default_state_dir() == Path(expected)


# --- the trainer's user --------------------------------------------------------------------------


def with_user(user: str, data: str = "nowhere") -> str:
    return MINIMAL.replace("[train]\n", f'[train]\nuser = "{user}"\ndata = "{data}"\n')


def test_without_a_trainers_user_there_is_no_account(write):
    assert load_settings(write(MINIMAL)).trainer_account is None


def test_a_trainers_user_is_a_name_or_a_number(write):
    assert load_settings(write(with_user("nobody"))).trainer_account[0] > 0
    assert load_settings(write(with_user("61872"))).trainer_account == (61872, 61872)
    told = mistakes(write(with_user("no-such-user")))
    assert "train.user: there is no user 'no-such-user' here" in told


def test_another_users_data_need_not_be_seen_and_ones_own_must(write):
    load_settings(write(with_user(str(os.geteuid() + 1))))
    assert "train.data" in mistakes(write(with_user(str(os.geteuid()))))


def test_a_path_that_we_may_not_look_at_is_not_a_mistake_of_the_file(write, monkeypatch):
    def closed(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "exists", closed)
    load_settings(write(with_user(str(os.geteuid()))))


def test_the_key_is_as_named_else_the_service_managers_else_in_the_data_directory(
    write, tmp_path, monkeypatch
):
    handed = tmp_path / "credentials"
    handed.mkdir()
    assert load_settings(write(MINIMAL)).key_file == tmp_path / "state" / "node.key"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(handed))
    assert load_settings(write(MINIMAL)).key_file == tmp_path / "state" / "node.key"
    (handed / "node.key").touch()
    assert load_settings(write(MINIMAL)).key_file == handed / "node.key"
    named = MINIMAL.replace("[train]", 'key_file = "mine"\n[train]')
    assert load_settings(write(named)).key_file == tmp_path / "mine"


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, f"a = {'9' * 5000}"])
def test_what_no_parser_can_take_is_told_as_a_mistake_of_the_file(tmp_path, text):
    file = tmp_path / "p2pfed.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="is not TOML"):
        load_settings(file)


def test_a_trainers_user_with_a_zero_byte_is_an_unknown_one(tmp_path):
    file = tmp_path / "p2pfed.toml"
    file.write_text(
        '[node]\nname = "a"\ndata_dir = "."\n[train]\ntask = "x:Y"\nuser = "a\\u0000b"\n'
        '[privacy]\nepsilon = "1"\n'
    )
    with pytest.raises(ConfigError) as told:
        load_settings(file)
    assert "train.user: there is no user" in told.value.why
