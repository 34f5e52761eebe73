"""Attention by emulated cuDNN on 8 virtual devices, for test_attention_cudnn.py: prints JSON.

For every call: the largest relative difference to one device, and the kernels in the program that
is lowered for GPUs.
"""

import os

os.environ.update(KERAS_BACKEND="jax", JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu")

import functools
import json

import emulated_cudnn
from grug_keras import ops
from grug_keras.ops import attention_dispatch
from grug_keras.ops.jax.attention_on_mesh import run_on_mesh
from grug_keras.ops.jax.cudnn_attention import cudnn_attention
import jax
import keras
import numpy as np
import pytest

B, S, N, K, H = 6, 300, 8, 2, 8  # 6 examples on 4 devices: two are padding
MESHES = {"data and heads": (4, 2), "more devices than key heads": (2, 4)}
IDS = np.sort(np.random.default_rng(1).integers(0, 4, (B, S)), axis=1)


def loss(attend, arrays, cotangent):
    q, k, v, sinks = arrays
    mask = ops.AttentionMask().with_segment_ids(IDS)
    out = attend(q, k, v, mask, sinks=sinks)
    return (out * cotangent).sum(), out


def results(attend):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(B, S, heads, H)).astype("float32") for heads in (N, K, K)]
    arrays.append(rng.normal(size=N).astype("float32"))
    cotangent = rng.normal(size=(B, S, N, H)).astype("float32")
    run = jax.jit(jax.grad(loss, 1, has_aux=True), static_argnums=0)
    return jax.tree.leaves(run(attend, arrays, cotangent))


def calls_on_cuda():
    """Returns the number of cuDNN's kernels, of a call that names no implementation."""
    shapes = [(B, S, heads, 64) for heads in (N, K, K)]
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((N,), "float32"))
    run = jax.jit(jax.grad(loss, 1, has_aux=True), static_argnums=0)
    traced = run.trace(ops.attention, arrays, jax.ShapeDtypeStruct((B, S, N, 64), "bfloat16"))
    return traced.lower(lowering_platforms=("cuda",)).as_text().count("@__cudnn$fmhaSoftmax")


def main():
    report, patch = {}, pytest.MonkeyPatch()
    alone = results(functools.partial(ops.attention, implementation="reference"))
    for name, shape in MESHES.items():
        mesh = keras.distribution.DeviceMesh(shape, ("data", "model"))
        distribution = keras.distribution.ModelParallel(
            layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="data"
        )
        with distribution.scope():
            with patch.context() as patched:
                emulated_cudnn.pretend_gpu(patched)
                patched.setattr(attention_dispatch, "cudnn_agrees", lambda *_: True)
                calls = calls_on_cuda()
            with patch.context() as patched:
                emulated_cudnn.install(patched)
                run = functools.partial(run_on_mesh, cudnn_attention, scale=H**-0.5)
                split = results(run)
        error = max(
            np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(split, alone, strict=True)
        )
        report[name] = {"error": float(error), "calls": calls}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
