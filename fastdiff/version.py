"""The version, for the package, its metadata and the manifests of runs."""

__version__ = "0.9.0"
