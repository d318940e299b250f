"""Joint graphs of whole models, traced on fake tensors, where nothing is compiled or run; and a model to compile."""

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from memo_compile.passes.transforms.partition import split_min_cut


class _Traced(BaseException):
    pass


def joint_of(model, *args, **kwargs):
    """The joint graph of a training step, as the passes get it."""
    torch._dynamo.reset()

    def partition(joint, inputs, *, num_fwd_outputs, static_lifetime_input_indices=None, **_):
        split_min_cut(joint, inputs, num_fwd_outputs, static_lifetime_input_indices)
        raise _Traced(joint)

    def backend(gm, inputs):
        decompositions = select_decomp_table()
        return aot_autograd(fw_compiler=lambda g, _: g, partition_fn=partition, decompositions=decompositions)(
            gm, inputs
        )

    try:
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    except _Traced as traced:
        return traced.args[0]
    raise AssertionError("nothing to differentiate")


class Chain(torch.nn.Module):
    """Linear layers and sines; no residual, so that Inductor folds no matmul into a sum and each keeps its name."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x
