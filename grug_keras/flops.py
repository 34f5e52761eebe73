"""How much arithmetic a model takes, derived from the built model."""


def flops_per_token(model, seq_len):
    """Floating-point operations of training on one token, by the usual convention.

    Six for every weight that multiplies activations (Kaplan et al.,
    https://arxiv.org/abs/2001.08361): all matrices but the embedding table. And for the causal
    attention of every block 6 S N H: half of the 12 S N H (PaLM,
    https://arxiv.org/abs/2204.02311, appendix B) that a full mask takes. Recomputation does not
    count.

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
    return 6 * weights + 6 * config.num_layers * config.num_heads * config.head_dim * seq_len
