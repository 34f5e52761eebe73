"""A training step lowered for every TPU kind, and compiled where it is new: prints JSON.

    python tests/tpu_training_step.py [--write]

`kinds` is {kind: {implementation of the loss: elements of the largest buffer}}. A program that is
that of tpu_training_step.json has the figure of that file: see tpu_programs.py. `--write` keeps
the figures of the others there.
"""

import json
import os

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="0")
os.environ.update(XLA_FLAGS="", LIBTPU_INIT_ARGS="")  # the compiler's own settings

from grug_keras import GrugConfig, Grugformer, tpu
from grug_keras.loss import next_token_loss
import jax
import jax.numpy as jnp
import keras
from tpu_programs import Programs

BATCH, SEQ_LEN, VOCAB = 16, 128, 50_000
CONFIG = GrugConfig(
    vocab_size=VOCAB,
    hidden_dim=128,
    intermediate_dim=256,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    max_seq_len=SEQ_LEN,
)


class WithImplementation(Grugformer):
    implementation = None

    def token_mean_loss(self, hidden, labels, weights):
        return next_token_loss(
            hidden, self.lm_head.kernel, labels, weights, implementation=self.implementation
        )


def largest_buffer(programs, kind, implementation):
    """Elements of the largest buffer of a step: model, loss, gradients, optimizer and metrics."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = WithImplementation(CONFIG)
    model.implementation = implementation
    model.compile(keras.optimizers.AdamW(1e-3))
    ids = jax.ShapeDtypeStruct((BATCH, SEQ_LEN), jnp.int32)
    weights = jax.ShapeDtypeStruct((BATCH, SEQ_LEN), jnp.float32)
    model.build((BATCH, SEQ_LEN))
    model.optimizer.build(model.trainable_variables)
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype),
        tuple([v.value for v in group] for group in groups),
    )
    data = ({"token_ids": ids, "segment_ids": ids}, ids, weights)
    lowered = tpu.lower_for(model.train_step, (state, data), kind)
    devices = tpu.topology(kind).devices[:1]
    figures = programs.figures(f"{implementation}, {kind}", lowered, devices, read)
    return figures["largest_buffer"]


def read(compiled):
    return {"largest_buffer": tpu.largest_buffer(compiled.as_text())[0]}


def main():
    programs = Programs(__file__)
    report = {kind: {"chunked": largest_buffer(programs, kind, "chunked")} for kind in tpu.CHIPS}
    report["v5p"]["reference"] = largest_buffer(programs, "v5p", "reference")
    print(json.dumps({"tokens x vocabulary": BATCH * SEQ_LEN * VOCAB, "kinds": report}))


if __name__ == "__main__":
    main()
