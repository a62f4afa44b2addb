"""Elastic Horovod: workers join, die and are taken away; the others train on, alike, and keep their residuals."""

import re
from collections import defaultdict
from dataclasses import dataclass

import pytest

from .launch import SCRIPTS, command_of, start

STEPS = 4  # that are awaited with every number of workers


@dataclass(frozen=True)
class Said:
    """One line that a worker printed."""

    what: str
    pid: int
    size: int
    step: int
    parameters: str
    residuals: str
    more: str


def said(output):
    """The lines of all workers, in order."""
    lines = re.findall(r">: ?(begin|step|commit|end) (\d+) (\d+) (\d+) (\w+) (\w+) ?(\S*)$", output, re.MULTILINE)
    return [Said(what, int(pid), int(size), int(step), *rest) for what, pid, size, step, *rest in lines]


class Hosts:
    """What the discovery script finds: two names of this machine, with so many slots; beside it, what workers find."""

    def __init__(self, directory):
        self._directory = directory
        self.script = directory / "discover.sh"
        self.script.write_text(f"#!/bin/sh\ncat '{directory}/hosts'\n")
        self.script.chmod(0o755)

    def have(self, localhost, loopback=1):
        self._write("hosts", f"localhost:{localhost}\n127.0.0.1:{loopback}\n")

    def tell_to_die(self, pid):
        self._write("die", str(pid))

    def _write(self, name, text):
        new = self._directory / "new"
        new.write_text(text)
        new.replace(self._directory / name)


def await_steps(job, size, after=0):
    """Wait until workers have made some steps at this size; returns what they said first there.

    after: the size that it had before, to tell its first time at this size from a later one.
    """
    before = rf">: ?begin \d+ {after} .*" if after else ""
    job.await_output(rf"(?s){before}(>: ?step \d+ {size} .*){{{STEPS * size}}}", 60)
    return [line for line in said(job.output()) if line.what == "begin" and line.size == size]


def start_elastic(directory, method):
    """Two workers, and the hosts that they run on."""
    hosts = Hosts(directory)
    hosts.have(localhost=1)
    command = command_of("horovod-gloo", 2, SCRIPTS / "elastic.py", "horovod", str(directory), method)
    place = command.index("-H")
    command[place : place + 2] = ["--min-np", "1", "--max-np", "4", "--host-discovery-script", str(hosts.script)]
    return hosts, start(command)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """What the workers say while they grow from 2 to 4, one of them is killed, and one is taken away."""
    directory = tmp_path_factory.mktemp("elastic")
    hosts, job = start_elastic(directory, "topk")
    try:
        await_steps(job, 2)
        hosts.have(localhost=3)
        workers = await_steps(job, 4)
        hosts.tell_to_die(next(worker.pid for worker in workers if worker.more == "127.0.0.1"))
        await_steps(job, 3)
        hosts.have(localhost=2)
        await_steps(job, 2, after=3)
        (directory / "stop").touch()
    finally:
        ended = job.end(30)
    return ended


def test_the_job_ends_well_with_the_workers_that_are_left(history):
    assert history.code == 0, str(history)
    assert history.left_behind == []
    assert [line.size for line in said(history.output) if line.what == "end"] == [2, 2]


def test_replicas_stay_bit_identical(history):
    parameters = defaultdict(set)
    for line in said(history.output):
        parameters[line.what == "begin", line.size, line.step].add(line.parameters)
    assert all(len(found) == 1 for found in parameters.values()), str(history)


def test_what_is_neither_sent_nor_kept_is_nothing_whatever_the_number_of_workers(history):
    steps = [line for line in said(history.output) if line.what == "step"]
    assert {line.size for line in steps} == {2, 3, 4}
    assert {line.more for line in steps} == {"sound"}, str(history)


def test_workers_keep_their_residuals_and_new_ones_start_with_none(history):
    kept = {}
    changes = 0
    for line in said(history.output):
        if line.what == "begin":
            assert line.residuals == kept.get(line.pid, "none"), str(history)
            changes += line.pid in kept
        if line.what == "commit":
            kept[line.pid] = line.residuals
    assert changes == 2 + 3 + 2  # survivors of growth, death and removal


def test_training_goes_on_from_the_last_commit(history):
    committed = 0
    for line in said(history.output):
        if line.what == "begin":
            assert line.step in (committed, committed - 1)  # a death may undo a step
        if line.what == "commit":
            committed = line.step


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """What the workers of DGC say while they shrink from 2 to 1, which has a momentum all the same, and grow again."""
    directory = tmp_path_factory.mktemp("lonely")
    hosts, job = start_elastic(directory, "dgc")
    try:
        workers = await_steps(job, 2)
        hosts.tell_to_die(next(worker.pid for worker in workers if worker.more == "127.0.0.1"))
        await_steps(job, 1)
        hosts.have(localhost=2)
        await_steps(job, 2, after=1)
        (directory / "stop").touch()
    finally:
        ended = job.end(30)
    return ended


def test_a_worker_that_is_left_alone_keeps_its_momentum(lonely):
    assert lonely.code == 0, str(lonely)
    steps = [line for line in said(lonely.output) if line.what == "step"]
    assert {line.size for line in steps} == {1, 2}
    assert {line.more for line in steps} == {"sound"}, str(lonely)
    kept = {}
    for line in said(lonely.output):
        if line.what == "begin":
            assert line.residuals == kept.get(line.pid, "none"), str(lonely)
        if line.what == "commit":
            assert line.residuals != kept.get(line.pid), str(lonely)
            kept[line.pid] = line.residuals
