"""What takes over two seconds shows what it is doing; what does not is silent."""

import io
import logging
import time

from rich.console import Console

from memo_compile.progress import Progress

LONG = 3600.0  # seconds


def shown(progress):
    """Whether the timer has gone off, within a time."""
    for _ in range(200):
        if progress._shows:
            return True
        time.sleep(0.01)
    return False


def test_what_is_soon_done_is_silent(caplog):
    with caplog.at_level(logging.INFO, logger="memo_compile"), Progress("graph_0", LONG) as progress:
        progress.step("planning")
    assert not caplog.text


def test_elsewhere_the_log_says_the_step_under_way_and_each_after_it(caplog):
    with caplog.at_level(logging.INFO, logger="memo_compile"):
        with Progress("graph_0", 0.05) as progress:
            progress.step("planning")
            assert shown(progress)
            progress.step("planning")
            progress.step("lowering")
        progress.step("nothing")
    said = [record.message.partition(" (")[0] for record in caplog.records]
    assert said == ["graph_0: planning", "graph_0: lowering"]


def test_a_terminal_gets_a_line_that_goes_away():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with Progress("graph_0", 0.01, console) as progress:
        progress.step("planning")
        assert shown(progress)
        progress.step("lowering")
    assert "memo, graph_0: " in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # the line is empty
