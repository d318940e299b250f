"""What Inductor loses of a kernel's dependencies while it fuses is put back, or found in what it emits."""

from types import SimpleNamespace

import pytest
import torch
import zoo

from memo_compile.codegen import compiler, inductor
from memo_compile.codegen.scheduler.lost_dependencies import check_dependencies, restored
from memo_compile.errors import EmittedOrderChanged

OPTIONS = {"memory_budget": "min"}


class Emitted(BaseException):
    """Ends a compilation before its kernels are compiled."""


def emit(patch):
    """Compile BERT with dropout, whose masks come back from the host, as far as the backward's text."""
    inspect = compiler._Compilation._inspect_backward

    def stop(self, *args):
        inspect(self, *args)
        raise Emitted

    patch.setattr(compiler._Compilation, "_inspect_backward", stop)
    model, x = zoo.make("hf-bert-dropout"), zoo.batch(1)
    with pytest.raises((Emitted, EmittedOrderChanged, torch._dynamo.exc.BackendCompilerFailed)) as ended:
        torch.compile(model, backend="memo", options=OPTIONS)(x, labels=x)
    return getattr(ended.value, "inner_exception", ended.value)


@pytest.fixture(scope="module")
def lost():
    """The dependencies that kernels get back, and how the compilation ends with them."""
    names = []

    def spy(nodes, waits):
        before = {n: {d.name for d in n.unmet_dependencies} for n in nodes}
        after = restored(nodes, waits)
        names.extend(d.name for n in nodes for d in n.unmet_dependencies if d.name not in before[n])
        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "restored", spy)
        return names, emit(patch)


def test_no_kernel_uses_what_has_not_come_back(lost):
    _, ended = lost
    assert isinstance(ended, Emitted)


def test_without_them_the_emitted_text_is_refused(lost, monkeypatch):
    names, _ = lost
    if not names:
        pytest.skip(f"torch {torch.__version__} loses none")
    torch._dynamo.reset()
    monkeypatch.setattr(inductor, "restored", lambda nodes, waits: nodes)
    ended = emit(monkeypatch)
    assert "has not yet come back" in str(ended)


class Kernel:
    """What the check asks of a scheduler node."""

    def __init__(self, name, *needs):
        self.name, self.unmet_dependencies = name, [SimpleNamespace(name=n) for n in needs]

    def get_name(self):
        return f"op of {self.name}"

    def get_buffer_names(self):
        return {self.name}


def test_an_order_without_what_a_kernel_needs_is_refused():
    check_dependencies([Kernel("buf0"), Kernel("buf1", "buf0", "primals_1")])
    with pytest.raises(EmittedOrderChanged, match="op of buf1 stands before buf0"):
        check_dependencies([Kernel("buf1", "buf0"), Kernel("buf0", "buf1")])
