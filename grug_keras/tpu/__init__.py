"""Compiles programs for TPUs ahead of time, without a TPU, and reads what the compiler says."""

from grug_keras.tpu.compiler import CHIPS, compile_for, lower_for, record_kernels, topology
from grug_keras.tpu.flops import MFU_CONVENTION, flops_per_token, peak_flops
from grug_keras.tpu.hlo import (
    collectives,
    kernel_calls,
    kernel_cycles,
    largest_buffer,
    read_compiled,
    static_cycles,
)

__all__ = [
    "CHIPS",
    "MFU_CONVENTION",
    "collectives",
    "compile_for",
    "flops_per_token",
    "kernel_calls",
    "kernel_cycles",
    "largest_buffer",
    "lower_for",
    "peak_flops",
    "read_compiled",
    "record_kernels",
    "static_cycles",
    "topology",
]
