"""Exceptions of this package. A guarantee that cannot be kept is one of these, never a warning."""


class CertifyError(Exception):
    """Base class: catch it to catch everything that is special to certification."""


class UnsupportedModelError(CertifyError):
    """The model cannot be smoothed as it is: wrong task, training mode, one class, or an unexpected output."""


class UnsupportedProcessorError(CertifyError):
    """The image processor cannot be undone, so noise in raw pixel units has no meaning for this pipeline."""


class InvalidLogitsError(CertifyError):
    """The model returned NaN or infinite logits, which must never become a vote."""


class InputImageError(CertifyError):
    """One of the inputs cannot be read as an image, or does not fit the pipeline."""


class VerificationError(CertifyError):
    """A certificate does not follow from the counts it carries."""


class ReportFolderError(CertifyError):
    """A report folder cannot be written, would be overwritten, or holds no readable report."""


class JournalError(CertifyError):
    """The votes on disk are damaged, belong to another run, or are being written by another process."""
