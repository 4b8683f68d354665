"""Reports on disk: canonical JSON, written completely or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hf_certify.errors import ReportFolderError

REPORT_FILE = "certification.json"


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
            f"The report folder must be empty or new, got {str(path)!r}: choose another, or pass overwrite to replace "
            f"the report in it."
        )
    return path


def write_report(folder: Path, values: dict[str, Any]) -> Path:
    """Write ``values`` as canonical JSON and return the path: sorted keys, no NaN, one byte sequence for one value.

    The text goes to a temporary file of the same folder and replaces the target in one step, so that a crash leaves
    either the old report or the new one.

    Raises:
        ReportFolderError: If writing fails.
    """
    text = json.dumps(values, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    target = folder / REPORT_FILE
    temporary = folder / f".{REPORT_FILE}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            # the rename must not reach the disk before the content does
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ReportFolderError(f"The report could not be written to {str(target)!r}: {error}.") from error
    return target


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the values that ``write_report`` wrote.

    Raises:
        ReportFolderError: If there is no report, or it is not a JSON object.
    """
    path = Path(folder) / REPORT_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportFolderError(f"{str(folder)!r} must hold a readable {REPORT_FILE}: {error}.") from error
    if not isinstance(values, dict):
        raise ReportFolderError(f"{str(path)!r} must hold a JSON object, got {type(values).__name__}.")
    return values
