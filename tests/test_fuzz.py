"""Programs that nobody chose: right as eager in float64, the same with poison, and their budgets in order.

The seed changes with the commit. `python -m bench.fuzz` draws more; what has failed once lies in `fuzz_cases`.
"""

import json
import subprocess
import warnings
from pathlib import Path

import pytest

from bench.fuzzing.layers import KINDS
from bench.fuzzing.oracle import Verdict, judge
from bench.fuzzing.programs import SHAPE, Layer, Program, draw, smaller
from bench.fuzzing.reduction import CASES, reduced, store


def seed():
    """The commit, or a fixed seed where there is none."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip()[:12] or "fixed"


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about programs that are strange on purpose
        yield


def passes(program, backend, **keywords):
    verdict = judge(program, backend, **keywords)
    assert not verdict.failed, f"{verdict.status}: {verdict.detail}\n{program.to_json()}"


@pytest.mark.parametrize("number", range(60))
def test_drawn_op_by_op(number):
    passes(draw(f"{seed()}/{number}"), "memo_eager")


@pytest.mark.parametrize("number", range(8))
def test_drawn_compiled(number):
    passes(draw(f"{seed()}/compiled/{number}"), "memo", ladder=number == 0)


def stored():
    for path in sorted(CASES.glob("*.json")):
        case = json.loads(path.read_text())
        marks = [pytest.mark.xfail(strict=True, reason=case["xfail"])] if "xfail" in case else []
        yield pytest.param(case, id=path.stem, marks=marks)


@pytest.mark.parametrize("case", list(stored()))
def test_what_failed_once(case):
    passes(Program.from_json(json.dumps(case["program"])), case["backend"], ladder=case["ladder"])


def test_a_program_comes_back_from_json():
    for number in range(50):
        program = draw(number)
        assert Program.from_json(program.to_json()) == program
        assert all(len(s.to_json()) < len(program.to_json()) + 40 for s in smaller(program))


def test_a_failure_is_made_as_small_as_it_goes(tmp_path):
    """Whatever has a linear layer with a sine fails: nothing else is left of it."""

    def verdict_of(program):
        guilty = any(layer.chosen.get("activation") == "sine" for layer in program.layers)
        return Verdict("wrong" if guilty else "right")

    program = next(p for n in range(1000) if verdict_of(p := draw(n)).failed and len(p.layers) > 2)
    smallest, seen = reduced(program, verdict_of(program), verdict_of, 60.0)
    assert [layer.chosen["activation"] for layer in smallest.layers] == ["sine"]
    assert not smallest.options
    assert not smallest.delay
    path = store(smallest, seen, "memo", False, tmp_path)
    assert Program.from_json(json.dumps(json.loads(path.read_text())["program"])) == smallest


def test_the_oracle_sees_wrong_values_and_values_that_poison_changes(monkeypatch):
    from bench.fuzzing import oracle

    steps = oracle._steps

    def spoiled(by):
        def run(program, where, backend, options=None):
            found = steps(program, where, backend, options)
            wrong = backend is not None and ("verify" in (options or {}) if by == "poison" else True)
            return [(n, t + 1e-3 if wrong and t.is_floating_point() else t) for n, t in found]

        return run

    plainest = {key: values[0] for key, values in KINDS["linear"].choices.items()}
    layers = (Layer("linear", {**plainest, "activation": "sine"}),) * 2
    program = Program(1, layers, {key: values[0] for key, values in SHAPE.items()}, {"offload": "all"})
    monkeypatch.setattr(oracle, "STOCK", {"memo": "eager", "memo_eager": "eager"})
    monkeypatch.setattr(oracle, "_steps", spoiled("poison"))
    assert judge(program, "memo_eager").status == "poison"
    monkeypatch.setattr(oracle, "_steps", spoiled("all"))
    assert judge(program, "memo_eager").status in ("wrong", "torch")
