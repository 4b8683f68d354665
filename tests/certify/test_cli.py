"""The command line on a saved model and a folder of images."""

import json
import os
from pathlib import Path

import pytest
from transformers.utils import logging
from typer.testing import CliRunner, Result

from hf_certify import CertificationReport, certify_pipeline
from hf_certify.cli import app
from hf_certify.commands.common import image_files
from hf_certify.storage import REPORT_FILE, write_report


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
    values = json.loads((tmp_path / "out" / REPORT_FILE).read_bytes())
    values["certificates"][2]["estimation"] = [0, 0, 300]
    values["certificates"][2]["radius"] = 0.5
    write_report(tmp_path / "out", values)
    result = invoke("report", tmp_path / "out")
    assert result.exit_code == 2
    assert "Error: Certificate 2 must follow from its votes" in result.stderr
    assert result.stdout == ""


def test_quiet_shows_no_progress(model_folder, image_folder, tmp_path):
    assert "draw" in run(model_folder, image_folder, tmp_path / "a").stderr
    assert run(model_folder, image_folder, tmp_path / "b", "--quiet").stderr == ""
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", 2], "alpha must be in (0, 1), got 2.0"),
        (["--interval", "wald"], "interval must be one of"),
        (["--seed", "x"], "--seed must be an int, got 'x'"),
        (["--batch-size", "big"], "--batch-size must be an int, got 'big'"),
        (["--n0", 0], "n0 must be an int >= 1, got 0"),
        (["--sigma", 1e-4], "sigma must be at least 0.0002441 for values up to 1, got 0.0001"),
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
    assert "--overwrite" in result.stderr


def test_a_folder_without_images_and_a_folder_without_report_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "must hold files with one of" in run(tmp_path / "never-loaded", tmp_path / "empty", tmp_path / "out").stderr
    assert "must hold a readable report.json" in invoke("report", tmp_path / "empty").stderr


def test_a_folder_that_is_not_a_model_is_refused(image_folder, tmp_path):
    (tmp_path / "model").mkdir()
    result = run(tmp_path / "model", image_folder, tmp_path / "out")
    assert result.exit_code == 2
    assert "Error: MODEL must be an image classifier saved with its processor" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_weights_file_ends_in_one_sentence_and_leaves_no_folder(model_folder, image_folder, tmp_path):
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    result = run(model_folder, image_folder, tmp_path / "a" / "b", "--quiet")
    assert result.exit_code == 2
    assert "Error: MODEL must be an image classifier saved with its processor" in result.stderr
    assert not (tmp_path / "a").exists()


def test_a_model_without_a_head_is_refused_instead_of_getting_a_random_one(
    model_folder, image_folder, tmp_path, vit_pipeline
):
    vit_pipeline.model.vit.save_pretrained(model_folder)
    result = run(model_folder, image_folder, tmp_path / "out", "--quiet")
    assert result.exit_code == 2
    assert "without the weights ['classifier.bias', 'classifier.weight']" in result.stderr


def test_an_interrupted_run_leaves_no_folder_of_its_own_and_keeps_that_of_the_user(
    model_folder, image_folder, tmp_path, monkeypatch
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_certify.commands.runs.certify_pipeline", interrupt)
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        assert run(model_folder, image_folder, tmp_path / name, "--quiet").exit_code != 0
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine").exists()


def test_a_stray_file_that_comes_in_during_the_run_does_not_cost_it(model_folder, image_folder, tmp_path, monkeypatch):
    def certify_with_company(*arguments: object, **settings: object) -> CertificationReport:
        (tmp_path / "out" / ".DS_Store").write_text("")
        return certify_pipeline(*arguments, **settings)

    monkeypatch.setattr("hf_certify.commands.runs.certify_pipeline", certify_with_company)
    assert run(model_folder, image_folder, tmp_path / "out", "--quiet").exit_code == 0
    CertificationReport.load(tmp_path / "out").verify()


def test_images_that_do_not_exist_are_refused_before_the_model_is_loaded(tmp_path):
    result = run(tmp_path / "never-loaded", tmp_path / "nowhere.png", tmp_path / "out")
    assert result.exit_code == 2
    assert "Error: IMAGES must be files or folders that exist, got" in result.stderr


def test_a_folder_named_like_an_image_is_left_out(image_folder):
    (image_folder / "x.png").mkdir()
    assert [file.name for file in image_files([image_folder])] == ["0.png", "1.png", "2.png", "3.png"]


def test_version_is_that_of_the_distribution():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("hf-certify ")


def test_a_file_name_that_is_not_utf8_can_be_printed(model_folder, tmp_path, images):
    folder = tmp_path / "images"
    folder.mkdir()
    images[0].save(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    assert run(model_folder, folder, tmp_path / "out", "--quiet").exit_code == 0
    shown = invoke("report", tmp_path / "out")
    assert shown.exit_code == 0
    assert r"caf\udce9.png" in shown.stdout
