"""A real HTTP(S) server on loopback whose every page is scripted, misbehaviour included."""

import datetime
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """What the tests see of a running server."""

    def __init__(self, scheme: str, port: int):
        self.scheme, self.port = scheme, port
        self.requests: list[tuple[str, dict[str, str]]] = []  # path, headers; in order of arrival
        self.most_at_once = 0
        self.closing = threading.Event()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


@contextmanager
def serve(
    pages: Mapping[str, bytes | Answer], certificate: tuple[Path, Path] | None = None
) -> Iterator[Server]:
    """Serve pages (path -> body, or one of the answers below); anything else is a 404.

    certificate: (certificate, key) files for https. Ends at once, whatever is still under way.
    """
    lock = threading.Lock()
    busy = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            nonlocal busy
            with lock:
                busy += 1
                server.most_at_once = max(server.most_at_once, busy)
                server.requests.append((self.path, dict(self.headers)))
            self.close_connection = True
            try:
                page = pages.get(self.path, status(404))
                (body(page) if isinstance(page, bytes) else page)(self)
            except OSError:
                pass  # the client has gone
            finally:
                with lock:
                    busy -= 1

        def log_message(self, *_):
            pass

    class Http(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def handle_error(self, *_):
            pass

    http = Http(("127.0.0.1", 0), Handler)
    if certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*certificate)
        http.socket = tls.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    server = Server("https" if certificate else "http", http.server_port)
    http.closing = server.closing
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        http.server_close()
        thread.join()


def body(data: bytes, code: int = 200, **headers: str) -> Answer:
    """A complete answer; headers with _ for -."""

    def answer(request):
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | given).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)

    return answer


def status(code: int) -> Answer:
    return body(b"", code)


def redirect(to: str, code: int = 302) -> Answer:
    return body(b"", code, Location=to)


def in_turn(*answers: Answer) -> Answer:
    """The first answer to the first request, and so on; the last one from then on."""
    left = list(answers)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


def after(seconds: float, answer: Answer) -> Answer:
    def wait(request):
        request.server.closing.wait(seconds)
        answer(request)

    return wait


def never(request) -> None:
    """Accepts the request and says nothing."""
    request.server.closing.wait(600)


def reset(request) -> None:
    """Ends the connection with a TCP reset in the middle of the headers."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\n")
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def short_of(announced: int, data: bytes) -> Answer:
    """Announces more bytes than it sends."""
    return body(data, Content_Length=str(announced))


def endless(request) -> None:
    """A body without length that goes on until the client or the test gives up."""
    request.send_response(200)
    request.end_headers()
    while not request.server.closing.is_set():
        request.wfile.write(b"\xff" * 65536)


def drip(data: bytes, pause_s: float) -> Answer:
    """A byte at a time, so that no single read ever times out; headers too."""

    def answer(request):
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        for byte in head + data:
            request.wfile.write(bytes([byte]))
            if request.server.closing.wait(pause_s):
                return

    return answer


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed (certificate, key) for localhost, but not for 127.0.0.1; it is its own CA."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met
