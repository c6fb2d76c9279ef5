"""A blocking client of the admin socket: what every client command loads.

Invariant: it imports the standard library and `p2pfed.errors` only, and says in three lines what is
wrong with the socket: nothing there, nobody listening, not allowed, no answer.

It reads HTTP/1.1 (RFC 9112) by itself, one request per connection: `http.client` pulls in the email
package and ssl, which alone would double the start of `p2pfed status` (measured: 34 ms against
18 ms, where `python -c pass` takes 9 ms). What it understands is what our server sends: a status
line, headers, and a body by Content-Length, by chunks, or up to the end of the connection.
"""

from __future__ import annotations

import json
import os
import socket

from p2pfed import __version__
from p2pfed.errors import (
    AdminError,
    ConfigError,
    DaemonNotRunning,
    NotFound,
    NotPermitted,
    P2PFedError,
    PolicyError,
    TimedOut,
    VersionMismatch,
)

TYPE_CHECKING = False  # importing `typing` for this would cost every command its time
if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader
    from pathlib import Path
    from typing import Any

__all__ = ["Client"]

MAX_LINE = 1 << 20  # one event is one chunk, far below this
MAX_ANSWER = 1 << 26
_QUEUE_STEP = 0.05  # seconds between attempts while the daemon's queue is full
_BY_EXIT_CODE: dict[int, type[P2PFedError]] = {
    2: ConfigError,
    3: DaemonNotRunning,
    4: NotPermitted,
    5: NotFound,
    6: TimedOut,
    7: PolicyError,
    8: VersionMismatch,
}


class Client:
    """One daemon's admin (or private) socket; every call makes its own connection.

    Args:
        socket: Path of the Unix socket.
        timeout: Seconds to wait for each part of an answer.
    """

    def __init__(self, socket: str | os.PathLike[str], timeout: float = 10.0) -> None:
        self.path = os.fspath(socket)
        self.timeout = timeout

    def get(self, path: str) -> Any:
        """The decoded answer of `GET path`.

        Raises:
            DaemonNotRunning, NotPermitted, TimedOut: About the socket.
            P2PFedError: The class that belongs to the daemon's refusal.
        """
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The decoded answer of `POST path` with a JSON body; raises like `get`."""
        return self._call("POST", path, body or {})

    def download(self, path: str, to: Path) -> None:
        """Put what `GET path` gives into a file (0600), whole or not at all.

        Args:
            path: Of an endpoint that gives a file.
            to: Replaced only when everything has arrived.

        Raises:
            ConfigError: The file cannot be written.
            DaemonNotRunning: The daemon stopped in the middle; and all that `get` raises.
        """
        connection, reader, status, headers = self._ask("GET", path, None)
        try:
            if status >= 400:
                raise _refusal(status, headers, b"".join(_chunks(reader, headers)))
            _write_whole(to, _pieces(reader, headers))
        except TimeoutError as error:
            raise self._silent() from error
        except (OSError, EOFError, ValueError) as error:
            raise self._cut(error) from error
        finally:
            _close(reader, connection)

    def stream(self, path: str) -> Iterator[dict[str, Any]]:
        """The JSON objects of a stream, one by one, for as long as the daemon sends them.

        Raises:
            DaemonNotRunning: The daemon stopped in the middle; and all that `get` raises.
        """
        connection, reader, status, headers = self._ask("GET", path, None)
        try:
            chunks = _chunks(reader, headers)
            if status >= 400:
                raise _refusal(status, headers, b"".join(chunks))
            connection.settimeout(None)  # nothing may happen for hours
            rest = b""
            for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield _decode(line)
        except (OSError, EOFError, ValueError) as error:
            raise DaemonNotRunning(
                f"the daemon at {self.path} closed the stream",
                str(error),
                "see whether it runs: p2pfed status",
            ) from error
        finally:
            reader.close()
            connection.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        connection, reader, status, headers = self._ask(method, path, body)
        try:
            answer = b"".join(_chunks(reader, headers))
        except TimeoutError as error:
            raise self._silent() from error
        except (OSError, EOFError, ValueError) as error:
            raise self._cut(error) from error
        finally:
            reader.close()
            connection.close()
        if status >= 400:
            raise _refusal(status, headers, answer)
        return _decode(answer)

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[socket.socket, BufferedReader, int, dict[str, str]]:
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: p2pfed\r\nConnection: close\r\n"
            f"P2pfed-Version: {__version__}\r\nAccept: application/json\r\n"
        )
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        connection = self._connect()
        reader = connection.makefile("rb")
        try:
            try:  # noqa: SIM105 - contextlib costs every command its time
                connection.sendall(head.encode("ascii") + b"\r\n" + data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it answered without reading, and said why
            status, headers = _head(reader)
        except TimeoutError as error:
            _close(reader, connection)
            raise self._silent() from error
        except (OSError, EOFError) as error:
            _close(reader, connection)
            raise self._cut(error) from error
        except BaseException:
            _close(reader, connection)
            raise
        return connection, reader, status, headers

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self.timeout)
        left = self.timeout
        while True:
            try:
                connection.connect(self.path)
            except BlockingIOError as error:  # its queue is full, for a moment
                if left <= 0:
                    connection.close()
                    raise TimedOut(
                        f"the daemon at {self.path} is busy",
                        f"its queue was full for {self.timeout:g} s",
                        "try again in a moment",
                    ) from error
                import time  # noqa: PLC0415 - hardly ever

                time.sleep(_QUEUE_STEP)
                left -= _QUEUE_STEP
            except OSError as error:
                connection.close()
                if isinstance(error, TimeoutError):
                    raise self._silent() from error
                raise _unreachable(self.path, error) from error
            else:
                return connection

    def _silent(self) -> TimedOut:
        return TimedOut(
            f"the daemon at {self.path} did not answer within {self.timeout:g} s",
            "it is busy or stuck",
            "try again; if it stays so, look at its log and restart it",
        )

    def _cut(self, error: Exception) -> DaemonNotRunning:
        return DaemonNotRunning(
            f"the daemon at {self.path} closed the connection before it had answered",
            str(error),
            "see whether it still runs, and look at its log",
        )


def _close(reader: BufferedReader, connection: socket.socket) -> None:
    reader.close()
    connection.close()


# --- HTTP/1.1 ----------------------------------------------------------------------------------


def _line(reader: BufferedReader) -> bytes:
    line = reader.readline(MAX_LINE)
    if not line.endswith(b"\n"):
        raise EOFError("the answer broke off")
    return line.rstrip(b"\r\n")


def _head(reader: BufferedReader) -> tuple[int, dict[str, str]]:
    first = _line(reader).split(b" ", 2)
    if len(first) < 2 or not first[0].startswith(b"HTTP/1.") or not first[1].isdigit():
        raise VersionMismatch(
            "what listens on the socket does not speak HTTP",
            "it is not a p2pfed daemon of this kind",
            "check the path: --socket, P2PFED_SOCKET, or admin.socket in the configuration",
        )
    headers = {}
    while line := _line(reader):
        name, _, value = line.decode("latin1").partition(":")
        headers[name.lower()] = value.strip()
    return int(first[1]), headers


def _chunks(reader: BufferedReader, headers: dict[str, str]) -> Iterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int(_line(reader).partition(b";")[0], 16):
            yield _exactly(reader, size)
            _line(reader)
        _line(reader)
    elif "content-length" in headers:
        yield _exactly(reader, int(headers["content-length"]))
    else:
        yield reader.read(MAX_ANSWER)


def _exactly(reader: BufferedReader, size: int) -> bytes:
    data = reader.read(size) if 0 <= size <= MAX_ANSWER else b""
    if len(data) != size:
        raise EOFError("the answer broke off")
    return data


def _pieces(reader: BufferedReader, headers: dict[str, str]) -> Iterator[bytes]:
    """A body of any length, of which the end can be told from a break."""
    if "transfer-encoding" in headers:
        yield from _chunks(reader, headers)
        return
    if "content-length" not in headers:
        raise EOFError("the answer does not tell its length")
    left = int(headers["content-length"])
    while left > 0:
        piece = reader.read(min(left, MAX_LINE))
        if not piece:
            raise EOFError(f"{left} bytes are missing")
        left -= len(piece)
        yield piece


def _write_whole(to: Path, pieces: Iterator[bytes]) -> None:
    """Write beside the place, then rename; errors of `pieces` pass, and leave nothing behind."""
    aside = f"{os.fspath(to)}.{os.getpid()}.part"
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unwritten(to, error) from error
    try:
        for piece in pieces:
            _write(descriptor, piece, to)
        try:
            os.fsync(descriptor)
            os.replace(aside, to)  # noqa: PTH105 - pathlib costs every command its time
        except OSError as error:
            raise _unwritten(to, error) from error
    except BaseException:
        try:  # noqa: SIM105 - contextlib costs likewise
            os.unlink(aside)  # noqa: PTH108
        except OSError:
            pass
        raise
    finally:
        os.close(descriptor)


def _write(descriptor: int, piece: bytes, to: Path) -> None:
    left = memoryview(piece)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError as error:
        raise _unwritten(to, error) from error


def _unwritten(to: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write {to}", error.strerror or str(error), "make room there, or name another place"
    )


def _decode(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise VersionMismatch("the daemon's answer is not JSON", str(error)) from error


# --- refusals ----------------------------------------------------------------------------------


def _refusal(status: int, headers: dict[str, str], answer: bytes) -> P2PFedError:
    try:
        told = json.loads(answer)
        what, why, do = (str(told[key]) for key in ("title", "detail", "hint"))
        code = int(told["exit_code"])
    except (ValueError, KeyError, TypeError):
        what, why, do, code = f"the daemon answered with HTTP status {status}", "", "", 1
    daemon = headers.get("p2pfed-version", __version__)
    if status in {404, 405} and what.startswith("no endpoint") and daemon != __version__:
        return VersionMismatch(
            what,
            f"this is p2pfed {__version__}, the daemon is {daemon}",
            "restart the daemon after an update, so that both are of one version",
        )
    return _BY_EXIT_CODE.get(code, AdminError)(what, why, do)


def _unreachable(path: str, error: OSError) -> P2PFedError:
    cannot = f"cannot reach the daemon at {path}"
    if isinstance(error, FileNotFoundError):
        return DaemonNotRunning(
            f"{cannot}: no such socket",
            "the daemon is not running, or it uses another socket",
            "start it: p2pfed node -c FILE   (or name its socket: --socket PATH)",
        )
    if isinstance(error, ConnectionRefusedError):
        return DaemonNotRunning(
            f"{cannot}: nobody is listening",
            "the socket was left behind by a daemon that ended",
            "start it again: p2pfed node -c FILE   (it replaces the stale socket)",
        )
    if isinstance(error, PermissionError):
        return NotPermitted(f"{cannot}: permission denied", *_who_may(path))
    return AdminError(cannot, error.strerror or str(error), "check the path: --socket PATH")


def _who_may(path: str) -> tuple[str, str]:
    import grp  # noqa: PLC0415 - only here, when something is wrong already
    import pwd  # noqa: PLC0415
    import stat  # noqa: PLC0415

    def name(of: int, *, group: bool) -> str:
        try:
            return grp.getgrgid(of).gr_name if group else pwd.getpwuid(of).pw_name
        except KeyError:
            return str(of)

    me = name(os.geteuid(), group=False)
    groups = ", ".join(sorted({name(g, group=True) for g in {os.getegid(), *os.getgroups()}}))
    you = f"you are {me} (groups: {groups})"
    try:
        found = os.stat(path)  # noqa: PTH116 - pathlib costs every command its time
    except OSError:
        return f"{you}; its folder is closed to you", "ask the daemon's operator"
    owner, group = name(found.st_uid, group=False), name(found.st_gid, group=True)
    if stat.S_IMODE(found.st_mode) & 0o060 == 0o060:
        return (
            f"{you}; the socket belongs to group {group}",
            f"run: sudo usermod -aG {group} {me}   (then log in again)",
        )
    return (
        f"{you}; the socket belongs to {owner} alone",
        f'run: sudo -u {owner} p2pfed ...   (or set admin.mode = "0660" for its group)',
    )
