from __future__ import annotations

import errno
import os

import pytest
import torch

from focal_d2.errors import UserError, describe_error, first_few, one_line, reason, user_message


@pytest.mark.parametrize(
    ("texts", "arguments", "expected"),
    [
        ([], (), ""),
        ("abcde", (), "a, b, c, d, e"),
        ("abcdef", (), "a, b, c, d, e, and 1 more"),
        ([1, 2, 3], (1, "; "), "1; and 2 more"),
        ({"x": 0, "y": 1}, (1,), "x, and 1 more"),
        ((x for x in "abc"), (2,), "a, b, and 1 more"),
    ],
)
def test_first_few_counts_the_others(texts, arguments, expected):
    assert first_few(texts, *arguments) == expected


def test_one_line_keeps_both_ends_of_a_long_text():
    assert one_line(" two\n\tlines ") == "two lines"
    assert one_line("x" * 300) == "x" * 300
    assert one_line("a" * 500 + "b" * 500, 9) == "aaaaaa … bbb"


def test_reason_is_without_the_file_name():
    error = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "a.json")
    assert reason(error) == "No such file or directory"
    assert reason(ValueError("two\nlines")) == "two lines"
    assert reason(MemoryError()) == "MemoryError"


def test_describe_error_has_the_type_and_as_many_lines_as_asked_for():
    error = RuntimeError("\nthe cause\nadvice")
    assert describe_error(error) == "RuntimeError: the cause advice"
    assert describe_error(error, lines=1) == "RuntimeError: the cause"
    assert describe_error(AssertionError()) == "AssertionError"


def test_user_message_is_cut_where_a_file_made_it_long():
    message = user_message(UserError(f"a.yaml: the key {'k' * 10**6} is unknown; did you mean SEED?"))
    assert message is not None
    assert len(message) < 2010
    assert message.startswith("a.yaml: the key kkk")
    assert message.endswith("k is unknown; did you mean SEED?")


def test_user_message_tells_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**61, dtype=torch.uint8)
    message = user_message(error.value)
    assert message is not None
    assert message.startswith("out of memory: you tried to allocate 2305843009213693952 bytes")
