"""The lease API in the OpenAPI document; plain dictionaries, as in `schemas`."""

from __future__ import annotations

from typing import Any

from gpupool_sync.leases import documents
from gpupool_sync.server.schemas import ERROR, Schema, as_list, as_object, or_null

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": "number", "minimum": 0, "description": "seconds"}
_ID: Schema = {
    "type": "string",
    "pattern": "^[A-Za-z0-9._:-]{1,128}$",
    "description": "chosen by the client, 128 random bits; whoever knows it may renew and release",
}
_TTL: Schema = {
    "type": "number",
    "minimum": 0.1,
    "maximum": documents.MAX_TTL,
    "description": "seconds that the lease lives without renewal",
}
_HOLDER = as_object(
    {"id": _TEXT, "name": or_null("string"), "user": _TEXT, "host": _TEXT, "pid": _COUNT},
    optional=("name", "user", "host", "pid"),
)
_SHARE: Schema = {
    "type": ["object", "null"],
    "description": "a part of one card, by memory or as one of so many places; null: whole cards",
    "properties": {"memory_mb": {"type": "number"}, "places": {"type": "integer", "minimum": 1}},
}

# Of requests, with what is refused beyond: an answer may hold more than may be asked for.
_KEY: Schema = {"type": "string", "minLength": 1, "maxLength": documents.LONGEST_KEY, "description": "UUID"}
_WAITED: Schema = {**_SECONDS, "maximum": documents.MOST_SECONDS}
_ASKED_SHARE: Schema = {
    **_SHARE,
    "properties": {
        "memory_mb": {"type": "number", "minimum": 0, "maximum": documents.MOST_MB},
        "places": {"type": "integer", "minimum": 1, "maximum": documents.MOST_PLACES},
    },
    "oneOf": [
        {"type": "null"},
        {"type": "object", "required": ["memory_mb"]},
        {"type": "object", "required": ["places"]},
    ],
}
_ASKING = as_object(
    {
        "id": {**_ID, "description": "of the pool that asks"},
        "name": or_null("string"),
        "user": _TEXT,
        "host": _TEXT,
        "pid": {**_COUNT, "maximum": documents.MOST_PID},
    },
    optional=("name", "user", "host", "pid"),
)
_CARD = as_object(
    {
        "key": _KEY,
        "room_mb": or_null(
            "number",
            "for shares by memory: what the client sees that it has, in MiB",
            minimum=-documents.MOST_MB,
            maximum=documents.MOST_MB,
        ),
        "group": {
            **_COUNT,
            "maximum": documents.MAX_CARDS,
            "description": "several cards are granted from one group only",
        },
    },
    optional=("room_mb", "group"),
)
_CLAIM = as_object(
    {
        "id": _ID,
        "holder": _ASKING,
        "count": {"type": "integer", "minimum": 1, "maximum": documents.MAX_CARDS, "default": 1},
        "cards": {
            **as_list(_CARD),
            "minItems": 1,
            "maxItems": documents.MAX_CARDS,
            "description": "any of them will do; most wanted first",
        },
        "share": _ASKED_SHARE,
        "ttl": _TTL,
        "waited": {**_WAITED, "description": "seconds that the client has waited already, wherever"},
        "queue": {"type": "boolean", "default": False, "description": "leave a ticket if nothing is free"},
        "reserve": {"type": "boolean", "default": True, "description": "the ticket may hold cards back"},
        "note": or_null("string", "shown to others"),
        "emptied": {
            "type": "object",
            "description": "for closed cards: seconds since a reading showed the card empty",
            "propertyNames": _KEY,
            "additionalProperties": _WAITED,
        },
        "busy": {
            "type": "object",
            "description": "for cards that a reading speaks against unless it shows their holder's job: seconds since "
            "that reading. Such a card is granted only if it was given back after it",
            "propertyNames": _KEY,
            "additionalProperties": _WAITED,
        },
    },
    optional=("count", "share", "waited", "queue", "reserve", "note", "emptied", "busy"),
)
_LEASE_INFO = as_object(
    {
        "cards": as_list(_TEXT),
        "holder": _HOLDER,
        "token": _COUNT,
        "share": _SHARE,
        "note": or_null("string"),
        "since": _SECONDS,
        "expires_in": or_null("number", "seconds; null: lives as long as its process"),
    }
)
_TICKET_INFO = as_object(
    {
        "position": _COUNT,
        "holder": _HOLDER,
        "cards": as_list(_TEXT),
        "count": _COUNT,
        "share": _SHARE,
        "waited": _SECONDS,
        "note": or_null("string"),
    }
)
_LEASE = as_object(
    {
        "cards": as_list(_TEXT),
        "token": {**_COUNT, "description": "larger than that of any earlier lease of any of the cards"},
        "ttl": _TTL,
        "since": _SECONDS,
    }
)
_CLOSED: Schema = {
    **as_list(_TEXT),
    "description": "cards whose last lease expired or was revoked: granted when `emptied` says so, or after a while",
}
_QUEUED = as_object(
    {
        "position": {**_COUNT, "description": "how many stand before, among those who want any of the cards"},
        "ticket_ttl": {**_SECONDS, "description": "seconds that the ticket lives unless its holder claims or waits"},
        "holders": as_list(_LEASE_INFO),
        "closed": _CLOSED,
    }
)
_REFUSED = as_object(
    {
        "error": as_object({"code": _TEXT, "message": _TEXT}),
        "reasons": {
            "type": "object",
            "description": "for each card",
            "additionalProperties": as_object({"code": _TEXT, "text": _TEXT}),
        },
        "holders": as_list(_LEASE_INFO),
        "closed": _CLOSED,
    }
)
_IDS = as_object({"ids": {**as_list(_ID), "maxItems": documents.MAX_IDS}})
_DONE: Schema = {"type": "object"}

_REQUESTS: dict[str, Schema] = {
    "/v1/leases": _CLAIM,
    "/v1/leases/renew": _IDS,
    "/v1/leases/release": _IDS,
    "/v1/leases/withdraw": _IDS,
    "/v1/leases/revoke": as_object(
        {
            "key": {**_KEY, "description": "UUID of a card"},
            "token": {
                **_COUNT,
                "maximum": documents.TOKEN_LIMIT,
                "description": "the lease's, as GET /v1/leases tells it",
            },
            "by": {
                "type": "string",
                "minLength": 1,
                "maxLength": documents.LONGEST_TEXT,
                "description": "who takes it away; its holder is told",
            },
        }
    ),
    "/v1/wait": as_object(
        {
            "holder": {
                "anyOf": [_ID, {**as_list(_ID), "minItems": 1, "maxItems": documents.MAX_HOLDERS}],
                "description": "the id of the holder whose tickets it is about, or several",
            },
            "timeout": {"type": "number", "minimum": 0, "maximum": documents.MAX_WAIT, "description": "seconds"},
        }
    ),
}
_ANSWERS: dict[tuple[str, str], dict[int, tuple[str, Schema]]] = {
    ("GET", "/v1/leases"): {200: ("OK", as_object({"leases": as_list(_LEASE_INFO), "closed": _CLOSED}))},
    ("GET", "/v1/queue"): {200: ("In the order of service", as_object({"queue": as_list(_TICKET_INFO)}))},
    ("POST", "/v1/leases"): {
        200: ("Granted, now or by the same claim before", _LEASE),
        202: ("A ticket was left, or was there already", _QUEUED),
        409: ("Nothing can be granted now", _REFUSED),
        410: ("The id was released, withdrawn, or has expired", ERROR),
    },
    ("POST", "/v1/leases/renew"): {
        200: (
            "In the order of the ids; false: gone",
            as_object({"alive": as_list({"type": "boolean"}), "why": as_list(or_null("string", "if it was revoked"))}),
        )
    },
    ("POST", "/v1/leases/release"): {200: ("Done, also for ids that were not known", _DONE)},
    ("POST", "/v1/leases/withdraw"): {200: ("Done, also for ids that were not known", _DONE)},
    ("POST", "/v1/leases/revoke"): {
        200: (
            "Its holder is told; the card is granted to others when it lets go, or at the end of the ttl",
            as_object({"found": {"type": "boolean", "description": "whether there is such a lease"}}),
        )
    },
    ("POST", "/v1/wait"): {
        200: (
            "At a hint, or at the end of the time",
            as_object(
                {
                    "hints": {
                        **as_list(_TEXT),
                        "description": "of tickets that may have become servable: the first 24 hexadecimal digits of "
                        "the SHA-256 of their ids",
                    }
                }
            ),
        )
    },
}


def _content(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def responses(method: str, path: str) -> dict[int | str, dict[str, Any]]:
    """The documented responses of a request."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": _content(schema)}
        for status, (text, schema) in _ANSWERS[method, path].items()
    }
    found["4XX"] = {"description": "The request is wrong", "content": _content(ERROR)}
    found["503"] = {"description": "Too much at once, or the locks cannot be used", "content": _content(ERROR)}
    return found


def request_body(path: str) -> dict[str, Any]:
    """What a POST to *path* needs."""
    return {"requestBody": {"required": True, "content": _content(_REQUESTS[path])}}
