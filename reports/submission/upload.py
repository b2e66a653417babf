"""Upload a file by HTTP PUT.

The certificate of the server is checked. An upload is retried if its failure may be temporary.
"""

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
BLOCK_BYTES = 1 << 16
MAX_REDIRECTS = 3  # the maximum number of redirects that one upload attempt follows
MAX_PAUSE = 30.0  # the maximum number of seconds between two upload attempts
LOOPBACK = ("localhost", "127.0.0.1", "::1")

REDIRECT_CODES = (301, 302, 307, 308)
RETRIED_CODES = (408, 425, 429)  # uploads are also retried after all status codes of 500 or more


@dataclass
class Response:
    status: int
    reason: str
    location: str
    retry_after: float  # the number of seconds that the server asks the client to wait

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def can_retry(self) -> bool:
        return self.status in RETRIED_CODES or self.status >= 500

    def __str__(self) -> str:
        return f"{self.status} {self.reason}".strip()


class Unreachable(Exception):
    """Raised if the server does not answer. Another attempt may succeed."""


def check_url(url: str) -> SplitResult:
    """Parse a URL, and raise UsageError if uploads to the URL are not allowed.

    The error message omits the query of the URL, because the query may contain a key.
    """
    try:
        parsed = urlsplit(url)
        port = parsed.port
    except ValueError as e:
        raise UsageError(
            f"got an --upload address that cannot be read ({e}); write https://HOST/PATH"
        ) from None
    has_host = parsed.scheme in ("http", "https") and parsed.hostname and port != 0
    if not has_host or not url.isprintable() or not url.isascii() or " " in url:
        shown = parsed.scheme or url[:20]
        raise UsageError(f"--upload {shown}... is not an HTTP address; write https://HOST/PATH")
    if parsed.username or parsed.password:
        raise UsageError(
            "got --upload with a name or password in the address, which logs and shell histories keep; "
            "use an address that is signed for this upload"
        )
    if parsed.scheme == "http" and parsed.hostname not in LOOPBACK:
        raise UsageError(
            f"others on the network can read and change an upload to http://{parsed.hostname}; use https://"
        )
    return parsed


def without_query(url: SplitResult) -> str:
    """Return the URL without its query, because the query may contain a key."""
    return f"{url.scheme}://{url.netloc}{url.path or '/'}"


def upload(
    path: Path, url: str, note: Callable[[str], None], *, timeout: float = 60.0, pause: float = 1.0
) -> str:
    """Upload a file, and return the server's status line.

    Every error message says that the local file is kept.
    """
    target = check_url(url)
    kept = f"{path} is kept"
    problem = ""
    for attempt in range(1, TRIES + 1):
        retry_after = 0.0
        try:
            response = _put_following_redirects(path, target, timeout)
        except ssl.SSLCertVerificationError as e:
            raise MainrunError(
                f"the certificate of {target.hostname} is not trusted ({e.verify_message}); "
                f"check the address, or add the certificate authority with SSL_CERT_FILE; {kept}"
            ) from None
        except Unreachable as e:
            problem = f"{without_query(target)}: {e}"
        else:
            if response.ok:
                return str(response)
            problem = f"{without_query(target)} answered {response}"
            retry_after = response.retry_after
            if not response.can_retry:
                raise MainrunError(f"{problem}; {_fix(response.status)}; {kept}")
        if attempt < TRIES:
            seconds = min(max(pause * 2 ** (attempt - 1), retry_after), MAX_PAUSE)
            note(f"{problem}; try {attempt + 1} of {TRIES} in {seconds:g} s")
            time.sleep(seconds)
    raise MainrunError(f"{problem}, in {TRIES} tries; try again later; {kept}")


def _fix(status: int) -> str:
    if status in (401, 403):
        return "the address does not allow this upload; ask for a new address"
    if 300 <= status < 400:
        return "the redirect has no target; ask for the right address"
    return "ask the owner of the server which uploads are allowed"


def _put_following_redirects(path: Path, target: SplitResult, timeout: float) -> Response:
    """Make one attempt to upload the file. Follow redirects only within the same host."""
    url = target
    for _ in range(MAX_REDIRECTS + 1):
        response = _put(path, url, timeout)
        if response.status not in REDIRECT_CODES or not response.location:
            return response
        redirect = urlsplit(urljoin(url.geturl(), response.location))
        if (redirect.scheme, redirect.netloc) != (target.scheme, target.netloc):
            raise MainrunError(
                f"{without_query(url)} redirects the upload to {redirect.scheme}://{redirect.netloc}, "
                f"which is refused; if this address is right, give it to --upload; {path} is kept"
            )
        url = redirect
    raise MainrunError(
        f"{without_query(target)} redirects the upload in a circle; ask for the right address; {path} is kept"
    )


def _put(path: Path, url: SplitResult, timeout: float) -> Response:
    connection = _connection(url, timeout)
    try:
        return _exchange(connection, path, url)
    except ssl.SSLCertVerificationError:
        raise
    except TimeoutError:
        raise Unreachable(f"no answer for {timeout:g} s") from None
    except socket.gaierror as e:
        raise Unreachable(f"no such host ({e.strerror})") from None
    except (
        http.client.RemoteDisconnected,
        ConnectionResetError,
        BrokenPipeError,
        http.client.IncompleteRead,
    ):
        raise Unreachable("the connection was closed before the server answered") from None
    except (OSError, http.client.HTTPException) as e:
        raise Unreachable(str(e) or type(e).__name__) from None
    finally:
        connection.close()


def _connection(url: SplitResult, timeout: float) -> http.client.HTTPConnection:
    host = url.hostname or ""
    if url.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, url.port, timeout=timeout, context=context)
    return http.client.HTTPConnection(host, url.port, timeout=timeout)


def _exchange(connection: http.client.HTTPConnection, path: Path, url: SplitResult) -> Response:
    """Send the file as the body of a PUT request, and read the response."""
    place = url.path or "/"
    if url.query:
        place += f"?{url.query}"
    connection.connect()
    connection.putrequest("PUT", place)
    connection.putheader("Content-Type", "application/zip")
    connection.putheader("Content-Length", str(path.stat().st_size))
    send_error = _send_body(connection, path)
    try:
        response = connection.getresponse()
    except (OSError, http.client.HTTPException):
        if send_error:
            raise send_error from None
        raise
    retry_after = response.getheader("Retry-After", "")
    return Response(
        status=response.status,
        reason=response.reason,
        location=response.getheader("Location", ""),
        retry_after=float(retry_after) if retry_after.isdecimal() else 0.0,
    )


def _send_body(connection: http.client.HTTPConnection, path: Path) -> OSError | None:
    """Send the content of the file.

    If the server closes the connection early, return the error instead of raising an exception, because the
    server may already have sent a response.
    """
    try:
        connection.endheaders()
        with path.open("rb") as f:
            while block := f.read(BLOCK_BYTES):
                connection.send(block)
    except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError) as e:
        return e
    return None
