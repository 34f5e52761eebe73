"""Folders of Hugging Face, held to `transformers` itself: what it loads, and what we load."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import types

import click
from click.testing import CliRunner
from grug_cli.export import export
from grug_keras import Block, CausalSelfAttention, GrugConfig, Grugformer
from grug_keras import ops as grug_ops
from grug_keras.data import ByteTokenizer, load_tokenizer, train_bpe
from grug_keras.hf import export_hf, load_hf, load_model
from grug_keras.hf.names import variables_by_path
from grug_keras.hf.read_config import read_config
from grug_keras.training.identity import run_identity
from grug_keras.training.trained import Trained
import keras
import numpy as np
import pytest

from runs import adamw, at_batch, curve, run_of, sigterm

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
THETA = {"rope_type": "default", "rope_theta": 500000.0}
ODD_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "head_dim": 16}
slow = pytest.mark.slow
CASES = [
    pytest.param("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, id="llama 3"),
    pytest.param("qwen3", {**WINDOWS, "max_window_layers": 1}, id="qwen3, windows above"),
    # The other shapes of the same code; each compiles a model here and makes one there.
    pytest.param("mistral", {"sliding_window": 7, "rms_norm_eps": 1e-5}, marks=slow),
    pytest.param("llama", {}, id="llama 2", marks=slow),
    pytest.param("llama", {"rope_parameters": THETA, "num_key_value_heads": 4}, marks=slow),
    pytest.param("llama", {"rope_parameters": LINEAR, "head_dim": 16}, id="linear", marks=slow),
    pytest.param("mistral", {"sliding_window": None, **ODD_HEADS}, id="odd heads", marks=slow),
    pytest.param("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, marks=slow),
    pytest.param("qwen3", {**WINDOWS, "max_window_layers": 0, "head_dim": 8}, marks=slow),
]
TEXTS = ["grug see tree", " tree  see\n\tgrug ", "é ñ 猫 🦕", "<|endoftext|> <s> is text", "x" * 40]


@pytest.fixture(scope="session")
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture
def save_pretrained(tmp_path, transformers):
    """A function that saves a model of random weights; returns it and its folder."""
    import torch

    def save(family, **keys):
        sizes = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
        }
        config = transformers.AutoConfig.for_model(family, **{**sizes, **keys})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:  # all ones, and an exchange would not be seen
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return save


def trained(model, tokenizer=None, record=None):
    """A model as `load_trained` gives it."""
    tokenizer = tokenizer or ByteTokenizer()
    return types.SimpleNamespace(model=model, tokenizer=tokenizer, record=record, name="grug-1")


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().cpu().numpy()


def our_logits(model, tokens):
    return keras.ops.convert_to_numpy(model.logits(tokens))


def values(model):
    return {p: keras.ops.convert_to_numpy(v) for p, v in variables_by_path(model).items()}


def tensors(folder):
    import safetensors

    found = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name])
        for name in one
    )


@pytest.mark.parametrize(("family", "keys"), CASES)
def test_logits_agree_and_the_round_trip_is_bit_identical(
    save_pretrained, transformers, tmp_path, family, keys
):
    theirs, folder = save_pretrained(family, **keys)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40))
    expected = their_logits(theirs, tokens)
    ours = load_model(folder)
    np.testing.assert_allclose(our_logits(ours, tokens), expected, rtol=0, atol=2e-5)

    export_hf(trained(ours), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert same(tensors(tmp_path / "ours"), tensors(folder))
    np.testing.assert_array_equal(their_logits(again, tokens), expected)
    back = load_model(tmp_path / "ours")
    assert back.config == ours.config
    assert same(values(back), values(ours))


@pytest.fixture(scope="session")
def bytes_model():
    """A tiny model of bytes, whose weights differ from what a new one begins with."""
    config = GrugConfig(
        vocab_size=384,
        hidden_dim=16,
        intermediate_dim=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=32,
        qk_norm=True,
    )
    model = Grugformer(config)
    model.build()
    rng = np.random.default_rng(1)
    for variable in model.variables:
        variable.assign(rng.normal(size=variable.shape, scale=0.3))
    return model


@pytest.fixture
def exported(bytes_model, tmp_path):
    export_hf(trained(bytes_model), tmp_path / "exported")
    return tmp_path / "exported"


def test_shards_hold_the_same_weights(bytes_model, exported, tmp_path):
    export_hf(trained(bytes_model), tmp_path / "shards", shard_bytes=8000)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted({*index["weight_map"].values()}) == files
    assert same(tensors(tmp_path / "shards"), tensors(exported))
    sizes = [value.nbytes for value in tensors(exported).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same(values(load_model(tmp_path / "shards")), values(bytes_model))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
def test_small_dtypes_come_in_and_go_out_bit_identical(exported, tmp_path, dtype):
    import ml_dtypes
    import safetensors.numpy

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    halves = {name: value.astype(kind) for name, value in tensors(exported).items()}
    safetensors.numpy.save_file(halves, exported / "model.safetensors", {"format": "pt"})
    model, tokenizer = load_hf(exported, dtype=dtype)
    export_hf(trained(model, tokenizer), tmp_path / "again")
    assert same(tensors(tmp_path / "again"), halves)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == dtype
    wide = load_model(exported)
    assert {np.dtype(value.dtype).name for value in values(wide).values()} == {"float32"}


@pytest.mark.slow
def test_greedy_generation_is_that_of_transformers(save_pretrained):
    """Holds the cached decoding of both to one another, over 24 tokens, windows included."""
    import torch

    for family, keys in (("llama", {"tie_word_embeddings": True}), ("qwen3", WINDOWS)):
        theirs, folder = save_pretrained(family, **keys, eos_token_id=None, bos_token_id=None)
        prompt = np.random.default_rng(0).integers(0, 64, (2, 9))
        expected = theirs.generate(torch.tensor(prompt), max_new_tokens=24, do_sample=False)
        ours = load_model(folder).generate(prompt, 24)
        np.testing.assert_array_equal(np.stack(ours), expected[:, 9:].numpy())
        shutil.rmtree(folder)


def prepended_space():
    """As Llama 2 has it: a space before the text, written as a low block, and bytes besides."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"\u2581gruseto", "\u2581g", "ru"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [
        {"id": i, "content": piece, "special": True, **flags} for i, piece in enumerate(pieces[:3])
    ]
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    model = {
        "type": "BPE",
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": ["\u2581 g", "r u"],
        "byte_fallback": True,
        "unk_token": "<unk>",
        "fuse_unk": True,
    }
    return {
        "version": "1.0",
        "added_tokens": special,
        "model": model,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "decoder": None,
        "pre_tokenizer": None,
        "post_processor": None,
    }


def composed():
    """As Qwen has it: its characters are composed first, which a run leaves out, and no start."""
    bpe = json.loads(train_bpe([b"grug see tree. " * 50], 300)._content)
    start = bpe["added_tokens"].pop()
    bpe["model"]["vocab"].pop(start["content"])
    bpe["model"]["vocab"] = {t: i for i, t in enumerate(bpe["model"]["vocab"])}
    return {**bpe, "normalizer": {"type": "NFC"}}


TOKENIZERS = {
    "bytes": lambda folder: ByteTokenizer(),
    "trained here": lambda folder: train_bpe([b"grug see tree. " * 50], 300),
    "space before": lambda folder: _saved(folder, prepended_space()),
    "parts left out": lambda folder: _saved(folder, composed()),
}


def _saved(folder, content):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return load_tokenizer(str(path))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_auto_tokenizer_has_the_ids_of_a_run(bytes_model, transformers, tmp_path, kind):
    tokenizer = TOKENIZERS[kind](tmp_path)
    export_hf(trained(bytes_model, tokenizer), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.bos_id
    assert len(theirs) == tokenizer.vocab_size
    ours = load_tokenizer(str(tmp_path / "out" / "tokenizer.json"))
    for text in [*TEXTS, "e\u0301"]:
        ids = tokenizer.encode(text.encode()).tolist()
        assert theirs(text)["input_ids"] == [tokenizer.bos_id, *ids]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert ours.encode(text.encode()).tolist() == ids
    assert ours.bos_id == tokenizer.bos_id


def test_a_tokenizer_without_such_files_is_left_out_and_said(bytes_model, tmp_path, caplog):
    other = types.SimpleNamespace(bos_id=1, vocab_size=300)
    export_hf(trained(bytes_model, other), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "No tokenizer: a SimpleNamespace" in caplog.text
    assert "No tokenizer: a SimpleNamespace" in (tmp_path / "out" / "README.md").read_text()


def test_the_model_card_has_the_figures_of_the_record(bytes_model, tmp_path):
    record = {
        "bits_per_byte": 1.23456,
        "bits_per_byte_interval": [1.2, 1.3],
        "tokens": 1234567,
        "size": "smoke",
        "experiment": "grugformer_starter",
        "commit": "abc123",
        "dirty": True,
        "id": "grug-1",
        "data": {"name": "python_stdlib"},
    }
    export_hf(trained(bytes_model, record=record), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for figure in (
        "1.2346 (95% interval 1.200 to 1.300)",
        "1,234,567",
        "| size | smoke |",
        "| script | grugformer_starter |",
        "abc123, with changes",
        "license: unknown",
        "# grug-1",
        "Qwen3ForCausalLM",
    ):
        assert figure in card


class Sinks(CausalSelfAttention):
    def build(self, input_shape):
        super().build(input_shape)
        self.sinks = self.add_weight(name="sinks", shape=(self.num_heads,), initializer="zeros")

    def attend(self, q, k, v, mask):
        return grug_ops.attention(q, k, v, mask, sinks=self.sinks)


class SinkBlock(Block):
    attention_class = Sinks


class Doubled(Block):
    def call(self, x, **arguments):
        return 2 * super().call(x, **arguments)


class SoftCapped(Grugformer):
    def head(self, hidden):
        return 30 * keras.ops.tanh(super().head(hidden) / 30)


class OtherTheta(Grugformer):
    def make_block(self, index):
        config = dataclasses.replace(self.config, rope_theta=10.0 + index)
        return Block(config, name=f"block_{index}", dtype=self.dtype_policy)


class Penalised(Grugformer):
    """A change of training alone."""

    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def with_lora(config):
    model = Grugformer(config)
    model.build()
    model.blocks[0].attention.q_proj.enable_lora(2)
    return model


REFUSED = [
    (lambda c: Grugformer(c, block_class=SinkBlock), "block_0/attention: Sinks overrides"),
    (lambda c: Grugformer(c, block_class=Doubled), "block_0: Doubled overrides Block.call"),
    (SoftCapped, "the model: SoftCapped overrides Grugformer.head"),
    (OtherTheta, "block_0 has another configuration"),
    (with_lora, "the weight block_0/attention/q_proj/lora_kernel_a has no place there"),
    (lambda c: Grugformer(dataclasses.replace(c, sliding_window=(4, 8))), r"windows of \[4, 8\]"),
    (
        lambda c: Grugformer(dataclasses.replace(c, sliding_window=(4, None), qk_norm=False)),
        "with qk_norm=False: a Mistral has one window",
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_what_no_architecture_expresses_is_refused(bytes_model, tmp_path, build, message):
    model = build(bytes_model.config)
    if not model.built:
        model.build()
    with pytest.raises(ValueError, match=message):
        export_hf(trained(model), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_a_change_of_training_alone_is_exported(bytes_model, tmp_path):
    model = Penalised(bytes_model.config)
    model.build()
    export_hf(trained(model), tmp_path / "out")
    assert same(values(load_model(tmp_path / "out")), values(model))


def test_nothing_is_half_written_or_overwritten(bytes_model, tmp_path, monkeypatch):
    import safetensors.numpy

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="kept' is there already"):
        export_hf(trained(bytes_model), tmp_path / "kept")
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        export_hf(trained(bytes_model), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# As published, but for the keys of training and generation that all have.
COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "transformers_version": "4.40.0",
}
LLAMA = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
PUBLISHED = {
    "Llama-2-7b": (
        {
            **LLAMA,
            "_name_or_path": "meta-llama/Llama-2-7b-hf",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vocab_size": 32000,
        },
        {"head_dim": 128, "rope_theta": 10000.0, "tie_embeddings": False, "qk_norm": False},
    ),
    "Llama-3.2-1B": (
        {
            **LLAMA,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 64,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
        {
            "tie_embeddings": True,
            "num_kv_heads": 8,
            "rope_theta": 500000.0,
            "rope_scaling": grug_ops.RopeScaling(32.0, 1.0, 4.0, 8192),
        },
    ),
    "TinyLlama-1.1B": (
        {
            **LLAMA,
            "attention_bias": False,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "vocab_size": 32000,
        },
        {"head_dim": 64, "num_kv_heads": 4},
    ),
    "SmolLM-135M": (
        {
            **LLAMA,
            "_name_or_path": "x",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 49152,
        },
        {"head_dim": 64, "tie_embeddings": True},
    ),
    "SmolLM2-360M": (
        {
            **LLAMA,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "num_attention_heads": 15,
            "num_hidden_layers": 32,
            "num_key_value_heads": 5,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 49152,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
        {"head_dim": 64, "rope_theta": 100000.0, "max_seq_len": 8192},
    ),
    "Qwen3-0.6B": (
        {
            **COMMON,
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"qk_norm": True, "head_dim": 128, "rms_norm_eps": 1e-6, "sliding_window": None},
    ),
    "Mistral-7B-v0.1": (
        {
            **COMMON,
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
        {"sliding_window": 4096, "head_dim": 128},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(tmp_path, name):
    keys, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = read_config(tmp_path)
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.vocab_size == keys["vocab_size"]
    assert config.num_layers == keys["num_hidden_layers"]
    assert config.rms_norm_eps == keys["rms_norm_eps"]


YARN = {"rope_type": "yarn", "factor": 4.0}
BAD_KEYS = [
    ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
    ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ({"rope_scaling": YARN}, "rope_scaling={'rope_type': 'yarn', 'factor': 4.0} is not supported"),
    ({"rope_parameters": YARN}, "rope_parameters={'rope_type': 'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling={'type': 'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling={'rope_type': 'lla"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor': 0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method'"),
    ({"num_local_experts": 8}, "num_local_experts=8 is unknown to llama here"),
    ({"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] is unknown to llama"),
    ({"sliding_window": 16}, "sliding_window=16 is unknown to llama"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map=.*code of the folder is never run"),
    ({"model_type": "gemma3"}, "of model_type='gemma3' is none of LlamaForCausalLM"),
    ({"architectures": ["SmolLM3ForCausalLM"]}, r"architectures=\['SmolLM3ForCausalLM'\]"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"model_type": "qwen3"}, r"architectures=\['LlamaForCausalLM'\] is not of model_type='qwen3'"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"architectures": 3}, ""),
    ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, ""),
    ({"num_key_value_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
    ({"num_hidden_layers": "3"}, "num_layers must be a positive integer, got '3'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_KEYS)
def test_a_configuration_that_we_do_not_compute_is_refused(tmp_path, change, message):
    keys, _ = PUBLISHED["TinyLlama-1.1B"]
    (tmp_path / "config.json").write_text(json.dumps({**keys, **change}))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_config(tmp_path)


def rewrite(folder, change):
    import safetensors.numpy

    found = tensors(folder)
    change(found)
    safetensors.numpy.save_file(found, folder / "model.safetensors", {"format": "pt"})


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_key(name, value):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def missing_shard(folder):
    names = dict.fromkeys(tensors(folder), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))


def shard_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))


def tensor(name, value):
    def change(found):
        found.pop(name, None)
        if value is not None:
            found[name] = value

    return lambda folder: rewrite(folder, change)


def fewer_ids(folder):
    set_key("vocab_size", 256)(folder)
    rewrite(
        folder, lambda found: found.update({n: v[:256] for n, v in found.items() if len(v) == 384})
    )


BAD_FOLDERS = [
    (cut_off, r"model.safetensors is cut off or no safetensors file"),
    (only_pickle, r"no model.safetensors.*pytorch_model.bin is a pickle, which is never read"),
    (missing_shard, r"model-00002-of-00002.safetensors is missing, which model.safetensors.index"),
    (shard_elsewhere, r"'../secret.safetensors' of model.norm.weight is not a file of the folder"),
    (tensor("model.norm.weight", None), "has no tensor model.norm.weight"),
    (tensor("model.extra.bias", np.ones(3, "float32")), "tensor model.extra.bias has no place"),
    (
        tensor("model.norm.weight", np.ones(15, "float32")),
        r"model.norm.weight has shape \(15,\), the model's is \(16,\)",
    ),
    (tensor("model.norm.weight", np.ones(16, "int8")), "model.norm.weight has dtype I8, not one"),
    (set_key("tie_word_embeddings", True), "lm_head.weight is not model.embed_tokens.weight"),
    (set_key("num_hidden_layers", 3), "has no tensor model.layers.2.input_layernorm.weight"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer: none of tokenizer"),
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "config.json").write_text("{,"), "config.json is no JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "must hold an object, not list"),
    (fewer_ids, "has 257 ids, a document start included, but config.json .* vocab_size=256"),
    (shutil.rmtree, "is no folder: download it first"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS)
def test_a_broken_folder_is_refused_with_the_file(exported, spoil, message):
    spoil(exported)
    with pytest.raises(ValueError, match=message):
        load_hf(exported)


def test_a_changed_block_begins_from_the_weights_that_are_there(exported, bytes_model, caplog):
    model = load_model(exported, lambda config: Grugformer(config, block_class=SinkBlock))
    assert "block_0/attention/sinks, block_1/attention/sinks: they keep their first" in caplog.text
    found = values(model)
    assert all(np.array_equal(found[path], value) for path, value in values(bytes_model).items())


def init_run(folder, init, **options):
    text = folder.parent / "text.txt"
    text.write_text("grug see tree. " * 600)
    return run_of(folder, init=f"hf:{init}", data=str(text), **options)


def test_a_run_begins_from_the_weights(exported, bytes_model, tmp_path):
    run = init_run(tmp_path / "runs", exported)
    assert run.config == dataclasses.replace(bytes_model.config, max_seq_len=16)
    assert same(values(run._compiled_model(Grugformer, adamw)), values(bytes_model))
    assert run.data.tokenizer.bos_id == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bytes"}, "tokenizer='bytes': the weights of init='hf:.*leave --tokenizer"),
        ({"seq_len": 64}, "seq_len=64 is more than the 32 positions of init="),
    ],
)
def test_options_that_the_weights_decide_are_refused(exported, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        init_run(tmp_path / "runs", exported, **options)
    assert not (tmp_path / "runs").exists()


def test_weights_make_another_run(exported, tmp_path):
    run = init_run(tmp_path / "runs", exported)
    made_of = {name: {} for name in ("source", "versions", "flags", "data", "backend", "device")}
    made_of |= {"recipe": run.recipe, "config": run.config, "tokenizer": run.data.tokenizer}
    moved = tmp_path / "moved"
    shutil.copytree(exported, moved)
    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    rewrite(changed, lambda found: found["model.norm.weight"].__imul__(2))
    here, there, other, drawn = (
        run_identity(options=dataclasses.replace(run.options, init=init), **made_of)
        for init in (f"hf:{exported}", f"hf:{moved}", f"hf:{changed}", None)
    )
    assert here == there
    assert len({here, other, drawn}) == 3


def test_a_run_is_not_begun_from_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="is neither hf: and a folder nor the folder of a run"):
        run_of(tmp_path / "runs", init=str(tmp_path))


@pytest.mark.slow
@pytest.mark.jax
def test_a_run_from_weights_resumes_bit_exact(exported, tmp_path):
    """Holds whole runs: what is resumed, what the record says, and what other weights change."""
    whole = init_run(tmp_path / "whole", exported)
    assert whole(Grugformer, adamw) == 0
    record = whole.folder.record()
    assert record["init"]["name"] == record["options"]["init"] == f"hf:{exported}"
    parts = init_run(tmp_path / "parts", exported)
    at_batch(parts.train_batches, 7, sigterm)
    assert parts(Grugformer, adamw) != 0
    moved = tmp_path / "moved"
    shutil.copytree(exported, moved)
    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    rewrite(changed, lambda found: found["model.norm.weight"].__imul__(2))
    other = init_run(tmp_path / "parts", changed, resume=str(parts.folder))
    with pytest.raises(click.ClickException, match="resume: init.sha256 is"):
        other(Grugformer, adamw)
    resumed = init_run(tmp_path / "parts", moved, resume=str(parts.folder))
    assert resumed(Grugformer, adamw) == 0
    assert curve(resumed.folder.path) == curve(whole.folder.path)
    assert resumed.folder.record()["init"]["sha256"] == record["init"]["sha256"]


@pytest.mark.slow
@pytest.mark.jax
def test_a_run_leaves_home_and_comes_back(transformers, tmp_path, tiny_model):
    """A run, `grug export`, `transformers`, and runs that go on from either: the chain itself."""
    first = run_of(tmp_path / "runs", tokenizer="bpe:300")
    assert first(tiny_model, adamw) == 0
    out = tmp_path / "out"
    ran = CliRunner().invoke(export, [str(first.folder), "--to", "hf", str(out)])
    assert ran.exit_code == 0, ran.output
    model, tokenizer = load_hf(out)
    tokens = np.array([tokenizer.encode(b"grug see tree. grug")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    np.testing.assert_allclose(
        our_logits(model, tokens), their_logits(theirs, tokens), rtol=0, atol=2e-5
    )
    assert first.folder.record()["experiment"] in (out / "README.md").read_text()
    loss = first.folder.record()["loss"]
    for number, init in enumerate((f"hf:{out}", str(first.folder))):
        again = run_of(tmp_path / f"again{number}", init=init, data=first.options.data)
        assert again(tiny_model, adamw) == 0
        record = again.folder.record()
        assert record["evaluations"][-1]["loss"] < loss
        assert record["tokenizer"]["sha256"]


@pytest.mark.slow
@pytest.mark.jax
def test_weights_are_sharded_on_a_mesh(exported):
    """In a process with four devices: each keeps its part of every weight that rules split."""
    code = f"""
        import keras
        from grug_keras import distribution
        from grug_keras.hf import load_model
        from grug_keras.hf.names import variables_by_path
        import numpy as np
        alone = variables_by_path(load_model({str(exported)!r}))
        distribution.distribute("data=2,model=2")
        for path, variable in variables_by_path(load_model({str(exported)!r})).items():
            assert np.array_equal(np.asarray(alone[path]), np.asarray(variable)), path
            split = variable.value.sharding.is_fully_replicated
            assert split == (len(variable.shape) == 1), (path, variable.value.sharding)
    """
    four = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=four)


def test_from_hf_is_a_model_of_its_folder(exported, bytes_model):
    assert same(values(Grugformer.from_hf(exported)), values(bytes_model))


def test_weights_that_were_exported_anew_are_read_anew(exported, tmp_path):
    from grug_keras.training.initial_weights import find_initial

    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    first = find_initial(f"hf:{folder}")
    was = first.sha256
    assert find_initial(f"hf:{folder}") is first
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content + " ")
    assert find_initial(f"hf:{folder}").sha256 != was


def test_what_a_checkpoint_from_elsewhere_loses_is_said(exported, tmp_path, caplog):
    trained = Trained(*load_hf(exported), record=None, name="chat")
    export_hf(trained, tmp_path / "out")
    assert "the chat template, the end tokens" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the chat template" in card
    assert "written by grug_keras from another folder. The licence of the first weights" in card


@pytest.mark.parametrize("place", ["link", "here", "left"])
def test_an_out_that_cannot_be_replaced_is_refused_first(exported, tmp_path, monkeypatch, place):
    out = tmp_path / "out"
    if place == "link":
        out.symlink_to(tmp_path / "elsewhere")
    elif place == "left":
        (tmp_path / ".out.0123.partial").mkdir()
    else:
        out.mkdir()
        monkeypatch.chdir(out)
        out = pathlib.Path()
    trained = Trained(*load_hf(exported), record=None, name="a")
    before = sorted(tmp_path.rglob("*"))
    message = "was left by a process" if place == "left" else "is a link, a mount or the working"
    with pytest.raises(ValueError, match=message):
        export_hf(trained, out)
    assert sorted(tmp_path.rglob("*")) == before
