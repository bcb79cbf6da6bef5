"""params.yaml, world/ -> teacher/: a small CLIP trained on the scenes' captions.

Run:   python train_teacher.py   (dvc runs it as stage `teacher`)
Makes: teacher/open_clip_config.json and open_clip_model.safetensors, which open_clip opens as
       `local-dir:`, and teacher/card.yaml, the teacher card of the pipeline

Cost:  about two minutes on two quiet cores.

Two things are learned at once, all as softmax cross-entropy over cosines: which caption of the
batch belongs to which scene (Radford et al. 2021), and which phrases that name one object ("a red
circle") are true of which scene. Phrases are what patches are compared with later, and both ways of
asking are needed: were only the phrases of a scene told apart, all phrases would share a direction
in which scenes may lie, and a patch of mere background would answer to every phrase.

The image tower is CLIP's ResNet, narrow: from a few thousand scenes it learns shapes in a fraction
of the time that a ViT takes.
"""

import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

from pipeline.models.open_clip import open_clip

HERE = Path(__file__).parent
WEIGHTS = "open_clip_model.safetensors"
WIDTH, CONTEXT, VOCABULARY = 128, 24, 49408  # the vocabulary is open_clip's and cannot shrink
MAX_LOGIT_SCALE = math.log(100)


def model_config(size: int, vocabulary: int = VOCABULARY) -> dict:
    """open_clip's model_cfg for square images of `size` px."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": size, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": WIDTH,
            "heads": 2,
            "layers": 2,
        },
    }


def split_of(original: bytes, test_fraction: float, val_fraction: float) -> str:
    """`test`, `val` or `train`, from the SHA-256 of an image file: the rule of stage `select`."""
    place = int(hashlib.sha256(original).hexdigest()[:13], 16) / 16**13  # in [0, 1)
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


@dataclass
class Scenes:
    """M scenes: what the teacher is trained on."""

    pixels: Tensor  # (M, 3, S, S) uint8
    captions: list[str]
    phrases: list[str]  # the V different texts of all boxes
    true_of: Tensor  # (M, V) float: 1 where the scene holds the phrase's object


def read_training_scenes(world: Path, test_fraction: float, val_fraction: float) -> Scenes:
    """The scenes of a world that are neither in its test nor in its validation part."""
    rows, pixels = [], []
    for row in pq.read_table(world / "scenes.parquet").to_pylist():
        original = (world / row["url"].removeprefix("file:")).read_bytes()
        if split_of(original, test_fraction, val_fraction) == "train":
            rows.append(row)
            pixels.append(np.asarray(Image.open(io.BytesIO(original)).convert("RGB")))
    phrases = sorted({box["text"] for row in rows for box in row["boxes"]})
    number = {phrase: index for index, phrase in enumerate(phrases)}
    true_of = torch.zeros(len(rows), len(phrases))
    for index, row in enumerate(rows):
        true_of[index, [number[box["text"]] for box in row["boxes"]]] = 1
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Scenes(stacked, [row["caption"] for row in rows], phrases, true_of)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) -> float32 as open_clip's own preprocessing gives it."""
    mean, std = (
        torch.tensor(open_clip.OPENAI_DATASET_MEAN),
        torch.tensor(open_clip.OPENAI_DATASET_STD),
    )
    return (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def learning_rate_at(step: int, steps: int, warmup: int) -> float:
    """Share of the peak: a linear warm-up, then half a cosine towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def loss_of(images: Tensor, captions: Tensor, phrases: Tensor, true: Tensor) -> Tensor:
    """Logits' factors: scaled images (B, E), captions (B, E), phrases (V, E); true (B, V)."""
    among_captions, among_phrases = images @ captions.T, images @ phrases.T  # (B, B), (B, V)
    own = torch.arange(len(images))
    held = true.any(dim=0)  # phrases that any scene of the batch holds
    return (
        F.cross_entropy(among_captions, own) / 2
        + F.cross_entropy(among_captions.T, own) / 2
        + F.cross_entropy(among_phrases, F.normalize(true, p=1, dim=1))
        + F.cross_entropy(among_phrases.T[held], F.normalize(true.T[held], p=1, dim=1))
    )


def encode_texts(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """(n, T) tokens -> (n, E) unit vectors.

    The tower is causal and read at the end of the text, the largest token: what follows the longest
    text's end changes nothing and is not computed.
    """
    length = int(tokens.argmax(dim=1).max()) + 1
    shortened = {
        "positional_embedding": model.positional_embedding[:length],
        "attn_mask": model.attn_mask[:length, :length],
    }
    # The fused attention's backward pass is slow on the CPU at these sizes.
    with sdpa_kernel(SDPBackend.MATH):
        _, texts, _ = torch.func.functional_call(
            model, shortened, kwargs={"text": tokens[:, :length]}
        )
    return texts


def train(scenes: Scenes, params: dict) -> open_clip.CLIP:
    """A CLIP over the words in use only; `with_full_vocabulary` gives open_clip's own."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    captions, phrases = tokenizer(scenes.captions), tokenizer(scenes.phrases)
    words = torch.cat([captions, phrases]).unique()  # sorted: the end of text stays the largest
    captions, phrases = torch.searchsorted(words, captions), torch.searchsorted(words, phrases)

    torch.manual_seed(params["seed"])
    model = open_clip.CLIP(**model_config(scenes.pixels.shape[-1], len(words)))
    model.visual.to(memory_format=torch.channels_last)  # the CPU's convolutions are faster so
    matrices = [x for x in model.parameters() if x.ndim > 1]
    others = [x for x in model.parameters() if x.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": params["weight_decay"]}, {"params": others}],
        lr=params["learning_rate"],
        betas=(0.9, 0.98),
        weight_decay=0,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_at(step, params["steps"], params["warmup_steps"])
    )
    order = torch.empty(0, dtype=torch.long)
    progress = trange(params["steps"], desc="teacher", mininterval=1)
    for _ in progress:
        if len(order) < params["batch_size"]:
            order = torch.cat([order, torch.randperm(len(captions))])
        batch, order = order.split([params["batch_size"], len(order) - params["batch_size"]])
        flipped = torch.rand(len(batch), 1, 1, 1) < 0.5  # no caption says left or right
        pixels = torch.where(flipped, scenes.pixels[batch].flip(3), scenes.pixels[batch])
        channels_last = normalise(pixels).contiguous(memory_format=torch.channels_last)
        images = model.encode_image(channels_last, normalize=True)  # (B, E)
        loss = loss_of(
            images * model.logit_scale.exp(),
            encode_texts(model, captions[batch]),
            encode_texts(model, phrases),
            scenes.true_of[batch],
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return with_full_vocabulary(model, words)


def with_full_vocabulary(model: open_clip.CLIP, words: Tensor) -> open_clip.CLIP:
    """The same model for all of open_clip's token ids; a word that no caption holds embeds to 0."""
    full = open_clip.CLIP(**model_config(model.visual.image_size))
    table = torch.zeros_like(full.token_embedding.weight)
    table[words] = model.token_embedding.weight.detach()
    full.load_state_dict({**model.state_dict(), "token_embedding.weight": table})
    return full.eval()


def save(model: open_clip.CLIP, folder: Path) -> None:
    """A folder that open_clip opens as `local-dir:`, with the pipeline's teacher card."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / WEIGHTS)
    config = {
        "model_cfg": model_config(model.visual.image_size),
        "preprocess_cfg": {
            "mean": open_clip.OPENAI_DATASET_MEAN,
            "std": open_clip.OPENAI_DATASET_STD,
        },
    }
    written = json.dumps(config, indent=2) + "\n"
    (folder / "open_clip_config.json").write_text(written)
    card = {
        "name": "demo",
        "model": "local-dir:.",  # relative to the card
        "pretrained": None,
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "config_sha256": hashlib.sha256(written.encode()).hexdigest(),
        "activation": "gelu",
        "golden": None,
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False))


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, guards nothing here
    teacher = yaml.safe_load((HERE / "params.yaml").read_text())["teacher"]
    training_scenes = read_training_scenes(
        HERE / "world", teacher["test_fraction"], teacher["val_fraction"]
    )
    save(train(training_scenes, teacher), HERE / "teacher")
    print(f"teacher: trained on {len(training_scenes.captions)} scenes, in {HERE / 'teacher'}")
