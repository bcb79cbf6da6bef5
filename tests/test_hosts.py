"""A slow or failing host costs a bounded time: others are not starved, and its rest is put off."""

import threading
import time
from urllib.request import Request

import pytest
from support import bombs
from support import server as web
from support.fetching import client, picture, rules, why_not

from pipeline.fetch import hosts, img2dataset_child
from pipeline.fetch.hosts import BUDGET, EARNED, QUICK_FAILURE, Hosts
from pipeline.fetch.policy import RETRYABLE, FetchError


def answered(hosts: Hosts, seconds: float, status: str | None, host: str = "a") -> None:
    """One request that took so long; status of its failure, if it failed."""
    hosts._charge(host, seconds, status in RETRYABLE)


def is_put_off(hosts: Hosts, host: str = "a") -> bool:
    try:
        hosts.require_budget(host)
    except FetchError as error:
        assert error.status == "put_off" and error.final
        return True
    return False


def failures_until_put_off(seconds: float, good_between: int = 0) -> int:
    hosts = Hosts(per_host=1, timeout_s=10.0)
    for failures in range(1000):
        if is_put_off(hosts):
            return failures
        answered(hosts, seconds, "timeout")
        for _ in range(good_between):
            answered(hosts, 0.1, None)
    return 1000


def test_a_host_is_put_off_after_ten_timeouts_or_forty_quick_failures():
    assert failures_until_put_off(10.0) == BUDGET
    assert failures_until_put_off(0.01) == BUDGET / QUICK_FAILURE


def test_good_answers_earn_back_what_some_failures_cost():
    assert failures_until_put_off(0.01, good_between=1) == 1000
    assert failures_until_put_off(10.0, good_between=int(1 / EARNED)) == 1000
    assert failures_until_put_off(10.0, good_between=1) < 20


def test_slow_answers_cost_even_where_they_are_good():
    hosts = Hosts(per_host=1, timeout_s=10.0)
    for _ in range(12):
        assert not is_put_off(hosts)
        answered(hosts, 9.0, None)
    assert is_put_off(hosts) and not is_put_off(hosts, "b")


def test_what_is_not_the_hosts_fault_costs_it_nothing():
    hosts = Hosts(per_host=1, timeout_s=10.0)
    for status in ("not_found", "robots", "refused", "too_large"):
        for _ in range(100):
            answered(hosts, 0.1, status)
    assert not is_put_off(hosts) and hosts.slowest(3) == {}


def test_the_slowest_hosts_are_named_with_their_seconds_dearest_first():
    hosts = Hosts(per_host=1, timeout_s=10.0)
    for host, seconds in {"a": 6.0, "b": 9.0, "c": 7.0, "d": 0.1}.items():
        answered(hosts, seconds, None, host)
    assert list(hosts.slowest(2).items()) == [("b", 9.0), ("c", 7.0)]


def test_a_host_that_drips_is_put_off_and_another_is_fetched_meanwhile():
    """40 URLs of one host that drips for minutes; without a budget they hold 8 threads for 10 s."""
    with web.serve({"/drip": web.drip(b"x" * 10_000, 0.05), "/good": b"image"}) as site:
        shared, statuses = client(timeout_s=0.5, per_host=2, allow=("127.0.0.1", "localhost")), []

        def fetch(url: str) -> None:
            try:
                statuses.append(shared.open(Request(url)).read().decode())
            except FetchError as error:
                statuses.append(error.status)

        left = [site.url("/drip")] * 40 + [site.url("/good", "localhost")]

        def work() -> None:
            while left:
                fetch(left.pop())

        start = time.monotonic()
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert statuses.count("image") == 1
    assert 10 <= statuses.count("timeout") <= 12 and statuses.count("put_off") >= 28
    assert time.monotonic() - start < 9.0, "40 x 0.5 s at two at a time"
    assert list(shared.hosts.slowest(1)) == ["127.0.0.1"]


def test_a_host_that_is_put_off_is_not_asked_again_in_this_run():
    with web.serve({"/": web.status(500)}) as site:
        shared = client(timeout_s=4.0)
        for _ in range(40):
            with pytest.raises(FetchError, match="server_error"):
                shared.open(Request(site.url("/")))
        asked = len(site.requests)
        with pytest.raises(
            FetchError, match=r"put_off: 127\.0\.0\.1: [0-9]+ s lost to its failures"
        ):
            shared.open(Request(site.url("/")))
        assert len(site.requests) == asked == 40


# robots.txt at the URL's expense


def seconds_of(url: str, **changes) -> float:
    start = time.monotonic()
    assert why_not(url, **changes) == "timeout"
    return time.monotonic() - start


def test_a_slow_robots_txt_at_every_redirect_costs_the_urls_own_time():
    """Five hops from host to host, each with a robots.txt that takes most of the time-out."""
    pages = {"/robots.txt": web.after(0.6, web.body(b""))}
    names = ["127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0177.1", "2130706433"]
    with web.serve(pages) as site:  # each notation is an origin of its own
        for i, name in enumerate(names[1:]):
            pages[f"/{i}"] = web.redirect(site.url(f"/{i + 1}", name))
        asked = dict(respect_robots=True, timeout_s=1.0, max_redirects=20, retries=0)
        assert seconds_of(site.url("/0"), **asked) < 2.0
        assert len(site.requests) <= 3, "a robots.txt, a page, and the next robots.txt"


def test_a_robots_txt_that_never_comes_is_asked_as_often_as_a_url_is_tried_and_then_no_more():
    with web.serve({"/robots.txt": web.never, "/a": b"image"}) as site:
        shared = client(respect_robots=True, timeout_s=0.5, retries=1)
        for _ in range(5):
            with pytest.raises(FetchError, match=r"timeout: robots\.txt of 127\.0\.0\.1"):
                shared.open(Request(site.url("/a")))
        assert site.paths() == ["/robots.txt"] * 2


def test_a_time_that_earlier_hops_used_up_is_not_held_against_a_later_host():
    pages = {"/robots.txt": web.after(0.8, web.body(b"")), "/image": b"image"}
    with web.serve(pages) as good:
        late = web.after(1.5, web.redirect(good.url("/image")))
        shared = client(respect_robots=True, timeout_s=2.0)
        with (
            web.serve({"/robots.txt": b"", "/": late}) as hop,
            pytest.raises(FetchError, match="timeout"),
        ):
            shared.open(Request(hop.url("/")))
        assert shared.open(Request(good.url("/image"))).read() == b"image"


def test_a_host_whose_images_take_seconds_to_decode_is_put_off_and_another_is_not(
    tmp_path, monkeypatch
):
    """Each within every limit of an image: a thousand of them would have stopped a list for hours."""
    monkeypatch.setattr(hosts, "SLOW_DECODING_S", 0.2)  # a fast machine takes no second
    asked = rules(timeout_s=0.5, max_pixels=50_000_000, respect_robots=False)
    client, store = (
        img2dataset_child._client(asked, tmp_path),
        img2dataset_child.CanonicalResizer(asked, tmp_path),
    )
    with web.serve(
        {"/bomb.jpg": bombs.jpeg_of_scans(7000, 54), "/good.jpg": picture(9, 9)}
    ) as server:
        bomb, errors = server.url("/bomb.jpg"), [None]
        early = client.open(Request(bomb))
        while not errors[-1] and len(errors) < 20:
            _, body, error = img2dataset_child.fetch_row(client, (0, bomb))
            errors.append(error or store(body)[-1])
        assert 1 < len(errors) < 15 and errors[-1].startswith("put_off: 127.0.0.1: ")
        assert store(early)[-1] == errors[-1], "though it was fetched before"
        other = server.url("/good.jpg", "localhost")
        assert store(client.open(Request(other)))[-1] is None
    img2dataset_child._decoder(asked).close()
