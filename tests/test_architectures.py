"""Every architecture that has a card, at its full size, through every command: random weights, few
images, and for SigLIP a tokenizer that is written here. What it finds means nothing; that the
exported folder finds the same with four packages does.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from support import worlds
from support.readme import ALONE, readme_block

from pipeline.core.presets.settings import set_values
from pipeline.models.open_clip import open_clip

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PHOTOS, TEXTS = 24, ["a red circle", "a photo of a wide"]
SIGLIP_TOKENIZER = "timm/ViT-B-16-SigLIP2"


class Project:
    """A folder with manifests and parameters, in which commands of the pipeline run offline."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "manifests/teachers").mkdir(parents=True)
        os.symlink(ROOT / "manifests/prompts", folder / "manifests/prompts")
        (folder / "manifests/forget.txt").write_text("")
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *words: str) -> str:
        """One command, to its end; what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *words], cwd=self.folder, text=True,
            capture_output=True, env=self.environment, timeout=3000,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        assert "out of date" not in done.stderr
        return done.stdout

    def write_photos(self) -> None:
        for i in range(PHOTOS):
            folder = self.folder / "photos" / ("wide" if i % 2 else "high")
            folder.mkdir(parents=True, exist_ok=True)
            size = (320, 256) if i % 2 else (256, 320)
            (folder / f"{i}.jpg").write_bytes(worlds.picture(i, *size, kind="JPEG", quality=95))

    def write_teacher(self, name: str) -> None:
        """The card of that name, its weights random and in a file."""
        card = yaml.safe_load((ROOT / f"manifests/teachers/{name}.yaml").read_text())
        torch.manual_seed(0)
        model = open_clip.create_model(card["model"], pretrained=None)
        teachers = self.folder / "manifests/teachers"
        weights = teachers / "random.safetensors"
        save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, weights)
        card |= {"pretrained": weights.name, "golden": None}
        card["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        (teachers / f"{name}.yaml").write_text(yaml.safe_dump(card))

    def write_siglip_tokenizer(self) -> None:
        """Letters as tokens, where the Hub's cache has the real one of 256,000 tokens."""
        transformers = pytest.importorskip("transformers")
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        special = ["<pad>", "<eos>", "<bos>", "<unk>"]
        letters = [*map(chr, range(32, 127)), "\u2581"]
        vocabulary = {token: i for i, token in enumerate(special + letters)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 1)]
        )
        names = dict(
            zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True)
        )
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
        kept = self.folder / "hub/hub" / f"models--{SIGLIP_TOKENIZER.replace('/', '--')}"
        commit = "0" * 40
        (kept / "refs").mkdir(parents=True)
        (kept / "refs/main").write_text(commit)
        fast.save_pretrained(kept / "snapshots" / commit)
        (kept / "snapshots" / commit / "config.json").write_text("{}")


@pytest.mark.parametrize("name", ["clip-vit-b32", "clip-vit-b32-256-datacomp", "siglip2-vit-b16"])
def test_every_stage_and_the_export_run_with_each_architecture(name, tmp_path):
    project = Project(tmp_path)
    project.write_photos()
    project.write_teacher(name)
    if name.startswith("siglip"):
        project.write_siglip_tokenizer()
    assert "Licence of" in project.run("init", "clip-vit-b32", "--teacher", name)
    project.run("import", "folder", "photos")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "templates.txt").write_text("a photo of a {}\n")
    few = {"teacher_embed.dtype": "float32", "teacher_embed.batch": 8, "teacher_embed.views": 1}
    few |= {"teacher_embed.prompts": "prompts.txt", "teacher_embed.templates": "templates.txt"}
    few |= {"select.near_duplicates": 1.0, "select.val": 0.2, "select.test": 0.4}
    few |= {"distill.precision": "float32", "distill.steps": 2, "distill.warmup": 1}
    few |= {"distill.batch": 4, "distill.validate_every": 1, "distill.views": 1}
    few |= {"evaluate.templates": "templates.txt", "evaluate.prompts": TEXTS}
    set_values(tmp_path / "params.yaml", few)
    for stage in ("download", "teacher-embed", "select", "distill", "evaluate"):
        project.run(stage)
    assert project.run("verify").strip() == "every promise is kept"
    said = project.run("export", "model")
    assert re.search(r"the same best 10 images as `pipeline search` for \d+ texts", said), said
    for text in (*TEXTS, "a text that nobody stored"):
        expect_the_same_best_ten(project, text)


def expect_the_same_best_ten(project: Project, text: str) -> None:
    """The README's lines, with four packages and the photos, against `pipeline search`."""
    found = json.loads(project.run("search", text, "--format", "json", "-k", str(PHOTOS)))
    scores = {
        h["url"].removeprefix("file:"): h["score"] for h in found["hits"] if h["by"] == "student"
    }
    tenth = sorted(scores.values(), reverse=True)[9]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "model", "photos", text], input=readme_block(),
        cwd=project.folder, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    names = [str(Path(path).relative_to("photos")) for _, path in lines]
    assert len(set(names)) == 10
    np.testing.assert_allclose([float(s) for s, _ in lines], [scores[n] for n in names], atol=5e-3)
    assert all(scores[name] > tenth - 5e-3 for name in names)  # as good as the tenth, or better
