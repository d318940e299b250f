"""A length that goes into attention's scale is no reason to compile anew."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import memo_compile
from memo_compile.trace import scales


class Scaled(nn.Module):
    """Attention whose scale depends on the longest document, as that of packed documents may."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(32, 96)

    def forward(self, x, longest):
        q, k, v = self.projection(x).view(1, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, None, is_causal=True, scale=1 / (2 + longest / 64)).sin().sum()


def trained(model, fn):
    x = torch.randn(1, 128, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for longest in (40, 50, 60, 128):
        model.zero_grad(set_to_none=True)
        loss = fn(x, longest)
        loss.backward()
        found.append((loss.detach(), model.projection.weight.grad))
    return found


def test_one_plan_serves_all_scales():
    model = Scaled().double()
    fn = torch.compile(model, backend="memo_eager", options={"offload": "all"})
    torch.testing.assert_close(trained(model, fn), trained(model, model), rtol=1e-12, atol=1e-13)
    first, for_all = memo_compile.plans()  # Dynamo takes the first number that it sees for a constant
    assert first.offloaded_bytes == for_all.offloaded_bytes > 0


def test_other_backends_get_the_graph_that_they_would_get():
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm

    torch._dynamo.lookup_backend("memo")
    model = Scaled().double()
    trained(model, torch.compile(model, backend=keep))
    (attention,) = (n for n in graphs[-1].graph.nodes if n.target is scaled_dot_product_attention)
    assert "scale" in attention.kwargs
    assert len(graphs) == 4


def test_without_torchs_table_everything_is_as_it_was(monkeypatch):
    def gone():
        raise AttributeError("_get_handlers")

    monkeypatch.setattr(scales, "_handlers", gone)
    scales.keep_symbolic(lambda _: True)


def test_a_way_of_torchs_own_is_left_alone(monkeypatch):
    table = {scaled_dot_product_attention: torch.relu}
    monkeypatch.setattr(scales, "_handlers", lambda: table)
    scales.keep_symbolic(lambda _: True)
    assert table == {scaled_dot_product_attention: torch.relu}
