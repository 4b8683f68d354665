"""The votes of a run on disk while it goes on, so that a crash costs no more than the last few thousand draws.

A folder holds ``header.json``, which says what the votes are about, and one ``votes-<rank>.txt`` for each process: a
line for some draws of one sample, with its checksum, on the disk before the next is begun. What was cut off by a crash
can only be the end of a file, and is dropped. Everything else that does not fit is an error: votes are evidence.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from hf_certify.errors import JournalError
from hf_certify.noise import Stage
from hf_certify.storage import encode_report, replace_file

JOURNAL_SCHEMA = 1

HEADER_FILE = "header.json"
# also what a crash leaves of a header that was being replaced
_OWN_FILES = re.compile(r"votes-\d+\.(txt|lock)|header\.json|\.header\.json\.\d+")
_DIGEST = 64
_KEYS = {"counts", "draws", "first", "input", "stage"}


class Sample(NamedTuple):
    """What is known of one sample.

    Args:
        draws: How many, from the first on.
        counts: `[*outputs, K]` int64 votes of them.
    """

    draws: int
    counts: NDArray[np.int64]


class Journal:
    """The journal of a run, open for one process.

    Args:
        folder: Created if needed.
        header: What the votes depend on, plain values.
        rank: Number of the process, from 0. Process 0 must open the folder before the others do.

    Raises:
        JournalError: If another run is writing to the folder, the header in it says something else, or a record is
            damaged anywhere but at the end of a file.
    """

    def __init__(self, folder: str | os.PathLike[str], header: Mapping[str, Any], *, rank: int = 0) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / f"votes-{rank}.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise JournalError(
                f"Only one run may write to a journal, got {str(self.folder)!r}, to which another process is writing."
            ) from None
        except OSError as error:
            raise JournalError(f"The journal folder must be writable, got {str(self.folder)!r}: {error}.") from error
        try:
            self._settle_header({"journal_schema": JOURNAL_SCHEMA, **header}, first=rank == 0)
            path = self.folder / f"votes-{rank}.txt"
            if path.exists():
                _cut_torn_end(path)
            self._file = path.open("ab")
            _sync_folder(self.folder)
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Let another process write."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, index: int, stage: Stage, first: int, draws: int, counts: NDArray[np.int64]) -> None:
        """Put the votes of draws ``first .. first + draws - 1`` on the disk before returning.

        Args:
            index: Which input.
            stage: Which sample of it.
            first: Number of the first draw.
            draws: How many, ``>= 1``.
            counts: `[*outputs, K]` votes of these draws alone.
        """
        entry = {"input": index, "stage": stage.name, "first": first, "draws": draws, "counts": counts.tolist()}
        self._file.write(_line(entry))
        self._file.flush()
        os.fsync(self._file.fileno())

    def samples(self) -> dict[tuple[int, Stage], Sample]:
        """Return what all processes have recorded, by input and stage.

        Raises:
            JournalError: If records are damaged, leave something out, or speak of the same draws.
        """
        entries = [entry for path in sorted(self.folder.glob("votes-*.txt")) for entry in _read(path)]
        found: dict[tuple[int, Stage], Sample] = {}
        for entry in sorted(entries, key=lambda entry: (entry["input"], entry["stage"], entry["first"])):
            key = entry["input"], Stage[entry["stage"]]
            counts = np.array(entry["counts"], dtype=np.int64)
            before = found.get(key, Sample(0, np.zeros_like(counts)))
            whole = counts.shape == before.counts.shape and (counts >= 0).all()
            if entry["first"] != before.draws or not whole or (counts.sum(-1) != entry["draws"]).any():
                raise JournalError(
                    f"The records of one sample must follow one another, got draws from {entry['first']} after "
                    f"{before.draws} of input {entry['input']}, {entry['stage'].lower()}, in {str(self.folder)!r}: "
                    "start again in a new folder."
                )
            found[key] = Sample(before.draws + entry["draws"], before.counts + counts)
        return found

    def _settle_header(self, header: dict[str, Any], *, first: bool) -> None:
        path, encoded = self.folder / HEADER_FILE, encode_report(header)
        if not path.exists() and first:
            if any(self.folder.glob("votes-*.txt")):
                raise JournalError(f"Votes must lie beside a {HEADER_FILE}, got none in {str(self.folder)!r}.")
            replace_file(path, encoded)
        stored = read_header(self.folder)
        if stored != json.loads(encoded):
            differing = _differing(stored, json.loads(encoded))
            raise JournalError(
                f"A run can only be continued as it began, got another {differing} than in {str(path)!r}: use the "
                "same inputs, settings, model, versions, device and number of threads, or a new folder."
            )


def read_header(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the votes in a journal depend on.

    Raises:
        JournalError: If there is none, or it cannot be read.
    """
    path = Path(folder) / HEADER_FILE
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise JournalError(f"A journal must have a readable {HEADER_FILE}, got {str(path)!r}: {error}.") from error
    if not isinstance(values, dict) or values.get("journal_schema") != JOURNAL_SCHEMA:
        raise JournalError(f"{str(path)!r} must have journal_schema {JOURNAL_SCHEMA}: use the version that wrote it.")
    return values


def remove_journal(folder: str | os.PathLike[str]) -> None:
    """Delete a journal, if there is one.

    Raises:
        JournalError: If a run is writing to it, or the folder holds something else.
    """
    path = Path(folder)
    files = list(path.iterdir()) if path.is_dir() else []
    if strange := sorted(file.name for file in files if not _OWN_FILES.fullmatch(file.name)):
        raise JournalError(f"Only a journal may be deleted, got {strange[0]!r} in {str(path)!r}: move it elsewhere.")
    locks = []
    try:
        for file in files:
            if file.suffix == ".lock":
                locks.append(FileLock(file))
                locks[-1].acquire(timeout=0)
        for file in files:
            file.unlink(missing_ok=True)
        if path.is_dir():
            path.rmdir()
    except Timeout:
        raise JournalError(f"A journal must not be deleted while a run is writing to it, got {str(path)!r}.") from None
    finally:
        for lock in locks:
            lock.release()


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n".encode("ascii")


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a whole line, ``None`` if it is damaged."""
    digest, text = line[:_DIGEST], line[_DIGEST + 1 : -1]
    if not line.endswith(b"\n") or hashlib.sha256(text).hexdigest().encode() != digest:
        return None
    entry = json.loads(text)
    known = isinstance(entry, dict) and entry.keys() == _KEYS and entry["stage"] in Stage.__members__
    return entry if known and _line(entry) == line else None


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines(keepends=True)
    entries = [_parse(line) for line in lines]
    for number, entry in enumerate(entries[:-1], start=1):
        if entry is None:
            raise JournalError(
                f"Only the end of a journal may be cut off, got a damaged line {number} of {len(lines)} in "
                f"{str(path)!r}: start again in a new folder."
            )
    return [entry for entry in entries if entry is not None]


def _cut_torn_end(path: Path) -> None:
    """Remove the record at the end that a crash has left unfinished, so that the next one begins a line."""
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    if lines and _parse(lines[-1]) is None:
        with path.open("rb+") as file:
            file.truncate(len(content) - len(lines[-1]))
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Put the names of new files on the disk, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _differing(stored: Any, now: Any, name: str = "header") -> str:  # noqa: ANN401  plain values
    """Return the path to the first value that differs."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in sorted(stored.keys() | now.keys()):
            if stored.get(key) != now.get(key):
                return _differing(stored.get(key), now.get(key), key if name == "header" else f"{name}.{key}")
    shown = f"{now!r} instead of {stored!r}"
    return name if len(shown) > 120 else f"{name} ({shown})"
