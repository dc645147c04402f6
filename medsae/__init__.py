"""Sparse autoencoders on medical vision encoders: extract, fit, measure, name, score, report."""

__version__ = "0.1.0"
