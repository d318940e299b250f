"""Training loops with lengths as they come: what one plan for a range must be right for beside a step at a time."""

import pytest
import torch
import transformers
import zoo
from torch import nn

import memo_compile
from memo_compile.errors import TooManyCalls

LENGTHS = (128, 127, 33, 34, 40, 47, 64, 65, 90, 96, 100, 111)  # of one range, its ends included


class Block(nn.Module):
    """Rows that mix along the tokens, and much that is saved."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 256), nn.Linear(256, 32)

    def forward(self, x):
        x = x + torch.cumsum(x, 1) / x.shape[1]
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def models(backend="memo_eager", **options):
    model, reference = Model().double(), Model().double()
    model.compile(backend=backend, options=options, dynamic=True)
    return model, reference


def assert_same_gradients(model, reference):
    zoo.assert_close(*({n: p.grad for n, p in m.named_parameters()} for m in (model, reference)), share=1e-12)


def moved():
    return sum(p.offloaded_bytes + p.recomputed_bytes for p in memo_compile.plans())


def test_outstanding_calls_of_different_lengths(caplog):
    model, reference = models(memory_budget="min")
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        for m in (model, reference):
            losses = [m(zoo.batch(1, n)) for n in (128, 33, 90)]
            for i in order:
                losses[i].backward()
        assert_same_gradients(model, reference)
    assert len(memo_compile.plans()) == 1
    assert moved() > 0
    (told,) = (r.getMessage() for r in caplog.records if "wait for their backward" in r.getMessage())
    assert "memory_budget='min' and 1 at once" in told
    assert 'options={"calls": 2}' in told


def test_evaluation_between_training_steps():
    model, reference = models(memory_budget="min")
    for n in (100, 40, 128):
        for m in (model, reference):
            m.zero_grad()
            m(zoo.batch(1, n)).backward()
        assert_same_gradients(model, reference)
        with torch.no_grad():
            for other in (n - 7, 2 * n):
                torch.testing.assert_close(model(zoo.batch(1, other)), reference(zoo.batch(1, other)))
    assert len(memo_compile.plans()) == 1


def test_blocks_that_are_compiled_alone_share_one_plan_for_all_lengths():
    model, reference = Model(3).double(), Model(3).double()
    for block in model.blocks:
        block.compile(backend="memo_eager", options={"offload": "all"}, dynamic=True)
    for n in (100, 40, 128):
        for m in (model, reference):
            m.zero_grad()
            m(zoo.batch(1, n)).backward()
        assert_same_gradients(model, reference)
    assert [p.range.rsplit(" in ", 1)[1] for p in memo_compile.plans()] == ["[33, 128]"]
    assert moved() > 0


@pytest.mark.parametrize("backend", ["memo_eager", pytest.param("memo", marks=pytest.mark.grid)])
def test_a_budget_in_bytes_is_kept_at_every_length(backend):
    least, _ = models(backend, memory_budget="min")
    least(zoo.batch(1, 128))
    (plan,) = memo_compile.plans()
    torch._dynamo.reset()
    budget = (3 * plan.predicted_peak + plan.unplanned_peak) // 4
    model, reference = models(backend, memory_budget=budget)
    for n in LENGTHS:
        for m in (model, reference):
            m.zero_grad(set_to_none=True)
            m(zoo.batch(1, n)).backward()
        assert_same_gradients(model, reference)
        model.zero_grad(set_to_none=True)
        assert memo_compile.measure_peak(lambda n=n: model(zoo.batch(1, n)).backward()) <= budget
    plan = memo_compile.plans()[-1]
    assert plan.range.endswith("[33, 128]")
    assert plan.offloaded_bytes or plan.recomputed_bytes


@pytest.mark.parametrize("backend", ["memo_eager", pytest.param("memo", marks=pytest.mark.grid)])
def test_calls_that_would_exceed_a_budget_beside_those_that_wait_are_refused(backend):
    alone = Model().double()
    budget = 3 * memo_compile.measure_peak(lambda: alone(zoo.batch(1, 128)).backward())
    model, reference = models(backend, memory_budget=budget)
    waiting = []

    def call(lengths):
        for n in lengths:
            waiting.append((n, model(zoo.batch(1, n))))  # noqa: PERF401

    def call_until_refused():
        with pytest.raises(TooManyCalls, match=r'options=\{"calls": '):
            call(10 * (128, 33, 90))

    assert memo_compile.measure_peak(call_until_refused) <= budget
    assert len(waiting) > 1
    for n, loss in waiting:
        loss.backward()
        reference(zoo.batch(1, n)).backward()
    assert_same_gradients(model, reference)
    model(zoo.batch(1, 128))  # those that have had their backward do not count


def test_calls_that_would_exceed_a_host_budget_are_refused():
    model, _ = models(offload="all", host_budget=1 << 30)
    model(zoo.batch(1, 128)).backward()
    once = memo_compile.plans()[-1].host_bytes
    torch._dynamo.reset()
    model, reference = models(offload="all", host_budget=5 * once // 2)
    losses = [model(zoo.batch(1, n)) for n in (128, 33)]
    with pytest.raises(TooManyCalls, match=r"host_budget = .* raise host_budget to"):
        model(zoo.batch(1, 40))
    for n, loss in zip((128, 33), losses, strict=True):
        loss.backward()
        reference(zoo.batch(1, n)).backward()
    assert_same_gradients(model, reference)


class Measured(transformers.Trainer):
    """Notes the length of each step, and what it holds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.peaks = []

    def training_step(self, model, inputs, *args):
        losses = []
        step = super().training_step
        peak = memo_compile.measure_peak(lambda: losses.append(step(model, inputs, *args)))
        self.peaks.append((inputs["input_ids"].shape[1], peak))
        return losses[0]


def trained(folder, lengths, **compiled):
    """The losses of a step for each length, and what each held."""
    torch.manual_seed(0)
    model = zoo.hf_llama()
    model.loss_type = "ForCausalLM"
    if compiled:
        model.compile(**compiled)
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [
        {"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for n in lengths for x in zoo.batch(1, n)
    ]
    trainer = Measured(model, arguments, train_dataset=rows)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry], trainer.peaks


@pytest.mark.grid
@pytest.mark.parametrize(("backend", "share"), [("memo_eager", 0.65), ("memo", 0.75)])
def test_a_trainer_over_60_lengths_keeps_a_budget_in_bytes(tmp_path, backend, share):
    lengths = [20 + 4 * (37 * i % 60) for i in range(60)]
    want, held = trained(tmp_path, lengths)
    budget = int(share * max(peak for _, peak in held))
    got, peaks = trained(tmp_path, lengths, backend=backend, options={"memory_budget": budget})
    assert len(want) == len(got) == len({length for length, _ in peaks}) == 60
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(memo_compile.plans()) <= 4
    assert moved() > 0
    assert max(peak for _, peak in peaks) <= budget
