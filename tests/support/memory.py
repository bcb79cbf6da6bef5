"""Memory of a process as Linux counts it: what getrusage says begins with the parent's peak."""

from pathlib import Path


def held(kind: str, process: int | str = "self") -> int:
    """Bytes that a process holds (VmRSS; RssAnon: of its own), or held at most (VmHWM)."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split(kind + ":")[1].split()[0])
