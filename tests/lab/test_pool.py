"""The workers: however one ends, the others go on and nothing is lost."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from uncork.lab.errors import LabError
from uncork.lab.run.pool import Event, Job, TimeLeft, run_jobs
from uncork.lab.run.progress import Progress


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The workers find this module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


def square(number, tell):
    tell(number)
    return number * number, os.getpid(), torch.get_num_threads()


def fail(error, tell):
    raise error


def kill_itself(tell):
    os.kill(os.getpid(), signal.SIGKILL)


def wait(tell):
    tell("waiting")
    time.sleep(60)


def run(jobs, **options):
    events: list[Event] = []
    failed = run_jobs(jobs, **{"workers": 2, "threads": 1, "on_event": events.append, **options})
    return {event.name: event.outcome for event in events if event.kind == "done"}, failed, events


@pytest.mark.parametrize(
    ("options", "processes"),
    [({}, 3), ({"fresh": False}, 2), ({"workers": 1, "fresh": False}, 1)],
)
def test_every_job_is_done_once_in_as_many_processes_as_asked_for(options, processes):
    outcomes, failed, events = run([Job(f"job {i}", partial(square, i)) for i in range(3)], **options)
    assert failed == {}
    assert [outcomes[f"job {i}"][0] for i in range(3)] == [0, 1, 4]
    assert len({pid for _, pid, _ in outcomes.values()}) <= processes
    assert {threads for *_, threads in outcomes.values()} == {1}
    assert sorted(event.progress for event in events if event.kind == "progress") == [0, 1, 2]
    here = os.getpid() in {pid for _, pid, _ in outcomes.values()}
    assert here == (options == {"workers": 1, "fresh": False})
    if options.get("fresh", True):
        assert len({pid for _, pid, _ in outcomes.values()}) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_is_named_and_the_others_go_on(workers, capfd):
    jobs = [
        Job("user", partial(fail, LabError("no such text"))), Job("ours", partial(fail, TypeError("a mistake"))),
        Job("good", partial(square, 3)),
    ]  # fmt: skip
    outcomes, failed, _ = run(jobs, workers=workers, fresh=False)
    assert failed == {"user": "no such text", "ours": "TypeError: a mistake"}
    assert outcomes["good"][0] == 9
    assert capfd.readouterr().err.count("Traceback") == 1  # of our mistake alone


@pytest.mark.parametrize("fresh", [False, True])
def test_a_process_that_is_killed_fails_its_job_alone(fresh):
    jobs = [Job("killed", kill_itself), *(Job(f"job {i}", partial(square, i)) for i in range(2))]
    outcomes, failed, _ = run(jobs, workers=1 + (not fresh), fresh=fresh)
    assert failed == {"killed": "its process was killed (SIGKILL); was the memory full?"}
    assert len(outcomes) == 2


def test_ctrl_c_ends_the_workers():
    heard = []

    def interrupt(event):
        heard.append(event)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Job("a", wait), Job("b", wait)], on_event=interrupt)
    assert [event.progress for event in heard] == ["waiting"]


def test_time_left_counts_what_was_done_in_this_session(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("uncork.lab.run.pool.time.monotonic", lambda: now[0])
    left = TimeLeft({"a": 1.0, "b": 1.0})

    def at(step):
        return Event("a", "progress", Progress(step, 100, 0.0, 1.0, None, 1.0, 0.0))

    assert left.update(at(0)) is None
    now[0] = 10.0
    assert left.update(at(50)) == pytest.approx(30.0)
    assert left.update(Event("a", "done")) == pytest.approx(10.0)


def test_time_left_weighs_the_jobs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("uncork.lab.run.pool.time.monotonic", lambda: now[0])
    left = TimeLeft({"large": 3.0, "small": 1.0})
    now[0] = 30.0
    assert left.update(Event("large", "done", outcome={})) == pytest.approx(10.0)
