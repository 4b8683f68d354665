"""Runs that several processes share: the same report as one process, however they are interrupted and continued."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_certify.cli import app
from tests.certify import crashing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server():
    """Starts processes from one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.certify.crashing"])
    return context


def share(server, folder, count, *, journal=True, kill_after=None):
    """Certify in so many processes; kill all of them once the journal has so many lines. Return their exit codes."""
    folder.mkdir(exist_ok=True)
    store = folder / f"store-{len(list(folder.iterdir()))}"
    processes = [
        server.Process(target=crashing.run_as, args=(rank, count, str(store), str(folder), journal))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    while kill_after is not None and all(process.is_alive() for process in processes):
        if recorded(folder) >= kill_after:
            for process in processes:
                process.kill()
        time.sleep(0.002)
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def recorded(folder):
    return sum(path.read_bytes().count(b"\n") for path in (folder / "journal").glob("votes-*.txt"))


def outcome(folder):
    """Return the bytes of the report, and by how many processes it was made."""
    run_info = json.loads((folder / "report" / "run_info.json").read_text())
    return (folder / "report" / "report.json").read_bytes(), run_info["processes"]


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert share(server, folder, 1, journal=False) == [0]
    return outcome(folder)[0]


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_processes_have_the_report_of_one(server, alone, tmp_path, count, journal):
    assert share(server, tmp_path, count, journal=journal) == [0] * count
    assert outcome(tmp_path) == (alone, count)
    files = sorted((tmp_path / "journal").glob("votes-*.txt"))
    assert len(files) == (count if journal else 0)
    for rank, path in enumerate(files):
        inputs = {json.loads(line[65:])["input"] for line in path.read_text().splitlines()}
        assert inputs == set(range(rank, crashing.INPUTS, count))


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (2, 3)])
def test_a_killed_run_goes_on_in_another_number_of_processes(server, alone, tmp_path, first, second):
    """Negative control inside: the first run was stopped, and its votes were kept."""
    assert share(server, tmp_path, first, kill_after=9) == [-9] * first
    assert not (tmp_path / "report").exists()
    kept = recorded(tmp_path)
    assert share(server, tmp_path, second) == [0] * second
    assert outcome(tmp_path) == (alone, second)
    # a selection sample of 100 draws is one record, an estimation sample of 20,000 is five
    assert kept >= 9
    assert recorded(tmp_path) == 6 * crashing.INPUTS


def test_processes_share_an_attack_and_find_what_one_finds(server, tmp_path):
    assert share(server, tmp_path, 1) == [0]
    for count in (1, 2):
        processes = [
            server.Process(target=crashing.attack_as, args=(rank, count, str(tmp_path / f"at-{count}"), str(tmp_path)))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * count
    one, first, second = ((tmp_path / f"attack-{name}.json").read_bytes() for name in ("1-0", "2-0", "2-1"))
    assert one == first == second
    assert len(json.loads(one)["attempts"]) > crashing.INPUTS


def test_under_accelerate_launch_the_command_line_has_the_report_of_one_process(vit_pipeline, image_folder, tmp_path):
    """Oracle: the command line in this process. ``--multi_gpu`` means several processes, here on processors."""
    vit_pipeline.save_pretrained(tmp_path / "model")
    arguments = ["run", str(tmp_path / "model"), str(image_folder), "--sigma", "0.25", "--n", "500", "--seed", "5"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "alone"), "--quiet"])
    assert result.exit_code == 0, result.output
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    launched = subprocess.run(
        [
            sys.executable,
            "-m",
            *launch,
            "-m",
            "hf_certify",
            *arguments,
            "--output",
            str(tmp_path / "shared"),
            "--quiet",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("4 inputs, sigma 0.25") == 1
    assert (tmp_path / "shared" / "report.json").read_bytes() == (tmp_path / "alone" / "report.json").read_bytes()
    assert json.loads((tmp_path / "shared" / "run_info.json").read_text())["processes"] == 2
