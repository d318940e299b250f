"""The gradient of looked-up rows is added to the other gradient of a tied table, where that lies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import memo_compile
from memo_compile.passes.transforms.row_gradients import add_rows_in_place
from memo_compile.runtime.ops import register

register()
WORDS, WIDTH, COUNT = 40, 8, 60
aten = torch.ops.aten


def rows_of(mask, index, values):
    return aten._unsafe_masked_index_put_accumulate.default(
        aten.full.default([WORDS, WIDTH], 0, dtype=values.dtype), mask, [index], values
    )


def tied(left, right, mask, index, values):
    """The head's gradient and that of the rows."""
    return left @ right + rows_of(mask, index, values)


def tied_the_other_way(left, right, mask, index, values):
    return rows_of(mask, index, values) + (left @ right).t().contiguous().t()


def looked_up_twice(left, right, mask, index, values):
    return left @ right + rows_of(mask, index, values) + rows_of(mask, index.flip(1), values)


def read_later(left, right, mask, index, values):
    table = left @ right
    return table + rows_of(mask, index, values), table.sin()


def the_callers(left, right, mask, index, values):
    return left + rows_of(mask, index, values)


def a_part(left, right, mask, index, values):
    """The sum would keep all of it."""
    return (torch.cat([left, left], 0) @ right)[:WORDS] + rows_of(mask, index, values)


def a_copy(left, right, mask, index, values):
    """Inductor makes no copy that it can do without."""
    table = left @ right
    return table.clone() + rows_of(mask, index, values), table


def a_row(left, right, mask, index, values):
    return left[:1] @ right + rows_of(mask, index, values)


def rows_read_twice(left, right, mask, index, values):
    rows = rows_of(mask, index, values)
    return left @ right + rows, rows.sin()


def onto_other_numbers(left, right, mask, index, values):
    rows = aten._unsafe_masked_index_put_accumulate.default(
        aten.full.default([WORDS, WIDTH], 1, dtype=values.dtype), mask, [index], values
    )
    return left @ right + rows


def given(fn, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((WORDS, WIDTH), (WIDTH, WIDTH)) if fn is the_callers else ((WORDS, 5), (5, WIDTH))
    left, right = (torch.randn(shape, dtype=dtype) for shape in shapes)
    index = torch.randint(-WORDS, WORDS, (2, COUNT // 2))
    index[0, 0], index[1, 3] = WORDS + 5, -WORDS - 2  # which are masked
    mask = (index < WORDS) & (index >= -WORDS) & (index != 3)
    return left, right, mask[..., None], index, torch.randn(2, COUNT // 2, WIDTH, dtype=dtype)


def rewritten(fn, tensors):
    gm = add_rows_in_place(make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors))
    return gm, len(gm.graph.find_nodes(op="call_function", target=torch.ops.memo.add_rows_.default))


@pytest.mark.parametrize(("fn", "count"), [(tied, 1), (tied_the_other_way, 0), (looked_up_twice, 2)])
def test_rows_are_added_where_the_other_gradient_lies(fn, count):
    tensors = given(fn)
    gm, found = rewritten(fn, tensors)
    assert found == count
    zeros = [n for n in gm.graph.nodes if n.target is aten.full.default and n.args[0] == [WORDS, WIDTH]]
    assert bool(zeros) is (count == 0)
    torch.testing.assert_close(gm(*tensors), fn(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fn", [read_later, the_callers, a_copy, a_part, a_row, rows_read_twice, onto_other_numbers])
def test_what_others_read_is_not_added_to(fn):
    tensors = given(fn)
    gm, found = rewritten(fn, tensors)
    assert not found
    torch.testing.assert_close(gm(*tensors), fn(*tensors), rtol=1e-12, atol=1e-12)


def test_sums_in_low_precision_stay_two():
    """A word that occurs often would be rounded each time, against the larger sum."""
    assert not rewritten(tied, given(tied, torch.bfloat16))[1]


class Tied(nn.Module):
    """Two lookups and a head of one table, one word of which is padding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=3)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        x = torch.tanh(self.mix(self.words(ids)).cumsum(1)) + self.words(ids.flip(1))
        return F.cross_entropy((x @ self.words.weight.t()).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("backend", ["memo", "memo_eager"])
@pytest.mark.parametrize("verify", [False, "poison"])
def test_gradients_of_a_tied_table_are_right(backend, verify):
    torch.manual_seed(0)
    torch.compiler.reset()
    model, ids = Tied().double(), torch.randint(0, WORDS, (2, 64))
    options = {"memory_budget": "min", "tiles": 4, "verify": verify}
    compiled = torch.compile(model, backend=backend, options=options)
    wanted = torch.autograd.grad(model(ids), model.parameters())
    for _ in range(2):
        found = torch.autograd.grad(compiled(ids), model.parameters())
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_two_tables_are_never_there_at_once():
    """Nor in the plan, nor in memory."""
    torch.manual_seed(0)
    torch.compiler.reset()

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(4096, 64)

        def forward(self, ids):
            x = torch.tanh(self.words(ids).cumsum(1))
            return F.cross_entropy((x @ self.words.weight.t()).flatten(0, 1), ids.flatten())

    model, ids = Wide(), torch.randint(0, 4096, (1, 256))
    table = model.words.weight.nbytes
    compiled = torch.compile(model, backend="memo", options={"memory_budget": "min"})
    compiled(ids).backward()
    model.zero_grad()
    held = memo_compile.measure_peak(lambda: compiled(ids).backward())
    assert memo_compile.plans()[-1].predicted_peak < 2 * table
    assert held < 2 * table
