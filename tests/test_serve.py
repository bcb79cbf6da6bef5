"""The little web page: type, see both sides, click, see the map; and who may reach it."""

import io
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import browser, worlds
from support import server as web

from pipeline.core.errors import PipelineError

pytest.importorskip("fastapi", reason="needs the extra web")
pytest.importorskip("uvicorn", reason="needs the extra web")

from pipeline.explore.query_vectors import Queries
from pipeline.explore.search import Collection
from pipeline.explore.serve import LOCAL, listen, make_app, make_server, serve

TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def data(finished_world) -> Path:
    return finished_world


@contextmanager
def running(app):
    """The address of a server that answers until the block ends."""
    with listen("127.0.0.1", 0, public=False) as listener:
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def site(data):
    with running(make_app(data, None, LOCAL, TOKEN)) as address:
        yield f"{address}/{TOKEN}"


def get(address: str, **headers) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers["content-type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], error.read()


def test_the_page_shows_what_the_search_finds(site, data):
    status, _, body = get(f"{site}/?q=a+red+circle")
    found = re.findall(rf"/{TOKEN}/look/(\w+)\?q=a%20red%20circle", body.decode())
    hits = Collection(data).search(Queries(data).text("a red circle"), 12)
    assert status == 200
    assert found == [hit.image_id for hit in [*hits.student, *hits.teacher]]


def test_the_map_is_the_overlay_of_the_students_cosines(site, data):
    key = Collection(data).search(Queries(data).text("a red circle"), 1).student[0].image_id
    status, kind, body = get(f"{site}/map/{key}?q=a+red+circle")
    assert (status, kind) == (200, "image/png")
    first = np.asarray(Image.open(io.BytesIO(body)))
    second = np.asarray(Image.open(io.BytesIO(get(f"{site}/map/{key}?q=a+blue+square")[2])))
    assert first.shape == (320, 320, 3)
    assert (first != second).any()  # another text, another map
    assert get(f"{site}/image/{key}")[1] == "image/jpeg"
    assert get(f"{site}/weights/{key}")[1] == "image/png"


def test_a_text_that_cannot_be_embedded_is_explained(site):
    status, _, body = get(f"{site}/?q=never+seen")
    assert status == 400
    assert b"no stored embedding" in body and b"a red circle" in body


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_text_shows_the_form(site, text):
    status, _, body = get(f"{site}/?q={urllib.parse.quote(text)}")
    assert status == 200 and b"<form" in body


def test_typed_markup_stays_text(site):
    body = get(f"{site}/?q={urllib.parse.quote('<script>alert(1)</script>')}")[2]
    assert b"<script" not in body and b"&lt;script" in body


@pytest.mark.parametrize("path", ["/map/none?q=a+red+circle", "/look/none?q=x", "/image/..%2fx"])
def test_an_unknown_image_is_not_found(site, path):
    assert get(site + path)[0] == 404


def test_another_sites_name_is_refused(site):
    """A page elsewhere whose name is made to point here must not read the collection."""
    assert get(f"{site}/?q=a+red+circle", Host="evil.example")[0] == 400


PATHS = [
    "",
    "/",
    "/?q=a+red+circle",
    "/image/{key}",
    "/map/{key}?q=x",
    "/weights/{key}",
    "/look/{key}?q=x",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", ["", "/x", f"/{TOKEN}x", f"/{TOKEN[:-1]}", "/%00", "//", "/é"])
def test_without_the_token_nothing_is_told(site, data, path, token):
    """Neither to another user of this machine nor to an <img> of another page: an image that is
    there and one that is not give the same answer, byte for byte."""
    key = Collection(data).search(Queries(data).text("a red circle"), 1).student[0].image_id
    root = site.removesuffix(f"/{TOKEN}") + urllib.parse.quote(token, safe="/%")
    answers = {get(root + path.format(key=name)) for name in (key, "none")}
    assert len(answers) == 1
    [(status, _, body)] = answers
    assert status == 403 and b"pipeline serve" in body and key.encode() not in body


@pytest.mark.parametrize("origin", ["cross-site", "same-site", "nonsense"])
@pytest.mark.parametrize("path", PATHS[1:])
def test_a_page_of_another_site_is_refused_even_with_the_token(site, path, origin):
    """same-site is another port of this machine."""
    headers = {"Sec-Fetch-Site": origin}
    assert get(site + path.format(key="none"), **headers)[0] == 403
    assert get(site + "/", **{"Sec-Fetch-Site": "same-origin"})[0] == 200


@pytest.mark.parametrize("path", ["/", "/image/none", "/nowhere", "/../x"])
def test_every_answer_forbids_other_sites_to_embed_it(site, path):
    for root in (site, site.removesuffix(TOKEN)):
        try:
            headers = urllib.request.urlopen(root + path, timeout=30).headers
        except urllib.error.HTTPError as error:
            headers = error.headers
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]


def test_each_start_draws_a_token_of_its_own(data, monkeypatch):
    """No server starts: what it would serve is asked instead."""
    from pipeline.explore import serve as module

    said = []
    monkeypatch.setattr(module.uvicorn.Server, "run", lambda *_, **__: None)
    for _ in range(2):
        serve(data, None, "127.0.0.1", 0, public=False, announce=said.append)
    tokens = [re.fullmatch(r"http://127\.0\.0\.1:\d+/([\w-]{32})/  .*", line)[1] for line in said]
    assert tokens[0] != tokens[1]


PROBE = """
const done = arguments[arguments.length - 1];
const loaded = (tag, key) => url => new Promise(tell => {
    const element = document.createElement(tag);
    if (tag == 'link') element.rel = 'stylesheet';
    element.onload = () => tell('loaded'); element.onerror = () => tell('failed');
    element[key] = url; document.body.append(element);
});
const fetched = mode => url => fetch(url, {mode}).then(() => 'loaded', () => 'failed');
const timed = url => fetch(url, {mode: 'no-cors'}).catch(() => 0).then(() => {
    const entry = performance.getEntriesByName(url).at(-1);
    return entry ? [entry.responseStatus, entry.encodedBodySize].join() : 'nothing';
});
const probes = [loaded('img', 'src'), loaded('script', 'src'), loaded('link', 'href'),
                loaded('object', 'data'), fetched('no-cors'), fetched('cors'), timed];
const ask = async url => { const told = []; for (const probe of probes) told.push(await Promise.race(
    [probe(url), new Promise(tell => setTimeout(tell, 3000, 'nothing'))])); return told; };
Promise.all(arguments[0].map(ask)).then(done);
"""


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_another_page_in_the_browser_cannot_tell_whether_an_image_is_here(
    site, data, tmp_path, name
):
    """A page of another port, for the browser the same site or another one, embeds and asks in every
    way it knows: an image that is there and one that is not answer alike, and none is shown."""
    key = Collection(data).search(Queries(data).text("a red circle"), 1).student[0].image_id
    root = site.removesuffix(f"/{TOKEN}")
    pages = {"/": web.body(b"<!doctype html><body>", Content_Type="text/html")}
    pages |= {"/own.jpg": web.body(worlds.picture(0, kind="JPEG"), Content_Type="image/jpeg")}
    with web.serve(pages) as evil, browser.chromium(tmp_path, width=800) as driver:
        driver.get(evil.url("/", name))
        urls = [f"{place}/image/{which}" for place in (root, site) for which in (key, "none")]
        *asked, own = driver.execute_async_script(PROBE, [*urls, evil.url("/own.jpg", name)])
        assert own[0] == own[4] == "loaded", "the page could tell, were it told"
        assert asked[0] == asked[1] and asked[2] == asked[3]
        assert all("loaded" not in told for told in asked), asked
        driver.get(f"{site}/")
        shown = driver.execute_async_script(
            "const i = new Image(), done = arguments[1]; i.onload = () => done(i.naturalWidth);"
            "i.onerror = () => done(0); i.src = arguments[0]", f"{site}/image/{key}"
        )  # fmt: skip
        assert shown > 0, "the local page itself is told"


def test_nothing_comes_from_elsewhere(site):
    body = get(f"{site}/?q=a+red+circle")[2].decode()
    assert not re.search(rf"(?:src|href|action)=\"(?!/{TOKEN}/|data:|#)", body)
    assert "<script" not in body


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_other_machines_are_let_in_only_on_demand(host):
    with pytest.raises(PipelineError, match="--public"):
        listen(host, 0, public=False)


def test_public_listens_on_every_address():
    with listen("0.0.0.0", 0, public=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PipelineError, match=f"port {port} is in use"):
            listen("127.0.0.1", port, public=False)


def test_serving_needs_a_student(small_world):
    with pytest.raises(PipelineError, match="Run `pipeline distill` first"):
        serve(small_world.data, None, "127.0.0.1", 0, public=False, announce=print)


@pytest.mark.parametrize("width", [1000, 390])
def test_typing_searching_and_clicking_in_a_browser(site, tmp_path, width):
    with browser.chromium(tmp_path, width=width) as driver:
        driver.get(site + "/")
        driver.find_element("name", "q").send_keys("a red circle\n")
        sides = [heading.text for heading in driver.find_elements("tag name", "h2")]
        assert sides == ["by student", "by teacher"]
        assert not browser.too_wide(driver)
        driver.find_element("css selector", "ol a").click()
        alt = driver.find_element("id", "map").get_attribute("alt")
        assert "a red circle" in alt
        shown = "const map = document.querySelector('#map'), done = arguments[0];"
        shown += "map.decode().then(() => done(map.naturalWidth), () => done(0))"
        assert driver.execute_async_script(shown) == 320
        assert not browser.too_wide(driver)
        assert browser.complaints(driver) == []
        assert all(url.startswith(site) for url in browser.requests(driver))
