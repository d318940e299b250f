"""How large is the report of a deep model, and how fast does it open? A real dump, from dry runs of Inductor.

    python -m bench.report [--layers 32] [--width 64] [--tokens 512] [--loads 5]

Opening is measured until all pictures are drawn, in headless Chromium where it is installed with its driver
(Debian's `chromium` and `chromium-driver`); the fastest of `--loads`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import memo_compile
from bench.common import save
from memo_compile.logs import MIB
from memo_compile.models import Llama, LlamaConfig
from memo_compile.report.page import page, read_reports


def dump(layers: int, width: int, tokens: int, folder: Path) -> None:
    """Dump a model without running a step."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=64, layers=layers, width=width, heads=4, kv_heads=2, ffn=3 * width))
    x = torch.randint(0, 64, (1, tokens))
    memo_compile.explain(model, x, labels=x, options={"memory_budget": 0.5, "dump": str(folder)})


def opened(path: Path, loads: int) -> float | None:
    """Seconds from asking for the page until it can be used; None without a browser."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        return None
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1300"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        seconds = []
        for _ in range(loads):
            browser.get(path.as_uri())
            seconds.append(float(browser.execute_script("return memoReport.ready / 1000")))
        return min(seconds)
    finally:
        browser.quit()


def main() -> None:
    """Dump, build the page, open it, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--loads", type=int, default=5)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dump(a.layers, a.width, a.tokens, folder)
        path = folder / "report.html"
        started = time.perf_counter()
        path.write_text(page(read_reports(folder)), encoding="utf-8")
        building = time.perf_counter() - started
        (data,) = folder.glob("*/report.json")
        report = json.loads(data.read_text())
        row: dict[str, Any] = {
            "layers": a.layers,
            "tensors": len(report["before"]["tensors"]) + len(report["after"]["tensors"]),
            "dump_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f != path),
            "page_bytes": path.stat().st_size,
            "building_seconds": building,
            "opening_seconds": opened(path, a.loads),
        }
    opening = "no browser" if row["opening_seconds"] is None else f"{row['opening_seconds']:.2f}"
    cells = [str(row["layers"]), str(row["tensors"])]
    cells += [f"{row[key] / MIB:.2f}" for key in ("dump_bytes", "page_bytes")]
    cells += [f"{row['building_seconds']:.2f}", opening]
    heads = "| layers | tensors | dump MiB | page MiB | building the page s | opening it s |"
    table = "\n".join([heads, "|---" * len(cells) + "|", "| " + " | ".join(cells) + " |"])
    print(table)
    save("report", " ".join(["python -m bench.report", *sys.argv[1:]]), [row], table)


if __name__ == "__main__":
    main()
