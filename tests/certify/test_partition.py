"""Class ranking and partitioning."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_certify import reference
from hf_certify.partition import partition_classes, rank_classes

votes_lists = st.lists(st.integers(0, 6), min_size=2, max_size=9)


@given(votes_lists)
def test_partition_agrees_with_the_sentence_that_defines_it(votes):
    """Oracle: the reference, which tries split after split on plain lists. Small counts make ties common."""
    assert [list(bucket) for bucket in partition_classes(np.array(votes))] == reference.buckets(votes)


@given(votes_lists)
def test_every_class_is_in_exactly_one_bucket(votes):
    buckets = partition_classes(np.array(votes))
    assert sorted(label for bucket in buckets for label in bucket) == list(range(len(votes)))
    assert len(buckets[0]) == len(buckets[1]) == 1


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_ties_go_to_the_lower_index(dtype):
    votes = np.array([2, 5, 5, 2, 2], dtype=dtype)
    assert rank_classes(votes).tolist() == [1, 2, 0, 3, 4]
    assert partition_classes(votes) == ((1,), (2,), (0,), (3, 4))


def test_a_class_of_the_rest_moves_out_only_while_the_rest_outweighs_the_runner_up():
    assert partition_classes(np.array([10, 4, 2, 2])) == ((0,), (1,), (2, 3))
    assert partition_classes(np.array([10, 3, 2, 2])) == ((0,), (1,), (2,), (3,))


def test_unanimous_votes_leave_three_buckets():
    assert partition_classes(np.array([0, 0, 7, 0])) == ((2,), (0,), (1, 3))


def test_relabelling_the_classes_relabels_the_buckets():
    votes = np.array([30, 12, 9, 7, 1])
    order = np.array([3, 0, 4, 2, 1])
    permuted = partition_classes(votes[order])
    assert [{int(order[label]) for label in bucket} for bucket in permuted] == [
        set(b) for b in partition_classes(votes)
    ]


def test_one_class_cannot_be_partitioned():
    with pytest.raises(ValueError, match="at least 2 classes, got counts of 1"):
        partition_classes(np.array([3]))
