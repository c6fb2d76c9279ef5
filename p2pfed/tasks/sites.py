"""Which hospital a node plays, and which patients only test: what several tasks ask in one way.

Map: `whole`, `whole_or_none` and `site_number` read numbers out of `train.options`; `is_test` says
of a patient, by the name alone, whether it trains.

Not here: how a folder is cut into hospitals (`cases`, each made task).
"""

from __future__ import annotations

import hashlib

from p2pfed.errors import ConfigError
from p2pfed.training.task import Options

__all__ = ["is_test", "site_number", "whole", "whole_or_none"]


def whole(options: Options, key: str, *, low: int, high: int) -> int:
    """A whole number among the options, also where it is written as text.

    Raises:
        ConfigError: It is missing, or something else.
    """
    value = options.get(key)
    try:
        number = int(str(value))
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise ConfigError(
            f"train.options.{key} is {value!r}", f"expected a whole number from {low} to {high}"
        )
    return number


def whole_or_none(options: Options, key: str, *, low: int, high: int) -> int | None:
    """The same; None where it is not set."""
    return None if options.get(key) is None else whole(options, key, low=low, high=high)


def site_number(options: Options, sites: int) -> int:
    """`site`, 0 to sites - 1, of a task whose hospitals are all made; 0 where it is not set.

    Raises:
        ConfigError: There is no such site.
    """
    value = options.get("site", 0)
    if not isinstance(value, int) or not 0 <= value < sites:
        raise ConfigError(
            f"train.options.site is {value!r}", f"expected a whole number 0 to {sites - 1}"
        )
    return value


def is_test(patient: bytes) -> bool:
    """Whether a patient only tests: about one in four, by a hash of the name alone."""
    digest = hashlib.blake2b(patient, digest_size=8, person=b"p2pfed-test").digest()
    return int.from_bytes(digest, "big") % 4 == 0
