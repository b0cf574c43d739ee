"""Where heads look: shares of attention on kinds of places."""

import pytest
import torch

from bertnb import attention_shares


def example():
    """Two rows [CLS] a b [SEP] c [SEP]; the second is padded after [SEP] c."""
    torch.manual_seed(0)
    attention = torch.rand(2, 3, 7, 7, dtype=torch.float64).softmax(-1)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]])
    cls = torch.zeros(2, 7, dtype=torch.bool)
    cls[:, 0] = True
    sep = torch.zeros(2, 7, dtype=torch.bool)
    sep[0, [3, 6]] = sep[1, [2, 4]] = True
    queries = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0, 0]])
    return attention, queries.bool(), segments, cls, sep


@pytest.mark.equation("12.15")
def test_the_shares_are_the_equation_one_place_after_the_other(measured):
    attention, queries, segments, cls, sep = example()
    found = attention_shares(attention, queries, segments, cls, sep)
    rules = {
        "previous": lambda b, i, j: j == i - 1,
        "next": lambda b, i, j: j == i + 1,
        "same": lambda b, i, j: j == i,
        "cls": lambda b, i, j: cls[b, j],
        "sep": lambda b, i, j: sep[b, j],
        "other": lambda b, i, j: (
            segments[b, i] != segments[b, j] and not cls[b, j] and not sep[b, j]
        ),
    }
    assert found.keys() == rules.keys()
    for name, rule in rules.items():
        for head in range(3):
            total = sum(
                attention[b, head, i, j].item()
                for b, i in queries.nonzero().tolist()
                for j in range(7)
                if rule(b, i, j)
            )
            measured(found[name][head].item() - total / 5, 1e-12)


def test_without_anybody_who_looks_there_is_no_share():
    attention, queries, *others = example()
    with pytest.raises(ValueError, match="queries has no True"):
        attention_shares(attention, queries & False, *others)
