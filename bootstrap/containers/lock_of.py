# ruff: noqa: INP001, T201 - a script of the images' build
"""Prints the part of requirements.lock that a list of packages names: python lock_of.py LOCK LIST.

So the node's image has the versions and hashes of the lock, and nothing of torch, without a lock of
its own. A name that the lock does not have is an error.
"""

import re
import sys
from pathlib import Path


def main(lock: str, names: str) -> int:
    """Print the pins; returns the exit code."""
    blocks = re.findall(
        r"^[a-zA-Z].*==.*\n(?: .*\n?)*", Path(lock).read_text("utf-8"), re.MULTILINE
    )
    pins = {block.partition("==")[0].lower(): block for block in blocks}
    wanted = [line.strip() for line in Path(names).read_text("utf-8").splitlines()]
    wanted = [name for name in wanted if name and not name.startswith("#")]
    missing = sorted(set(wanted) - set(pins))
    if missing:
        print(f"not in {lock}: {', '.join(missing)}", file=sys.stderr)
        return 1
    print("".join(pins[name] for name in wanted), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
