"""A stand-in for the predecessor's statistics server: its documented answers, and its quirks.

* It tells no UUIDs, no MiB per card in the summary, no processes, and nothing of leases.
* When ``nvidia-smi`` fails it answers 200, with an ``error`` in the body.
* Under ``CUDA_VISIBLE_DEVICES`` the cards keep the system's numbers, so they need not be contiguous.
* Without a visible card ``total_memory_usage_percent`` is missing.
* Timestamps are local time without a zone.
"""

from __future__ import annotations

import datetime
import json
import socket
from types import TracebackType
from typing import Any

import attrs

from servers import Connection, Server, head


@attrs.define
class Card:
    gpu_id: int
    name: str = "NVIDIA A100-SXM4-40GB"
    total_mb: int = 40960
    used_mb: int = 4
    utilization_percent: int = 0

    @property
    def usage_percent(self) -> float:
        return round(self.used_mb / self.total_mb * 100, 2)


class PredecessorServer:
    """
    One such server on loopback, from its making to `close`.

    Args:
        cards: how many the system has.
        visible: its ``CUDA_VISIBLE_DEVICES``, as numbers; None: not set.
    """

    def __init__(self, cards: int, visible: tuple[int, ...] | None = None) -> None:
        self.cards = [Card(number) for number in range(cards)]
        self.visible = visible
        self.smi_fails: str | None = None
        self.requested: dict[str, int] = {}
        self._server: Server | None = None
        # Bound, but not listening: the port stays this server's while it is dead, and connections are refused.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self._port = int(self._place.getsockname()[1])
        self.restart()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def name(self) -> str:
        return f"127.0.0.1-{self._port}"

    # -- what a test does to it; the names are those of `gpupool_sync.testing.FakeServer` --

    def kill(self) -> None:
        """Refuse connections, and drop those there are."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        self.kill()
        self._place.close()

    def restart(self) -> None:
        self.kill()
        server = Server(self._serve, port=self._port)
        server.__enter__()
        self._server = server

    def busy(self, index: int, memory_percent: float = 95.0, *, process: bool = True) -> None:
        """Somebody uses the card; processes are never told."""
        card = self.cards[index]
        card.used_mb = int(card.total_mb * memory_percent / 100)

    def error_body(self) -> None:
        self.smi_fails = "Failed to get GPU stats: Command '['nvidia-smi']' returned non-zero exit status 9."

    def heal(self) -> None:
        self.smi_fails = None
        for card in self.cards:
            card.used_mb = 4
        if self._server is None:
            self.restart()

    # -- what it answers --

    def _serve(self, connection: Connection) -> None:
        while True:
            request = connection.request()
            self.requested[request.path] = self.requested.get(request.path, 0) + 1
            status, document = self.answer(request.path)
            body = json.dumps(document).encode()
            headers = {"date": "Mon, 01 Jan 2024 00:00:00 GMT", "server": "uvicorn", "content-type": "application/json"}
            connection.send(head(status, headers, length=len(body)) + body)

    def answer(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/gpu/summary":
            return 200, self._summary()
        if path == "/gpu/stats":
            return 200, self._stats()
        if path == "/gpu/count":
            stats = self._stats()
            return 200, {"gpu_count": stats["gpu_count"], "timestamp": stats.get("timestamp")}
        if path == "/health":
            return 200, {"status": "healthy", "nvidia_smi_available": True, "timestamp": _local_time()}
        if path == "/config":
            return 200, {"server": {"host": "0.0.0.0", "port": 8000}, "monitoring": {"refresh_interval": 1.0}}
        if path == "/":
            return 200, {"message": "GPU Statistics Server", "version": "1.0.0", "endpoints": {"/gpu/summary": "…"}}
        return 404, {"detail": "Not Found"}

    def _shown(self) -> list[Card]:
        return [card for card in self.cards if self.visible is None or card.gpu_id in self.visible]

    def _failure(self) -> dict[str, Any]:
        return {"error": self.smi_fails, "gpu_count": 0, "gpus": []}

    def _summary(self) -> dict[str, Any]:
        if self.smi_fails is not None:
            return self._failure()
        shown = self._shown()
        total, used = sum(card.total_mb for card in shown), sum(card.used_mb for card in shown)
        busy = [card.utilization_percent for card in shown]
        summary: dict[str, Any] = {
            "gpu_count": len(shown),
            "total_memory_mb": total,
            "total_used_memory_mb": used,
            "average_utilization_percent": round(sum(busy) / len(busy), 2) if busy else 0,
            "gpus_summary": [
                {
                    "gpu_id": card.gpu_id,
                    "name": card.name,
                    "memory_usage_percent": card.usage_percent,
                    "utilization_percent": card.utilization_percent,
                }
                for card in shown
            ],
        }
        if shown:
            summary["total_memory_usage_percent"] = round(used / total * 100, 2)
        return {**summary, "timestamp": _local_time()}

    def _stats(self) -> dict[str, Any]:
        if self.smi_fails is not None:
            return self._failure()
        gpus = [
            {
                "gpu_id": card.gpu_id,
                "name": card.name,
                "memory": {
                    "total_mb": card.total_mb,
                    "used_mb": card.used_mb,
                    "free_mb": card.total_mb - card.used_mb,
                    "usage_percent": card.usage_percent,
                },
                "utilization_percent": card.utilization_percent,
                "temperature_c": 31,
                "power": {"draw_w": 52.0, "limit_w": None},
            }
            for card in self._shown()
        ]
        return {"gpu_count": len(gpus), "gpus": gpus, "timestamp": _local_time()}


def _local_time() -> str:
    return datetime.datetime.now().isoformat()


class PredecessorFleet:
    """Several of them, for a ``with`` block."""

    def __init__(self, cards: list[int]) -> None:
        self._servers = [PredecessorServer(number) for number in cards]

    def __getitem__(self, index: int) -> PredecessorServer:
        return self._servers[index]

    def __len__(self) -> int:
        return len(self._servers)

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self._servers]

    def __enter__(self) -> PredecessorFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
