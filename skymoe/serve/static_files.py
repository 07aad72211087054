"""The page: the files of `serve/static`, read once when the server starts, under the names they had then.

No path that a client sends is ever joined to a directory; there is nothing to traverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from starlette.responses import Response

from skymoe.base.inside import read_inside
from skymoe.serve.errors import ApiError
from skymoe.serve.page import page_policy

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"

_MAX_BYTES = 4 << 20
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}


def read_page(folder: Path = FOLDER) -> dict[str, tuple[bytes, str]]:
    """Name to content and media type of every file of the page; none where there is no page."""
    files = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        content = read_inside(folder, path.name, max_bytes=_MAX_BYTES) if path.suffix in _TYPES else None
        if content is not None:
            files[path.name] = (content, _TYPES[path.suffix])
    return files


def answer_file(files: Mapping[str, tuple[bytes, str]], name: str) -> Response:
    """One file; raises ApiError 404."""
    if name not in files:
        raise ApiError(404, "there is no such page", code="not_found")
    content, media_type = files[name]
    headers = {"cache-control": "no-cache"}
    if name.endswith(".html"):
        headers["content-security-policy"] = page_policy(content)
    return Response(content, media_type=media_type, headers=headers)
