"""Joint graphs of whole models, traced on fake tensors: nothing is compiled or run."""

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from memo_compile.passes.partition import split_min_cut


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
