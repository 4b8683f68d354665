"""The command line on a saved model and a folder of images."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hf_certify import CertificationReport
from hf_certify.cli import app
from hf_certify.storage import REPORT_FILE


@pytest.fixture
def model_folder(tmp_path: Path, vit_pipeline) -> Path:
    vit_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(model: Path, images: Path, output: Path, *options: object) -> Result:
    return invoke("run", model, images, "--sigma", 0.25, "--n", 300, "--output", output, *options)


def test_run_then_report_certifies_a_folder_and_prints_it_verified(model_folder, image_folder, tmp_path):
    result = run(
        model_folder, image_folder, tmp_path / "out", "--seed", 2**127, "--interval", "cpm", "--batch-size", 50
    )
    assert result.exit_code == 0, result.output
    assert "4 inputs, sigma 0.25, interval cpm" in result.stdout
    report = CertificationReport.load(tmp_path / "out")
    assert (report.seed, report.config.batch_size, report.config.interval) == (2**127, 50, "cpm")
    assert [Path(certificate.source).name for certificate in report.certificates] == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
    ]
    shown = invoke("report", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "4 certificates recomputed from their votes" in shown.stdout
    assert shown.stdout.endswith(report.summary() + "\n")


def test_report_refuses_tampered_votes(model_folder, image_folder, tmp_path):
    run(model_folder, image_folder, tmp_path / "out", "--quiet")
    path = tmp_path / "out" / REPORT_FILE
    values = json.loads(path.read_text())
    values["certificates"][2]["estimation"] = [0, 0, 300]
    values["certificates"][2]["radius"] = 0.5
    path.write_text(json.dumps(values))
    result = invoke("report", tmp_path / "out")
    assert result.exit_code == 2
    assert "Error: Certificate 2 must follow from its votes" in result.stderr
    assert result.stdout == ""


def test_quiet_shows_no_progress(model_folder, image_folder, tmp_path):
    assert "draw" in run(model_folder, image_folder, tmp_path / "a").stderr
    assert "draw" not in run(model_folder, image_folder, tmp_path / "b", "--quiet").stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", 2], "alpha must be in (0, 1), got 2.0"),
        (["--interval", "wald"], "interval must be one of"),
        (["--seed", "x"], "--seed must be an int, got 'x'"),
        (["--batch-size", "big"], "--batch-size must be an int, got 'big'"),
        (["--n0", 0], "n0 must be an int >= 1, got 0"),
    ],
)
def test_mistakes_end_in_one_sentence_and_write_nothing(options, message, image_folder, tmp_path):
    result = run(tmp_path / "never-loaded", image_folder, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert f"Error: {message}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_occupied_output_folder_is_refused_before_the_model_is_loaded(image_folder, tmp_path):
    result = run(tmp_path / "never-loaded", image_folder, image_folder)
    assert result.exit_code == 2
    assert "must be empty or new" in result.stderr


def test_a_folder_without_images_and_a_folder_without_report_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "must hold files with one of" in run(tmp_path / "never-loaded", tmp_path / "empty", tmp_path / "out").stderr
    assert "must hold a readable certification.json" in invoke("report", tmp_path / "empty").stderr


def test_a_folder_that_is_not_a_model_is_refused(image_folder, tmp_path):
    (tmp_path / "model").mkdir()
    result = run(tmp_path / "model", image_folder, tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
