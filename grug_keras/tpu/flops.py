"""Counts the floating-point operations of training, from the built model."""

MFU_CONVENTION = (
    "6 per matrix weight but the embedding table's, 12 N H per position seen (half of a causal "
    "window); no recomputation; peak of dense bfloat16 products"
)

# Dense bfloat16 products a second of one JAX or CUDA device, by the start of its name, from the
# makers' product pages. A device that is not here has no MFU, rather than a guessed one.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device):
    """Looks up the peak of all devices of a run, in floating-point operations a second.

    Args:
        device: dict with the `kind` (str) and `count` (int) of the devices that train; see
            `training.provenance.device`.

    Returns:
        float, or None if the peak of this kind is not known.
    """
    names = [name for name in _PEAKS if device["kind"].startswith(name)]
    return _PEAKS[max(names, key=len)] * device["count"] if names else None


def flops_per_token(model, seq_len):
    """Counts the floating-point operations of training on one token, by the usual convention.

    Each weight that multiplies activations counts 6 (Kaplan et al.,
    https://arxiv.org/abs/2001.08361): all matrices but an embedding table that is not the head
    too. The attention of each block counts 12 N H (PaLM, https://arxiv.org/abs/2204.02311,
    appendix B) for every position that a token sees: S / 2 of them on average, fewer with a
    sliding window. Recomputation does not count, nor do weights that are not matrices.

    Args:
        model: a built `Grugformer`.
        seq_len: int, S.

    Returns:
        int.
    """
    return sum(flops_by_part(model, seq_len).values())


def flops_by_part(model, seq_len):
    """Counts those of the head, the other matrices and attention: dict of str -> int."""
    config = model.config
    table = None if config.tie_embeddings else model.token_embedding.embeddings  # only read
    matrices = [v for v in model.trainable_variables if len(v.shape) == 2 and v is not table]
    weights = sum(v.shape[0] * v.shape[1] for v in matrices)
    head = sum(v.shape[0] * v.shape[1] for v in matrices if model.config.vocab_size in v.shape)
    windows = [min(seq_len, window or seq_len) for window in model.windows]
    seen = sum(window - window**2 / (2 * seq_len) for window in windows)
    return {
        "head": 6 * head,
        "matrices": 6 * (weights - head),
        "attention": round(12 * config.num_heads * config.head_dim * seen),
    }
