"""Commands that go on with a run, draw it again and attack it."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hf_certify import CertificationReport, JournalError
from hf_certify.cli import app
from hf_certify.commands.runs import RunArguments
from hf_certify.journal import Journal, remove_journal
from hf_certify.storage import REPORT_FILE, write_report
from tests.certify import command_line
from tests.certify.conftest import make_vit_pipeline

# so many that a run lasts a few seconds
LONG = ["--sigma", "0.25", "--n", "16000", "--seed", "5", "--batch-size", "64", "--quiet"]
SHORT = ["--sigma", "0.25", "--n", "300", "--seed", "5", "--batch-size", "64", "--quiet"]


@pytest.fixture
def model_folder(tmp_path: Path, vit_pipeline) -> Path:
    vit_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def finished(model_folder, image_folder, tmp_path) -> Path:
    """The folder of a short run, and in it a journal and the arguments."""
    result = invoke("run", model_folder, image_folder, "--output", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def server():
    """Starts processes from one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.certify.command_line"])
    return context


def in_a_process(server, *arguments: object, kill_after: int | None = None) -> int:
    """Run a command to its end, or kill it once the journal has so many lines; return its exit code."""
    output = Path(arguments[arguments.index("--output") + 1] if "--output" in arguments else arguments[1])
    process = server.Process(target=command_line.run, args=([str(argument) for argument in arguments],))
    process.start()
    while kill_after is not None and process.is_alive():
        path = output / "journal" / "votes-0.txt"
        if path.exists() and path.read_bytes().count(b"\n") >= kill_after:
            process.kill()
        time.sleep(0.002)
    process.join(120)
    return process.exitcode


def test_a_run_that_was_killed_and_resumed_has_the_report_of_one_in_one_go(
    server, model_folder, image_folder, tmp_path
):
    """Oracle: the bytes of the report of a run that nobody stopped. It is killed twice, in the run and in a resume."""
    assert in_a_process(server, "run", model_folder, image_folder, "--output", tmp_path / "whole", *LONG) == 0
    output = tmp_path / "out"
    assert in_a_process(server, "run", model_folder, image_folder, "--output", output, *LONG, kill_after=5) == -9
    assert not (output / REPORT_FILE).exists()
    assert in_a_process(server, "resume", output, "--quiet", kill_after=12) == -9
    assert not (output / REPORT_FILE).exists()
    before = (output / "journal" / "votes-0.txt").read_bytes()
    assert in_a_process(server, "resume", output, "--quiet") == 0
    assert (output / REPORT_FILE).read_bytes() == (tmp_path / "whole" / REPORT_FILE).read_bytes()
    # what was known was not counted again
    after = (output / "journal" / "votes-0.txt").read_bytes()
    assert after.startswith(before.rpartition(b"\n")[0])
    assert after.count(b"\n") == (tmp_path / "whole" / "journal" / "votes-0.txt").read_bytes().count(b"\n")


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(finished):
    before = (finished / REPORT_FILE).read_bytes()
    result = invoke("resume", finished, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout == CertificationReport.load(finished).summary() + "\n"
    assert (finished / REPORT_FILE).read_bytes() == before


def test_a_run_resumes_from_another_folder_with_relative_names(model_folder, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("run", "model", "images", "--output", "out", *SHORT).exit_code == 0
    before = (tmp_path / "out" / REPORT_FILE).read_bytes()
    # the report is gone, the votes are not
    (tmp_path / "out" / REPORT_FILE).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = invoke("resume", Path("..") / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / REPORT_FILE).read_bytes() == before
    assert Path.cwd() == tmp_path / "elsewhere"


def test_without_a_seed_the_one_of_the_journal_goes_on(model_folder, image_folder, tmp_path):
    options = [option for option in SHORT if option not in ("--seed", "5")]
    assert invoke("run", model_folder, image_folder, "--output", tmp_path / "out", *options).exit_code == 0
    report = CertificationReport.load(tmp_path / "out")
    assert RunArguments.load(tmp_path / "out").settings["seed"] is None
    (tmp_path / "out" / REPORT_FILE).unlink()
    assert invoke("resume", tmp_path / "out").exit_code == 0
    assert CertificationReport.load(tmp_path / "out") == report


def test_an_interrupted_run_says_how_to_go_on_and_keeps_its_votes(model_folder, image_folder, tmp_path, monkeypatch):
    record, calls = Journal.record, []

    def interrupt(*arguments: object) -> None:
        record(*arguments)
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "record", interrupt)
    result = invoke("run", model_folder, image_folder, "--output", tmp_path / "out", *SHORT)
    assert result.exit_code != 0
    assert f"to go on: hf-certify resume {tmp_path / 'out'}" in result.stderr
    # the same command again is refused, and says the same
    again = invoke("run", model_folder, image_folder, "--output", tmp_path / "out", *SHORT)
    assert "must be empty or new" in again.stderr
    assert "hf-certify resume" in again.stderr
    assert invoke("resume", tmp_path / "out").exit_code == 0
    CertificationReport.load(tmp_path / "out").verify()
    assert len(calls) == 8


def test_overwriting_begins_a_new_journal(finished, model_folder, image_folder):
    first = CertificationReport.load(finished)
    options = [*SHORT, "--overwrite", "--seed", 6]
    assert invoke("run", model_folder, image_folder, "--output", finished, *options).exit_code == 0
    assert CertificationReport.load(finished).seed == 6 != first.seed


def test_a_journal_in_use_and_a_folder_that_is_none_are_not_overwritten(finished, model_folder, image_folder):
    arguments = ("run", model_folder, image_folder, "--output", finished, *SHORT, "--overwrite")
    header = json.loads((finished / "journal" / "header.json").read_text())
    with Journal(finished / "journal", {key: header[key] for key in ("config", "facts")}):
        assert "must not be deleted while a run is writing to it" in invoke(*arguments).stderr
    (finished / "journal" / "diary.txt").write_text("mine")
    assert "Only a journal may be deleted, got 'diary.txt'" in invoke(*arguments).stderr
    assert len(list((finished / "journal").iterdir())) == 4
    with pytest.raises(JournalError, match="Only a journal may be deleted"):
        remove_journal(finished)


def test_a_folder_without_a_run_or_with_a_damaged_one_is_refused(finished, tmp_path):
    assert "must hold a readable run.json" in invoke("resume", tmp_path).stderr
    for damaged in ("{", "[]", '{"schema": 9}', '{"schema": 1}', '{"schema": 1, "settings": {"sigma": -1}}'):
        (finished / "run.json").write_text(damaged)
        result = invoke("resume", finished)
        assert result.exit_code == 2
        assert "must hold a readable run.json" in result.stderr


def test_replay_confirms_a_run_from_its_folder_alone_and_with_everything_named(finished, model_folder, image_folder):
    result = invoke("replay", finished, "--k", 2, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("2 inputs drawn again (")
    assert result.stdout.endswith("400 votes each: all votes as in the report\n")
    os.unlink(finished / "run.json")
    named = invoke("replay", finished, image_folder, "--model", model_folder, "--seed", 3, "--quiet")
    assert named.exit_code == 0, named.output
    assert "Error: The folder of a run must hold a readable run.json" in invoke("replay", finished).stderr


def forge(report, index, estimation, selection=None):
    """Return the report as plain values, consistent in itself, with other votes for one input."""
    old = report.certificates[index]
    forged = old.from_counts(selection or old.selection, estimation, sigma=0.25, index=index, source=old.source)
    certificates = [certificate.to_dict() for certificate in report.certificates]
    certificates[index] = forged.to_dict()
    return report.to_dict() | {"certificates": certificates}


def test_replay_fails_for_votes_that_were_made_up_and_for_another_model(finished, tmp_path):
    report = CertificationReport.load(finished)
    votes = list(report.certificates[1].estimation)
    leader = votes.index(max(votes))
    votes[leader], votes[leader - 1] = votes[leader] - 9, votes[leader - 1] + 9
    write_report(finished, forge(report, 1, votes))
    assert invoke("report", finished).exit_code == 0
    result = invoke("replay", finished, "--quiet")
    assert result.exit_code == 2
    assert "Error: The votes of input 1, estimation, must be those of the report" in result.stderr
    write_report(finished, report.to_dict())
    make_vit_pipeline(image_mean=[0.4, 0.4, 0.4]).save_pretrained(tmp_path / "other")
    result = invoke("replay", finished, "--model", tmp_path / "other", "--quiet")
    assert "got another processor_config" in result.stderr


def test_attack_prints_the_gap_and_writes_its_evidence(finished, tmp_path):
    options = ["--steps", 3, "--samples", 8, "--n", 500, "--radii", 3.0, "--radii", 0.5, "--seed", 1, "--quiet"]
    result = invoke("attack", finished, *options, "--output", tmp_path / "attack.json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0", "0.5", "3"]
    assert lines[-1].startswith("inside certified radii 0 of ")
    stored = json.loads((tmp_path / "attack.json").read_text())
    assert stored["config"]["radii"] == [0.5, 3.0]
    assert all(sum(attempt["prediction"]["counts"]) == 500 for attempt in stored["attempts"])
    assert all(attempt["norm"] < attempt["radius"] for attempt in stored["attempts"])
    assert invoke("attack", finished, *options, "--box").exit_code == 0


def test_attack_fails_loudly_when_a_certificate_is_contradicted(finished):
    """A certificate for the class with the fewest votes, made up so that it passes ``report``."""
    report = CertificationReport.load(finished)
    honest = report.certificates[1]
    votes = [0, 0, 0]
    votes[honest.estimation.index(min(honest.estimation))] = honest.n
    write_report(finished, forge(report, 1, votes, selection=[vote // 3 for vote in votes]))
    assert invoke("report", finished).exit_code == 0
    result = invoke("attack", finished, "--n", 2000, "--steps", 2, "--quiet")
    assert result.exit_code == 2
    assert "inside certified radii 1 of" in result.stdout
    assert "got 1 of 4 certificates contradicted, the first for input 1: class" in result.stderr


def test_attack_refuses_other_images_and_settings_that_cannot_work(finished, image_folder):
    result = invoke("attack", finished, "--samples", 0, "--quiet")
    assert result.exit_code == 2
    assert "Error: samples must be an int >= 1, got 0" in result.stderr
    shutil.copy(image_folder / "0.png", image_folder / "1.png")
    result = invoke("attack", finished, "--quiet")
    assert result.exit_code == 2
    assert "Error: Input 1 must be the one that was certified" in result.stderr
