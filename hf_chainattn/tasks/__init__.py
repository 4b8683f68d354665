"""Synthetic tasks whose answers lie a known number of hops away."""

from hf_chainattn.tasks.chain_track import ChainTrackBatch, ChainTrackConfig, accuracy_by_depth, sample_chain_track

__all__ = ["ChainTrackBatch", "ChainTrackConfig", "accuracy_by_depth", "sample_chain_track"]
