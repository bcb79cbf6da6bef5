"""A network of its own for processes that listen on every address: nothing but loopback, and nobody
else in it.
"""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


class Network:
    """Linux: a network namespace, held by a process that sleeps."""

    def __init__(self):
        command = "ip link set lo up && echo up && exec sleep 3600"
        self.holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        said = self.holder.stdout.readline()
        if said != "up\n":
            self.holder.wait()
            pytest.skip(f"no network namespace can be made here: {said.strip()}")
        self.enter = ["nsenter", "--target", str(self.holder.pid), "--net"]
        self.id = os.readlink(f"/proc/{self.holder.pid}/ns/net")

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """python <command>, its output piped; in a session of its own, as a terminal's job."""
        return subprocess.Popen(
            [*self.enter, sys.executable, *map(str, command)],
            cwd=ROOT, text=True, env=os.environ | environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *command: str, ok: bool = True, timeout: float = 300, **environment: str) -> str:
        process = self.start(*command, **environment)
        output, _ = process.communicate(timeout=timeout)
        assert (process.returncode == 0) == ok, output
        return output

    def processes(self) -> list[psutil.Process]:
        """All that runs in it, but for its holder."""
        found = []
        for process in psutil.process_iter():
            try:
                inside = os.readlink(f"/proc/{process.pid}/ns/net") == self.id
            except OSError:  # gone meanwhile
                continue
            if inside and process.pid != self.holder.pid:
                found.append(process)
        return found

    def close(self) -> None:
        for process in [*self.processes(), self.holder]:
            process.kill()
        self.holder.communicate()
