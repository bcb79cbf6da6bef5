"""What may be fetched: pure rules over URLs, addresses and paths, all of them untrusted.

http and https to public addresses, and files below one root; private hosts only where the user
names them. `pipeline.fetch.http` asks these rules before every request, redirects included.
"""

import io
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

VERSION = 2  # raise it when a rule changes what is fetched
RETRYABLE = frozenset({"timeout", "server_error", "unreachable", "lost", "put_off"})
STATUSES = RETRYABLE | {
    *("refused", "robots", "not_found", "too_large", "not_an_image", "undecodable"),
}

Address = IPv4Address | IPv6Address

PLAIN = "/%:=&?~+!$,;'@()*[]|"  # characters of a path or query that are sent as they are
PORTS = frozenset({80, 443, 8080, 8443})  # of public hosts; a parameter adds to them
LONGEST_URL = 8192  # characters

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")

# Nobody's public images are there. A list of our own, for the standard library's changes from one
# Python to the next: IANA's special-purpose registries, and what clouds answer on from within.
_INSIDE_4 = [
    ipaddress.IPv4Network(text)
    for text in (
        *("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.168.0.0/16", "192.0.0.0/24"),  # the last one holds Oracle's metadata, 192.0.0.192
        "168.63.129.16/32",  # Azure's host
        *("161.26.0.0/16", "166.8.0.0/14"),  # IBM Cloud's services
    )
]
_NOT_PUBLIC_4 = [
    *_INSIDE_4,
    *(
        ipaddress.IPv4Network(text)
        for text in (
            "0.0.0.0/8",
            *("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"),  # documentation
            *("192.31.196.0/24", "192.175.48.0/24"),  # AS112
            *("192.52.193.0/24", "192.88.99.0/24"),  # AMT, relays of 6to4
            "198.18.0.0/15",  # benchmarks
            *("224.0.0.0/4", "240.0.0.0/4"),
        )
    ),
]
_NOT_PUBLIC_6 = [  # within 2000::/3, beyond which nothing is public
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocols: Teredo, ORCHID, benchmarks
        *("2001:db8::/32", "3fff::/20"),  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
    )
]


try:
    _VERSION = version("extrahead")
except PackageNotFoundError:  # run from a source tree
    _VERSION = "0"
USER_AGENT = f"extrahead/{_VERSION} (+img2dataset; image-text datasets)"


@dataclass(frozen=True)
class FetchRules:
    """What may be fetched, how much of it, how hard to try, and what is stored of it."""

    timeout_s: float  # of one try in total (name, redirects and body; waiting for a turn is free),
    # and of a pause that a server asks for
    max_bytes: int  # of a body
    max_pixels: int  # that an image's header may announce
    max_redirects: int
    retries: int  # further tries where a later one may succeed
    allow: tuple[str, ...]  # host names, addresses or networks that may be asked though private
    root: Path | None  # `file:` paths lie below it; None refuses them all
    respect_robots: bool
    per_host: int  # concurrent requests to one host, per worker process
    image_size: int  # px; the shorter side of a stored image, which is never enlarged
    quality: int  # of a JPEG, where an image must be encoded
    ports: tuple[int, ...] = ()  # of public hosts, beside PORTS; those that `allow` names have any
    user_agent: str = USER_AGENT  # its name, and img2dataset, are looked for in robots.txt

    @property
    def names(self) -> frozenset[str]:
        """Lower-case names that a site may know us by."""
        return frozenset({re.split(r"[/\s]", self.user_agent)[0].lower(), "img2dataset"})


class FetchError(Exception):
    """Why there is no image. As text `<status>: <detail>`, status one of STATUSES."""

    def __init__(self, status: str, detail: str, final: bool = False, pause_s: float = 0.0) -> None:
        """final: trying again in this run would give the same answer.

        pause_s: how long the server wants to be left alone.
        """
        assert status in STATUSES
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail
        self.final = final or status not in RETRYABLE
        self.pause_s = pause_s


def split_error(message: str) -> tuple[str, str]:
    """(status, detail) of a stored message; one that is not ours is of a URL nobody could parse."""
    status, _, detail = message.partition(": ")
    return (status, detail) if status in STATUSES else ("refused", message)


class Target(NamedTuple):
    """An http or https URL, taken apart once, so that what is checked is what is asked."""

    scheme: str
    host: str  # lower-case ASCII
    port: int
    path: str  # with its query, ASCII

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == {"http": 80, "https": 443}[self.scheme]
        return f"{self.scheme}://{host}" + ("" if usual else f":{self.port}")


def parse_url(url: str) -> Target:
    """Raises FetchError `refused` for another scheme and for what is no URL, or an endless one."""
    if len(url) > LONGEST_URL:
        raise FetchError("refused", f"a URL of {len(url)} characters; {LONGEST_URL} are allowed")
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise FetchError("refused", f"scheme {parts.scheme!r}; http and https are fetched")
        host = (parts.hostname or "").removesuffix(".").encode("idna").decode("ascii").lower()
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError as error:
        raise FetchError("refused", f"malformed URL: {error}") from None
    if not re.fullmatch(r"[a-z0-9._:-]+", host):
        raise FetchError("refused", f"malformed host {host!r}")
    query = f"?{parts.query}" if parts.query else ""
    return Target(parts.scheme, host, port, quote((parts.path or "/") + query, safe=PLAIN))


def is_public(address: Address) -> bool:
    """Whether an address, and every IPv4 address it may carry inside, is on the public internet."""
    if address.version == 4:
        return not any(address in network for network in _NOT_PUBLIC_4)
    if carried := _carried(address):
        return is_public(carried)
    if address not in _GLOBAL_UNICAST or any(address in network for network in _NOT_PUBLIC_6):
        return False
    return not _may_be_translated_inside(int(address))


def _carried(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a packet to this one is sure to end at (IPv4-mapped, NAT64)."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


def _may_be_translated_inside(address: int) -> bool:
    """Whether a network of our own may translate it to a private IPv4 address.

    ISATAP, and NAT64 under a prefix that only that network knows: RFC 6052 puts the IPv4 address
    behind 32, 40, 48, 56, 64 or 96 bits of prefix, zeros in bits 64 to 71 and behind it.
    """
    if address >> 32 & 0xFDFFFFFF == 0x00005EFE:
        return True
    if address >> 56 & 0xFF:
        return False
    without_zeros = address >> 64 << 56 | address & (1 << 56) - 1  # 120 bits
    for suffix in (56, 48, 40, 32, 24, 0):  # bits
        inner = IPv4Address(without_zeros >> suffix & 0xFFFFFFFF)
        zeros = without_zeros & (1 << suffix) - 1 == 0
        if zeros and any(inner in network for network in _INSIDE_4):
            return True
    return False


def is_own(address: Address) -> bool:
    """Whether an interface of this machine has the address: then it is our own source towards it.

    Nothing is sent.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((str(address), 9))
            return ipaddress.ip_address(sock.getsockname()[0]) == address
    except OSError:  # no way leads there
        return False


def is_allowed(host: str, address: Address, allow: tuple[str, ...]) -> bool:
    """Whether `allow` names the host, or a network that holds the address."""
    for entry in allow:
        try:
            network = ipaddress.ip_network(entry, strict=False)
        except ValueError:
            if entry.lower().removesuffix(".") == host:
                return True
        else:
            inner = address if address.version == 4 else _carried(address) or address
            if inner in network:
                return True
    return False


def local_path(url: str, root: Path | None) -> Path:
    """The file below root that `file:relative/path` means, links followed; `%20` is a blank.

    Raises FetchError `refused` for every way out of root.
    """
    if root is None:
        raise FetchError("refused", "file: paths, for no root is set")
    path = unquote(url[len("file:") :])
    if path.startswith("/") or "\0" in path:
        raise FetchError("refused", f"{url!r} is no relative path; write file:folder/name.jpg")
    base = os.path.realpath(root)
    real = Path(os.path.realpath(os.path.join(base, path)))
    if not real.is_relative_to(base):
        raise FetchError("refused", f"{url!r} leads out of the root")
    return real


@contextmanager
def open_local(url: str, root: Path | None) -> Iterator[io.BufferedReader]:
    """A regular file below root, opened without following links. Raises FetchError."""
    path = local_path(url, root)
    try:  # NONBLOCK: opening a FIFO would wait for its writer
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FetchError("not_found", f"{error.strerror}: {url!r}") from None
    except OSError as error:
        raise FetchError("unreachable", f"{error.strerror}: {url!r}") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise FetchError("refused", f"{url!r} is no regular file")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def read_local(url: str, root: Path | None, max_bytes: int) -> bytes:
    """The bytes of a regular file below root, or of an image inside one. Raises FetchError."""
    from pipeline.fetch.containers import split_inside  # the process that decodes needs no Arrow

    if inside := split_inside(url[len("file:") :]):
        return _read_inside(url, *inside, root, max_bytes)
    with open_local(url, root) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise FetchError("unreachable", f"{error.strerror}: {url!r}") from None
    if len(data) > max_bytes:
        raise FetchError("too_large", f"more than {max_bytes} bytes")
    return data


def _read_inside(
    url: str, file: str, name: str, at: int, size: int | None, root: Path | None, max_bytes: int
) -> bytes:
    from pipeline.fetch.containers import read_inside

    path = local_path(f"file:{file}", root)
    if not path.is_file():
        raise FetchError("not_found", f"no such file: {url!r}")
    if size is not None and size > max_bytes:
        raise FetchError("too_large", f"more than {max_bytes} bytes")
    try:
        data = read_inside(path, unquote(name), at, size)
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are among them
        raise FetchError("unreachable", f"{url!r}: {error}") from None
    if data is None:
        raise FetchError("not_found", f"no image lies at {url!r}")
    if len(data) > max_bytes:
        raise FetchError("too_large", f"more than {max_bytes} bytes")
    return data
