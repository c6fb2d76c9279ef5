"""GET /v1/reachability: how others reach this node, as far as it has seen itself.

What it holds is made in `node.reachability`; `p2pfed doctor` judges it.
"""

from __future__ import annotations

from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

__all__ = ["Reached", "reachability_route"]


class Reached(Protocol):
    """What the node tells of the ways that lead to it."""

    def reachability(self) -> dict[str, Any]:
        """Addresses, who has come by them, and the relays that hold a place."""


def reachability_route(backend: Reached) -> Route:
    """The endpoint over `backend`."""

    async def endpoint(_: Request) -> Response:
        return JSONResponse(backend.reachability())

    return Route("/v1/reachability", endpoint, methods=["GET"])
