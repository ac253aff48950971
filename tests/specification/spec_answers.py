"""A plain statistics server's answer, for servers that count who asks them."""

from __future__ import annotations

import json


def summary(number=2, memory=1.0, **more):
    gpus = [
        {"gpu_id": n, "name": "A100", "memory_usage_percent": memory, "utilization_percent": 0.0} for n in range(number)
    ]
    told = {"gpu_count": number, "gpus_summary": gpus, "timestamp": "2026-01-01T00:00:00", **more}
    return json.dumps(told).encode()
