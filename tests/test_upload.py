"""Tests uploads to real local servers that fail in common ways. The zip is always kept."""

from __future__ import annotations

import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mainrun.errors import MainrunError, UsageError
from reports.submission import upload as uploads
from reports.submission.upload import check_url, upload, without_query

Step = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """An HTTP server that answers requests with its steps in order, and then repeats the last step."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.requests: list[tuple[str, bytes]] = []  # (path, body) of each request
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                step = outer.steps[0]
                if len(outer.steps) > 1:
                    del outer.steps[0]
                step(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.server = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.http.server_port}/put/x.zip?signature=hidden"


@contextmanager
def serving(*steps: Step, tls: tuple[Path, Path] | None = None) -> Iterator[Server]:
    server = Server(*steps)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
        server.url = server.url.replace("http://127.0.0.1", "https://localhost")
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def answer(status: int, **headers: str) -> Step:
    def step(handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.server.server.requests.append((handler.path, body))  # type: ignore[attr-defined]
        handler.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()

    return step


def answer_early(status: int) -> Step:
    """Return a step that answers before it reads the body and then closes the connection."""

    def step(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_WR)
        time.sleep(0.3)  # meanwhile the client keeps sending to the closed socket
        handler.close_connection = True

    return step


def reset(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(1000)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()
    handler.close_connection = True


def answer_half(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(int(handler.headers["Content-Length"]))
    handler.wfile.write(b"HTTP/1.1 2")
    handler.connection.close()
    handler.close_connection = True


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def garbage(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(int(handler.headers["Content-Length"]))
    handler.wfile.write(b"what?\r\n\r\n")
    handler.close_connection = True


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    path = tmp_path / "submission.zip"
    # A file of 3.2 MB is larger than the socket buffers.
    path.write_bytes(hashlib.sha256(b"x").digest() * 100_000)
    return path


def send(path: Path, url: str, timeout: float = 10) -> tuple[str, list[str]]:
    notes: list[str] = []
    return upload(path, url, notes.append, timeout=timeout, pause=0.01), notes


def failed(path: Path, url: str, timeout: float = 10) -> tuple[str, list[str]]:
    data = path.read_bytes()
    notes: list[str] = []
    with pytest.raises(MainrunError) as caught:
        upload(path, url, notes.append, timeout=timeout, pause=0.01)
    assert caught.value.exit_code == 1
    assert path.read_bytes() == data
    message = str(caught.value)
    assert f"{path} is kept" in message
    assert "hidden" not in message + "".join(notes), "the query of a signed address is a key"
    return message, notes


def test_the_whole_file_is_sent(zipped: Path) -> None:
    with serving(answer(201)) as server:
        status, notes = send(zipped, server.url)
    assert status == "201 Created" and notes == []
    assert server.requests == [("/put/x.zip?signature=hidden", zipped.read_bytes())]


def test_a_server_error_is_retried(zipped: Path) -> None:
    with serving(answer(500), answer(503), answer(200)) as server:
        status, notes = send(zipped, server.url)
    assert status == "200 OK" and [body for _, body in server.requests] == [zipped.read_bytes()] * 3
    assert [note.partition(" answered ")[2] for note in notes] == [
        "500 Internal Server Error; try 2 of 4 in 0.01 s",
        "503 Service Unavailable; try 3 of 4 in 0.02 s",
    ]


def test_retry_after_is_obeyed(zipped: Path) -> None:
    with serving(answer(429, **{"Retry-After": "1"}), answer(200)) as server:
        _, notes = send(zipped, server.url)
    assert notes[0].endswith("try 2 of 4 in 1 s")


@pytest.mark.parametrize(
    ("step", "problem", "tries"),
    [
        (answer(403), "answered 403 Forbidden; the address does not allow this upload", 1),
        (answer(404), "answered 404 Not Found", 1),
        (answer(304), "answered 304 Not Modified", 1),
        (answer_early(413), "answered 413", 1),
        (answer_early(403), "answered 403", 1),
        (answer(500), "answered 500 Internal Server Error, in 4 tries", 4),
        (reset, "the connection was closed before the server answered, in 4 tries", 4),
        (answer_half, "in 4 tries", 4),
        (garbage, "in 4 tries", 4),
        (hang, "no answer for 0.4 s, in 4 tries", 4),
    ],
)
def test_a_failure_is_reported_and_the_file_is_kept(
    zipped: Path, step: Step, problem: str, tries: int
) -> None:
    with serving(step) as server:
        message, notes = failed(zipped, server.url, timeout=0.4 if step is hang else 10)
    assert problem in message and len(notes) == tries - 1


def test_no_server(zipped: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    message, notes = failed(zipped, f"http://127.0.0.1:{port}/x")
    assert "refused" in message and len(notes) == 3


def test_a_redirect_to_another_host_is_refused(zipped: Path) -> None:
    with serving(answer(200)) as other:
        for status in (301, 302, 307, 308):
            for place in (
                other.url,
                other.url.replace("127.0.0.1", "localhost"),
                "//example.org/x",
                "https://127.0.0.1/x",
            ):
                with serving(answer(status, Location=place)) as server:
                    message, notes = failed(zipped, server.url)
                assert "redirects the upload to" in message and "refused" in message and notes == []
    assert other.requests == []


def test_a_redirect_within_the_host_is_followed(zipped: Path) -> None:
    with serving(answer(307, Location="/elsewhere?signature=hidden"), answer(200)) as server:
        status, _ = send(zipped, server.url)
    assert status == "200 OK" and server.requests[1] == ("/elsewhere?signature=hidden", zipped.read_bytes())
    with serving(answer(307, Location="/circle")) as server:
        assert "in a circle" in failed(zipped, server.url)[0]
    assert len(server.requests) == uploads.MAX_REDIRECTS + 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    certificate_file = folder / "cert.crt"
    key_file = folder / "private"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key_file), "-out", str(certificate_file)]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate_file, key_file


def test_an_untrusted_certificate(zipped: Path, certificate: tuple[Path, Path]) -> None:
    with serving(answer(200), tls=certificate) as server:
        message, notes = failed(zipped, server.url, timeout=5)
    assert "the certificate of localhost is not trusted (self" in message
    assert notes == [] and server.requests == []


def test_a_certificate_of_another_host(
    zipped: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with serving(answer(200), tls=certificate) as server:
        assert send(zipped, server.url, timeout=5)[0] == "200 OK"  # the certificate is valid for localhost
        message, _ = failed(zipped, server.url.replace("localhost", "127.0.0.1"), timeout=5)
    assert "is not trusted" in message and len(server.requests) == 1


def test_https_to_an_http_server(zipped: Path) -> None:
    with serving(answer(200)) as server:
        message, notes = failed(zipped, server.url.replace("http:", "https:"))
    assert "in 4 tries" in message and len(notes) == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://x.org/a", "not an HTTP address"),
        ("x.org/a", "not an HTTP address"),
        ("https://", "not an HTTP address"),
        ("https://x.org:99999/a", "cannot be read"),
        ("https://x.org/a b", "not an HTTP address"),
        ("https://x.org/\r\nHost: y", "not an HTTP address"),
        ("https://ann" + ":secret9@x.org/a", "with a name or password"),
        ("http://x.org/a", "use https://"),
    ],
)
def test_invalid_addresses(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_url(url)
    assert "secret9" not in str(caught.value)


def test_an_address_is_shown_without_its_query() -> None:
    assert without_query(check_url("https://x.org/a/b?key=hidden#y")) == "https://x.org/a/b"
