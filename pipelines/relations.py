"""How events become typed edges: one class per type of relation, joined to the YAML by a one-line decorator.

Each is one Ibis expression from the events of the pretraining window to the columns

    head             int64: a user's or an item's id
    tail             int64 id, or the text of a word, a band or a value
    event_timestamp  when the edge was first seen; null for what has no time
    weight           float64: how often
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import ibis
from ibis import _

from pipelines.contracts.errors import InvalidConfig
from pipelines.events import TIMESTAMP

__all__ = ["RELATION_TYPES", "Bands", "CoOccurrence", "Events", "Relation", "Value", "Words"]


class Relation(Protocol):
    """A declared relation: the node types at its ends and its edges."""

    @property
    def head(self) -> str:
        """Node type of the heads: `user` or `item`."""

    @property
    def tail(self) -> str:
        """Node type of the tails."""

    def edges(self, events: ibis.Table) -> ibis.Table:
        """Canonical events to (head, tail, event_timestamp, weight), each (head, tail) once."""


RELATION_TYPES: dict[str, type] = {}


def _relation(name: str) -> Callable[[type], type]:
    def register(kind: type) -> type:
        RELATION_TYPES[name] = kind
        return kind

    return register


@_relation("events")
@dataclass(frozen=True)
class Events:
    """user -> item, for events of some kinds; weight is the number of days on which they happened.

    The time is that of the first one: an edge held out because it is late is then one that was never seen before.
    """

    kinds: tuple[str, ...]
    anchor: bool = False

    head: ClassVar[str] = "user"
    tail: ClassVar[str] = "item"

    def edges(self, events: ibis.Table) -> ibis.Table:
        return (
            events.filter(_.kind.isin(self.kinds))
            .group_by(head=_.user, tail=_.item)
            .agg(event_timestamp=_.event_timestamp.min(), weight=_.event_timestamp.truncate("D").nunique())
            .mutate(weight=_.weight.cast("float64"))
        )


@_relation("co_occurrence")
@dataclass(frozen=True)
class CoOccurrence:
    """item -> item of one visit (user and day) or one session; to each item's `top_k` most frequent companions.

    Weight is the number of visits; ties go to the smaller id. Visits of more than `max_size` distinct items are left
    out: they have max_size^2 pairs and say little about any.
    """

    kinds: tuple[str, ...]
    within: str = "visit"
    min_count: int = 2
    top_k: int = 20
    max_size: int = 100

    head: ClassVar[str] = "item"
    tail: ClassVar[str] = "item"

    def __post_init__(self) -> None:
        if self.within not in ("visit", "session"):
            raise InvalidConfig(
                "relation key 'within'", expected="visit or session", got=self.within, remedy=_REMEDY
            )
        _require_positive(min_count=self.min_count, top_k=self.top_k, max_size=self.max_size)

    def edges(self, events: ibis.Table) -> ibis.Table:
        key = ("user", "day") if self.within == "visit" else ("session",)
        chosen = events.filter(_.kind.isin(self.kinds)).mutate(day=_.event_timestamp.truncate("D"))
        if self.within == "session":
            chosen = chosen.filter(_.session.notnull())
        contents = chosen.group_by(*key, "item").agg(seen=_.event_timestamp.min())
        contents = contents.mutate(size=_.item.count().over(ibis.window(group_by=key))).filter(_.size <= self.max_size)
        left = contents.select(*key, "seen", head="item")
        right = contents.select(*key, tail="item")
        counts = (
            left.join(right, list(key))
            .filter(_["head"] != _["tail"])
            .group_by("head", "tail")
            .agg(event_timestamp=_.seen.min(), weight=_.count())
            .filter(_.weight >= self.min_count)
        )
        by_count = ibis.window(group_by="head", order_by=[ibis.desc("weight"), ibis.asc("tail")])
        ranked = counts.mutate(position=ibis.row_number().over(by_count)).filter(_.position < self.top_k)
        return ranked.select("head", "tail", "event_timestamp", weight=_.weight.cast("float64"))


@_relation("words")
@dataclass(frozen=True)
class Words:
    """user or item -> each word of a text attribute: lower case, letters only, long and frequent enough."""

    attribute: str
    tail: str = "word"
    min_count: int = 2
    min_length: int = 3

    ATTRIBUTE: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        _require_positive(min_count=self.min_count, min_length=self.min_length)

    @property
    def head(self) -> str:
        return self.attribute.partition("_")[0]

    def edges(self, events: ibis.Table) -> ibis.Table:
        texts = events.select(head=events[self.head], text=events[self.attribute]).filter(_.text.notnull()).distinct()
        words = texts.select("head", tail=_.text.lower().re_replace(r"[^\p{L}]+", " ").split(" ").unnest())
        words = words.filter(_["tail"].length() >= self.min_length).distinct()
        frequent = words.group_by("tail").agg(weight=_.count()).filter(_.weight >= self.min_count).select("tail")
        return _structural(words.semi_join(frequent, "tail"))


@_relation("bands")
@dataclass(frozen=True)
class Bands:
    """user or item -> the quantile band of its median of a number attribute; equal numbers share a band."""

    attribute: str
    tail: str = "band"
    bands: int = 10

    ATTRIBUTE: ClassVar[str] = "number"

    def __post_init__(self) -> None:
        _require_positive(bands=self.bands)

    @property
    def head(self) -> str:
        return self.attribute.partition("_")[0]

    def edges(self, events: ibis.Table) -> ibis.Table:
        numbers = events.select(head=events[self.head], number=events[self.attribute]).filter(_.number.notnull())
        medians = numbers.group_by("head").agg(median=_.number.median())
        ranked = medians.mutate(rank=ibis.percent_rank().over(ibis.window(order_by="median")))
        band = (_.rank * self.bands).floor().cast("int64").clip(upper=self.bands - 1)
        return _structural(ranked.select("head", tail=band.cast("string")))


@_relation("value")
@dataclass(frozen=True)
class Value:
    """user or item -> each value of a text attribute that its events carry."""

    attribute: str
    tail: str

    ATTRIBUTE: ClassVar[str] = "text"

    @property
    def head(self) -> str:
        return self.attribute.partition("_")[0]

    def edges(self, events: ibis.Table) -> ibis.Table:
        values = events.select(head=events[self.head], tail=events[self.attribute])
        return _structural(values.filter(_["tail"].notnull()).distinct())


_REMEDY = "Correct the data set's YAML."


def _structural(ends: ibis.Table) -> ibis.Table:
    """Edges that describe entities: they have no time and weigh alike."""
    return ends.select("head", "tail", event_timestamp=ibis.null(TIMESTAMP), weight=ibis.literal(1.0))


def _require_positive(**values: int) -> None:
    for key, value in values.items():
        if value < 1:
            raise InvalidConfig(
                f"relation key '{key}'", expected="at least 1", got=str(value), remedy=_REMEDY
            )
