"""What notebooks show: values as HTML tables, and the words for people that every surface uses.

Names come from servers, users and notes, so everything is escaped: `Html` is what may stand in a page, and `_text` is
the only way from a string to it.  Colours are grey, transparent or of medium brightness, and text has the colour of the
page, so that the tables can be read in light and in dark themes.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from gpupool_sync.handle import GPU, GPUs
    from gpupool_sync.pool import GPUPool
    from gpupool_sync.status import CardStatus, EndpointInfo, Explanation, GlobalGPUInfo, LeasesStatus, Status

#: Text that may stand in a page as it is.
Html = NewType("Html", str)

#: Rows of one table; the rest is counted, as a page of a thousand rows tells nobody anything.
MOST_ROWS = 64

# On every element: the style sheets of notebooks align cells to the right and give rows a background of their own.
_TABLE = "border-collapse:collapse;margin:0.4em 0;font-size:13px;line-height:1.35;color:inherit"
_CELL = "padding:3px 10px 3px 0;text-align:left;vertical-align:top;border:0;color:inherit;background:transparent"
_LINE = ";border-bottom:1px solid rgba(128,128,128,0.35)"
_NUMBER = ";text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap"
_SAY = "margin:0.3em 0;font-size:13px;line-height:1.35;color:inherit"
_MARKS = {"good": "#1f9d55", "used": "#3b82c4", "warn": "#b7791f", "bad": "#d64545"}


# -- words -----------------------------------------------------------------------------------------------------


def plain(text: object) -> str:
    """
    *text* on one line, with what could drive a terminal, or turn the direction of text, made visible.

    For everything that a server may have said.
    """
    found = str(text)
    if not found.isprintable():
        found = "".join(ch if ch.isprintable() else " " if ch in "\n\r\t" else ascii(ch)[1:-1] for ch in found)
    return found


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None or value == float("inf"):
        return "?"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plural(number: int, word: str) -> str:
    """``1 GPU``, ``2 GPUs``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def percent(value: float | None) -> str:
    """A share of a hundred, or a dash."""
    return "–" if value is None else f"{value:.0f} %"


# -- pieces ----------------------------------------------------------------------------------------------------


def _text(value: object) -> Html:
    return Html(html.escape(plain(value), quote=True))


def _join(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


def _mark(kind: str, value: object) -> Html:
    """Text after a coloured dot: the colour alone says nothing to some readers."""
    return Html(f'<span style="color:{_MARKS[kind]}">●</span> {_text(value)}')


def _bold(value: object) -> Html:
    return Html(f"<b>{_text(value)}</b>")


def _say(*parts: Html) -> Html:
    return Html(f'<div style="{_SAY}">{_join(parts)}</div>')


def _table(columns: Sequence[str], rows: Sequence[Sequence[Html]], numbers: Sequence[str] = ()) -> Html:
    def cell(tag: str, column: str, content: Html) -> str:
        return f'<{tag} style="{_CELL}{_NUMBER if column in numbers else ""}{_LINE}">{content}</{tag}>'

    head = "".join(cell("th", column, _text(column)) for column in columns)
    body = "".join(
        "<tr>" + "".join(cell("td", column, content) for column, content in zip(columns, row, strict=True)) + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    more = _say(_text(f"and {len(rows) - MOST_ROWS} more")) if len(rows) > MOST_ROWS else ""
    table = f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return Html(f"{table}{more}")


def _page(*parts: Html) -> str:
    return f'<div class="gpupool-sync">{_join(parts)}</div>'


# -- status ----------------------------------------------------------------------------------------------------


def status_html(state: Status) -> str:
    """`Status` as two tables: the servers, then the cards and who holds them."""
    return _page(*_status(state))


def _status(state: Status) -> list[Html]:
    name = _join((_bold(state.name), Html(": "))) if state.name else Html("")
    columns = ("Endpoint", "URL", "State", "Free", "Leases by")
    parts = [_say(name, _text(state))]
    if state.hint:
        parts.append(_say(_mark("bad", state.hint)))
    parts += [_table(columns, _endpoints(state), numbers=("Free",))]
    cards = [
        (
            _bold(card.global_gpu_id),
            _text(card.name),
            _text(_memory(card)),
            _text(percent(card.utilization_percent)),
            _holder(card),
        )
        for card in state.gpus
    ]
    if cards:
        parts.append(_table(("GPU", "Model", "Memory", "Load", "Held by"), cards, numbers=("Memory", "Load")))
    return parts


def _endpoints(state: Status) -> list[tuple[Html, ...]]:
    return [
        (
            _bold(each.endpoint_id),
            _text(each.url),
            _state(each),
            _text(f"{each.available_gpus}/{each.total_gpus}"),
            _text(f"{getattr(each, 'arbiter', '')} ({getattr(each, 'scope', '')})"),
        )
        for each in state.endpoints
    ]


def _state(each: EndpointInfo) -> Html:
    error = getattr(each, "last_error", None)
    if not each.is_healthy:
        return _mark("bad", f"down: {error}" if error else "no answer yet")
    if getattr(each, "stale", False):
        return _mark("warn", "stale")
    if getattr(each, "draining", False):
        return _mark("warn", "draining")
    problems = getattr(each, "problems", ())
    return _mark("warn", "; ".join(problems)) if problems else _mark("good", "healthy")


def _memory(card: CardStatus) -> str:
    if card.memory_used_mb is not None and card.memory_total_mb is not None:
        return f"{card.memory_used_mb / 1024:.1f} / {card.memory_total_mb / 1024:.1f} GiB"
    return percent(card.memory_usage_percent)


def _holder(card: GlobalGPUInfo) -> Html:
    holders: Sequence[str] = getattr(card, "holders", ())
    if holders:
        held_for, note = getattr(card, "held_for", None), getattr(card, "note", None)
        text = ", ".join(holders) + (f", for {seconds(held_for)}" if held_for is not None else "")
        return _mark("used", f"{text}: {note}" if note else text)
    if card.is_available:
        return _mark("good", "free")
    return _mark("warn", getattr(card, "why_not", None) or "not available")


# -- leases ----------------------------------------------------------------------------------------------------


def leases_html(state: LeasesStatus) -> str:
    """`LeasesStatus` as tables: who holds what, and who waits."""
    leases = [
        (
            _bold(", ".join(each.gpus)),
            _text(each.holder),
            _text(seconds(each.since)),
            _text(each.share or "whole"),
            _text(each.note or ""),
            _text(each.arbiter),
        )
        for each in state.leases
    ]
    queue = [
        (
            _text(each.position + 1),
            _text(each.holder),
            _text(seconds(each.waited)),
            _text(each.wants),
            _text(each.note or ""),
            _text(each.arbiter),
        )
        for each in state.queue
    ]
    parts = [_say(_text(f"{plural(len(leases), 'lease')}, {len(queue)} waiting"))]
    if leases:
        parts.append(_table(("GPU", "Held by", "For", "Share", "Note", "Arbiter"), leases, numbers=("For",)))
    if queue:
        parts.append(_table(("Place", "Who waits", "For", "Wants", "Note", "Arbiter"), queue, numbers=("Place", "For")))
    parts += [_say(_mark("bad", problem)) for problem in state.problems]
    return _page(*parts)


# -- explanations, and waiting -----------------------------------------------------------------------------------


def explanation_html(explanation: Explanation) -> str:
    """`Explanation` as a table: one row for all cards of an endpoint of which the same is true."""
    free = f"{explanation.request}: {explanation.free} of {plural(len(explanation.cards), 'GPU')} free"
    return _page(_say(_bold(free)), *_reasons(explanation))


def waiting_html(explanation: Explanation, waited: float, place: int | None) -> str:
    """What a notebook shows while a cell waits; *place* counts from 1."""
    head = f"waiting {seconds(waited)} for {explanation.request}"
    return _page(
        _say(_bold(head), _text(f" · place {place} in the queue" if place is not None else "")), *_reasons(explanation)
    )


def waiting_line(explanation: Explanation, waited: float, place: int | None) -> str:
    """The same for a terminal, on one line, the most telling first."""
    head = f"waiting {seconds(waited)} for {explanation.request}"
    if place is not None:
        head += f", place {place}"
    # Without what is long and known: on a line of 80 characters there must be room for who holds the GPU.
    return plain(": ".join([head, *filter(None, ["; ".join(explanation.lines(8, models=False))])]))


def _reasons(explanation: Explanation) -> list[Html]:
    rows = [
        (
            _bold(group.gpus),
            _text(group.name),
            _mark({"free": "good", "held": "used"}.get(group.code, "warn"), group.text),
        )
        for group in explanation.groups()
    ]
    parts = [_say(_text(explanation.hint))] if explanation.hint else []
    if rows:
        parts.append(_table(("GPU", "Model", "Verdict"), rows))
    parts += [_say(_mark("bad", f"{endpoint_id}: {text}")) for endpoint_id, text in explanation.endpoints.items()]
    return parts + [_say(_text(line)) for line in explanation.remarks()]


# -- handles and pools ---------------------------------------------------------------------------------------------


def gpu_html(gpu: GPU) -> str:
    """A `GPU` as one row."""
    return _page(_handles([gpu]))


def gpus_html(gpus: GPUs) -> str:
    """`GPUs` as a row each."""
    return _page(_say(_text(f"{plural(len(gpus), 'GPU')} of one host, under one lease")), _handles(list(gpus)))


def _handles(gpus: Sequence[GPU]) -> Html:
    rows = [
        (
            _bold(gpu.global_gpu_id),
            _text(gpu.name),
            _text("–" if gpu.memory_total_mb is None else f"{gpu.memory_total_mb / 1024:.1f} GiB"),
            _text(gpu.uuid or "–"),
            _text(gpu.host),
            _lease(gpu),
        )
        for gpu in gpus
    ]
    return _table(("GPU", "Model", "Memory", "UUID", "Machine", "Lease"), rows, numbers=("Memory",))


def _lease(gpu: GPU) -> Html:
    if gpu.lost:
        return _mark("bad", "lost")
    return _mark("warn", "released") if gpu.released else _mark("good", f"held, for {seconds(gpu.held_for)}")


def pool_html(pool: GPUPool, state: Status | None) -> str:
    """A `GPUPool` with what it knows at this moment; None: it is not open."""
    said = repr(pool)[1:-1]
    return _page(_say(_bold(said)), *(_status(state) if state is not None else ()))
