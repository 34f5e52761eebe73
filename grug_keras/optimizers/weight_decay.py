"""Another weight decay for an optimizer that a script has made."""


def set_weight_decay(optimizer, value):
    """Sets the weight decay; what an optimizer decays at another rate keeps the ratio of the two.

    What has a decay by role of its own keeps it.

    Args:
        optimizer: `keras.optimizers.Optimizer` that is not built yet.
        value: float >= 0.

    Raises:
        ValueError: if the optimizer has no weight decay to set.
    """
    now = optimizer.weight_decay
    if now is None:
        raise ValueError(
            f"weight_decay={value}: {type(optimizer).__name__} decays nothing; choose it in the "
            "script's build_optimizer"
        )
    if getattr(optimizer, "adam_weight_decay", None) and now:
        optimizer.adam_weight_decay *= value / now
    optimizer.weight_decay = value
