"""Progress: what a log shows, what a terminal shows, and that neither eats what others print."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

from pipelines.lib.progress import WINDOW_S, Progress, clock_text


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_log_gets_one_plain_line_every_few_seconds_and_the_last_one():
    clock, log = Clock(), io.StringIO()
    with Progress(100, "steps", "train", file=log, every_s=5, clock=clock) as progress:
        for step in range(1, 101):
            clock.now = step * 0.2
            progress.update(step, loss=f"{5 - step / 100:.2f}")
    assert log.getvalue().splitlines() == [
        "train: 25/100 steps (25 %), 5/s, ETA 0:15, loss 4.75",
        "train: 50/100 steps (50 %), 5/s, ETA 0:10, loss 4.50",
        "train: 75/100 steps (75 %), 5/s, ETA 0:05, loss 4.25",
        "train: 100/100 steps (100 %), 5/s, ETA 0:00, loss 4.00",
    ]


def test_rate_forgets_a_slow_start():
    clock = Clock()
    progress = Progress(None, "tokens", "tokenize", file=io.StringIO(), clock=clock)
    assert progress.rate is None and progress.eta_s is None
    progress.update(0)
    clock.now = 1000.0
    progress.update(10)
    for _ in range(2 * int(WINDOW_S)):
        clock.now += 1
        progress.update(progress.done + 500)
    assert progress.rate == 500


def test_the_rate_is_that_of_the_work_and_not_of_its_news():
    clock, log = Clock(), io.StringIO()
    progress = Progress(100, "steps", "train", file=log, every_s=0, clock=clock)
    for step in range(1, 41):  # all of them read at once
        progress.update(step, time=1000 + step * 0.25)
    assert progress.rate == 4 and progress.eta_s == 15
    progress.update(5, time=900.0)  # begun again
    assert progress.rate is None
    without = Progress(100, "steps", "train", file=log, clock=clock)
    for step in range(1, 41):
        clock.now += 1e-6
        without.update(step)
    assert without.rate is None and without.eta_s is None


def test_without_a_total_only_the_count_is_shown():
    log = io.StringIO()
    with Progress(None, "documents", "read", file=log) as progress:
        progress.update(1234)
    assert log.getvalue() == "read: 1,234 documents\n"


def test_nothing_done_shows_nothing():
    log = io.StringIO()
    with Progress(0, "steps", "train", file=log):
        pass
    assert log.getvalue() == ""


def test_durations_read_like_a_clock():
    assert [clock_text(s) for s in (7, 61.4, 3723, 90061)] == ["0:07", "1:01", "1:02:03", "25:01:01"]


def test_on_a_terminal_prints_stay_whole_above_the_bar():
    script = (
        "from pipelines.lib.progress import Progress\nimport time\n"
        "with Progress(40, 'steps', 'train') as progress:\n"
        "    for step in range(1, 41):\n"
        "        progress.update(step, loss='1.0')\n"
        "        if step % 10 == 0: print(f'sample {step}: [bold]once upon a time[/bold]')\n"
        "        time.sleep(0.02)\n"
    )
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "110"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=child, stderr=child, env=env)
    os.close(child)
    shown = b""
    while True:
        try:
            block = os.read(parent, 1 << 16)
        except OSError:  # Linux's way to say that the other side is gone
            break
        if not block:
            break
        shown += block
    assert process.wait() == 0
    os.close(parent)
    text = shown.decode()
    for step in (10, 20, 30, 40):
        assert f"sample {step}: [bold]once upon a time[/bold]" in text
    assert "40/40" in text and "\x1b[" in text  # drawn, and redrawn in place


def test_piped_output_stays_in_the_pipe_while_the_bar_is_on_the_terminal():
    script = (
        "from pipelines.lib.progress import Progress\n"
        "with Progress(2, 'steps', 'train') as progress:\n"
        "    progress.update(1)\n    print('result')\n    progress.update(2)\n"
    )
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=child, env=env)
    os.close(child)
    assert process.communicate(timeout=60)[0] == b"result\n"
    assert process.returncode == 0
    os.close(parent)
