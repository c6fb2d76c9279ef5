"""Pictures of the dashboard and the report for the documents, from a real run of five hospitals.

Ashford is the relay and the bootstrap peer. Birchwood and Cedar Hill listen nowhere: they reach
each other through Ashford. Elmsley joins late, Dunmore leaves. The pictures are Cedar Hill's view.

The one of the three planes is from another run: three hospitals that train on made-up volumes.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

from p2pfed.demo.federation import Daemon, Federation, wait_for
from p2pfed.demo.plan import Cast, Hospital, breast_cancer, run_constants
from p2pfed.identity.roster import Member

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import chromium, page_of, served  # noqa: E402 - lies beside the tests

HIDDEN, VIEW, RELAY = ("Birchwood", "Cedar Hill"), "Cedar Hill", "Ashford"
SHARING = ("Ashford", "Elmsley")  # their metric with all members
JOIN_AT, LEAVE_AT, SHOW_AT, ROUNDS = 4, 22, 34, 70
PATIENCE_S = 600.0
VOLUMES, IMAGING_ROUNDS = 36, 8


class WithRelay(Federation):
    """The demo's network with a relay and two nodes that nobody can dial."""

    def _prepare(self, hospital: Hospital, epsilon: str) -> Daemon:
        daemon = super()._prepare(hospital, epsilon)
        file = daemon.folder / "p2pfed.toml"
        text = file.read_text("utf-8")
        if hospital.name in HIDDEN:
            lines = ["listen = []" if at.startswith("listen") else at for at in text.splitlines()]
            text = "\n".join(lines) + "\n"
        if hospital.name in SHARING:
            text = text.replace("[privacy]\n", '[privacy]\nshare_metrics = "rounded"\n')
        if hospital.name == RELAY:
            text = text.replace("[network]\n", "[network]\nrelay = true\n")
        file.write_text(text, "utf-8")
        return daemon


def main() -> int:
    """Play the runs and take the pictures; returns the exit code."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    out.mkdir(parents=True, exist_ok=True)
    for take in (_five_hospitals, _three_planes):
        with tempfile.TemporaryDirectory(prefix="p2pfed-shots-") as folder:
            take(Path(folder) / "nodes", out)
    return 0


def _five_hospitals(folder: Path, out: Path) -> None:
    cast = breast_cancer()
    network = WithRelay(folder, cast, epsilon="10")
    constants = run_constants("svt", rounds=ROUNDS, epsilon=Fraction(10))
    constants |= {"min_round_interval_s": 2.0}  # the evaluation at the end takes time
    network.make_run("breast-cancer-1", constants, seed=0)
    network.write_bootstrap()
    with network.running():
        _play(network, cast)
        _show(network.daemons[VIEW], out)


def _three_planes(folder: Path, out: Path) -> None:
    names = ("Ashford", "Birchwood", "Cedar Hill")
    hospitals = tuple(
        Hospital(name, VOLUMES // 4, {"phantoms": VOLUMES, "site": site, "sites": len(names)})
        for site, name in enumerate(names)
    )
    network = Federation(folder, Cast("hippocampus", None, hospitals, "", "", ""), epsilon="0")
    constants = run_constants("none", rounds=IMAGING_ROUNDS, epsilon=Fraction(0))
    network.make_run("volumes-1", {**constants, "quorum": 1.0, "deadline_s": 120.0}, seed=0)
    network.write_bootstrap()
    with network.running():
        network.start_all()
        wait_for(lambda: _has_judged(network.first), PATIENCE_S, "the last model is judged")
        admin = network.first.sockets / "admin.sock"
        with served(admin) as server, chromium() as browser, page_of(browser) as page:
            page.goto(server.address)
            page.click("#planes-ask")
            page.wait_for_selector("#planes-view canvas", timeout=1000 * PATIENCE_S)
            page.click("[data-case='1']")
            _picture(page, out / "dashboard-planes.png", page.locator("#planes"))


def _has_judged(daemon: Daemon) -> bool:
    if not (daemon.sockets / "trainer.sock").exists():
        return False
    told = daemon.private.get("/v1/metrics")["metrics"]
    return any(line["round"] == IMAGING_ROUNDS for line in told)


def _play(network: Federation, cast: Cast) -> None:
    daemons = network.daemons
    roster = network.stewards.admit([_member(d) for d in daemons.values()])
    for daemon in daemons.values():
        if daemon.name != cast.late:
            network.start(daemon)
            network.enrol(daemon, roster)
    _until(daemons[VIEW], JOIN_AT)
    network.start(daemons[cast.late])
    network.enrol(daemons[cast.late], roster)
    _until(daemons[cast.late], LEAVE_AT)
    daemons[cast.leaver].client.post("/v1/leave")
    network.stop(daemons[cast.leaver])
    _until(daemons[VIEW], SHOW_AT)


def _member(daemon: Daemon) -> Member:
    roles = ("train", "relay", "bootstrap") if daemon.name == RELAY else ("train",)
    return dataclasses.replace(daemon.member, roles=roles)


def _until(daemon: Daemon, round_: int) -> None:
    def there() -> bool:
        status = daemon.status()
        return bool(status and status["run"] and status["run"]["round"] >= round_)

    wait_for(there, PATIENCE_S, f"round {round_} at {daemon.name}")


def _show(daemon: Daemon, out: Path) -> None:
    evaluation = daemon.folder / "evaluation.json"
    base = [sys.executable, "-m", "p2pfed", "-c", str(daemon.folder / "p2pfed.toml")]
    evaluate = [*base, "model", "evaluate", "--against-alone", "--json"]
    done = subprocess.run(evaluate, check=True, capture_output=True, text=True)
    evaluation.write_text(done.stdout, "utf-8")
    report = daemon.folder / "report.html"
    frozen = [*base, "report", "--include-private", "--evaluation", str(evaluation)]
    subprocess.run([*frozen, "-o", str(report)], check=True)
    admin = daemon.sockets / "admin.sock"
    with served(admin, evaluation=str(evaluation)) as server, chromium() as browser:
        with page_of(browser, color_scheme="light") as page:
            page.goto(server.address)
            page.wait_for_selector("#live-text:text-is('live')")
            page.wait_for_selector("#strip svg")
            page.wait_for_timeout(2000)
            _picture(page, out / "dashboard.png")
            page.click("#theme")
            _picture(page, out / "dashboard-dark.png")
            page.set_viewport_size({"width": 360, "height": 740})
            _picture(page, out / "dashboard-phone.png")
        with page_of(browser, color_scheme="light") as page:
            page.goto(report.as_uri())
            page.wait_for_selector("#strip svg")
            _picture(page, out / "report.png")
    peers = daemon.client.get("/v1/peers")
    print(json.dumps({p["name"]: [p["state"], p["path"]] for p in peers}))


def _picture(page: Any, file: Path, part: Any = None) -> None:
    page.wait_for_timeout(500)
    if part is None:
        page.screenshot(path=file, full_page=True)
    else:
        part.screenshot(path=file)
    if page.troubles:
        raise SystemExit(f"{file.name}: the page complained: {page.troubles}")
    print(f"{file}  {file.stat().st_size // 1000} kB")


if __name__ == "__main__":
    sys.exit(main())
