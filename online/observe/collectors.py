"""What a scrape has: this process's metrics, or the sum of all workers where a host has several, and of the build."""

import os
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import InfoMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from pipelines.contracts.errors import InvalidConfig

__all__ = ["sources"]


def sources(own: CollectorRegistry, workers: str | Path | None) -> CollectorRegistry:
    """This process's metrics, or those that workers count in a directory; and of processes and build."""
    if workers is None:
        return _Sources([own, ProcessCollector(registry=None), Build()])
    shared = Workers(Path(workers))
    return _Sources([shared, Processes(shared), Build()])


class _Sources(CollectorRegistry):
    """Collectors and registries as one registry, without asking each of them first for the names it has."""

    def __init__(self, collectors: list[Collector]) -> None:
        super().__init__(auto_describe=False)
        self._sources = collectors

    def collect(self) -> Iterable[Metric]:
        for source in self._sources:
            for metric in source.collect():
                if metric.name == "facet_version_state":  # zero: held no longer
                    metric.samples = [sample for sample in metric.samples if sample.value]
                yield metric


class Build(Collector):
    """`facet_build_info`."""

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily(
            "facet_build", "What runs.", value={"version": version("facet"), "python": python_version()}
        )


class Workers(Collector):
    """Sum of what worker processes count in files of one directory.

    The counts of a worker that ended are kept, since counters may never fall: they move into one file for all dead
    workers, so that a thousand restarts leave no thousand files. Its gauges go.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise InvalidConfig(
                "directory of the workers' metrics", expected="a directory", got=repr(str(directory)),
                remedy="Create it, empty, before the workers start.",
            )
        self._directory = directory

    def pids(self) -> list[int]:
        """Workers that have counted something and run."""
        found = {int(match[1]) for path in self._directory.glob("*.db") if (match := _WORKER_FILE.search(path.name))}
        return sorted(pid for pid in found if _runs(pid))

    def collect(self) -> Iterable[Metric]:
        self._bury()
        return MultiProcessCollector(None, self._directory).collect()

    def _bury(self) -> None:
        for path in sorted(self._directory.glob("*.db")):
            match = _WORKER_FILE.search(path.name)
            if match is None or _runs(int(match[1])):
                continue
            if not path.name.startswith("gauge"):
                self._add_to_dead(path)
            path.unlink(missing_ok=True)

    def _add_to_dead(self, path: Path) -> None:
        """Written beside and renamed, but a crash before the worker's file is gone counts it twice: then the host, too,
        starts anew and with it all counters."""
        dead = path.with_name(path.name.split("_")[0] + "_dead.db")
        staging = dead.with_suffix(".new")
        staging.unlink(missing_ok=True)
        total = MmapedDict(str(staging))
        for metric in MultiProcessCollector.merge([str(p) for p in (dead, path) if p.exists()], accumulate=False):
            for sample in metric.samples:
                key = mmap_key(
                    metric.name, sample.name, tuple(sample.labels), tuple(sample.labels.values()), metric.documentation
                )
                total.write_value(key, sample.value, 0.0)
        total.close()
        os.replace(staging, dead)


_WORKER_FILE = re.compile(r"_(\d+)\.db$")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # ended before, or while it was read
        return False
    return state not in "ZX"


class Processes(Collector):
    """Memory, descriptors and processor time of this process and of its workers, by `pid`."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for pid in sorted({os.getpid(), *self._workers.pids()}):
            for family in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():
                into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    into.add_sample(sample.name, {**sample.labels, "pid": str(pid)}, sample.value)
        yield from families.values()
