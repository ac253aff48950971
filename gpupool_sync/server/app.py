"""The server as FastAPI sees it: every path, documented.

The answers are those of `pages`; in service, `asgi.Front` sends them without coming here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from gpupool_sync import wire
from gpupool_sync.devices.simulated import SimulatedReader, parse_cards
from gpupool_sync.models import Sample
from gpupool_sync.server import schemas
from gpupool_sync.server.access import user_of
from gpupool_sync.server.asgi import METRICS_PATH
from gpupool_sync.server.pages import PATHS, Answer, Pages
from gpupool_sync.server.sampler import Sampler

if TYPE_CHECKING:
    from gpupool_sync.server.leases import LeaseAPI
    from gpupool_sync.server.metrics import Metrics

_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    sampler: Sampler, pages: Pages | None = None, leases: LeaseAPI | None = None, metrics: Metrics | None = None
) -> FastAPI:
    """
    The application; whoever makes *sampler* and *leases* starts and stops them.

    *pages* and *metrics*, if given, are of the same sampler.  Without *leases* it serves statistics only.
    """
    pages = Pages(sampler) if pages is None else pages
    app = FastAPI(
        title="gpupool-sync",
        summary="GPU statistics of one host" + ("" if leases is None else ", and leases on its GPUs"),
        description=(
            "Memory is in MiB, power in W, durations are seconds; what is unknown is null. The header "
            f"`{wire.AGE_HEADER}` tells how many seconds ago the readings were taken."
        ),
        version=str(wire.PROTOCOL_VERSION),
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    examples = _examples()
    for path, summary in PATHS.items():
        handler = _handler(pages, path)
        responses = schemas.responses(path, examples.get(path))
        app.add_api_route(
            path,
            handler,
            methods=["GET"],
            name=path,
            summary=summary,
            operation_id="get" + path.replace("/", "_").rstrip("_"),
            response_class=Response,
            response_model=None,
            responses=responses,
        )
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False, response_model=None)
    if metrics is not None:
        _add_metrics(app, metrics)
    if leases is not None:
        _add_leases(app, leases)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _broken)
    return app


def _handler(pages: Pages, path: str) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        answer = pages.answer(path, request.scope["headers"])
        assert answer is not None  # PATHS is all that pages knows
        return _response(answer, head=request.method == "HEAD")

    return handle


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    from gpupool_sync.server.metrics import SUMMARY

    async def handle(request: Request) -> Response:
        return _response(await metrics.answer(request.scope["headers"]), head=request.method == "HEAD")

    app.add_api_route(
        METRICS_PATH,
        handle,
        methods=["GET"],
        name=METRICS_PATH,
        summary=SUMMARY,
        operation_id="get_metrics",
        response_class=Response,
        response_model=None,
        responses=schemas.metrics_responses(),
    )
    app.add_api_route(METRICS_PATH, handle, methods=["HEAD"], include_in_schema=False, response_model=None)


def _add_leases(app: FastAPI, leases: LeaseAPI) -> None:
    from gpupool_sync.server import lease_schemas
    from gpupool_sync.server.leases import PATHS as LEASE_PATHS

    async def handle(request: Request) -> Response:
        scope = request.scope
        return _response(
            await leases.answer(request.method, scope["path"], scope["headers"], request.receive, user_of(scope)),
            head=False,
        )

    for path, methods in LEASE_PATHS.items():
        for method, summary in methods.items():
            app.add_api_route(
                path,
                handle,
                methods=[method],
                name=path,
                summary=summary,
                operation_id=method.lower() + path.replace("/", "_"),
                response_class=Response,
                response_model=None,
                responses=lease_schemas.responses(method, path),
                openapi_extra=lease_schemas.request_body(path) if method == "POST" else None,
            )


def _response(answer: Answer, *, head: bool) -> Response:
    response = Response(status_code=answer.status)
    response.body = b"" if head else answer.body
    response.raw_headers = list(answer.headers)
    return response


def _error(status: int, code: str, message: str, headers: Any = None) -> Response:
    return Response(
        wire.dump(wire.error_document(code, message)), status, headers=headers, media_type="application/json"
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: "there is no such path here; / lists them",
        405: f"{request.method} is not possible here",
    }.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    if error.status_code == 405 and request.url.path in (*PATHS, METRICS_PATH):
        headers["Allow"] = "GET, HEAD"  # the framework knows one method per route
    return _error(error.status_code, _CODES.get(error.status_code, "error"), message, headers)


async def _broken(request: Request, error: Exception) -> Response:
    return _error(500, "internal", "the server has a bug; its log has the details")


def _examples() -> dict[str, Any]:
    """Real documents, of a simulated host."""
    sample: Sample = SimulatedReader(parse_cards("2xA100"), name="example").read(1.0)
    timestamp = "2026-01-01T12:00:00.000000"
    return {
        "/gpu/summary": wire.summary_document(sample, timestamp=timestamp),
        "/gpu/stats": wire.stats_document(sample, timestamp=timestamp),
        "/gpu/count": wire.count_document(sample, timestamp=timestamp),
    }
