import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import sampling
from training.sampling import KnownPairs, epoch_order, generator


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_shows_every_example_and_fills_only_the_last_step(examples: int, per_step: int, seed: int) -> None:
    order = epoch_order(examples, per_step=per_step, random=generator(seed))
    assert order.shape == (-(-examples // per_step), per_step)
    flat = order.ravel()
    assert sorted(flat[:examples]) == list(range(examples))
    assert set(flat[examples:]) <= set(range(examples))


@given(st.data())
def test_hidden_is_membership(data: st.DataObject) -> None:
    keys, values = 6, 9
    pairs = data.draw(st.sets(st.tuples(st.integers(0, keys - 1), st.integers(0, values - 1))))
    key, value = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    asked = np.array(data.draw(st.lists(st.integers(0, keys - 1), min_size=1, max_size=5)))
    candidates = np.array(data.draw(st.lists(st.integers(0, values - 1), min_size=1, max_size=8)))
    known = KnownPairs(key, value, keys=keys)
    expected = [[(int(k), int(c)) in pairs for c in candidates] for k in asked]
    with pytest.MonkeyPatch.context() as patch:
        for listed_per_search in (0, 10**9):  # by searching, by listing
            patch.setattr(sampling, "LISTED_PER_SEARCH", listed_per_search)
            assert known.hidden(asked, candidates).tolist() == expected
    assert all(set(known.of(k)) == {v for own, v in pairs if own == k} for k in range(keys))


def test_random_numbers_depend_on_every_part() -> None:
    drawn = {generator(*parts).integers(2**62) for parts in ((0, 1), (1, 0), (0, 1, 0), (0, 2), (0,))}
    assert len(drawn) == 5
    assert generator(0, 1).integers(2**62) == generator(0, 1).integers(2**62)
