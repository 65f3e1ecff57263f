"""What a person sees of work that takes seconds: one line that is drawn over, and in a log hardly any."""

import io
import json

import pytest

from uncork.lab import terminal
from uncork.lab.run import progress
from uncork.lab.run.progress import Meter, Stage, announce, listening, tell_terminal, told


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_meter_says_what_is_left_and_nothing_of_what_is_quick(clock):
    heard: list[Stage] = []
    with listening(heard.append):
        for _ in told(range(3), "quick", 3):
            clock[0] += 0.2
        assert heard == []
        for _ in told(range(4), "slow", 4):
            clock[0] += 2.0
    assert [(stage.share, stage.seconds_left) for stage in heard] == [(0.25, 6.0), (0.5, 4.0), (0.75, 2.0), (1.0, 0.0)]
    assert str(heard[0]) == "slow   25 %  00:06 left"


def test_work_that_was_done_before_does_not_count_as_speed(clock):
    heard: list[Stage] = []
    with listening(heard.append):
        meter = Meter("training")
        meter(50, 100)
        clock[0] += 10.0
        meter(60, 100)
    assert heard == [Stage("training", 0.6, 40.0)]


def test_a_library_is_quiet_where_nobody_listens(clock, capsys):
    for _ in told(range(3), "slow", 3):
        clock[0] += 40.0
    announce("something")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_line_is_drawn_over_and_stdout_stays_alone(monkeypatch, capsys):
    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    tell_terminal(Stage("evaluating", 0.5, 3.0), "plif-seed0")
    terminal.say(json.dumps({"done": True}))
    assert err.getvalue() == "\r\x1b[Kplif-seed0: evaluating   50 %  00:03 left" + "\r\x1b[K"
    assert capsys.readouterr().out == '{"done": true}\n'


@pytest.mark.parametrize("silent", [5.0, 31.0])
def test_in_a_log_it_is_a_line_only_after_long_silence(silent, monkeypatch, capsys):
    monkeypatch.setattr(progress, "silent_seconds", lambda: silent)
    tell_terminal(Stage("evaluating", 0.5, 3.0))
    assert capsys.readouterr() == ("evaluating   50 %  00:03 left\n" if silent > 30 else "", "")
