"""Which stage writes which folder of data/, by which command, from which others: said once."""

from dataclasses import dataclass, field
from pathlib import Path

WORK = ".work"  # below data/: what is under way, never an artifact
CACHE = "cache"  # below data/.work: what was read of shards in a remote store
STORE = ".store"  # below data/: finished shards, to which outs are links
ADDRESS = "EXTRAHEAD_STORE"  # environment variable: where the remote store is
RUNS = "runs"  # below data/: one small Parquet row per finished run
SHARDED = ("download", "teacher_embed")  # stages whose shards lie in stores
STAMP_FILE = "_stamp.json"  # readers of a folder of Parquet pass over such a name


def command(stage: str) -> str:
    """What runs a stage, behind `pipeline`."""
    return stage.replace("import_", "import ").replace("_", "-")


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline, its artifact and what the artifact is made from.

    tables: names that DuckDB gives to the Parquet files of its folder -> their pattern below it.
    """

    name: str  # module stages/<name>.py and, but for import_embeddings, a section of params.yaml
    folder: str  # below data/
    inputs: tuple[str, ...] = ()  # folders below data/
    tables: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What runs it: `pipeline <command>`."""
        return command(self.name)

    def out(self, data: Path) -> Path:
        return data / self.folder


_TEACHER_TABLES = {"teacher": "images/*.parquet", "texts": "texts/*.parquet"}

STAGES = {
    stage.name: stage
    for stage in (
        Stage("download", "images", tables={"images": "*.parquet"}),
        Stage("teacher_embed", "teacher", ("images",), _TEACHER_TABLES),
        Stage("import_embeddings", "teacher", ("images",), _TEACHER_TABLES),
        Stage("select", "selection", ("images", "teacher"), {"selection": "*.parquet"}),
        Stage("distill", "student", ("images", "teacher", "selection")),
        Stage(
            "evaluate",
            "evaluation",
            ("images", "teacher", "selection", "student"),
            {"student_index": "index/*.parquet"},
        ),
    )
}
# data/teacher has two makers; the one that DVC runs is the one that messages name.
BY_FOLDER = {stage.folder: stage for stage in reversed(STAGES.values())} | {
    "teacher": STAGES["teacher_embed"]
}
FOLDERS = ("images", "teacher", "selection", "student", "evaluation")  # as data flows
