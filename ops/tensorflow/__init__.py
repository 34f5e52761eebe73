"""Implementations for TensorFlow, one file per op."""
