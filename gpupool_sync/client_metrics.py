"""`GPUWorkerPoolClient.get_detailed_metrics`: the predecessor's keys, computed from what a pool tells of itself.

Pure functions of a `Status` and of `GPUPool.stats`.  `docs/statistics.md` has the keys, and what differs.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from gpupool_sync.status import CardStatus, EndpointStatus, Status

#: What the predecessor says of a distribution, by the least `effectiveness` that deserves the word.
QUALITIES = ((0.9, "excellent"), (0.75, "good"), (0.5, "fair"), (0.0, "poor"))


def gpu(each: CardStatus, gpu_id: str | int, workers: Sequence[str]) -> dict[str, Any]:
    """One GPU, as an entry of ``gpu_metrics``."""
    readings = (each.memory_usage_percent, each.utilization_percent)
    known = [reading for reading in readings if reading is not None]
    return {
        "gpu_id": gpu_id,
        "name": each.name,
        "memory_usage_percent": each.memory_usage_percent,
        "utilization_percent": each.utilization_percent,
        "assigned_workers": len(workers),
        "worker_ids": workers,
        "is_available": each.is_available,
        # The less the better. What is unknown counts nothing, and nothing known is no score.
        "resource_score": sum(known) if known else None,
    }


def several_endpoints(status: Status, stats: Mapping[str, Any], now: datetime.datetime, poll_interval: float) -> Any:
    """What `get_detailed_metrics` has besides in multi-endpoint mode."""
    endpoints = cast("Sequence[EndpointStatus]", status.endpoints)
    entries = {each.endpoint_id: _endpoint(each, now) for each in endpoints}
    healthy = [each for each in endpoints if each.is_healthy]
    seen = [each.last_seen for each in endpoints if each.last_seen is not None]
    total, available = status.total_gpus, status.available_gpus
    summary = {
        "total_endpoints": status.total_endpoints,
        "healthy_endpoints": status.healthy_endpoints,
        "unhealthy_endpoints": status.total_endpoints - status.healthy_endpoints,
    }
    return {
        "aggregated_stats": {
            "total_gpus": total,
            "available_gpus": available,
            "utilized_gpus": total - available,
            "average_utilization_rate": _percent(total - available, total),
            "average_response_time_ms": _mean_response(healthy),
            "endpoints_contributing": len(healthy),
        },
        "endpoints": {
            "summary": {
                **summary,
                "total_gpus_all_endpoints": sum(each.total_gpus for each in endpoints),
                "total_gpus_healthy_endpoints": total,
                "available_gpus_healthy_endpoints": available,
                "overall_availability_rate": _percent(available, total),
            },
            "healthy_endpoints": [entries[each.endpoint_id] for each in endpoints if each.is_healthy],
            "unhealthy_endpoints": [entries[each.endpoint_id] for each in endpoints if not each.is_healthy],
            "details": entries,
        },
        "endpoint_health_summary": _health(entries.values()),
        "load_balancer": _load_balancer(stats["strategy"]),
        "load_balancing_effectiveness": _distribution(healthy, stats["effectiveness"]),
        "monitor_status": {
            "is_running": True,
            # Of the pool as a whole: as long as one endpoint answers, there are none.
            "consecutive_failures": min((each.consecutive_failures for each in endpoints), default=0),
            "last_success_time": max(seen, default=None),
            "has_current_stats": bool(healthy),
            "total_global_gpus": total,
            "polling_interval": poll_interval,
            "endpoint_summary": summary,
        },
    }


def _endpoint(each: EndpointStatus, now: datetime.datetime) -> dict[str, Any]:
    used = each.total_gpus - each.available_gpus if each.is_healthy else 0
    ago = None if each.last_seen is None else max(0.0, (now - each.last_seen).total_seconds())
    return {
        **each.to_dict(),
        "utilized_gpus": used,
        "utilization_rate": _percent(used, each.total_gpus),
        "avg_response_time_ms": each.response_time_ms,
        "last_seen_seconds_ago": ago,
        "last_successful_communication": each.last_seen,
        "time_since_last_success": "never" if ago is None else str(datetime.timedelta(seconds=int(ago))),
        "connectivity_status": _connectivity(each),
        "health_score": _health_score(each),
    }


def _connectivity(each: EndpointStatus) -> str:
    if each.is_healthy:
        return "healthy"
    if each.last_seen is None:
        return "unreachable"
    return "intermittent" if each.breaker == "closed" else "failing"


def _health_score(each: EndpointStatus) -> float:
    """Percent of its polls that succeeded; half of that while the last one did not."""
    score = 100.0 * (each.success_rate or 0.0)
    return score if each.is_healthy else 0.5 * score


def _health(entries: Any) -> dict[str, Any]:
    told = list(entries)
    words = Counter(each["connectivity_status"] for each in told)
    scores = [each["health_score"] for each in told]
    return {
        "total_endpoints": len(told),
        "status_distribution": dict(words),
        "health_scores": {
            "average": sum(scores) / len(scores) if scores else 0.0,
            "minimum": min(scores, default=0.0),
            "maximum": max(scores, default=0.0),
        },
        "healthy_percentage": _percent(words["healthy"], len(told)),
    }


def _load_balancer(strategy: Mapping[str, Any]) -> dict[str, Any]:
    granted, refused = strategy.get("grants", 0), strategy.get("refusals", 0)
    name = strategy.get("name", "")
    return {
        **strategy,
        "strategy": name,
        "strategy_name": name,
        "total_requests": strategy.get("decisions", 0),
        "success_rate": _percent(granted, granted + refused),
    }


def _distribution(healthy: Sequence[EndpointStatus], effectiveness: float | None) -> dict[str, Any]:
    used = [1.0 - each.available_gpus / each.total_gpus for each in healthy if each.total_gpus]
    mean = sum(used) / len(used) if used else 0.0
    quality = "no_grants"
    if not used:
        quality = "no_gpus" if healthy else "no_endpoints"
    elif effectiveness is not None:
        quality = next(word for least, word in QUALITIES if effectiveness >= least)
    return {
        "effectiveness": effectiveness,
        "distribution_score": 100.0 * (effectiveness or 0.0),
        "balancing_quality": quality,
        "mean_utilization": mean,
        "utilization_variance": sum((each - mean) ** 2 for each in used) / len(used) if used else 0.0,
        "utilization_range": {"min": min(used, default=0.0), "max": max(used, default=0.0)},
    }


def _mean_response(endpoints: Sequence[EndpointStatus]) -> float:
    """By their GPUs, as the predecessor weighs it; milliseconds, 0 if nobody has answered."""
    weighed = [(each.response_time_ms, each.total_gpus) for each in endpoints if each.response_time_ms is not None]
    gpus = sum(number for _, number in weighed)
    return sum(took * number for took, number in weighed) / gpus if gpus else 0.0


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0
