"""The errors of this package that a caller may want to catch by name."""


class ChainAttentionError(Exception):
    """Base class: catch it to catch everything that is special to chain attention."""


class UnsupportedModelError(ChainAttentionError):
    """This model, or this call of it, cannot run with chain attention; the message says why and what to do."""


class UnsupportedCacheError(ChainAttentionError):
    """Keys and values came out of a cache: chain attention cannot continue from cached plain values."""
