"""What may be fetched: addresses, URLs, paths, robots, and the client that obeys, on loopback."""

import math
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from ipaddress import ip_address
from urllib.request import Request

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import server as web
from support.fetching import client, get, why_not

from pipeline.fetch import http as opener_module
from pipeline.fetch.http import HttpClient, retry_after
from pipeline.fetch.policy import (
    RETRYABLE,
    FetchError,
    is_allowed,
    is_own,
    is_public,
    local_path,
    parse_url,
    read_local,
    split_error,
)
from pipeline.fetch.robots import (
    MOST_RULES,
    RobotsCache,
    Rules,
    TooManyRules,
    forbidden_by_rule,
    forbidden_by_tag,
    robots_rules,
)

US = frozenset({"extrahead", "img2dataset"})


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "93.184.216.34", "2606:2800:220:1::1"),
        *("::ffff:8.8.8.8", "64:ff9b::808:808", "2606:4700:3035::ac43:8a01"),
        *("2001:4860:4860::8888", "2a03:2880:f12f:83:face:b00c:0:25de", "2a04:4e42::323"),
    ],
)
def test_an_address_on_the_internet_is_public(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.0.1"),
        *("169.254.169.254", "100.64.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "198.18.0.1", "::", "::1", "::7f00:1", "fe80::1", "fe80::1%eth0"),
        *("fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "2001:0:808:808::f7f7:f7f7"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1"),
        *("2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1", "3fff::1", "4000::1"),
        *(
            "168.63.129.16",
            "192.0.0.192",
            "192.88.99.1",
            "192.0.0.9",
            "161.26.0.10",
        ),  # clouds, relays
        *("2600::5efe:10.0.0.1", "2600::200:5efe:8.8.8.8"),  # ISATAP
        # NAT64 under a prefix that only its network knows, of 96, 64, 56, 48, 40 and 32 bits
        *("2a00:1:2:3::169.254.169.254", "2a00:1:2:3:a:0:100::", "2a00:1:2:30a:0:1::"),
        *("2a00:1:2:7f00:0:100::", "2a00:1:a:1:1::", "2a00:1:a9fe:a9fe::", "2a00::c0a8:1"),
        "::ffff:168.63.129.16",
    ],
)
def test_an_address_that_may_end_inside_is_not_public(address):
    assert not is_public(ip_address(address))


def test_allow_takes_names_addresses_and_networks_and_nothing_beside_them():
    allow = ("images.internal", "10.1.0.0/16", "fd00::/8", "127.0.0.1")
    for host, address in [
        ("images.internal", "192.168.7.7"),
        ("x", "10.1.2.3"),
        ("x", "::ffff:10.1.2.3"),
        ("x", "fd00::1"),
        ("x", "127.0.0.1"),
    ]:
        assert is_allowed(host, ip_address(address), allow)
    for host, address in [
        ("evil.images.internal", "192.168.7.7"),
        ("images.internal.evil", "192.168.7.7"),
        ("x", "10.2.0.1"),
        ("x", "127.0.0.2"),
        ("x", "2002:a01:203::1"),
    ]:
        assert not is_allowed(host, ip_address(address), allow)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "127.1", "0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "localhost", "user:word@127.0.0.1"),
        *("127.0.0.1.", "\uff11\uff12\uff17.0.0.1", "8.8.8.8@127.0.0.1", "127.0.0.1#@8.8.8.8"),
    ],
)
def test_no_notation_of_this_machine_gets_through(host):
    with web.serve({"/": b"secret"}) as server:
        port = "" if "#" in host else f":{server.port}"
        assert why_not(f"http://{host}{port}/", allow=()) == "refused"
        assert server.requests == []


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://example.org/a", "gopher://example.org", "jar:http://x", "javascript:1", "//x/y"),
        *("http://", "http:///a", "http://a b/", "http://[::1", "http://x:99999/", "http://x\x0b/"),
        *("http://" + "a" * 64 + ".org/", "http://exa%6dple.org/", "HTTPS", ""),
    ],
)
def test_what_is_no_http_url_is_refused(url):
    with pytest.raises(FetchError, match=r"^refused: "):
        parse_url(url)


def test_a_url_is_sent_as_plain_ascii_whatever_it_was_written_with():
    target = parse_url("HTTP://B\u00fccher.example:80/a b/\u00e9%20x.jpg?q=\u00fc c#part")
    assert target == ("http", "xn--bcher-kva.example", 80, "/a%20b/%C3%A9%20x.jpg?q=%C3%BC%20c")
    assert target.origin == "http://xn--bcher-kva.example"
    assert parse_url("https://[2606::1]:444").origin == "https://[2606::1]:444"


@given(st.text())
def test_parsing_a_url_either_gives_clean_parts_or_is_refused(text):
    try:
        target = parse_url("http://" + text)
    except FetchError as error:
        assert error.status == "refused"
    else:
        assert re.fullmatch(r"[!-~]+", target.host + target.path)


def answers(monkeypatch, *hosts: str) -> list:
    """Name servers that answer another address at every question; the questions so far."""
    asked, real = [], socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append(host)
        return real(hosts[min(len(asked), len(hosts)) - 1], port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    with web.serve({"/": b"image"}) as server:
        asked = answers(monkeypatch, "127.0.0.1", "10.0.0.1")
        assert get(server.url("/", "rebinding.example")) == b"image"
    assert asked == ["rebinding.example"]
    assert server.requests[0][1]["Host"] == f"rebinding.example:{server.port}"


def test_a_name_that_turns_inside_after_the_check_reaches_nothing(monkeypatch):
    with web.serve({"/": b"secret"}) as server:
        asked = answers(monkeypatch, "127.0.0.2", "127.0.0.1")
        assert why_not(server.url("/", "rebinding.example"), allow=("127.0.0.2",)) == "unreachable"
    assert (asked, server.requests) == (["rebinding.example"], [])


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    def getaddrinfo(host, port, **_):
        stream = socket.AF_INET, socket.SOCK_STREAM, 6, ""
        return [(*stream, ("8.8.8.8", port)), (*stream, ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert why_not("http://two.example/", allow=()) == "refused"


@pytest.mark.parametrize("port", [22, 25, 6379, 81, 8000, 11211])
def test_a_public_host_is_asked_on_the_ports_of_the_web_only(monkeypatch, port):
    monkeypatch.setattr(opener_module, "is_public", lambda address: True)
    monkeypatch.setattr(opener_module, "is_own", lambda address: False)
    assert why_not(f"http://127.0.0.1:{port}/", allow=()) == "refused"
    assert why_not(f"http://127.0.0.1:{port}/", allow=(), ports=(9, port)) == "unreachable"


@pytest.mark.parametrize("port", [80, 443, 8080, 8443])
def test_the_ports_of_the_web_are_open_without_a_word(monkeypatch, port):
    monkeypatch.setattr(opener_module, "is_public", lambda address: True)
    monkeypatch.setattr(opener_module, "is_own", lambda address: False)
    monkeypatch.setattr(HttpClient, "_connected", lambda *_: connected())
    assert why_not(f"http://192.0.2.7:{port}/", allow=()) == "unreachable"


@contextmanager
def connected():
    raise ConnectionRefusedError("nobody is there")
    yield


def test_this_machines_own_address_is_refused_however_public_it_looks(monkeypatch):
    """As if the address of an interface were a public one."""
    monkeypatch.setattr(opener_module, "is_public", lambda address: True)
    with web.serve({"/": b"secret"}) as server:
        assert why_not(server.url("/"), allow=(), ports=(server.port,)) == "refused"
        assert server.requests == []
        assert get(server.url("/"), allow=("127.0.0.1",)) == b"secret"


def test_an_address_is_our_own_where_an_interface_has_it():
    own = {
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    others = {"192.0.2.1", "8.8.8.8", "2001:db8::1", "2606:4700::1111"} - own
    for text in own:
        address = ip_address(text)
        assert is_own(address) or address.is_link_local
    assert not any(is_own(ip_address(text)) for text in others)


def test_a_url_without_end_is_refused_before_it_is_parsed():
    with pytest.raises(FetchError, match="refused: a URL of 9000 characters"):
        parse_url("http://example.org/".ljust(9000, "a"))


def test_a_slow_name_server_is_a_timeout(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(60) and [])
    assert why_not("http://slow.example/", timeout_s=0.2) == "timeout"
    done.set()


def test_a_redirect_is_checked_like_a_first_request():
    pages = {"/inside": b"secret"}
    with web.serve(pages) as server:
        pages["/"] = web.redirect(server.url("/inside", "127.0.0.1"))
        named = server.url("/", "localhost")
        assert why_not(named, allow=("localhost",)) == "refused"
        assert server.paths() == ["/"]
        assert get(named, allow=("localhost", "127.0.0.1")) == b"secret"


def test_a_public_host_may_not_redirect_into_a_network_that_is_allowed(monkeypatch):
    """`allow` is for URLs that the user's list names, not for what others point at."""
    monkeypatch.setattr(opener_module, "is_public", lambda address: str(address) == "127.0.0.1")
    pages = {}
    with web.serve(pages) as server:
        pages["/"] = web.redirect(server.url("/inside", "127.0.0.2"))
        assert why_not(server.url("/"), allow=("127.0.0.0/8",)) == "refused"


def test_a_relative_redirect_in_raw_utf8_is_followed():
    target = "/\u00e9.jpg".encode().decode("latin-1")
    with web.serve({"/": web.redirect(target), "/%C3%A9.jpg": b"image"}) as server:
        assert get(server.url("/")) == b"image"


def test_the_time_is_for_all_redirects_together():
    pages = {f"/{i}": web.after(0.5, web.redirect(f"/{i + 1}")) for i in range(3)}
    with web.serve(pages | {"/3": web.after(0.5, web.body(b"image"))}) as server:
        assert get(server.url("/2"), timeout_s=1.5) == b"image"
        assert why_not(server.url("/0"), timeout_s=1.5) == "timeout"


def test_a_drip_of_headers_ends_in_time_and_so_does_a_stuck_tls_handshake():
    with web.serve({"/": web.drip(b"x" * 1000, 0.05)}) as server:
        start = time.monotonic()
        assert why_not(server.url("/"), timeout_s=0.5) == "timeout"
        assert time.monotonic() - start < 10  # the drip takes 50 s
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        assert why_not(url, timeout_s=0.5) == "timeout"


def chunked(*lines: bytes):
    def answer(request):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"".join(line + b"\r\n" for line in lines))

    return answer


def test_chunked_bodies_are_read_bounded_and_must_be_complete():
    pages = {
        "/whole": chunked(b"5", b"image", b"0", b""),
        "/cut": chunked(b"5", b"im"),
        "/big": chunked(b"fffff", b"x" * 0xFFFFF, b"0", b""),
        "/nonsense": chunked(b"zz", b"image"),
    }
    with web.serve(pages) as server:
        assert get(server.url("/whole")) == b"image"
        assert why_not(server.url("/cut")) == "unreachable"
        assert why_not(server.url("/big")) == "too_large"
        assert why_not(server.url("/nonsense")) == "unreachable"


def test_a_body_of_exactly_the_limit_is_taken_and_one_byte_more_is_not():
    with web.serve({"/9": b"x" * 9, "/10": b"x" * 10}) as server:
        assert get(server.url("/9"), max_bytes=9) == b"x" * 9
        assert why_not(server.url("/10"), max_bytes=9) == "too_large"


def test_what_may_succeed_later_is_tried_again_and_nothing_else():
    pages = {
        "/flaky": web.in_turn(web.status(503), web.reset, web.body(b"image")),
        "/down": web.status(500),
        "/gone": web.status(404),
    }
    with web.serve(pages) as server:
        assert get(server.url("/flaky"), retries=2) == b"image"
        assert why_not(server.url("/down"), retries=1) == "server_error"
        assert why_not(server.url("/gone"), retries=2) == "not_found"
    assert server.paths() == ["/flaky"] * 3 + ["/down"] * 2 + ["/gone"]


NOW = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("120", 120), (" 5 ", 5), ("0", 0), ("9" * 15, 999_999_999_999_999)),
        *(("Sun, 06 Nov 1994 08:50:37 GMT", 60), ("Sunday, 06-Nov-94 08:50:37 GMT", 60)),
        *(("Sun Nov  6 08:50:37 1994", 60), ("Sun, 06 Nov 1994 08:00:00 GMT", 0)),
        *(("", 0), ("soon", 0), ("-5", 0), ("1.5", 0), ("\u0665", 0), ("9" * 5000, 0)),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0),
    ],
)
def test_a_pause_is_a_number_of_seconds_or_one_of_the_three_dates_of_http(text, seconds):
    assert retry_after(text, NOW) == seconds


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ [\d:]+( [+-]?\w+)?"))
def test_any_text_asks_for_a_pause_that_is_a_number(text):
    assert 0 <= retry_after(text, NOW) < math.inf


@pytest.mark.parametrize("code", [429, 503])
def test_a_server_that_asks_for_a_pause_gets_it(code):
    busy = web.body(b"", code, Retry_After="2")
    with web.serve({"/": web.in_turn(busy, web.body(b"image"))}) as server:
        start = time.monotonic()
        assert get(server.url("/"), retries=1, timeout_s=5.0) == b"image"
        assert time.monotonic() - start >= 2.0  # by itself the first pause is half a second


def test_a_date_to_wait_for_is_waited_for():
    def busy(request):
        date = formatdate(time.time() + 3, usegmt=True)  # whole seconds
        web.body(b"", 503, Retry_After=date)(request)

    with web.serve({"/": web.in_turn(busy, web.body(b"image"))}) as server:
        start = time.monotonic()
        assert get(server.url("/"), retries=1, timeout_s=5.0) == b"image"
        assert time.monotonic() - start >= 1.9


def test_a_longer_pause_than_a_try_may_take_is_left_to_a_later_run_and_recorded():
    pages = {"/": web.body(b"", 429, Retry_After="20")}
    with web.serve(pages) as server:
        with pytest.raises(FetchError) as caught:
            get(server.url("/"), retries=1, timeout_s=1.0)
        assert server.paths() == ["/"]
    assert str(caught.value) == "server_error: HTTP 429, asks for a pause of 20 s"
    assert caught.value.status in RETRYABLE


def test_robots_txt_that_asks_for_a_pause_gets_it_too():
    answers = web.in_turn(web.body(b"", 503, Retry_After="2"), web.body(b""))
    with web.serve({"/a": b"image", "/robots.txt": answers}) as server:
        start = time.monotonic()
        assert get(server.url("/a"), respect_robots=True, retries=1, timeout_s=5.0) == b"image"
        assert time.monotonic() - start >= 2.0


def test_a_host_gets_no_more_requests_at_once_than_allowed_and_waiting_costs_no_time():
    lock, busy, most = threading.Lock(), [], []

    def answer(request):
        """Leaves before its client can know that it is done."""
        with lock:
            busy.append(request)
            most.append(len(busy))
        request.server.closing.wait(0.3)
        with lock:
            busy.remove(request)
        web.body(b"image")(request)

    with web.serve({"/": answer}) as server:
        shared, bodies = client(per_host=2, timeout_s=1.0), []
        fetch = lambda: bodies.append(shared.open(Request(server.url("/"))).read())  # noqa: E731
        threads = [threading.Thread(target=fetch) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert bodies == [b"image"] * 10
    assert max(most) == 2


def test_https_is_verified_against_the_name_not_the_address(tmp_path, monkeypatch):
    certificate = web.make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with web.serve({"/": b"image"}, certificate) as server:
        assert get(server.url("/", "localhost"), allow=("localhost",)) == b"image"
        assert why_not(server.url("/", "127.0.0.1")) == "unreachable"
        monkeypatch.delenv("SSL_CERT_FILE")
        assert why_not(server.url("/", "localhost"), allow=("localhost",)) == "unreachable"


@pytest.fixture
def root(tmp_path):
    inner = tmp_path / "root"
    (inner / "folder").mkdir(parents=True)
    (inner / "folder" / "a b#1.jpg").write_bytes(b"image")
    (inner / "inward").symlink_to("folder/a b#1.jpg")
    (tmp_path / "rooted").mkdir()
    (tmp_path / "rooted" / "secret").write_bytes(b"secret")
    (inner / "outward").symlink_to(tmp_path / "rooted")
    return inner


def test_a_local_file_is_read_as_written_escaped_or_through_an_inward_link(root):
    for url in ("file:folder/a b#1.jpg", "file:folder/a%20b%231.jpg", "file:inward"):
        assert read_local(url, root, 9) == b"image"
        assert get(url, root=root) == b"image"
    assert get("file:folder/../inward", root=root) == b"image"


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("file:../rooted/secret", "refused"),
        ("file:folder/../../rooted/secret", "refused"),
        ("file:%2e%2e/rooted/secret", "refused"),
        ("file:outward/secret", "refused"),
        ("file:///etc/passwd", "refused"),
        ("file:/etc/passwd", "refused"),
        ("file://localhost/etc/passwd", "refused"),
        ("file:%2Fetc/passwd", "refused"),
        ("file:a%00b", "refused"),
        ("file:folder", "refused"),
        ("file:folder/none.jpg", "not_found"),
        ("file:inward/below.jpg", "not_found"),
    ],
)
def test_no_local_path_leads_out_of_the_root(root, url, status):
    assert why_not(url, root=root) == status


def test_without_a_root_no_file_is_read_and_too_large_ones_are_not_either(root):
    assert why_not("file:inward", root=None) == "refused"
    assert why_not("file:inward", root=root, max_bytes=4) == "too_large"


@given(st.text(alphabet=st.sampled_from("./%2eEfF~\\ab\0")))
def test_every_local_path_lies_below_the_root_or_is_refused(tmp_path_factory, text):
    root = tmp_path_factory.getbasetemp()
    try:
        assert local_path("file:" + text, root).is_relative_to(root.resolve())
    except FetchError as error:
        assert error.status == "refused"


def test_an_error_is_read_back_from_its_text_and_a_strange_text_counts_as_refused():
    assert split_error(str(FetchError("timeout", "a: b"))) == ("timeout", "a: b")
    assert split_error("unknown url type: 'x'") == ("refused", "unknown url type: 'x'")


RFC_9309 = """\ufeff# comment
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/
sitemap: https://example.org/map

user-agent: foobot
user-agent: ExtraHead # two names, one group
Disallow: /
Allow: /example/page.html
Allow: /example/allowed.gif

User-agent: bazbot
Disallow: /example/page.html

User-agent: img2dataset
Disallow: /example/allowed.gif?no
Disallow:
"""


def may_fetch(rules: Rules, path: str) -> bool:
    return forbidden_by_rule(rules, path) is None


def test_groups_that_name_us_count_together_and_the_others_not_at_all():
    rules = robots_rules(RFC_9309, US)
    assert may_fetch(rules, "/example/page.html")
    assert may_fetch(rules, "/example/allowed.gif")
    assert not may_fetch(rules, "/example/allowed.gif?no")
    assert not may_fetch(rules, "/publications/")


def test_a_robot_that_no_group_names_follows_the_star():
    rules = robots_rules(RFC_9309, {"other"})
    assert not may_fetch(rules, "/a/b.gif")
    assert not may_fetch(rules, "/%65xample/x")
    assert may_fetch(rules, "/a/b.gif?x") and may_fetch(rules, "/publications/")
    assert may_fetch(robots_rules("", US), "/") and may_fetch(robots_rules("nonsense", US), "/")


def test_a_refusal_names_the_rule_that_forbids():
    rules = robots_rules("User-agent: *\nDisallow: /p\nDisallow: /*.jpg$", US)
    assert forbidden_by_rule(rules, "/p/a.jpg") == "/*.jpg$"
    assert forbidden_by_rule(rules, "/p/a.png") == "/p"
    long = b"User-agent: *\nDisallow: /" + b"*a" * 5000
    with web.serve({"/robots.txt": long}) as server, pytest.raises(FetchError) as caught:
        get(server.url("/" + "a" * 5000), respect_robots=True)
    assert len(str(caught.value)) < 300, "an untrusted text in every row"


def test_the_longest_rule_wins_and_allow_wins_a_tie():
    text = "User-agent: *\nDisallow: /p\nAllow: /p\nDisallow: /p/q*\nAllow: /p/q/r"
    rules = robots_rules(text, US)
    paths = {"/p": True, "/p/qq": False, "/p/q/r": True, "/x": True}
    assert {path: may_fetch(rules, path) for path in paths} == paths


@given(st.text("ab*$", max_size=9), st.text("ab$", max_size=9))
def test_robots_patterns_match_as_the_regular_expression_they_stand_for(pattern, path):
    anchored = pattern.endswith("$")
    pieces = pattern.removesuffix("$").split("*")
    expression = ".*".join(map(re.escape, pieces)) + (r"\Z" if anchored else "")
    expected = re.match(expression, path) is None
    assert may_fetch([(pattern, False)], path) == expected


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        (["noai"], "noai"),
        (["nofollow, NoImageAI"], "noimageai"),
        (["nofollow", "none"], "none"),
        (["img2dataset: noindex"], "noindex"),
        (["googlebot: nofollow, extrahead: noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
        (["googlebot: noindex, noai"], None),
        (["max-image-preview: none"], None),
        (["all", "nofollow"], None),
        ([], None),
    ],
)
def test_robots_tags_count_where_they_are_for_us_or_everyone(headers, directive):
    assert forbidden_by_tag(headers, US) == directive


def test_robots_txt_that_is_missing_allows_and_one_that_fails_forbids():
    with web.serve({"/a": b"image"}) as server:
        assert get(server.url("/a"), respect_robots=True) == b"image"
    for answer, status in [
        (web.status(403), None),
        (web.status(500), "server_error"),
        (web.never, "timeout"),
        (web.redirect("http://10.0.0.1/robots.txt"), "refused"),
        (web.redirect("/elsewhere"), "robots"),
    ]:
        forbidding = b"User-agent: *\nDisallow: /a"
        pages = {"/a": b"image", "/robots.txt": answer, "/elsewhere": forbidding}
        with web.serve(pages) as server:
            asked = dict(respect_robots=True, timeout_s=0.5)
            if status is None:
                assert get(server.url("/a"), **asked) == b"image"
            else:
                assert why_not(server.url("/a"), **asked) == status
                assert "/a" not in server.paths()


def test_only_the_beginning_of_an_endless_robots_txt_is_read():
    with web.serve({"/a": b"image", "/robots.txt": web.endless}) as server:
        assert get(server.url("/a"), respect_robots=True) == b"image"


def test_more_rules_than_are_checked_forbid_and_cost_little():
    """45,000 rules against a path of 8,000 characters took 10 s of processor for every URL."""
    bomb = b"User-agent: *\n" + b"".join(b"Disallow: /*%05x\n" % i for i in range(30_000))
    path = "/" + "a0" * 4000
    with web.serve({path: b"image", "/robots.txt": bomb}) as server:
        shared = client(respect_robots=True)
        start = time.process_time()
        for _ in range(10):
            with pytest.raises(FetchError, match=r"robots: .*more than 5000 rules"):
                shared.open(Request(server.url(path)))
        assert time.process_time() - start < 2.0
        assert path not in server.paths()


@pytest.mark.parametrize("path", ["/" + "a" * 8000, "/" + "ab" * 4000, "/" + "a" * 200])
@pytest.mark.parametrize(
    "rule",
    [
        "/*" + "a" * 44 + "b" + "a" * 44,  # 1.0 s: every place looks right up to the middle
        *("/*" + "a*" * 44 + "b", "/" + "*" * 90 + "b", "/*a*b*c$", "/a*c"),
        "/" + "a" * 90,
    ],
)
def test_as_many_rules_as_are_checked_cost_a_moment_for_any_path(rule, path):
    rules = robots_rules("User-agent: *\n" + f"Disallow: {rule}\n" * MOST_RULES, US)
    assert len(rules) == MOST_RULES
    start = time.process_time()
    with suppress(TooManyRules):
        forbidden_by_rule(rules, path)
    assert time.process_time() - start < 0.3


def test_a_path_for_which_the_rules_are_too_long_is_forbidden_and_a_short_one_is_asked():
    rule = "/*" + "a" * 44 + "b" + "a" * 44
    path, robots = "/" + "a" * 8000, "User-agent: *\n" + f"Disallow: {rule}\n" * 4000
    pages = {path: b"image", "/a": b"image", "/robots.txt": robots.encode()}
    with web.serve(pages) as server:
        shared = client(respect_robots=True)
        with pytest.raises(FetchError, match=r"robots: .*too long for a path of 8001"):
            shared.open(Request(server.url(path)))
        assert shared.open(Request(server.url("/a"))).read() == b"image"


def test_repeated_stars_are_one_star():
    rules = robots_rules("User-agent: *\nDisallow: /a***b", US)
    assert forbidden_by_rule(rules, "/axxb") and not forbidden_by_rule(rules, "/axx")


@pytest.mark.parametrize(
    "bomb",
    [
        "User-agent: a\n" * 35_000,
        "User-agent: " + "a " * 250_000,
        "x\n" * 250_000,
        "\r" * 500_000,
        "Allow: /\n" * 50_000,
        "User-agent: *\nDisallow: " + "*a" * 250_000,
        "user-agent" + " " * 490_000 + "x",
        (" " * 99 + "\n") * 5_000,
    ],
    ids=lambda text: text[:12],
)
def test_any_robots_txt_of_half_a_megabyte_is_read_and_asked_in_a_moment(bomb):
    start = time.process_time()
    rules = robots_rules(bomb, US)
    with suppress(TooManyRules):
        forbidden_by_rule(rules, "/" + "a" * 8000)
    assert time.process_time() - start < 1.0


def test_the_memory_of_robots_is_bounded_and_forgets_what_was_not_asked_for_longest():
    cache = RobotsCache(characters=100_000)
    for i in range(1000):
        cache.put(f"http://{i}", [("/" + "a" * 1000, False)])
        assert cache.get("http://0"), "asked again and again"
    kept = [i for i in range(1000) if cache.get(f"http://{i}")]
    assert kept == [0, *range(kept[1], 1000)] and 50 < len(kept) < 100
    cache.put("http://huge", [("/" + "a" * 200_000, False)])
    assert cache.get("http://huge") and not cache.get("http://999")


def test_robots_are_not_asked_where_they_need_not_be_respected():
    pages = {
        "/a": web.body(b"image", X_Robots_Tag="none"),
        "/robots.txt": b"User-agent: *\nDisallow: /",
    }
    with web.serve(pages) as server:
        assert get(server.url("/a"), respect_robots=False) == b"image"
        assert why_not(server.url("/a"), respect_robots=True) == "robots"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "
RAW = {  # (what is sent once, what is sent for ever) -> status
    "100 Continue for ever": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, "timeout"),
    "a header line without end": (b"HTTP/1.1 200 OK\r\nX: ", b"a" * 65_536, "unreachable"),
    "headers without end": (b"HTTP/1.1 200 OK\r\n", b"X: a\r\n" * 1000, "unreachable"),
    "no status line": (b"", b"nonsense " * 1000, "unreachable"),
    "chunks of a byte": (CHUNKED, b"1\r\na\r\n" * 10_000, "too_large"),
    "a chunk's extension": (CHUNKED + b"1;", b"x" * 65_536, "unreachable"),
    "a trailer without end": (CHUNKED + b"1\r\na\r\n0\r\n", b"X: a\r\n" * 1000, "timeout"),
    "a negative chunk": (CHUNKED + b"-5\r\nabc", b"", "refused"),
    "a chunk of 2 ** 64 bytes": (CHUNKED + b"f" * 16 + b"\r\nabc", b"", "unreachable"),
    "a redirect to no address": (MOVED + b"http://[::1\r\n\r\n", b"", "refused"),
    "a redirect with a line end": (MOVED + b"/%0d%0aHost: x\r\n\r\n", b"", "refused"),
    "a redirect to a file": (MOVED + b"file:a.jpg\r\n\r\n", b"", "refused"),
}


@contextmanager
def sending(once: bytes, for_ever: bytes):
    """The address of a server that answers so, whatever it is asked."""

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.recv(65_536)
            connection.sendall(once)
            while for_ever:
                connection.sendall(for_ever)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_hardly_http_are_one_failure_in_time(name):
    once, for_ever, status = RAW[name]
    with sending(once, for_ever) as address:
        start = time.monotonic()
        assert why_not(address, timeout_s=1.0) == status
        assert time.monotonic() - start < 5
