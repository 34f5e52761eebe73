"""Implementations for PyTorch, one file per op."""
