"""What the query of a request says, checked.

Not here: which endpoint takes which words (`app`, `history`), a request's body (`app`).
"""

from __future__ import annotations

import datetime as dt
import re

from starlette.requests import Request

from p2pfed.errors import ConfigError

__all__ = ["integer", "moment", "pattern"]


def integer(request: Request, key: str, *, default: int, digits: int = 15) -> int:
    """The whole number under a key.

    Args:
        request: The request.
        key: Its name.
        default: Where there is none.
        digits: How many it has at most.

    Raises:
        ConfigError: It is none.
    """
    text = request.query_params.get(key)
    if text is None:
        return default
    if not re.fullmatch(rf"[0-9]{{1,{digits}}}", text):
        raise ConfigError(
            f"{key}={text[:40]!r} is not a number",
            f"it is made of at most {digits} digits, without a sign",
            f"e.g. {key}=10",
        )
    return int(text)


def pattern(request: Request, key: str) -> str:
    """The pattern of types of events under a key; empty where there is none.

    Raises:
        ConfigError: It is no pattern.
    """
    text = request.query_params.get(key, "")
    if not re.fullmatch(r"[a-z*?\[\]!_.-]{0,80}", text):
        raise ConfigError(
            f"{key}={text[:40]!r} is no pattern of types of events",
            "it is made of small letters, dots, * and ?",
            f"e.g. {key}=peer.*",
        )
    return text


def moment(request: Request, key: str) -> dt.datetime | None:
    """The time under a key, in UTC; None where there is none.

    Raises:
        ConfigError: It is no time.
    """
    text = request.query_params.get(key)
    if not text:
        return None
    try:
        told = dt.datetime.fromisoformat(text)
        return told.replace(tzinfo=told.tzinfo or dt.UTC).astimezone(dt.UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{key}={text[:40]!r} is not a time",
            "a time is written as ISO 8601, in UTC where it says nothing else",
            f"e.g. {key}=2026-01-01T00:00:00Z",
        ) from error
