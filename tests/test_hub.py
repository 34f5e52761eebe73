"""Grugformers as KerasHub models: presets, text in and out, and KerasHub's own numbers."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

from grug_keras import Block, CausalSelfAttention, GrugConfig, Grugformer, hub, ops
from grug_keras.data import ByteTokenizer, load_tokenizer, train_bpe
import keras
import keras_hub
from models import seeded_model
import numpy as np
import pytest

to_numpy = keras.ops.convert_to_numpy
slow = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
CONFIG = GrugConfig(
    260, 16, 24, num_layers=1, num_heads=4, num_kv_heads=2, max_seq_len=24, initializer_std=0.3
)
TEXTS = ["grug see tree", " tree\n\tgrug ", "é 猫 🦕"]
BYTES = ByteTokenizer()
SHAPE = {
    "vocabulary_size": 61,
    "num_layers": 1,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 24,
}
LLAMA3_ROPE = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 16,
}
LLAMA, LLAMA3, QWEN3 = (
    keras_hub.models.LlamaBackbone,
    keras_hub.models.Llama3Backbone,
    keras_hub.models.Qwen3Backbone,
)


@keras.saving.register_keras_serializable(package="tests")
class LastSeenAttention(CausalSelfAttention):
    """Not to be computed from a cache: it looks at the length of what it gets."""

    def attend(self, q, k, v, mask):
        return ops.attention(q, k, v, mask) * (1 if q.shape[1] == 1 else 0.5)


@keras.saving.register_keras_serializable(package="tests")
class LastSeenBlock(Block):
    attention_class = LastSeenAttention


class Penalised(Grugformer):
    """A change of training alone."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) + 1.0


def build(config=CONFIG, model_class=Grugformer, **options):
    return seeded_model(config, model_class, **options)


def wrap(model, tokenizer=BYTES):
    lm = hub.wrap_trained(types.SimpleNamespace(model=model, tokenizer=tokenizer))
    lm.compile(sampler="greedy")
    return lm


@pytest.fixture(scope="module")
def lm():
    return wrap(build())


def logits(lm, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((2, 9), "int32")
    mask[1, 5:] = 0
    ids = rng.integers(lm.backbone.config.vocab_size, size=mask.shape, dtype="int32")
    inputs = {"token_ids": ids, "padding_mask": mask}
    return keras.Model(lm.input, lm.output).predict(inputs, verbose=0)[mask == 1]


def greedy(lm, text, length):
    """What `generate` of the Grugformer itself adds to a text."""
    tokenizer = lm.preprocessor.tokenizer.data_tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode(text.encode()).tolist()]
    ids = {"stop": tokenizer.bos_id, "vocab_size": tokenizer.vocab_size}
    new = lm.backbone.grugformer.generate([prompt], length - len(prompt), **ids)[0]
    return text + tokenizer.decode(new).decode(errors="replace")


# Text and ids.


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_tokenizer_gives_text_back_also_from_its_files(kind, tmp_path):
    made = load_tokenizer("bytes") if kind == "bytes" else train_bpe([b"grug see tree " * 9], 270)
    tokenizer = hub.GrugTokenizer(made)
    rows = tokenizer(TEXTS)
    assert rows == [made.encode(text.encode()).tolist() for text in TEXTS]
    assert tokenizer.detokenize(rows) == TEXTS
    assert tokenizer(TEXTS[0]).tolist() == rows[0]
    assert tokenizer.detokenize(np.array(rows[0])) == TEXTS[0]
    tokenizer.save_assets(tmp_path)
    copy = hub.GrugTokenizer.from_config(tokenizer.get_config())
    copy.load_assets(tmp_path)
    assert copy(TEXTS) == rows
    assert copy.end_token_id == copy.start_token_id == made.bos_id
    assert copy.vocabulary_size() == made.vocab_size


def test_the_preprocessor_gives_the_same_in_a_map_of_tf_data():
    tf = pytest.importorskip("tensorflow")
    preprocessor = hub.GrugCausalLMPreprocessor(hub.GrugTokenizer("bytes"), sequence_length=16)
    texts = tf.data.Dataset.from_tensor_slices(TEXTS)
    for dataset, given in ((texts.batch(3), TEXTS), (texts, TEXTS[0])):
        found = next(iter(dataset.map(preprocessor)))
        wanted = preprocessor(given)
        for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True):
            np.testing.assert_array_equal(a.numpy(), to_numpy(b))
    ids = texts.batch(3).map(preprocessor.tokenizer).map(preprocessor.tokenizer.detokenize)
    assert [text.decode() for text in next(iter(ids)).numpy()] == TEXTS


def test_a_row_is_a_document_between_two_starts():
    preprocessor = hub.GrugCausalLMPreprocessor(hub.GrugTokenizer("bytes"), sequence_length=6)
    x, y, weights = preprocessor(["hi", "a longer one"])
    assert to_numpy(x["token_ids"]).tolist() == [[256, 104, 105, 256, 0, 0], [256, *b"a lon"]]
    assert to_numpy(y).tolist() == [[104, 105, 256, 0, 0, 0], [*b"a lon", 256]]
    assert to_numpy(weights).astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]


# The model as a task of KerasHub.


def test_a_preset_holds_the_whole_model(lm, tmp_path):
    """Through KerasHub's own base classes, which know ours from their names."""
    lm.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    assert type(loaded) is hub.GrugCausalLM
    np.testing.assert_array_equal(logits(loaded), logits(lm))
    assert loaded.preprocessor.sequence_length == CONFIG.max_seq_len
    assert keras_hub.models.Tokenizer.from_preset(str(tmp_path))(["hi"]) == [[104, 105]]


@slow
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_it_continues_strings_as_the_grugformer_does(kind, lm):
    """Prompts of unequal lengths; an end of a document ends a text, also where its id is 0."""
    if kind == "bpe":
        tokenizer = train_bpe([b"grug see tree " * 9], 270)
        assert tokenizer.bos_id == 0
        lm = wrap(build(dataclasses.replace(CONFIG, vocab_size=384)), tokenizer)
    prompts = ["grug", "a tree", ""]
    found = lm.generate(prompts, max_length=16)
    assert found == [greedy(lm, prompt, 16) for prompt in prompts]
    assert found[0] > prompts[0]
    alone = lm.generate(prompts[0], max_length=16, strip_prompt=True)
    assert prompts[0] + alone == found[0]


@slow
def test_padding_is_seen_by_nothing(lm):
    """On either side, so that rows padded on the left can be scored too."""
    ids = np.array([[5, 6, 7]], "int32")
    whole = to_numpy(lm.score(ids))
    for left, right in ((0, 2), (2, 0)):
        padded = np.pad(ids, ((0, 0), (left, right)), constant_values=9)
        mask = np.pad(np.ones_like(ids), ((0, 0), (left, right)))
        found = to_numpy(lm.score(padded, mask))[:, left : left + 3]
        np.testing.assert_allclose(found, whole, atol=1e-5)


def test_bad_input_is_refused_in_one_line(lm, tmp_path):
    tokenizer = hub.GrugTokenizer("bytes")
    one = {"token_ids": np.zeros((1, 4), "int32"), "padding_mask": np.zeros((1, 4), "int32")}
    backbone = lm.backbone
    with pytest.raises(ValueError, match="prompt 1 has 8 tokens or more"):
        lm.generate(["a", "much too long"], max_length=8)
    with pytest.raises(ValueError, match="max_length=25 must be at most the model's max_seq_len"):
        lm.generate("a", max_length=25)
    with pytest.raises(ValueError, match="inputs must hold a string at least, got none"):
        lm.generate([])
    with pytest.raises(ValueError, match="inputs must be a string or a list of strings, got 3"):
        lm.generate(3)
    bare = hub.GrugCausalLM(backbone)
    with pytest.raises(ValueError, match="prompt 0 must have a token"):
        bare.generate(one, stop_token_ids=None)
    one["token_ids"][0, 0] = 260
    with pytest.raises(ValueError, match="token_ids must be in \\[0, vocab_size=260\\), got 260"):
        bare.generate({**one, "padding_mask": np.array([[1, 0, 0, 0]])}, stop_token_ids=None)
    long = hub.GrugCausalLMPreprocessor(tokenizer, sequence_length=25)
    with pytest.raises(ValueError, match="sequence_length=25 .* max_seq_len=24"):
        hub.GrugCausalLM(backbone, long)
    other = hub.GrugTokenizer(train_bpe([b"grug see tree " * 9], 270))
    with pytest.raises(ValueError, match="tokenizer of 267 ids is not that of .*vocab_size=260"):
        lm.preprocessor = hub.GrugCausalLMPreprocessor(other, sequence_length=8)
    with pytest.raises(ValueError, match="backbone must be a GrugBackbone"):
        hub.GrugCausalLM(None)
    with pytest.raises(ValueError, match="Unknown preset identifier"):
        hub.GrugCausalLM.from_preset("no_such_preset")
    with pytest.raises(ValueError, match="grug_tokenizer.json cannot be read"):
        tokenizer.load_assets(tmp_path)
    with pytest.raises(ValueError, match="ids must be below the vocabulary_size 257, got 258"):
        tokenizer.detokenize([258])


def test_a_preset_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    trained = types.SimpleNamespace(model=build(), tokenizer=BYTES)

    def full(self, *args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(hub.GrugTokenizer, "save_assets", full)
        with pytest.raises(OSError, match="no space"):
            hub.export_preset(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    hub.export_preset(trained, tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        hub.export_preset(trained, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@slow
def test_training_on_strings_is_training_of_the_grugformer():
    """One loss: the mean over the tokens that count, with LoRA and without."""
    lm = wrap(build())
    lm.compile("sgd", sampler="greedy")
    x, y, weights = lm.preprocessor(TEXTS)
    ids, weights = to_numpy(x["token_ids"]), to_numpy(weights).astype("float32")
    grugformer = lm.backbone.grugformer
    grugformer.compile("sgd")
    own = grugformer.evaluate(ids, to_numpy(y), sample_weight=weights, verbose=0)
    np.testing.assert_allclose(lm.evaluate(TEXTS, verbose=0)[0], own, rtol=1e-5)
    targets = keras.ops.convert_to_tensor(to_numpy(y))
    losses = to_numpy(lm.score(ids, x["padding_mask"], scoring_mode="loss", target_ids=targets))
    np.testing.assert_allclose((losses * weights).sum() / weights.sum(), own, rtol=1e-5)
    before = [to_numpy(v).copy() for v in grugformer.trainable_variables]
    lm.fit(TEXTS, batch_size=3, verbose=0)
    after = [to_numpy(v) for v in grugformer.trainable_variables]
    reference = build()
    reference.compile("sgd")
    reference.fit(ids, to_numpy(y), sample_weight=weights, verbose=0)
    wanted = [to_numpy(v) for v in reference.trainable_variables]
    assert not any((a == b).all() for a, b in zip(after, before, strict=True))
    for a, b in zip(after, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@slow
def test_lora_trains_and_is_saved(tmp_path):
    lm = wrap(build())
    before = logits(lm)
    lm.backbone.enable_lora(2)
    names = {variable.path.split("/")[-1] for variable in lm.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"}
    np.testing.assert_array_equal(logits(lm), before)
    lm.compile(keras.optimizers.SGD(1.0), sampler="greedy")
    lm.fit(TEXTS, batch_size=3, verbose=0)
    trained = logits(lm)
    assert np.abs(trained - before).max() > 1e-3
    lm.backbone.save_lora_weights(str(tmp_path / "x.lora.h5"))
    again = wrap(build())
    again.backbone.load_lora_weights(str(tmp_path / "x.lora.h5"))
    np.testing.assert_array_equal(logits(again), trained)
    lm.save_to_preset(str(tmp_path / "merged"))
    merged = hub.GrugCausalLM.from_preset(str(tmp_path / "merged"))
    np.testing.assert_allclose(logits(merged), trained, atol=1e-5)
    assert lm.generate("grug", max_length=12) == greedy(lm, "grug", 12)


@slow
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_quantized_model_is_saved_as_such(is_tied, tmp_path):
    lm = wrap(build(dataclasses.replace(CONFIG, tie_embeddings=is_tied)))
    before = logits(lm)
    lm.quantize("int8")
    dtypes = {v.path.split("/")[-2]: v.dtype for v in lm.variables if v.path.endswith("kernel")}
    assert {dtypes[name] for name in ("q_proj", "o_proj", "down_proj")} == {"int8"}
    found = logits(lm)
    assert 0 < np.abs(found - before).max() < 0.1 * np.abs(before).max()
    lm.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    np.testing.assert_array_equal(logits(loaded), found)
    loaded.compile(sampler="greedy")
    assert loaded.generate(TEXTS[0], max_length=20) == lm.generate(TEXTS[0], max_length=20)


@slow
@pytest.mark.parametrize("name", ["top_k", "top_p", "random", "beam", "contrastive"])
def test_samplers_of_keras_hub_work(name):
    lm = wrap(build(dataclasses.replace(CONFIG, sliding_window=3, vocab_size=384)))
    lm.compile(sampler=name)
    for text in lm.generate(["grug", "a tree"], max_length=20):
        assert text.startswith(("grug", "a tree"))
    options = {"stop_token_ids": None}  # up to the length, document starts left out
    inputs = lm.preprocessor.generate_preprocess(["grug", "a tree"], sequence_length=20)
    found = lm.make_generate_function()(inputs, **options)
    assert to_numpy(found["token_ids"]).max() < 257  # what the tokenizer knows
    assert to_numpy(found["padding_mask"]).all()


@slow
def test_beams_without_a_cache_are_those_with_one(monkeypatch):
    """The windows are shorter than the text; the whole model sees what the ring holds."""
    lm = wrap(build(dataclasses.replace(CONFIG, sliding_window=3)))
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=3))
    found = lm.generate(["grug", "a tree"], max_length=16)
    monkeypatch.setattr(hub.causal_lm, "suits_cache", lambda model, longest: False)
    assert lm.generate(["grug", "a tree"], max_length=16) == found


@slow
def test_a_changed_block_goes_to_a_preset_and_back(tmp_path):
    """And is run whole for each token where no cache gives its numbers."""
    lm = wrap(build(block_class=LastSeenBlock))
    lm.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    assert loaded.backbone.grugformer.block_class is LastSeenBlock
    np.testing.assert_array_equal(logits(loaded), logits(lm))
    with pytest.warns(UserWarning, match="LastSeenAttention cannot be run token by token"):
        found = lm.generate("grug", max_length=12)
    assert found == greedy(lm, "grug", 12)


@slow
def test_a_keras_file_holds_the_task_too(lm, tmp_path):
    lm.save(tmp_path / "x.keras")
    loaded = keras.models.load_model(tmp_path / "x.keras")
    np.testing.assert_array_equal(logits(loaded), logits(lm))
    assert loaded.preprocessor.tokenizer(["hi"]) == [[104, 105]]


@slow
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_a_preset_loads_in_another_dtype(dtype, lm, tmp_path):
    lm.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path), dtype=dtype)
    wanted = "float32" if dtype.startswith("mixed") else "bfloat16"
    assert {v.dtype for v in loaded.backbone.grugformer.weights} == {wanted}
    assert loaded.backbone.grugformer.compute_dtype == "bfloat16"
    np.testing.assert_allclose(logits(loaded), logits(lm), atol=0.5)
    with pytest.raises(ValueError, match="dtype='bfloat16' must be that of the grugformer"):
        hub.GrugBackbone(lm.backbone.grugformer, dtype="bfloat16")


@slow
@pytest.mark.parametrize("kind", ["sentencepiece", "keras_hub"])
def test_other_tokenizers_come_along(kind, tmp_path):
    """A space that SentencePiece puts before a text, and a preset's tokenizer of several files."""
    if kind == "keras_hub":
        content = json.loads(train_bpe([b"grug see tree " * 9], 270)._content)["model"]
        merges = [" ".join(pair) for pair in content["merges"]]
        keras_hub.models.GPT2Tokenizer(content["vocab"], merges).save_to_preset(str(tmp_path / "a"))
        made = load_tokenizer(str(tmp_path / "a"))
    else:
        made = load_tokenizer(str(sentence_piece(tmp_path)))
    tokenizer = hub.GrugTokenizer(made)
    tokenizer.save_assets(tmp_path / "b")
    assert all((tmp_path / "b" / name).is_file() for name in tokenizer.file_assets)
    copy = hub.GrugTokenizer.from_config(tokenizer.get_config())
    copy.load_assets(tmp_path / "b")
    assert copy.detokenize(copy(TEXTS)) == TEXTS
    assert copy.start_token_id == made.bos_id


def sentence_piece(folder):
    spm = pytest.importorskip("sentencepiece")
    with open(folder / "tokenizer.model", "wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(["grug see tree"] * 9),
            model_writer=file,
            vocab_size=290,
            byte_fallback=True,
            minloglevel=2,
            hard_vocab_limit=False,
        )
    return folder / "tokenizer.model"


READ = """
import sys, grug_keras.hub, keras, keras_hub, numpy as np
lm = keras_hub.models.CausalLM.from_preset(sys.argv[1])
saved = np.load(sys.argv[2])
inputs = {name: saved[name] for name in ("token_ids", "padding_mask")}
found = keras.ops.convert_to_numpy(lm(inputs))
print(keras.config.backend(), np.abs(found - saved["logits"]).max() < 1e-5)
lm.compile(sampler="greedy")
print(lm.generate("grug", max_length=16) == str(saved["text"]))
"""


@slow
@pytest.mark.jax
@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_a_preset_of_jax_is_the_same_model_elsewhere(backend, lm, tmp_path):
    """In a process of its own, through the base class, with a quantized one's paths too."""
    pytest.importorskip(backend)
    lm.save_to_preset(str(tmp_path / "preset"))
    ids = np.arange(18, dtype="int32").reshape(2, 9)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    np.savez(
        tmp_path / "saved.npz",
        **inputs,
        logits=to_numpy(lm(inputs)),
        text=lm.generate("grug", max_length=16),
    )
    command = [sys.executable, "-c", READ, tmp_path / "preset", tmp_path / "saved.npz"]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    found = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == [backend, "True", "True"], found.stderr


# KerasHub's own models.


def randomised(backbone):
    rng = np.random.default_rng(1)
    for variable in backbone.weights:
        values = rng.normal(size=variable.shape, scale=0.2)
        variable.assign(values + 1 if "scale" in variable.path else values)
    return backbone


def assert_same_numbers(backbone, model):
    """Hidden states and logits."""
    wrapped = hub.GrugCausalLM(hub.GrugBackbone(model))
    rng = np.random.default_rng(0)
    mask = np.ones((2, 12), "int32")
    mask[1, 7:] = 0
    ids = rng.integers(61, size=mask.shape, dtype="int32")
    hidden = backbone.output
    theirs = keras.Model(backbone.input, [hidden, backbone.token_embedding(hidden, reverse=True)])
    ours = keras.Model(
        wrapped.input, [wrapped.get_layer(wrapped.backbone.name).output, wrapped.output]
    )
    inputs = {"token_ids": ids, "padding_mask": mask}
    found = [both.predict(inputs, verbose=0) for both in (theirs, ours)]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a[mask == 1], b[mask == 1], atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(LLAMA3, {**LLAMA3_ROPE, "tie_word_embeddings": True}, marks=slow),
        # An epsilon that KerasHub does not pass on to its QK-norm; the weights are small for that.
        pytest.param(
            QWEN3,
            {"head_dim": 10, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False},
            id="qwen3",
        ),
        pytest.param(
            LLAMA, {"layer_norm_epsilon": 1e-2, "rope_max_wavelength": 500000}, marks=slow
        ),
        pytest.param(LLAMA, {"num_key_value_heads": 4, "num_layers": 3}, marks=slow),
        pytest.param(LLAMA3, {"num_key_value_heads": 1, "num_query_heads": 2}, marks=slow),
        pytest.param(
            QWEN3,
            {"head_dim": 16, "layer_norm_epsilon": 1e-5, "rope_scaling_factor": 2.0},
            marks=slow,
        ),
        pytest.param(QWEN3, {"head_dim": 8, "rope_max_wavelength": 1000000}, marks=slow),
    ],
)
def test_numbers_are_those_of_keras_hub_both_ways(kind, options):
    backbone = randomised(kind(**{**SHAPE, **options}))
    model = hub.from_keras_hub(backbone, max_seq_len=12)
    assert_same_numbers(backbone, model)
    again = hub.to_keras_hub(model)
    assert type(again) is (QWEN3 if kind is QWEN3 else LLAMA3)
    for a, b in zip(backbone.variables, again.variables, strict=True):
        assert a.path == b.path
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    ignored = {"name", "sliding_window_size"}
    theirs, ours = backbone.get_config(), again.get_config()
    assert {k: v for k, v in theirs.items() if k not in ignored} == {
        k: v for k, v in ours.items() if k not in ignored
    }


def test_what_keras_hub_has_not_is_refused():
    qwen = dataclasses.replace(CONFIG, qk_norm=True)
    linear = ops.RopeScaling(2.0)
    llama3 = ops.RopeScaling(8.0, 1.0, 4.0, 16)
    cases = [
        ({"sliding_window": 8}, "sliding_window=8: KerasHub's Llama has none"),
        ({"head_dim": 8}, "head_dim=8: KerasHub's Llama has hidden_dim / num_heads, 16 / 4"),
        ({"rope_scaling": linear}, "KerasHub's Llama does not honour linear scaling"),
        ({"rope_scaling": llama3, "qk_norm": True}, "Qwen3 has linear scaling alone"),
        ({"rms_norm_eps": 1e-6, "qk_norm": True}, "rms_norm_eps: block_0/attention/q_norm"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            hub.to_keras_hub(build(dataclasses.replace(CONFIG, **changes)))
    with pytest.raises(ValueError, match="LastSeenAttention overrides CausalSelfAttention.attend"):
        hub.to_keras_hub(build(block_class=LastSeenBlock))
    model = build(dataclasses.replace(qwen, sliding_window=24))  # which no token can feel
    model.blocks[0].mlp.up_proj.enable_lora(2)
    assert type(hub.to_keras_hub(build(model_class=Penalised))) is LLAMA3
    with pytest.raises(
        ValueError, match="the weight block_0/mlp/up_proj/lora_kernel_a has no place"
    ):
        hub.to_keras_hub(model)


def test_what_a_grugformer_has_not_is_refused():
    cases = [
        (LLAMA, {"dropout": 0.1}, "dropout=0.1: a Grugformer has none"),
        (LLAMA, {"rope_position_scaling_factor": 2.0}, "does not honour it"),
        (QWEN3, {"head_dim": 8, "sliding_window_size": 8}, "sliding_window_size=8"),
    ]
    for kind, options, message in cases:
        with pytest.raises(ValueError, match=message):
            hub.from_keras_hub(kind(**SHAPE, **options), max_seq_len=12)
    with pytest.raises(ValueError, match="backbone must be .* got GrugBackbone"):
        hub.from_keras_hub(hub.GrugBackbone(CONFIG))
