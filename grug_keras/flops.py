"""How much arithmetic a model takes, derived from the built model."""


def flops_per_token(model, seq_len):
    """Floating-point operations of training on one token, by the usual convention.

    Six for every weight that multiplies activations (Kaplan et al.,
    https://arxiv.org/abs/2001.08361): all matrices but the embedding table. And for the attention
    of every block 12 N H (PaLM, https://arxiv.org/abs/2204.02311, appendix B) for every position
    that a token sees: S / 2 of them on average, fewer in a sliding window. Recomputation does
    not count, nor do weights that are no matrices.

    Args:
        model: a built `Grugformer`.
        seq_len: int, S.

    Returns:
        int.
    """
    table = model.token_embedding.embeddings
    matrices = [v for v in model.trainable_variables if len(v.shape) == 2 and v is not table]
    weights = sum(v.shape[0] * v.shape[1] for v in matrices)
    config = model.config
    window = min(seq_len, config.sliding_window or seq_len)
    seen = window - window**2 / (2 * seq_len)
    return 6 * weights + round(12 * config.num_layers * config.num_heads * config.head_dim * seen)
