"""Inference: key-value cache, sampling, generation."""
