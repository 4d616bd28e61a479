"""Negatives: items that were on sale when a user came, drawn by popularity, and that the user did not take."""

import numpy as np

from pipelines.tasks import Sampled

__all__ = ["draw_negatives"]

REJECTION_ROUNDS = 16


def draw_negatives(
    visit: np.ndarray,
    day: np.ndarray,
    item: np.ndarray,
    *,
    sales: tuple[np.ndarray, np.ndarray, np.ndarray],
    task: Sampled,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `task.negatives` items per positive, without an item of the visit and without repetition within it.

    An item is on sale on a day if it sold on that day or in the `task.on_sale_days` days before; the day itself counts,
    so that an item is not known to be a positive by having no history. It is drawn with probability proportional to
    (number of those sales) ** `task.popularity_power`, one after another without replacement. A visit gets fewer
    negatives only if fewer items were on sale.

    Args:
        visit: int64 (P,), number of the visit that each positive belongs to; a visit lies within one day.
        day: int64 (P,), its day, counted from 1970.
        item: int64 (P,), the positive's id; distinct within a visit.
        sales: days, items and numbers of sales, each int64 (S,), one entry per day and item, in any order.
        seed: of the drawing. A day's draws depend on the seed and on what happened until that day, not on the order of
            rows.

    Returns:
        visits and items of the negatives, each int64 (N,), sorted by visit.
    """
    order = np.lexsort((item, visit, day))
    visit, day, item = visit[order], day[order], item[order]
    sale_order = np.lexsort((sales[1], sales[0]))
    sale_day, sale_item, sale_count = (column[sale_order] for column in sales)
    drawn_visits, drawn_items = [], []
    for today, start, end in _runs(day):
        low = np.searchsorted(sale_day, today - task.on_sale_days)
        high = np.searchsorted(sale_day, today, side="right")
        on_sale, index = np.unique(sale_item[low:high], return_inverse=True)
        popularity = np.bincount(index, weights=sale_count[low:high], minlength=len(on_sale))
        visits, owner = np.unique(visit[start:end], return_inverse=True)
        taken = owner * len(on_sale) + np.searchsorted(on_sale, item[start:end])
        slots = _draw_day(
            taken,
            visits=len(visits),
            weight=popularity**task.popularity_power,
            per_positive=task.negatives,
            random=np.random.default_rng([seed, today]),
        )
        drawn_visits.append(visits[slots // len(on_sale)])
        drawn_items.append(on_sale[slots % len(on_sale)])
    if not drawn_visits:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    visits, items = np.concatenate(drawn_visits), np.concatenate(drawn_items)
    order = np.lexsort((items, visits))
    return visits[order], items[order]


def _draw_day(
    taken: np.ndarray, *, visits: int, weight: np.ndarray, per_positive: int, random: np.random.Generator
) -> np.ndarray:
    """Draw for all visits of one day at once.

    A slot is `visit * C + candidate` for C candidates.

    Args:
        taken: slots of the positives, (P,), distinct.
        weight: of each candidate, float64 (C,), positive.

    Returns:
        Slots of the negatives, (N,), distinct, none of them in `taken`.
    """
    candidates = len(weight)
    positives = np.bincount(taken // candidates, minlength=visits)
    wanted = np.minimum(positives * per_positive, candidates - positives)  # (V,)
    cumulative = np.cumsum(weight)
    drawn = np.empty(0, np.int64)
    missing = wanted.copy()
    for _round in range(REJECTION_ROUNDS):
        owner = np.repeat(np.arange(visits), missing)
        if not len(owner):
            return drawn
        choice = np.searchsorted(cumulative, random.random(len(owner)) * cumulative[-1], side="right")
        slots = owner * candidates + np.minimum(choice, candidates - 1)
        fresh = np.setdiff1d(slots, np.concatenate([taken, drawn]))
        drawn = np.concatenate([drawn, fresh])
        missing = wanted - np.bincount(drawn // candidates, minlength=visits)
    # For the few visits that want nearly all there is: the same distribution by exponential races (Efraimidis and
    # Spirakis, 2006), without rejection.
    rest = [drawn]
    for owner in np.flatnonzero(missing):
        race = random.exponential(size=candidates) / weight
        used = np.concatenate([taken, drawn])
        race[used[used // candidates == owner] % candidates] = np.inf
        rest.append(owner * candidates + np.argsort(race, kind="stable")[: missing[owner]])
    return np.concatenate(rest)


def _runs(sorted_values: np.ndarray) -> list[tuple[int, int, int]]:
    """(value, start, end) of each run of equal values."""
    values, starts, lengths = np.unique(sorted_values, return_index=True, return_counts=True)
    return list(zip(values.tolist(), starts.tolist(), (starts + lengths).tolist(), strict=True))
