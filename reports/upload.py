"""One file to one address by HTTP PUT: streamed, the server's certificate checked, tried again where that can help."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from mainrun.errors import MainrunError, UsageError

TRIES = 4
BLOCK = 1 << 16
REDIRECTS = 3  # of one try, all on the same host
LONGEST_WAIT = 30.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class Answer:
    status: int
    reason: str
    location: str
    wait: float  # seconds it asks for


class Unreachable(Exception):
    """No answer; the next try may get one."""


def check_url(url: str) -> SplitResult:
    """What can be wrong with an address before anything is sent. No message repeats it whole: a query may be a key."""
    try:
        found = urlsplit(url)
        port = found.port
    except ValueError as e:
        raise UsageError(
            f"got an --upload address that cannot be read ({e}); write https://HOST/PATH"
        ) from None
    if (
        found.scheme not in ("http", "https")
        or not found.hostname
        or port == 0
        or not url.isprintable()
        or not url.isascii()
        or " " in url
    ):
        raise UsageError(
            f"got --upload {found.scheme or url[:20]}..., which is no address to PUT to; write https://HOST/PATH"
        )
    if found.username or found.password:
        raise UsageError(
            "got --upload with a name or password in the address, which logs and histories keep; use an address signed for this upload"
        )
    if found.scheme == "http" and found.hostname not in LOOPBACK:
        raise UsageError(
            f"got --upload http://{found.hostname}, which everybody on the way can read and change; write https://"
        )
    return found


def shown(url: SplitResult) -> str:
    """The address without its query, which may be a key."""
    return f"{url.scheme}://{url.netloc}{url.path or '/'}"


def upload(
    path: Path, url: str, note: Callable[[str], None], *, timeout: float = 60.0, pause: float = 1.0
) -> str:
    """PUT it; what the server said. Every failure says that the file is kept."""
    target = check_url(url)
    kept = f"{path} is kept"
    for i in range(TRIES):
        try:
            answer = _follow(path, target, timeout)
            if 200 <= answer.status < 300:
                return f"{answer.status} {answer.reason}".strip()
            why, wait = f"{shown(target)} answered {answer.status} {answer.reason}".strip(), answer.wait
            if answer.status not in (408, 425, 429) and answer.status < 500:
                raise MainrunError(f"{why}; {_fix(answer.status)}; {kept}")
        except ssl.SSLCertVerificationError as e:
            what = f"the certificate of {target.hostname} is not to be trusted ({e.verify_message})"
            raise MainrunError(
                f"{what}; check the address, or add its authority with SSL_CERT_FILE; {kept}"
            ) from None
        except Unreachable as e:
            why, wait = f"{shown(target)}: {e}", 0.0
        if i + 1 < TRIES:
            seconds = min(max(pause * 2**i, wait), LONGEST_WAIT)
            note(f"{why}; try {i + 2} of {TRIES} in {seconds:g} s")
            time.sleep(seconds)
    raise MainrunError(f"{why}, {TRIES} times; try again later; {kept}")


def _fix(status: int) -> str:
    if status in (401, 403):
        return "it does not let you; ask for a new address"
    if 300 <= status < 400:
        return "it cannot say where to; ask for the right address"
    return "ask who runs it what it takes"


def _follow(path: Path, target: SplitResult, timeout: float) -> Answer:
    """One try. A server may move an address on its own host, and no further."""
    at = target
    for _ in range(REDIRECTS + 1):
        answer = _put(path, at, timeout)
        if answer.status not in (301, 302, 307, 308) or not answer.location:
            return answer
        onward = urlsplit(urljoin(at.geturl(), answer.location))
        if (onward.scheme, onward.netloc) != (target.scheme, target.netloc):
            where = f"{onward.scheme}://{onward.netloc}"
            raise MainrunError(
                f"{shown(at)} sends the upload on to {where}, which is refused; if it is right, give it to --upload; {path} is kept"
            )
        at = onward
    raise MainrunError(
        f"{shown(target)} sent the upload in a circle; ask for the right address; {path} is kept"
    )


def _put(path: Path, url: SplitResult, timeout: float) -> Answer:
    host, port = url.hostname or "", url.port
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, port, timeout=timeout, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    place = (url.path or "/") + (f"?{url.query}" if url.query else "")
    try:
        connection.connect()
        connection.putrequest("PUT", place)
        connection.putheader("Content-Type", "application/zip")
        connection.putheader("Content-Length", str(path.stat().st_size))
        cut: OSError | None = None
        try:
            connection.endheaders()
            with path.open("rb") as f:
                while block := f.read(BLOCK):
                    connection.send(block)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError) as e:
            cut = e  # a server that has said no need not read on: its answer may be here already
        try:
            response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            if cut:
                raise cut from None
            raise
        wait = response.getheader("Retry-After", "")
        return Answer(
            response.status,
            response.reason,
            response.getheader("Location", ""),
            float(wait) if wait.isdecimal() else 0.0,
        )
    except ssl.SSLCertVerificationError:
        raise
    except TimeoutError:
        raise Unreachable(f"nothing was heard for {timeout:g} s") from None
    except socket.gaierror as e:
        raise Unreachable(f"no such host ({e.strerror})") from None
    except (
        http.client.RemoteDisconnected,
        ConnectionResetError,
        BrokenPipeError,
        http.client.IncompleteRead,
    ):
        raise Unreachable("the connection was cut before there was an answer") from None
    except (OSError, http.client.HTTPException) as e:
        raise Unreachable(str(e) or type(e).__name__) from None
    finally:
        connection.close()
