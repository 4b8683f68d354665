"""The command line in a process that can be killed."""

import torch
from transformers import AutoImageProcessor  # noqa: F401  loaded once, in the process that others are forked from

from hf_certify.cli import app


def run(arguments: list[str]) -> None:
    """Run ``hf-certify`` with these arguments."""
    torch.set_num_threads(1)
    app(arguments, prog_name="hf-certify")
