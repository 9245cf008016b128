"""/docs: a page that shows the API and can send requests. This server holds all parts of the page."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

_FOLDER = Path(fastapi_offline.__file__).parent / "static"
_FILES = frozenset({"swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"})
# Another site's page could show this page in a frame, and lead a user's clicks to its buttons.
_NOT_IN_FRAMES = {"content-security-policy": "frame-ancestors 'none'", "x-frame-options": "DENY"}


def docs_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        page = get_swagger_ui_html(
            openapi_url=f"{root}/openapi.json",
            title="PreFT Serve",
            swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs/swagger-ui.css",
            swagger_favicon_url=f"{root}/docs/favicon.png",
        )
        page.headers.update(_NOT_IN_FRAMES)
        return page

    @router.get("/docs/{file}")
    async def docs_file(file: str) -> Response:
        if file not in _FILES:
            raise HTTPException(404)
        return FileResponse(_FOLDER / file)

    return router
