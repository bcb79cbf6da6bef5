"""Real img2dataset, real servers: every way a fetch can go wrong, and who survives whom."""

import io
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import bombs, worlds
from support import server as web
from support.fetching import picture, rules

from pipeline.core.errors import PipelineError
from pipeline.fetch import img2dataset
from pipeline.fetch.img2dataset import RETRYABLE, TRIES, fetch_lists, split_error
from pipeline.fetch.journal import FetchedRows, JournalWriter

SECRET = b"\x89PNG secret bytes below nobody's root"


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("picture.jpg", picture(8, 8))
    return file.getvalue()


def write_list(path: Path, urls: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image_id": [f"id of {u}" for u in urls], "url": urls}), path)


def rows_of(rows: FetchedRows) -> dict[str, dict]:
    """By URL."""
    return {row.url: asdict(row) for row in map(rows.get, rows)}


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
        "/scans.jpg": bombs.jpeg_of_scans(100, 1500),
        "/tile.tif": bombs.tiff_of_tile(5000),
        "/runs.bmp": bombs.bmp_of_runs(500),
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
            ((name, came),) = list(shards)
            assert name == "00007.parquet"
            rows = rows_of(came)
    assert len(rows) == len(urls), "rows in = rows out"
    return {name: rows[url] for name, url in urls.items()}, http


EXPECTED = {
    "/page.jpg": "not_an_image",
    "/truncated.jpg": "not_an_image",
    "/archive.jpg": "not_an_image",
    "/pickle.jpg": "not_an_image",
    "/empty.jpg": "not_an_image",
    "/scans.jpg": "undecodable",
    "/tile.tif": "undecodable",
    "/runs.bmp": "not_an_image",
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
        for name, came in fetch_lists(tmp_path / "lists", tmp_path / "out", rules(), 2, 4):
            found[name] = sorted(row["width"] for row in rows_of(came).values())
            came.delete()
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
        assert web.wait_until(lambda: server.requests, 240)
        assert len(running_in(tmp_path)) >= 3  # leader, logger, workers
        parent.send_signal(sent)
        assert parent.wait(30) != 0
        assert web.wait_until(lambda: not running_in(tmp_path), 10)


def kill_leader(out: Path) -> None:
    os.kill(leader_in(out).pid, signal.SIGKILL)


def kill_worker(out: Path) -> None:
    """The one that fetches the list that was begun last."""
    begun = max(out.glob("attempt-*/raw/*.pid"), key=lambda path: path.stat().st_mtime_ns)
    os.kill(int(begun.read_text()), signal.SIGKILL)


def leader_in(folder: Path) -> psutil.Process:
    return next(p for p in running_in(folder) if os.getpgid(p.pid) == p.pid)


def journals_hold(out: Path, rows: int) -> bool:
    return len(FetchedRows(list(out.rglob("*.rows")))) >= rows


def fatal(kill, out: Path, times: int, data: bytes, finished: int):
    """A page whose request ends a process, so many times; then it is an image.

    finished: rows asked for before. img2dataset asks for the next while it writes the last.
    """
    left = [None] * times

    def answer(request):
        if left:
            left.pop()
            web.wait_until(lambda: journals_hold(out, finished), 10)
            kill(out)
            web.never(request)
        web.body(data)(request)

    return answer


@pytest.mark.parametrize("kill", [kill_worker, kill_leader])
def test_a_process_that_is_killed_costs_no_finished_row_and_none_is_fetched_again(tmp_path, kill):
    """As the kernel does when memory ends: img2dataset's pool would wait for ever."""
    pages = {f"/{i}.png": picture(20 + i, 20, "PNG") for i in range(5)}
    pages["/fatal.png"] = fatal(kill, tmp_path / "out", 1, picture(99, 20, "PNG"), 4)
    with web.serve(pages) as server:
        paths = [*list(pages)[:4], "/fatal.png", "/4.png"]
        write_list(tmp_path / "lists" / "00003.parquet", [server.url(path) for path in paths])
        asked = rules(respect_robots=False, timeout_s=60.0)
        ((_, came),) = fetch_lists(tmp_path / "lists", tmp_path / "out", asked, 1, 1)
        rows = rows_of(came)
        assert {rows[server.url(path)]["width"] for path in paths} == {20, 21, 22, 23, 24, 99}
        assert server.paths() == [
            "/0.png",
            "/1.png",
            "/2.png",
            "/3.png",
            *["/fatal.png"] * 2,
            "/4.png",
        ]
    assert web.wait_until(lambda: not running_in(tmp_path), 10)


@pytest.mark.slow
def test_a_row_that_ends_its_worker_every_time_is_lost_and_all_others_are_kept(tmp_path):
    pages = {f"/{i}.png": picture(20 + i, 20, "PNG") for i in range(6)}
    pages["/fatal.png"] = fatal(kill_worker, tmp_path / "out", 99, b"", 6)
    with web.serve(pages) as server:
        paths = list(pages)
        for name, some in {"00000": paths[:3], "00001": paths[3:], "00002": paths[:2]}.items():
            urls = [server.url(path) for path in some]
            write_list(tmp_path / "lists" / f"{name}.parquet", urls)
        asked = rules(respect_robots=False, timeout_s=60.0)
        shards = fetch_lists(tmp_path / "lists", tmp_path / "out", asked, 1, 1)
        found = {name: len(came) for name, came in shards}
        assert found == {"00000.parquet": 3, "00001.parquet": 3, "00002.parquet": 2}
        assert server.paths().count("/fatal.png") == TRIES
        assert all(server.paths().count(path) == 1 for path in paths[3:6])


def test_img2dataset_that_does_not_even_begin_is_an_error_that_names_the_shard_and_the_log(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(img2dataset, "_CHILD", "import sys; sys.exit({0!r} and 3)")
    write_list(tmp_path / "lists" / "00005.parquet", ["http://127.0.0.1:9/a"])
    with pytest.raises(PipelineError, match=r"exit code 3.*00005.*img2dataset\.log"):
        list(fetch_lists(tmp_path / "lists", tmp_path / "out", rules(), 1, 2))


def test_a_journal_that_was_cut_off_keeps_its_complete_rows(tmp_path):
    writer = JournalWriter(7, str(tmp_path), False, 5, None, "jpg")
    rows = [{"image_id": str(i), "error_message": "bad \udce9" if i else None} for i in range(3)]
    for i, row in enumerate(rows):
        writer.write(b"jpg" * i or None, None, None, row)
    writer.close()
    journal, size = tmp_path / "00007.rows", (tmp_path / "00007.rows").stat().st_size
    complete = [len(FetchedRows([cut_off(journal, length)])) for length in range(size + 1)]
    assert complete == sorted(complete) and complete[-1] == 3 and complete[-2] == 2
    came = FetchedRows([cut_off(journal, size - 1), journal])
    assert list(came) == ["0", "1", "2"]
    assert [came.get(key).jpg for key in came] == [None, b"jpg", b"jpgjpg"]
    assert [came.get(key).error_message for key in came] == [None, "bad ?", "bad ?"]
    assert came.get("3") is None


def test_a_journal_that_the_disk_has_no_room_for_keeps_whole_rows_and_says_so_at_its_end(tmp_path):
    """Under a limit of file size, as on a full disk: img2dataset goes on after a failed row."""
    code = """
        import resource, signal, sys
        from pipeline.fetch.journal import JournalWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        writer = JournalWriter(0, sys.argv[1], False, 5, None, "jpg")
        for i, size in enumerate([5000, 5000, 50_000, 5000, 50_000]):
            try: writer.write(b"x" * size, None, None, {"image_id": str(i)})
            except OSError: print("failed", i)
        try: writer.close()
        except OSError as error: print(type(error).__name__)
    """
    output, errors = worlds.run_code(code, tmp_path).communicate(timeout=300)
    assert output.split("\n")[:-1] == ["failed 2", "failed 4", "OSError"], errors
    assert list(FetchedRows([tmp_path / "00000.rows"])) == ["0", "1", "3"]


def cut_off(path: Path, length: int) -> Path:
    path.with_name("cut").write_bytes(path.read_bytes()[:length])
    return path.with_name("cut")


def test_what_hosts_cost_is_added_over_the_workers_and_the_dearest_are_named(tmp_path):
    write_list(tmp_path / "lists" / "00000.parquet", ["http://127.0.0.1:9/a"])
    waiting, journals = {"00000.parquet": 1}, {"00000.parquet": []}
    attempt = img2dataset._Attempt(
        tmp_path / "lists", tmp_path, tmp_path / "attempt-0", waiting, journals
    )
    assert attempt.slowest_hosts() == {}
    (attempt.raw / "1.hosts").write_text('{"a": 10.0, "b": 1.0, "c": 2.0}')
    (attempt.raw / "2.hosts").write_text('{"a": 5.0, "d": 12.0}')
    (attempt.raw / "3.hosts").write_text('{"a": 5')  # being written
    assert list(attempt.slowest_hosts().items()) == [("a", 15.0), ("d", 12.0), ("c", 2.0)]


def test_leaving_the_loop_early_ends_img2dataset(tmp_path):
    with web.serve({"/a.png": picture(9, 9, "PNG"), "/never.jpg": web.never}) as server:
        write_list(tmp_path / "lists" / "00000.parquet", [server.url("/a.png")])
        write_list(tmp_path / "lists" / "00001.parquet", [server.url("/never.jpg")])
        shards = fetch_lists(tmp_path / "lists", tmp_path / "out", rules(timeout_s=60), 2, 2)
        assert next(shards)[0] == "00000.parquet"
        shards.close()
    assert web.wait_until(lambda: not running_in(tmp_path), 10)


def test_importing_fetch_does_not_import_img2dataset():
    code = "import sys, pipeline.fetch.img2dataset; print('img2dataset' in sys.modules, 'cv2' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_img2dataset_is_imported_without_what_it_never_uses_and_finds_it_when_it_does():
    code = """
        import sys
        import pipeline.fetch.img2dataset_child as child
        print([name for name in ("torch", *child.UNUSED) if name in sys.modules])
        from img2dataset import reader
        print(reader.pd.DataFrame({"a": [1, 2]}).a.sum())
    """
    output, errors = worlds.run_code(code).communicate(timeout=300)
    assert output.split("\n")[:-1] == ["[]", "3"], errors
