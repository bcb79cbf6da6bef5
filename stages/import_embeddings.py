"""Embeddings that others computed -> data/teacher, as stage teacher_embed would have left it.

Two layouts are read: a folder as clip-retrieval writes it (`img_emb/*.npy` beside
`metadata/*.parquet`, optionally `text_emb/*.npy`), and npz files with an array `embedding` and
arrays of names beside it. Vectors find their images by url, else by file name, else by key (the
file name without its ending, or the image_id). Only view 0 exists then: nobody has seen crops.

Cost: two reads of the vectors, which stay on disk; the memory is that of the names.

With DVC: `dvc freeze teacher_embed`, and `dvc repro` takes data/teacher as it lies there instead of
making it anew. `pipeline teacher-embed` itself never replaces it.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from zipfile import BadZipFile, ZipInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import (
    contents,
    file_digest,
    libraries,
    lock,
    require_inputs,
    teacher_summary,
)
from pipeline.core.records import (
    NamedTeacher,
    Preprocessing,
    Recipe,
    TeacherIdentity,
    TeacherSummary,
)
from pipeline.core.work import Work
from pipeline.data import shards
from pipeline.data.texts import text_id
from pipeline.data.views import View, canonical_view

STAGE = "import_embeddings"
VERSION = 2  # raise it when the same source gives other shards
PROMPTS = "texts/prompts.parquet"
PATHS, KEYS = ("url", "image_path", "image"), ("key", "image_id")
NAMES = (*PATHS, *KEYS)  # columns that may name an image
SLACK = 1 << 20  # bytes
TEXTS = ("caption", "prompt")
SAME = 1e-3  # largest difference of any value between two unit vectors that count as one
OPENAI_CLIP = Preprocessing()
BLOCK = 65536  # vectors checked at a time


class Part(NamedTuple):
    """n vectors (n, E) and the columns of n names or texts that stand beside them."""

    source: Path
    columns: dict[str, list]
    vectors: np.ndarray


class VectorAddress(NamedTuple):
    """Where a vector lies."""

    part: Part
    row: int

    def unit(self) -> np.ndarray:
        """(E,) float16, unit length."""
        return shards.to_float16(self.part.vectors[self.row][None].astype(np.float32))[0]


def import_embeddings(
    data: Path,
    source: Path,
    *,
    teacher: NamedTeacher,
    texts: Iterable[Path] = (),
    preprocessing: Preprocessing = OPENAI_CLIP,
) -> TeacherSummary:
    """Write data/teacher from vectors of data/images' images; returns the summary with its counts.

    source: a clip-retrieval folder, or an npz with `embedding` (n, E) and one or more of NAMES.
    texts: npz files with `embedding` and `prompt`, or `caption` beside a name of its image.
    teacher: recorded; preprocessing: the teacher's, which a student needs.
    Good images without a vector get no row: `pipeline select` leaves them out as `no embedding`.

    Raises PipelineError: data/teacher of another origin, an unknown layout, vectors of unequal
    width, zero or not finite, one name with two vectors, no vector that belongs to an image.
    """
    with lock(data, STAGE):
        inputs, texts = require_inputs(data, STAGE), sorted(texts)
        sources = [file_digest(path) for path in [*_source_files(source), *texts]]
        identity = TeacherIdentity(card=teacher)
        recipe = Recipe(
            parameters={
                "teacher": identity.model_dump(),
                "preprocessing": preprocessing.model_dump(mode="json"),
            },
            versions={"imported": VERSION, "shards": shards.VERSION},
            inputs=contents(inputs) | {"source": sources},
        )
        work = Work(data, STAGE, data / "teacher", recipe)
        if not work.published():
            work.begin()
            image_parts, text_parts = _parts(source)
            text_parts += [_npz(path) for path in texts]
            size = _checked_width([*image_parts, *text_parts])
            known, good = _known_names(data / "images")
            vectors, counts = _image_addresses(image_parts, known)
            if not vectors:
                _refuse_unknown(image_parts[0], known)
            counts["images without embedding"] = len(good - vectors.keys())
            captions, prompts, text_counts = _text_addresses(text_parts, known)
            names = inputs["images"].files
            for name in names:
                shard = data / "images" / name
                tables = _image_tables(shard, vectors, preprocessing, size)
                _commit(work, f"images/{name}", shards.teacher_schema(size), tables)
                _commit_texts(work, f"texts/{name}", _captions(shard, captions), size)
            texts_alone = [(None, text, prompts[text]) for text in sorted(prompts)]
            _commit_texts(work, PROMPTS, [texts_alone], size)
            counts |= text_counts
            summary = _summary(identity, preprocessing, size, counts)
            files = [f"{kind}/{name}" for name in names for kind in ("images", "texts")]
            work.publish([*files, PROMPTS], summary.model_dump(mode="json"))
        return teacher_summary(data)


def _summary(
    identity: TeacherIdentity, preprocessing: Preprocessing, size: int, counts: dict[str, int]
) -> TeacherSummary:
    """counts: rows of images and texts, and whatever else was counted."""
    rows = ("images", "texts")
    return TeacherSummary(
        teacher=identity,
        embedding_size=size,
        preprocessing=preprocessing,
        dtype="imported",
        batch=None,
        least_cosine_to_float32=None,
        views=1,
        **{name: counts[name] for name in rows},
        further_counts={name: count for name, count in counts.items() if name not in rows},
    )


def _source_files(source: Path) -> list[Path]:
    if source.is_dir():
        patterns = ("img_emb/*.npy", "text_emb/*.npy", "metadata/*.parquet")
        paths = [path for pattern in patterns for path in sorted(source.glob(pattern))]
        if paths and paths[0].parent.name == "img_emb":
            return paths
    elif source.suffix == ".npz" and source.is_file():
        return [source]
    raise PipelineError(
        f"{source} holds no embeddings in a known layout. Expected an .npz file with `embedding` "
        f"and one of {', '.join(NAMES)}, or a folder with img_emb/*.npy and metadata/*.parquet."
    )


def _parts(source: Path) -> tuple[list[Part], list[Part]]:
    """Parts of image vectors, and those of text vectors that lie in the same folder."""
    if source.is_file():
        return [_npz(source)], []
    tables = {_number(path): path for path in source.glob("metadata/*.parquet")}
    beside = {_number(path): path for path in source.glob("text_emb/*.npy")}
    images, texts = [], []
    for path in sorted(source.glob("img_emb/*.npy")):
        number = _number(path)
        if number not in tables:
            raise PipelineError(f"{path} has no metadata/*_{number}.parquet that names its rows.")
        vectors = _npy(path)
        columns = _metadata(tables[number], vectors.nbytes)
        images.append(_whole(path, columns, vectors))
        if number in beside and "caption" in columns:
            texts.append(_whole(beside[number], columns, _npy(beside[number])))
    return images, texts


def _npy(path: Path) -> np.ndarray:
    """Vectors of an .npy file, mapped."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(f"{path} cannot be read as npy: {reason}") from None


def _metadata(path: Path, vector_bytes: int) -> dict[str, list]:
    """The names beside somebody else's vectors, which are not longer than these."""
    try:
        known = set(pq.read_schema(path).names)
        names = [name for name in (*NAMES, "caption") if name in known]
        table = pq.read_table(path, columns=names, read_dictionary=names)  # what repeats, once
        for name in names:
            _refuse_long(path, name, sum(map(_text_bytes, table[name].chunks)), vector_bytes)
        return {name: table[name].to_pylist() for name in names}
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(
            f"{path} is damaged or no Parquet file ({reason}). Get it again from where the "
            "embeddings come from, and run `pipeline import embeddings` again."
        ) from None


def _number(path: Path) -> str:
    """img_emb_0.npy and metadata_0.parquet belong together."""
    return path.stem[len(path.stem.rstrip("0123456789")) :]


def _npz(path: Path) -> Part:
    try:
        with np.load(path, allow_pickle=False) as file:
            used = [name for name in ("embedding", *NAMES, *TEXTS) if name in file.files]
            _refuse_swollen(path, {name: file.zip.getinfo(f"{name}.npy") for name in used})
            columns = {name: file[name] for name in used}
    except (OSError, ValueError, KeyError, MemoryError, BadZipFile) as error:
        raise PipelineError(f"{path} cannot be read as npz: {error}") from None
    vectors = columns.pop("embedding", np.zeros(0))
    return _whole(path, {n: columns[n].tolist() for n in (*NAMES, *TEXTS) if n in columns}, vectors)


def _refuse_swollen(path: Path, members: dict[str, ZipInfo]) -> None:
    """Before anything is allocated: vectors hardly compress, and names are not longer than they."""
    vectors = members.get("embedding")
    if vectors is None:
        return
    if vectors.file_size > 4 * vectors.compress_size + SLACK:
        raise PipelineError(
            f"{path}: embedding is said to have {vectors.file_size} bytes, and is compressed to "
            f"{vectors.compress_size}: no embeddings are. Write it anew with numpy.savez."
        )
    for name, member in members.items():
        _refuse_long(path, name, member.file_size, vectors.file_size)


def _refuse_long(path: Path, name: str, size: int, vector_bytes: int) -> None:
    if size > 16 * vector_bytes + SLACK:
        raise PipelineError(
            f"{path}: {name} is said to have {size} bytes beside an embedding of {vector_bytes}: "
            "expected a short text a row."
        )


def _text_bytes(column: pa.Array) -> int:
    """About how many bytes a column has, written out."""
    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    sizes = np.array([len(value) for value in column.dictionary.to_pylist()], np.int64)
    return int(sizes[column.indices.drop_null().to_numpy()].sum())


def _whole(path: Path, columns: dict[str, list], vectors: np.ndarray) -> Part:
    """Raises PipelineError unless there is a matrix with a name for every row."""
    if vectors.ndim != 2 or {len(column) for column in columns.values()} != {len(vectors)}:
        lengths = {name: len(column) for name, column in columns.items()}
        raise PipelineError(
            f"{path}: found embeddings of shape {vectors.shape} and the names {lengths}; expected "
            f"(n, E) and n values in at least one of {', '.join((*NAMES, *TEXTS))}."
        )
    return Part(path, columns, vectors)


def _checked_width(parts: list[Part]) -> int:
    """E. Raises PipelineError where widths differ, or rows are zero or not finite."""
    widths = {str(part.source): part.vectors.shape[1] for part in parts}
    if len(set(widths.values())) > 1:
        raise PipelineError(
            f"the embeddings differ in width, so they are no one teacher's: {widths}"
        )
    for part in parts:
        bad: list[int] = []
        for start in range(0, len(part.vectors), BLOCK):
            length = np.linalg.norm(part.vectors[start : start + BLOCK].astype(np.float32), axis=1)
            bad += (start + np.flatnonzero(~np.isfinite(length) | (length == 0))).tolist()
        if bad:
            raise PipelineError(
                f"{part.source}: {len(bad)} of {len(part.vectors)} embeddings are zero or not "
                f"finite, such as {[_row(part, row) for row in bad[:3]]}. Compute them again, or "
                "leave them out."
            )
    return parts[0].vectors.shape[1]


def _row(part: Part, row: int) -> dict:
    """What names a row, for a message."""
    return {name: column[row] for name, column in part.columns.items()}


def _known_names(images: Path) -> tuple[dict[str, str | None], set[str]]:
    """Every name of every good image -> its image_id, None where two share it; all image_ids."""
    known: dict[str, str | None] = {}
    good: set[str] = set()
    for path in shards.shard_paths(images, "download"):
        for row in shards.read_shard(path, "download", ["image_id", "url", "status"]).to_pylist():
            if row["status"] == "ok":
                good.add(row["image_id"])
                for name in {row["image_id"], *_names(row["url"])}:
                    known[name] = None if name in known else row["image_id"]
    return known, good


def _names(name: str) -> tuple[str, str, str]:
    """The names that a url or path gives an image, the surest first."""
    file = PurePosixPath(unquote(urlsplit(name).path) or name).name
    return name, file, PurePosixPath(file).stem


def _owner(part: Part, row: int, known: dict[str, str | None]) -> str | None:
    """The image_id that a row's names lead to, if any."""

    def written(names: tuple[str, ...]) -> list[str]:
        names_given = [part.columns[name][row] for name in names if name in part.columns]
        return [str(name) for name in names_given if name is not None]

    paths = [_names(path) for path in written(PATHS)]
    written_paths, file, stem = zip(*paths, strict=True) if paths else ((), (), ())
    candidates = (*written_paths, *file, *written(KEYS), *stem)
    return next((known[name] for name in candidates if known.get(name)), None)


def _image_addresses(
    parts: list[Part], known: dict[str, str | None]
) -> tuple[dict[str, VectorAddress], dict[str, int]]:
    """image_id -> its vector, and how many vectors did what."""
    addresses: dict[str, VectorAddress] = {}
    counts = {"images": 0, "repeated embeddings": 0, "embeddings without image": 0}
    for address in _all_addresses(parts):
        key = _owner(*address, known)
        if key is None:
            counts["embeddings without image"] += 1
        else:
            new = _note(addresses, key, address)
            counts["images" if new else "repeated embeddings"] += 1
    return addresses, counts


def _text_addresses(
    parts: list[Part], known: dict[str, str | None]
) -> tuple[dict[str, dict[str, VectorAddress]], dict[str, VectorAddress], dict[str, int]]:
    """Captions by image_id and text, prompts by text, and how many vectors did what."""
    captions: dict[str, dict[str, VectorAddress]] = {}
    prompts: dict[str, VectorAddress] = {}
    counts = {"texts": 0, "repeated texts": 0, "texts without image": 0}
    for address in _all_addresses(parts):
        part, row = address
        if not part.columns.keys() & {*TEXTS}:
            raise PipelineError(
                f"{part.source}: found the columns {', '.join(part.columns)}; expected `prompt`, "
                "or `caption` beside a name of its image."
            )
        if "prompt" in part.columns:
            group, text = prompts, part.columns["prompt"][row]
        else:
            key, text = _owner(part, row, known), part.columns["caption"][row]
            group = captions.setdefault(key, {}) if key else None
        if group is None or not text:
            counts["texts without image"] += 1
        else:
            new = _note(group, text, address)
            counts["texts" if new else "repeated texts"] += 1
    return captions, prompts, counts


def _all_addresses(parts: list[Part]) -> Iterator[VectorAddress]:
    return (VectorAddress(part, row) for part in parts for row in range(len(part.vectors)))


def _note(addresses: dict[str, VectorAddress], key: str, address: VectorAddress) -> bool:
    """Note a vector and say whether it is new. Raises PipelineError for a different one."""
    first = addresses.setdefault(key, address)
    if np.abs(first.unit() - address.unit()).max() > SAME:
        raise PipelineError(
            f"one thing has two different embeddings: {_row(*first)} in {first.part.source} and "
            f"{_row(*address)} in {address.part.source}. Leave one of them out."
        )
    return first is address


def _refuse_unknown(part: Part, known: dict[str, str | None]) -> None:
    theirs = [_row(part, row) for row in range(min(3, len(part.vectors)))]
    raise PipelineError(
        f"none of the embeddings belongs to an image of data/images: {part.source} names them like "
        f"{theirs}, the images are named like {list(known)[:3]}. Download the images that the "
        "embeddings were made from, under the same urls or file names."
    )


def _image_tables(
    shard: Path, vectors: dict, preprocessing: Preprocessing, size: int
) -> Iterator[pa.Table]:
    """The vectors of each row group's good images, in the columns and order of stage one."""
    facts = ["image_id", "status", "sha256", "width", "height"]
    with shards.open_shard(shard, "download") as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=facts).to_pylist()
            rows = [r for r in rows if r["status"] == "ok" and r["image_id"] in vectors]
            teacher_view = preprocessing.resize_mode, preprocessing.image_size
            boxes = [canonical_view(row["width"], row["height"], *teacher_view) for row in rows]
            matrix = [vectors[row["image_id"]].unit() for row in rows]
            matrix = np.array(matrix, np.float16).reshape(len(rows), size)
            columns = {name: [row[name] for row in rows] for name in ("image_id", "sha256")}
            columns |= {name: [getattr(box, name) for box in boxes] for name in View._fields}
            columns |= {"view": [0] * len(rows), "embedding": shards.embedding_column(matrix)}
            schema = shards.teacher_schema(size)
            yield pa.table({field.name: columns[field.name] for field in schema}).cast(schema)


def _captions(shard: Path, captions: dict) -> list[list[tuple]]:
    """(image_id, text, address) of each row group's images, in their order, each image once."""
    groups, seen = [], set()
    with shards.open_shard(shard, "download") as file:
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["image_id"])["image_id"].to_pylist()
            new = [key for key in dict.fromkeys(ids) if key not in seen]
            groups.append(
                [(k, t, address) for k in new for t, address in captions.get(k, {}).items()]
            )
            seen.update(new)
    return groups


def _commit_texts(work: Work, name: str, groups: list[list[tuple]], size: int) -> None:
    schema = shards.texts_schema(size)
    _commit(work, name, schema, [_text_table(rows, size).cast(schema) for rows in groups])


def _text_table(rows: list[tuple], size: int) -> pa.Table:
    matrix = np.array([address.unit() for *_, address in rows], np.float16).reshape(len(rows), size)
    return pa.table(
        {
            "text_id": pa.array([text_id(key, text) for key, text, _ in rows], pa.string()),
            "image_id": pa.array([key for key, *_ in rows], pa.string()),
            "text": pa.array([text for _, text, _ in rows], pa.string()),
            "embedding": shards.embedding_column(matrix),
        }
    )


def _commit(work: Work, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    made = {"stage": STAGE, **work.recipe.model_dump(), "libraries": libraries("numpy", "pyarrow")}
    work.commit(name, partial(shards.write_shard, schema=schema, groups=tables, provenance=made))
