"""verify="poison": bytes that nobody may read, or not yet, are no numbers."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from graphs import Chain

import memo_compile
from memo_compile.codegen.emitted.poison import Kept, poisoned
from memo_compile.runtime.ops import cross_calls, pool, register
from memo_compile.runtime.poison import kept_bytes, poison, poison_host, poisoned_prefetch_buffer
from memo_compile.schema import ArenaBuffer, Side

CPU = torch.device("cpu")
BODY = """
    memo_arena_0 = empty_strided_cpu((128, ), (1, ), torch.uint8)
    buf0 = alloc_from_pool(memo_arena_0, 0, torch.float64, (8, ), (1, ))
    # a comment
    kernel_0(primals_1, buf0)
    buf1 = alloc_from_pool(memo_arena_0, 64, torch.float64, (8, ), (1, ))
    del memo_arena_0
    buf2 = buf0; del buf0  # reuse
    kernel_1(buf2, buf1)
    del buf2
    kernel_2(buf1)
""".strip("\n").split("\n")


def after(lines, text):
    """What stands after the line that holds `text`, up to the next that is no fill."""
    (at,) = [i for i, line in enumerate(lines) if text in line]
    rest = (line.strip() for line in lines[at + 1 :])
    found = []
    for line in rest:
        if "poison" not in line:
            return found
        found.append(line)
    return found


def test_a_segment_is_filled_when_taken_and_a_buffer_after_its_last_statement():
    # statements of the layout: buf0, kernel_0, buf1, buf2, del, kernel_1, del, kernel_2
    buffers = [
        ArenaBuffer(Side.FORWARD, "buf0", "memo_arena_0", 0, 64, 0, 6),
        ArenaBuffer(Side.FORWARD, "buf1", "memo_arena_0", 64, 64, 2, 20),
    ]
    lines = poisoned(BODY, buffers, 0)
    assert after(lines, "memo_arena_0 = empty")[0] == "poison(memo_arena_0)"
    assert after(lines, "kernel_1") == ["poison(memo_poison_0)", "del memo_poison_0"]
    assert not after(lines, "kernel_2")  # it lives on: the backward fills it
    assert [line for line in lines if "poison" not in line] == BODY


def test_the_backward_fills_what_it_is_the_last_to_read():
    lines = poisoned(["    kernel_0(a, b)", "    kernel_1(b)"], [], 10, [Kept("a", 128, 64, 32, 1)])
    assert lines == [
        "    memo_poison_0 = kept_bytes(a, 128, 64, 32)",
        "    kernel_0(a, b)",
        "    poison(memo_poison_0)",
        "    del memo_poison_0",
        "    kernel_1(b)",
    ]


def test_a_slice_on_the_host_is_filled_when_it_has_come_back_for_the_last_time():
    first, again, other = (
        f"torch.ops.memo.wait_.default({of})" for of in ("a, lease, 0", "b, lease, 0", "c, lease, 64")
    )
    lines = poisoned([first, other, again], [], 0)
    assert lines == [first, other, "poison_host(c, lease, 64)", again, "poison_host(b, lease, 0)"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_every_type_has_a_filling_that_shows(dtype):
    value = torch.zeros(4, dtype=dtype)
    poison(value)
    assert bool((value != 0).all())
    if dtype.is_floating_point or dtype.is_complex:
        assert bool(value.isnan().all())


def in_a_backward(act, keep=False):
    """Call `act` while autograd runs a backward."""
    leaf = torch.ones(1, requires_grad=True)
    y = leaf * 1
    y.register_hook(lambda _: act())
    y.backward(retain_graph=keep)


def test_bytes_of_a_saved_value_are_those_of_its_segment_and_none_of_a_copy():
    segment = torch.zeros(128, dtype=torch.uint8)
    value = segment[64:96].view(torch.float64)
    for other, keep in ((value.clone(), False), (value, True)):
        in_a_backward(lambda other=other: poison(kept_bytes(other, 128, 64, 32)), keep)
        assert not other.any()
    in_a_backward(lambda: poison(kept_bytes(value, 128, 64, 32)))
    assert bool(value.isnan().all())
    assert not segment[:64].any()


def test_a_new_landing_place_is_filled_and_one_that_is_under_way_is_not():
    register()
    lease = pool().lease(64)
    assert bool((poisoned_prefetch_buffer(lease, 0, 64, CPU) == 255).all())
    assert cross_calls(CPU).place(lease, 0) is None


def test_host_memory_is_filled_once_it_has_come_back():
    lease = pool().lease(128)
    lease.zero_()
    came_back = torch.empty(4, dtype=torch.float64)
    in_a_backward(lambda: poison_host(came_back, lease, 64), keep=True)
    assert not lease.any()
    in_a_backward(lambda: poison_host(came_back, lease, 64))
    assert bool((lease[64:96] == 255).all())
    assert not lease[:64].any()
    assert not lease[96:].any()


@pytest.mark.parametrize("backend", ["memo_eager", "memo"])
@pytest.mark.parametrize("options", [{"memory_budget": "min"}, {"offload": "all"}], ids=["min", "all"])
def test_right_programs_are_right_with_it_also_when_the_graph_is_kept(backend, options):
    torch.manual_seed(0)
    model, x = Chain(2).double(), torch.randn(1024, 32, dtype=torch.float64)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).sum(), parameters)
    loss = torch.compile(model, backend=backend, options={**options, "verify": "poison"})(x).sum()
    for keep in (True, True, False):
        got = torch.autograd.grad(loss, parameters, retain_graph=keep)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-12)


def test_it_holds_no_more_than_without():
    peaks = []
    for verify in (False, "poison"):
        torch._dynamo.reset()
        model, x = Chain(1), torch.randn(1024, 32)
        fn = torch.compile(model, backend="memo", options={"verify": verify})
        fn(x).sum().backward()
        model.zero_grad(set_to_none=True)
        peaks.append(memo_compile.measure_peak(lambda fn=fn, x=x: fn(x).sum().backward()))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_a_life_that_ends_too_early_shows(monkeypatch):
    from memo_compile.codegen import compiler

    plain = compiler.kept_for_backward

    def too_early(*args):
        return [Kept(k.name, k.segment, k.offset, k.size, 1) for k in plain(*args)]

    monkeypatch.setattr(compiler, "kept_for_backward", too_early)
    w = torch.randn(32, 32, requires_grad=True)
    fn = torch.compile(lambda x: F.gelu(x @ w).sin().sum(), backend="memo", options={"verify": "poison"})
    fn(torch.randn(64, 32)).backward()
    assert bool(w.grad.isnan().any())


def test_a_reader_of_what_attention_has_written_over_shows(monkeypatch):
    from memo_compile.codegen import corrections, lowerings

    monkeypatch.setattr(lowerings, "_is_read_later", lambda *_: False)
    monkeypatch.setattr(corrections, "readers_before_writers", contextlib.nullcontext)
    frozen = [torch.randn(48, 48).double() for _ in range(3)]
    weights = [torch.randn(48, 48).double().requires_grad_() for _ in range(4)]

    def f(x):
        q, k, v = ((x @ w).unflatten(-1, (4, -1)).transpose(1, 2) for w in frozen)
        early = q.sin()
        x = (F.scaled_dot_product_attention(q, k, v) + early).transpose(1, 2).flatten(2)
        for w in weights:
            x = x + torch.tanh(x @ w)
        return x.sum()

    options = {"verify": "poison", "memory_budget": "min", "offload": False}
    assert bool(torch.compile(f, backend="memo", options=options)(torch.randn(3, 128, 48).double()).isnan())
