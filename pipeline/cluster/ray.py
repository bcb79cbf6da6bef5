"""A plan's work on a Ray cluster: one task a shard, begun again where a node dies.

All nodes see the project's folder and data/ under the same paths, and have this project and its
libraries installed in the same versions. What a task makes lies in the store, as of any process; a
plan that was ended goes on from there. Nothing else here knows of Ray.
"""

import logging
import os
import re
import secrets
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import pipeline
from pipeline.core.errors import PipelineError
from pipeline.core.layout import ADDRESS
from pipeline.core.plans import Maker
from pipeline.core.records import Entry

RETRIES = 8  # of a task whose node died; spot machines come and go
CANCEL_S = 20.0  # for tasks to end their own processes, before Ray ends the tasks
DECIDE_BYTES = (
    *("torch", "open_clip_torch", "img2dataset", "numpy", "pillow", "simplejpeg"),
    *("pyarrow", "extrahead"),
)
_OWN_CLUSTER = {  # the environment of one that is started here, for this run alone
    "RAY_AUTH_MODE": "token",  # it listens on every address of this machine
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
}


class Tasks(NamedTuple):
    """What Ray sets aside for the task of a shard, which may be fractions: processors and GPUs."""

    cpus: float
    gpus: float


class OnRay:
    """A maker whose shards another one makes, in the tasks of a cluster.

    maker: pickles, and makes one shard at a time in each process of the cluster, where it is kept
    with all that it loaded for the next shard.
    """

    def __init__(self, maker: Maker, tasks: Tasks):
        self.maker, self.tasks, self.plan, self.tally = maker, tasks, maker.plan, maker.tally

    def is_settled(self, entry: Entry) -> bool:
        return self.maker.is_settled(entry)

    def differences(self, entry: Entry) -> list[str]:
        return self.maker.differences(entry)

    def make(self, names: Iterable[str]) -> Iterator[Entry]:
        """Each shard as soon as it is in the store. However this ends, its tasks end too.

        Raises PipelineError: no cluster, none of its nodes can run a task, a node with other
        versions than here, a task that ended without a shard more than RETRIES times.
        """
        if waiting := list(names):
            with _cluster() as ray:
                _require_nodes(ray, self.tasks)
                yield from self._made(ray, waiting)

    def _made(self, ray: Any, names: list[str]) -> Iterator[Entry]:
        make_shard = ray.remote(
            num_cpus=self.tasks.cpus, num_gpus=self.tasks.gpus, max_retries=RETRIES
        )(_make_shard)
        # the address of a remote store goes with it: an environment for tasks would be in Ray's logs
        maker, here = ray.put((self.maker, os.environ.get(ADDRESS))), os.getcwd()
        of_task = {make_shard.remote([maker], here, name): name for name in names}
        waiting = list(of_task)
        try:
            with tqdm(total=len(names), unit="shard", desc=self.plan.stage) as bar:
                while waiting:
                    count = len(waiting)
                    done, waiting = ray.wait(waiting, num_returns=count, timeout=0.5)
                    for task in done:
                        entry, tally = _result(ray, task, of_task[task])
                        self.tally.update(tally)
                        bar.update()
                        yield entry
        finally:
            for task in waiting:
                ray.cancel(task)  # a KeyboardInterrupt there
            if waiting:
                ray.wait(waiting, num_returns=len(waiting), timeout=CANCEL_S)


def _result(ray: Any, task: Any, name: str) -> tuple[Entry, Counter]:
    """What a task that has ended gave. Raises what it raised."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (PipelineError, OSError)):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise PipelineError(
            f"{name}: its task was lost {RETRIES + 1} times ({type(error).__name__}). Finished "
            "shards are kept: run the command again, with more memory or fewer tasks on a node."
        ) from None


# In the cluster


@lru_cache(maxsize=1)
def _kept(maker: Any) -> Maker:
    """The maker of a reference, once in each process: the teacher is loaded once."""
    import ray

    made, address = ray.get(maker)
    if address:
        os.environ[ADDRESS] = address
    return made


def _make_shard(reference: list, here: str, name: str) -> tuple[Entry, Counter]:
    """One shard, and what it added to the maker's tally. reference: in a list, to stay one."""
    os.chdir(here)  # the paths of the parameters are relative to it
    maker = _kept(reference[0])
    before = maker.tally.copy()
    (entry,) = maker.make([name])
    return entry, maker.tally - before


def _versions(here: str) -> dict[str, str]:
    """What must be the same on all nodes; the folder of the project where it can be seen."""
    found = {"folder": here if os.path.isdir(here) else "cannot be seen"}
    for name in DECIDE_BYTES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    code = sha256()
    for folder in map(Path, pipeline.__path__):
        for path in sorted(folder.rglob("*.py")):
            code.update(path.read_bytes())
    found["extrahead"] += f" (code {code.hexdigest()[:8]})"
    return found


# The cluster


@contextmanager
def _cluster() -> Iterator[Any]:
    """The module ray, connected to the cluster that RAY_ADDRESS names, or to one of this machine's
    own that ends with it."""
    options: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS") or "local"}
    if options["address"] == "local":  # the import reads the environment
        os.environ.update(_OWN_CLUSTER | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        import ray.exceptions
    except ImportError:
        raise PipelineError(
            "--ray: Ray is not installed. Run `pip install -c constraints.txt 'extrahead[ray]'`, "
            "here and on every node of the cluster."
        ) from None
    try:
        _reach(options["address"])
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            f"--ray: no cluster at {options['address']} ({reason}). Set RAY_ADDRESS to what "
            "`ray start --head` printed, on a machine where `ray start` has run; without it a "
            "cluster of this machine alone is started."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError for HOST:PORT where nobody listens, to which Ray would try for minutes."""
    if found := re.fullmatch(r"([^/]+):(\d+)", address):
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=10).close()


def _require_nodes(ray: Any, tasks: Tasks) -> None:
    """Raises PipelineError where no node has room for a task, and where one runs other code."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    have = [(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in nodes]
    if not any(cpus >= tasks.cpus and gpus >= tasks.gpus for cpus, gpus in have):
        raise PipelineError(
            f"--ray: a task asks for {tasks.cpus:g} processors and {tasks.gpus:g} GPUs; the nodes "
            f"have {', '.join(f'{cpus:g} and {gpus:g}' for cpus, gpus in have)}. Lower --ray-cpus "
            "or --ray-gpus, or add a node."
        )
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    here = os.getcwd()
    expected = _versions(here)
    for node in nodes:
        on_node = OnNode(node_id=node["NodeID"], soft=False)
        ask = ray.remote(num_cpus=0, scheduling_strategy=on_node)(_versions)
        address = node["NodeManagerAddress"]
        try:
            found = ray.get(ask.remote(here))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise PipelineError(
                f"--ray: node {address} cannot run this project ({reason}). Install it there, in "
                f"version {expected['extrahead']}."
            ) from None
        if wrong := [name for name in expected if found[name] != expected[name]]:
            named = "; ".join(f"{name}: {found[name]}, here {expected[name]}" for name in wrong)
            raise PipelineError(
                f"--ray: node {address} is not as this one ({named}). All nodes need the same "
                "versions and must see this folder: the shards are to be those of one machine."
            )
