"""Mirai: autoregressive visual generation with foresight, in JAX/Flax (arXiv 2601.14671)."""

__version__ = "0.1.0"
