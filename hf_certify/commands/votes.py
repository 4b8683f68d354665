"""Commands that draw votes for a report that exists: to confirm them, and to attack what they certify."""

from pathlib import Path
from typing import Annotated

import typer

from hf_certify.attack import attack as attack_report
from hf_certify.attack_report import AttackConfig
from hf_certify.commands.common import errors_as_messages, image_files, to_int
from hf_certify.commands.runs import RunArguments
from hf_certify.loading import load_pipeline
from hf_certify.processes import Processes
from hf_certify.replay import replay as replay_report
from hf_certify.report import CertificationReport
from hf_certify.storage import encode_report, replace_file

_Folder = Annotated[Path, typer.Argument(help="Folder written by hf-certify run.")]
_Images = Annotated[list[Path] | None, typer.Argument(help="All images of the run; without them those it names.")]
_Model = Annotated[str | None, typer.Option(help="Folder or hub id; without it the one that the run names.")]
_Seed = Annotated[str | None, typer.Option(help="Root of all randomness; without it 128 bits from the system.")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def replay(
    folder: _Folder,
    images: _Images = None,
    model: _Model = None,
    k: Annotated[int, typer.Option(help="How many images, chosen at random, are drawn again.")] = 8,
    tolerance: Annotated[float, typer.Option(help="Share of votes that may differ on another machine.")] = 1e-4,
    seed: _Seed = None,
    quiet: _Quiet = False,
) -> None:
    """Draw the votes of some images again and compare them with the report; fails if they are others."""
    with errors_as_messages():
        report = CertificationReport.load(folder)
        name, paths = _certified(folder, model, images)
        root = None if seed is None else to_int("seed", seed)
        pipe = load_pipeline(name, quiet=quiet)
        found = replay_report(report, pipe, paths, k, tolerance=tolerance, seed=root, progress=not quiet)
    typer.echo(found.summary())


_DEFAULTS = AttackConfig()


def attack(
    folder: _Folder,
    images: _Images = None,
    model: _Model = None,
    radii: Annotated[list[float] | None, typer.Option(help="l2 radius of a further ball; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(help="Steps along the gradient.")] = _DEFAULTS.steps,
    samples: Annotated[int, typer.Option(help="Noisy copies in every step.")] = _DEFAULTS.samples,
    n: Annotated[int, typer.Option(help="Draws of each verdict.")] = _DEFAULTS.n,
    box: Annotated[bool, typer.Option("--box", help="Keep to valid images: pixels in [0, 1].")] = False,
    output: Annotated[Path | None, typer.Option(help="File for all attempts with their votes, as JSON.")] = None,
    seed: _Seed = None,
    quiet: _Quiet = False,
) -> None:
    """Attack the smoothed classifier inside its certified radii and outside; fails if one is contradicted."""
    with errors_as_messages():
        report = CertificationReport.load(folder)
        name, paths = _certified(folder, model, images)
        found = attack_report(
            load_pipeline(name, quiet=quiet),
            paths,
            report,
            steps=steps,
            samples=samples,
            radii=sorted(radii or []),
            box=(0.0, 1.0) if box else None,
            n=n,
            seed=None if seed is None else to_int("seed", seed),
            progress=not quiet,
        )
        if Processes.current().rank > 0:
            return
        if output is not None:
            replace_file(output, encode_report(found.to_dict()))
        typer.echo(found.summary())
        found.verify()


def _certified(folder: Path, model: str | None, images: list[Path] | None) -> tuple[str, list[Path]]:
    """Return model and images as given, or as the run that wrote the folder named them."""
    if model is not None and images:
        return model, image_files(images)
    arguments = RunArguments.load(folder)
    base = Path(arguments.directory)
    # a hub id is no path
    named = str(base / arguments.model) if (base / arguments.model).exists() else arguments.model
    return model or named, image_files(images) if images else [base / image for image in arguments.images]
