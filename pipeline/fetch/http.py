"""The one client that fetches: every hop of a redirect is checked, no name is resolved twice.

Each hop's host is resolved once, all its addresses are checked, and the connection goes to one of
them, so that a second answer of the name server changes nothing. Time and bytes are bounded in
total, what a robots.txt takes included. Proxies named by the environment are not used: they would
resolve names themselves.
"""

import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from calendar import timegm
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from email.utils import parsedate
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urljoin
from urllib.request import Request

from pipeline.fetch.hosts import Hosts
from pipeline.fetch.policy import (
    PLAIN,
    PORTS,
    Address,
    FetchError,
    FetchRules,
    Target,
    is_allowed,
    is_own,
    is_public,
    parse_url,
    read_local,
)
from pipeline.fetch.robots import (
    RobotsCache,
    Rules,
    TooManyRules,
    UnknownRules,
    forbidden_by_rule,
    forbidden_by_tag,
    robots_rules,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ROBOTS_BYTES = 500 * 1024  # of a robots.txt that are read: what RFC 9309 asks at least
LONGEST_PAUSE_S = 8.0  # between two tries, unless the server asks for a longer one
LONGEST_RULE = 200  # characters of a robots.txt's rule that are recorded in a row
_REDIRECTS = {301, 302, 303, 307, 308}
_TRY_LATER = {408, 425, 429}


class _Clock:
    """The time that one try has in all."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds above 0. Raises TimeoutError when there are none."""
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("time is up")
        return left

    @contextmanager
    def stopped_until(self, slot: threading.Semaphore) -> Iterator[None]:
        """Holds a slot; waiting for it costs no time."""
        start = time.monotonic()
        with slot:
            self.deadline += time.monotonic() - start
            yield


class _Wire(io.RawIOBase):
    """A socket's receiving side under one deadline for all reads together."""

    def __init__(self, sock: socket.socket, clock: _Clock):
        self.sock, self.clock = sock, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        self.sock.settimeout(self.clock.left())
        return self.sock.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return io.BufferedReader(self)


class Body(io.BytesIO):
    """What was fetched, and the host that sent it, for what its decoding costs; None for a file."""

    host: str | None = None


class HttpClient:
    """Fetches under the rules, where urllib's own would fetch anything.

    Safe to share between threads. `heartbeat` is called whenever a request begins.
    """

    def __init__(self, rules: FetchRules, heartbeat: Callable[[], None] = lambda: None):
        self.rules, self.heartbeat = rules, heartbeat
        self.tls = ssl.create_default_context()
        self.hosts = Hosts(rules.per_host, rules.timeout_s)
        self.locks: dict[str, threading.Lock] = {}  # by origin
        self.robots = RobotsCache()

    def open(self, request: Request) -> Body:
        """The body of an urllib Request's URL, under our own headers. Raises FetchError."""
        return self._with_retries(request.full_url)

    def _with_retries(self, url: str) -> Body:
        """Tries again while that may help, no sooner than the server asks (`Retry-After`).

        A pause longer than a whole try may take is not waited for: a later run may try again.
        """
        for attempt in range(self.rules.retries):
            try:
                return self._image(url)
            except FetchError as error:
                if error.final or error.pause_s > self.rules.timeout_s:
                    raise
                time.sleep(max(error.pause_s, min(0.5 * 2**attempt, LONGEST_PAUSE_S)))
        return self._image(url)

    def _image(self, url: str) -> Body:
        if url[:5].lower() == "file:":
            self.heartbeat()
            return Body(read_local(url, self.rules.root, self.rules.max_bytes))
        clock = _Clock(self.rules.timeout_s)
        with self._following(url, clock, self.rules.respect_robots) as (response, host):
            names = self.rules.names
            if self.rules.respect_robots and (
                tag := forbidden_by_tag(response.headers.get_all("X-Robots-Tag", []), names)
            ):
                raise FetchError("robots", f"X-Robots-Tag: {tag}")
            limit = self.rules.max_bytes
            if (response.length or 0) > limit or len(body := _read(response, limit)) > limit:
                raise FetchError("too_large", f"more than {limit} bytes")
        whole = Body(body)
        whole.host = host
        return whole

    @contextmanager
    def _following(
        self, url: str, clock: _Clock, ask_robots: bool
    ) -> Iterator[tuple[http.client.HTTPResponse, str]]:
        """The 2xx response at the end of the redirects, and its host."""
        from_public = False
        for _ in range(self.rules.max_redirects + 1):
            target = parse_url(url)
            if ask_robots:
                self._ask_robots(target, clock)
            with clock.stopped_until(self.hosts.slot(target.host)):
                self.hosts.require_budget(target.host)
                with self.hosts.charged(target.host), _named_errors():
                    self.heartbeat()
                    addresses = self._addresses(target, clock, from_public)
                    with self._connected(target, addresses, clock) as sock:
                        response = self._get(target, sock, clock)
                        location = response.headers.get("Location")
                        if response.status not in _REDIRECTS or location is None:
                            _require_success(response)
                            yield response, target.host
                            return
            from_public |= any(is_public(ipaddress.ip_address(a[-1][0])) for a in addresses)
            with _named_errors():
                url = urljoin(url, quote(location, safe=PLAIN + "#", encoding="latin-1"))
        raise FetchError("refused", f"more than {self.rules.max_redirects} redirects")

    def _addresses(self, target: Target, clock: _Clock, from_public: bool) -> list[tuple]:
        """(family, sockaddr) of a host, resolved once; all may be asked, or FetchError."""
        addresses = _resolve(target.host, target.port, clock)
        for _, (text, *_) in addresses:
            self._require_allowed(target, ipaddress.ip_address(text), from_public)
        return addresses

    def _require_allowed(self, target: Target, address: Address, from_public: bool) -> None:
        """Raises FetchError `refused`, unless the address is public or `allow` names it."""
        public = is_public(address) and not is_own(address)
        if is_allowed(target.host, address, self.rules.allow):
            if from_public and not public:
                raise FetchError("refused", f"redirect from a public host to {address}")
        elif not public:
            raise FetchError("refused", f"{target.host} is at {address}, not a public address")
        elif target.port not in PORTS and target.port not in self.rules.ports:
            raise FetchError("refused", f"port {target.port}; `download.ports` may allow it")

    @contextmanager
    def _connected(
        self, target: Target, addresses: list[tuple], clock: _Clock
    ) -> Iterator[socket.socket]:
        """A socket to the first address that answers, inside TLS for https."""
        for i, (family, address) in enumerate(addresses):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(clock.left() / (len(addresses) - i))
                sock.connect(address)
                break
            except OSError:
                sock.close()
                if i == len(addresses) - 1:
                    raise
        with sock:
            sock.settimeout(clock.left())
            if target.scheme == "http":
                yield sock
            else:
                with self.tls.wrap_socket(sock, server_hostname=target.host) as wrapped:
                    yield wrapped

    def _get(self, target: Target, sock: socket.socket, clock: _Clock) -> http.client.HTTPResponse:
        """The response's head; its body is read under the same deadline."""
        sock.sendall(
            f"GET {target.path} HTTP/1.1\r\nHost: {target.origin.split('//')[1]}\r\n"
            f"User-Agent: {self.rules.user_agent}\r\nAccept: image/*, */*;q=0.5\r\n"
            "Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        # of a socket, the response wants `makefile` alone
        wire = cast(socket.socket, _Wire(sock, clock))
        response = http.client.HTTPResponse(wire, method="GET")
        response.begin()
        return response

    def _ask_robots(self, target: Target, clock: _Clock) -> None:
        """Raises FetchError where robots.txt forbids the path, or could not be asked.

        Costs the URL's own time, waiting for another thread that asks the same one included.
        """
        lock = self.locks.setdefault(target.origin, threading.Lock())
        with _named_errors():
            if not lock.acquire(timeout=clock.left()):
                raise TimeoutError
        try:
            known = self._robots_of(target.origin, clock)
        finally:
            lock.release()
        if isinstance(known, UnknownRules):
            error, asked = known.error, known.tries > self.rules.retries
            detail = f"robots.txt of {target.host}: {error.detail}"
            raise FetchError(error.status, detail, error.final or asked, error.pause_s)
        try:
            pattern = forbidden_by_rule(known, target.path)
        except TooManyRules as error:
            raise FetchError("robots", f"robots.txt of {target.host}: {error}") from None
        if pattern:
            raise FetchError(
                "robots", f"robots.txt of {target.host}: Disallow: {pattern[:LONGEST_RULE]}"
            )

    def _robots_of(self, origin: str, clock: _Clock) -> Rules | UnknownRules:
        """RFC 9309: no robots.txt allows all, one that cannot be had forbids all.

        One that fails is asked again for other URLs, as often as a URL is tried.
        """
        known = self.robots.get(origin)
        tries, again = 0, False
        if isinstance(known, UnknownRules):
            tries, again = known.tries, not known.error.final and known.tries <= self.rules.retries
        if known is None or again:
            began = time.monotonic()
            in_full = clock.deadline - began > self.rules.timeout_s / 2
            try:
                with self._following(f"{origin}/robots.txt", clock, ask_robots=False) as (
                    response,
                    _,
                ):
                    body = _read(response, ROBOTS_BYTES)
                known = robots_rules(body.decode("utf-8", "replace"), self.rules.names)
            except TooManyRules as error:
                known = UnknownRules(FetchError("robots", str(error)), 1)
            except FetchError as error:
                known = [] if error.status == "not_found" else UnknownRules(error, tries + 1)
                if error.status == "timeout" and not in_full:
                    return known  # earlier hops had used the time up: says nothing of this origin
            self.robots.put(origin, known)
        return known


def _resolve(host: str, port: int, clock: _Clock) -> list[tuple]:
    """(family, sockaddr) of a host. In a thread: getaddrinfo knows no time-out."""
    answer: Future = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return [(family, address) for family, *_, address in answer.result(clock.left())]


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
    """A body, or its first limit + 1 bytes. Raises FetchError where it ends too early."""
    announced, body = response.length, bytearray()
    while len(body) <= limit and (piece := response.read(min(1 << 16, limit + 1 - len(body)))):
        body += piece
    if announced is not None and len(body) < min(announced, limit):
        raise FetchError("unreachable", f"body ends after {len(body)} of {announced} bytes")
    return bytes(body)


def _require_success(response: http.client.HTTPResponse) -> None:
    code = response.status
    if code in _TRY_LATER or code >= 500:
        pause = retry_after(response.headers.get("Retry-After", ""), time.time())
        asked = f", asks for a pause of {pause:.0f} s" if pause else ""
        raise FetchError("server_error", f"HTTP {code}{asked}", pause_s=pause)
    if not 200 <= code < 300:
        raise FetchError("not_found", f"HTTP {code}")


def retry_after(text: str, now: float) -> float:
    """Seconds >= 0 that a Retry-After header asks for: a number, or a date (now: Unix time).

    0 for what is neither.
    """
    if re.fullmatch(r"\s*[0-9]{1,15}\s*", text):
        return float(text)
    try:
        date = parsedate(text)  # in GMT, as all dates of HTTP
        return max(0.0, timegm(date) - now) if date else 0.0
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


@contextmanager
def _named_errors() -> Iterator[None]:
    """Whatever a network does, as a FetchError."""
    try:
        yield
    except TimeoutError:
        raise FetchError("timeout", "no complete answer in time") from None
    except (OSError, http.client.HTTPException) as error:
        raise FetchError("unreachable", f"{type(error).__name__}: {error}") from None
    except ValueError as error:
        raise FetchError("refused", f"malformed URL: {error}") from None
