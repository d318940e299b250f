"""Ranks that run a graph together carry out one plan, or none."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from memo_compile.errors import RanksDisagree
from memo_compile.planning.problem import Limits
from memo_compile.trace import ranks, setting
from memo_compile.trace.ranks import Group, Together


def on_ranks(fn, count=2, groups=None):
    """`fn(rank, Together)` on each rank, a thread each; what came of it, errors included."""
    store = dist.HashStore()
    of = groups or (lambda rank: [("all", range(count))])

    def run(rank):
        made = tuple((Group(name, rank, tuple(members), store), "1") for name, members in of(rank))
        try:
            return fn(rank, Together(made))
        except RanksDisagree as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def residency(**kept):
    return SimpleNamespace(
        residency={n: SimpleNamespace(tokens=8, kept=k, offloaded=8 - k, recomputed=0) for n, k in kept.items()}
    )


def test_what_each_rank_finds_free_is_agreed_on_as_the_least():
    agreed = on_ranks(lambda rank, all_: all_.agree(Limits(budget=(100, 70)[rank], host=(5, 9)[rank])))
    assert agreed == [Limits(budget=70, host=5)] * 2


def test_no_limit_is_more_than_any():
    agreed = on_ranks(lambda rank, all_: all_.agree(Limits(budget=(None, 70)[rank], host=1)))
    assert [limits.budget for limits in agreed] == [70, 70]


def test_what_two_groups_of_a_mesh_agree_on_holds_for_all_of_its_ranks():
    """Ranks 0 to 3 as a square: each talks to one row and one column."""
    mesh = {0: [("row0", (0, 1)), ("col0", (0, 2))], 1: [("row0", (0, 1)), ("col1", (1, 3))]}
    mesh |= {2: [("row1", (2, 3)), ("col0", (0, 2))], 3: [("row1", (2, 3)), ("col1", (1, 3))]}
    agreed = on_ranks(lambda rank, all_: all_.agree(Limits(budget=100 - rank, host=1)), 4, mesh.__getitem__)
    assert [limits.budget for limits in agreed] == [97] * 4


def test_other_options_are_an_error_on_every_rank():
    errors = on_ranks(lambda rank, all_: all_.agree(Limits(budget=1, host=1, offload=rank == 0)))
    assert all(isinstance(e, RanksDisagree) for e in errors)
    assert "offload = True, rank 1 with False" in str(errors[0])


def test_plans_that_differ_are_an_error_on_every_rank_and_name_the_first_difference():
    errors = on_ranks(lambda rank, all_: all_.confirm(residency(a=8, b=4 * rank)))
    assert all("b is kept 0, offloaded 8" in str(e) and "kept 4" in str(e) for e in errors)


def test_equal_plans_are_no_error():
    assert on_ranks(lambda _, all_: all_.confirm(residency(a=8, b=4))) == [None, None]


def test_a_rank_that_fails_keeps_nobody_waiting():
    def run(rank, all_):
        if rank:
            return all_.fail(ValueError("no room"))
        return all_.confirm(residency(a=8))

    said, _ = on_ranks(run)
    assert "rank 1 has failed: ValueError: no room" in str(said)


def test_a_rank_that_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "WAIT", timedelta(milliseconds=50))
    said, _ = on_ranks(lambda rank, all_: None if rank else all_.confirm(residency(a=8)))
    assert "rank 1 has not come" in str(said)


def test_the_host_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(setting, "free_host_memory", lambda: 8000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    options = SimpleNamespace(host_budget="auto")
    alone = setting._host_budget(options)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert alone - setting._host_budget(options) == 4000 - 500


def trained(rank, store, said, options):
    """A tensor-parallel model on two processes: its plan and loss, or the error."""
    from memo_compile import plans
    from memo_compile.models import Llama, LlamaConfig, Shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=64, layers=2, width=64, heads=4, kv_heads=2, ffn=256, shard=Shard(2, rank)))
    tokens = torch.arange(256).remainder(64).unsqueeze(0)
    try:
        loss = torch.compile(model, backend="memo_eager", options=options[rank])(tokens, labels=tokens)
        loss.backward()
        said[rank] = (plans()[-1].offloaded_bytes, float(loss))
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        said[rank] = (type(inner).__name__, str(inner))


def two_processes(tmp_path, options):
    with mp.Manager() as manager:
        said = manager.dict()
        mp.spawn(trained, args=(str(tmp_path / "store"), said, options), nprocs=2)
        return said[0], said[1]


def test_ranks_with_other_host_memory_carry_out_one_plan(tmp_path):
    first, second = two_processes(tmp_path, [{"memory_budget": 0.6, "host_budget": n} for n in ("1GiB", "200KiB")])
    assert first == second
    assert 0 < first[0] <= 200 * 1024


@pytest.mark.parametrize("other", [{"memory_budget": "min"}, {"memory_budget": 0.6, "offload": False}])
def test_ranks_that_ask_for_different_things_are_told_so_at_once(tmp_path, other):
    first, second = two_processes(tmp_path, [{"memory_budget": 0.6}, other])
    assert first[0] == second[0] == "RanksDisagree"
