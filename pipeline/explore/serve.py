"""`pipeline serve`: type a text, see what student and teacher find, click an image for its map.

Plain pages without scripts, from vectors in memory; needs the extra `web` (FastAPI, uvicorn).

Who is kept out: other machines (it listens on loopback unless --public), other users of this machine
(every address begins with a token that is drawn at the start and shown to who started it), and pages
of other sites in the same browser, which can send requests here: without the token they learn not
even whether an image is there, and the browser's word on where a request comes from must be "here".
"""

import errno
import ipaddress
import secrets
import socket
import threading
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.data.pixels import decode
from pipeline.explore import plots
from pipeline.explore.query_vectors import Queries
from pipeline.explore.search import Collection, Hit, Hits, Query
from pipeline.models.patches import PatchView, entropy, in_shares, student_view

try:
    import uvicorn
    from fastapi import APIRouter, FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as error:
    raise PipelineError(
        f"`pipeline serve` needs {error.name}: install it with `pip install 'extrahead[web]'`."
    ) from None

HITS = 12  # a side
SHOWN = 320  # px a side of a map
LOCAL = ["127.0.0.1", "localhost", "[::1]"]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; "
    "style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
REFUSED = "Open the complete address that `pipeline serve` printed, by pasting it.\n"


def serve(
    data: Path,
    card: Path | None,
    host: str,
    port: int,
    *,
    public: bool,
    announce: Callable[[str], None],
) -> None:
    """Answer until interrupted. port 0 takes a free one; announce is told the address, which holds
    the token.

    Raises PipelineError: an address that others can reach without public, a port in use, no
    student or index yet.
    """
    with listen(host, port, public=public) as listener:
        token = secrets.token_urlsafe(24)
        app = make_app(data, card, hosts=["*"] if public else LOCAL, token=token)
        name = f"[{host}]" if ":" in host else host
        announce(f"http://{name}:{listener.getsockname()[1]}/{token}/  (Ctrl-C ends it)")
        make_server(app).run(sockets=[listener])


def listen(host: str, port: int, *, public: bool) -> socket.socket:
    """A socket that listens. Raises PipelineError as `serve` does."""
    if not public and not _is_loopback(host):
        raise PipelineError(
            f"{host} can be reached by other machines, and whoever reaches it sees every image. "
            "Say --public if you mean it, or keep 127.0.0.1."
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = {
            errno.EADDRINUSE: f"port {port} is in use. Choose another with --port, or 0 for any",
            errno.EACCES: f"port {port} is for the administrator. Choose one above 1023",
        }.get(error.errno, f"{host}:{port} cannot be listened on ({error})")
        raise PipelineError(f"{reason}.") from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))


def make_app(data: Path, card: Path | None, hosts: list[str], token: str) -> FastAPI:
    """The pages, below /token/, for requests that name one of hosts and come from no other site."""
    shown = _Pages(data, card)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    source = files("pipeline.explore").joinpath("serve.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(source, globals={"thumbnail": _thumbnail, "root": f"/{token}"})

    @app.middleware("http")
    async def harden(request: Request, call_next: Callable) -> Response:
        first = request.url.path.removeprefix("/").partition("/")[0]
        known = secrets.compare_digest(first.encode(), token.encode())
        here = request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")
        response = await call_next(request) if known and here else Response(REFUSED, 403)
        response.headers.update(HEADERS)
        return response

    pages = APIRouter(prefix=f"/{token}")

    @pages.get("/", response_class=HTMLResponse)
    def results(q: str = "") -> HTMLResponse:
        values = {"text": q, "hits": None, "look": None, "error": None, "images": len(shown)}
        try:
            values["hits"] = shown.search(q) if q.strip() else None
        except PipelineError as error:
            return HTMLResponse(page.render(values | {"error": str(error)}), status_code=400)
        return HTMLResponse(page.render(values))

    @pages.get("/look/{image_id}", response_class=HTMLResponse)
    def look(image_id: str, q: str) -> HTMLResponse:
        panel = _or_404(shown.look, image_id, q)
        values = {"text": q, "hits": None, "look": panel, "error": None, "images": len(shown)}
        return HTMLResponse(page.render(values))

    @pages.get("/image/{image_id}")
    def image(image_id: str) -> Response:
        return Response(_or_404(shown.jpg, image_id), media_type="image/jpeg")

    @pages.get("/map/{image_id}")
    def text_map(image_id: str, q: str) -> Response:
        return Response(_or_404(shown.text_map, image_id, q), media_type="image/png")

    @pages.get("/weights/{image_id}")
    def weights_map(image_id: str) -> Response:
        return Response(_or_404(shown.weights_map, image_id), media_type="image/png")

    app.include_router(pages)
    return app


def _thumbnail(hit: Hit) -> str:
    return plots.data_uri(plots.thumbnail(decode(hit.jpg or b""), SHOWN // 2))


def _or_404(answer: Callable[..., Any], *arguments: str) -> Any:
    try:
        return answer(*arguments)
    except PipelineError as error:
        raise HTTPException(404, str(error)) from None


class _Pages:
    """What the pages show; one request at a time uses the networks."""

    def __init__(self, data: Path, card: Path | None) -> None:
        self.queries, self.lock = Queries(data, card), threading.Lock()
        self.collection = Collection(data)
        self.queries.student  # noqa: B018  # a missing student is an error now, not at a click
        self._view = lru_cache(maxsize=64)(self._make_view)
        self._query = lru_cache(maxsize=256)(self._make_query)

    def __len__(self) -> int:
        return len(self.collection)

    def search(self, text: str) -> Hits:
        return self.collection.search(self._query(text), HITS)

    def jpg(self, image_id: str) -> bytes:
        if image_id not in self.collection:
            raise PipelineError(f"no image {image_id} in the index.")
        return self.collection.facts([image_id], [image_id])[image_id][2]

    def look(self, image_id: str, text: str) -> dict:
        """The numbers beside the pictures of one image."""
        _, view = self._view(image_id)
        query = self._query(text)
        cosines = view.patches @ query.student
        row, column = np.unravel_index(cosines.argmax(), cosines.shape)
        caption, url, _ = self.collection.facts([image_id], [])[image_id]
        return {
            "image_id": image_id,
            "caption": caption,
            "url": url,
            "whole": float(view.embedding @ query.student),
            "low": float(cosines.min()),
            "high": float(cosines.max()),
            "row": int(row) + 1,
            "column": int(column) + 1,
            "grid": len(cosines),
            "entropy": entropy(view.weights),
            "most": np.log2(view.weights.size),
            "gradient": plots.gradient(),
        }

    def text_map(self, image_id: str, text: str) -> bytes:
        image, view = self._view(image_id)
        cosines = view.patches @ self._query(text).student
        return plots.tile(plots.overlay(image, cosines, cosines.min(), cosines.max()))

    def weights_map(self, image_id: str) -> bytes:
        image, view = self._view(image_id)
        shares = in_shares(view.weights)
        return plots.tile(plots.overlay(image, shares, 0, max(2.0, shares.max())))

    def _make_view(self, image_id: str) -> tuple[np.ndarray, PatchView]:
        image, student = decode(self.jpg(image_id)), self.queries.student
        with self.lock:
            view = student_view(student, self.queries.view(image, student.config.image_size))
        return self.queries.view(image, SHOWN), view

    def _make_query(self, text: str) -> Query:
        with self.lock:
            return self.queries.text(text)
