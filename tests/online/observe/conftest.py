from collections.abc import Iterator
from typing import Any

import pytest

from online.observe import metrics
from online.observe.collectors import sources
from online.observe.exporter import MetricsEndpoint


@pytest.fixture
def endpoint() -> Iterator[Any]:
    """Call with what `MetricsEndpoint` takes after the port: one that answers, as its port."""
    started = []

    def start(registry=None, security=None, **limits) -> int:
        registry = registry or sources(metrics.registry, None)
        started.append(MetricsEndpoint("127.0.0.1", 0, registry, security, **limits))
        started[-1].start()
        return started[-1].port

    yield start
    for each in started:
        each.stop()
