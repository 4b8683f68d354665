"""The command line: ``hf-certify run`` certifies images, ``hf-certify report`` checks the result and prints it."""

import importlib.metadata
from pathlib import Path
from typing import Annotated, cast

import typer
from typer.models import OptionInfo

from hf_certify.commands import votes
from hf_certify.commands.common import errors_as_messages, image_files, to_int
from hf_certify.commands.runs import RunArguments, resume, start_run
from hf_certify.config import CertifyConfig, IntervalName, MarginOption
from hf_certify.noise import require_resolution
from hf_certify.provenance import DISTRIBUTION
from hf_certify.radius import format_down
from hf_certify.report import CertificationReport

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _setting(name: str) -> OptionInfo:
    """Return the option of a setting, with the help text of the setting."""
    option: OptionInfo = typer.Option(help=CertifyConfig.help_text(name))
    return option


def _show_version(value: bool) -> None:
    """Print the version and exit."""
    if value:
        try:
            version = importlib.metadata.version(DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed, run from a checkout"
        typer.echo(f"hf-certify {version}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Randomized-smoothing certificates for image classifiers."""


_DEFAULTS = CertifyConfig(sigma=1.0)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Folder or hub id of an image classifier with its image processor.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders whose image files are taken by name.")],
    sigma: Annotated[float, _setting("sigma")],
    output: Annotated[Path, typer.Option(help="Folder for the report; must be empty or new.")],
    n0: Annotated[int, _setting("n0")] = _DEFAULTS.n0,
    n: Annotated[int, _setting("n")] = _DEFAULTS.n,
    alpha: Annotated[float, _setting("alpha")] = _DEFAULTS.alpha,
    interval: Annotated[str, _setting("interval")] = _DEFAULTS.interval,
    margin: Annotated[str, _setting("margin")] = _DEFAULTS.margin,
    batch_size: Annotated[str, _setting("batch_size")] = _DEFAULTS.batch_size,  # type: ignore[assignment]
    seed: Annotated[str | None, _setting("seed")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Certify images, write a report folder, and print its summary."""
    with errors_as_messages():
        settings = CertifyConfig(
            sigma=sigma,
            n0=n0,
            n=n,
            alpha=alpha,
            interval=cast(IntervalName, interval),
            margin=cast(MarginOption, margin),
            batch_size="auto" if batch_size == "auto" else to_int("batch-size", batch_size),
            # as text: 128 bits are more than a number on the command line may have
            seed=None if seed is None else to_int("seed", seed),
        )
        require_resolution(settings.sigma, 1.0)
        arguments = RunArguments(
            model=model,
            images=tuple(str(file) for file in image_files(images)),
            directory=str(Path.cwd()),
            settings=settings.to_dict(),
        )
        finished = start_run(output, arguments, overwrite=overwrite, quiet=quiet)
    if finished is not None:
        typer.echo(finished.summary())


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder written by hf-certify run.")],
) -> None:
    """Recompute every certificate from its votes, then print the table; fails if one does not follow."""
    with errors_as_messages():
        loaded = CertificationReport.load(folder)
        loaded.verify()
    for line in _table(loaded):
        typer.echo(line)
    typer.echo(f"{len(loaded.certificates)} certificates recomputed from their votes")
    typer.echo(loaded.summary())


for _command in (resume, votes.replay, votes.attack):
    app.command()(_command)


def _table(loaded: CertificationReport) -> list[str]:
    """Return one line for each input: its number, class, radius (cut off, not rounded), bounds and source."""
    names = loaded.facts.get("labels", {})
    lines = [f"{'input':>5}  {'class':<20}  {'radius':>7}  {'pA >=':>7}  {'pB <=':>7}  source"]
    for certificate in loaded.certificates:
        label = "abstained" if certificate.abstained else str(names.get(str(certificate.label), certificate.label))
        # an upper bound is printed as 1 minus a lower one, cut off, so that it rounds up
        upper = 1 - float(format_down(1 - certificate.pb_upper, 4))
        lines.append(
            f"{certificate.index:>5}  {label:<20.20}  {format_down(certificate.radius):>7}  "
            f"{format_down(certificate.pa_lower, 4):>7}  {upper:>7.4f}  {certificate.source or ''}".rstrip()
        )
    # names of files and classes may hold what the terminal's encoding cannot
    return [line.encode("utf-8", "backslashreplace").decode() for line in lines]
