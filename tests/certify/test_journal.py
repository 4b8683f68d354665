"""Votes on disk: nothing is lost or counted twice, whatever interrupts a run."""

import json
import multiprocessing
import random
import re

import numpy as np
import pytest

from hf_certify import CertificationReport, JournalError
from hf_certify.journal import Journal
from hf_certify.noise import Stage
from tests.certify import crashing

HEADER = {"config": {"seed": 1}, "facts": {"model": "net"}}
KILLS = 20


def record_some(folder):
    with Journal(folder, HEADER) as journal:
        journal.record(0, Stage.SELECTION, 0, 10, np.array([7, 3]))
        journal.record(0, Stage.ESTIMATION, 0, 100, np.array([60, 40]))
        journal.record(0, Stage.ESTIMATION, 100, 50, np.array([20, 30]))
    return folder / "votes-0.txt"


def known(folder, rank=0):
    with Journal(folder, HEADER, rank=rank) as journal:
        return {key: (sample.draws, sample.counts.tolist()) for key, sample in journal.samples().items()}


EVERYTHING = {(0, Stage.SELECTION): (10, [7, 3]), (0, Stage.ESTIMATION): (150, [80, 70])}


def test_what_was_recorded_is_known_again(tmp_path):
    record_some(tmp_path)
    assert known(tmp_path) == EVERYTHING


def test_a_record_cut_off_at_any_byte_is_dropped_and_the_rest_is_kept(tmp_path):
    path = record_some(tmp_path)
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    without = EVERYTHING | {(0, Stage.ESTIMATION): (100, [60, 40])}
    for cut in range(last, len(content)):
        path.write_bytes(content[:cut])
        assert known(tmp_path) == without
        assert path.read_bytes() == content[:last]
    # what is lost can be recorded again
    with Journal(tmp_path, HEADER) as journal:
        journal.record(0, Stage.ESTIMATION, 100, 50, np.array([20, 30]))
    assert known(tmp_path) == EVERYTHING


@pytest.mark.parametrize("position", [0, 70, 100])
def test_a_changed_byte_anywhere_but_in_the_last_record_is_refused(tmp_path, position):
    path = record_some(tmp_path)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalError, match="damaged line 1 of 3"), Journal(tmp_path, HEADER) as journal:
        journal.samples()


def test_records_that_leave_draws_out_or_repeat_them_are_refused(tmp_path):
    path = record_some(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in ([lines[0], lines[2]], [*lines, lines[1]]):
        path.write_bytes(b"".join(wrong))
        with pytest.raises(JournalError, match="must follow one another"), Journal(tmp_path, HEADER) as journal:
            journal.samples()


def test_votes_that_do_not_add_up_to_their_draws_are_refused(tmp_path):
    with Journal(tmp_path, HEADER) as journal:
        journal.record(0, Stage.SELECTION, 0, 11, np.array([7, 3]))
        with pytest.raises(JournalError, match="must follow one another"):
            journal.samples()


def test_another_run_is_refused_with_the_name_of_what_differs(tmp_path):
    record_some(tmp_path)
    with pytest.raises(JournalError, match=re.escape("another config.seed (2 instead of 1)")):
        Journal(tmp_path, HEADER | {"config": {"seed": 2}})


def test_a_second_writer_is_refused_and_a_later_one_is_not(tmp_path):
    with Journal(tmp_path, HEADER):
        with pytest.raises(JournalError, match="Only one run may write"):
            Journal(tmp_path, HEADER)
        # another process of the same run has a file of its own
        Journal(tmp_path, HEADER, rank=1).close()
    assert known(tmp_path) == {}


def test_votes_without_a_header_and_a_header_that_is_none_are_refused(tmp_path):
    path = record_some(tmp_path)
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(JournalError, match=r"readable header\.json"):
        Journal(tmp_path, HEADER)
    (tmp_path / "header.json").unlink()
    with pytest.raises(JournalError, match=r"must lie beside a header\.json"):
        Journal(tmp_path, HEADER)
    assert path.exists()


@pytest.fixture(scope="module")
def server():
    """Starts processes from one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.certify.crashing"])
    return context


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("whole")
    process = server.Process(target=crashing.run, args=(str(folder),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return (folder / "report" / "report.json").read_bytes()


def interrupted_runs(server, folder, kill):
    """Run until it ends by itself; return how often it was stopped before."""
    stops = 0
    while True:
        begun = server.Event()
        crash_at, wait = kill(stops)
        process = server.Process(target=crashing.run, args=(str(folder), begun, crash_at))
        process.start()
        begun.wait()
        if wait is not None:
            process.join(wait)
            process.kill()
        process.join()
        if process.exitcode == 0:
            return stops
        assert process.exitcode == -9
        stops += 1


def test_killed_at_random_moments_it_ends_with_the_same_report(server, uninterrupted, tmp_path):
    """Oracle: the bytes of a run that nobody interrupted."""
    moments = random.Random(0)
    done, number = 0, 0
    while done < KILLS:
        folder = tmp_path / str(number)
        # no more than a few stops for each run, or it would be over before
        done += interrupted_runs(
            server, folder, lambda stops: (None, moments.uniform(0.0, 0.4) if stops < 7 else None)
        )
        assert (folder / "report" / "report.json").read_bytes() == uninterrupted
        number += 1
    report = CertificationReport.load(folder / "report")
    report.verify()
    assert json.loads((folder / "report" / "run_info.json").read_text())["processes"] == 1


def test_killed_between_write_and_sync_it_ends_with_the_same_report(server, uninterrupted, tmp_path):
    """Negative control inside: every such run was really stopped, by its own hand."""
    stops = interrupted_runs(server, tmp_path, lambda stops: (4 if stops < 6 else None, None))
    assert stops == 6
    assert (tmp_path / "report" / "report.json").read_bytes() == uninterrupted
