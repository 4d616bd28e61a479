"""Never more inside than slots, the others in their order or refused by their deadline, no slot lost."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.rpc.admission import Admission
from online.rpc_error import Code, RpcError
from tests.waiting import until


def refused(admission: Admission, remaining_s: float | None = None) -> Code:
    with pytest.raises(RpcError) as caught, admission.admit(lambda: remaining_s):
        pass
    return caught.value.code


class Holder:
    """Requests in threads of their own, that stay inside until they are let go."""

    def __init__(self, admission: Admission) -> None:
        self.admission, self.inside, self._go = admission, [], threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    def send(self, name: int, remaining_s: float | None = None) -> None:
        """Returns when the request is inside or waits."""
        before = self.admission.in_flight + self.admission.waiting

        def hold() -> None:
            with self.admission.admit(lambda: remaining_s):
                self.inside.append(name)
                assert self._go.acquire(timeout=10)

        self._threads.append(threading.Thread(target=hold))
        self._threads[-1].start()
        until(lambda: self.admission.in_flight + self.admission.waiting == before + 1)

    def let_go(self, count: int = 1) -> None:
        self._go.release(count)

    def finish(self) -> None:
        self._go.release(len(self._threads))
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def full() -> Holder:
    """One inside, two waiting."""
    holder = Holder(Admission(slots=1))
    for name in range(3):
        holder.send(name)
    assert (holder.admission.in_flight, holder.admission.waiting) == (1, 2)
    yield holder
    holder.finish()
    assert (holder.admission.in_flight, holder.admission.waiting) == (0, 0)


def test_in_the_order_in_which_they_came(full) -> None:
    for count in (1, 2, 3):
        until(lambda count=count: full.inside == list(range(count)))
        full.let_go()


def test_a_deadline_that_is_over_or_passes_in_the_queue() -> None:
    admission = Admission(slots=1)
    with admission.admit():
        assert refused(admission, 0.0) is Code.DEADLINE
        assert refused(admission, -1.0) is Code.DEADLINE
        assert refused(admission, 0.01) is Code.DEADLINE
        assert (admission.in_flight, admission.waiting) == (1, 0)  # it does not keep its place
    with admission.admit(lambda: 1e300) as waited_s:
        assert waited_s == 0


def test_who_finds_a_free_slot_is_not_asked_for_a_deadline() -> None:
    admission = Admission(slots=1)
    with admission.admit(lambda: pytest.fail("asked")):
        assert admission.in_flight == 1
    assert admission.in_flight == 0


def test_who_could_not_be_answered_in_time_does_not_even_wait() -> None:
    admission = Admission(slots=1)
    for _ in range(4):
        with admission.admit():
            time.sleep(0.05)
    with admission.admit():
        began = time.perf_counter()
        assert refused(admission, 0.01) is Code.OVERLOADED
        assert admission.waiting == 0
        assert time.perf_counter() - began < 5  # it is bounded by the deadline in any case
    with admission.admit(lambda: 0.001):  # a free slot is worth trying
        pass


def test_who_is_late_is_known_before_it_enters() -> None:
    admission = Admission(slots=2)
    admission.enter(lambda: None)
    assert admission.late(lambda: pytest.fail("asked, and there is a free slot")) is None
    admission.enter(lambda: None)
    assert admission.late(lambda: None) is None and admission.late(lambda: 0.001) is None
    assert admission.late(lambda: 0.0).code is Code.DEADLINE
    for _ in range(100):
        admission.leave(1.0)  # what a request takes in the mean
        admission.enter(lambda: None)
    # 1.5 times the mean for itself, and half of that until one of the two slots is free
    assert admission.late(lambda: 2.3) is None
    late = admission.late(lambda: 2.2)
    assert late.code is Code.OVERLOADED and "2200 ms are left, and 0 requests wait" in str(late)
    assert admission.waiting == 0 and admission.in_flight == 2


def test_an_error_inside_frees_the_slot() -> None:
    admission = Admission(slots=1)
    for _ in range(3):
        with pytest.raises(KeyError), admission.admit():
            raise KeyError
    assert admission.in_flight == 0


@pytest.mark.parametrize("slots", [0, -1])
def test_sizes(slots) -> None:
    with pytest.raises(ValueError, match="slots"):
        Admission(slots)


@settings(max_examples=8, deadline=None)
@given(slots=st.integers(1, 4), deadlines=st.lists(
    st.sampled_from([None, 0.0, 0.0005, 0.002, 10.0]), min_size=8, max_size=8,
))  # fmt: skip
def test_under_stress_the_bounds_hold_and_every_request_is_answered_or_refused(slots, deadlines) -> None:
    admission, counting = Admission(slots), threading.Lock()
    inside, most_inside = 0, 0

    def send(remaining_s: float | None) -> list[str]:
        nonlocal inside, most_inside
        outcomes = []
        for number in range(20):
            try:
                with admission.admit(lambda: remaining_s):
                    with counting:
                        inside += 1
                        most_inside = max(most_inside, inside)
                    time.sleep(0.0005 * (number % 3))
                    with counting:
                        inside -= 1
                outcomes.append("OK")
            except RpcError as refusal:
                outcomes.append(refusal.code.name)
        return outcomes

    with ThreadPoolExecutor(len(deadlines)) as pool:
        outcomes = list(pool.map(send, deadlines))
    assert all(set(ended) <= {"OK", "DEADLINE", "OVERLOADED"} and len(ended) == 20 for ended in outcomes)
    assert most_inside <= slots
    assert (inside, admission.in_flight, admission.waiting) == (0, 0, 0)
    for _ in range(slots):  # none was lost
        admission.enter(lambda: None)
    assert admission.in_flight == slots
