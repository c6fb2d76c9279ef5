"""privacy plan and privacy ledger: what they print, refuse and write, on real files."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import os
import socketserver
import subprocess
import sys
import threading
import types
from fractions import Fraction
from pathlib import Path

import pytest

from p2pfed.cli.main import main
from p2pfed.identity.rules import Gate, Outer
from p2pfed.identity.run import Run
from p2pfed.identity.signing import SignedDocument
from p2pfed.privacy.accountant import NANO, Budget, Cost
from p2pfed.privacy.ledger import Ledger
from p2pfed.privacy.records import ReleaseKey
from p2pfed.privacy.units import PATIENT

_spec = importlib.util.spec_from_file_location(
    "admin_fakes", Path(__file__).with_name("admin_fakes.py")
)
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)

PLAN = ("privacy", "plan", "--epsilon", "8", "--rounds", "20", "--patients", "574")
SMALL = (*PLAN, "--parameters", "650")
PAD = (
    *("privacy", "plan", "--epsilon", "10", "--rounds", "10", "--patients", "574"),
    *("--parameters", "10250", "--block-size", "16", "--segment-blocks", "16"),
    *("--select-share", "0.4"),
)
BUDGET = Budget(8.0, 1e-5)
SHARE = Cost.zcdp(Fraction(BUDGET.rho_nano // 40, NANO))


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    with fakes.empty_home(monkeypatch) as path:
        yield path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def data_of(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def refused(capsys, *arguments, code=2):
    """What is told where a command refuses: three lines, also as an envelope."""
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert len(err.splitlines()) == 3
    assert "bug" not in err
    found, out, _ = run(capsys, *arguments, "--json")
    assert json.loads(out)["schema"] == "p2pfed.error/1"
    assert json.loads(out)["data"]["exit_code"] == found == code
    return err


def fill(path, releases=3, mechanism="svt", cost=SHARE):
    path.parent.mkdir(exist_ok=True)
    with Ledger.open(path) as ledger:
        dataset = ledger.register("heart at St Mary", [b"patient %d" % i for i in range(9)])
        for number in range(releases):
            debit = ledger.debit(
                dataset,
                key=ReleaseKey(b"\x3f" * 32, number),
                cost=cost,
                mechanism=mechanism,
                unit="patient",
                relation=PATIENT.neighbours,
                budget=BUDGET,
            )
            ledger.store_output(debit, b"noisy")
        return ledger.head.hex()


# --- the group ---------------------------------------------------------------------------------


def test_privacy_names_its_subcommands(capsys):
    code, out, _ = run(capsys, "privacy", "-h")
    assert code == 0
    for name in ("plan", "ledger", "audit"):
        assert f"\n    {name} " in out
    for name in ("plan", "ledger"):
        code, out, _ = run(capsys, "privacy", name, "-h")
        assert code == 0
        assert out.startswith(f"usage: p2pfed privacy {name}")
    assert "no such" not in refused(capsys, "privacy", "nothing")


def test_the_audit_is_loaded_when_it_is_called(capsys, monkeypatch):
    called = []

    def audit(parser):
        parser.add_argument("--quick", action="store_true")
        parser.set_defaults(run=lambda args: called.append(args.quick) or 0)

    assert run(capsys, "privacy", "-h")[0] == 0
    fake = types.SimpleNamespace(audit=audit)
    monkeypatch.setitem(sys.modules, "p2pfed.cli.audit", fake)
    assert run(capsys, "privacy", "audit", "--quick")[0] == 0
    assert called == [True]


@pytest.mark.slow
def test_privacy_itself_stays_light_and_the_files_need_no_torch(folder):
    fill(folder / "ledger.db")
    source = (
        "import sys\nfrom p2pfed.cli.main import main\nmain(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'nacl', 'trio', 'cryptography', 'matplotlib'}\n"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    loaded = {}
    for command in ("privacy -h", "privacy plan -h", "privacy ledger ledger.db", " ".join(PLAN)):
        done = subprocess.run(
            [sys.executable, "-c", source, *command.split()],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        loaded[command] = set(done.stderr.split())
    assert loaded["privacy -h"] == loaded["privacy plan -h"] == set()
    for light in ("torch", "trio", "pydantic", "matplotlib"):
        assert all(light not in names for names in loaded.values())


# --- plan: what is printed ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_fits_a_terminal_and_says_everything(capsys):
    for arguments in (PLAN, SMALL, PAD, (*SMALL, "--unit", "hospital")):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) <= 100
    out = run(capsys, *SMALL)[1]
    lines = out.splitlines()
    assert lines[0] == "budget    ε 8, δ 1e-5, over 20 rounds"
    assert lines[1] == ("hospital  574 patients, one contribution each, of length at most C = 1")
    assert "neighbours by zero-out: one patient's whole contribution is replaced by zeros" in out
    [gaussian] = [line for line in lines if line.startswith("gaussian * ")]
    assert gaussian.split() == ["gaussian", "*", "650", "100", "%", *gaussian.split()[5:]]
    assert "zcdp" in gaussian
    assert "expected to learn best: gaussian\n" in out
    assert "earns nothing, a public random mask" in out
    assert "UNPROTECTED" in out
    assert "∞" in next(line for line in lines if line.startswith("none  "))


@pytest.mark.slow
def test_a_plan_names_svt_where_selection_pays(capsys):
    out = run(capsys, *PAD)[1]
    assert "expected to learn best: svt sequential\n" in out
    assert "11 to 15 points over a public random mask" in " ".join(out.split())


@pytest.mark.slow
def test_a_plan_for_too_few_patients_says_so(capsys):
    out = run(capsys, *SMALL[:-4], "--patients", "5", "--parameters", "650")[1]
    assert "expected to learn best: gaussian, and badly\n" in out
    assert "5 patients are few" in out


def test_groups_hospitals_and_the_worth_gate_are_named(capsys):
    out = run(capsys, *SMALL, "--patients-per-row", "4")[1]
    assert "574 patients, 144 contributions, of length" in out
    assert "replacement: one patient of a group of 4" in " ".join(out.split())
    assert "574 patients, 1 contribution, of" in run(capsys, *SMALL, "--unit", "hospital")[1]
    out = run(capsys, *SMALL, "--worth-releases", "5")[1]
    assert "over 20 rounds, of which 5 are released; asking which costs ε 0." in out


def test_an_update_that_fits_no_message_is_warned_of(capsys):
    out = run(capsys, *PLAN, "--parameters", "20000000", "--segment-blocks", "100")[1]
    assert "# warning: too large for one message (16.8 MB): gaussian\n" in out
    assert "warning" not in run(capsys, *PLAN)[1]


# --- plan: for programs ------------------------------------------------------------------------


def test_a_plan_as_json_is_one_envelope(capsys):
    envelope = data_of(capsys, *SMALL)
    assert (envelope["schema"], envelope["ok"]) == ("p2pfed.privacy-plan/1", True)
    data = envelope["data"]
    assert set(data) == {"terms", "options", "expected"}
    assert data["terms"]["neighbours"] == PATIENT.neighbours
    assert (data["terms"]["delta"], data["terms"]["epsilon"]) == (1e-5, 8.0)
    assert (data["terms"]["contributions"], data["terms"]["releases"]) == (574, 20)
    assert [option["label"] for option in data["options"]] == [
        *("svt segmented", "svt sequential", "svt-textbook"),
        *("gaussian", "gaussian, top k", "random mask", "none"),
    ]
    assert set(data["options"][0]) == {
        *("label", "mechanism", "chosen", "released", "share", "noise", "choice"),
        *("epsilon_once", "epsilon", "route", "releases", "why", "bytes_per_round"),
    }
    assert set(data["expected"]) == {"best", "usable", "reasons"}


def signed_run(folder, **changes):
    fields = {
        "name": "first",
        "network_id": bytes(32),
        "task": "t",
        "task_id": bytes(32),
        "genesis": bytes(32),
        "num_parameters": 650,
        "rounds": 20,
        "grid_bits": 14,
        "mechanism": "svt",
        "unit": "patient",
        "epsilon": Fraction(8),
        "delta": Fraction(1, 100_000),
        "clip": Fraction(1),
        "block_size": 1,
        "segment_blocks": 4,
        "select_share": Fraction(1, 5),
        "top_fraction": Fraction(1, 2),
        "outer": Outer("fedadam", 0.05),
        "robust": "none",
        "quorum": 0.8,
        "min_live": 0.5,
        "deadline_s": 60.0,
        "min_round_interval_s": 0.0,
        **changes,
    }
    made = Run(**fields)
    (folder / "run.json").write_bytes(SignedDocument(made.encode()).encode())
    return made


@pytest.mark.slow
def test_a_run_file_is_planned_like_the_same_flags(capsys, folder):
    made = signed_run(folder)
    from_file = data_of(capsys, "privacy", "plan", "--run", "run.json", "--patients", "574")
    assert from_file == data_of(capsys, *SMALL)
    sent = {option["label"]: option["bytes_per_round"] for option in from_file["data"]["options"]}
    assert sent["svt segmented"] == made.message_bytes
    assert sent["random mask"] < sent["svt segmented"]  # no indices
    assert sent["gaussian"] == 400 + 2 * 650


def test_a_run_file_of_another_mechanism_brings_its_own_terms(capsys, folder):
    gate = Gate(worth_releases=5)
    signed_run(folder, mechanism="gaussian", gate=gate)
    data = data_of(capsys, "privacy", "plan", "--run", "run.json", "--patients", "99")["data"]
    assert data["terms"]["releases"] == 5
    top = next(one for one in data["options"] if one["label"] == "gaussian, top k")
    assert top["share"] == 0.5


# --- plan: wrong values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("epsilon", "0"),
        ("epsilon", "-3"),
        ("epsilon", "nan"),
        ("epsilon", "inf"),
        ("epsilon", "1e999999999"),
        ("epsilon", "1e-999999999"),
        ("epsilon", "eight"),
        ("epsilon", ""),
        ("delta", "0"),
        ("delta", "1"),
        ("delta", "1/0"),
        ("rounds", "0"),
        ("rounds", "2.5"),
        ("rounds", "1e3"),
        ("patients", "0"),
        ("patients", "x"),
        ("patients-per-row", "575"),
        ("patients-per-row", "0"),
        ("parameters", "0"),
        ("clip", "0"),
        ("clip", "-1"),
        ("unit", "ward"),
        ("schedule", "random"),
        ("block-size", "0"),
        ("segment-blocks", "0"),
        ("select-share", "1"),
        ("block-reach", "0"),
        ("worth-releases", "21"),
    ],
)
def test_a_wrong_value_is_told_in_three_lines(capsys, flag, value):
    refused(capsys, *SMALL, f"--{flag}={value}")


def test_groups_within_a_hospital_as_unit_are_refused(capsys):
    refused(capsys, *SMALL, "--unit", "hospital", "--patients-per-row", "2")


def test_what_is_missing_or_doubled_is_named(capsys, folder):
    assert "--patients" in refused(capsys, "privacy", "plan", "--epsilon", "8", "--rounds", "2")
    assert "no --rounds" in refused(capsys, "privacy", "plan", "--epsilon", "8", "--patients", "9")
    assert "no --epsilon" in refused(capsys, "privacy", "plan", "--rounds", "8", "--patients", "9")
    signed_run(folder)
    both = ("privacy", "plan", "--run", "run.json", "--patients", "9", "--rounds", "2")
    assert "--run and --rounds" in refused(capsys, *both)


def test_a_run_file_that_is_none_or_has_no_budget_is_refused(capsys, folder):
    of = ("privacy", "plan", "--patients", "9", "--run", "run.json")
    assert "cannot read run.json" in refused(capsys, *of)
    (folder / "run.json").write_text("{}")
    assert refused(capsys, *of, code=7)
    nothing = {"epsilon": Fraction(0), "delta": Fraction(0), "unit": "none"}
    signed_run(folder, mechanism="none", **nothing)
    assert "mechanism 'none'" in refused(capsys, *of)


# --- ledger: a file ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_ledger_is_printed_added_up_and_verified(capsys, folder):
    head = fill(folder / "ledger.db")
    code, out, err = run(capsys, "privacy", "ledger", "ledger.db")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[:3] == ["SEQ", "TIME", "(UTC)"]
    assert [line.split()[3] for line in lines[1:4]] == ["open", "register", "debit"]
    assert lines[3].split()[4:] == [
        "D1",
        "3f3f3f3f",
        "0",
        "1",
        "svt",
        "(a)",
        "0.03074",
        "-",
        "1.003",
    ]
    assert lines[4].split()[3:] == [
        "output",
        "D1",
        "3f3f3f3f",
        "0",
        "1",
        "drawn",
        "on",
        "3",
        "1.003",
    ]
    assert lines[9].startswith("(a)  unit patient; neighbours by zero-out")
    assert "D1  heart at St Mary" in lines
    assert "ε 1.831 of 8 spent (δ 1e-5, route zcdp; rho 0.09223); 3 debits, 3 releases" in out
    assert "about 37 more like the newest fit: stops by itself at round ≈ 39" in " ".join(
        out.split()
    )
    assert f"verified: 8 records, head {head}" in lines
    assert "signed delta" in out


@pytest.mark.slow
def test_a_ledger_as_json_is_one_envelope(capsys, folder):
    head = fill(folder / "ledger.db")
    envelope = data_of(capsys, "privacy", "ledger", "ledger.db")
    assert (envelope["schema"], envelope["ok"]) == ("p2pfed.privacy-ledger/1", True)
    data = envelope["data"]
    assert set(data) == {
        *("source", "file", "verified", "records", "head"),
        *("head_at_record", "entries", "data_sets", "export"),
    }
    assert (data["source"], data["verified"], data["head"]) == ("ledger", "here", head)
    assert len(data["entries"]) == data["records"] == 8
    assert set(data["entries"][2]) == {
        *(
            "seq",
            "kind",
            "at",
            "time",
            "chain",
            "body_digest",
            "digest",
            "dataset",
            "run",
            "round",
            "attempt",
        ),
        *("rho_nano", "pure_nano", "mechanism", "unit", "relation", "epsilon", "delta"),
        *("epsilon_after", "route"),
    }
    [one] = data["data_sets"]
    assert (one["limit"], one["left"], one["last_round"]) == (
        {"epsilon": 8.0, "delta": 1e-5},
        37,
        39,
    )
    assert "secret" not in json.dumps(data) and '"patients"' not in json.dumps(data)


@pytest.mark.slow
def test_a_ledger_that_holds_unprotected_releases_shouts(capsys, folder):
    fill(folder / "ledger.db", mechanism="none", cost=Cost.nothing())
    out = run(capsys, "privacy", "ledger", "ledger.db")[1]
    assert "# warning: 3 of them left WITHOUT noise" in out
    assert "stops by itself" not in out


def test_a_ledger_without_debits_is_printed_too(capsys, folder):
    fill(folder / "ledger.db", releases=0)
    out = run(capsys, "privacy", "ledger", "ledger.db")[1]
    assert "nothing was debited yet" in out
    assert "verified: 2 records" in out


def test_a_spent_ledger_says_that_nothing_more_fits(capsys, folder):
    dear = Cost.zcdp(Fraction(BUDGET.rho_nano, NANO))
    fill(folder / "ledger.db", releases=1, cost=dear)
    out = run(capsys, "privacy", "ledger", "ledger.db")[1]
    assert "no further one like the newest fits" in " ".join(out.split())


@pytest.mark.slow
def test_a_corrupt_ledger_is_refused(capsys, folder):
    fill(folder / "ledger.db")
    os.truncate(folder / "ledger.db", 5000)
    assert "ledger ledger.db does not verify" in refused(
        capsys, "privacy", "ledger", "ledger.db", code=7
    )


def test_a_missing_ledger_is_not_made(capsys, folder):
    assert "no ledger at ledger.db" in refused(capsys, "privacy", "ledger", "ledger.db")
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_ledger_in_use_says_what_to_do(capsys, folder):
    fill(folder / "ledger.db")
    code = (
        "import sys, pathlib\nfrom p2pfed.privacy.ledger import Ledger\n"
        "with Ledger.open(pathlib.Path('ledger.db')):\n    print('open', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    ) as trainer:
        assert trainer.stdout.readline() == "open\n"
        err = refused(capsys, "privacy", "ledger", "ledger.db", code=7)
        trainer.communicate("\n")
    assert f"open in a trainer (process {trainer.pid})" in err
    assert "without FILE the trainer is asked" in err


# --- ledger: exports ---------------------------------------------------------------------------


@pytest.mark.slow
def test_an_export_is_written_once_and_verifies(capsys, folder):
    head = fill(folder / "ledger.db")
    export = ("privacy", "ledger", "ledger.db", "--export", "out.jsonl")
    code, out, _ = run(capsys, *export)
    assert code == 0
    assert "export: out.jsonl\n" in out
    assert f"verified: 8 records, head {head}" in out
    assert "out.jsonl exists already" in refused(capsys, *export)
    code, out, err = run(capsys, "privacy", "ledger", "--verify", "out.jsonl")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert f"verified: 8 records, head {head}\n" in out
    assert "recomputed: the whole chain, all totals, all limits, and the seal\n" in out
    assert "not shown: the bodies of records 1, 2, which hold the ledger's secret" in out
    assert "taken as given" not in out
    data = data_of(capsys, "privacy", "ledger", "--verify", "out.jsonl")["data"]
    assert (data["source"], data["verified"], data["file"]) == ("export", "here", "out.jsonl")
    assert (
        data["data_sets"] == data_of(capsys, "privacy", "ledger", "ledger.db")["data"]["data_sets"]
    )


@pytest.mark.slow
def test_a_changed_cut_or_shortened_export_is_refused_by_what_was_done(capsys, folder):
    fill(folder / "ledger.db")
    run(capsys, "privacy", "ledger", "ledger.db", "--export", "out.jsonl")
    whole = (folder / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    lied = whole.replace(b"30742863", b"30742862", 1)
    assert lied != whole
    for data, why in (
        (lied, "record 3 (line 4) was changed"),
        (b"".join(lines[:5] + lines[6:]), "record 5 is missing"),
        (b"".join(lines[:5]), "cut off after line 5"),
        (whole.replace(b"St Mary", b"St Marx"), "the seal does not match"),
        (b"SQLite format 3\x00", "it is no export"),
    ):
        (folder / "bad.jsonl").write_bytes(data)
        err = refused(capsys, "privacy", "ledger", "--verify", "bad.jsonl", code=7)
        assert "export bad.jsonl does not verify" in err
        assert why in err


@pytest.mark.slow
def test_another_ledger_is_found_by_its_head(capsys, folder):
    mine, other = fill(folder / "ledger.db"), fill(folder / "other.db")
    run(capsys, "privacy", "ledger", "ledger.db", "--export", "out.jsonl")
    verify = ("privacy", "ledger", "--verify", "out.jsonl", "--head")
    assert "the head asked for is the ledger's head now\n" in run(capsys, *verify, mine)[1]
    assert f"no record has the head {other}" in refused(capsys, *verify, other, code=7)
    earlier = data_of(capsys, "privacy", "ledger", "ledger.db")["data"]["entries"][3]["chain"]
    assert "the ledger's head after record 4 of 8\n" in run(capsys, *verify, earlier)[1]
    assert data_of(capsys, *verify, earlier)["data"]["head_at_record"] == 4
    assert "64 hexadecimal digits" in refused(capsys, *verify, mine[:-2])
    assert "64 hexadecimal digits" in refused(capsys, *verify, "x" * 64)


def test_one_thing_at_a_time(capsys, folder):
    fill(folder / "ledger.db")
    assert "--verify and a ledger" in refused(
        capsys, "privacy", "ledger", "ledger.db", "--verify=x"
    )
    assert "--verify and --export" in refused(
        capsys, *["privacy", "ledger", "--verify", "x", "--export", "y"]
    )
    assert "cannot read x" in refused(capsys, "privacy", "ledger", "--verify", "x")


# --- ledger: found by the configuration, or told by the trainer --------------------------------


@pytest.mark.slow
def test_the_configuration_says_where_the_ledger_is(capsys, folder, monkeypatch):
    monkeypatch.setenv("P2PFED_HOME", str(folder / "state"))
    train = '[train]\ntask = "heart-disease"\ndata = "."\n'
    config = f'[node]\nname = "a"\ndata_dir = "data"\n{train}[privacy]\nepsilon = "8"\n'
    (folder / "p2pfed.toml").write_text(config)
    assert f"no ledger at {folder}/state/ledger.db" in refused(capsys, "privacy", "ledger")
    head = fill(folder / "state" / "ledger.db")
    assert data_of(capsys, "privacy", "ledger")["data"]["head"] == head
    (folder / "p2pfed.toml").write_text(config + 'ledger = "mine.db"\n')
    mine = fill(folder / "mine.db")
    assert data_of(capsys, "privacy", "ledger")["data"]["head"] == mine
    monkeypatch.chdir("/")
    assert (
        data_of(capsys, "privacy", "ledger", "-c", folder / "p2pfed.toml")["data"]["head"] == mine
    )


def test_where_nothing_says_where_it_is_the_file_is_asked_for(capsys, folder):
    assert "name it: p2pfed privacy ledger FILE" in refused(capsys, "privacy", "ledger")
    err = refused(capsys, "privacy", "ledger", "--socket", folder / "admin.sock")
    assert f"no trainer answers beside {folder}/admin.sock" in err


@contextlib.contextmanager
def trainer_showing(path, answer):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"/v1/ledger": answer}[self.path]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self):
            return "unix"

        def log_message(self, *_):
            pass

    with socketserver.UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def shown_by_a_trainer(path):
    """As the trainer's private socket shows a ledger."""
    with Ledger.open(path) as ledger:
        entries = [
            {"seq": e.seq, "kind": e.kind, "at": e.at, "chain": e.chain.hex(), **e.detail}
            for e in ledger.entries()
        ]
        return {"head": ledger.head.hex(), "entries": entries}


@pytest.mark.slow
def test_a_running_trainer_is_asked(capsys, folder):
    head = fill(folder / "ledger.db")
    from_file = data_of(capsys, "privacy", "ledger", "ledger.db")["data"]
    with trainer_showing(folder / "trainer.sock", shown_by_a_trainer(folder / "ledger.db")):
        asked = ("privacy", "ledger", "--socket", folder / "admin.sock")
        code, out, err = run(capsys, *asked)
        data = data_of(capsys, *asked)["data"]
        told = refused(capsys, *asked, "--export", "out.jsonl")
    assert (code, err) == (0, "")
    assert f"8 records, head {head}\n" in out
    assert "verified by the trainer when it opened the ledger; not again here\n" in out
    assert (data["source"], data["verified"], data["file"]) == ("trainer", "by the trainer", None)
    assert data["data_sets"] == from_file["data_sets"]
    assert "no export from a running trainer" in told
    assert not (folder / "out.jsonl").exists()


@pytest.mark.slow
def test_data_sets_that_may_share_patients_are_told_as_upper_bounds(capsys, folder):
    fill(folder / "ledger.db")
    with Ledger.open(folder / "ledger.db") as ledger:
        ledger.register("lungs", [b"somebody else"])
    with trainer_showing(folder / "trainer.sock", shown_by_a_trainer(folder / "ledger.db")):
        out = run(capsys, "--socket", folder / "admin.sock", "privacy", "ledger")[1]
    assert "at most ε 1.831 of 8 spent" in out
    assert "may share patients with D1, whose debits count here too" in out


def test_an_answer_without_sense_is_no_crash(capsys, folder):
    asked = ("privacy", "ledger", "--socket", folder / "admin.sock")
    with trainer_showing(folder / "trainer.sock", {"entries": [{"seq": 1}]}):
        assert "makes no sense" in refused(capsys, *asked, code=1)
    (folder / "trainer.sock").unlink()
    with trainer_showing(folder / "trainer.sock", {"problem": "starting"}):
        assert "no trainer answers" in refused(capsys, *asked)
