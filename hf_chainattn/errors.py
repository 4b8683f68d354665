"""The errors of this package that a caller may want to catch by name."""


class UnsupportedModelError(ValueError):
    """This model, or this call of it, cannot run with chain attention; the message says why and what to do."""


class UnsupportedCacheError(UnsupportedModelError):
    """Keys and values came out of a cache: chain attention cannot continue from cached plain values."""
