"""The grader: right answers are right, wrong ones wrong, none is shown."""

import numpy as np
import pytest
import torch

from bertnb import answer_key, check


@pytest.mark.parametrize("right", [3, 3.0, "3", np.float32(3), torch.tensor(3)])
def test_the_same_number_has_the_same_key(right):
    assert answer_key(right) == answer_key(3)
    assert check(right, answer_key(3)) == "right"


def test_numbers_count_to_three_significant_digits():
    key = answer_key(0.12345)
    assert check(0.1234, key) == check(0.12299999, key) == "right"
    assert check(0.122, key) == check(1.23, key) == "not yet: try again"
    assert check(-0.1234, key) == "not yet: try again"


def test_texts_count_without_spaces_around():
    assert check("  [MASK]  token ", answer_key("[MASK] token")) == "right"
    assert check("[mask] token", answer_key("[MASK] token")) != "right"


def test_no_answer_is_not_a_wrong_answer():
    assert "not answered" in check(..., answer_key(1))


def test_a_key_does_not_show_the_answer():
    assert len(answer_key(12345)) == 8
    assert "12345" not in answer_key(12345)
