"""The list of images that must not be held any more, as people write it.

A line is a URL as the manifest has it, an image_id, or the SHA-256 of an image's bytes (the fetched
ones, or the stored JPEG's); `#` begins a comment line.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipeline.core.provenance import read_text

JUDGED = frozenset({"changed", "forgotten"})  # statuses of images whose bytes could be had
FORGOTTEN = "the list of images to forget names it"
OF_BYTES = f"{FORGOTTEN} by SHA-256 "  # then the first digits of each line, MARK hex digits
MARK = 16
VERSION = 1  # raise it when a row that is forgotten by its bytes says something else
IMAGE_ID, SHA256 = r"[0-9a-f]{32}", r"[0-9a-f]{64}"


@dataclass(frozen=True)
class Forgotten:
    """lines: image_id -> the line that names it; sha256: of bytes that nobody may keep."""

    lines: dict[str, str] = field(default_factory=dict)
    sha256: frozenset[str] = frozenset()

    def reason(self, *digests: str | None) -> str | None:
        """The `error` of a row with bytes of these SHA-256; None where nobody must forget them.

        It holds the beginning of the lines that name them, for a digest of its own is all that the
        row would have kept of its image.
        """
        marks = sorted({digest[:MARK] for digest in digests if digest in self.sha256})
        return OF_BYTES + ", ".join(marks) if marks else None

    def still_names(self, error: str) -> bool:
        """Whether a line that once named a row by its bytes is there today."""
        return not self._known_marks.isdisjoint(_marks(error))

    def unmatched(self, errors: Iterable[str]) -> list[str]:
        """The SHA-256 that name none of the forgotten rows, sorted; errors: of these rows."""
        matched = set().union(*map(_marks, errors))
        return sorted(digest for digest in self.sha256 if digest[:MARK] not in matched)

    @cached_property
    def _known_marks(self) -> frozenset[str]:
        return frozenset(digest[:MARK] for digest in self.sha256)


def _marks(error: str) -> set[str]:
    return set(error.removeprefix(OF_BYTES).split(", ")) if error.startswith(OF_BYTES) else set()


def judged(facts: dict, expected: str | None, forgotten: Forgotten, changed: str) -> dict:
    """An image's facts, after what was agreed about its bytes and what must be forgotten.

    expected: the SHA-256 that the manifest names; changed: `keep` or `refuse` other bytes. What is
    refused or forgotten has no bytes any more; of changed ones the SHA-256 stays, as evidence.
    """
    if reason := forgotten.reason(facts["sha256_original"], facts["sha256"]):
        return dict.fromkeys(facts) | {"status": "forgotten", "error": reason}
    if facts["status"] != "ok" or expected in (None, facts["sha256_original"]):
        return facts
    error = f"changed: the manifest names SHA-256 {expected}"
    if changed == "keep":
        return facts | {"error": error}
    evidence = {name: facts[name] for name in ("attempts", "original_bytes", "sha256_original")}
    return dict.fromkeys(facts) | evidence | {"status": "changed", "error": error}


def image_id(url: str) -> str:
    """32 hex digits that name an image: the hash of its url exactly as written."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def read_forgotten(file: Path) -> Forgotten:
    """Raises PipelineError for a file that is missing or no UTF-8 text."""
    text = read_text(
        file,
        str(file),
        "It lists what must be forgotten, a URL, image_id or SHA-256 a line, and may be empty; "
        "params.yaml names it (download.forget).",
    )
    lines, digests = {}, set()
    for line in text.splitlines():
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if re.fullmatch(SHA256, entry.lower()):
            digests.add(entry.lower())
        elif re.fullmatch(IMAGE_ID, entry.lower()):
            lines[entry.lower()] = entry
        else:
            lines[image_id(entry)] = entry
    return Forgotten(lines, frozenset(digests))
