"""A run that can be continued: its arguments and its votes lie in the folder of its report."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Self

import typer

from hf_certify.certify import certify_pipeline
from hf_certify.commands.common import errors_as_messages
from hf_certify.config import CertifyConfig
from hf_certify.errors import ReportFolderError
from hf_certify.journal import remove_journal
from hf_certify.loading import load_pipeline
from hf_certify.processes import Processes
from hf_certify.report import CertificationReport
from hf_certify.storage import REPORT_FILE, encode_report, prepare_folder, replace_file

RUN_FILE: Final = "run.json"
JOURNAL_FOLDER: Final = "journal"

# raise it whenever the meaning of a stored key changes
RUN_SCHEMA: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What a run was told, as plain values.

    Attributes:
        model: Folder or hub id.
        images: Files, in their order, as they were named.
        directory: Where relative names start.
        settings: Those of ``CertifyConfig``, the seed as it was given.
    """

    model: str
    images: tuple[str, ...]
    directory: str
    settings: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write ``run.json``.

        Raises:
            ReportFolderError: If writing fails.
        """
        replace_file(folder / RUN_FILE, encode_report({"schema": RUN_SCHEMA, **dataclasses.asdict(self)}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return what ``save`` wrote.

        Raises:
            ReportFolderError: If there is no ``run.json``, or not one that this version understands.
        """
        try:
            values = json.loads((folder / RUN_FILE).read_bytes())
            if values.pop("schema") != RUN_SCHEMA:
                raise ValueError(f"its schema must be {RUN_SCHEMA}")
            settings = CertifyConfig.from_dict(values["settings"]).to_dict()
            return cls(**{**values, "images": tuple(values["images"]), "settings": settings})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ReportFolderError(
                f"The folder of a run must hold a readable {RUN_FILE}, got {str(folder)!r}: {error}."
            ) from error


def start_run(
    output: Path, arguments: RunArguments, *, overwrite: bool = False, quiet: bool = False
) -> CertificationReport | None:
    """Begin a run in a folder that is empty or new, and return its report; ``None`` in all processes but the first.

    Args:
        output: Folder of the report.
        arguments: What to certify, and how.
        overwrite: Whether the folder may hold a report and a journal, which are replaced.
        quiet: Whether to show no progress.

    Raises:
        ReportFolderError: If the folder cannot be used.
        JournalError: If another run is writing to the folder.
    """
    processes = Processes.current()
    with _folder_for(output, processes):

        def prepare() -> None:
            prepare_folder(output, overwrite=overwrite)
            remove_journal(output / JOURNAL_FOLDER)
            arguments.save(output)

        # before the work, so that a report without a place to go costs nothing
        _in_the_first(processes, prepare)
        return _certify(output, arguments, processes, overwrite=overwrite, quiet=quiet)


def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of a run that was interrupted.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Continue a run from what its folder holds, and print its summary; the report is that of a run in one go."""
    with errors_as_messages():
        output = folder.absolute()
        arguments = RunArguments.load(output)
        try:
            with contextlib.chdir(arguments.directory):
                report = _certify(output, arguments, Processes.current(), overwrite=True, quiet=quiet)
        except KeyboardInterrupt:
            _say_how_to_go_on(folder)
            raise
    if report is not None:
        typer.echo(report.summary())


def _certify(
    output: Path, arguments: RunArguments, processes: Processes, *, overwrite: bool, quiet: bool
) -> CertificationReport | None:
    """Certify with the journal of the folder and save the report there."""
    pipe = load_pipeline(arguments.model, quiet=quiet)
    images = [Path(image) for image in arguments.images]
    report = certify_pipeline(pipe, images, **arguments.settings, progress=not quiet, resume=output / JOURNAL_FOLDER)
    if processes.rank > 0:
        return None
    # a stray file that came in meanwhile must not cost the run; a report must
    report.save(output, overwrite=overwrite or not (output / REPORT_FILE).exists())
    return report


def _in_the_first(processes: Processes, work: Callable[[], None]) -> None:
    """Do something in process 0 while the others wait; if it fails, all end, and process 0 says why."""
    failure: Exception | None = None
    if processes.rank == 0:
        try:
            work()
        except Exception as error:
            failure = error
    if processes.from_first(failure is not None):
        raise failure or typer.Exit(2)


@contextlib.contextmanager
def _folder_for(output: Path, processes: Processes) -> Iterator[None]:
    """Remove what the work inside has created for nothing, if it ends before there are votes to go on from."""
    created = [folder for folder in (output, *output.parents) if not folder.exists()]
    known = (output / RUN_FILE).exists()
    try:
        yield
    except BaseException:
        if processes.rank > 0:
            raise
        if (output / JOURNAL_FOLDER).exists():
            _say_how_to_go_on(output)
            raise
        if not known:
            (output / RUN_FILE).unlink(missing_ok=True)
        for folder in created:
            # only an empty folder can be removed
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _say_how_to_go_on(folder: Path) -> None:
    typer.echo(f"The votes so far are kept; to go on: hf-certify resume {folder}", err=True)
