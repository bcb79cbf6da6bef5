"""An S3 server over loopback (moto's, in a process of its own), and a proxy before it that fails."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from pipeline.core import remote
from pipeline.core.layout import ADDRESS

SECRET = "a-secret-that-nobody-may-see"
BUCKET = "bucket"


@dataclass
class ObjectStore:
    """port: of the server; address: what --store takes, of a folder of this test alone."""

    port: int
    address: str
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes sent

    def got(self, part: str) -> int:
        """Bytes that were read of objects whose path has this part."""
        return sum(size for method, path, size in self.requests if method == "GET" and part in path)


@contextmanager
def server() -> Iterator[int]:
    """The port of an S3 server with one bucket, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(OSError):
                connection = HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("PUT", f"/{BUCKET}", headers={"Host": "127.0.0.1"})
                assert connection.getresponse().status == 200
                break
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path)
        if fault == "drop":
            return self._drop()
        if fault in ("403", "507"):
            return self._answer(int(fault))
        upstream = HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        self.server.store.requests.append((self.command, self.path, len(content)))
        if fault == "slow":
            time.sleep(0.3)
        if fault == "error":  # what was asked is done all the same
            return self._answer(500)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault == "half":
            self.wfile.write(content[: len(content) // 2])
            return self._drop()
        self.wfile.write(content)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    fault: Callable[[str, str], str | None]
    store: ObjectStore
    upstream: int


@contextmanager
def proxied(upstream: int, folder: str) -> Iterator[tuple[ObjectStore, _Server]]:
    """A store that counts what is asked of it. Its `fault` says, of a method and a path, what goes
    wrong: drop, slow, error (500 after it was done), half (of the answer), 403, 507, or None."""
    proxy = _Server(("127.0.0.1", 0), _Proxy)
    proxy.upstream, proxy.fault = upstream, lambda method, path: None
    proxy.store = ObjectStore(proxy.server_address[1], f"s3://{BUCKET}/{folder}")
    Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy.store, proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


def named(monkeypatch: pytest.MonkeyPatch, store: ObjectStore) -> None:
    """This store for this process and those that it starts."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    values = {ADDRESS: store.address} | access(f"http://127.0.0.1:{store.port}")
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    remote._open.cache_clear()


def access(endpoint: str) -> dict[str, str]:
    """The environment by which S3 clients know a server and who they are."""
    return {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "somebody-here",
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
