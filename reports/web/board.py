"""Serve the page of a folder on this machine. The page refreshes itself while runs and studies are running.

The board only reads, and answers only GET and HEAD. On this machine it needs no token, because only this
machine can reach it. A page of another site that a browser on this machine shows could still ask for it under
another name, so a request whose Host header does not name the board is refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mainrun.errors import UsageError
from mainrun.files import inputs
from reports.web import html, page
from reports.web.live import Watch

COOKIE = "mainrun_board"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PAUSE = 0.5  # the minimum number of seconds between two looks at the folder
TIMEOUT = 20  # the seconds after which a silent connection is closed


class Board:
    """The page of a folder, made again if anything in the folder changed."""

    def __init__(self, folder: Path) -> None:
        self.watch = Watch(folder)
        self._lock = threading.Lock()
        self._looked = -PAUSE
        self._version = ""
        self._text = b""

    def version(self) -> str:
        """Return the version of the page, which changes with the folder."""
        with self._lock:
            self._update()
            return self._version

    def text(self) -> bytes:
        with self._lock:
            self._update()
            return self._text

    def _update(self) -> None:
        now = time.monotonic()
        if now - self._looked < PAUSE:
            return
        version = self.watch.look()
        if version != self._version:
            shown = f"Follows {self.watch.folder}. Last change seen at {time.strftime('%H:%M:%S')}."
            self._text = page.render(self.watch.view(), version, shown).encode()
            self._version = version
        self._looked = time.monotonic()


class Server(ThreadingHTTPServer):
    """A server of one board. Without a host, it is reached only from this machine."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int, host: str = "") -> None:
        self.board = Board(folder)
        self.host = host
        self.token = secrets.token_urlsafe(24) if host else ""
        address = host or "127.0.0.1"
        if ":" in address:
            self.address_family = socket.AF_INET6
        super().__init__((address, port), Handler)

    @property
    def url(self) -> str:
        """The address to open. With a token, it contains the token."""
        host = self.host or "127.0.0.1"
        if is_wildcard(host):
            host = socket.gethostname()
        name = f"[{host}]" if ":" in host else host
        query = f"?token={self.token}" if self.token else ""
        return f"http://{name}:{self.server_address[1]}/{query}"

    def allows(self, header: str) -> bool:
        """Return whether a Host header names this board.

        Behind a token, any address of this machine may be used, but no other name, because a name can be made
        to lead anywhere.
        """
        try:
            parts = urlsplit(f"//{header}")
            name = parts.hostname or ""
            port = parts.port or 80
        except ValueError:
            return False
        if port != self.server_address[1]:
            return False
        if name in LOOPBACK:
            return True
        if not self.host:
            return False
        names = {self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return name in names or is_address(name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that closed its connection."""


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_wildcard(host: str) -> bool:
    return is_address(host) and ipaddress.ip_address(host).is_unspecified


class Handler(BaseHTTPRequestHandler):
    """Answers the page at / and its version at /version."""

    server: Server
    server_version = "mainrun"
    sys_version = ""
    timeout = TIMEOUT

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._refuse_method
        raise AttributeError(name)

    def do_GET(self) -> None:
        if not self.server.allows(self.headers.get("Host", "")):
            self._answer(HTTPStatus.FORBIDDEN, "This host name does not belong to the board.\n")
            return
        parts = urlsplit(self.path)
        token = parse_qs(parts.query).get("token", [""])[0]
        if not self._is_known(token):
            self._answer(HTTPStatus.UNAUTHORIZED, "Open the address with the token that the board printed.\n")
        elif token and self.server.token:
            cookie = f"{COOKIE}={self.server.token}; Path=/; HttpOnly; SameSite=Strict"
            self._answer(HTTPStatus.SEE_OTHER, "", location="/", cookie=cookie)
        elif parts.path == "/":
            self._answer(HTTPStatus.OK, self.server.board.text(), "text/html")
        elif parts.path == "/version":
            version = json.dumps({"version": self.server.board.version()})
            self._answer(HTTPStatus.OK, version, "application/json")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "There is no such page.\n")

    do_HEAD = do_GET

    def _is_known(self, token: str) -> bool:
        """Return whether the request has the token, in its address or in its cookie."""
        if not self.server.token:
            return True
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given = token or (cookie.value if cookie else "")
        return hmac.compare_digest(given.encode(), self.server.token.encode())

    def _refuse_method(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "The board only answers GET and HEAD.\n")

    def _answer(
        self,
        status: HTTPStatus,
        content: str | bytes,
        kind: str = "text/plain",
        location: str = "",
        cookie: str = "",
    ) -> None:
        data = content.encode() if isinstance(content, str) else content
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(data)),
            "Content-Security-Policy": f"{html.policy(live=True)}; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        if location:
            headers |= {"Location": location, "Set-Cookie": cookie}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because the page asks every second, and an address may contain the token."""


def open_server(folder: Path, port: int, host: str = "") -> Server:
    """Return the server of a board, or raise UsageError if its address cannot be used."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"DIR {folder} {what}; give a folder that contains runs or studies")
    if not re.fullmatch(r"[A-Za-z0-9.:-]{0,253}", host):
        raise UsageError(f"got --host {inputs.shown(host, 80)}; give an address or a name of this machine")
    try:
        return Server(folder, port, host)
    except OSError as error:
        where = f"port {port} of {host}" if host else f"port {port}"
        raise UsageError(
            f"{where} cannot be used ({error.strerror}); give another --port, or another --host"
        ) from None
