"""`--option KEY=VALUE`: what a task wants to know, as `train.options` in a configuration says it.

Map: `option_flag` (the flag) -> `options_of` (a dict of what was given).

Not here: which options a task has (its own docstring).
"""

from __future__ import annotations

from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

__all__ = ["option_flag", "options_of"]


def option_flag(parser: ArgumentParser, text: str) -> None:
    """Give a command the flag, which may be repeated."""
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=text)


def options_of(args: Namespace) -> dict[str, str | int | float]:
    """What was given; of one key the last. What reads as a number is one.

    Raises:
        ConfigError: One is not KEY=VALUE.
    """
    return dict(map(_pair, args.option))


def _pair(text: str) -> tuple[str, str | int | float]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--option {text!r}", "expected is KEY=VALUE", "e.g. --option site=0")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            pass
    return key, value
