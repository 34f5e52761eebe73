"""Trains on 8 virtual devices and on one, for test_sharding.py: prints JSON.

{"runs": {"layout, case": {"losses": [...], "difference": largest relative one to one device, ...}},
 "errors": {case: message}, ...}
"""

import json
import os

os.environ.update(KERAS_BACKEND="jax", JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu")

from grug_keras import (
    Block,
    CausalSelfAttention,
    GrugConfig,
    Grugformer,
    Muon,
    OptaxOptimizer,
    distribution,
    ops,
)
import keras
import numpy as np
import optax

STEPS, BATCH, SEQ_LEN = 20, 8, 288  # beyond 256 positions attention runs in blocks
CONFIG = GrugConfig(96, 32, 48, 3, 8, 2, max_seq_len=SEQ_LEN, qk_norm=True)
LAYOUTS = {
    "DP": ("data=8", dict.fromkeys(distribution.RULES, (None, None))),
    "FSDP": ("data=8", distribution.RULES),
    "TP": ("model=8", distribution.RULES),
    "FSDP x TP": ("data=4,model=2", distribution.RULES),
}
CASES = {  # dtype policy, remat, optimizer, parts of a batch, tied
    "float32": ("float32", True, "muon", 1),
    "all kept": ("float32", False, "muon", 1),
    "mixed": ("mixed_bfloat16", True, "muon", 1),
    "optax in parts": ("float32", True, "optax", 2),
    "tied": ("float32", True, "muon", 1, True),
}
OPTIMIZERS = {
    "muon": lambda: Muon(0.01, weight_decay=0.1),
    "optax": lambda: OptaxOptimizer(optax.adamw(0.01)),
}


class SinkAttention(CausalSelfAttention):
    def build(self, input_shape):
        super().build(input_shape)
        self.sinks = self.add_weight(
            name="sinks", shape=(self.num_heads,), initializer="zeros", dtype="float32"
        )

    def attend(self, q, k, v, mask):
        return ops.attention(q, k, v, mask, sinks=self.sinks)


class SinkBlock(Block):
    attention_class = SinkAttention


def batches():
    """Packed documents with padding at the end; some tokens count for nothing."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 96, (STEPS * BATCH, 1))
    tokens = ((first + 5 * np.arange(SEQ_LEN + 1)) % 96).astype("int32")  # to be learnt
    starts = rng.random((STEPS * BATCH, SEQ_LEN)) < 0.02
    segments = 1 + np.cumsum(starts, axis=1, dtype="int32")
    segments[:, SEQ_LEN - 9 :] = 0
    weights = (rng.random(segments.shape) < 0.9) * (segments > 0)
    return {"token_ids": tokens[:, :-1], "segment_ids": segments}, tokens[:, 1:], weights


def train(policy, remat, optimizer, parts, tied=False):
    """The loss of every step."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = Grugformer(
        GrugConfig(**{**vars(CONFIG), "remat": remat, "tie_embeddings": tied}), SinkBlock
    )
    model.compile(OPTIMIZERS[optimizer](), accumulate=parts)
    losses = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: found.append(float(logs["batch_loss"]))
    )
    found = []
    inputs, labels, weights = batches()
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, "callbacks": [losses]}
    model.fit(inputs, labels, sample_weight=weights.astype("float32"), **options)
    return model, found


def largest_share(model):
    """Of the elements of a large variable, the largest share that one device holds."""
    every = [*model.trainable_variables, *model.optimizer.variables]
    large = [v.value for v in every if np.prod(v.shape) > 1000]
    return max(v.addressable_shards[0].data.size / v.size for v in large)


class Other(Block):
    """A change with a large matrix that no rule knows."""

    def build(self, input_shape):
        super().build(input_shape)
        self.extra = self.add_weight(name="extra", shape=(128, 256))


def message(action, *arguments, **options):
    """The error of an action, or None; without a mesh afterwards."""
    try:
        action(*arguments, **options)
        return None
    except (ValueError, RuntimeError) as error:
        return str(error)
    finally:
        keras.distribution.set_distribution(None)


def build_on(mesh, rules=None, block_class=Block, **changes):
    distribution.distribute(mesh, rules)
    Grugformer(GrugConfig(**{**vars(CONFIG), **changes}), block_class).build()


def errors():
    rules = distribution.RULES
    return {
        "too many": message(distribution.make_mesh, "data=16"),
        "too few": message(distribution.make_mesh, "data=2,model=2"),
        "no fit": message(distribution.make_mesh, "data=auto,model=3"),
        "shape": message(build_on, "data=8", hidden_dim=36, num_heads=2),
        "heads": message(build_on, "model=8", num_heads=4, head_dim=8),
        "unknown variable": message(build_on, "data=8", block_class=Other),
        "no such variable": message(
            build_on, "data=8", {**rules, ".*/gate/kernel": (None, "data")}
        ),
        "two rules": message(build_on, "data=8", {**rules, ".*q_proj/kernel": ("data", None)}),
        "rank": message(build_on, "data=8", {**rules, ".*/q_norm/scale": ("data", None)}),
        "with a rule": message(
            build_on, "data=8", {**rules, r".*/block_\d+/extra": ("data", None)}, block_class=Other
        ),
        "batch": message(fit_batch_of_six),
        "parts": message(fit_parts_of_two),
    }


def fit_batch_of_six():
    distribution.distribute("data=8")
    distribution.local_rows(6)


def fit_parts_of_two():
    distribution.distribute("data=8")
    distribution.local_rows(8, 4)


def main():
    runs = {}
    for case, options in CASES.items():
        _, alone = train(*options)
        for layout, (mesh, rules) in LAYOUTS.items():
            # The layouts are told apart in float32; of the other cases the last one has it all.
            if case != "float32" and layout != "FSDP x TP":
                continue
            sharding = distribution.distribute(mesh, rules)
            model, losses = train(*options)
            keras.distribution.set_distribution(None)
            runs[f"{layout}, {case}"] = {
                "losses": losses,
                "difference": float(np.max(np.abs(np.divide(losses, alone) - 1))),
                "largest share": largest_share(model),
                "mesh": sharding.device_mesh.shape,
            }
    print(json.dumps({"runs": runs, "errors": errors()}))


if __name__ == "__main__":
    main()
