"""An upload against real servers on loopback that fail in the usual ways: what is said, and that the zip is kept."""

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
from reports import upload as uploads
from reports.upload import check_url, shown, upload

Step = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Answers each request by the next of its steps; the last one stays."""

    def __init__(self, *steps: Step) -> None:
        self.steps, self.got = list(steps), list[tuple[str, bytes]]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                step = outer.steps.pop(0) if len(outer.steps) > 1 else outer.steps[0]
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
        handler.server.server.got.append((handler.path, body))  # type: ignore[attr-defined]
        handler.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()

    return step


def early(status: int) -> Step:
    """An answer before the body is read, and away."""

    def step(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_WR)
        time.sleep(0.3)  # what still comes meets a closed door
        handler.close_connection = True

    return step


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(1000)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
    handler.connection.close()
    handler.close_connection = True


def half(handler: BaseHTTPRequestHandler) -> None:
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
    path.write_bytes(hashlib.sha256(b"x").digest() * 100_000)  # 3.2 MB: more than the sockets' buffers hold
    return path


def send(path: Path, url: str, timeout: float = 10) -> tuple[str, list[str]]:
    notes: list[str] = []
    return upload(path, url, notes.append, timeout=timeout, pause=0.01), notes


def failed(path: Path, url: str, timeout: float = 10) -> tuple[str, list[str]]:
    before, notes = path.read_bytes(), list[str]()
    with pytest.raises(MainrunError) as caught:
        upload(path, url, notes.append, timeout=timeout, pause=0.01)
    assert caught.value.exit_code == 1
    assert path.read_bytes() == before
    said = str(caught.value)
    assert f"{path} is kept" in said and "hidden" not in said + "".join(notes)  # a signed address is a key
    return said, notes


def test_a_file_arrives_whole(zipped: Path) -> None:
    with serving(answer(201)) as server:
        said, notes = send(zipped, server.url)
    assert said == "201 Created" and notes == []
    assert server.got == [("/put/x.zip?signature=hidden", zipped.read_bytes())]


def test_a_fault_of_the_server_is_tried_again(zipped: Path) -> None:
    with serving(answer(500), answer(503), answer(200)) as server:
        said, notes = send(zipped, server.url)
    assert said == "200 OK" and [body for _, body in server.got] == [zipped.read_bytes()] * 3
    assert [note.partition(" answered ")[2] for note in notes] == [
        "500 Internal Server Error; try 2 of 4 in 0.01 s",
        "503 Service Unavailable; try 3 of 4 in 0.02 s",
    ]


def test_a_server_that_asks_for_time_gets_it(zipped: Path) -> None:
    with serving(answer(429, **{"Retry-After": "1"}), answer(200)) as server:
        _, notes = send(zipped, server.url)
    assert notes[0].endswith("try 2 of 4 in 1 s")


@pytest.mark.parametrize(
    ("step", "said", "tries"),
    [
        (answer(403), "answered 403 Forbidden; it does not let you", 1),
        (answer(404), "answered 404 Not Found", 1),
        (answer(304), "answered 304 Not Modified", 1),
        (early(413), "answered 413", 1),
        (early(403), "answered 403", 1),
        (answer(500), "answered 500 Internal Server Error, 4 times", 4),
        (cut, "the connection was cut before there was an answer, 4 times", 4),
        (half, "4 times", 4),
        (garbage, "4 times", 4),
        (hang, "nothing was heard for 0.4 s, 4 times", 4),
    ],
)
def test_what_fails_says_so_and_keeps_the_file(zipped: Path, step: Step, said: str, tries: int) -> None:
    with serving(step) as server:
        found, notes = failed(zipped, server.url, timeout=0.4 if step is hang else 10)
    assert said in found and len(notes) == tries - 1


def test_nobody_listens(zipped: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    found, notes = failed(zipped, f"http://127.0.0.1:{port}/x")
    assert "refused" in found and len(notes) == 3


def test_no_other_host_gets_the_file(zipped: Path) -> None:
    with serving(answer(200)) as other:
        for status in (301, 302, 307, 308):
            for place in (
                other.url,
                other.url.replace("127.0.0.1", "localhost"),
                "//example.org/x",
                "https://127.0.0.1/x",
            ):
                with serving(answer(status, Location=place)) as server:
                    found, notes = failed(zipped, server.url)
                assert "sends the upload on to" in found and "refused" in found and notes == []
    assert other.got == []


def test_another_place_on_the_same_host_is_followed(zipped: Path) -> None:
    with serving(answer(307, Location="/there?signature=hidden"), answer(200)) as server:
        said, _ = send(zipped, server.url)
    assert said == "200 OK" and server.got[1] == ("/there?signature=hidden", zipped.read_bytes())
    with serving(answer(307, Location="/round")) as server:
        assert "in a circle" in failed(zipped, server.url)[0]
    assert len(server.got) == uploads.REDIRECTS + 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "cert.crt", folder / "made"
    ask = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(made[1]),
        "-out",
        str(made[0]),
        "-days",
        "2",
    ]
    subprocess.run(
        [*ask, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True,
        capture_output=True,
    )
    return made


def test_a_certificate_that_nobody_vouches_for(zipped: Path, certificate: tuple[Path, Path]) -> None:
    with serving(answer(200), tls=certificate) as server:
        found, notes = failed(zipped, server.url, timeout=5)
    assert (
        "the certificate of localhost is not to be trusted (self" in found
        and notes == []
        and server.got == []
    )


def test_a_certificate_of_another_host(
    zipped: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with serving(answer(200), tls=certificate) as server:
        assert send(zipped, server.url, timeout=5)[0] == "200 OK"  # trusted, and of this host
        found, _ = failed(zipped, server.url.replace("localhost", "127.0.0.1"), timeout=5)
    assert "is not to be trusted" in found and len(server.got) == 1


def test_https_where_there_is_none(zipped: Path) -> None:
    with serving(answer(200)) as server:
        found, notes = failed(zipped, server.url.replace("http:", "https:"))
    assert "4 times" in found and len(notes) == 3


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://x.org/a", "no address to PUT to"),
        ("x.org/a", "no address to PUT to"),
        ("https://", "no address to PUT to"),
        ("https://x.org:99999/a", "cannot be read"),
        ("https://x.org/a b", "no address to PUT to"),
        ("https://x.org/\r\nHost: y", "no address to PUT to"),
        ("https://ann" + ":secret9@x.org/a", "with a name or password"),
        ("http://x.org/a", "write https://"),
    ],
)
def test_addresses_that_are_none(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        check_url(url)
    assert "secret9" not in str(caught.value)


def test_an_address_is_shown_without_its_key() -> None:
    assert shown(check_url("https://x.org/a/b?key=hidden#y")) == "https://x.org/a/b"
