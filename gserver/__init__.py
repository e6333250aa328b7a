"""gserver: a small TCP service that tells who is connected, where, and why."""

__version__ = "1.0.0"
