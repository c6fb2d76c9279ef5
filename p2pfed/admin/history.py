"""`GET /v1/history?since=ROUND&limit=N`: what became of every round, for dashboard and report.

The rounds from `since` on, oldest first, at most `limit` (default and most: 10 000); where there
are more, the oldest are left out. Public facts only; what is told of a round stands at
`p2pfed.node.history`. A backend that keeps no history has no such endpoint.
"""

from __future__ import annotations

import json
from typing import Any, Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pfed.admin.query import integer

__all__ = ["MOST_ROUNDS", "KeepsHistory", "history_routes"]

MOST_ROUNDS = 10_000
_DIGITS = 9  # of a round


@runtime_checkable
class KeepsHistory(Protocol):
    """A backend that knows what became of its rounds."""

    async def history(self, first: int, limit: int) -> dict[str, Any]:
        """The rounds from `first` on, at most `limit` of the newest."""


def history_routes(backend: object) -> list[Route]:
    """The endpoint, where the backend keeps a history.

    Args:
        backend: The node, or a fake in tests.
    """
    if not isinstance(backend, KeepsHistory):
        return []

    async def history(request: Request) -> Response:
        since = integer(request, "since", default=0, digits=_DIGITS)
        limit = integer(request, "limit", default=MOST_ROUNDS, digits=_DIGITS)
        told = await backend.history(since, min(limit, MOST_ROUNDS))
        text = json.dumps(told, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return Response(text + "\n", media_type="application/json")

    return [Route("/v1/history", history, methods=["GET"])]
