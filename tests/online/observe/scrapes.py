"""Reading /metrics as a Prometheus server does."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["read", "samples"]


def read(port: int, path: str = "/metrics", **headers: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def samples(text: str) -> dict[tuple, float]:
    """(name, labels as sorted pairs) -> value."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    by_key = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in found}
    assert len(by_key) == len(found), "a series stands there twice"
    return by_key
