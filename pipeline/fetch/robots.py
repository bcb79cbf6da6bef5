"""What a site allows: robots.txt (RFC 9309) and X-Robots-Tag, as pure functions of their text.

The standard library's parser knows no wildcards and lets the first rule win, so it would fetch
what `Disallow: /*.jpg$` forbids.
"""

from collections.abc import Iterable
from urllib.parse import unquote

NO_USE = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}

Rules = list[tuple[str, bool]]  # pattern, allowed


def robots_rules(text: str, names: Iterable[str]) -> Rules:
    """The rules of a robots.txt for a robot of these (lower-case) names.

    All groups that name it count together; where none does, those for `*`.
    """
    ours: Rules = []
    everyone: Rules = []
    found_us, agents, in_rules = False, set(), False
    for line in text.lstrip("\ufeff").splitlines():
        key, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        key = key.lower()
        if key == "user-agent":
            agents = {value.lower()} if in_rules else agents | {value.lower()}
            in_rules = False
            found_us |= not agents.isdisjoint(names)
        elif key in ("allow", "disallow"):
            in_rules = True
            rule = [(unquote(value), key == "allow")] if value else []
            ours += rule if not agents.isdisjoint(names) else []
            everyone += rule if "*" in agents else []
    return ours if found_us else everyone


def forbidden_by_rule(rules: Rules, path: str) -> str | None:
    """The pattern that forbids path (with its query), or None.

    The longest pattern that matches decides; allow wins a tie.
    """
    matching = [(len(p), allowed, p) for p, allowed in rules if _matches(p, unquote(path))]
    _, allowed, pattern = max(matching, default=(0, True, ""))
    return None if allowed else pattern


def _matches(pattern: str, path: str) -> bool:
    """`*` is any text, a final `$` the end. Linear in time: the pattern is a stranger's."""
    anchored = pattern.endswith("$")
    first, *pieces = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if anchored and not pieces:
        return path == first
    last = pieces.pop() if anchored else ""
    at = len(first)
    for piece in pieces:
        found = path.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
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
