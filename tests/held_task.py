"""The breast cancer task with a door that a test can close: between a debit and its release.

While the file `hold` exists, a trainer whose task has this door stands still after the debit is
durable and before the output is, and the file `held` says so: a test can kill it exactly there.
"""

from __future__ import annotations

import time
from pathlib import Path

from p2pfed.privacy.ledger import Ledger
from p2pfed.tasks.breast_cancer import BreastCancer


class HeldBreastCancer(BreastCancer):
    name = "held-breast-cancer"

    def data(self, folder, options):
        _hold_outputs(Path(str(options["door"])))
        return super().data(folder, options)


def _hold_outputs(door: Path) -> None:
    store_output = Ledger.store_output

    def held(self, debit, payload):
        while (door / "hold").exists():
            (door / "held").touch()
            time.sleep(0.01)
        return store_output(self, debit, payload)

    Ledger.store_output = held
