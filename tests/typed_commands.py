"""Commands of p2pfed as a person types them, run in the test's own process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from p2pfed.cli.main import main


class Commands:
    """Runs commands; what they print is taken out of pytest's hands.

    Args:
        capsys: Pytest's.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        code = main([str(argument) for argument in arguments])
        told = self._capsys.readouterr()
        return code, told.out, told.err

    def ok(self, *arguments: object) -> str:
        """The output of a command that succeeds."""
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return out

    def data(self, *arguments: object) -> Any:
        """The data of its JSON."""
        return json.loads(self.ok(*arguments, "--json"))["data"]
