"""Moorage: an HTTP server for transformers models, their placement planned, proven and watched."""

__version__ = "0.1.0"
