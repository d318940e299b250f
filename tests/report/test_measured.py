"""The second call of a graph, profiled; what runs here has no device, and the same file."""

import json

import torch

from memo_compile.report.dumps import Dump
from memo_compile.report.measured import profiled


def test_the_second_call_is_written_as_a_trace(tmp_path):
    path = tmp_path / "measured.trace.json"
    fn = profiled(lambda x: torch.mm(x, x), path)
    x = torch.eye(8)
    assert torch.equal(fn(x), x)
    assert not path.exists()
    assert torch.equal(fn(x), x)
    events = json.loads(path.read_text())["traceEvents"]
    assert any(e.get("name") == "aten::mm" and e["ph"] == "X" for e in events)
    path.unlink()
    fn(x)
    assert not path.exists()


def test_a_profiler_of_the_users_is_left_alone(tmp_path):
    fn = profiled(lambda: torch.ones(1), tmp_path / "trace.json")
    fn()
    with torch.autograd.profiler.profile(use_cpu=True):
        fn()
    assert not (tmp_path / "trace.json").exists()


def test_a_boxed_call_stays_one(tmp_path):
    def boxed(args):
        return args.pop()

    boxed._boxed_call = True
    assert profiled(boxed, tmp_path / "trace.json")._boxed_call


def test_without_a_device_nothing_is_wrapped(tmp_path):
    fn = lambda: None  # noqa: E731
    assert Dump(tmp_path).measured("forward", fn, torch.device("cpu")) is fn
    assert Dump(None).measured("forward", fn, torch.device("cuda")) is fn
    assert Dump(tmp_path).measured("forward", fn, torch.device("cuda")) is not fn
