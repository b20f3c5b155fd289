"""The version, in its one place: the build reads it from here, and reading it at run time costs nothing."""

__version__ = "0.1.0"
