"""
What others build on stays: public names, their signatures, and the shapes of our JSON.

``tests/snapshots/public_api.json`` has them.  A removal or a change fails.  An addition fails too until the snapshot
knows it::

    python tests/test_public_api.py --write

which refuses to forget what is gone or has changed; ``--write --breaking`` does that as well, for a new major version.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

import gpupool_sync
from gpupool_sync import status
from gpupool_sync.devices.simulated import SimulatedReader, parse_cards
from gpupool_sync.server.app import create_app
from gpupool_sync.server.sampler import Sampler

SNAPSHOT = Path(__file__).parent / "snapshots" / "public_api.json"
COMMAND = "python tests/test_public_api.py --write"

pytestmark = pytest.mark.checkout


def _signature(name: str, function: Any) -> dict[str, str]:
    """
    The function and each of its parameters: position or keyword, and default.

    Annotations may become more exact without breaking anybody, and one more parameter with a default is an addition.
    """
    found = {name: "function"}
    for position, each in enumerate(inspect.signature(function).parameters.values()):
        if each.name == "self":
            continue
        kind = each.kind.description if each.kind is not each.POSITIONAL_OR_KEYWORD else f"number {position}"
        needed = each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        default = "required" if needed else "" if each.default is each.empty else f"= {each.default!r}"
        found[f"{name}({each.name})"] = f"{kind} {default}".strip()
    return found


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "gpupool_sync"


def _class(name: str, cls: type) -> dict[str, str]:
    found = {name: "class"}
    for base in cls.__mro__[1:-1]:
        if not _is_ours(base) or not base.__name__.startswith("_"):
            found[f"{name} is a {base.__name__}"] = "base class"
    for owner in reversed(cls.__mro__):
        if not _is_ours(owner):
            continue
        for member, value in vars(owner).items():
            there = f"{name}.{member}"
            if member == "__init__" and not getattr(owner, "_is_protocol", False):
                # What a subclass does not take any more is no parameter of it.
                found = {key: told for key, told in found.items() if not key.startswith(f"{there}(")}
                found.update(_signature(there, value))
            elif member in ("__enter__", "__exit__"):
                found[there] = "function"
            elif member.startswith("_"):
                continue
            elif isinstance(value, property):
                found[there] = "property"
            elif isinstance(value, (staticmethod, classmethod)):
                found.update(_signature(there, value.__func__))
                found[there] = type(value).__name__
            elif inspect.isfunction(value):
                found.update(_signature(there, value))
            else:
                found[there] = "attribute"
    return found


def names() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in (*gpupool_sync.__all__, "testing.FakeFleet", "testing.FakeServer"):
        module, _, last = name.rpartition(".")
        value = getattr(importlib.import_module(f"gpupool_sync.{module}" if module else "gpupool_sync"), last)
        found.update(_class(name, value) if inspect.isclass(value) else _signature(name, value))
    return found


def json_keys() -> dict[str, str]:
    """The keys of `to_dict()` of everything that a pool tells about itself."""
    return {
        f"{cls.__name__}[{field.name!r}]": str(field.type)
        for cls in vars(status).values()
        if inspect.isclass(cls) and cls.__module__ == status.__name__ and attrs.has(cls)
        for field in attrs.fields(cls)
    }


def _schema(schema: dict[str, Any], path: str, found: dict[str, str]) -> None:
    required = schema.get("required", ())
    for name, each in schema.get("properties", {}).items():
        kind = json.dumps(each.get("type", "any of several" if "anyOf" in each else "any"))
        found[f"{path}.{name}"] = kind + (" required" if name in required else "")
        _schema(each, f"{path}.{name}", found)
    if "items" in schema:
        _schema(schema["items"], f"{path}[]", found)
    for number, each in enumerate(schema.get("anyOf", ())):
        _schema(each, f"{path}|{number}", found)


def wire() -> dict[str, str]:
    """Every path of the server, with the properties of what goes in and what comes out."""
    sampler = Sampler(SimulatedReader(parse_cards("1"), name="example"))
    document = create_app(sampler, leases=object()).openapi()  # type: ignore[arg-type] - asked for its routes only
    found: dict[str, str] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            there = f"{method.upper()} {path}"
            found[there] = "path"
            body = operation.get("requestBody", {})
            for kind, told in {**({"request": body} if body else {}), **operation["responses"]}.items():
                found[f"{there} {kind}"] = "answer"
                for content in told.get("content", {}).values():
                    _schema(content["schema"], f"{there} {kind}", found)
    return found


def public_api() -> dict[str, dict[str, str]]:
    return {"names": names(), "json": json_keys(), "wire": wire()}


def _read() -> dict[str, dict[str, str]]:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def _is_demanded(part: str, key: str, old: dict[str, str], new: dict[str, str]) -> bool:
    """Whether it is new, and existing calls lack it."""
    if not new[key].endswith("required"):
        return False
    if part == "wire":
        return " request." in key and key.partition(" request.")[0] in old
    return key.partition("(")[0] in old


def differences(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> tuple[list[str], list[str]]:
    """What is gone or has changed, and what is new."""
    broken, added = [], []
    for part in sorted({*before, *now}):
        old, new = before.get(part, {}), now.get(part, {})
        broken += [f"{part}: {key} is gone (it was {old[key]})" for key in old if key not in new]
        broken += [f"{part}: {key} was {old[key]}, is {new[key]}" for key in old if new.get(key, old[key]) != old[key]]
        for key in new:
            if key not in old:
                (broken if _is_demanded(part, key, old, new) else added).append(f"{part}: {key} is new ({new[key]})")
    return broken, added


def test_nothing_is_gone_and_no_signature_has_changed():
    broken, _ = differences(_read(), public_api())
    assert not broken, "somebody may rely on it:\n" + "\n".join(broken)


def test_what_is_new_is_in_the_snapshot():
    """So that it cannot go away unnoticed later."""
    _, added = differences(_read(), public_api())
    assert not added, f"run `{COMMAND}`:\n" + "\n".join(added)


def test_all_public_names_are_found():
    """Also those that are imported only when somebody asks for them."""
    snapshot = _read()["names"]
    for name in gpupool_sync.__all__:
        assert name in snapshot
    assert snapshot["GPUWorkerPoolClient.request_gpu(timeout)"] == "number 1 = None"
    assert {"GET /gpu/summary", "POST /v1/leases"} <= set(_read()["wire"])
    assert "at 0x" not in SNAPSHOT.read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["names", "json", "wire"])
def test_a_removal_and_a_change_are_found(part):
    before, now = _read(), public_api()
    gone, changed = list(now[part])[-2:]
    del now[part][gone]
    now[part][changed] = "something else"
    now[part]["something new"] = "there"
    broken, added = differences(before, now)
    assert [line.split(" ")[0] for line in (*broken, *added)] == [f"{part}:"] * 3
    assert gone in broken[0]
    assert changed in broken[1]
    assert "something new" in added[0]


def test_a_parameter_may_come_but_not_be_demanded():
    def old(a, *, b=1): ...
    def more(a, c=2, *, b=1, d=3): ...
    def demanding(a, c, *, b=1): ...
    def other_order(b, a): ...

    def against(function):
        broken, added = differences({"names": _signature("f", old)}, {"names": _signature("f", function)})
        return bool(broken), bool(added)

    assert against(old) == (False, False)
    assert against(more) == (False, True)
    assert against(demanding) == (True, False)
    assert against(other_order) == (True, False)


def main(arguments: list[str]) -> int:
    if arguments not in (["--write"], ["--write", "--breaking"]):
        print(f"usage: {COMMAND} [--breaking]", file=sys.stderr)
        return 2
    now = public_api()
    broken, added = differences(_read() if SNAPSHOT.exists() else {}, now)
    if broken and "--breaking" not in arguments:
        print("\n".join(["not written; --breaking forgets it:", *broken]), file=sys.stderr)
        return 1
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print("\n".join([*broken, *added]) or "nothing new")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
