"""Two ranks, each with lengths of its own: each compiles for ranges of its own, and gradients are the mean of both."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zoo

LENGTHS = ((96, 60), (41, 90))  # of each rank


def trained(rank, store, said):
    from torch.nn.parallel import DistributedDataParallel

    import memo_compile

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    reference, model = zoo.one_layer_llama(), DistributedDataParallel(zoo.one_layer_llama())
    fn = torch.compile(model, backend="memo_eager", options={"memory_budget": "min"}, dynamic=True)
    worst = 0.0
    for lengths in zip(*LENGTHS, strict=True):
        _, got = zoo.gradients(model, fn, zoo.batch(1, lengths[rank]))
        each = [zoo.gradients(reference, reference, zoo.batch(1, n))[1] for n in lengths]
        for name, gradient in got.items():
            plain = name.removeprefix("module.")
            want = (each[0][plain] + each[1][plain]) / 2
            worst = max(worst, ((gradient - want).norm() / want.norm()).item())
    said[rank] = (worst, sum(p.offloaded_bytes for p in memo_compile.plans()), len(memo_compile.plans()))


def test_ranks_may_have_different_lengths(tmp_path):
    with mp.Manager() as manager:
        said = manager.dict()
        mp.spawn(trained, args=(str(tmp_path / "store"), said), nprocs=2)
        for worst, offloaded, plans in said.values():
            assert worst < 1e-12
            assert offloaded > 0
            assert plans <= 2
