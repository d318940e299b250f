"""One compilation for a range of lengths: planned at its upper end, right at every length."""

import pytest
import torch
import zoo
from torch import nn

import memo_compile
from memo_compile.errors import BudgetTooSmall
from memo_compile.passes.fx.ranges import row_at

LENGTHS = (96, 127, 33, 34, 40, 47, 64, 65, 90, 111, 128)  # of one range, its ends included
OPTIONS = {
    "min": {"memory_budget": "min"},
    "recompute": {"memory_budget": "min", "offload": False},
    "all offloaded": {"offload": "all"},
}


def checked(model, fn, reference, batch):
    got, expected = zoo.gradients(model, fn, batch), zoo.gradients(reference, reference, batch)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)
    zoo.assert_close(got[1], expected[1])


@pytest.mark.parametrize("way", OPTIONS)
def test_gradients_are_right_at_every_length_of_one_range(way):
    model, reference = zoo.make("llama"), zoo.make("llama")
    fn = torch.compile(model, backend="memo_eager", options=OPTIONS[way])
    for n in (128, *LENGTHS):
        checked(model, fn, reference, zoo.batch(2, n))
    first, ranged = memo_compile.plans()
    assert first.range == ""
    assert ranged.range == "L['tokens'].size()[1] in [33, 128]"
    assert ranged.offloaded_bytes or ranged.recomputed_bytes


@pytest.mark.parametrize("way", ["min", pytest.param("recompute", marks=pytest.mark.grid)])
def test_emitted_code_is_right_at_every_length_of_one_range(way):
    """Shapes are symbols, offsets are constant, and what is held is within the plan."""
    make = zoo.one_layer_llama if way == "min" else lambda: zoo.make("llama")
    model, reference = make(), make()
    fn = torch.compile(model, backend="memo", options=OPTIONS[way], dynamic=True)
    held = {}
    for n in (128, *LENGTHS):
        x = zoo.batch(1, n)
        checked(model, fn, reference, x)
        model.zero_grad(set_to_none=True)
        held[n] = memo_compile.measure_peak(lambda x=x: fn(x, labels=x).backward())
    (plan,) = memo_compile.plans()
    assert plan.range == "L['tokens'].size()[1] in [33, 128]"
    assert plan.arena_bytes
    assert plan.offloaded_bytes or plan.recomputed_bytes
    assert max(held.values()) <= 1.01 * plan.predicted_peak


def test_below_where_everything_fits_inductor_serves_all_lengths():
    x = zoo.batch(1, 128)
    roomy = 4 * memo_compile.plan(zoo.one_layer_llama(), (x,), {"labels": x}).unplanned_peak
    model, reference = zoo.one_layer_llama(), zoo.one_layer_llama()
    fn = torch.compile(model, backend="memo", options={"memory_budget": roomy}, dynamic=True)
    for n in (128, 33):
        checked(model, fn, reference, zoo.batch(1, n))
    (plan,) = memo_compile.plans()
    assert plan.range == "L['tokens'].size()[1] in [2, 128]"
    assert plan.predicted_peak <= roomy


def test_batch_and_length_may_both_vary():
    model, reference = zoo.one_layer_llama(), zoo.one_layer_llama()
    fn = torch.compile(model, backend="memo_eager", options={"memory_budget": "min"})
    for size, n in ((2, 128), (3, 96), (4, 65), (3, 127)):
        checked(model, fn, reference, zoo.batch(size, n))
    assert len(memo_compile.plans()) == 2


def test_a_length_that_is_marked_as_dynamic_is_compiled_for_a_range():
    model, reference = zoo.one_layer_llama(), zoo.one_layer_llama()
    fn = torch.compile(model, backend="memo_eager", options={"memory_budget": "min"})
    x = zoo.batch(1)
    torch._dynamo.mark_dynamic(x, 1)
    checked(model, fn, reference, x)
    checked(model, fn, reference, zoo.batch(1, 80))
    assert len(memo_compile.plans()) == 1


def test_beyond_the_range_there_is_another():
    model, reference = zoo.one_layer_llama(), zoo.one_layer_llama()
    fn = torch.compile(model, backend="memo_eager", options={"memory_budget": "min"}, dynamic=True)
    for n in (100, 130, 20):
        checked(model, fn, reference, zoo.batch(1, n))
    assert [p.range.split(" in ")[1] for p in memo_compile.plans()] == ["[33, 128]", "[65, 256]", "[9, 32]"]


def test_what_is_held_is_within_what_was_planned_at_the_upper_end():
    model = zoo.one_layer_llama()
    fn = torch.compile(model, backend="memo_eager", options={"memory_budget": 0.6}, dynamic=True)
    held = {}
    for n in (128, 100, 70):
        x = zoo.batch(2, n)
        fn(x, labels=x).backward()
        model.zero_grad(set_to_none=True)
        held[n] = memo_compile.measure_peak(lambda x=x: fn(x, labels=x).backward())
    (plan,) = memo_compile.plans()
    assert held[128] == pytest.approx(plan.predicted_peak, rel=0.05)
    assert held[70] < held[100] < held[128]


class Documents(nn.Module):
    """A number of boundaries, of which hardly any memory depends, and an integer, of which none does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x, bounds, longest):
        document = torch.searchsorted(bounds, torch.arange(x.shape[0]), right=True)
        y = self.down(torch.tanh(self.up(x * (1 + document[:, None] % 3))))
        return (y / longest).square().sum()


def test_what_takes_little_memory_gets_one_range():
    model, reference = Documents().double(), Documents().double()
    fn = torch.compile(model, backend="memo_eager", options={"memory_budget": 0.7})
    x = torch.randn(256, 64, dtype=torch.float64)
    for i in range(2, 20, 3):
        bounds = torch.linspace(1, 256, i).long()
        for m, f in ((model, fn), (reference, reference)):
            m.zero_grad()
            f(x, bounds, 256 // i).backward()
        for got, want in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-12)
    assert len(memo_compile.plans()) == 2


class Prefixed(nn.Module):
    """A value of as many rows as the length has beyond another length: largest where that other one is least."""

    def __init__(self, most=None):
        super().__init__()
        torch.manual_seed(0)
        self.most, self.embedding = most, nn.Embedding(64, 32)
        self.up, self.down = nn.Linear(32, 256), nn.Linear(256, 32)

    def forward(self, tokens, prefix=None):
        if self.most is not None and tokens.shape[1] > self.most:
            raise ValueError("too long")
        rows = self.embedding(tokens)
        if prefix is not None:
            rest = torch.tanh(rows[:, prefix.shape[1] :])
            rows = rows + torch.cat([self.embedding(prefix), rest.sin() * rest], 1)
        return self.down(torch.tanh(self.up(rows))).square().mean()


def compiled_and_not(make, **options):
    options = {"memory_budget": "min", **options}
    model = make().double()
    return model, make().double(), torch.compile(model, backend="memo_eager", options=options, dynamic=True)


def assert_alike(model, fn, reference, *inputs):
    for module, function in ((model, fn), (reference, reference)):
        module.zero_grad(set_to_none=True)
        function(*inputs).backward()
    grads = ({n: p.grad for n, p in m.named_parameters()} for m in (model, reference))
    zoo.assert_close(*grads)


def test_what_may_be_larger_at_a_smaller_length_is_compiled_alone():
    """At the ends of both ranges, 128 and 128, nothing would be left of it."""
    model, reference, fn = compiled_and_not(Prefixed)
    for first in (100, 3):
        assert_alike(model, fn, reference, zoo.batch(1, 128), zoo.batch(1, first))
    assert [p.range for p in memo_compile.plans()] == ["", ""]


def test_what_a_model_checks_does_not_move_the_end():
    model, reference, fn = compiled_and_not(lambda: Prefixed(most=5000))
    for n in (100, 33):
        assert_alike(model, fn, reference, zoo.batch(1, n))
    (plan,) = memo_compile.plans()
    assert plan.range.endswith("size()[1] in [33, 128]")


def test_a_range_that_the_user_gives_is_served_whole():
    """Torch refuses one that is narrower. So nothing is sliced: borders would narrow it."""
    model, reference, fn = compiled_and_not(Prefixed)
    for n in (100, 20, 160):
        x = zoo.batch(1, n)
        torch._dynamo.mark_dynamic(x, 1, min=20, max=160)
        assert_alike(model, fn, reference, x)
    (plan,) = memo_compile.plans()
    assert plan.range.endswith("size()[1] in [20, 160]")
    assert plan.offloaded_bytes


def test_a_bucket_far_away_does_not_end_the_range():
    model, reference, fn = compiled_and_not(Prefixed, lengths=[4096, 64])
    for n in (100, 64):
        assert_alike(model, fn, reference, zoo.batch(1, n))
    assert [p.range.rsplit(" in ", 1)[1] for p in memo_compile.plans()] == ["[33, 128]"]


def test_few_tokens_beside_large_parameters():
    """Parameters and their gradients are no reason to plan for a length that is far away."""
    fn = torch.compile(nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)), backend="memo_eager",
                       options={"offload": "all"}, dynamic=True)  # fmt: skip
    fn(torch.randn(10, 512)).sum().backward()
    (plan,) = memo_compile.plans()
    assert plan.range.endswith(", 16]")


def test_a_slice_has_rows_at_every_length():
    model, reference, fn = compiled_and_not(Prefixed, token_slice=1, memory_budget=0.6)
    for n in (100, 33):
        assert_alike(model, fn, reference, zoo.batch(1, n))
    (plan,) = memo_compile.plans()
    assert any(0 < a.offloaded < a.tokens for a in plan.activations)


def test_lengths_are_exact_where_the_user_says_so():
    model, reference = zoo.one_layer_llama(), zoo.one_layer_llama()
    fn = torch.compile(model, backend="memo_eager", options={"memory_budget": "min", "lengths": "exact"})
    for n in (128, 96, 64):
        checked(model, fn, reference, zoo.batch(1, n))
    assert [p.range for p in memo_compile.plans()] == ["", "", ""]


def test_the_next_bucket_ends_the_range():
    model, reference = zoo.one_layer_llama(), zoo.one_layer_llama()
    options = {"memory_budget": "min", "lengths": [80, 200]}
    fn = torch.compile(model, backend="memo_eager", options=options, dynamic=True)
    for n in (70, 75, 90, 199):
        checked(model, fn, reference, zoo.batch(1, n))
    assert [p.range.split(" in ")[1] for p in memo_compile.plans()] == ["[21, 80]", "[51, 200]"]


def test_a_budget_that_only_nearer_lengths_keep_makes_a_shorter_range():
    """In bytes it is a promise for the whole range, and refused only where the length at hand cannot be planned."""
    x = zoo.batch(1, 130)
    least = memo_compile.plan(zoo.one_layer_llama(), (x,), {"labels": x}, {"memory_budget": "min"}).predicted_peak
    model, reference = zoo.one_layer_llama(), zoo.one_layer_llama()
    options = {"memory_budget": int(1.4 * least)}
    fn = torch.compile(model, backend="memo_eager", options=options, dynamic=True)
    checked(model, fn, reference, x)
    (plan,) = memo_compile.plans()
    assert 130 <= int(plan.range.rsplit(" ", 1)[1].rstrip("]")) < 256
    assert plan.predicted_peak <= plan.budget
    torch._dynamo.reset()
    refused = torch.compile(model, backend="memo_eager", options={"memory_budget": least // 4}, dynamic=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        refused(x, labels=x)
    assert isinstance(caught.value.inner_exception, BudgetTooSmall)


def test_no_part_is_larger_than_at_the_upper_end():
    """Rows are fractions of the length: parts of a value are whole, disjoint, and largest where the length is."""
    for length in range(17, 65):
        borders = [row_at(row, 64, length) for row in (0, 24, 40, 64)]
        assert borders[0] == 0
        assert borders[-1] == length
        assert all(2 <= b - a <= n for a, b, n in zip(borders, borders[1:], (24, 16, 24), strict=False))
