"""Two processes that meet through gloo, and run functions of a test module together."""

import contextlib
import gc
import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
PATIENCE = 200  # seconds for one function on all ranks, compilations included: beyond that they hang


class Ranks:
    """Processes that are started once and serve a whole module: starting them takes longer than most of its tests."""

    def __init__(self, folder):
        context = mp.get_context("spawn")
        self.ends, self.processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), there), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, fn, *args):
        """`fn(rank, *args)` on each; what it returned, by rank."""
        for end in self.ends:
            end.send((fn, args))
        said = []
        for rank, end in enumerate(self.ends):
            assert end.poll(PATIENCE), f"rank {rank} hangs"
            said.append(end.recv())
        failed = [f"rank {rank}: {answer}" for rank, (right, answer) in enumerate(said) if not right]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in said]

    def stop(self):
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(rank, store, end):
    import memo_compile

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=PATIENCE / 2)
    )
    while (task := end.recv()) is not None:
        fn, args = task
        try:
            answer = True, fn(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        end.send(answer)
        torch._dynamo.reset()
        memo_compile.reset()
        gc.collect()
    os._exit(0)
