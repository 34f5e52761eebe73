"""Implementations for JAX, one file per op."""
