"""Rules of fetching for tests, and a client that follows them."""

import io
from urllib.request import Request

import pytest
from PIL import Image

from pipeline.fetch.http import HttpClient
from pipeline.fetch.policy import FetchError, FetchRules


def rules(**changes) -> FetchRules:
    """For img2dataset: loopback is allowed, robots.txt is respected."""
    return FetchRules(
        **dict(
            timeout_s=2.0,
            max_bytes=300_000,
            max_pixels=2_000_000,
            max_redirects=3,
            retries=0,
            allow=("127.0.0.0/8", "localhost"),
            root=None,
            user_agent="extrahead/0 (+img2dataset; test)",
            respect_robots=True,
            per_host=16,
            image_size=64,
            quality=90,
        )
        | changes
    )


def client(**changes) -> HttpClient:
    """One address is allowed, and robots.txt is not asked for."""
    tighter = {"max_bytes": 100_000, "max_pixels": 1_000_000, "per_host": 8}
    asked = {"allow": ("127.0.0.1",), "respect_robots": False}
    return HttpClient(rules(**tighter | asked | changes))


def get(url: str, **changes) -> bytes:
    return client(**changes).open(Request(url)).read()


def why_not(url: str, **changes) -> str:
    """The status with which a fetch fails."""
    with pytest.raises(FetchError) as caught:
        get(url, **changes)
    return caught.value.status


def picture(width: int, height: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, kind)
    return file.getvalue()
