"""How the admin socket answers: JSON, and errors as problem documents.

Invariant: every answer to a request that failed is a problem document (RFC 9457) made of a
P2PFedError's what, why and do, with the exit code of the command line. Not here: answers that are
sent piece by piece (`streams`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.responses import JSONResponse, Response

from p2pfed.errors import P2PFedError

__all__ = ["Json", "json_line", "kind_of", "problem", "problem_bytes"]

_STATUS = {2: 400, 3: 503, 4: 403, 5: 404, 6: 504, 7: 409, 8: 400}  # exit code -> HTTP status


# --- answers -----------------------------------------------------------------------------------


class Json(JSONResponse):
    """A value as JSON, one line."""

    def render(self, content: Any) -> bytes:
        """Write it; a number that JSON has not is a bug."""
        return json_line(content)


def json_line(value: Any) -> bytes:
    """A value as one line of JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def problem(error: P2PFedError, status: int | None = None) -> Response:
    """The answer that tells of an error; the HTTP status follows its exit code."""
    status = status or _STATUS.get(error.exit_code, 500)
    return Response(problem_bytes(error, status), status, media_type="application/problem+json")


def problem_bytes(error: P2PFedError, status: int) -> bytes:
    """The problem document (RFC 9457) of an error."""
    return json_line(
        {
            "type": f"urn:p2pfed:{kind_of(error)}",
            "title": error.what,
            "status": status,
            "detail": error.why,
            "hint": error.do,
            "exit_code": error.exit_code,
        }
    )


def kind_of(error: BaseException) -> str:
    """The error's class in small letters: `not-found`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(error).__name__).lower()
