"""The table in docs/trainers.md: what it says works does. Some rows run here, all of them by `make test-all`."""

import pytest

import memo_compile
from bench import trainers
from bench.trainers import PAGE, ROWS

ALWAYS = {"Trainer, evaluation in between"}  # tests/test_examples.py has others
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def marked(row):
    return pytest.param(row, id=row.name, marks=[] if row.name in ALWAYS else [pytest.mark.grid])


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("row", [marked(row) for row in ROWS])
def test_a_row_works(row):
    if trainers.missing(row):
        pytest.skip(f"{', '.join(trainers.missing(row))} not installed")
    found = trainers.run(row)
    assert found.works, found


def test_the_page_has_every_row_and_each_works():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    told = {f"{trainer}, {setting}": works for trainer, setting, works, *_ in (x for x in lines if len(x) == 6)}
    assert {row.name: "yes" for row in ROWS}.items() <= told.items()


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(trainers.hf_trained, id="Trainer", marks=pytest.mark.grid),
        pytest.param(trainers.sft_trained, id="SFTTrainer"),
    ],
)
def test_the_least_is_the_least_with_gradient_checkpointing_too(train):
    held = {}
    for checkpointing in (False, True):
        trainer = train(
            lambda model: model.compile(backend="memo_eager", options={"memory_budget": "min"}),
            gradient_checkpointing=checkpointing,
            max_steps=1,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.zero_grad(set_to_none=True)
        trainer.training_step(trainer.model, dict(batch))
        trainer.model.zero_grad(set_to_none=True)
        held[checkpointing] = memo_compile.measure_peak(trainer.training_step, trainer.model, dict(batch))
    assert held[True] <= 1.05 * held[False]
