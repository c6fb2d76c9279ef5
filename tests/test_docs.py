"""What the documents say is true of the program: commands, links, keys, exit codes, names."""

from __future__ import annotations

import argparse
import ast
import configparser
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from p2pfed import errors
from p2pfed.cli.main import COMMANDS
from p2pfed.cli.options import Parser
from p2pfed.config import Settings
from p2pfed.identity.run import Run
from p2pfed.network import Limits
from p2pfed.wire.delta import Header

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bootstrap").glob("*.md")]
)
SCRIPTS = sorted(p for p in (ROOT / "scripts").iterdir() if p.is_file() and not p.suffix)


def _blocks(path: Path) -> list[str]:
    """The shell blocks of a document, and the commands of its transcripts."""
    text = path.read_text("utf-8")
    played = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [block.replace("\\\n", " ").splitlines() for block in played]
    typed = [f"{line[2:]}\n" for block in lines for line in block if line.startswith("$ ")]
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL) + typed


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Every call of p2pfed in the documents, with the document's name."""
    for path in DOCUMENTS:
        for line in "".join(_blocks(path)).splitlines():
            words = shlex.split(line, comments=True)
            words = words[3:] if words[:2] == ["sudo", "-u"] else words
            if words and Path(words[0]).name == "p2pfed":
                yield path.name, words[1:]


@pytest.mark.parametrize(("document", "words"), list(_commands()), ids=lambda v: " ".join(v)[:60])
def test_every_command_of_the_documents_is_one_that_the_program_takes(document, words):
    words = words[2:] if words[0] == "-c" else words
    command, *rest = words
    parser = Parser(prog=f"p2pfed {command}")
    module = importlib.import_module(f"p2pfed.cli.{COMMANDS[command][0]}")
    getattr(module, command)(parser)
    args = parser.parse_args(rest, namespace=argparse.Namespace(socket=None, config=None))
    assert callable(args.run)


def test_the_readme_shows_every_command_that_a_hospital_or_steward_needs():
    shown = {words[0] for document, words in _commands() if document == "README.md"}
    everyday = set(COMMANDS) - {"demo", "version", "wait", "help"}
    assert everyday <= shown


def _anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_file(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in _anchors(found), target


def test_operations_lists_exactly_the_keys_of_the_configuration():
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    section = text.partition("\n## Configuration\n")[2].partition("\n## ")[0]
    written = set(re.findall(r"^\| `(\w+\.\w+)` \|", section, re.MULTILINE))
    known = {
        f"{section}.{key}"
        for section, field in Settings.model_fields.items()
        for key in field.annotation.model_fields
    }
    assert written == known


def test_operations_lists_the_exit_code_of_every_error():
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    written = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    raised = {
        error.exit_code
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.P2PFedError)
    }
    assert written == raised | {0, 130}


def test_the_protocol_names_every_field_of_a_run_file_and_counts_those_of_a_header():
    text = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    fields = set(Run.__dataclass_fields__) - {"run_id"}
    assert {name for name in fields if f"`{name}`" not in text} == set()
    rows = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert len(rows) == len(Header.__dataclass_fields__) + 1  # and the version


def test_the_changelog_begins_with_what_is_unreleased_and_there_with_privacy():
    headings = re.findall(r"^(##+ .*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[:2] == ["## [Unreleased]", "### Privacy"]


def test_the_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_script_is_executable_and_says_what_it_does(script):
    first, second = script.read_text("utf-8").splitlines()[:2]
    assert first.startswith("#!")
    assert second.startswith(("# ", '"""'))
    assert script.stat().st_mode & 0o111


def test_the_list_of_benchmarks_names_each_of_them():
    told = subprocess.run(
        [ROOT / "scripts" / "bench"], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[0] for line in told.splitlines()]
    first = "admin board demo encode flamby fold gossip hearts heterogeneity hippocampus network"
    last = "privacy robust round simulate startup text training utility"
    assert names == [*first.split(), *last.split()]


def test_the_lock_pins_everything_with_a_hash_and_names_no_place():
    text = (ROOT / "requirements.lock").read_text("utf-8")
    pins = re.findall(
        r"^(\S+)==\S+ \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
    )
    names = [name for name, _ in pins]
    assert len(names) == text.count("==")
    assert {"setuptools", "libp2p", "numpy", "trio", "pytest"} <= set(names)
    assert not any(name.startswith(("torch", "nvidia", "triton", "cuda")) for name in names)
    assert "/" not in text.partition("\n")[2]  # no index, no host, no path


def test_no_document_or_script_names_a_place_on_somebodys_machine():
    paths = [*DOCUMENTS, *SCRIPTS, *(ROOT / "bootstrap").iterdir(), ROOT / "setup.cfg"]
    for path in paths:
        if path.is_file():
            found = re.search(
                r"(?<![\w.~-])/(work|root|tmp|opt/pypi|home)/", path.read_text("utf-8")
            )
            assert found is None, f"{path.name}: {found}"


def _imported(tree: ast.AST) -> Iterator[str]:
    """Top names that a module imports when it runs: not those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        yield from _imported(node)


def _normal(name: str) -> str:
    return re.split(r"[<>=!~ ;#]", name.strip())[0].lower().replace("_", "-")


def test_setup_lists_what_the_package_imports_and_nothing_in_vain():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    extras = setup["options.extras_require"]
    wanted = [setup["options"]["install_requires"], extras["imaging"]]  # torch imports onnx
    listed = {_normal(n) for n in "\n".join(wanted).splitlines() if n.strip()}
    modules = {
        name
        for path in (ROOT / "p2pfed").rglob("*.py")
        for name in _imported(ast.parse(path.read_text("utf-8")))
    } - set(sys.stdlib_module_names)
    found = packages_distributions()
    needed = {_normal(found[name][0]) for name in modules - {"p2pfed"}}
    assert listed == needed


def test_the_table_of_bounds_is_that_of_the_code():
    units = {"": 1, "s": 1, "KiB": 1024, "MiB": 1024**2}
    text = (ROOT / "docs" / "network.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) ?(\w*) \|", text, re.MULTILINE)
    written = {name: float(number) * units[unit] for name, number, unit in rows}
    assert written == dataclasses.asdict(Limits())
