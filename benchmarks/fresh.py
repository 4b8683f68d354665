"""Work in a process of its own, where nothing that ran before can count."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def fresh(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Any:  # noqa: ANN401  its JSON
    """Run ``python -m module arguments`` and return the JSON in the last line that it prints.

    Args:
        module: Importable from the root of the repository.
        arguments: Of its command line.
        environment: Variables to set besides those of this process.

    Raises:
        RuntimeError: If the process fails; the message ends in the last line of its errors.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if result.returncode:
        # a compiler explains itself in many lines, and says first what is wrong
        errors = [line for line in result.stderr.splitlines() if "Error" in line] or ["no message"]
        raise RuntimeError(f"{' '.join(command[2:])} ended with {result.returncode}: {errors[-1].strip()}")
    return json.loads(result.stdout.splitlines()[-1])
