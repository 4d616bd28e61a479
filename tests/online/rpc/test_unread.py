"""How many bytes of answers may wait for their clients."""

import pytest

from online.rpc.unread import UnreadAnswers
from online.rpc_error import Code, RpcError


def refused(answers: UnreadAnswers, connection: str, size: int) -> bool:
    try:
        answers.check(connection, size)
    except RpcError as error:
        assert error.code is Code.OVERLOADED
        return True
    return False


def test_a_connection_has_its_share_and_one_answer_in_any_case() -> None:
    answers = UnreadAnswers(of_connection=100, of_all=1000)
    assert not refused(answers, "a", 5000)  # it has read everything
    answers.add("a", 60)
    assert [refused(answers, "a", size) for size in (40, 41)] == [False, True]
    assert not refused(answers, "b", 41)
    answers.remove("a", 60)
    assert not refused(answers, "a", 5000) and answers.total == 0


def test_where_all_have_too_much_only_those_that_read_are_answered() -> None:
    answers = UnreadAnswers(of_connection=100, of_all=150)
    answers.add("a", 80)
    answers.add("b", 60)
    assert [refused(answers, "b", size) for size in (10, 11)] == [False, True]
    assert not refused(answers, "c", 100)
    answers.add("c", 100)
    assert refused(answers, "c", 0) and answers.total == 240
    answers.remove("a", 80)
    answers.remove("c", 100)
    assert not refused(answers, "b", 40) and answers.total == 60


def test_connections_that_have_read_everything_are_forgotten() -> None:
    answers = UnreadAnswers(of_connection=100, of_all=150)
    for name in map(str, range(10)):
        answers.add(name, 5)
        answers.add(name, 0)
        answers.remove(name, 5)
        answers.remove(name, 0)
        answers.check(name, 1)
    assert not answers._by_connection


@pytest.mark.parametrize("size", [0, 1])
def test_an_error_names_the_numbers(size) -> None:
    answers = UnreadAnswers(of_connection=9, of_all=150)
    answers.add("a", 10)
    with pytest.raises(RpcError, match=f"at most 9 bytes .* 10 bytes of it, 10 of all, and an answer of {size} bytes"):
        answers.check("a", size)
