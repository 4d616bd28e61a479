"""The two types of task a ranker's head can have, as a data set's YAML declares them."""

from dataclasses import dataclass

from pipelines.contracts.errors import InvalidConfig

__all__ = ["Followed", "Sampled"]


@dataclass(frozen=True)
class Sampled:
    """Was the item among those of the user's visit (1), or drawn from what was on sale then (0)?

    Attributes:
        kinds: kinds of event that make a visit's items.
        negatives: items drawn per positive.
        popularity_power: exponent of popularity in the drawing; 0 is uniform.
        on_sale_days: an item is on sale on a day if it had an event of `kinds` on it or in so many days before.
        visits: share of the users whose visits become examples, chosen by a hash of their ids.
    """

    kinds: tuple[str, ...]
    negatives: int = 4
    popularity_power: float = 1.0
    on_sale_days: int = 30
    visits: float = 1.0

    def __post_init__(self) -> None:
        _require(self.negatives >= 1, "negatives", "at least 1", self.negatives)
        _require(self.popularity_power >= 0, "popularity_power", "0 or more", self.popularity_power)
        _require(self.on_sale_days >= 0, "on_sale_days", "0 or more", self.on_sale_days)
        _require(0 < self.visits <= 1, "visits", "a share in (0, 1]", self.visits)


@dataclass(frozen=True)
class Followed:
    """Given an event of kind `trigger`, does one of kind `outcome` follow on the same pair within `days` days?"""

    trigger: tuple[str, ...]
    outcome: tuple[str, ...]
    days: int

    def __post_init__(self) -> None:
        _require(self.days >= 1, "days", "at least 1", self.days)


def _require(condition: bool, key: str, expected: str, got: object) -> None:
    if not condition:
        raise InvalidConfig(
            f"task key '{key}'", expected=expected, got=repr(got), remedy="Correct the data set's YAML."
        )
