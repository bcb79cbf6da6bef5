"""A copy of this repository in which a test may run DVC: its own data, its own cache."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from support import worlds

ROOT = Path(__file__).parents[2]
PARTS = ["pipeline", "stages", "manifests", ".dvc", ".dvcignore", "dvc.yaml", "params.yaml"]
STUDENT = {"image_size": 32, "patch_size": 8, "embedding_size": 32, "heads": 4, "layers": 1}
DISTILL = {"steps": 12, "batch": 16, "warmup": 2, "validate_every": 4, "precision": "float32"}


class Checkout:
    """A folder with everything that git tracks and DVC needs, outside git."""

    def __init__(self, folder: Path):
        self.folder = folder
        made = shutil.ignore_patterns("__pycache__", "cache", "tmp", "world", "teacher")
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, ignore=made)
            else:
                shutil.copy(ROOT / part, folder / part)
        self.run("dvc", "config", "core.no_scm", "true")

    def set(self, **sections: dict) -> None:
        """Change some parameters: set(distill={"steps": 5, "student": {"layers": 1}})."""
        path = self.folder / "params.yaml"
        document = yaml.safe_load(path.read_text())
        for section, values in sections.items():
            for key, value in values.items():
                if isinstance(value, dict):
                    document[section][key] |= value
                else:
                    document[section][key] = value
        path.write_text(yaml.safe_dump(document))

    def start(self, *command: str) -> subprocess.Popen:
        """Start a command of this environment here; its output is piped."""
        bin = Path(sys.executable).parent
        environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
        environment |= {"PYTHONPATH": str(self.folder)}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *command: str, ok: bool = True, timeout: float = 1800) -> str:
        """Run a command to its end; returns what it printed."""
        process = self.start(*command)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
        assert (process.returncode == 0) == ok, output
        return output


def small(folder: Path, card: Path) -> Checkout:
    """A checkout whose parameters name 60 pictures and the tiny teacher."""
    checkout = Checkout(folder)
    pictures = folder / "manifests/pictures"
    pictures.mkdir()
    for i in range(60):
        (pictures / f"{i}.jpg").write_bytes(worlds.picture(i, kind="JPEG", quality=95))
    rows = [{"url": f"file:{i}.jpg", "caption": f"picture {i}"} for i in range(60)]
    worlds.write_manifest(folder / "manifests/pictures.csv", rows)
    checkout.set(
        download={
            "manifest": "manifests/pictures.csv", "root": "manifests/pictures", "rows_per_shard": 20,
            "image_size": 32,
        },
        teacher_embed={"card": str(card), "batch": 4, "dtype": "float32"},
        select={"val": 0.1, "test": 0.2},
        distill={"student": STUDENT, "image_sizes": [STUDENT["image_size"]], **DISTILL},
        # the demo's card would have DVC train the demo's teacher
        evaluate={"batch": 16, "prompts": ["a red circle"], "segmentation": {"card": str(card)}},
    )  # fmt: skip
    return checkout
