"""report.html: complete, self-contained, readable by anyone, the same every time."""

import base64
import io
import json
import re
import time
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import browser, seeing
from support.finished import evaluate_config

from pipeline.core.provenance import evaluation_of
from pipeline.core.records import MetricGroup, Recipe
from pipeline.data import database
from pipeline.data.runs import append_run
from pipeline.explore import panels, report_charts
from pipeline.explore.metrics_table import in_words
from pipeline.explore.panels import Tile
from pipeline.explore.query_vectors import Queries
from pipeline.explore.report import report, write_report
from pipeline.explore.throughput import finished_runs, throughput
from pipeline.models.student import Student


class Page(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.html = [], "", html
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " "  # between cells

    def handle_data(self, data):
        self.text += data

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def data(finished_world) -> Path:
    return finished_world


@pytest.fixture(scope="module")
def write(data):
    """The call that the evaluate stage makes."""
    return partial(
        write_report,
        data=data,
        student=Student.load(data / "student"),
        index=data / "evaluation" / "index",
        measured=evaluation_of(data),
        config=evaluate_config(),
    )


@pytest.fixture(scope="module")
def file(write, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(path)
    return path


@pytest.fixture(scope="module")
def page(file) -> Page:
    return Page(file.read_text())


def test_every_status_and_every_reason_of_the_data_is_counted(page, data):
    cells = re.sub(r"\s+", " ", page.text)
    connection = database.connect(data)
    statuses = connection.execute("SELECT status, count(*) FROM images GROUP BY status").fetchall()
    assert len(statuses) >= 3  # good ones, failures, a repeated url
    reasons = connection.execute(
        "SELECT reason, count(*) FROM selection WHERE NOT keep GROUP BY reason"
    ).fetchall()
    assert len(reasons) >= 2
    for name, count in [*statuses, *reasons]:
        assert re.search(rf"\b{re.escape(name)} ?{count}\b", cells), name


def test_every_figure_stands_beside_its_floor_and_ceiling(page, write):
    groups = write.keywords["measured"].groups()
    for group in ("fidelity", "student_to_teacher", "text_to_image", "zero_shot"):
        assert groups[group].metrics
        for name, metric in groups[group].metrics.items():
            ends = metric.value, metric.low, metric.high, metric.floor, metric.ceiling
            row = r"\D*?".join(re.escape(f"{abs(value):.3f}") for value in ends)
            assert re.search(
                rf"{re.escape(in_words(f'{group} {name}'))}\D.*?{row}", page.text, re.DOTALL
            ), name


def test_every_picture_is_inside_and_whole(page):
    sources = [image["src"] for image in page.all("img")]
    sources += [source["srcset"] for source in page.all("source")]
    assert len(sources) > 30
    for source in sources:
        kind, encoded = source.split(",", 1)
        assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            image.load()


def test_every_picture_says_its_numbers(page):
    for image in page.all("img"):
        assert len(image["alt"]) > 10
        assert re.search(r"\d", image["alt"]), image["alt"]


def test_nothing_is_fetched_and_nothing_runs(page):
    assert not page.all("script") and not page.all("iframe") and not page.all("object")
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), attributes
        assert not any(name.startswith("on") for name in attributes)


def test_keyboard_and_screen_reader_find_their_way(page):
    assert page.all("html") == [{"lang": "en"}]
    ids = {attributes.get("id") for _, attributes in page.tags}
    links = [link["href"][1:] for link in page.all("a")]
    assert links[0] == "main" and set(links) <= ids
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in cell for cell in page.all("th"))


def test_the_prompts_are_drawn_where_an_image_has_no_boxes(page):
    drawn = [i["alt"] for i in page.all("img") if i["alt"].startswith("Cosine of each patch to")]
    assert drawn and all("the text 'a red circle'" in alt for alt in drawn)


def test_a_label_names_an_image_without_caption(tmp_path):
    seeing.handmade(tmp_path, named_by="label")
    assert panels._texts_of(tmp_path, "bread", [])[0] == "a picture of bread"


def test_what_means_little_is_said_beside_the_metrics(page, data):
    assert evaluation_of(data).images < 50
    assert f"Mind: {evaluation_of(data).images} held-out images are few" in page.text


def test_a_prompt_that_was_never_embedded_says_so(page):
    assert "never embedded" in page.text
    assert "This text has no stored embedding" in page.text


def test_the_search_shows_the_best_image_of_each_side(page, write, data):
    from pipeline.explore.search import Collection

    hits = Collection(data).search(Queries(data).text("a red circle"), 1)
    for by, (hit,) in (("student", hits.student), ("teacher", hits.teacher)):
        assert any(
            image["alt"] == f"Number 1 by the {by}, cosine {hit.score:.3f}: {hit.caption}"
            for image in page.all("img")
        )


def test_the_same_inputs_give_the_same_bytes(write, file, tmp_path):
    write(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == file.read_bytes()


def test_captions_of_strangers_stay_text(write, tmp_path, monkeypatch):
    evil = "<script>alert(1)</script>\"'>"
    tile = Tile("data:image/png;base64,", f"{evil} 1", evil)
    groups = [{"title": evil, "tiles": [tile]}]
    monkeypatch.setattr("pipeline.explore.panels.patch_groups", lambda *_: groups)
    write(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html


def test_the_report_command_adds_the_teachers_attention_and_throughput(data, small_world, tmp_path):
    from pipeline.models.teacher_patches import row_viewer

    teacher = Queries(data, small_world.card).teacher
    out = tmp_path / "report.html"
    report(data, out, evaluate_config(), row_viewer(teacher), ["a note"])
    page = Page(out.read_text())
    assert any("Teacher's attention" in image["alt"] for image in page.all("img"))
    (alt,) = [image["alt"] for image in page.all("img") if "images per second" in image["alt"]]
    assert "student, 1 run: cosine" in alt and "teacher, 1 run: cosine 1.000" in alt
    assert "student, extra-head, 0.0" in page.text and "teacher tiny" in page.text
    assert "a note" in page.text


def test_runs_of_other_pools_are_baselines(tmp_path):
    for stage, metrics in (
        ("evaluate", {"fidelity.cosine": 0.7, "student.pool": "mean"}),
        ("evaluate", {"fidelity.cosine": 0.9, "student.pool": "extra-head"}),
        ("evaluate", {"fidelity.cosine": 0.8}),  # of an earlier version
        ("distill", {"loss": 3.0}),
    ):
        metrics |= {"student.parameters": 2_000_000, "student.image_size": 64}
        append_run(tmp_path, stage, "0" * 64, Recipe(), metrics, "cpu", time.monotonic(), 50, 0.5)
    runs = finished_runs(tmp_path)
    assert sorted(run["series"] for run in runs) == ["baseline: mean", "student", "student"]
    assert {run["images_per_second"] for run in runs} == {100}
    alt = throughput(runs, floor=0.3)["alt"]
    assert "student, 2 runs: cosine 0.900 at 100 images per second" in alt
    assert "mean embedding: 0.300" in alt


def test_the_stages_report_says_where_the_rest_is(page):
    assert "The teacher's attention and the speed of every run: run `pipeline report`" in page.text


def test_a_report_without_runs_has_no_chart_of_them(page, tmp_path):
    assert throughput([], 0.3) is None
    assert not any("images per second" in image["alt"] for image in page.all("img"))


def test_a_figure_that_is_left_out_says_why(write, tmp_path):
    left_out = MetricGroup(left_out="no class has a vector")
    measured = write.keywords["measured"].model_copy(update={"zero_shot": left_out})
    write(tmp_path / "report.html", measured=measured)
    assert "Left out, zero_shot: no class has a vector" in (tmp_path / "report.html").read_text()


def test_every_figure_says_what_it_means(page):
    named = re.findall(r"<th scope=\"row\">([\w@ ]+) <small>([^<;]*)", page.html)
    assert {name for name, _ in named} >= {"zero shot accuracy", "text to image rank correlation"}
    assert all(meaning for _, meaning in named)


def test_a_curve_is_drawn_from_the_log(page):
    alts = [image["alt"] for image in page.all("img")]
    (cosine,) = [alt for alt in alts if alt.startswith("Cosine to the teacher, validation split")]
    assert "val_floor" in cosine and "over 4 steps" in cosine


def test_a_mosaic_keeps_every_tile():
    tiles = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    sheet = report_charts.mosaic(tiles, 2)
    assert sheet.shape == (8, 7, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, 4, 0] == 1 and sheet[3, 0, 0] == 2
    assert sheet[6, 4, 0] == 255  # no sixth tile


@pytest.mark.parametrize(("width", "dark"), [(1000, False), (390, True)])
def test_a_browser_opens_the_report_without_a_word(file, tmp_path, width, dark):
    with browser.chromium(tmp_path, width=width, dark=dark) as driver:
        driver.get(file.as_uri())
        assert browser.complaints(driver) == []
        assert browser.requests(driver) == [file.as_uri()]
        assert not browser.too_wide(driver)
        unseen = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert driver.execute_script(unseen) == 0
        paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert json.loads(f"[{paper[4:-1]}]") == ([21, 24, 29] if dark else [255, 255, 255])
