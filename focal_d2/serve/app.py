"""The program behind `focal-d2 serve`: a picture in, detections out.

One picture is computed at a time. A few more wait, and all others are refused at once, so that memory does
not depend on the number of clients.
"""

from __future__ import annotations

import asyncio
import logging
import math
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from focal_d2.data.image_files import UNREADABLE, upright_size, why_unreadable
from focal_d2.errors import UserError
from focal_d2.evaluation.operating_point import SCORE_WITHOUT_POINT
from focal_d2.inference.predictor import Predictor

logger = logging.getLogger(__name__)

_PAGE = Path(__file__).with_name("page.html")
_NAME = "the picture"  # in place of the file's temporary name
_HEADERS = {
    # The page loads nothing from elsewhere, and no other page may show it in a frame.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        megabytes: of an upload; 10^6 bytes each.
        waiting: pictures that are uploaded or wait for their turn, besides the one that is computed.
        seconds: for an upload.
    """

    megabytes: float = 50.0
    waiting: int = 8
    seconds: float = 60.0


class Refusal(Exception):
    """A picture that is not taken."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        """Take the HTTP status, one line for the client, and seconds until another try makes sense."""
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class _Queue:
    """The pictures that are being served."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.in_tiles = predictor.in_tiles()
        self.pictures = 0
        self.seconds = 1.0  # of a picture, a moving average
        self.worker = ThreadPoolExecutor(1)

    async def detect(self, request: Request) -> dict[str, Any]:
        """Read a picture from a request, wait for its turn, and detect.

        Raises:
            Refusal: if there are too many, or the picture cannot be read.
        """
        if self.pictures > self.limits.waiting:
            after = max(1, math.ceil(self.pictures * self.seconds))
            raise Refusal(503, f"busy: {self.pictures} pictures are waiting", after)
        self.pictures += 1
        try:
            with tempfile.NamedTemporaryFile(prefix="focal_d2-") as file:
                with anyio.fail_after(self.limits.seconds):
                    async for chunk in _limited(request, int(self.limits.megabytes * 1e6)):
                        file.write(chunk)
                file.flush()
                start = time.monotonic()
                result = await asyncio.get_running_loop().run_in_executor(self.worker, self._run, file.name)
                self.seconds += 0.2 * (time.monotonic() - start - self.seconds)
                return result
        except TimeoutError:
            raise Refusal(408, f"the upload took more than {self.limits.seconds:g} s") from None
        finally:
            self.pictures -= 1

    def _run(self, path: str) -> dict[str, Any]:
        """Detect in a file, on the worker's thread."""
        try:
            height, width = upright_size(path)
            large = self.in_tiles is not None and max(height, width) > 2 * self.in_tiles.window
            predictor = self.in_tiles if large and self.in_tiles is not None else self.predictor
            found = predictor(path)
        except UNREADABLE as error:
            raise Refusal(422, f"cannot read {_NAME}: {why_unreadable(path, error)}") from error
        except UserError as error:
            raise Refusal(422, str(error).replace(f"image {path}", _NAME).replace(path, _NAME)) from error
        except MemoryError:
            raise Refusal(413, f"{_NAME} needs more memory than there is") from None
        boxes, scores, labels = found.rounded()
        return {
            "width": found.width,
            "height": found.height,
            "tiles": large,
            "detections": [
                {"box": box, "score": score, "label": label, "name": found.class_names[label]}
                for box, score, label in zip(boxes, scores, labels, strict=True)
            ],
        }


async def _limited(request: Request, most: int) -> AsyncIterator[bytes]:
    """Yield the parts of a request's body.

    Raises:
        Refusal: if there are more bytes than `most`, or none.
    """
    too_long = Refusal(413, f"{_NAME} has more than {most / 1e6:g} MB")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_long
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > most:
            raise too_long
        yield chunk
    if not received:
        raise Refusal(400, "the request has no body: send the file of a picture")


def build_app(predictor: Predictor, limits: Limits, *, hosts: list[str]) -> FastAPI:
    """Build the web application.

    - `GET /`: the page.
    - `GET /model`: class names, threshold and where it is from, limits.
    - `POST /detect`: the file of a picture as the request's body; answers with its width and height, whether
      it was detected in tiles, and its detections: box (XYXY in pixels), score, label and name, best first.

    A refusal is `{"error": LINE}` with the status 400, 408, 413, 422 (no picture), or 503 (busy), which has
    a header Retry-After.

    Args:
        predictor: its threshold is the lowest score that is sent; the page starts at the operating point.
        limits: what is refused.
        hosts: names that a request may call the server by, or ["*"]: other pages cannot reach a local server
            by a name of their own.
    """
    app = FastAPI(title="focal-d2", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    queue = _Queue(predictor, limits)
    page = _PAGE.read_text(encoding="utf-8")
    point = predictor.operating_point

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_HEADERS)

    @app.get("/model")
    async def describe() -> dict[str, Any]:
        return {
            "class_names": list(predictor.class_names),
            "threshold": SCORE_WITHOUT_POINT if point is None else point.score,
            "threshold_from": "" if point is None else str(point),
            "lowest_score": float(min(predictor.thresholds)),
            "megabytes": limits.megabytes,
        }

    @app.post("/detect")
    async def detect(request: Request) -> Response:
        try:
            return JSONResponse(await queue.detect(request))
        except Refusal as refusal:
            headers = {"Connection": "close"}
            if refusal.retry_after is not None:
                headers["Retry-After"] = str(refusal.retry_after)
            return JSONResponse({"error": str(refusal)}, refusal.status, headers)

    return app
