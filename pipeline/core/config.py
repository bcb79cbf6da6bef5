"""params.yaml -> one strict, frozen model per stage.

Only values that change bytes live here; what changes only speed (device, workers) is a
command-line option. Unknown, missing and ill-typed keys are errors that name the file, the
section, the key, what was found and what is allowed.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, overload

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.core.errors import PipelineError
from pipeline.core.records import Record

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator takes
Column = Literal["url", "caption", "label", "license", "boxes", "mask", "sha256"]
Span = Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]


LARGEST_STUDENT = 1_000_000_000  # parameters: what a file says is allocated before it is read
LARGEST_GRID = 64  # patches a side; attention takes the fourth power


class StudentConfig(Record):
    """Everything that fixes a student's shape.

    The two published students are 224 px, patch 28, embedding 512, 16 heads, 6 layers:
    `multimodal-patch` has neighbourhood_mask and same_norm, `no-cls` has neither.
    """

    image_size: Positive  # px, square
    patch_size: Positive  # px; divides image_size
    embedding_size: Positive  # E, equal to the teacher's; a multiple of heads
    heads: Positive
    layers: Positive
    neighbourhood_mask: bool  # a patch attends to the 3 x 3 patches around it only
    same_norm: bool  # patch embeddings all have one learned length, at most 10
    pool: Literal["extra-head", "mean", "cls", "cls-distill"]
    temperature: PositiveFloat  # of the softmax over patch logits

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.embedding_size % self.heads:
            raise ValueError(
                f"embedding_size {self.embedding_size} is not a multiple of heads {self.heads}"
            )
        if self.grid > LARGEST_GRID:
            raise ValueError(f"{self.grid} patches a side; at most {LARGEST_GRID} are attended to")
        width = self.embedding_size + self.heads
        size = 12 * self.layers * width**2 + 3 * self.patch_size**2 * width
        if size > LARGEST_STUDENT:
            raise ValueError(
                f"about {size:.1e} parameters; a student has at most {LARGEST_STUDENT}"
            )
        return self

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


class DownloadConfig(Record):
    """manifest -> data/images."""

    manifest: str  # CSV, TSV, JSON lines or Parquet: a file, a folder of them, a pattern
    columns: dict[Column, str | int | None]  # our name -> the manifest's; 2: the second; null: none
    changed: Literal["keep", "refuse"]  # bytes that have not the SHA-256 of the manifest
    forget: str  # text file, a URL, image_id or SHA-256 a line: what must not be held any more
    root: str  # `file:` paths of the manifest must lie below this folder
    store: Literal["local", "remote"]  # where shards lie: with data/, or in a store of its own
    rows_per_shard: Positive  # target; an image's shard depends on its id and the shards' number
    round: Count  # a retry begins the next one: what may succeed now is asked again, once
    image_size: Positive  # px; the shorter side of a stored image, which is shrunk, never enlarged
    quality: Annotated[int, Field(ge=1, le=100)]  # of the JPEG, where an image must be encoded
    timeout: PositiveFloat  # s per image, in total
    retries: Count  # further tries of what may succeed (time-outs, 5xx, DNS)
    max_bytes: Positive  # of a response
    max_pixels: Positive  # of an image, before decoding
    max_redirects: Count
    per_host: Positive  # concurrent requests to one host, per process
    allow: list[str]  # private hosts or networks that may be asked all the same, on any port
    ports: list[Port]  # of public hosts that may be asked, beside 80, 443, 8080 and 8443
    robots: bool  # respect robots.txt and X-Robots-Tag


class TeacherEmbedConfig(Record):
    """data/images -> data/teacher."""

    card: str  # manifests/teachers/NAME.yaml
    store: Literal["local", "remote"]  # where its shards lie, as of download
    views: Positive  # per image; view 0 is the teacher's own preprocessing
    crop_area: Span  # share of the image's area, of views 1, 2, ...
    crop_ratio: Span  # width / height
    seed: Seed
    dtype: Literal["bfloat16", "float32"]
    batch: Positive  # a row's last bits depend on it
    prompts: str  # text file, a prompt a line, embedded beside captions and box texts
    templates: str  # text file, a template a line; each is embedded with each label in its {}

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name in ("crop_area", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}; write [smallest, largest]")
        if self.crop_area[1] > 1:
            raise ValueError(f"crop_area: {self.crop_area[1]} is more than the whole image (1.0)")
        return self


class SelectConfig(Record):
    """data/images + data/teacher -> data/selection."""

    where: str  # SQL condition over the columns of `images` and caption_similarity
    val: Fraction  # share of the contents
    test: Fraction
    near_duplicates: Fraction  # cosine of teacher embeddings from which two images are one; 1 = off

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(f"val {self.val} + test {self.test} leave nothing to train on")
        return self


class LossWeights(Record):
    """Weights of the terms of the loss; 0 leaves a term out."""

    l1: Weight  # the published loss: mean |student - teacher| of unit vectors, times norm 100
    cosine: Weight  # 1 - cosine
    relational: Weight  # cross-entropy of student-teacher similarities in the batch, both centred
    caption: Weight  # CLIP's symmetric loss against the captions' text embeddings

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("every weight is 0; give one of them a value above 0")
        return self


class DistillConfig(Record):
    """data/images + data/teacher + data/selection -> data/student."""

    student: StudentConfig
    init: str | None  # folder of a student to start from; null = random weights
    image_sizes: list[Positive]  # px, the student's own among them; each step shows one of them
    loss: LossWeights
    relational_scale: PositiveFloat  # inverse temperature of the relational and caption terms
    views: Positive  # of the stored ones; a step shows one of them
    color_jitter: Fraction  # photometric noise for the student alone: brightness and contrast
    min_crop_area: Annotated[float, Field(gt=0, le=1)]  # least share of a view shown; 1 = all of it
    mixup: Weight  # Beta parameter of overlaying pairs of images and targets; 0 = off
    fixed_stem_frequencies: (
        Count  # lowest frequencies of a fixed patch projection; 0 = it is learned
    )
    steps: Positive
    batch: Positive  # images a step, over all ranks
    learning_rate: PositiveFloat
    schedule: Literal["cosine", "plateau"]
    warmup: Count  # steps
    weight_decay: Weight
    max_grad_norm: PositiveFloat  # norm of the gradient
    max_skipped_steps: Count  # steps whose loss or gradient is not finite change nothing; so many
    ema: Annotated[float, Field(ge=0, lt=1)]  # decay of the averaged weights; 0 = off
    precision: Literal["bfloat16", "float32"]  # of the matrix products
    validate_every: Positive  # steps; also when a checkpoint is written
    early_stopping: Count  # validations without a better one that end the run; 0 = never
    shuffle_row_groups: Positive  # row groups that are shuffled together
    seed: Seed

    @model_validator(mode="after")
    def _sizes_fit_the_student(self) -> Self:
        sizes, student = self.image_sizes, self.student
        wrong = [size for size in sizes if size % student.patch_size]
        if student.image_size not in sizes or wrong or len(set(sizes)) < len(sizes):
            raise ValueError(
                f"image_sizes {sizes}: write each size once, all of them multiples of "
                f"student.patch_size {student.patch_size}, and student.image_size "
                f"{student.image_size} among them"
            )
        return self

    @model_validator(mode="after")
    def _the_stem_fits_a_patch(self) -> Self:
        if self.fixed_stem_frequencies > self.student.patch_size:
            raise ValueError(
                f"fixed_stem_frequencies {self.fixed_stem_frequencies} is more than student.patch_size "
                f"{self.student.patch_size}: a patch has no more frequencies"
            )
        if self.fixed_stem_frequencies and self.init:
            raise ValueError(
                "fixed_stem_frequencies replaces the patch projection that init brings; set it to 0 "
                "or init to null"
            )
        return self


class SegmentationConfig(Record):
    """How masks are read and patches judged by them, where images have masks."""

    classes: str  # text file: a class a line, its synonyms with commas between
    background: Literal["none", "threshold", "class"]  # class: the file's first line names value 0
    zero_is: Literal["background", "ignore"]  # what the value 0 of a mask means
    image_size: Positive  # px of the view whose patches are judged
    window: Positive  # px of the windows over it that the student sees; image_size: one
    stride: Positive  # px from window to window, a multiple of the patch size
    card: str  # of the teacher, whose dense features are judged beside the student's

    @model_validator(mode="after")
    def _zero_means_one_thing(self) -> Self:
        if self.zero_is == "ignore" and self.background != "none":
            raise ValueError(
                f"background {self.background} is looked for where zero_is: ignore says that no mask "
                "shows it; set background: none"
            )
        if self.window > self.image_size:
            raise ValueError(f"window {self.window} is more than image_size {self.image_size}")
        return self


class EvaluateConfig(Record):
    """data/student + data/teacher on the held-out split -> data/evaluation."""

    split: Literal["val", "test"]
    batch: Positive
    prompts: list[str]  # texts that the report searches for
    templates: str  # text file: a class's vector is the mean of its filled, stored templates
    segmentation: SegmentationConfig


SECTIONS: dict[str, type[Record]] = {
    "download": DownloadConfig,
    "teacher_embed": TeacherEmbedConfig,
    "select": SelectConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
}


RENAMED = {  # keys of older parameter files, and what they are called now
    "distill.noise": "distill.color_jitter",
    "distill.jitter": "distill.min_crop_area",
    "distill.clip": "distill.max_grad_norm",
    "distill.window": "distill.shuffle_row_groups",
    "distill.smooth_stem": "distill.fixed_stem_frequencies",
}


class _Loader(yaml.SafeLoader):
    """With YAML 1.2's floats, as DVC reads and writes them: 1e-05 is a number, not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@overload
def load_section(params: Path, section: Literal["download"]) -> DownloadConfig: ...
@overload
def load_section(params: Path, section: Literal["teacher_embed"]) -> TeacherEmbedConfig: ...
@overload
def load_section(params: Path, section: Literal["select"]) -> SelectConfig: ...
@overload
def load_section(params: Path, section: Literal["distill"]) -> DistillConfig: ...
@overload
def load_section(params: Path, section: Literal["evaluate"]) -> EvaluateConfig: ...
@overload
def load_section(params: Path, section: str) -> Record: ...
def load_section(params: Path, section: str) -> Record:
    """The validated section of a params.yaml.

    Raises PipelineError naming file, section, key, what was found and what is allowed.
    """
    try:
        document = yaml.load(params.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise PipelineError(
            f"no {params} here. Run `pipeline init demo`, or name one with --params."
        ) from None
    except OSError as error:
        raise PipelineError(f"{params} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{params} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise PipelineError(f"{params} holds no sections; expected {', '.join(SECTIONS)}.")
    if unknown := document.keys() - SECTIONS.keys():
        raise PipelineError(
            f"{params}: unknown section {', '.join(sorted(map(str, unknown)))}; "
            f"allowed are {', '.join(SECTIONS)}."
        )
    if section not in document:
        raise PipelineError(
            f"{params}: section {section} is missing. `pipeline init` writes a complete file."
        )
    try:
        return SECTIONS[section].model_validate(document[section])
    except ValidationError as error:
        problems = "\n".join(f"  {_sentence(section, dict(e))}" for e in error.errors())
        raise PipelineError(f"{params}:\n{problems}") from None


def _sentence(section: str, error: dict[str, Any]) -> str:
    """One finding of the validator as: section.key: what was found, what is allowed."""
    key = ".".join([section, *map(str, error["loc"])])
    found = error["input"]
    match error["type"]:
        case "missing":
            return f"{key}: missing. `pipeline init` writes every key with a comment."
        case "extra_forbidden" if key in RENAMED:
            return f"{key}: this key is now called {RENAMED[key]}; rename it."
        case "extra_forbidden":
            siblings: Any = SECTIONS[section]
            for part in error["loc"][:-1]:
                siblings = siblings.model_fields[part].annotation
            return (
                f"{key}: unknown (found {found!r}); allowed are {', '.join(siblings.model_fields)}."
            )
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case _:
            return f"{key}: found {found!r} ({type(found).__name__}); {error['msg']}."
