"""What autograd keeps for a graph of which nothing was planned is in the ledger until its backward has been."""

import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from memo_compile.runtime.outstanding import ledger
from memo_compile.runtime.unplanned_calls import counted


def test_calls_count_what_they_keep_until_their_backward():
    model = nn.Sequential(nn.Linear(32, 256, bias=False), nn.Tanh(), nn.Linear(256, 32, bias=False))
    given = []

    def backend(gm, inputs):
        given.append(gm)
        return counted(lookup_backend("aot_eager")(gm, inputs), "graph", "family", calls=1)

    run = torch.compile(model, backend=backend, dynamic=True)
    losses = [run(torch.ones(n, 32)).sum() for n in (64, 16)]
    assert len(given) == 1
    assert ledger().bytes_of("graph") == [4 * n * 256 for n in (64, 16)]  # neither parameters nor inputs
    losses[0].backward()
    assert ledger().bytes_of("graph") == [4 * 16 * 256]
    del losses
    assert ledger().outstanding("graph") == 0
    with torch.no_grad():
        run(torch.ones(8, 32))
    with torch.autograd.graph.save_on_cpu():
        kept = run(torch.ones(8, 32))
    assert ledger().outstanding("graph") == 0, "what hooks have packed is theirs"
    del kept
