"""SECURITY.md promises what a test attacks: every test that it names is there, every row names some."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECURITY = (ROOT / "SECURITY.md").read_text()


def test_every_test_that_security_md_names_exists():
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py")))
    there = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    there |= {path.name for path in (ROOT / "tests").glob("test_*.py")}
    named = set(re.findall(r"`(test_\w+(?:\.py)?)`", SECURITY))
    assert len(named) > 40
    assert not named - there


def test_every_promise_names_the_tests_that_attack_it():
    rows = [line for line in SECURITY.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 10
    assert all("`test_" in row.rsplit(" | ", 1)[1] for row in rows)
