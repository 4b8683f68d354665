"""Randomized-smoothing certificates for classifier pipelines, with the evidence to check them.

``certify_pipeline`` certifies a transformers pipeline, ``SmoothedClassifier`` any module that returns logits.
"""

from hf_certify.attack import attack
from hf_certify.attack_report import AttackConfig, AttackReport, Attempt, GapRow
from hf_certify.certificate import Certificate
from hf_certify.certify import certify_pipeline
from hf_certify.config import CertifyConfig
from hf_certify.deploy import ABSTAIN, SmoothedPipeline, smooth_pipeline
from hf_certify.errors import (
    CertifyError,
    InputImageError,
    InvalidLogitsError,
    JournalError,
    ReportFolderError,
    UnsupportedModelError,
    UnsupportedProcessorError,
    VerificationError,
)
from hf_certify.replay import Replay, replay
from hf_certify.report import CertificationReport
from hf_certify.smoothing import Prediction, SmoothedClassifier
from hf_certify.spaces import EncodedInput, Space

__all__ = [
    "ABSTAIN",
    "AttackConfig",
    "AttackReport",
    "Attempt",
    "Certificate",
    "CertificationReport",
    "CertifyConfig",
    "CertifyError",
    "EncodedInput",
    "GapRow",
    "InputImageError",
    "InvalidLogitsError",
    "JournalError",
    "Prediction",
    "Replay",
    "ReportFolderError",
    "SmoothedClassifier",
    "SmoothedPipeline",
    "Space",
    "UnsupportedModelError",
    "UnsupportedProcessorError",
    "VerificationError",
    "attack",
    "certify_pipeline",
    "replay",
    "smooth_pipeline",
]
