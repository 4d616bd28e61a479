"""Reading /metrics as a Prometheus server does."""

import urllib.request
from collections import Counter

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from online.observe import metrics
from tests.waiting import PATIENCE_S

__all__ = ["read", "rows_counted", "samples"]


def read(port: int, path: str = "/metrics", **headers: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return answer.read().decode()


def samples(text: str) -> dict[tuple, float]:
    """(name, labels as sorted pairs) -> value."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    by_key = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in found}
    assert len(by_key) == len(found), "a series stands there twice"
    return by_key


def rows_counted() -> Counter[tuple[str, str]]:
    """("asked" or "found", table) -> how many rows this process has counted so far."""
    names = {f"facet_rows_{what}_total": what for what in ("asked", "found")}
    counted = samples(generate_latest(metrics.registry).decode())
    return Counter({(names[key[0]], key[1][1]): int(value) for key, value in counted.items() if key[0] in names})
