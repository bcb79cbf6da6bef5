"""The student: one small ViT whose last value per head says how much its patch counts.

Letters: B images, N patches, H heads, C values per head, E = H * C embedding size (the teacher's),
W = E + H = H * (C + 1) token width, T class tokens, S image size in px, p patch size in px.

    student = Student.load("data/student")
    pixels = student.preprocess("photo.jpg")  # (1, 3, S, S)
    vector = student.encode_image(pixels)  # (1, E), compare with the teacher's texts by cosine
    patches = student.patch_embeddings(pixels)  # (1, N, E), and so with each of these

A saved student is a folder: model.safetensors under the parameter names of the published
checkpoints, and config.json, which says the shape, the preprocessing, the teacher, the licence and
how it was trained, and holds the digest of the weights, so that a mixed pair is noticed.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from pydantic import JsonValue, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import file_digest, write_file, write_json
from pipeline.core.records import Digest, Preprocessing, Record
from pipeline.models.blocks import Block, Transformer, neighbourhood_mask
from pipeline.models.hub import student_folder
from pipeline.models.preprocessing import ImageLike, square_pixels

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 2  # of config.json
MAX_SCALE = 10.0  # cap of the learned length of same_norm patches
R = TypeVar("R", bound=Record)
EPSILON = 1e-6  # shortest length that is divided by: a zero vector stays zero
CLASS_TOKENS = {"extra-head": 0, "mean": 0, "cls": 1, "cls-distill": 2}


class StudentCard(Record):
    """config.json of a student folder."""

    format: Literal[2]
    student: StudentConfig
    preprocessing: Preprocessing
    teacher: dict[str, JsonValue] | None  # what is known of it
    license: str | None
    provenance: dict[str, JsonValue]  # of a trained one: stage, stamp, recipe, libraries
    weights_digest: Digest


class Outputs(NamedTuple):
    """Everything one pass gives."""

    embedding: Tensor  # (B, E), of no particular length
    patch_weights: Tensor  # (B, N), >= 0, rows sum to 1
    patch_embeddings: Tensor  # (B, N, E)


class Student(nn.Module):
    """See the module's docstring. Pools (`config.pool`), over the same trunk:

    extra-head: the embedding is the sum of patch_weights * patch embeddings; the weights are the
        softmax over patches of the mean over heads of each head's extra value. The published one.
    mean: the same with equal weights; the extra values are idle.
    cls: the embedding is a class token's; the patch weights are that token's attention to the
        patches in the last block, averaged over heads and scaled to sum 1.
    cls-distill: two such tokens, as DeiT's (Touvron et al. 2021), both trained towards the teacher
        and averaged at inference.

    Initialisation: normal, with CLIP's deviations (Radford et al. 2021), fixed by
    torch.manual_seed.
    """

    attention_bias: Tensor | None  # (T + N, T + N)
    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    def __init__(self, config: StudentConfig, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = (preprocessing or Preprocessing()).at(config.image_size)
        patches, side = config.grid**2, config.patch_size
        width = config.embedding_size + config.heads
        tokens = CLASS_TOKENS[config.pool]

        self.conv1 = nn.Conv2d(3, width, side, stride=side, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(patches, width) * width**-0.5)
        if tokens:
            self.class_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.heads, config.layers)
        if config.same_norm:
            self.scale = nn.Parameter(torch.ones(1))
        nn.init.normal_(self.conv1.weight, std=(3 * side**2) ** -0.5)

        if config.neighbourhood_mask:
            allowed = neighbourhood_mask(config.grid, tokens)
            bias = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        else:
            bias = None
        self.register_buffer("attention_bias", bias, persistent=False)  # (T + N, T + N)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.preprocessing, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def class_tokens(self) -> int:
        """T."""
        return CLASS_TOKENS[self.config.pool]

    @property
    def temperature(self) -> float:
        """Of the softmax over patch logits; a lower one picks fewer patches."""
        return self.config.temperature

    @property
    def device(self) -> torch.device:
        return self.conv1.weight.device

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """One image or several -> (B, 3, S, S) float32 as all other methods want them.

        An image is a file, a Pillow image, or a (height, width, 3) uint8 RGB array, of any size.
        What is kept of it, how it is resized and normalised is what this student was trained with.
        Raises PipelineError for what is no such image.
        """
        several: Sequence[ImageLike] = images if isinstance(images, list | tuple) else [images]  # ty: ignore[invalid-assignment]
        return self.as_input(np.stack([square_pixels(i, self.preprocessing) for i in several]))

    def as_input(self, pixels: np.ndarray) -> Tensor:
        """(B, S, S, 3) uint8 RGB -> (B, 3, S, S) float32 as `forward` wants it.

        Bytes cross to the student's device, floats do not.
        """
        planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self.device)
        return self.normalise(planes.permute(0, 3, 1, 2))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 RGB on the student's device -> (B, 3, S, S) float32, any S."""
        if pixels.dtype != torch.uint8:
            raise PipelineError(
                f"found {pixels.dtype} pixels, expected uint8 in [0, 255]; `student.preprocess` "
                "makes them of any image"
            )
        return pixels.float().sub_(255 * self.mean).div_(255 * self.std)

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """(B, 3, S, S) from `preprocess` -> (B, E), float32; of unit length if normalize."""
        embedding = self(pixels)[0].float()
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) normalised float pixels -> embedding (B, E), patch_weights (B, N).

        Raises PipelineError for pixels of a wrong type or shape, an empty batch and, outside
        training (where the loss shows it), for pixels that are not finite.
        """
        tokens, weights = self._tokens_and_weights(pixels)
        return self._pool(tokens, weights).mean(dim=0), weights

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, E): comparable with the teacher's text embeddings by cosine."""
        return self.outputs(pixels).patch_embeddings

    def outputs(self, pixels: Tensor) -> Outputs:
        """(B, 3, S, S) -> embedding, patch_weights and patch_embeddings, of one pass."""
        tokens, weights = self._tokens_and_weights(pixels)
        patches = self._values(tokens[:, self.class_tokens :])
        return Outputs(self._pool(tokens, weights).mean(dim=0), weights, patches)

    def embeddings_for_loss(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (T or 1, B, E): every embedding that is trained towards the teacher.

        One for each pool except cls-distill, which has two; their mean is `forward`'s embedding.
        """
        return self._pool(*self._tokens_and_weights(pixels))

    def first_tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, T + N, W): what enters the first block."""
        self._check(pixels)
        side, grid = self.config.patch_size, self.config.grid
        pixels = pixels.to(self.conv1.weight.dtype)
        pixels = pixels.unflatten(3, (grid, side)).unflatten(2, (grid, side))  # (B, 3, g, p, g, p)
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 3 p p)
        x = F.linear(patches, self.conv1.weight.flatten(1)) + self.positional_embedding
        if self.class_tokens:
            x = torch.cat([self.class_embedding.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return self.ln_pre(x)  # (B, T + N, W)

    def _tokens_and_weights(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> last tokens (B, T + N, W) and patch_weights (B, N), both float32."""
        *below, last = self.transformer.resblocks
        x = self.first_tokens(pixels)
        for block in below:
            x = block(x, self.attention_bias)
        tokens = last(x, self.attention_bias).float()
        if count := self.class_tokens:
            assert isinstance(last, Block)
            attention = last.attn.probabilities(last.ln_1(x), self.attention_bias)
            attention = attention[:, :, :count, count:].float().mean(dim=(1, 2))  # (B, N)
            return tokens, attention / attention.sum(dim=1, keepdim=True)
        logits = self._heads(tokens)[..., -1].mean(dim=2) / self.temperature  # (B, N)
        if self.config.pool == "mean":
            logits = torch.zeros_like(logits)
        return tokens, logits.softmax(dim=1)

    def _pool(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """(B, T + N, W), (B, N) -> (T or 1, B, E): the class tokens', or the weighted sum's."""
        if self.class_tokens:
            return self._values(tokens[:, : self.class_tokens]).transpose(0, 1)
        weights = weights * self._lengthening(tokens)  # (B, N)
        with torch.autocast(tokens.device.type, enabled=False):
            pooled = weights[:, None] @ tokens  # (B, 1, W): summed before the extra values go
        return self._heads(pooled)[..., :-1].flatten(2).transpose(0, 1)

    def _values(self, tokens: Tensor) -> Tensor:
        """(B, n, W) -> (B, n, E): the tokens in the embedding's space."""
        values = self._heads(tokens)[..., :-1].flatten(2)
        return values * self._lengthening(tokens)[..., None]

    def _lengthening(self, tokens: Tensor) -> Tensor:
        """(B, n, W) -> (B, n): what brings each token's E values to the learned length."""
        if not self.config.same_norm:
            return tokens.new_ones(())
        norms = torch.linalg.vector_norm(self._heads(tokens)[..., :-1], dim=(2, 3))
        return self.scale.clamp(max=MAX_SCALE) / norms.clamp(min=EPSILON)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.config.heads, -1))  # (B, n, H, C + 1)

    def _check(self, pixels: Tensor) -> None:
        size = self.config.image_size
        if not pixels.is_floating_point():
            raise PipelineError(
                f"found {pixels.dtype} pixels, expected normalised floats: use `student.preprocess`"
            )
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or pixels.shape[0] == 0:
            raise PipelineError(
                f"found pixels of shape {tuple(pixels.shape)}, expected (B, 3, {size}, {size}), "
                "B >= 1; `student.resized(S)` gives a student for another image size"
            )
        if not (
            self.training
            or torch.compiler.is_compiling()
            or pixels.sum(dtype=torch.float32).isfinite()
        ):
            raise PipelineError(
                "pixels contain NaN or infinity: the image did not decode as it should"
            )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As nn.Module's; the published checkpoints' unused ln_post is dropped."""
        used = {name: x for name, x in state_dict.items() if not name.startswith("ln_post.")}
        return super().load_state_dict(used, strict, assign)

    def resized(self, image_size: int) -> "Student":
        """A student of the same weights for another image size (px, a multiple of the patch size).

        Positions are interpolated in two dimensions, bicubic and antialiased; the same size is an
        exact copy.
        """
        if image_size == self.config.image_size:
            return copy.deepcopy(self)
        config = validated(
            StudentConfig, {**self.config.model_dump(), "image_size": image_size}, "resized"
        )
        state = self.state_dict()
        grid = state["positional_embedding"].unflatten(0, (self.config.grid, -1)).permute(2, 0, 1)
        positions = F.interpolate(
            grid[None], size=(config.grid, config.grid), mode="bicubic", antialias=True
        )  # (1, W, g, g)
        state["positional_embedding"] = positions[0].flatten(1).T.contiguous()
        student = Student(config, self.preprocessing).to(grid.device, grid.dtype)
        student.load_state_dict(state)
        return student.train(self.training)

    def save(
        self,
        folder: Path | str,
        *,
        provenance: dict,
        teacher: dict | None = None,
        license: str | None = None,
    ) -> None:
        """Write the folder that `load` reads. provenance and teacher: JSON-able."""
        folder = Path(folder)
        state = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        write_file(folder / WEIGHTS, lambda partial: save_file(state, partial, {"format": "pt"}))
        card = StudentCard(
            format=FORMAT,
            student=self.config,
            preprocessing=self.preprocessing,
            teacher=teacher,
            license=license,
            provenance=provenance,
            weights_digest=file_digest(folder / WEIGHTS),
        )
        write_json(folder / CONFIG, card.model_dump(mode="json"))

    @classmethod
    def load(cls, source: Path | str) -> "Student":
        """The student that `save` or `pipeline export` wrote, on the CPU, in evaluation mode.

        source: its folder, or its name `user/name` on the Hugging Face Hub. Raises PipelineError
        where a file is missing, does not fit the other or is damaged.
        """
        folder = student_folder(source)
        card = read_card(folder)
        student = cls(card.student, card.preprocessing)
        try:
            intact = file_digest(folder / WEIGHTS) == card.weights_digest
            state = load_file(folder / WEIGHTS)
        except FileNotFoundError:
            raise PipelineError(f"no {folder / WEIGHTS}. Run `pipeline distill` first.") from None
        except safetensors.SafetensorError as error:
            raise PipelineError(
                f"{folder / WEIGHTS} is no whole safetensors file: {error}"
            ) from None
        load_weights(student, state, folder / WEIGHTS)
        if not intact:
            raise PipelineError(
                f"{folder / WEIGHTS} are not the weights that {CONFIG} describes: one of the two "
                "was replaced. Take both from one run of `pipeline distill`."
            )
        return student.eval()


def load_weights(student: Student, state: dict[str, Tensor], source: Path | str) -> None:
    """Put a checkpoint's tensors into a student. Raises PipelineError where they do not fit."""
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise PipelineError(f"{source} does not fit its configuration. {error}") from None


def read_card(folder: Path) -> StudentCard:
    """config.json of a student folder. Raises PipelineError where there is none, or a wrong one."""
    path = Path(folder) / CONFIG
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise PipelineError(f"no {path}. Run `pipeline distill` first.") from None
    except ValueError as error:
        raise PipelineError(f"{path} is not JSON: {error}") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise PipelineError(
            f"{path} is no student of format {FORMAT}. Run `pipeline distill` (or `pipeline import "
            "checkpoint`) again."
        )
    return validated(StudentCard, card, path)


def validated(model: type[R], values: object, source: Path | str) -> R:
    """values as a record. Raises PipelineError naming source, key and what was found."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "student"
        raise PipelineError(
            f"{source}: {where}: {first['msg']} (found {first['input']!r})"
        ) from None
