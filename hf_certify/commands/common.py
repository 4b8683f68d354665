"""What commands share: mistakes as sentences, images from paths, the folder of a report."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer

from hf_certify.errors import CertifyError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print the sentence of a user's mistake instead of a traceback, and exit with status 2."""
    try:
        yield
    except (CertifyError, ValueError, TypeError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def to_int(name: str, text: str) -> int:
    """Return the value of an option that is given as text.

    Raises:
        ValueError: If it is no int.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--{name} must be an int, got {text!r}.") from None


def image_files(paths: list[Path]) -> list[Path]:
    """Return the given files, and the image files of given folders sorted by name.

    Raises:
        ValueError: If a path does not exist, or a folder holds no image file.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"IMAGES must be files or folders that exist, got {str(path)!r}.")
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not found:
            raise ValueError(
                f"An image folder must hold files with one of {sorted(IMAGE_SUFFIXES)}, got {str(path)!r}."
            )
        files.extend(found)
    return files
