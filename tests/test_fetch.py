"""Real img2dataset, real servers: every way a fetch can go wrong, and who survives whom."""

import io
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import server as web
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.fetch import img2dataset
from pipeline.fetch.img2dataset import RETRYABLE, FetchRules, fetch_lists, split_error

SECRET = b"\x89PNG secret bytes below nobody's root"


def picture(width: int, height: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, kind)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("picture.jpg", picture(8, 8))
    return file.getvalue()


def rules(**changes) -> FetchRules:
    return FetchRules(
        **dict(
            timeout_s=2.0,
            max_bytes=300_000,
            max_pixels=2_000_000,
            max_redirects=3,
            retries=0,
            allow=("127.0.0.0/8", "localhost"),
            root=None,
            user_agent="extrahead/0 (+img2dataset; test)",
            respect_robots=True,
            per_host=16,
            image_size=64,
            quality=90,
        )
        | changes
    )


def write_list(path: Path, urls: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image_id": [f"id of {u}" for u in urls], "url": urls}), path)


def rows_of(shard: Path) -> dict[str, dict]:
    return {row["url"]: row for row in pq.read_table(shard).to_pylist()}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """One run over all the URLs that servers and list writers can spoil: (rows by name, server)."""
    folder = tmp_path_factory.mktemp("hostile")
    certificate = web.make_certificate(folder)
    root = folder / "root"
    root.mkdir()
    (root / "a picture.png").write_bytes(picture(30, 20, "PNG"))
    (folder / "secret.png").write_bytes(SECRET)
    (root / "link.png").symlink_to(folder / "secret.png")
    os.mkfifo(root / "fifo.png")
    good = picture(200, 100)
    pages = {
        "/good.jpg": good,
        "/big.jpg": picture(1500, 1500),
        "/page.jpg": b"<html>no image</html>",
        "/truncated.jpg": good[: len(good) // 2],
        "/archive.jpg": archive(),
        "/pickle.jpg": b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",
        "/empty.jpg": b"",
        "/strip.png": picture(66_000, 1, "PNG"),
        "/never.jpg": web.never,
        "/reset.jpg": web.reset,
        "/short.jpg": web.short_of(50_000, good),
        "/huge_length.jpg": web.short_of(10**12, good),
        "/endless.jpg": web.endless,
        "/drip.jpg": web.drip(good, 0.1),
        "/gone.jpg": web.status(410),
        "/error.jpg": web.status(500),
        "/busy.jpg": web.body(b"", 429, Retry_After="60"),
        "/loop.jpg": web.redirect("/loop.jpg"),
        "/moved.jpg": web.redirect("/good.jpg"),
        "/to_file.jpg": web.redirect(f"file://{folder}/secret.png"),
        "/to_private.jpg": web.redirect("http://10.0.0.1/x.jpg"),
        "/tagged.jpg": web.body(good, X_Robots_Tag="noimageai"),
        "/robots.txt": b"User-agent: img2dataset\nDisallow: /*/forbidden.jpg$\n",
        "/a/forbidden.jpg": good,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate[0]))
        patch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
        with web.serve(pages) as http, web.serve(pages, certificate) as https:
            urls = {path: http.url(path) for path in [*pages, "/missing.jpg"]}
            urls |= {
                "https": https.url("/good.jpg", "localhost"),
                "https for another name": https.url("/good.jpg"),
                "http to an https port": https.url("/good.jpg").replace("https", "http"),
                "no server": "http://127.0.0.1:9/x.jpg",
                "no such host": "http://nowhere.invalid/x.jpg",
                "metadata": "http://169.254.169.254/latest/meta-data",
                "private": "http://192.168.1.1/x.jpg",
                "ftp": "ftp://127.0.0.1/x.jpg",
                "data": "data:image/png;base64,AAAA",
                "nonsense": "not a url",
                "local": "file:a%20picture.png",
                "local missing": "file:none.png",
                "local ..": "file:../secret.png",
                "local %2e": "file:%2e%2e/secret.png",
                "local /": f"file://{folder}/secret.png",
                "local link": "file:link.png",
                "local fifo": "file:fifo.png",
            }
            write_list(folder / "lists" / "00007.parquet", list(urls.values()))
            shards = fetch_lists(folder / "lists", folder / "out", rules(root=root), 1, 16)
            (shard,) = list(shards)
            assert shard.name == "00007.parquet"
            rows = rows_of(shard)
    assert len(rows) == len(urls), "rows in = rows out"
    return {name: rows[url] for name, url in urls.items()}, http


EXPECTED = {
    "/page.jpg": "not_an_image",
    "/truncated.jpg": "not_an_image",
    "/archive.jpg": "not_an_image",
    "/pickle.jpg": "not_an_image",
    "/empty.jpg": "not_an_image",
    "/big.jpg": "too_large",
    "/strip.png": "too_large",
    "/huge_length.jpg": "too_large",
    "/endless.jpg": "too_large",
    "/never.jpg": "timeout",
    "/drip.jpg": "timeout",
    "/reset.jpg": "unreachable",
    "/short.jpg": "unreachable",
    "https for another name": "unreachable",
    "http to an https port": "unreachable",
    "no server": "unreachable",
    "no such host": "unreachable",
    "/missing.jpg": "not_found",
    "/gone.jpg": "not_found",
    "local missing": "not_found",
    "/error.jpg": "server_error",
    "/busy.jpg": "server_error",
    "/loop.jpg": "refused",
    "/to_file.jpg": "refused",
    "/to_private.jpg": "refused",
    "metadata": "refused",
    "private": "refused",
    "ftp": "refused",
    "data": "refused",
    "nonsense": "refused",
    "local ..": "refused",
    "local %2e": "refused",
    "local /": "refused",
    "local link": "refused",
    "local fifo": "refused",
    "/tagged.jpg": "robots",
    "/a/forbidden.jpg": "robots",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_failed_row_keeps_its_id_says_why_and_holds_no_bytes(hostile, name):
    row = hostile[0][name]
    assert split_error(row["error_message"])[0] == EXPECTED[name], row["error_message"]
    assert row["status"] != "success"
    assert row["image_id"] == f"id of {row['url']}"
    assert row["jpg"] is None


def test_a_refusal_for_politeness_names_the_rule(hostile):
    found = {
        name: hostile[0][name]["error_message"] for name in ("/a/forbidden.jpg", "/tagged.jpg")
    }
    assert found == {
        "/a/forbidden.jpg": "robots: robots.txt of 127.0.0.1: Disallow: /*/forbidden.jpg$",
        "/tagged.jpg": "robots: X-Robots-Tag: noimageai",
    }


def test_a_server_that_is_busy_is_asked_again_another_time_and_its_wish_recorded(hostile):
    status, detail = split_error(hostile[0]["/busy.jpg"]["error_message"])
    assert status in RETRYABLE and detail == "HTTP 429, asks for a pause of 60 s"


@pytest.mark.parametrize("name", ["/good.jpg", "/moved.jpg", "https"])
def test_a_good_image_arrives_shrunk_by_its_shorter_side(hostile, name):
    row = hostile[0][name]
    assert (row["status"], row["error_message"]) == ("success", None)
    assert (row["original_width"], row["original_height"]) == (200, 100)
    assert Image.open(io.BytesIO(row["jpg"])).size == (row["width"], row["height"]) == (128, 64)


def test_a_local_image_below_the_root_is_read(hostile):
    row = hostile[0]["local"]
    assert (row["status"], row["width"], row["height"]) == ("success", 30, 20)


def test_requests_carry_the_honest_name(hostile):
    agents = {headers["User-Agent"] for _, headers in hostile[1].requests}
    assert agents == {"extrahead/0 (+img2dataset; test)"}


def test_robots_txt_is_asked_once_per_host_and_worker(hostile):
    asked_by_the_list_too = 1
    assert hostile[1].paths().count("/robots.txt") == 1 + asked_by_the_list_too
    assert "/a/forbidden.jpg" not in hostile[1].paths()


def test_several_lists_keep_their_names_and_rows_and_may_be_deleted(tmp_path):
    pages = {f"/{i}.png": picture(20 + i, 20, "PNG") for i in range(12)}
    names = ["00003.parquet", "00011.parquet", "00012.parquet"]
    with web.serve(pages) as server:
        for i, name in enumerate(names):
            write_list(
                tmp_path / "lists" / name,
                [server.url(f"/{j}.png") for j in range(4 * i, 4 * i + 2 + i)],
            )
        found = {}
        for shard in fetch_lists(tmp_path / "lists", tmp_path / "out", rules(), 2, 4):
            found[shard.name] = sorted(row["width"] for row in rows_of(shard).values())
            shard.unlink()
    assert found == {names[0]: [20, 21], names[1]: [24, 25, 26], names[2]: [28, 29, 30, 31]}
    assert web.wait_until(lambda: not running_in(tmp_path), 10)


def running_in(folder: Path) -> list[psutil.Process]:
    """Living processes that work in a folder, or in one below it, by their open log."""
    found = []
    for process in psutil.process_iter():
        try:
            opened = os.readlink(f"/proc/{process.pid}/fd/1")
            if opened.startswith(str(folder)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


PARENT = """
import pickle, sys
from pathlib import Path
from pipeline.fetch.img2dataset import fetch_lists
lists, out, rules = pickle.load(sys.stdin.buffer)
print(list(fetch_lists(lists, out, rules, 2, 2)))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_when_the_caller_is_ended_so_is_every_process_of_img2dataset(tmp_path, sent):
    with web.serve({"/never.jpg": web.never}) as server:
        write_list(tmp_path / "lists" / "00000.parquet", [server.url("/never.jpg")])
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        job = tmp_path / "lists", tmp_path / "out", rules(timeout_s=60, respect_robots=False)
        parent.stdin.write(pickle.dumps(job))
        parent.stdin.close()
        assert web.wait_until(lambda: server.requests)
        assert len(running_in(tmp_path)) >= 3  # leader, logger, workers
        parent.send_signal(sent)
        assert parent.wait(30) != 0
        assert web.wait_until(lambda: not running_in(tmp_path), 10)


def test_img2dataset_dying_is_an_error_that_names_the_shard_and_the_log(tmp_path):
    def kill_the_leader(request):
        os.kill(leader_in(tmp_path).pid, signal.SIGKILL)
        web.never(request)

    with web.serve({"/fatal.jpg": kill_the_leader}) as server:
        write_list(tmp_path / "lists" / "00005.parquet", [server.url("/fatal.jpg")])
        with pytest.raises(PipelineError, match=r"exit code -9.*00005.*img2dataset\.log"):
            list(
                fetch_lists(tmp_path / "lists", tmp_path / "out", rules(respect_robots=False), 1, 2)
            )
    assert web.wait_until(lambda: not running_in(tmp_path), 10)


def leader_in(folder: Path) -> psutil.Process:
    return next(p for p in running_in(folder) if os.getpgid(p.pid) == p.pid)


@pytest.mark.slow
def test_a_worker_that_dies_and_takes_its_shard_along_is_noticed(tmp_path, monkeypatch):
    """The pool waits for ever for a worker that the system killed for its memory."""
    monkeypatch.setattr(img2dataset, "STALL_GRACE_S", 15.0)
    monkeypatch.setattr(img2dataset, "LONGEST_PAUSE_S", 0.0)

    def kill_the_worker(request):
        port = request.client_address[1]
        for process in running_in(tmp_path):
            if any(c.laddr and c.laddr.port == port for c in process.net_connections()):
                process.kill()

    with web.serve({"/fatal.jpg": kill_the_worker}) as server:
        write_list(tmp_path / "lists" / "00000.parquet", [server.url("/fatal.jpg")])
        with pytest.raises(PipelineError, match="did nothing for 21 s"):
            list(
                fetch_lists(tmp_path / "lists", tmp_path / "out", rules(respect_robots=False), 1, 2)
            )
        assert server.paths() == ["/fatal.jpg"]


def test_leaving_the_loop_early_ends_img2dataset(tmp_path):
    with web.serve({"/a.png": picture(9, 9, "PNG"), "/never.jpg": web.never}) as server:
        write_list(tmp_path / "lists" / "00000.parquet", [server.url("/a.png")])
        write_list(tmp_path / "lists" / "00001.parquet", [server.url("/never.jpg")])
        shards = fetch_lists(tmp_path / "lists", tmp_path / "out", rules(timeout_s=60), 2, 2)
        assert next(shards).name == "00000.parquet"
        shards.close()
    assert web.wait_until(lambda: not running_in(tmp_path), 10)


def test_a_raw_shard_may_be_short_but_neither_longer_than_its_list_nor_broken(tmp_path):
    path = tmp_path / "00000.parquet"
    write_list(path, ["a", "b"])
    img2dataset._require_whole(path, 3)
    with pytest.raises(PipelineError, match="has 2 rows, its list 1"):
        img2dataset._require_whole(path, 1)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PipelineError, match="broken"):
        img2dataset._require_whole(path, 3)


def test_importing_fetch_does_not_import_img2dataset():
    code = "import sys, pipeline.fetch.img2dataset; print('img2dataset' in sys.modules, 'cv2' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
