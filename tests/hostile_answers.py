"""
A catalogue of answers that no decent server gives, each with what a pool makes of it.

`SUMMARIES` are answers to ``/gpu/summary``; `CLAIMS`, `RENEWALS`, `RELEASES`, `WAITS` and `LISTS` those of the lease
API.
A `Board` is a server that gives one of them after another, by name::

    board = Board()
    with Server(board.script) as server:
        board.put("/gpu/summary", SUMMARIES["gpu_id is true"].script)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

import servers
from gpupool_sync.errors import BadAnswer, EndpointUnavailable, GPUPoolError
from servers import Connection, Script, chunked, head

#: What a screen must not do: run a script, move the cursor, turn the text around.
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;\u202e\x1b[2J\r\n\x00\x9b31m"
MEGABYTE = "A" * (1 << 20)
#: Stands for what json.dumps does not write.
TOO_LARGE = "@1e999@"
CLOSE = {"Connection": "close"}
CHUNKED = head(headers={"Transfer-Encoding": "chunked", **CLOSE})
#: Every status but the one that is an answer.
STATUSES = tuple(range(204, 600))


class Board:
    """A server that says to each path what is put up for it; whoever is not told otherwise gets `{}`."""

    def __init__(self) -> None:
        # Single dict operations only, which are atomic.
        self._scripts: dict[str, Script] = {}

    def put(self, path: str, script: Script) -> None:
        self._scripts[path] = script

    def script(self, connection: Connection) -> None:
        path = connection.peek_path()
        self._scripts.get(path, body(b"{}"))(connection)


def body(content: bytes, status: int = 200, headers: Mapping[str, object] | None = None) -> Script:
    """One answer on a connection of its own, as the next one may be of another kind."""
    return servers.raw(head(status, {**(headers or {}), **CLOSE}, length=len(content)) + content)


def once(script: Script) -> Script:
    """*script* for one request: the next one may be answered otherwise."""

    def first(connection: Connection) -> None:
        read, asked = connection.request, []

        def request() -> servers.Request:
            if asked:
                raise servers.Gone
            asked.append(True)
            return read()

        connection.request = request  # type: ignore[method-assign]
        script(connection)

    return first


def written(document: object) -> bytes:
    """As JSON, with the NaN and the infinities that are none."""
    return json.dumps(document).replace(f'"{TOO_LARGE}"', "1e999").encode()


# -- /gpu/summary --------------------------------------------------------------------------------------------------


@attrs.frozen
class Accepted:
    """These GPUs are taken, so many others are known to be unusable."""

    gpus: tuple[int, ...] = (0, 1)
    lost: int = 0


@attrs.frozen
class Refused:
    """The endpoint counts as failed, by an error of this kind whose message has these words."""

    kind: type[GPUPoolError]
    told: str = ""


@attrs.frozen
class Hostile:
    script: Script
    expected: Accepted | Refused


ALL = Accepted()
FIRST_LOST = Accepted((1,), 1)
BAD = Refused(BadAnswer)


def gpu(number: int = 0, **changes: object) -> dict[str, Any]:
    return {
        "gpu_id": number,
        "name": "A100",
        "memory_usage_percent": 1.0,
        "utilization_percent": 0,
        "uuid": f"GPU-h{number}",
        "memory_total_mb": 81920,
        "memory_used_mb": 800,
        "temperature_c": 31,
        "power_draw_w": 52.0,
        "power_limit_w": 400,
        "processes": [],
        "leased": False,
        **changes,
    }


def summary(*gpus: object, **changes: object) -> dict[str, Any]:
    listed = gpus or (gpu(0), gpu(1))
    return {
        "gpu_count": len(listed),
        "gpus_summary": list(listed),
        "protocol": 1,
        "host": None,
        "leases": None,
        **changes,
    }


def without(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != key}


#: What is not JSON; one of them anywhere condemns the document.
NOT_JSON = {
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
    "1e999": TOO_LARGE,
    "a huge integer": 10**400,
}
NO_NUMBER = {"a text": "7", "true": True, "a list": [7], "an object": {"7": 7}}
NO_TEXT = {"a number": 7, "true": True, "a list": ["x"], "an object": {"x": "x"}}
NO_LIST = {"a text": "x", "true": True, "a number": 7, "an object": {"x": "x"}}
ODD_TEXT = {
    "empty": "",
    "HTML and control characters": EVIL,
    "half a surrogate pair": "\ud800",
    "a megabyte": MEGABYTE,
    "a megabyte of control characters": "\x1b" * (1 << 18),
    "brackets": '[{"\\' * 99,
}
NOT_THERE = object()

#: Fields of a GPU: bad values that cost the card, and such that do not.
GPU_FIELDS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "gpu_id": (
        {
            **NO_NUMBER,
            "negative": -1,
            "a fraction": 0.5,
            "0.0": 0.0,
            "too large": 2**31,
            "null": None,
            "missing": NOT_THERE,
        },
        {},
    ),
    "uuid": (
        {
            **NO_TEXT,
            **ODD_TEXT,
            "a path": "../../etc/passwd",
            "two words": "GPU 1",
            "a line": "GPU-1\n",
            "129 characters": "G" * 129,
        },
        {"null": None, "missing": NOT_THERE},
    ),
    "name": ({}, {**NO_TEXT, **ODD_TEXT, "null": None, "missing": NOT_THERE}),
    **{
        field: (
            {**NO_NUMBER, "negative": -1, "101": 101, "1e300": 1e300, "20 digits": 10**19},
            {"null": None, "missing": NOT_THERE, "100.4": 100.4, "-0.0": -0.0},
        )
        for field in ("memory_usage_percent", "utilization_percent")
    },
    "memory_total_mb": (
        {**NO_NUMBER, "0": 0, "negative": -1, "bytes": 85899345920, "less than is used": 100},
        {"null": None, "missing": NOT_THERE},
    ),
    "memory_used_mb": (
        {**NO_NUMBER, "negative": -1, "more than there is": 90000},
        {"null": None, "missing": NOT_THERE},
    ),
    **{
        field: ({}, {**NO_NUMBER, "absurd": -1e300, "null": None, "missing": NOT_THERE})
        for field in ("temperature_c", "power_draw_w", "power_limit_w")
    },
    "leased": ({}, {**NO_NUMBER, "a number": 1, "true": True, "null": None, "missing": NOT_THERE}),
    "processes": (
        {
            **NO_LIST,
            "a list of numbers": [7],
            "a text as pid": [{"pid": "12"}],
            "true as pid": [{"pid": True}],
            "a negative pid": [{"pid": -1}],
            "negative memory": [{"pid": 1, "memory_mb": -1}],
        },
        {
            "null": None,
            "missing": NOT_THERE,
            "nobody": [{}],
            "evil names": [{"pid": 1, "user": EVIL, "name": EVIL}],
            "numbers as names": [{"pid": 1, "user": 7, "name": []}],
        },
    ),
}

#: Fields of the document: values that condemn it, and such that do not.
FIELDS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "gpus_summary": ({**NO_LIST, "null": None, "missing": NOT_THERE}, {}),
    "gpu_count": (
        {},
        {**NO_NUMBER, "negative": -1, "another one": 7, "20 digits": 10**19, "null": None, "missing": NOT_THERE},
    ),
    "error": (
        {**NO_TEXT, "empty": "", "evil": EVIL, "a megabyte": MEGABYTE, "an evil message": {"message": EVIL}},
        {"null": None},
    ),
    "leases": (
        {
            **NO_TEXT,
            "a text": "yes",
            "no version": {},
            "version true": {"version": True},
            "version 0": {"version": 0},
            "version 1.0": {"version": 1.0},
            "a relative lock_dir": {"version": 1, "lock_dir": "locks"},
            "a number as lock_dir": {"version": 1, "lock_dir": 7},
            "an evil lock_dir": {"version": 1, "lock_dir": f"/{EVIL}"},
            "a number as lock_dir_id": {"version": 1, "lock_dir_id": 7},
            "an empty lock_dir_id": {"version": 1, "lock_dir_id": ""},
        },
        {"null": None, "missing": NOT_THERE},
    ),
    "host": (
        {},
        {
            **NO_TEXT,
            "a text": "server1",
            "no id": {},
            "an evil id": {"id": EVIL},
            "a megabyte as id": {"id": MEGABYTE},
            "a text as simulated": {"id": "h", "simulated": "yes"},
            "an evil name": {"id": "h", "name": EVIL, "simulated": True},
            "missing": NOT_THERE,
        },
    ),
    "protocol": ({}, {**NO_NUMBER, "0": 0, "negative": -1, "of the future": 999, "null": None, "missing": NOT_THERE}),
    "timestamp": ({}, {**NO_TEXT, **ODD_TEXT, "null": None, "missing": NOT_THERE}),
    "gpus_unavailable": (
        {},
        {
            "a text": "x",
            "true": True,
            "an object": {},
            "null": None,
            "missing": NOT_THERE,
        },
    ),
    "total_memory_mb": ({}, {**NO_NUMBER, "negative": -1}),
    "something new": ({}, {"evil": {EVIL: [EVIL]}, "deep, but not too deep": json.loads("[" * 50 + "]" * 50)}),
}


def _changed(document: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    return without(document, field) if value is NOT_THERE else {**document, field: value}


def _values() -> Iterator[tuple[str, bytes, Accepted | Refused]]:
    """Each field with each bad value."""
    for field, (lost, kept) in GPU_FIELDS.items():
        for what, value in {**lost, **kept}.items():
            entry = _changed(gpu(0), field, value)
            yield f"{field} is {what}", written(summary(entry, gpu(1))), FIRST_LOST if what in lost else ALL
        for what, value in NOT_JSON.items():
            yield f"{field} is {what}", written(summary(gpu(0, **{field: value}), gpu(1))), BAD
    for field, (bad, kept) in FIELDS.items():
        for what, value in {**bad, **kept}.items():
            yield f"{field}: {what}", written(_changed(summary(), field, value)), BAD if what in bad else ALL
        for what, value in NOT_JSON.items():
            yield f"{field}: {what}", written({**summary(), field: value}), BAD


def _documents() -> Iterator[tuple[str, bytes, Accepted | Refused]]:
    """Whole documents."""
    good = written(summary())
    for what, value in {
        "null": None,
        "a number": 7,
        "a text": EVIL,
        "true": True,
        "a list": [],
        "an object": {},
    }.items():
        yield f"a GPU is {what}", written(summary(value, gpu(1))), FIRST_LOST
        if what != "an object":
            yield f"the document is {what}", written(value), BAD
    yield "an empty object", b"{}", BAD
    yield "an unknown field in a GPU", written(summary(gpu(0, fan=[{EVIL: 7}]), gpu(1))), ALL
    yield "no GPUs", written(summary() | {"gpu_count": 0, "gpus_summary": []}), Accepted(())
    many = [{"gpu_id": number, "name": "A100", "memory_usage_percent": 1.0} for number in range(10_000)]
    yield "10,000 GPUs", written(summary(*many)), Accepted(tuple(range(10_000)))
    yield "10,000 GPUs that are none", written(summary(*[7] * 10_000, gpu(1))), Accepted((1,), 10_000)
    yield "200,000 GPUs", written(summary(*many * 20)), Refused(BadAnswer, "4 MiB")
    yield "one id twice", written(summary(gpu(0), gpu(0, uuid="GPU-x"), gpu(1))), Accepted((1,), 2)
    yield "one id 5000 times", written(summary(*[gpu(0)] * 5000, gpu(1))), Accepted((1,), 5000)
    yield "one UUID twice", written(summary(gpu(0), gpu(2, uuid="GPU-h0"), gpu(1))), Accepted((1,), 2)
    yield "one GPU twice", written(summary(gpu(0), gpu(0), gpu(1))), Accepted((1,), 2)
    yield "a lost GPU by its id", written(summary(gpus_unavailable=[{"gpu_id": 0, "reason": EVIL}])), FIRST_LOST
    yield "a lost GPU by its UUID", written(summary(gpus_unavailable=[{"uuid": "GPU-h0", "name": EVIL}])), FIRST_LOST
    yield "lost GPUs that are none", written(summary(gpus_unavailable=[7, None, {"gpu_id": "0"}])), Accepted((0, 1), 3)
    yield "a GPU without readings", written(summary({"gpu_id": 0, "name": EVIL}, gpu(1))), FIRST_LOST
    yield "an error of the predecessor", written({"error": EVIL, "gpu_count": 0, "gpus": []}), BAD
    yield "a detail", written({"detail": EVIL}), Refused(BadAnswer, "gpus_summary is missing")
    yield "empty", b"", Refused(BadAnswer, "empty")
    yield "white space", b" \r\n\t" * 1000, Refused(BadAnswer, "empty")
    yield "a megabyte of white space, and a summary", b" " * (1 << 20) + good, ALL
    yield "invalid UTF-8", good.replace(b"A100", b"A\xff100"), Refused(BadAnswer, "not UTF-8")
    yield "Latin-1", good.replace(b"A100", "Ä100".encode("latin-1")), Refused(BadAnswer, "not UTF-8")
    yield "UTF-16", good.decode().encode("utf-16"), BAD
    yield "UTF-16 without a mark", good.decode().encode("utf-16-le"), BAD
    yield "a byte order mark", b"\xef\xbb\xbf" + good, Refused(BadAnswer, "byte order mark")
    yield "an HTML page", f"<!DOCTYPE html><html><body>{EVIL}".encode(), Refused(BadAnswer, "HTML")
    yield "an XML document", b"<?xml version='1.0'?><gpus/>", Refused(BadAnswer, "HTML or XML")
    yield "a Python literal", str(summary()).encode(), Refused(BadAnswer, "not JSON")
    yield "a callback", b"gpus(" + good + b")", Refused(BadAnswer, "not JSON")
    yield "a comment", b"// GPUs\n" + good, Refused(BadAnswer, "not JSON")
    yield "two documents", good + good, Refused(BadAnswer, "not JSON")
    yield "a comma too much", good[:-1] + b",}", Refused(BadAnswer, "not JSON")
    yield "a real tab in a name", good.replace(b"A100", b"A\t100"), Refused(BadAnswer, "not JSON")
    yield "null bytes", bytes(100_000), BAD
    yield "terminal control", b"\x1b]0;owned\x07\x1b[2J" * 999, Refused(BadAnswer, "\\x1b")
    for size in (1, len(good) // 3, len(good) // 2, len(good) - 1):
        yield f"the first {size} bytes", good[:size], Refused(BadAnswer, "not JSON")
    for what, piece in {"lists": b"[", "objects": b'{"a":'}.items():
        yield f"100,000 {what} in one another", piece * 100_000, Refused(BadAnswer, "nested")
        yield (
            f"{what} in one another, in a field",
            good[:-1] + b', "x": ' + piece * 100_000,
            Refused(BadAnswer, "nested"),
        )
    yield "a number of 100,000 digits", good[:-1] + b', "x": ' + b"9" * 100_000 + b"}", Refused(BadAnswer, "digits")
    yield "a fraction of 100,000 digits", good[:-1] + b', "x": 0.' + b"9" * 100_000 + b"}", ALL
    yield "an exponent of 100,000 digits", good[:-1] + b', "x": 1e' + b"9" * 100_000 + b"}", Refused(BadAnswer, "large")


def _framings() -> Iterator[tuple[str, Script, Accepted | Refused]]:
    """A good document, sent in all the ways in which HTTP can go wrong; most are in test_transport.HOSTILE."""
    good = written(summary())
    raw = servers.raw
    off = Refused(EndpointUnavailable, "broke off")
    yield "chunked", raw(CHUNKED + chunked(good[:50], good[50:])), ALL
    yield "in chunks of one byte", raw(CHUNKED + chunked(*[good[i : i + 1] for i in range(len(good))])), ALL
    yield "until the end", raw(head(headers=CLOSE) + good), ALL
    yield (
        "a length that is too short",
        raw(head(headers=CLOSE, length=len(good) - 9) + good),
        Refused(BadAnswer, "not JSON"),
    )
    yield "a length that is too long", raw(head(headers=CLOSE, length=len(good) + 1) + good), off
    yield "a length of nothing", raw(head(headers=CLOSE, length=0) + good), Refused(BadAnswer, "empty")
    yield "an earlier 100 Continue", raw(head(100) + head(headers=CLOSE, length=len(good)) + good), ALL
    yield "a second answer behind it", raw((head(headers=CLOSE, length=len(good)) + good) * 2), ALL
    yield "gzip, unasked", body(gzip.compress(good), headers={"Content-Encoding": "gzip"}), ALL
    yield "gzip twice", body(gzip.compress(gzip.compress(good)), headers={"Content-Encoding": "gzip"}), BAD
    yield "gzip in name only", body(good, headers={"Content-Encoding": "gzip"}), Refused(BadAnswer, "gzip")
    yield "an evil encoding", body(good, headers={"Content-Encoding": "\x1b[2J<b>"}), BAD
    yield "HTTP/1.0", raw(b"HTTP/1.0 200 OK\r\n\r\n" + good), ALL
    yield "HTTP/0.9", raw(good), BAD
    yield (
        "a reason that is evil",
        raw(head(length=len(good), headers=CLOSE).replace(b"Whatever", b"\x1b[2J<b>") + good),
        ALL,
    )
    yield "another content type", body(good, headers={"Content-Type": "text/html; charset=utf-7"}), ALL
    yield "a megabyte of cookies", body(good, headers={f"Set-Cookie-{n}": "x" * 60_000 for n in range(17)}), ALL
    yield "a header of 70 kB", body(good, headers={"X-Long": "x" * 70_000}), Refused(BadAnswer)
    yield (
        "an age that is none",
        body(good, headers={"GPU-Sample-Age": EVIL.replace("\r\n", "").encode("ascii", "ignore").decode()}),
        ALL,
    )
    yield "an age of the future", body(good, headers={"GPU-Sample-Age": "-1e300"}), ALL
    yield "an infinite age", body(good, headers={"GPU-Sample-Age": "1e999"}), ALL
    for status in (301, 302, 303, 307, 308):
        yield (
            f"a redirect to a file ({status})",
            body(good, status, {"Location": "file:///etc/passwd"}),
            Refused(EndpointUnavailable, f"status {status}"),
        )
    yield (
        "a redirect to itself",
        body(b"", 302, {"Location": "/gpu/summary"}),
        Refused(EndpointUnavailable, "status 302"),
    )
    yield "a redirect to nowhere", body(b"", 302), Refused(EndpointUnavailable, "status 302")
    for what in (
        "1e999",
        "-5",
        "NaN",
        "9" * 500,
        "soon",
        EVIL[:20],
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Fri, 99 Foo 9999",
    ):
        for status in (429, 503):
            yield (
                f"{status}, Retry-After: {ascii(what)[:30]}",
                body(good, status, {"Retry-After": what}),
                Refused(EndpointUnavailable, f"status {status}"),
            )


def _cut() -> Iterator[tuple[str, Script, Refused]]:
    """A good answer whose connection ends before it is complete, at every stage of it."""
    good = written(summary())
    fields = head(headers=CLOSE, length=len(good))
    whole = fields + good
    chunks = CHUNKED + chunked(good[:99], good[99:])
    stages = [*range(len(fields) + 2), *range(len(fields), len(whole), 40), len(whole) - 1]
    for size in sorted(set(stages)):
        yield f"closed after {size} bytes", servers.raw(whole[:size]), Refused(GPUPoolError)
    for size in range(0, len(whole), 60):
        yield f"reset after {size} bytes", servers.reset_after_request(whole[:size]), Refused(EndpointUnavailable)
    for size in (*range(len(CHUNKED), len(chunks) - 7, 20), len(chunks) - 7, len(chunks) - 5):
        yield f"closed after {size} bytes, in chunks", servers.raw(chunks[:size]), Refused(GPUPoolError)
    yield "closed at once", servers.close_at_once(), Refused(EndpointUnavailable)
    yield "closed in the middle, without a length", servers.raw(head(headers=CLOSE) + good[:200]), Refused(BadAnswer)


def _summaries() -> Iterator[tuple[str, Hostile]]:
    for name, content, expected in (*_values(), *_documents()):
        yield name, Hostile(body(content), expected)
    for name, script, expected in (*_framings(), *_cut()):
        yield name, Hostile(script, expected)


SUMMARIES: dict[str, Hostile] = dict(_summaries())


# -- the lease API -------------------------------------------------------------------------------------------------

#: Answers to any request of the lease API that are no answer.
NO_ANSWER: dict[str, Script] = {
    "empty": body(b""),
    "white space": body(b" \n" * 99),
    "an HTML page": body(f"<html>{EVIL}".encode()),
    "a byte order mark": body(b"\xef\xbb\xbf{}"),
    "invalid UTF-8": body(b'{"cards": ["\xff"]}'),
    "half an object": body(b'{"cards": ["GPU-1"], "tok'),
    "a list": body(b"[]"),
    "null": body(b"null"),
    "a text": body(written(EVIL)),
    "deep": body(b"[" * 100_000),
    "deep objects": body(b'{"a":' * 100_000),
    "NaN": body(b'{"x": NaN}'),
    "1e999": body(b'{"x": 1e999}'),
    "a huge integer": body(b'{"x": ' + b"9" * 5000 + b"}"),
    "5 MB": body(b" " * (5 << 20)),
    "cut off": servers.raw(head(headers=CLOSE, length=99) + b"{}"),
    "chunk garbage": servers.raw(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"),
    "a gzip bomb": body(gzip.compress(bytes(64 << 20), 1), headers={"Content-Encoding": "gzip"}),
    "an error": body(written({"error": {"code": "busy", "message": EVIL}}), 503),
    "an error that is a megabyte": body(written({"error": {"message": MEGABYTE}}), 500),
    "an error of another kind": body(written({"error": [EVIL]}), 400),
    "a redirect to a file": body(b"{}", 307, {"Location": "file:///etc/passwd"}),
    "not HTTP": servers.raw(b"SSH-2.0-\x1b[31m\r\n"),
}

_NUMBERS_NOT = {**NO_NUMBER, "null": None, "negative": -1, "20 digits": 10**19}


def grant(**changes: object) -> dict[str, Any]:
    return {"cards": ["GPU-1"], "token": 7, "ttl": 60.0, "since": 0.0, **changes}


def _claims() -> Iterator[tuple[str, tuple[int, object]]]:
    """Answers to a claim for one of GPU-1 and GPU-2 that grant nothing: status and document."""
    for status in (200, 202, 409):
        yield f"{status} with nothing in it", (status, {})
        yield f"{status} with an error", (status, {"error": {"message": EVIL}})
    bad: dict[str, Mapping[str, object]] = {
        "cards": {
            **NO_LIST,
            "null": None,
            "none": [],
            "somebody else's": ["GPU-3"],
            "one of ours and somebody else's": ["GPU-1", "GPU-3"],
            "two": ["GPU-1", "GPU-2"],
            "the same twice": ["GPU-1", "GPU-1"],
            "numbers": [1],
            "true": [True],
            "null in a list": [None],
            "empty": [""],
            "with white space": ["GPU-1 "],
            "in capitals": ["gpu-1"],
            "evil": [EVIL],
            "a megabyte": [MEGABYTE],
            "20,000": ["GPU-1"] * 20_000,
        },
        "token": {**_NUMBERS_NOT, "0": 0, "a fraction": 7.5, "beyond 64 bits": 2**64},
        "ttl": {**_NUMBERS_NOT, "0": 0, "for ever": 1e9},
        "since": {**_NUMBERS_NOT},
    }
    for field, values in bad.items():
        yield f"granted, {field} is missing", (200, without(grant(), field))
        for what, value in values.items():
            yield f"granted, {field} is {what}", (200, grant(**{field: value}))
        for what, value in NOT_JSON.items():
            yield f"granted, {field} is {what}", (200, grant(**{field: value}))
    for what, value in _NUMBERS_NOT.items():
        yield f"queued at {what}", (202, {"position": value})
    for what, value in {**NO_LIST, "null": None}.items():
        if what != "an object":
            yield f"refused, reasons are {what}", (409, {"reasons": value})
        yield f"refused, a reason is {what}", (409, {"reasons": {"GPU-1": value if what != "an object" else {"x": 1}}})
    yield "refused, an evil code", (409, {"reasons": {"GPU-1": {"code": EVIL, "text": "x"}}})
    yield "refused, holders are a text", (409, {"reasons": {}, "holders": "x"})
    yield "refused, closed is a number", (409, {"reasons": {}, "closed": 7})
    yield "refused for a megabyte", (409, {"reasons": {"GPU-1": {"code": "held", "text": MEGABYTE}}})


CLAIMS: dict[str, Script] = {
    **{name: body(written(document), status) for name, (status, document) in _claims()},
    **NO_ANSWER,
}

RENEWALS: dict[str, Script] = {
    **{
        f"alive is {what}": body(written({"alive": value}))
        for what, value in {
            **NO_LIST,
            "null": None,
            "empty": [],
            "too long": [True, True],
            "1": [1],
            "a text in a list": ["true"],
            "null in a list": [None],
            "a list in a list": [[True]],
        }.items()
    },
    "alive is missing": body(b"{}"),
    "why is a text": body(written({"alive": [True], "why": EVIL})),
    "why is a number": body(written({"alive": [True], "why": [7]})),
    "why is a megabyte": body(written({"alive": [True], "why": [MEGABYTE]})),
    **NO_ANSWER,
}

RELEASES: dict[str, Script] = {"200 with an error": body(written({"error": {"message": EVIL}})), **NO_ANSWER}

WAITS: dict[str, Script] = {
    **{
        f"hints are {what}": body(written({"hints": value}))
        for what, value in {**NO_LIST, "null": None, "numbers": [7], "a megabyte": [MEGABYTE], "empty": [""]}.items()
    },
    "hints are missing": body(b"{}"),
    **NO_ANSWER,
}

LISTS: dict[str, Script] = {
    **{
        f"leases are {what}": body(written({"leases": value, "queue": value}))
        for what, value in {**NO_LIST, "null": None}.items()
    },
    "leases are missing": body(b"{}"),
    **NO_ANSWER,
}


def lease(**changes: object) -> dict[str, Any]:
    """One of a list."""
    holder = {"id": "h", "name": "n", "user": "u", "host": "m", "pid": 1}
    return {
        "cards": ["GPU-1"],
        "holder": holder,
        "token": 7,
        "share": None,
        "note": None,
        "since": 1.0,
        "expires_in": 2.0,
        **changes,
    }


def garbled_leases() -> list[object]:
    """Each of which is left out of the list it stands in."""
    good = lease()
    bad: list[object] = [None, 7, EVIL, [], {}]
    bad += [without(good, field) for field in ("cards", "holder", "token", "since")]
    for field in ("cards", "holder", "token", "share", "since", "expires_in", "note"):
        bad += [{**good, field: value} for value in (True, -1, [7], 10**19 if field != "note" else 7)]
    return bad


def all_names() -> Iterable[str]:
    """Every answer of the catalogue but for the statuses, with where it is from."""
    tables: Mapping[str, Mapping[str, object]] = {
        "summary": SUMMARIES,
        "claim": CLAIMS,
        "renew": RENEWALS,
        "release": RELEASES,
        "wait": WAITS,
        "list": LISTS,
    }
    return [f"{table} {name}" for table, answers in tables.items() for name in answers]
