"""The dashboard's door, what it serves, and the frozen report; without a browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import zlib
from base64 import b64decode
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import board_fakes
import pytest
from board_fakes import HOSTILE, SECRET, Board, sockets
from browser import arguments, served

from p2pfed.cli import board_data
from p2pfed.cli.board_data import Board as Joined
from p2pfed.cli.board_data import Feed, recent_events
from p2pfed.cli.dashboard import FILES, board_file
from p2pfed.cli.locate import admin_client
from p2pfed.cli.loopback import uid_of
from p2pfed.cli.main import main
from p2pfed.cli.planes import as_png
from p2pfed.cli.report import MOST_BYTES, frozen_page, public_part
from p2pfed.errors import ConfigError, VersionMismatch

pytestmark = pytest.mark.slow  # a daemon's socket and a server for nearly every test


@pytest.fixture
def board():
    return Board()


@pytest.fixture
def server(board):
    with sockets(board) as (socket, _), served(socket) as serving:
        yield serving


def ask(server: Any, path: str, method: str = "GET", **headers: str) -> Any:
    """One request; header names with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=given)
        answer = connection.getresponse()
        answer.text = answer.read().decode()
        return answer
    finally:
        connection.close()


def enter(server: Any) -> str:
    """Use the token up; gives the cookie."""
    answer = ask(server, f"/?token={server.door.token}")
    assert answer.status == 200
    return answer.getheader("Set-Cookie").partition(";")[0]


# --- the door ------------------------------------------------------------------------------------


def test_the_token_opens_once_and_gives_a_strict_cookie(server):
    first = ask(server, f"/?token={server.door.token}")
    cookie = first.getheader("Set-Cookie")
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    again = ask(server, f"/?token={server.door.token}")
    assert (again.status, again.getheader("Set-Cookie")) == (403, None)
    assert "run p2pfed dashboard again" in again.text


def test_another_user_of_the_machine_cannot_use_the_token_that_the_command_line_shows(server):
    curl, setpriv = shutil.which("curl"), shutil.which("setpriv")
    if os.geteuid() != 0 or curl is None or setpriv is None:
        pytest.skip("needs root, curl and setpriv")
    other = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    read = [curl, "--silent", "--show-error", "--max-time", "5", server.address]
    refused = subprocess.run([*other, *read], capture_output=True, text=True, check=False)
    assert (refused.returncode != 0, refused.stdout) == (True, "")
    assert "Opening" in subprocess.run(read, capture_output=True, text=True, check=True).stdout


def test_a_connection_that_its_owner_has_closed_is_nobodys_not_roots():
    """Another user's token, sent and closed at once, would else be taken and be used up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        own = client.getsockname()
        assert uid_of(own, port) == os.geteuid()
        client.close()
        assert uid_of(own, port) is None


def test_nobody_but_the_one_who_serves_is_let_in(server, monkeypatch):
    served_by = os.geteuid() + 1000
    monkeypatch.setattr(os, "geteuid", lambda: served_by)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask(server, f"/?token={server.door.token}")
    monkeypatch.undo()
    assert enter(server)


@pytest.mark.parametrize(
    "path", ["/", "/board.js", "/api/snapshot", "/api/events", "/api/pictures"]
)
def test_nothing_is_given_without_the_cookie(server, path):
    for cookie in ("", f"{server.door.cookie_name}=guess", "other=1"):
        answer = ask(server, path, Cookie=cookie)
        assert answer.status == 403
        assert "St Mary" not in answer.text


def test_a_wrong_token_does_not_use_the_right_one_up(server):
    assert ask(server, "/?token=guess").status == 403
    assert ask(server, "/?token=%FF%00%C3%A9").status == 403
    assert "=" in enter(server)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "[::1]"])
def test_a_foreign_host_is_refused_even_with_the_cookie(server, host):
    cookie = enter(server)
    assert ask(server, "/api/snapshot", Cookie=cookie, Host=host).status == 403


def test_another_sites_request_is_refused_even_with_the_cookie(server):
    cookie = enter(server)
    for foreign in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},  # another port of this machine
    ):
        assert ask(server, "/api/snapshot", Cookie=cookie, **foreign).status == 403
    own = f"http://127.0.0.1:{server.server_port}"
    assert ask(server, "/api/snapshot", Cookie=cookie, Origin=own).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_the_page_can_change_nothing(server, board, method):
    cookie = enter(server)
    for path in ("/", "/api/snapshot", "/v1/leave"):
        assert ask(server, path, method, Cookie=cookie).status == 405
    assert ask(server, "/v1/status", Cookie=cookie).status == 404
    assert board.asked == []


def test_every_answer_has_the_strict_headers_and_no_file_has_inline_code(server):
    cookie = enter(server)
    for path in ("/", "/board.css", "/draw.js", "/api/snapshot", "/nowhere"):
        answer = ask(server, path, Cookie=cookie)
        policy = answer.getheader("Content-Security-Policy")
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Cache-Control") == "no-store"
        assert answer.getheader("Referrer-Policy") == "no-referrer"
    page = board_file("index.html").decode()
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", page)
    code = "".join(board_file(name).decode() for name in FILES if name.endswith(".js"))
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", code)


def test_it_listens_on_loopback_only(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_the_page_is_small_and_refers_to_no_other_place():
    files = {name: board_file(name) for name in FILES}
    assert sum(map(len, files.values())) <= 300_000
    for name, data in files.items():
        places = set(re.findall(rb"https?://[^\s\"']+", data))
        assert places <= {b"http://www.w3.org/2000/svg"}, name


# --- what is shown -------------------------------------------------------------------------------


def test_a_snapshot_joins_both_sockets(server):
    told = json.loads(ask(server, "/api/snapshot", Cookie=enter(server)).text)
    assert told["live"] is True
    assert told["status"]["name"] == "St Mary"
    assert len(told["peers"]) == 4
    assert told["history"]["round"] == board_fakes.ROUND
    assert told["private"]["metrics"][-1]["values"]["accuracy"] == SECRET
    assert told["measures"]["12D3KooWBBBBBBBB"] == [[41, 0.8412, "accuracy"]]


def test_without_the_private_socket_the_rest_is_shown(board):
    with sockets(board, private=False) as (socket, _), served(socket) as server:
        cookie = enter(server)
        told = json.loads(ask(server, "/api/snapshot", Cookie=cookie).text)
        assert told["private"] is None
        pictures = json.loads(ask(server, "/api/pictures", Cookie=cookie).text)
        assert "cannot be read" in pictures["trouble"]


def test_a_daemon_that_goes_away_leaves_the_last_look_marked(monkeypatch, board):
    monkeypatch.setattr(board_data, "_FRESH_S", 0.0)
    with sockets(board) as (socket, _):
        joined = Joined(admin_client(arguments(socket)), lambda _: None)
        assert joined.snapshot()["live"] is True
    gone = joined.snapshot()
    assert gone["live"] is False
    assert "cannot reach the daemon" in gone["trouble"]
    assert gone["status"]["name"] == "St Mary"


def test_peers_measures_are_remembered_over_rounds_and_forgotten_with_the_run(monkeypatch, board):
    monkeypatch.setattr(board_data, "_FRESH_S", 0.0)
    told = {"round": 3, "value": 0.5, "name": "auc"}
    board.make_peers = lambda: [board_fakes.peer("Oslo", "B", measure=told)]
    with sockets(board) as (socket, _):
        joined = Joined(admin_client(arguments(socket)), lambda _: None)
        joined.snapshot()
        told = {"round": 4, "value": 0.6, "name": "auc"}
        of_peer = joined.snapshot()["measures"]["12D3KooWBBBBBBBB"]
        assert of_peer == [[3, 0.5, "auc"], [4, 0.6, "auc"]]
        joined._run = "another"
        assert joined.snapshot()["measures"]["12D3KooWBBBBBBBB"] == [[4, 0.6, "auc"]]


def test_the_feed_gives_events_as_they_come_and_begins_at_the_newest(board):
    for n in range(1500):
        board.emit("round.started", round=n)
    with sockets(board) as (socket, token):
        feed = Feed(admin_client(arguments(socket)))
        feed.start()
        found, seq = [], 0
        while seq < len(board.log):
            more, live = feed.after(seq, 5.0)
            found += more
            seq = found[-1]["seq"] if found else 0
        assert len(found) <= board_data.KEPT_EVENTS
        token.run_sync_soon(lambda: board.emit("peer.alive", name="Oslo"))
        found, live = feed.after(seq, 5.0)
        assert (found[0]["type"], live) == ("peer.alive", True)
        feed.stop()


def test_recent_events_are_the_last_ones_in_order(board):
    for n in range(3000):
        board.emit("round.started", round=n)
    with sockets(board) as (socket, _):
        found = recent_events(admin_client(arguments(socket)))
    assert [e["seq"] for e in found] == sorted(e["seq"] for e in found)
    assert found[-1] == board.log[-1]
    assert len(found) == board_data.KEPT_EVENTS


def test_a_slice_lies_on_the_screen_as_a_radiologist_sees_it():
    from p2pfed.report.three_planes import on_screen

    told = board_fakes.pictures()["pictures"]
    coded = told["best"]["planes"]["axial"]["image"]
    import numpy as np

    stored = np.frombuffer(b64decode(coded["data"]), np.uint8).reshape(coded["shape"])
    png = b64decode(_only(coded))
    width, height = struct.unpack(">II", png[16:24])
    length = struct.unpack(">I", png[33:37])[0]
    rows = np.frombuffer(zlib.decompress(png[41 : 41 + length]), np.uint8)
    rows = rows.reshape(height, width + 1)[:, 1:]
    assert np.array_equal(rows, on_screen(stored))


def _only(coded: dict[str, Any]) -> str:
    from p2pfed.cli.planes import _png

    return _png(coded)


def test_pictures_of_another_form_are_refused():
    with pytest.raises(VersionMismatch):
        as_png({"best": {"case": "x", "score": 1.0, "planes": {}}})
    for part, wrong in (("shape", [1, 1]), ("middle", 99)):
        told = board_fakes.pictures()["pictures"]
        plane = told["best"]["planes"]["axial"]
        {"shape": plane["stack"][0]["image"], "middle": plane}[part][part] = wrong
        with pytest.raises(VersionMismatch):
            as_png(told)


# --- the commands --------------------------------------------------------------------------------


def test_a_port_that_is_none_or_taken_is_told(server, board, capsys):
    with sockets(board) as (socket, _):
        base = ["--socket", str(socket), "dashboard", "--no-browser", "--port"]
        assert main([*base, "99999"]) == 2
        assert "is not a port" in capsys.readouterr().err
        assert main([*base, str(server.server_port)]) == 2
        assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_without_a_daemon_it_says_so_in_three_lines(tmp_path, capsys):
    socket = str(tmp_path / "admin.sock")
    assert main(["--socket", socket, "dashboard", "--no-browser"]) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
    assert main(["--socket", socket, "report", "-o", str(tmp_path / "r.html")]) == 3
    assert not (tmp_path / "r.html").exists()


@contextmanager
def reported(tmp_path: Path, *options: str) -> Any:
    target = tmp_path / "report.html"
    with sockets(Board()) as (socket, _):
        code = main(["--socket", str(socket), "report", "-o", str(target), *options])
    assert code == 0
    yield target


def frozen(page: str) -> Any:
    held = re.search(r'<script type="application/json" id="frozen">(.*?)</script>', page, re.DOTALL)
    return json.loads(held[1])


def test_a_report_is_one_private_file_without_private_numbers_or_addresses(tmp_path, capsys):
    with reported(tmp_path) as target:
        page = target.read_text("utf-8")
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
    data = frozen(page)
    assert len(page.encode()) < MOST_BYTES
    assert str(SECRET) not in page
    assert "192.0.2.77" not in page
    assert "P-0042" not in page
    assert HOSTILE not in page  # only with its < escaped
    assert (data["private"], data["pictures"]) == (None, None)
    assert data["peers"][3]["name"] == HOSTILE
    said = capsys.readouterr().out
    assert "not in it: this hospital's own measures, pictures of patients" in said
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_report_names_no_user_and_no_path_of_the_machine():
    where = "/srv/oncology/sock"
    events = [
        {"seq": 1, "type": "admin.write", "data": {"user": "dr.mueller", "uid": 1004}},
        {"seq": 2, "type": "training.failed", "data": {"reason": f"cannot read {where}: no file"}},
    ]
    status = {
        "addresses": ["/ip4/192.0.2.77/tcp/4201"],
        "pid": 7,
        "trainer": {"state": "ready", "pid": 8},
        "health": [f"waits for a loop at {where}"],
    }
    data = public_part({"status": status, "peers": []}, events)
    text = json.dumps(data, ensure_ascii=False)
    assert "mueller" not in text and "oncology" not in text and '"pid"' not in text
    assert data["status"]["health"] == ["waits for a loop at …"]
    assert data["events"][0]["data"]["reason"] == "cannot read …: no file"


def test_what_is_private_is_in_a_report_when_asked_for(tmp_path, capsys):
    with reported(tmp_path, "--include-private", "--include-images") as target:
        data = frozen(target.read_text("utf-8"))
    assert data["private"]["metrics"][-1]["values"]["accuracy"] == SECRET
    assert [case["rank"] for case in data["pictures"]["cases"]] == ["best", "median", "worst"]
    assert "keep it here" in capsys.readouterr().out


def test_a_report_overwrites_nothing(tmp_path, capsys):
    target = tmp_path / "report.html"
    target.write_text("mine")
    with sockets(Board()) as (socket, _):
        assert main(["--socket", str(socket), "report", "-o", str(target)]) == 2
    assert target.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_an_alone_line_comes_from_an_evaluation(tmp_path, capsys):
    rows = [("common", 0.9), ("alone, 210 steps", 0.79)]
    rows = [{"model": model, "metrics": {"accuracy": value}} for model, value in rows]
    told = {"data": {"rows": rows}}
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(told))
    with reported(tmp_path, "--include-private", "--evaluation", str(file)) as target:
        assert frozen(target.read_text("utf-8"))["private"]["alone"] == {"accuracy": 0.79}
    file.write_text('{"data": {"rows": []}}')
    assert main(["--socket", "/nowhere", "report", "--evaluation", str(file)]) == 2
    assert "--against-alone --json" in capsys.readouterr().err


def long_snapshot(rounds: int) -> dict[str, Any]:
    history = board_fakes.history()
    history["history"] = [{**history["history"][0], "round": r} for r in range(rounds)]
    status = Board().status()
    snapshot = {**board_data._nothing(), "status": status, "peers": [], "history": history}
    return public_part(snapshot, [])


def test_the_oldest_rounds_give_way_where_a_report_would_be_too_long():
    page = frozen_page(long_snapshot(20_000))
    kept = frozen(page.decode())["history"]["history"]
    assert len(page) < MOST_BYTES
    assert kept[-1]["round"] == 19_999
    assert len(kept) >= 500


def test_pictures_that_do_not_fit_give_way_down_to_the_middle_slices_and_else_are_refused():
    data = long_snapshot(10)
    noise = "A" * 60_000

    def case(rank: str, size: int) -> dict[str, Any]:
        one = dict.fromkeys(("image", "target", "predicted"), noise[:size])
        planes = [{"name": "axial", "middle": 3, "slices": [one] * 9}]
        return {"rank": rank, "case": rank, "score": 1.0, "planes": planes}

    cases = [case(rank, 60_000) for rank in ("best", "median", "worst")]
    kept = frozen(frozen_page({**data, "pictures": {"cases": cases}}).decode())["pictures"]["cases"]
    assert [len(c["planes"][0]["slices"]) for c in kept] == [1, 1, 1]
    huge = {"image": "A" * 1_200_000, "target": "", "predicted": ""}
    one = {**cases[0], "planes": [{"name": "axial", "middle": 0, "slices": [huge]}]}
    with pytest.raises(ConfigError, match="would be"):
        frozen_page({**data, "pictures": {"cases": [one]}})


def test_text_that_would_end_the_data_cannot(tmp_path):
    data = long_snapshot(1)
    data["events"] = [{"seq": 1, "ts": "", "type": "x", "data": {"a": "</script><!--\u2028"}}]
    page = frozen_page(data).decode()
    assert frozen(page)["events"][0]["data"]["a"] == "</script><!--\u2028"
    assert page.count("</script>") == 1 + sum(name.endswith(".js") for name in FILES)
