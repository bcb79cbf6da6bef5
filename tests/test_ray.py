"""A real Ray cluster of two nodes in a network of its own: the files of one process, whatever happens
to a node, and nothing left behind.
"""

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from support import object_store, worlds
from support.files import out_bytes
from support.network import Network
from support.server import wait_until

from pipeline.cli_cluster import named_tasks
from pipeline.cluster.ray import OnRay, Tasks
from pipeline.core.errors import PipelineError
from pipeline.core.plans import store_of
from pipeline.core.provenance import read_stamp

COUNT = 24
HEAD, NODE, OTHER = "127.0.0.11", "127.0.0.12", "127.0.0.13"
ADDRESS = f"{HEAD}:6379"
STORE = "127.0.0.14:5000"
SITE = """
import sys, time
sys.path.insert(0, "tests")
from support import server, worlds
pages = {f"/{i:02}.png": server.after(0.3, server.body(worlds.picture(i))) for i in range(%d)}
with server.serve(pages) as site:
    print(site.port, flush=True)
    time.sleep(3600)
"""
MAKE_BUCKET = """
import time, urllib.request as url
for _ in range(300):
    try:
        url.urlopen(url.Request("http://%s/bucket", method="PUT"), timeout=5)
        break
    except OSError:
        time.sleep(0.2)
else:
    raise SystemExit("the server does not answer")
"""


# Without a cluster


def test_ray_or_parts_one_of_the_two():
    with pytest.raises(PipelineError, match="one of the two"):
        named_tasks(True, "0/2", 1.0, 0.0)
    assert named_tasks(False, "0/2", 1.0, 0.0) is None


class Maker:
    plan, tally = None, None


def test_where_ray_is_not_installed_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.exceptions", None)
    with pytest.raises(PipelineError, match=r"extrahead\[ray\]"):
        list(OnRay(Maker(), Tasks(1.0, 0.0)).make(["a"]))
    assert list(OnRay(Maker(), Tasks(1.0, 0.0)).make([])) == []  # nothing missing: no cluster


def test_a_cluster_that_is_not_there_is_said(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(PipelineError, match=r"no cluster at 127\.0\.0\.1:1 .*refused"):
        list(OnRay(Maker(), Tasks(1.0, 0.0)).make(["a"]))


# With one


class Cluster:
    """Nodes of one processor each; commands of this project inside its network."""

    def __init__(self, network: Network, folder: Path):
        self.network, self.folder = network, folder
        self.sessions = tempfile.mkdtemp(prefix="ray-")  # short, for its sockets
        self.environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            **object_store.access(f"http://{STORE}"),  # as a node's own role gives it
        }  # fmt: skip
        self.ray("start", "--head", "--port=6379", f"--node-ip-address={HEAD}", "--num-cpus=1",
                 "--include-dashboard=false", f"--temp-dir={self.sessions}")  # fmt: skip

    def ray(self, *command: str, **environment: str) -> str:
        started = self.environment | environment
        return self.network.run("-m", "ray.scripts.scripts", *command, **started)

    def join(self, address: str, **environment: str) -> None:
        own = f"--node-ip-address={address}"
        self.ray("start", f"--address={ADDRESS}", own, "--num-cpus=1", **environment)

    def raylet(self, address: str) -> psutil.Process:
        (process,) = [
            p for p in self.network.processes()
            if p.name() == "raylet" and f"--node_ip_address={address}" in p.cmdline()
        ]  # fmt: skip
        return process

    def kill(self, address: str) -> None:
        """A node's own processes, as when its machine dies; what its tasks started is not of them."""
        raylet = self.raylet(address)
        workers = raylet.children()
        for process in [raylet, *workers]:
            process.kill()

    def busy(self, address: str, what: str) -> bool:
        """Whether a process of a node's tasks is doing this."""
        return any(what in line for line in command_lines(self.raylet(address).children(True)))

    def start(self, command: str, data: Path, *options: str | Path, **environment: str):
        return self.network.start(
            "-m", "pipeline.cli", command, "--params", self.folder / "params.yaml", "--data", data,
            *options, **self.environment | {"RAY_ADDRESS": ADDRESS} | environment,
        )  # fmt: skip

    def finish(self, process, ok: bool = True) -> str:
        output, _ = process.communicate(timeout=300)
        assert (process.returncode == 0) == ok, output
        return output


def command_lines(processes: list[psutil.Process]) -> list[str]:
    lines = []
    for process in processes:
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return lines


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny_teacher):
    """Two nodes, a slow site, and what one process makes of its pictures in `one`."""
    pytest.importorskip("ray")
    network, folder = Network(), tmp_path_factory.mktemp("cluster")
    script = folder / "site.py"
    script.write_text(SITE % COUNT)
    made = None
    try:
        site = network.start(script)
        port = int(site.stdout.readline())
        urls = [f"http://127.0.0.1:{port}/{i:02}.png" for i in range(COUNT)]
        urls += [f"http://127.0.0.2:{port}/00.png", f"http://127.0.0.1:{port}/gone.png"]
        rows = [{"url": url, "caption": f"picture {i}"} for i, url in enumerate(urls)]
        manifest = worlds.write_manifest(folder / "manifest.csv", rows)
        (folder / "prompts.txt").write_text("a red circle\n")
        options = {"rows_per_shard": 4, "allow": ["127.0.0.1/32"], "timeout": 20.0}
        download = worlds.download_config(manifest, folder, **options)
        embed = worlds.teacher_config(tiny_teacher, folder / "prompts.txt")
        worlds.write_params(folder / "params.yaml", download=download, teacher_embed=embed)
        remote = {"store": "remote"}
        download, embed = (config.model_copy(update=remote) for config in (download, embed))
        worlds.write_params(folder / "remote.yaml", download=download, teacher_embed=embed)
        made = Cluster(network, folder)
        made.site = site
        for command in ("download", "teacher-embed"):
            made.finish(made.start(command, folder / "one"))
        made.join(NODE)
        yield made
    finally:
        network.close()
        if made:
            shutil.rmtree(made.sessions, ignore_errors=True)


@pytest.mark.slow
def test_a_node_killed_while_it_embeds_costs_its_tasks_alone(cluster, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cluster.folder / "one/images", data / "images")
    run = cluster.start("teacher-embed", data, "--ray")
    assert wait_until(lambda: cluster.busy(NODE, "ray::_make_shard"), 90)
    cluster.kill(NODE)
    assert run.poll() is None
    said = cluster.finish(run)
    assert said.count("teacher_embed: 100%") == 1 and "shard/s" in said, said
    assert out_bytes(data / "teacher") == out_bytes(cluster.folder / "one/teacher")
    (record,) = (data / "runs").glob("teacher_embed-*.parquet")
    assert json.loads(pq.read_table(record)["metrics"][0].as_py())["embedded"] > 0
    cluster.join(NODE)


@pytest.mark.slow
def test_a_node_killed_while_it_fetches_costs_its_tasks_alone(cluster, tmp_path):
    """img2dataset in tasks, the policy in force: of two addresses one is allowed."""
    data = tmp_path / "data"
    run, store = cluster.start("download", data, "--ray"), store_of(data, "download")
    assert wait_until(lambda: cluster.busy(NODE, "img2dataset_child") and store.entries(), 120)
    cluster.kill(NODE)
    expected = out_bytes(cluster.folder / "one/images")
    assert run.poll() is None and 0 < len(store.entries()) < len(expected) - 1
    cluster.finish(run)
    assert out_bytes(data / "images") == expected
    rows = pq.read_table(data / "images").to_pylist()
    (refused,) = [row for row in rows if "127.0.0.2" in row["url"]]
    assert refused["status"] == "refused" and not refused["jpg"]
    assert wait_until(lambda: not left(cluster, "img2dataset"), 20)
    cluster.join(NODE)


def left(cluster: Cluster, what: str) -> list[str]:
    return [line for line in command_lines(cluster.network.processes()) if what in line]


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_ends_what_its_tasks_started_and_the_next_one_goes_on(
    cluster, tmp_path, signal_
):
    """Ctrl-C, and kill -9."""
    data = tmp_path / "data"
    run, store = cluster.start("download", data, "--ray"), store_of(data, "download")
    assert wait_until(lambda: cluster.busy(HEAD, "img2dataset_child") and store.entries(), 120)
    os.killpg(run.pid, signal_)
    began = time.monotonic()
    said = cluster.finish(run, ok=False)
    assert "Traceback" not in said and time.monotonic() - began < 60, said
    assert wait_until(lambda: not left(cluster, "pipeline.fetch"), 20), left(cluster, "pipeline")
    assert not left(cluster, "multiprocessing.spawn")
    kept = {entry.stored for entry in store.entries()}
    cluster.finish(cluster.start("download", data, "--ray"))
    assert kept <= {entry.stored for entry in store.entries()}
    assert out_bytes(data / "images") == out_bytes(cluster.folder / "one/images")


@pytest.mark.slow
def test_shards_of_two_nodes_go_into_a_remote_store(cluster, tmp_path):
    """Whose address is given to the command alone: it reaches the tasks, and nothing that stays."""
    pytest.importorskip("moto")
    host, port = STORE.split(":")
    server = cluster.network.start("-m", "moto.server", "-H", host, "-p", port)
    data, address = tmp_path / "data", "s3://bucket/of-this-test"
    try:
        cluster.network.run("-c", MAKE_BUCKET % STORE)
        options = ("--ray", "--params", cluster.folder / "remote.yaml")
        for command, folder in (("download", "images"), ("teacher-embed", "teacher")):
            cluster.finish(cluster.start(command, data, *options, EXTRAHEAD_STORE=address))
            assert not list((data / folder).rglob("*.parquet"))
            here, one = (read_stamp(d / folder, folder) for d in (data, cluster.folder / "one"))
            shards = {name: file.sha256 for name, file in one.files.items()}
            assert {name: file.sha256 for name, file in here.files.items()} == shards
        said = cluster.finish(cluster.start("verify", data, EXTRAHEAD_STORE=address))
        assert "every promise is kept" in said
    finally:
        server.kill()
        server.wait()
    for log in Path(cluster.sessions).rglob("*"):
        assert not log.is_file() or address.encode() not in log.read_bytes(), log


@pytest.mark.slow
def test_a_node_with_other_versions_is_refused_before_the_first_shard(cluster, tmp_path):
    torch = tmp_path / "site/torch-9.9.dist-info"
    torch.mkdir(parents=True)
    (torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    cluster.join(OTHER, PYTHONPATH=str(tmp_path / "site"))
    try:
        said = cluster.finish(cluster.start("download", tmp_path / "data", "--ray"), ok=False)
    finally:
        cluster.kill(OTHER)
    assert f"node {OTHER} is not as this one (torch: 9.9, here 2." in said
    assert "Traceback" not in said and not store_of(tmp_path / "data", "download").entries()
    assert wait_until(lambda: OTHER not in " ".join(left(cluster, "raylet")), 20)


@pytest.mark.slow
def test_a_task_that_no_node_can_run_is_refused(cluster, tmp_path):
    options = ("--ray", "--ray-gpus", "1")
    said = cluster.finish(cluster.start("download", tmp_path / "data", *options), ok=False)
    assert "asks for 1 processors and 1 GPUs; the nodes have 1 and 0" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_without_an_address_a_cluster_is_started_and_ends_with_the_run(cluster, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cluster.folder / "one/images", data / "images")
    before = {process.pid for process in cluster.network.processes()}
    unset = dict.fromkeys(("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"), "")
    cluster.finish(cluster.start("teacher-embed", data, "--ray", **unset))
    assert out_bytes(data / "teacher") == out_bytes(cluster.folder / "one/teacher")
    assert wait_until(lambda: {p.pid for p in cluster.network.processes()} <= before, 20)


@pytest.mark.slow
def test_no_process_is_left_once_the_cluster_is_stopped(cluster):
    cluster.site.kill()
    cluster.site.wait()
    cluster.ray("stop", "--force")
    assert wait_until(lambda: not cluster.network.processes(), 30), left(cluster, "")
