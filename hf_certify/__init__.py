"""Randomized-smoothing certificates for classifier pipelines, with the evidence to check them.

``certify_pipeline`` certifies a transformers pipeline, ``SmoothedClassifier`` any module that returns logits.
"""

from hf_certify.certificate import Certificate
from hf_certify.certify import certify_pipeline
from hf_certify.config import CertifyConfig
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
from hf_certify.report import CertificationReport
from hf_certify.smoothing import Prediction, SmoothedClassifier
from hf_certify.spaces import EncodedInput, Space

__all__ = [
    "Certificate",
    "CertificationReport",
    "CertifyConfig",
    "CertifyError",
    "EncodedInput",
    "InputImageError",
    "InvalidLogitsError",
    "JournalError",
    "Prediction",
    "ReportFolderError",
    "SmoothedClassifier",
    "Space",
    "UnsupportedModelError",
    "UnsupportedProcessorError",
    "VerificationError",
    "certify_pipeline",
]
