"""Which implementation of attention runs, when, and why: the whole choice is in this file.

`choose` picks one for a call that names none, by a function for each backend that follows it.
A call with `implementation="..."` gets what the registry has under that name.
"""

from grug_keras.ops import registry
from grug_keras.ops.attention_mask import has_documents, has_offset, is_dense
from grug_keras.ops.attention_reference import reference_attention
import keras
from keras import ops

BACKEND = keras.config.backend()
# Of this backend: {name: (function, why this machine cannot run it, or None)}. Imported now,
# because torch.compile does not trace an import.
_IMPLEMENTATIONS = {}
if BACKEND == "jax":
    from grug_keras.ops.jax.blockwise_attention import blockwise
    from grug_keras.ops.jax.cudnn_attention import (
        cudnn,
        cudnn_on_gpu,
        why_no_cudnn,
        why_not_cudnn,
    )
    from grug_keras.ops.jax.cudnn_check import cudnn_agrees
    from grug_keras.ops.jax.splash_attention import (
        plan_for_splash,
        splash,
        splash_on_tpu,
        why_no_tpu,
        why_not_splash,
    )

    _IMPLEMENTATIONS = {
        "splash": (splash, why_no_tpu),
        "cudnn": (cudnn, why_no_cudnn),
        "blockwise": (blockwise,),
    }
elif BACKEND == "tensorflow":
    from grug_keras.ops.tensorflow.blockwise_attention import blockwise

    _IMPLEMENTATIONS = {"blockwise": (blockwise,)}
elif BACKEND == "torch":
    from grug_keras.ops.torch.blockwise_attention import blockwise
    from grug_keras.ops.torch.flex_attention import flex, flex_takes, plan_for_flex, why_no_flex
    from grug_keras.ops.torch.sdpa_attention import needs_array, sdpa, why_not_sdpa

    _IMPLEMENTATIONS = {"sdpa": (sdpa,), "flex": (flex, why_no_flex), "blockwise": (blockwise,)}

# Up to this many positions, all logits at once are faster than blocks of them.
DENSE_LENGTH = 256
# On a CPU through PyTorch, up to this many pairs of positions, a mask of one byte for each pair is
# faster than skipping blocks.
MOST_PAIRS = 2**20


def choose(query, key, value, mask, sinks, logit_soft_cap):
    """Returns the fastest implementation that computes a call exactly, and logs it once.

    Args:
        query, key, value, mask, sinks, logit_soft_cap: as of `ops.attention`, checked.

    Returns:
        Function of `(query, key, value, mask, *, sinks, logit_soft_cap, scale)`.
    """
    call = (query, key, value, mask, sinks, logit_soft_cap)
    if registry.kernels_are_off():
        return reference_attention
    short = all(n is not None and n <= DENSE_LENGTH for n in (query.shape[1], key.shape[1]))
    # Blocks are added up in float32: they would round float64.
    wide = "float64" in [ops.dtype(x) for x in (query, key, value)]
    if has_offset(mask):
        return reference_attention  # by far most calls are one query for each row
    if short or wide or BACKEND not in registry.BACKENDS:
        run, when = reference_attention, f"'reference' up to {DENSE_LENGTH} positions"
    elif BACKEND == "jax":
        run, when = _on_jax(*call)
    elif BACKEND == "tensorflow":
        run, when = blockwise, "'blockwise'"
    else:
        run, when = _on_torch(*call)
    registry.announce("attention", when)
    return run


def _on_jax(query, key, value, mask, sinks, logit_soft_cap):
    """JAX: cuDNN on NVIDIA GPUs where it is exact, splash on TPUs, blocks elsewhere."""
    # Which of them runs JAX decides when it lowers the program, for the platform that it compiles
    # for: that need not be this machine's. But a machine without a GPU compiles for none.
    exact = why_no_cudnn() is None and not why_not_cudnn(
        query, key, value, mask, logit_soft_cap=logit_soft_cap
    )
    if exact and cudnn_agrees(query, key, mask, sinks):
        return cudnn_on_gpu, "'cudnn' on GPU, elsewhere as without one,"
    why_not = why_not_splash(query, key, value, mask)
    if why_not:
        return blockwise, f"'blockwise', on TPU too: 'splash' {why_not}"
    return splash_on_tpu, "'splash' on TPU, elsewhere as 'blockwise',"


def _on_torch(query, key, value, mask, sinks, logit_soft_cap):
    """PyTorch: its own kernels where they are exact and fastest, blocks elsewhere."""
    sdpa_is_exact = why_not_sdpa(query, key, value, sinks, logit_soft_cap) is None
    few_pairs = query.shape[1] * key.shape[1] <= MOST_PAIRS
    if sdpa_is_exact and (is_dense(mask) or not needs_array(mask)):
        run, name = sdpa, "sdpa"  # only causality leaves blocks out, and it knows that rule
    elif why_no_flex() is None and flex_takes(query, key, value, mask):
        run, name = flex, "flex"  # on GPUs it skips blocks, also with sinks and a soft cap
    elif sdpa_is_exact and few_pairs:
        run, name = sdpa, "sdpa"
    else:
        run, name = blockwise, "blockwise"
    return run, f"{name!r} where {_describe(mask, sinks, logit_soft_cap)}"


def _describe(mask, sinks, logit_soft_cap):
    """Returns a call in words, for the log."""
    rules = None if is_dense(mask) else mask
    parts = {
        "the mask is dense": is_dense(mask),
        "causal": rules is not None and rules.is_causal,
        "a window": rules is not None and rules.sliding_window is not None,
        "documents": has_documents(mask),
        "sinks": sinks is not None,
        "a soft cap": logit_soft_cap is not None,
    }
    return ", ".join(part for part, holds in parts.items() if holds) or "every query sees every key"


def plan_documents(mask):
    """Plans which blocks attention visits in a packed batch, once for all layers.

    JAX's kernel for TPUs (`"splash"`) and PyTorch's for GPUs (`"flex"`) visit only the blocks of
    queries and keys that may have a document in common. Every call with a mask without a plan
    makes one of its own.

    Args:
        mask: `AttentionMask`.

    Returns:
        The mask with its `plan`; or the same mask where no kernel would read one, because it
        has no segment ids or neither kernel can run on this backend and device.

    Example:

    >>> mask = ops.AttentionMask().with_segment_ids(segment_ids)
    >>> mask = ops.plan_documents(mask)
    """
    plan = None
    if has_documents(mask) and BACKEND == "jax":
        plan = plan_for_splash(mask)
    elif has_documents(mask) and BACKEND == "torch":
        plan = plan_for_flex(mask)
    return mask if plan is None else mask.with_plan(plan)


for _name, _backends in {
    "splash": ("jax",),
    "cudnn": ("jax",),
    "sdpa": ("torch",),
    "flex": ("torch",),
    "blockwise": registry.BACKENDS,
}.items():
    registry.register("attention", _name, _backends, *_IMPLEMENTATIONS.get(_name, ()))
registry.register("attention", "reference", None, reference_attention)
