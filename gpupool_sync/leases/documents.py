"""The lease API's JSON ⇄ the contract's values, shared by client and server.

Pure: no I/O, no clock.  Both sides parse strictly: whatever is not what it should be raises `BadDocument`, and nothing
is guessed.  All times are durations in seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from gpupool_sync.leases.base import Claim, Holder, Lease, LeaseInfo, Share, TicketInfo, Wanted
from gpupool_sync.models import Reason
from gpupool_sync.wire import clean_text

#: Longest time that a lease may live without renewal, in seconds.
MAX_TTL = 300.0
#: Longest time that one long poll may take, in seconds.
MAX_WAIT = 25.0
#: Ids in one request.
MAX_IDS = 1000
#: Cards in one claim.
MAX_CARDS = 10_000
#: Holders that one long poll may listen for.
MAX_HOLDERS = 64

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NAMES = {"name": 100, "user": 100, "host": 255}
_LONGEST_NOTE = 200
#: Characters of a card's key, and of what one side says to people at the other.
LONGEST_KEY = 300
LONGEST_TEXT = 1000
TOKEN_LIMIT = 2**63
#: Bounds of amounts: seconds, MiB, places of a card, process ids.
MOST_SECONDS = 1e10
MOST_MB = 1e12
MOST_PLACES = 1_000_000
MOST_PID = 2**31 - 1


class BadDocument(Exception):
    """A request or an answer is not what it should be; str() says what is wrong, without any id."""


def digest(claim_id: str) -> str:
    """Stands for an id where others may see it: whoever knows the id recognises it, nobody gets the id from it."""
    return hashlib.sha256(claim_id.encode()).hexdigest()[:24]


# --- reading fields -------------------------------------------------------------------------------------------


def _text(value: object, what: str, longest: int) -> str:
    if not isinstance(value, str) or not value or len(value) > longest:
        raise BadDocument(f"{what}: a text of 1 to {longest} characters is allowed")
    return value


def _id(value: object, what: str) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise BadDocument(f"{what}: 1 to 128 letters, digits, dots, colons, dashes and underscores are allowed")
    return value


def _count(value: object, what: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadDocument(f"{what}: a whole number from {low} to {high} is allowed")
    return value


def _number(value: object, what: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise BadDocument(f"{what}: a number from {low:g} to {high:g} is allowed")
    return float(value)


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise BadDocument(f"{what}: true or false is allowed")
    return value


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadDocument(f"{what}: an object is needed")
    return value


def _list(value: object, what: str, longest: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > longest:
        raise BadDocument(f"{what}: a list of at most {longest} is needed")
    return value


def _seconds(value: object, what: str) -> float:
    return _number(value, what, 0.0, MOST_SECONDS)


# --- parts ----------------------------------------------------------------------------------------------------


def holder_document(holder: Holder) -> dict[str, Any]:
    return {"id": holder.id, "name": holder.name, "user": holder.user, "host": holder.host, "pid": holder.pid}


def read_holder(raw: object) -> Holder:
    fields = _object(raw, "holder")
    texts: dict[str, str | None] = {}
    for field, longest in _NAMES.items():
        value = fields.get(field)
        if value is not None and not isinstance(value, str):
            raise BadDocument(f"holder.{field}: a text is allowed")
        # Shown to others, so printable; names are for people, so a long one is cut and not refused.
        texts[field] = None if value is None else clean_text(value)[:longest]
    return Holder(
        id=_id(fields.get("id"), "holder.id"),
        name=texts["name"],
        user=texts["user"] or "?",
        host=texts["host"] or "?",
        pid=_count(fields.get("pid", 0), "holder.pid", 0, MOST_PID),
    )


def share_document(share: Share | None) -> dict[str, Any] | None:
    if share is None:
        return None
    return {"memory_mb": share.memory_mb} if share.memory_mb is not None else {"places": share.places}


def read_share(raw: object) -> Share | None:
    if raw is None:
        return None
    fields = _object(raw, "share")
    memory, places = fields.get("memory_mb"), fields.get("places")
    if (memory is None) == (places is None):
        raise BadDocument("share: either memory_mb or places is needed")
    if memory is not None:
        return Share(memory_mb=_number(memory, "share.memory_mb", 0.0, MOST_MB))
    return Share(places=_count(places, "share.places", 1, MOST_PLACES))


def _read_note(raw: object) -> str | None:
    if raw is None:
        return None
    if not isinstance(raw, str):
        raise BadDocument("note: a text is allowed")
    return clean_text(raw)[:_LONGEST_NOTE]


def _read_keys(raw: object, what: str) -> tuple[str, ...]:
    return tuple(_text(key, what, LONGEST_KEY) for key in _list(raw, what, MAX_CARDS))


# --- requests -------------------------------------------------------------------------------------------------


def claim_document(claim: Claim, ttl: float) -> dict[str, Any]:
    """The body of ``POST /v1/leases``; it has the id, so it is not to be logged."""
    cards = []
    for number, group in enumerate(claim.groups):
        for wanted in group:
            card: dict[str, Any] = {"key": wanted.key}
            if wanted.room_mb is not None:
                card["room_mb"] = wanted.room_mb
            if number:
                card["group"] = number
            cards.append(card)
    return {
        "id": claim.id,
        "holder": holder_document(claim.holder),
        "count": claim.count,
        "cards": cards,
        "share": share_document(claim.share),
        "ttl": ttl,
        "waited": claim.waited,
        "queue": claim.queue,
        "reserve": claim.reserve,
        "note": claim.note,
        **({"emptied": dict(claim.emptied)} if claim.emptied else {}),
        **({"busy": dict(claim.busy)} if claim.busy else {}),
    }


def read_claim(fields: Mapping[str, Any]) -> Claim:
    """
    The claim in the body of ``POST /v1/leases``; unknown fields are ignored.

    Raises:
        BadDocument: a field is missing or not as it should be.
    """
    groups: dict[int, dict[str, Wanted]] = {}
    for raw in _list(fields.get("cards"), "cards", MAX_CARDS):
        card = _object(raw, "cards")
        key = _text(card.get("key"), "cards.key", LONGEST_KEY)
        room = card.get("room_mb")
        room = None if room is None else _number(room, "cards.room_mb", -MOST_MB, MOST_MB)
        group = _count(card.get("group", 0), "cards.group", 0, MAX_CARDS)
        groups.setdefault(group, {}).setdefault(key, Wanted(key, room))
    if not groups:
        raise BadDocument("cards: at least one is needed")
    ttl = _number(fields.get("ttl"), "ttl", 0.1, MAX_TTL)
    return Claim(
        id=_id(fields.get("id"), "id"),
        holder=read_holder(fields.get("holder")),
        groups=tuple(tuple(groups[number].values()) for number in sorted(groups)),
        count=_count(fields.get("count", 1), "count", 1, MAX_CARDS),
        share=read_share(fields.get("share")),
        ttl=ttl,
        waited=_seconds(fields.get("waited", 0.0), "waited"),
        queue=_flag(fields.get("queue", False), "queue"),
        reserve=_flag(fields.get("reserve", True), "reserve"),
        note=_read_note(fields.get("note")),
        emptied=_read_ages(fields, "emptied"),
        busy=_read_ages(fields, "busy"),
    )


def _read_ages(fields: Mapping[str, Any], name: str) -> dict[str, float]:
    return {
        _text(key, name, LONGEST_KEY): _seconds(age, name) for key, age in _object(fields.get(name, {}), name).items()
    }


def revocation_document(key: str, token: int, by: str) -> dict[str, Any]:
    return {"key": key, "token": token, "by": by}


def read_revocation(fields: Mapping[str, Any]) -> tuple[str, int, str]:
    """Card, fencing token and by whom, in the body of ``POST /v1/leases/revoke``."""
    return (
        _text(fields.get("key"), "key", LONGEST_KEY),
        _count(fields.get("token"), "token", 0, TOKEN_LIMIT),
        clean_text(_text(fields.get("by"), "by", LONGEST_TEXT))[:_LONGEST_NOTE],
    )


def read_ids(fields: Mapping[str, Any]) -> list[str]:
    return [_id(each, "ids") for each in _list(fields.get("ids"), "ids", MAX_IDS)]


def read_wait(fields: Mapping[str, Any]) -> tuple[list[str], float]:
    """Holder ids and seconds of a long poll: `holder` is one id or a list of them."""
    holder = fields.get("holder")
    holders = [holder] if isinstance(holder, str) else _list(holder, "holder", MAX_HOLDERS)
    if not holders:
        raise BadDocument("holder: at least one id is needed")
    timeout = _number(fields.get("timeout"), "timeout", 0.0, MAX_WAIT)
    return [_id(each, "holder") for each in holders], timeout


# --- answers --------------------------------------------------------------------------------------------------


@attrs.frozen
class GrantDocument:
    """What the server tells of a lease."""

    cards: tuple[str, ...]
    token: int
    ttl: float
    since: float  # seconds


def grant_document(lease: Lease, now: float) -> dict[str, Any]:
    return {
        "cards": list(lease.cards),
        "token": lease.token,
        "ttl": lease.ttl,
        "since": max(0.0, now - lease.granted_at),
    }


def read_grant(fields: Mapping[str, Any]) -> GrantDocument:
    cards = _read_keys(fields.get("cards"), "cards")
    if not cards or len(set(cards)) != len(cards):
        raise BadDocument("cards: different cards are needed, at least one")
    return GrantDocument(
        cards=cards,
        token=_count(fields.get("token"), "token", 1, TOKEN_LIMIT),
        ttl=_number(fields.get("ttl"), "ttl", 0.01, MAX_TTL),
        since=_seconds(fields.get("since"), "since"),
    )


def read_position(fields: Mapping[str, Any]) -> int:
    return _count(fields.get("position"), "position", 0, 2**31)


def reasons_document(reasons: Mapping[str, Reason]) -> dict[str, Any]:
    return {key: {"code": reason.code, "text": reason.text} for key, reason in reasons.items()}


def read_reasons(fields: Mapping[str, Any]) -> dict[str, Reason]:
    reasons: dict[str, Reason] = {}
    for key, raw in _object(fields.get("reasons"), "reasons").items():
        reason = _object(raw, "reasons")
        code = _text(reason.get("code"), "reasons.code", 40)
        reasons[key] = Reason(clean_text(code), clean_text(_text(reason.get("text"), "reasons.text", LONGEST_TEXT)))
    return reasons


def read_alive(fields: Mapping[str, Any], number: int) -> list[bool]:
    alive = [_flag(each, "alive") for each in _list(fields.get("alive"), "alive", MAX_IDS)]
    if len(alive) != number:
        raise BadDocument(f"alive: {number} were asked for")
    return alive


def read_found(fields: Mapping[str, Any]) -> bool:
    return _flag(fields.get("found"), "found")


def read_why(fields: Mapping[str, Any], number: int) -> list[str | None]:
    """Why leases are gone, in the order of the ids; None: alive, or nobody knows. Servers may leave it out."""
    told = _list(fields.get("why", []), "why", MAX_IDS)
    if len(told) != number:
        return [None] * number
    return [None if each is None else clean_text(_text(each, "why", LONGEST_TEXT)) for each in told]


def read_closed(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return _read_keys(fields.get("closed", []), "closed")


def read_hints(fields: Mapping[str, Any]) -> list[str]:
    return [_text(each, "hints", 64) for each in _list(fields.get("hints"), "hints", 1_000_000)]


def lease_info_document(info: LeaseInfo) -> dict[str, Any]:
    return {
        "cards": list(info.cards),
        "holder": holder_document(info.holder),
        "token": info.token,
        "share": share_document(info.share),
        "note": info.note,
        "since": info.since,
        "expires_in": info.expires_in,
    }


def read_lease_infos(raw: object) -> list[LeaseInfo]:
    """The leases of a list, less those that are garbled: any user of that host may have written them."""
    infos = []
    for each in _list(raw, "leases", 1_000_000):
        with contextlib.suppress(BadDocument):
            infos.append(_read_lease_info(_object(each, "leases")))
    return infos


def _read_lease_info(fields: Mapping[str, Any]) -> LeaseInfo:
    expires = fields.get("expires_in")
    return LeaseInfo(
        cards=_read_keys(fields.get("cards"), "cards"),
        holder=read_holder(fields.get("holder")),
        token=_count(fields.get("token"), "token", 0, TOKEN_LIMIT),
        share=read_share(fields.get("share")),
        note=_read_note(fields.get("note")),
        since=_seconds(fields.get("since"), "since"),
        expires_in=None if expires is None else _seconds(expires, "expires_in"),
    )


def ticket_info_document(info: TicketInfo) -> dict[str, Any]:
    return {
        "position": info.position,
        "holder": holder_document(info.holder),
        "cards": list(info.cards),
        "count": info.count,
        "share": share_document(info.share),
        "waited": info.waited,
        "note": info.note,
    }


def read_ticket_infos(raw: object) -> list[TicketInfo]:
    """The tickets of a list, less those that are garbled."""
    infos = []
    for each in _list(raw, "queue", 1_000_000):
        with contextlib.suppress(BadDocument):
            infos.append(_read_ticket_info(_object(each, "queue")))
    return infos


def _read_ticket_info(fields: Mapping[str, Any]) -> TicketInfo:
    return TicketInfo(
        position=_count(fields.get("position"), "position", 0, 2**31),
        holder=read_holder(fields.get("holder")),
        cards=_read_keys(fields.get("cards"), "cards"),
        count=_count(fields.get("count"), "count", 1, MAX_CARDS),
        share=read_share(fields.get("share")),
        waited=_seconds(fields.get("waited"), "waited"),
        note=_read_note(fields.get("note")),
    )


# --- the server's memory --------------------------------------------------------------------------------------


def kept_lease_document(lease: Lease, rooms: Sequence[float | None]) -> dict[str, Any]:
    """A lease as the server keeps it across a restart; it has the id."""
    return {
        "id": lease.id,
        "holder": holder_document(lease.holder),
        "cards": [{"key": key, "room_mb": room} for key, room in zip(lease.cards, rooms, strict=True)],
        "token": lease.token,
        "share": share_document(lease.share),
        "note": lease.note,
        "granted_at": lease.granted_at,
        "ttl": lease.ttl,
    }


def read_kept_lease(raw: object) -> tuple[Lease, tuple[float | None, ...]]:
    fields = _object(raw, "lease")
    cards = [_object(card, "cards") for card in _list(fields.get("cards"), "cards", MAX_CARDS)]
    rooms = [card.get("room_mb") for card in cards]
    granted_at = _number(fields.get("granted_at"), "granted_at", -math.inf, 1e12)
    lease = Lease(
        id=_id(fields.get("id"), "id"),
        holder=read_holder(fields.get("holder")),
        cards=tuple(_text(card.get("key"), "cards.key", LONGEST_KEY) for card in cards),
        token=_count(fields.get("token"), "token", 1, TOKEN_LIMIT),
        share=read_share(fields.get("share")),
        note=_read_note(fields.get("note")),
        granted_at=granted_at,
        ttl=_number(fields.get("ttl"), "ttl", 0.01, MAX_TTL),
    )
    return lease, tuple(None if room is None else _number(room, "room_mb", -MOST_MB, MOST_MB) for room in rooms)
