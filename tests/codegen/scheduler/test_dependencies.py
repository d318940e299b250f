"""The order of computation and transfers is a matter of dependencies: where one is lost, that does not pass."""

import pytest
import torch
from graphs import Chain
from torch._inductor.exc import InductorError

from memo_compile.codegen import compiler, inductor
from memo_compile.codegen.scheduler import order
from memo_compile.runtime.ops import engine

CPU = torch.device("cpu")


def names_of(nodes):
    return {name for node in nodes for name in node.get_buffer_names()}


def ahead_of_its_maker(nodes, transfer):
    """As if nothing told the scheduler that the slice must have been made."""
    needs = {d.name for d in transfer.unmet_dependencies}
    makers = [n for n in nodes if order.transfer_of_node(n) is None and needs & names_of([n])]
    rest = [n for n in nodes if n is not transfer]
    rest.insert(min(rest.index(n) for n in makers), transfer)
    return rest


def after_its_reader(nodes, transfer):
    """As if nothing told the scheduler that a reader must wait for the copy."""
    made = names_of([transfer])
    rest = [n for n in nodes if n is not transfer]
    reader = next(
        n for n in rest if order.transfer_of_node(n) is None and made & {d.name for d in n.unmet_dependencies}
    )
    rest.insert(rest.index(reader) + 1, transfer)
    return rest


WHOLE, PARTS = {"offload": "all"}, {"memory_budget": 0.7}  # of what comes back, all rows or most of them


def trained(monkeypatch, kind, which, moved, options=WHOLE):
    """Gradients where one transfer stands elsewhere, copies delayed; None where there is no such transfer."""
    done = []

    def place_transfers(planned):
        ordinary = order.place_transfers(planned)

        def place(nodes):
            nodes = ordinary(nodes)
            found = [n for n in nodes if order.transfer_of_node(n) == kind]
            if which < len(found) and moved is not None:
                done.append(kind)
                return moved(nodes, found[which])
            return nodes

        return place

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Chain(2 if options is WHOLE else 3), torch.randn(1024, 32)
    with monkeypatch.context() as patch, engine(CPU).delays(lambda way: 0.5):
        patch.setattr(inductor, "place_transfers", place_transfers)
        torch.compile(model, backend="memo", options=options)(x).sum().backward()
    return [p.grad for p in model.parameters()] if done or moved is None else None


@pytest.mark.parametrize("kind", ["offload", "prefetch_"])
def test_a_transfer_ahead_of_what_makes_its_place_does_not_run(monkeypatch, kind):
    for which in range(2):
        with pytest.raises(UnboundLocalError):
            trained(monkeypatch, kind, which, ahead_of_its_maker)
        engine(CPU).drain()


@pytest.mark.parametrize("which", range(2))
def test_a_wait_after_its_reader_is_refused(monkeypatch, which):
    with pytest.raises(InductorError, match=r"EmittedOrderChanged: .* has not yet come back from the host"):
        trained(monkeypatch, "wait_", which, after_its_reader)
    engine(CPU).drain()


def test_a_wait_after_the_reader_of_a_value_of_which_some_rows_come_back_is_refused(monkeypatch):
    """Kernels that write its other rows meanwhile are given the same buffer."""
    with pytest.raises(InductorError, match=r"EmittedOrderChanged: .* some of whose rows have not yet come back"):
        trained(monkeypatch, "wait_", 0, after_its_reader, PARTS)
    engine(CPU).drain()


def test_a_wait_after_its_reader_would_give_other_gradients(monkeypatch):
    expected = trained(monkeypatch, "wait_", 0, None)
    monkeypatch.setattr(compiler, "check_prefetched_reads", lambda lines: None)
    monkeypatch.setattr(compiler, "check_arrivals", lambda: None)
    for which in range(2):
        got = trained(monkeypatch, "wait_", which, after_its_reader)
        assert not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert trained(monkeypatch, "wait_", 2, after_its_reader) is None  # there are no more
