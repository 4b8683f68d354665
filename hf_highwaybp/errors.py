"""What Highway-BP refuses. Every class says which guarantee could not be kept."""


class HighwayError(Exception):
    """Base of the errors of this package; bad argument values are ``ValueError`` and wrong kinds ``TypeError``."""


class UnsupportedModelError(HighwayError):
    """The model has no stack of residual blocks that can be found, or its blocks do not fit together."""


class EscapedTensorError(HighwayError):
    """A differentiable tensor goes around the residual stream, so its gradient would be silently wrong."""


class BackwardError(HighwayError):
    """This backward pass cannot be served: a second one, a double one, or one for a hidden state."""


class AttachError(HighwayError):
    """A block already belongs to another engine."""
