"""What several files of tests share."""

import pytest

from tests.helpers.decoders import decoder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a small Llama of ordinary attention."""
    folder = tmp_path_factory.mktemp("checkpoint")
    decoder("llama", "ordinary").save_pretrained(folder)
    return str(folder)
