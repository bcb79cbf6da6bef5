"""The little web page: type, see both sides, click, see the map; and who may reach it."""

import io
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager

import browser
import numpy as np
import pytest
import seeing
from PIL import Image

from pipeline.core.errors import PipelineError

pytest.importorskip("fastapi", reason="needs the extra web")
pytest.importorskip("uvicorn", reason="needs the extra web")

from pipeline.explore.query_vectors import Queries
from pipeline.explore.search import search
from pipeline.explore.serve import LOCAL, listen, make_app, make_server, serve


@pytest.fixture(scope="module")
def data(small_world, tmp_path_factory):
    return seeing.finished(small_world, tmp_path_factory.mktemp("finished"))


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
    with running(make_app(data, None, LOCAL)) as address:
        yield address


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
    found = re.findall(r"/look/(\w+)\?q=a%20red%20circle", body.decode())
    hits = search(data, Queries(data).text("a red circle"), 12)
    assert status == 200
    assert found == [hit.image_id for hit in [*hits.student, *hits.teacher]]


def test_the_map_is_the_overlay_of_the_students_cosines(site, data):
    key = search(data, Queries(data).text("a red circle"), 1).student[0].image_id
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


def test_nothing_comes_from_elsewhere(site):
    body = get(f"{site}/?q=a+red+circle")[2].decode()
    assert not re.search(r"(?:src|href|action)=\"(?!/|data:|#)", body)
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
        driver.get(site)
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
