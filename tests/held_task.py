"""The breast cancer task with a door that a test can close: between a debit and its release.

With mechanism `svt` the gate reads all contributions twice: before the debit, and again to clip
what was selected. While the file `hold` exists, the second reading stands still, and the file
`held` says so. So a test can kill the trainer exactly there.
"""

from __future__ import annotations

import time
from pathlib import Path

from p2pfed.tasks.breast_cancer import BreastCancer


class HeldBreastCancer(BreastCancer):
    name = "held-breast-cancer"

    def data(self, folder, options):
        self._door = Path(str(options["door"]))
        self._readings = 0
        self._measuring = False
        return super().data(folder, options)

    def metrics(self, model, split):
        self._measuring = True
        try:
            return super().metrics(model, split)
        finally:
            self._measuring = False

    def loss(self, output, target):
        if not self._measuring:
            self._readings += 1
            if self._readings % 2 == 0:
                self._wait()
        return super().loss(output, target)

    def _wait(self) -> None:
        while (self._door / "hold").exists():
            (self._door / "held").touch()
            time.sleep(0.01)
