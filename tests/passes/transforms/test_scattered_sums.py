"""Each term of a sum is put into its table when it comes, where the table is much smaller than the terms."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memo_compile.passes.transforms.scattered_sums import put_each_term

aten = torch.ops.aten
COUNT, HEADS, BUCKETS = 192, 4, 8  # a term is of more than a MiB


def put(values, base=0, buckets=BUCKETS):
    """Into the rows that the distance of two tokens names, one of which is left out."""
    places = torch.arange(COUNT)
    index = (places[None] - places[:, None]).clamp(-4, 3) + 4
    table = aten.full.default([buckets, HEADS], base, dtype=values.dtype)
    return aten._unsafe_masked_index_put_accumulate.default(table, (index != 3)[..., None], [index], values)


def as_rows(scores):
    return scores.squeeze(0).permute(1, 2, 0)


def terms(x):
    return x.sin(), x.cos(), x.exp()


def two(x):
    first, second, _ = terms(x)
    return put(as_rows(first + second))


def three(x):
    first, second, third = terms(x)
    return put(as_rows(first + second + third))


def read_as_well(x):
    first, second, _ = terms(x)
    total = first + second
    return put(as_rows(total)), total


def broadcast(x):
    first, second, _ = terms(x)
    return put(as_rows(first + second[..., :1]))


def scaled(x):
    first, second, _ = terms(x)
    return put(as_rows(aten.add.Tensor(first, second, alpha=2)))


def into_a_large_table(x):
    first, second, _ = terms(x)
    return put(as_rows(first + second), buckets=COUNT * COUNT // 16)


def onto_numbers(x):
    first, second, _ = terms(x)
    return put(as_rows(first + second), base=1)


def one_value_twice(x):
    first, *_ = terms(x)
    return put(as_rows(first + first))


def rewritten(fn, dtype=torch.float64, count=COUNT):
    torch.manual_seed(0)
    x = torch.randn(1, HEADS, count, count, dtype=dtype)
    gm = put_each_term(make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(x))
    torch.testing.assert_close(gm(x), fn(x), rtol=1e-12, atol=1e-12)
    return gm


def puts(gm):
    return [n for n in gm.graph.nodes if "index_put" in str(n.target)]


@pytest.mark.parametrize(("fn", "count"), [(two, 2), (three, 3), (one_value_twice, 2)])
def test_each_term_is_put_into_a_table_of_its_own(fn, count):
    assert len(puts(rewritten(fn))) == count


def test_a_term_is_done_with_before_the_next_is_made():
    """The indices are worked out beside each, so that none waits for them."""
    gm = rewritten(three)
    order = [n.name for n in gm.graph.nodes]
    first, second, _ = sorted(order.index(n.name) for n in puts(gm))
    assert order.index("sin") < first < order.index("exp")
    assert order.index("cos") < second < order.index("exp")


@pytest.mark.parametrize("fn", [read_as_well, broadcast, scaled, into_a_large_table, onto_numbers])
def test_other_sums_stay_as_they_are(fn):
    assert len(puts(rewritten(fn))) == 1
