"""The records that are passed between modules: frozen, and checked when they are read.

Each is documented here and nowhere else. What goes to disk as JSON is a record's `model_dump`.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue

RGB = Annotated[tuple[float, float, float], Field(strict=False)]  # JSON has lists
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Record(BaseModel):
    """No unknown keys, no silent conversion, no assignment after construction."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Preprocessing(Record):
    """How an image reaches a tower. The defaults are OpenAI CLIP's."""

    image_size: Annotated[int, Field(gt=0)] = 224  # px, square
    mean: RGB = (0.48145466, 0.4578275, 0.40821073)  # of RGB values in [0, 1]
    std: RGB = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"  # the centre square, or all of it


class StoredFile(Record):
    """A file of a finished stage."""

    sha256: Digest  # the first 32 hex digits
    bytes: Annotated[int, Field(ge=0)]


class Recipe(Record):
    """Everything that decides a stage's bytes; the libraries are recorded elsewhere.

    parameters: values of params.yaml, and the contents of the files that they name; versions: of
    the modules that decide bytes; inputs: what the stage reads -> digest of its content.
    """

    parameters: dict[str, JsonValue]
    versions: dict[str, int]
    inputs: dict[str, JsonValue]


class Stamp(Record):
    """What a finished stage says of itself: the same for the same shards, on any machine.

    Never an address, a credential or a time.
    """

    stage: str
    stamp: Digest  # of the recipe
    recipe: Recipe
    files: dict[str, StoredFile]  # by name below the stage's folder
    summary: dict[str, Any]  # what the stage found; its form is the stage's own record
    digest: Digest  # of all the rest, by which damage is noticed


class TeacherSummary(Record):
    """What later stages know of the teacher without loading it: the summary of data/teacher."""

    card: dict[str, JsonValue]  # the teacher card without its golden vectors
    embedding_size: Annotated[int, Field(gt=0)]
    preprocessing: Preprocessing
    dtype: Literal["bfloat16", "float32", "imported"]
    least_cosine_to_float32: dict[Literal["image", "text"], float] | None
    views: Annotated[int, Field(gt=0)]
    images: Annotated[int, Field(ge=0)]  # rows: images times views
    texts: Annotated[int, Field(ge=0)]
    notes: dict[str, int] = {}  # further counts, of imported embeddings


class Metric(Record):
    """One figure of an evaluation beside what it must be compared with."""

    value: float
    low: float  # 95 % interval, over images
    high: float
    floor: float | None  # what a student that learned nothing gets: the mean embedding, chance
    ceiling: float | None  # what the teacher gets


class StepPosition(NamedTuple):
    """Where training stands; with the batch size, all that a resume needs to know of the data."""

    seed: int
    epoch: int
    step: int  # within the epoch


class RowAddress(NamedTuple):
    """Where a row of data/images lies."""

    shard: int
    group: int  # row group of the shard
    row: int  # in the row group
