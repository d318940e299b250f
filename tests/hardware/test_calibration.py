"""How long measuring a GPU takes, by a clock that its ops move: no card is needed to count them."""

from types import SimpleNamespace

import torch

from memo_compile.hardware import calibration
from memo_compile.hardware.profiles import PROFILES

RATES = {torch.float64: 25e12, torch.float32: 20e12, torch.bfloat16: 300e12, torch.float16: 300e12}  # FLOP/s, slow ones
SHARE = 0.1  # of them that attention reaches
LAUNCH = 10e-6  # seconds
COPY = 2**30 / 10e9  # seconds of a slow link


def test_a_gpu_is_measured_in_less_than_a_minute(monkeypatch):
    clock = [0.0]

    def op(seconds):
        def run():
            clock[0] += max(LAUNCH, seconds)

        return run

    def seconds(of):
        return calibration._seconds("cuda", op(of))

    def matmul(device, rows, width, dtype):
        flops = 2.0 * rows * width**2
        return calibration.Rate(flops, flops / seconds(flops / RATES[dtype]))

    def attention(device, heads, tokens, dtype):
        one = 2.0 * heads * tokens * tokens * calibration.HEAD / 2
        return seconds(2 * one / RATES[dtype] / SHARE), seconds(5 * one / RATES[dtype] / SHARE)

    def copies(device):
        return 2**30 / seconds(COPY), 2**30 / seconds(COPY), COPY / seconds(COPY)

    for name, fake in (("_matmul", matmul), ("_attention", attention), ("_copies", copies)):
        monkeypatch.setattr(calibration, name, fake)
    monkeypatch.setattr(calibration, "_bandwidth", lambda device: 2**31 / seconds(2**31 / 1e12))
    monkeypatch.setattr(calibration, "_launch", lambda device: seconds(100 * LAUNCH) / 100)
    monkeypatch.setattr(calibration, "_wait", lambda device: None)
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(calibration, "built_in", lambda device: PROFILES["h200"])
    monkeypatch.setattr(calibration, "machine_name", lambda device: "a card")
    memory = SimpleNamespace(total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    found = calibration.measure("cuda")
    assert 10 < clock[0] < 30  # 19 here; what is left of the minute is for what makes the operands
    assert found.memory == memory.total_memory
    assert [heads for heads, _ in found.attention_by_heads] == [1, calibration.HEADS, 32]
    assert [rows for rows, _ in found.matmuls_by_rows] == [128, 512, 2048, 16384]
