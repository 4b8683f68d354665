"""Reports on disk: canonical JSON, written completely or not at all."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hf_certify.errors import ReportFolderError

REPORT_FILE = "report.json"
RUN_INFO_FILE = "run_info.json"


def prepare_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return ``folder``, created if needed, after making sure that a report can be written to it.

    Args:
        folder: Where the report will lie.
        overwrite: Whether the folder may hold files already; only an existing report is replaced.

    Raises:
        ReportFolderError: If the folder holds something and ``overwrite`` is false, or it cannot be written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(path.iterdir())
        # the only test of writability that also holds for the superuser and for read-only mounts
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ReportFolderError(f"The report folder must be writable, got {str(path)!r}: {error}.") from error
    if occupied and not overwrite:
        raise ReportFolderError(
            f"The report folder must be empty or new, got {str(path)!r}: choose another, or pass overwrite "
            f"(--overwrite) to replace the report in it."
        )
    return path


def encode_report(values: dict[str, Any]) -> bytes:
    """Return ``values`` as canonical JSON: ASCII, sorted keys, no NaN; one byte sequence for one value.

    Raises:
        ReportFolderError: If a value is none that JSON knows.
    """
    try:
        # ASCII also holds names of files that are not UTF-8
        return (json.dumps(values, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=True) + "\n").encode(
            "ascii"
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ReportFolderError(
            f"A report must hold plain values only, got something else: {error}. Look at report.facts."
        ) from error


def write_report(folder: Path, values: dict[str, Any]) -> Path:
    """Write ``values`` as canonical JSON and return the path.

    The text goes to a temporary file of the same folder and replaces the target in one step, so that a crash leaves
    either the old report or the new one.

    Raises:
        ReportFolderError: If a value is none that JSON knows, or writing fails.
    """
    target = folder / REPORT_FILE
    replace_file(target, encode_report(values))
    return target


def replace_file(target: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    Raises:
        ReportFolderError: If writing fails.
    """
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # the rename must not reach the disk before the content does
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        # an interruption, too, must leave nothing behind
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ReportFolderError(
                f"{target.name} could not be written to {str(target.parent)!r}: {error}."
            ) from error
        raise


def read_report(folder: str | os.PathLike[str], schema: int) -> dict[str, Any]:
    """Return the values that ``write_report`` wrote.

    Raises:
        ReportFolderError: If there is no report, it has another ``schema``, or its bytes are not those that
            ``write_report`` gives these values: keys that occur twice, NaN and edits by hand are found here.
    """
    path = Path(folder) / REPORT_FILE
    try:
        stored = path.read_bytes()
        values = json.loads(stored)
    except (OSError, ValueError, RecursionError) as error:
        raise ReportFolderError(f"{str(folder)!r} must hold a readable {REPORT_FILE}: {error}.") from error
    if not isinstance(values, dict):
        raise ReportFolderError(f"{str(path)!r} must hold a JSON object, got {type(values).__name__}.")
    found = values.get("schema")
    if type(found) is not int or found != schema:
        raise ReportFolderError(
            f"The report in {str(folder)!r} must have schema {schema}, got {found!r}: read it with the version of the "
            f"package that wrote it."
        )
    if encode_report(values) != stored:
        raise ReportFolderError(
            f"{str(path)!r} must be as it was written, byte for byte, got another spelling of its values: it was "
            f"edited or converted; restore the original file."
        )
    return values
