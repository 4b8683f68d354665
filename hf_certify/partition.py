"""Class partitioning (CPM): which classes share one bound, decided on the selection sample alone."""

import numpy as np
from numpy.typing import NDArray

Partition = tuple[tuple[int, ...], ...]


def rank_classes(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the class indices `[K]` by count descending, ties by index ascending, so that equal draws rank equally.

    Args:
        counts: `[K]` votes per class, ``>= 0``.

    Example:
        >>> import numpy as np
        >>> rank_classes(np.array([3, 9, 3])).tolist()
        [1, 0, 2]
    """
    # a stable sort keeps the lower index first among equal counts
    return np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")


def partition_classes(selection: NDArray[np.int64]) -> Partition:
    """Return the buckets of the class partitioning method, the top class alone in the first.

    The second bucket is the runner-up. While the classes left over hold more votes together than the runner-up, the
    largest of them moves to a bucket of its own; what remains is the last bucket. Few buckets mean a large share of
    alpha for each, and the joint upper bound of a bucket bounds every class in it.

    Args:
        selection: `[K]` votes of the selection sample, ``>= 0``, ``K >= 2``.

    Returns:
        Between 2 and K buckets of class indices that together hold every class once. Fixed before the estimation
        sample is drawn, which is what makes the bounds valid.

    Raises:
        ValueError: If ``K < 2``.

    Example:
        >>> import numpy as np
        >>> partition_classes(np.array([60, 15, 10, 9, 6]))
        ((0,), (1,), (2,), (3, 4))
    """
    if len(selection) < 2:
        raise ValueError(f"A partition needs at least 2 classes, got counts of {len(selection)}.")
    counts = np.asarray(selection, dtype=np.int64)
    order = rank_classes(counts)
    buckets = [(int(order[0]),), (int(order[1]),)]
    rest = [int(label) for label in order[2:]]
    rest_votes = int(counts[rest].sum())
    while rest_votes > counts[order[1]]:
        largest = rest.pop(0)
        rest_votes -= int(counts[largest])
        buckets.append((largest,))
    return (*buckets, tuple(rest)) if rest else tuple(buckets)
