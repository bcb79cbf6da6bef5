"""The records that are passed between modules: frozen, and checked when they are read.

Each is documented here and nowhere else. What goes to disk as JSON is a record's `model_dump`.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)

if TYPE_CHECKING:
    import numpy as np

RGB = Annotated[tuple[float, float, float], Field(strict=False)]  # JSON has lists
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Record(BaseModel):
    """No unknown keys, no silent conversion ("8" is not 8), no assignment after construction."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Preprocessing(Record):
    """How an image reaches a tower. The defaults are OpenAI CLIP's."""

    image_size: Annotated[int, Field(gt=0)] = 224  # px, square
    mean: RGB = (0.48145466, 0.4578275, 0.40821073)  # of RGB values in [0, 1]
    std: RGB = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"  # the centre square, or all of it

    def at(self, image_size: int) -> "Preprocessing":
        """The same for another image size (px)."""
        return self.model_copy(update={"image_size": image_size})


class StoredFile(Record):
    """A file of a finished stage."""

    sha256: Digest  # the first 32 hex digits
    bytes: Annotated[int, Field(ge=0)]
    stored: str | None = None  # its name in the stage's store, where it has one


class Recipe(Record):
    """Everything that decides a stage's bytes, JSON-able; libraries are recorded elsewhere."""

    parameters: dict[str, Any] = {}  # of params.yaml, and contents of files they name
    versions: dict[str, int] = {}  # of the modules that decide bytes
    inputs: dict[str, Any] = {}  # what the stage reads -> digest; folders of data/ by name


class Part(Record):
    """A shard that a plan asks for."""

    name: str  # below the stage's folder
    origin: Digest  # of all that decides its bytes


class Plan(Record):
    """What a stage is to make: small, and the same on every machine from the same inputs."""

    stage: str
    recipe: Recipe
    parts: tuple[Part, ...]  # by name
    round: Annotated[int, Field(ge=0)] = 0  # of fetching; a retry begins the next one


class Entry(Record):
    """A finished shard of a store."""

    name: str  # below the stage's folder
    origin: Digest  # of all that decided its bytes
    round: Annotated[int, Field(ge=0)]  # in which it was fetched
    good: Annotated[int, Field(ge=0)]  # rows that are no failures
    sha256: Digest
    bytes: Annotated[int, Field(ge=0)]

    @property
    def stored(self) -> str:
        """Its name in the store."""
        stem, _, suffix = self.name.rpartition(".")
        return f"{stem}-{self.origin}-{self.round}-{self.good}-{self.sha256}.{suffix}"


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


class NamedTeacher(Record):
    """A teacher card without its golden vectors: which model and weights, by what name."""

    name: str  # how this teacher is called in results
    model: str  # open_clip model name, or local-dir:FOLDER relative to the card
    pretrained: str | None  # open_clip tag, or a checkpoint file relative to the card
    sha256: str | None  # of the local checkpoint's bytes; null for a tag
    activation: Literal["gelu", "quickgelu"]


class TeacherIdentity(Record):
    """What determines a teacher's vectors, apart from dtype and batch size."""

    card: NamedTeacher
    config: Digest | None = None  # of a local folder's open_clip_config.json
    version: int | None = None  # of models/teacher.py; null for imported embeddings


class TeacherSummary(Record):
    """What later stages know of the teacher without loading it: the summary of data/teacher."""

    teacher: TeacherIdentity
    embedding_size: Annotated[int, Field(gt=0)]
    preprocessing: Preprocessing
    dtype: Literal["bfloat16", "float32", "imported"]
    batch: Annotated[int, Field(gt=0)] | None  # of the inference; null for imported embeddings
    least_cosine_to_float32: dict[str, float] | None  # by tower, on some rows; null for float32
    views: Annotated[int, Field(gt=0)]
    images: Annotated[int, Field(ge=0)]  # rows: images times views
    texts: Annotated[int, Field(ge=0)]
    further_counts: dict[str, int] = {}  # of imported embeddings: what was joined with what


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


class Sample(NamedTuple):
    """One stored image and view as the loader hands it to decoding."""

    image_id: str
    jpg: bytes
    box: tuple[float, float, float, float]  # left, top, right, bottom in stored pixels
    flip: bool  # left and right, after the crop
    target: "np.ndarray"  # (E,) float32, unit length: the teacher's embedding of this view
    text: "np.ndarray | None"  # (E,) float32, unit length: of one caption, where one is read


class Metric(Record):
    """One number of an evaluation beside what it must be compared with."""

    value: float
    low: float  # 95 % interval, over images
    high: float
    floor: float | None = None  # what no learning gets: the mean embedding, chance
    ceiling: float | None = None  # what the teacher gets, or a perfect score
    centre: float | None = None  # what always answering the centre of the view gets

    def share(self, value: float) -> float:
        """The part of the way from floor (0) to ceiling (1) at which a value lies.

        Raises ValueError without floor or ceiling, ZeroDivisionError where they are equal.
        """
        if self.floor is None or self.ceiling is None:
            raise ValueError("this metric has no floor or no ceiling")
        return (value - self.floor) / (self.ceiling - self.floor)

    def beside(self, **ends: float) -> "Metric":
        """The same with floor, ceiling or centre."""
        return Metric(**self.model_dump() | ends)


class MetricGroup(Record):
    """What is measured of one thing. On disk one flat object: facts and metrics by name."""

    metrics: dict[str, Metric] = {}
    facts: dict[str, int | float | str] = {}  # how much was measured, what is worst
    left_out: str | None = None  # why nothing is

    def __getitem__(self, name: str) -> Metric:
        return self.metrics[name]

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.keys() <= cls.model_fields.keys():
            return values
        facts = dict(values)
        metrics = {name: facts.pop(name) for name, x in values.items() if isinstance(x, dict)}
        return {"metrics": metrics, "left_out": facts.pop("left_out", None), "facts": facts}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        metrics = {
            name: metric.model_dump(exclude_none=True) for name, metric in self.metrics.items()
        }
        left_out = {} if self.left_out is None else {"left_out": self.left_out}
        return self.facts | metrics | left_out


class MeasuredCheckpoint(Record):
    """Which weights of a training run were kept."""

    which: str
    step: int
    val_cosine: float | None


class Evaluation(Record):
    """The summary of data/evaluation, and its metrics.json."""

    checkpoint: MeasuredCheckpoint | None = None  # null for an imported student
    split: str
    images: int
    undecodable: int
    near_training: MetricGroup
    fidelity: MetricGroup
    student_to_teacher: MetricGroup
    text_to_image: MetricGroup | None = None  # where images have captions
    box_search: MetricGroup | None = None  # where 8 images have a box of one text
    pointing: MetricGroup | None = None  # where images have boxes
    zero_shot: MetricGroup | None = None  # where images have labels
    segmentation: MetricGroup | None = None  # where images have masks

    def groups(self) -> dict[str, MetricGroup]:
        """Those that were measured, by name, in the order in which they are shown."""
        values = {name: getattr(self, name) for name in Evaluation.model_fields}
        return {name: value for name, value in values.items() if isinstance(value, MetricGroup)}

    def to_json(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return self.model_dump(exclude_none=True)

    def values(self) -> dict[str, int | float]:
        """All numbers under names with dots, such as fidelity.cosine: for the table of runs."""
        flat: dict[str, int | float] = {"images": self.images, "undecodable": self.undecodable}
        for name, group in self.groups().items():
            numbers = {key: x for key, x in group.facts.items() if isinstance(x, int | float)}
            flat |= {f"{name}.{key}": x for key, x in numbers.items()}
            flat |= {f"{name}.{key}": metric.value for key, metric in group.metrics.items()}
        return flat
