"""Tokens a second of generation, beside KerasHub and beside the whole model for every token.

    python benchmarks/generate.py [--backend jax] [--turns 5]

In one process, in turns, greedy, everything compiled before: the model of benchmarks/fit.py's shape
7m by `model.generate` and KerasHub's Llama of the same shape by its own `generate`, for one row
and for eight, 32 tokens of prompt and 224 new ones; the smoke model with its cache of keys and
values and without one; and the cost of a token at several lengths, with a sliding window and
without. Medians over the turns; the numbers are in docs/generation.md.
"""

import os
import statistics
import time

import click

SHAPES = {"smoke": (384, 128, 384, 4, 2, 128), "7m": (8192, 256, 704, 4, 4, 256)}
PROMPT = 32


@click.command()
@click.option("--backend", default="jax", type=click.Choice(["jax", "torch", "tensorflow"]))
@click.option("--turns", default=5)
@click.option("--lengths/--no-lengths", default=True, help="The cost of a token by length.")
def main(backend, turns, lengths):
    os.environ["KERAS_BACKEND"] = backend
    print(f"{backend}, tokens a second, median of {turns}")
    for rows in (1, 8):
        compare(f"7m, {rows} rows", beside_keras_hub("7m", rows), turns)
    compare("smoke, 1 row", cached_and_whole("smoke"), turns)
    if lengths:
        for window in (None, 128):
            by_length(window, turns)


def compare(title, candidates, turns):
    """Runs candidates in turns; prints their medians and the ratio of the first to each."""
    times = {name: [] for name in candidates}
    for run, _ in candidates.values():
        run()  # compiles
    for _ in range(turns):
        for name, (run, tokens) in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(tokens / (time.perf_counter() - start))
    first, *_ = times
    for name, found in times.items():
        ratios = [a / b for a, b in zip(times[first], found, strict=True)]
        print(
            f"{title:14} {name:22} {statistics.median(found):10,.0f}   "
            f"{statistics.median(ratios):6.2f} times this"
        )


def grugformer(shape, **changes):
    import grug_keras

    V, D, F, L, N, S = shape
    config = grug_keras.GrugConfig(V, D, F, L, N, N, max_seq_len=S)
    model = grug_keras.Grugformer(grug_keras.GrugConfig.of({**config.as_dict(), **changes}))
    model.build()
    return model


def beside_keras_hub(size, rows):
    """`{name: (function, tokens)}` of both libraries."""
    import keras_hub
    import numpy as np

    V, D, F, L, N, S = SHAPES[size]
    ours = grugformer(SHAPES[size])
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=V,
        num_layers=L,
        num_query_heads=N,
        hidden_dim=D,
        intermediate_dim=F,
        num_key_value_heads=N,
        layer_norm_epsilon=1e-5,
    )
    theirs = keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)
    theirs.compile(sampler="greedy")
    prompts = np.random.default_rng(0).integers(0, V, (rows, PROMPT), dtype="int32")
    padded = np.pad(prompts, ((0, 0), (0, S - PROMPT)))
    inputs = {
        "token_ids": padded,
        "padding_mask": np.broadcast_to(np.arange(S) < PROMPT, padded.shape),
    }
    new = S - PROMPT
    return {
        "grug_keras": (lambda: ours.generate(prompts, new), rows * new),
        "keras_hub": (lambda: theirs.generate(inputs, stop_token_ids=None), rows * new),
    }


def cached_and_whole(size):
    import numpy as np

    model = grugformer(SHAPES[size])
    new = SHAPES[size][-1] - PROMPT
    prompts = np.ones((1, PROMPT), dtype="int32")

    def whole():
        from grug_keras.generation.decoders import WholeDecoder
        from grug_keras.generation.request import check_request
        from keras import ops

        request = check_request(model, prompts, new)
        decoder = WholeDecoder(model, request, PROMPT + new, new)
        decoder.run([], ops.zeros((1,), dtype="bool"), new)

    return {
        "with a cache": (lambda: model.generate(prompts, new), new),
        "the whole model": (whole, new),
    }


def by_length(window, turns):
    """Prints microseconds of a token after 128 to 4,096 others."""
    import numpy as np

    model = grugformer((*SHAPES["7m"][:-1], 8192), sliding_window=window)
    found = []
    for length in (128, 1024, 4096):
        prompts = np.ones((1, length), dtype="int32")
        times = []
        for new in (64, 192) * (turns + 1):  # their difference is 128 tokens without the prompt
            start = time.perf_counter()
            model.generate(prompts, new)
            times.append(time.perf_counter() - start)
        pairs = zip(times[2::2], times[3::2], strict=True)
        found.append(statistics.median(1e6 * (long - short) / 128 for short, long in pairs))
    text = ", ".join(f"{cost:,.0f}" for cost in found)
    print(f"7m, window {window}: {text} microseconds a token after 128, 1,024 and 4,096")


if __name__ == "__main__":
    main()
