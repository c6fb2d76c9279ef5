"""The breast cancer task, which does what the files in a folder tell it to, in every round.

hang: never goes on; eat: takes all memory; raise: an exception; print: much text to stdout; exit:
ends the process; wait: stands still while the file is there, and makes `waiting`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from p2pfed.tasks.breast_cancer import BreastCancer

MOST = 1500  # megabytes, should nothing stop it


class WickedBreastCancer(BreastCancer):
    name = "wicked-breast-cancer"

    def data(self, folder, options):
        self._door = Path(str(options["door"]))
        self._measures = False
        return super().data(folder, options)

    def metrics(self, model, split):
        self._measures = True
        try:
            return super().metrics(model, split)
        finally:
            self._measures = False

    def loss(self, output, target):
        if not self._measures:
            for deed in ("hang", "eat", "raise", "print", "exit", "wait"):
                if (self._door / deed).exists():
                    getattr(self, f"_{deed}")()
        return super().loss(output, target)

    def _hang(self):
        time.sleep(3600)

    def _eat(self):
        taken = [bytearray(b"x" * 1_000_000) for _ in range(MOST)]
        raise RuntimeError(f"nothing stopped it at {len(taken)} MB")

    def _raise(self):
        raise ValueError("a task's own mistake")

    def _print(self):
        print("x" * 100_000)
        print("x" * 100_000, file=sys.stderr)

    def _exit(self):
        sys.exit(3)

    def _wait(self):
        while (self._door / "wait").exists():
            (self._door / "waiting").touch()
            time.sleep(0.01)
