"""Transformers that the paper uses and diffusers does not have."""
