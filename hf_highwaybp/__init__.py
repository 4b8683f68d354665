"""Highway-BP for PyTorch and transformers: backpropagation approximated along the residual path (arXiv 2501.17086)."""

from hf_highwaybp.callback import HighwayCallback
from hf_highwaybp.config import HighwayConfig
from hf_highwaybp.diagnostics import GradientReport, compare_exact
from hf_highwaybp.errors import AttachError, BackwardError, EscapedTensorError, HighwayError, UnsupportedModelError
from hf_highwaybp.highway import HighwayBP
from hf_highwaybp.stats import HighwayStats

__all__ = [
    "AttachError",
    "BackwardError",
    "EscapedTensorError",
    "GradientReport",
    "HighwayBP",
    "HighwayCallback",
    "HighwayConfig",
    "HighwayError",
    "HighwayStats",
    "UnsupportedModelError",
    "compare_exact",
]
