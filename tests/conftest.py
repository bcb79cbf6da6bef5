"""Fixtures that more than one test file uses."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real photos, real CLIP vectors and parity fixtures, named by EXTRAHEAD_SHARED.

    Absent elsewhere: tests that need it skip. In CI a missing folder is a failure, not a skip.
    """
    folder = os.environ.get("EXTRAHEAD_SHARED")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = f"EXTRAHEAD_SHARED={folder!r} names no folder with photos and reference vectors"
    if os.environ.get("CI") == "true" and folder is not None:
        pytest.fail(reason)
    pytest.skip(reason)
