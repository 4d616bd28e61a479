"""What the hosts of a fleet hold, as data, and whether the rows and the models fit together.

```
CPU hosts    version -> answering | draining, which is preferred, which is tried as a canary; the shard
rankers      version -> upper model
invariant    every version that a CPU host can answer is loaded on every ranker, under the same manifest
```
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from online.proto import admin_pb2
from pipelines.contracts.errors import FacetError, InvalidConfig

__all__ = ["CpuHost", "FleetStatus", "InvariantViolated", "Violation"]


class InvariantViolated(FacetError):
    """A CPU host can answer a version that some ranker cannot run; no further step is taken."""


class Violation(NamedTuple):
    """`ranker` cannot run what `cpu_tier` can answer: no such model there, or one of another manifest."""

    cpu_tier: str
    version: int
    ranker: str

    def __str__(self) -> str:
        return f"CPU host {self.cpu_tier} can answer version {self.version}, which ranker {self.ranker} cannot run"


@dataclass(frozen=True)
class CpuHost:
    """What a CPU host said it holds.

    Attributes:
        loaded: version -> SHA-256 of its manifest.
        answering: those of them that are not draining.
        preferred: answered first where accepted; 0 when nothing answers.
        canary, canary_share: tried on this share of the requests; 0: none.
        shard, shards: the part of the ids it answers.
    """

    loaded: Mapping[int, str]
    answering: frozenset[int]
    preferred: int
    canary: int = 0
    canary_share: float = 0.0
    shard: int = 0
    shards: int = 1

    @classmethod
    def of(cls, answer: admin_pb2.CpuTierStatus) -> "CpuHost":
        return cls(
            loaded={v.version: v.manifest_sha256 for v in answer.versions},
            answering=frozenset(v.version for v in answer.versions if not v.draining),
            preferred=answer.preferred, canary=answer.canary, canary_share=answer.canary_share,
            shard=answer.shard, shards=answer.shards or 1,
        )


@dataclass(frozen=True)
class FleetStatus:
    """What all hosts hold, by address.

    >>> cpu = CpuHost(loaded={1: "a", 2: "b"}, answering=frozenset({1, 2}), preferred=1)
    >>> print(*FleetStatus({"cpu": cpu}, {"gpu": {1: "a"}}).violations())
    CPU host cpu can answer version 2, which ranker gpu cannot run
    """

    cpu_tiers: Mapping[str, CpuHost]
    rankers: Mapping[str, Mapping[int, str]]  # address -> version -> manifest sha256

    def violations(self) -> list[Violation]:
        """Where the invariant does not hold; manifests are compared, not only numbers."""
        return [
            Violation(host, version, ranker)
            for host, cpu in self.cpu_tiers.items()
            for ranker, models in self.rankers.items()
            for version in sorted(cpu.answering)
            if models.get(version) != cpu.loaded[version]
        ]

    def check(self) -> None:
        """Raise `InvariantViolated` unless every version a CPU host can answer is loaded on every ranker."""
        for host, version, ranker in self.violations():
            raise InvariantViolated(
                f"CPU host {host} can answer version {version}", expected=f"it loaded on ranker {ranker}",
                got=f"upper models of {sorted(self.rankers[ranker])} there, or another manifest of the same number",
                remedy="Load it on the ranker, or drain it on the CPU host, then run the rollout again.",
            )

    def check_shards(self) -> None:
        """Raise `InvalidConfig` unless the CPU hosts are cut into the same number of shards and none is left out."""
        cut = {host: (cpu.shard, cpu.shards) for host, cpu in self.cpu_tiers.items()}
        counts = {count for _, count in cut.values()}
        if len(counts) != 1 or {index for index, _ in cut.values()} != set(range(*counts)):
            raise InvalidConfig(
                "CPU hosts", expected="at least one host of every shard, all of one number of shards",
                got=", ".join(f"{host} shard {index}/{count}" for host, (index, count) in cut.items()),
                remedy="Name every CPU host that serves.",
            )

    @property
    def common(self) -> frozenset[int]:
        """Versions that every CPU host can answer: only these can answer a request that is cut over shards."""
        return frozenset.intersection(*(cpu.answering for cpu in self.cpu_tiers.values()))

    @property
    def versions(self) -> list[int]:
        """All versions that are loaded anywhere, ascending."""
        held = [*(cpu.loaded for cpu in self.cpu_tiers.values()), *self.rankers.values()]
        return sorted({version for versions in held for version in versions})

    def manifests(self, version: int) -> set[str]:
        """The manifests under which a version is loaded; more than one means that hosts read different files."""
        held = [*(cpu.loaded for cpu in self.cpu_tiers.values()), *self.rankers.values()]
        return {versions[version] for versions in held if version in versions}
