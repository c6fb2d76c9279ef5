"""Requests that no good client sends, by name."""

from __future__ import annotations

__all__ = ["RUDE", "get", "post"]


def get(target: str, *headers: str, host: str = "p2pfed") -> bytes:
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def post(target: str, body: bytes) -> bytes:
    return (
        f"POST {target} HTTP/1.1\r\nHost: p2pfed\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


RUDE = {
    "garbage": b"\x00\xff\x16\x03\x01" * 50,
    "half a request line": b"GET /v1/sta",
    "half a header": b"GET /v1/status HTTP/1.1\r\nHost: p2p",
    "half a body": post("/v1/share", b'{"on": true}')[:-5],
    "no host": b"GET /v1/status HTTP/1.1\r\n\r\n",
    "a huge header": get("/v1/status", "X: " + "y" * 60_000),
    "a huge target": get("/v1/" + "y" * 60_000),
    "a bad length": b"POST /v1/share HTTP/1.1\r\nHost: p2pfed\r\nContent-Length: -4\r\n\r\n",
    "a bad chunk": b"POST /v1/share HTTP/1.1\r\nHost: p2pfed\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
    "h2c": get(
        "/v1/status",
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABk",
    ),
    "a body nobody reads": get("/v1/status", "Content-Length: 900000") + b"x" * 200_000,
    "a control character": get("/v1/\x01status"),
    "non-ascii": b"GET /v1/\xc3\xa4 HTTP/1.1\r\nHost: p2pfed\r\n\r\n",
}
