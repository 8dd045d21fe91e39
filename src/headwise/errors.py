"""The one error a person is meant to read: it names the thing, what was given, and what to do."""


class HeadwiseError(ValueError):
    """A mistake the caller can act on. The command line prints its sentence and exits with 2."""
