"""The rows of `fit.py`: one function each, which makes a Llama and returns how to train it.

All take the shape as `fit.SHAPES` has it, the rate and the decay of AdamW, and return a function
`(x, y)` that trains on all rows of the arrays, a batch a step, to the end; and the number of
parameters. They are written as a user of that library would: no kernel of ours but where the name
says so.
"""

import importlib

LIBRARIES = {
    "grug": ("keras", "grug_keras"),
    "keras_hub": ("keras", "keras_hub"),
    "jax_by_hand": ("jax", "optax"),
    "jax_with_grug_ops": ("jax", "optax", "grug_keras"),
    "torch_eager": ("torch",),
    "torch_compiled": ("torch",),
}
THETA, EPSILON = 10000.0, 1e-5


def import_libraries(peer):
    for name in LIBRARIES[peer][::-1]:
        importlib.import_module(name)


def grug(V, D, F, L, N, S, B, rate, decay, jit_compile="auto"):
    import grug_keras
    import keras

    model = grug_keras.Grugformer(
        grug_keras.GrugConfig(
            vocab_size=V, hidden_dim=D, intermediate_dim=F, num_layers=L, num_heads=N,
            num_kv_heads=N, max_seq_len=S,
        )
    )  # fmt: skip
    model.build()
    model.compile(keras.optimizers.AdamW(rate, weight_decay=decay), jit_compile=jit_compile)

    def train(x, y):
        model.fit(x, y, batch_size=B, shuffle=False, verbose=0)

    return train, model.count_params()


def keras_hub(V, D, F, L, N, S, B, rate, decay, jit_compile="auto"):
    import keras
    from keras_hub.models import LlamaBackbone, LlamaCausalLM
    import numpy as np

    backbone = LlamaBackbone(
        vocabulary_size=V, num_layers=L, num_query_heads=N, hidden_dim=D, intermediate_dim=F,
        num_key_value_heads=N, layer_norm_epsilon=EPSILON, rope_max_wavelength=THETA,
    )  # fmt: skip
    model = LlamaCausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=decay),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )

    def train(x, y):
        inputs = {"token_ids": x, "padding_mask": np.ones(x.shape, "bool")}
        model.fit(inputs, y, batch_size=B, shuffle=False, verbose=0)

    return train, model.count_params()


def jax_by_hand(*arguments):
    import jax
    import jax.numpy as jnp

    def attend(q, k, v):
        S, H = q.shape[1], q.shape[-1]
        logits = jnp.einsum("bsnh,btnh->bnst", q, k) * H**-0.5
        logits = jnp.where(jnp.tril(jnp.ones((S, S), bool)), logits, -1e30)
        return jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(logits), v)

    def loss(hidden, head, labels):
        logits = hidden @ head
        scores = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - scores)

    return _jax_llama(attend, loss, *arguments)


def jax_with_grug_ops(*arguments):
    from grug_keras import ops

    def attend(q, k, v):
        return ops.attention(q, k, v, ops.AttentionMask())

    return _jax_llama(attend, ops.fused_linear_cross_entropy, *arguments)


def _jax_llama(attend, loss, V, D, F, L, N, S, B, rate, decay):
    """A Llama as functions of a dict of arrays, with one donated step."""
    import jax
    import jax.numpy as jnp
    import optax

    def draw(*shape):
        draw.key, key = jax.random.split(draw.key)
        return 0.02 * jax.random.normal(key, shape)

    draw.key = jax.random.key(0)
    blocks = [
        {
            "norms": jnp.ones((2, D)),
            **{name: draw(D, D) for name in "qkvo"},
            "gate": draw(D, F),
            "up": draw(D, F),
            "down": draw(F, D),
        }
        for _ in range(L)
    ]
    weights = {"embed": draw(V, D), "blocks": blocks, "norm": jnp.ones(D), "head": draw(D, V)}
    angles = jnp.arange(S)[:, None] * THETA ** (-jnp.arange(D // N // 2) / (D // N // 2))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def norm(x, scale):
        return scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def mean_loss(weights, x, y):
        h = weights["embed"][x]
        for w in weights["blocks"]:
            z = norm(h, w["norms"][0])
            q, k, v = ((z @ w[name]).reshape(B, S, N, D // N) for name in "qkv")
            h += attend(rotate(q), rotate(k), v).reshape(B, S, D) @ w["o"]
            z = norm(h, w["norms"][1])
            h += (jax.nn.silu(z @ w["gate"]) * (z @ w["up"])) @ w["down"]
        return loss(norm(h, weights["norm"]), weights["head"], y)

    optimizer = optax.adamw(rate, weight_decay=decay)

    def step(state, x, y):
        weights, slots = state
        value, gradients = jax.value_and_grad(mean_loss)(weights, x, y)
        updates, slots = optimizer.update(gradients, slots, weights)
        return (optax.apply_updates(weights, updates), slots), value

    step = jax.jit(step, donate_argnums=0)
    state = [(weights, optimizer.init(weights))]

    def train(x, y):
        for i in range(0, len(x), B):
            state[0], value = step(state[0], x[i : i + B], y[i : i + B])
        value.block_until_ready()

    return train, sum(leaf.size for leaf in jax.tree.leaves(weights))


def torch_eager(*arguments):
    return _torch_llama(lambda model: model, *arguments)


def torch_compiled(*arguments):
    import torch

    return _torch_llama(torch.compile, *arguments)


def _torch_llama(compiled, V, D, F, L, N, S, B, rate, decay):
    """A Llama as modules, with PyTorch's own attention, norm, loss and fused AdamW."""
    import torch
    from torch import nn
    from torch.nn import functional

    angles = torch.arange(S)[:, None] * THETA ** (-torch.arange(D // N // 2) / (D // N // 2))
    cos, sin = torch.cos(angles), torch.sin(angles)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, bias=False)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.mlp_norm = (nn.RMSNorm(D, EPSILON) for _ in range(2))
            self.q, self.k, self.v, self.o = (linear(D, D) for _ in range(4))
            self.gate, self.up, self.down = linear(D, F), linear(D, F), linear(F, D)

        def forward(self, x):
            z = self.attention_norm(x)
            q, k, v = (
                project(z).view(-1, S, N, D // N).transpose(1, 2)
                for project in (self.q, self.k, self.v)
            )
            out = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.o(out.transpose(1, 2).reshape(-1, S, D))
            z = self.mlp_norm(x)
            return x + self.down(functional.silu(self.gate(z)) * self.up(z))

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(V, D)
            self.blocks = nn.Sequential(*(Block() for _ in range(L)))
            self.norm, self.head = nn.RMSNorm(D, EPSILON), linear(D, V)

        def forward(self, x, y):
            logits = self.head(self.norm(self.blocks(self.embed(x))))
            return functional.cross_entropy(logits.view(-1, V), y.view(-1))

    model = Llama()
    run = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay, fused=True)

    def train(x, y):
        x, y = torch.from_numpy(x).long(), torch.from_numpy(y).long()
        for i in range(0, len(x), B):
            loss = run(x[i : i + B], y[i : i + B])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        loss.item()

    return train, sum(p.numel() for p in model.parameters())
