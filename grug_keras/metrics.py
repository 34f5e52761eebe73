"""What `fit` and `evaluate` report: the model's own metrics, and those that layers have made."""

import keras

OFFERED = ("accuracy", "perplexity")
NORMS = ("gradient_norm", "parameter_norm", "update_norm")
# Also the model's own metrics, and what Keras's callbacks put beside them.
_RESERVED = {
    "loss",
    "batch_loss",
    "token_loss",
    "token_accuracy",
    "learning_rate",
    *NORMS,
    *OFFERED,
}


def check_offered(**given):
    """Checks the arguments of `compile` that Keras would compute from predictions.

    Args:
        **given: `loss`, `metrics` and `weighted_metrics`.

    Returns:
        tuple of str, the metrics.

    Raises:
        ValueError: names the argument and the value.
    """
    metrics = given["metrics"] or ()
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    given["metrics"] = [metric for metric in metrics if metric not in OFFERED]
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{name}={value!r} is not supported: Grugformer computes its own next-token loss, "
                "and a Keras loss or metric would see hidden states as predictions. Call "
                f"compile(optimizer), with metrics of {list(OFFERED)}, or override compute_loss."
            )
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics={list(metrics)} names a metric twice")
    return metrics


def metric_results(model):
    """Returns the present value of every metric of a model.

    Args:
        model: `Grugformer`.

    Returns:
        dict of name -> scalar: `loss`, those of `compile(metrics=...)`, and every metric that a
        layer has made, under the path of the layer, such as `block_0/mlp/load`.

    Raises:
        ValueError: for a name that is taken.
    """
    results = {"loss": model.token_loss.result()}
    if "accuracy" in model.offered:
        results["accuracy"] = model.token_accuracy.result()
    if "perplexity" in model.offered:
        results["perplexity"] = keras.ops.exp(results["loss"])
    for name, metric in own_metrics(model):
        result = metric.result()
        if isinstance(result, dict):
            results |= {f"{name}/{key}": value for key, value in result.items()}
        else:
            results[name] = result
    return results


def own_metrics(model):
    """Returns pairs of name and metric for those that a subclass or a layer has made."""
    found = [
        (prefix + metric.name, metric)
        for prefix, layer in _layers(model, "", set())
        for metric in layer._metrics
        if metric is not model.token_loss and metric is not model.token_accuracy
    ]
    names = [name for name, _ in found]
    for name, metric in found:
        if name.startswith("val_") or metric.name.split("/")[0] in _RESERVED:
            raise ValueError(f"a metric is called {name!r}, which is a name of fit's own logs")
        if names.count(name) > 1:
            raise ValueError(f"two metrics are called {name!r}: give each a name of its own")
    return found


def keep_state_exact(model):
    """Takes averages, metrics and whatever else is no weight out of a mixed policy.

    Keras would give them to a layer in the compute dtype, where a count stops at 256; on PyTorch an
    assignment would change the cast copy alone.
    """
    for _, layer in _layers(model, "", set()):
        metrics = [variable for metric in layer._metrics for variable in metric.variables]
        for variable in (*layer._non_trainable_variables, *metrics):
            variable._autocast = False


def _layers(layer, prefix, seen):
    """Yields each layer once, with its path from the model as a prefix."""
    seen.add(id(layer))
    yield prefix, layer
    for part in layer._layers:
        if id(part) not in seen:
            yield from _layers(part, f"{prefix}{part.name}/", seen)
