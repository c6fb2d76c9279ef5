"""A real daemon reads its configuration again: by command, by signal, and not when it is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pfed.demo.federation import Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital

pytestmark = pytest.mark.slow


def cli(daemon, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "p2pfed", "--socket", str(daemon.client.path), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def events(daemon, kind: str) -> list[dict]:
    return [e["data"] for e in daemon.client.stream(f"/v1/events?type={kind}")]


def test_a_reload_by_command_by_signal_and_of_a_wrong_file(tmp_path):
    cast = Cast("", None, (Hospital("Gate", 0),), "", "", "")
    net = Federation(tmp_path / "net", cast, epsilon="0")
    net.write_bootstrap()
    daemon, file = net.first, net.first.folder / "p2pfed.toml"
    good = file.read_text()
    with net.running():
        net.start(daemon)
        file.write_text(f'{good}[log]\nlevel = "debug"\n[metrics]\nlisten = "127.0.0.1:1"\n')
        done = cli(daemon, "config", "reload", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["data"] == {
            "applied": ["log.level"],
            "restart_trainer": [],
            "restart_daemon": ["metrics.listen"],
        }
        file.write_text(good)
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(lambda: len(events(daemon, "config.reloaded")) == 2, 20, "the signal is heard")

        file.write_text(good + "[nonsense")
        done = cli(daemon, "config", "reload")
        assert done.returncode == 2
        assert "nothing was changed, the settings from before stay in force" in done.stderr
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(lambda: len(events(daemon, "config.refused")) == 2, 20, "it is told")
        assert "was not read again" in cli(daemon, "status").stdout
        file.unlink()
        os.mkfifo(file)
        done = cli(daemon, "config", "reload")
        assert (done.returncode, done.stderr.count("no regular file")) == (2, 1)
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(lambda: len(events(daemon, "config.refused")) == 4, 20, "it is told")
        file.unlink()
        file.write_text(good)
        assert cli(daemon, "config", "reload").returncode == 0
        assert "was not read again" not in cli(daemon, "status").stdout
        written = events(daemon, "admin.write")
        assert [w["outcome"] for w in written] == ["done", "config-error", "config-error", "done"]
        assert {(w["uid"], w["endpoint"]) for w in written} == {(os.getuid(), "POST /v1/reload")}
    assert daemon.process.returncode == 0


def test_to_stop_a_daemon_twice_is_to_stop_it(tmp_path):
    cast = Cast("", None, (Hospital("Gate", 0),), "", "", "")
    net = Federation(tmp_path / "net", cast, epsilon="0")
    net.write_bootstrap()
    daemon = net.first
    with net.running():
        net.start(daemon)
        for _ in range(3):  # while it says goodbye
            daemon.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.process.wait(0.05)
        assert daemon.process.wait(60) == 0
        assert not Path(daemon.client.path).exists()
