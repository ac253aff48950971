"""JSON schemas of the answers, for the OpenAPI document.

Plain dictionaries: the answers are bytes made elsewhere, nothing is to be validated or converted here.
"""

from __future__ import annotations

from typing import Any

from gpupool_sync import wire

Schema = dict[str, Any]


def or_null(kind: str, description: str | None = None, **more: Any) -> Schema:
    schema: Schema = {"type": [kind, "null"], **more}
    if description:
        schema["description"] = description
    return schema


def as_object(properties: dict[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }


def as_list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string"}
_TIME: Schema = {"type": "string", "description": "local time of the server, without a zone"}
_NUMBER = or_null("number")
_PERCENT = or_null("number", minimum=0, maximum=100)
_ID: Schema = {"type": "integer", "minimum": 0, "description": "in PCI bus order, as nvidia-smi counts"}

_PROCESSES: Schema = {
    "type": ["array", "null"],
    "description": "what computes on the card; null: not told",
    "items": as_object(
        {"pid": or_null("integer"), "user": or_null("string"), "memory_mb": _NUMBER, "name": or_null("string")}
    ),
}

_FAILURE = as_object({"error": _TEXT, "gpu_count": _COUNT, "gpus": as_list({}), "timestamp": _TIME})
_FAILURE["description"] = "the cards could not be read yet"

_SUMMARY = as_object(
    {
        "gpu_count": _COUNT,
        "total_memory_mb": {"type": "number"},
        "total_used_memory_mb": {"type": "number"},
        "total_memory_usage_percent": {**_PERCENT, "description": "missing if there are no cards"},
        "average_utilization_percent": _PERCENT,
        "gpus_summary": as_list(
            as_object(
                {
                    "gpu_id": _ID,
                    "name": _TEXT,
                    "memory_usage_percent": _PERCENT,
                    "utilization_percent": _PERCENT,
                    "uuid": or_null("string"),
                    "memory_total_mb": _NUMBER,
                    "memory_used_mb": _NUMBER,
                    "temperature_c": _NUMBER,
                    "power_draw_w": _NUMBER,
                    "power_limit_w": _NUMBER,
                    "processes": _PROCESSES,
                    "leased": {
                        "type": ["boolean", "null"],
                        "description": "whether somebody has a lease on it; null: this server grants none",
                    },
                }
            )
        ),
        "timestamp": _TIME,
        "protocol": {"type": "integer", "minimum": 1},
        "host": {
            **as_object({"id": _TEXT, "name": _TEXT, "simulated": {"type": "boolean"}}),
            "type": ["object", "null"],
            "description": "which machine this is",
        },
        "leases": {"type": ["object", "null"], "description": "null: this server grants no leases"},
        "gpus_unavailable": as_list(
            as_object(
                {"gpu_id": or_null("integer"), "name": or_null("string"), "uuid": or_null("string"), "reason": _TEXT}
            )
        ),
    },
    optional=("total_memory_usage_percent",),
)

_STATS = as_object(
    {
        "gpu_count": _COUNT,
        "gpus": as_list(
            as_object(
                {
                    "gpu_id": _ID,
                    "name": _TEXT,
                    "memory": as_object(
                        {"total_mb": _NUMBER, "used_mb": _NUMBER, "free_mb": _NUMBER, "usage_percent": _PERCENT}
                    ),
                    "utilization_percent": _PERCENT,
                    "temperature_c": _NUMBER,
                    "power": as_object({"draw_w": _NUMBER, "limit_w": _NUMBER}),
                    "uuid": or_null("string"),
                    "processes": _PROCESSES,
                }
            )
        ),
        "timestamp": _TIME,
    }
)

_HEALTH = as_object(
    {
        "status": {"type": "string", "enum": ["healthy", "degraded", "unhealthy"]},
        "nvidia_smi_available": {"type": "boolean", "description": "the cards can be read, whichever way"},
        "timestamp": _TIME,
        "error": or_null("string", "why the last reading failed"),
        "reader": _TEXT,
        "gpu_count": or_null("integer"),
        "gpus_unavailable": _COUNT,
        "sample_age": or_null("number", "seconds since the readings were taken"),
        "uptime": {"type": "number", "description": "seconds"},
    }
)

ERROR = as_object({"error": as_object({"code": _TEXT, "message": _TEXT})})

_SCHEMAS: dict[str, Schema] = {
    "/gpu/summary": {"anyOf": [_SUMMARY, _FAILURE]},
    "/gpu/stats": {"anyOf": [_STATS, _FAILURE]},
    "/gpu/count": {"anyOf": [as_object({"gpu_count": _COUNT, "timestamp": _TIME}), _FAILURE]},
    "/health": _HEALTH,
    "/config": {"type": "object"},
    "/": {"type": "object"},
}


def responses(path: str, example: object) -> dict[int | str, dict[str, Any]]:
    """The documented responses of GET *path*."""
    content: dict[str, Any] = {"schema": _SCHEMAS[path]}
    if example is not None:
        content["example"] = example
    found: dict[int | str, dict[str, Any]] = {
        200: {"description": "OK", "content": {"application/json": content}},
    }
    if path.startswith("/gpu/"):
        found[200]["headers"] = {
            wire.AGE_HEADER: {
                "description": "seconds since the readings were taken; missing if there are none yet",
                "schema": {"type": "number", "minimum": 0},
            },
            "ETag": {"schema": {"type": "string"}},
        }
    if path == "/health":
        found[503] = {"description": "No recent readings", "content": {"application/json": {"schema": _HEALTH}}}
    else:
        found[304] = {"description": "The body is the one that If-None-Match names"}
    found["4XX"] = {"description": "The request is wrong", "content": {"application/json": {"schema": ERROR}}}
    return found


def metrics_responses() -> dict[int | str, dict[str, Any]]:
    """The documented responses of ``/metrics``."""
    return {
        200: {
            "description": "Counts only, no holders; docs/statistics.md says what each metric means",
            "content": {
                "text/plain": {"schema": _TEXT},
                "application/openmetrics-text": {"schema": _TEXT},
            },
        },
        501: {
            "description": "prometheus_client is not installed on the server",
            "content": {"application/json": {"schema": ERROR}},
        },
    }
