"""distill on two machines, which are two torchrun agents of one rank each in a network of their own."""

import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from support import finished, worlds
from support.files import out_bytes
from support.network import Network
from support.server import wait_until

STEPS = 300
WEIGHTS = ("model.safetensors", "last/model.safetensors", "training.csv")


class Machines:
    """Two of them, with one data folder that both see."""

    def __init__(self, network: Network, folder: Path, world: worlds.World, data: Path):
        self.network, self.folder, self.data = network, folder, data
        self.sections = {
            "download": worlds.download_config(world.manifest, world.root),
            "teacher_embed": worlds.teacher_config(world.card, world.prompts),
            "select": worlds.select_config(),
        }
        self.params, self.port = self.parameters("params.yaml"), 29400

    def parameters(self, name: str, **changes) -> Path:
        config = finished.distill_config(steps=STEPS, validate_every=50, batch=16, **changes)
        return worlds.write_params(self.folder / name, distill=config, **self.sections)

    def new_data(self, name: str) -> Path:
        shutil.copytree(self.data, self.folder / name, ignore=finished_outs)
        return self.folder / name

    def start(self, *folders: Path, params: Path | None = None, options: tuple = ()) -> list:
        """An agent for each folder, as its machine's data/."""
        self.port += 1
        return [
            self.network.start(
                "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number),
                "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
                "--master-port", str(self.port), "-m", "pipeline.cli", "distill", *options,
                "--params", (params if number and params else self.params), "--data", folder,
                GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
            )
            for number, folder in enumerate(folders)
        ]  # fmt: skip

    def rank(self, agent) -> psutil.Process:
        """The process that trains below an agent."""
        trains = [p for p in psutil.Process(agent.pid).children() if "distill" in p.cmdline()]
        (process,) = trains
        return process


def finished_outs(folder: str, names: list[str]) -> set[str]:
    return {"student", "evaluation", ".work"} & set(names)


def finish(agents: list, ok: bool, seconds: float = 240) -> list[str]:
    said = [agent.communicate(timeout=seconds)[0] for agent in agents]
    assert [agent.returncode == 0 for agent in agents] == [ok] * len(agents), "\n".join(said)
    return said


def student(data: Path) -> dict[str, bytes]:
    made = out_bytes(data / "student")
    return {name: made[name] for name in WEIGHTS}


@pytest.fixture(scope="module")
def machines(small_world, finished_world, tmp_path_factory):
    network = Network()
    try:
        made = Machines(network, tmp_path_factory.mktemp("machines"), small_world, finished_world)
        data = made.new_data("undisturbed")
        finish(made.start(data, data), ok=True)
        yield made
    finally:
        network.close()


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_all_with_a_message_and_the_run_resumes_to_the_same_bytes(
    machines, dies
):
    data = machines.new_data(f"interrupted-{dies}")
    agents = machines.start(data, data)
    work = data / ".work/distill"
    assert wait_until(lambda: list(work.glob("*/checkpoint.pt")), 240)
    machines.rank(agents[dies]).send_signal(signal.SIGKILL)
    began = time.monotonic()
    said = finish(agents, ok=False)
    assert time.monotonic() - began < 60
    before, message, _ = said[1 - dies].partition(f"error: rank {1 - dies} of 2: another rank has")
    assert message and "Traceback" not in before, said[1 - dies]
    assert not (data / "student").exists()
    finish(machines.start(data, data, options=("--resume",)), ok=True)
    assert student(data) == student(machines.folder / "undisturbed")


@pytest.mark.slow
def test_machines_that_see_different_data_or_parameters_are_refused_on_all_of_them(machines):
    data = machines.new_data("one")
    other = machines.parameters("other.yaml", seed=7)
    for said in finish(machines.start(data, data, params=other), ok=False):
        assert "do not see the same parameters_and_inputs" in said
    half = machines.new_data("half")
    agents = machines.start(half, half)
    assert wait_until(lambda: list((half / ".work/distill").glob("*/checkpoint.pt")), 240)
    for agent in agents:
        machines.rank(agent).kill()
    finish(agents, ok=False)
    for said in finish(machines.start(half, data), ok=False):
        assert "do not see the same checkpoint" in said
