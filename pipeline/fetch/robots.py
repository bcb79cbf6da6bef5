"""What a site allows: robots.txt (RFC 9309) and X-Robots-Tag, in bounded time and memory.

The standard library's parser knows no wildcards and lets the first rule win, so it would fetch
what `Disallow: /*.jpg$` forbids.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote

from pipeline.fetch.policy import FetchError

NO_USE = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}

MOST_COMPARISONS = 100_000_000  # characters of rules with wildcards times those of a path: 0.1 s
MOST_RULES = 5_000  # of one robots.txt that count for us; the longest known have some thousand
KEPT_CHARACTERS = 8_000_000  # of all the rules that a cache keeps

Rules = list[tuple[str, bool]]  # pattern, allowed
_STARS = re.compile(r"\*+")
_LINE = re.compile(
    r"^[ \t]*(user-agent|allow|disallow)[ \t]*:([^#\n]*)", re.IGNORECASE | re.MULTILINE
)


class UnknownRules(NamedTuple):
    """A robots.txt that could not be had."""

    error: FetchError
    tries: int


class TooManyRules(ValueError):
    """More rules than are checked, or too long ones for so long a path."""


def robots_rules(text: str, names: Iterable[str]) -> Rules:
    """The rules of a robots.txt for a robot of these (lower-case) names.

    All groups that name it count together; where none does, those for `*`. Linear in the text.
    Raises TooManyRules beyond MOST_RULES.
    """
    names = frozenset(names)
    ours: Rules = []
    everyone: Rules = []
    found_us = for_us = for_all = in_rules = False
    for line in _LINE.finditer(text.lstrip("\ufeff").replace("\r", "\n")):
        key, value = line[1].lower(), line[2].strip()
        if key == "user-agent":
            if in_rules:
                for_us = for_all = in_rules = False
            for_us |= value.lower() in names
            for_all |= value == "*"
            found_us |= for_us
            continue
        in_rules = True
        rule = [(_STARS.sub("*", unquote(value)), key == "allow")] if value else []
        ours += rule if for_us else []
        everyone += rule if for_all else []
        if max(len(ours), len(everyone)) > MOST_RULES:
            raise TooManyRules(f"more than {MOST_RULES} rules")
    return ours if found_us else everyone


class RobotsCache:
    """What is known of origins; the least recently asked ones are forgotten. Thread-safe."""

    def __init__(self, characters: int = KEPT_CHARACTERS):
        self.most, self.held = characters, 0
        self.entries: OrderedDict[str, tuple[Rules | UnknownRules, int]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, origin: str) -> Rules | UnknownRules | None:
        """What was put there, or None."""
        with self.lock:
            if origin not in self.entries:
                return None
            self.entries.move_to_end(origin)
            return self.entries[origin][0]

    def put(self, origin: str, known: Rules | UnknownRules) -> None:
        size = 300 + len(origin)  # of an entry without rules
        if isinstance(known, list):
            size += sum(100 + len(pattern) for pattern, _ in known)
        with self.lock:
            self.held += size - self.entries.pop(origin, ([], 0))[1]
            self.entries[origin] = known, size
            while self.held > self.most and len(self.entries) > 1:
                _, (_, freed) = self.entries.popitem(last=False)
                self.held -= freed


def forbidden_by_rule(rules: Rules, path: str) -> str | None:
    """The pattern that forbids path (with its query), or None.

    The longest pattern that matches decides; allow wins a tie. Looking for what follows a wildcard
    can cost the product of both lengths: raises TooManyRules beyond MOST_COMPARISONS.
    """
    path = unquote(path)
    if len(path) * sum(len(pattern) for pattern, _ in rules if "*" in pattern) > MOST_COMPARISONS:
        raise TooManyRules(f"rules too many and too long for a path of {len(path)} characters")
    matching = [(len(p), allowed, p) for p, allowed in rules if _matches(p, path)]
    _, allowed, pattern = max(matching, default=(0, True, ""))
    return None if allowed else pattern


def _matches(pattern: str, path: str) -> bool:
    """`*` is any text, a final `$` the end. Linear in time: the pattern is untrusted."""
    anchored = pattern.endswith("$")
    first, *pieces = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if anchored and not pieces:
        return path == first
    last = pieces.pop() if anchored else ""
    at = len(first)
    for piece in pieces:
        start = path.find(piece, at)
        if start < 0:
            return False
        at = start + len(piece)
    return path.endswith(last) and len(path) - len(last) >= at


def forbidden_by_tag(values: Iterable[str], names: Iterable[str]) -> str | None:
    """The directive of X-Robots-Tag headers that forbids use by a robot of these names, or None.

    Directives that follow a `name:` are for that robot alone; the others are for everyone.
    """
    for value in values:
        agent = "*"
        for item in value.lower().split(","):
            head, colon, rest = (part.strip() for part in item.partition(":"))
            if colon and head not in _WITH_VALUE:
                agent, head = head, rest
            if head in NO_USE and agent in {"*", *names}:
                return head
    return None
