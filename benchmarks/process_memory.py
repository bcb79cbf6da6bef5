"""What a process holds, as Linux says: a child's numbers are its own, unlike getrusage's."""

from pathlib import Path


def held(field: str) -> float:
    """MiB of this process: RssAnon (now, of its own), VmRSS (with mapped files), VmHWM (its most)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))
