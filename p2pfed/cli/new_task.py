"""task new: a small project with a task, which runs and is checked as it stands.

Map: `new_options` -> `new`: the files of one template (package data in tasks/templates), with the
project's name put in, in a folder that is new or empty.

Invariant: nothing is overwritten. What the files say is plain text of this package: no code is run
and nothing is fetched.

Not here: whether the task is sound (`check_task`).
"""

from __future__ import annotations

import keyword
import sys
from importlib.resources import files
from pathlib import Path

from p2pfed.cli.options import with_json
from p2pfed.cli.text import emit
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

__all__ = ["new", "new_options"]

# Template -> where its files go, under their names without ".tmpl"; MODULE is the project's name.
_TEMPLATES = {
    "tabular": {
        "pyproject.toml": "",
        "README.md": "",
        "__init__.py": "MODULE",
        "task.py": "MODULE",
        "patients.csv": "sample",
        "test_task.py": "tests",
    },
    "imaging": {
        "pyproject.toml": "",
        "README.md": "",
        "__init__.py": "MODULE",
        "task.py": "MODULE",
        "test_task.py": "tests",
    },
    "loop": {
        "pyproject.toml": "",
        "README.md": "",
        "__init__.py": "MODULE",
        "model.py": "MODULE",
        "train.py": "",
        "test_task.py": "tests",
    },
}


def new_options(parser: ArgumentParser) -> None:
    """Give `task new` its flags."""
    parser.add_argument("dir", metavar="DIR", help="new or empty; its last part names the module")
    parser.add_argument(
        "--template",
        choices=tuple(_TEMPLATES),
        default="tabular",
        help="a table, 3D images, or a training loop of your own (default tabular)",
    )
    with_json(parser)


def new(args: Namespace) -> None:
    """Write the project."""
    from string import Template

    folder = Path(args.dir)
    name = folder.absolute().name
    _check_name(name)
    _check_empty(folder)
    words = {"name": name, "Class": "".join(part.title() for part in name.split("_"))}
    written = []
    for file, place in _TEMPLATES[args.template].items():
        path = folder / place.replace("MODULE", name) / file
        text = Template(_text(args.template, file)).substitute(words)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as out:
                out.write(text)
        except OSError as error:
            raise ConfigError(f"cannot write {path}", error.strerror or str(error)) from error
        written.append(str(path))
    lines = [*written, f"next: {folder / 'README.md'}, or: p2pfed task check {folder}"]
    emit(args, "task-new", {"template": args.template, "files": written}, lines)


def _text(template: str, file: str) -> str:
    """A template's file; the one of all templates where it has none of its own."""
    folder = files("p2pfed") / "tasks" / "templates"
    own = folder / template / f"{file}.tmpl"
    return (own if own.is_file() else folder / f"{file}.tmpl").read_text("utf-8")


def _check_name(name: str) -> None:
    do = "choose a name such as lung_nodules"
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} cannot name a Python module", "DIR's last part does", do)
    if name in {*sys.stdlib_module_names, "p2pfed", "torch", "monai", "numpy", "tests"}:
        raise ConfigError(f"{name} is a module already", "yours would hide it, or not be found", do)


def _check_empty(folder: Path) -> None:
    try:
        there = next(folder.iterdir(), None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}", error.strerror or str(error)) from error
    if there is not None:
        raise ConfigError(
            f"{folder} is not empty", "nothing is overwritten", "choose another folder"
        )
