"""The interval of a score over documents: of the model's own losses, document by document."""

from types import SimpleNamespace

import grug_keras
from grug_keras.data import ByteTokenizer, TokenBatches, token_stream
from grug_keras.loss import next_token_loss
from grug_keras.training import document_scores
from grug_keras.training.document_scores import TokenLosses, score_interval
import keras
import numpy as np
import pytest


class CappedModel(grug_keras.Grugformer):
    """A model whose logits and loss are not those of the plain head."""

    def head(self, hidden):
        return 2 * keras.ops.tanh(super().head(hidden) / 2)

    def token_mean_loss(self, hidden, labels, weights):
        cap = {"logit_soft_cap": 2.0}
        return next_token_loss(hidden, self.lm_head.kernel, labels, weights, **cap)


TEXTS = [b"a" * 5 + b"b" * i + bytes([65 + i]) for i in range(1, 16)]


@pytest.fixture(scope="module")
def evaluated():
    config = grug_keras.GrugConfig(
        **{"vocab_size": 257, "hidden_dim": 16, "intermediate_dim": 24, "num_layers": 1},
        **{"num_heads": 1, "num_kv_heads": 1, "max_seq_len": 12, "initializer_std": 0.3},
    )
    model = CappedModel(config)
    model.build()
    model.compile("adamw")
    tokens = token_stream(TEXTS, ByteTokenizer())
    part = SimpleNamespace(tokenizer=ByteTokenizer(), validation=tokens)
    batches = TokenBatches(tokens, bos_id=256, seq_len=12, batch_size=4)
    return model, part, batches


def data(*parts, weights=None):
    return SimpleNamespace(parts=parts, weights=weights or (1.0,) * len(parts))


def test_the_losses_of_documents_sum_to_the_loss(evaluated, monkeypatch):
    model, part, batches = evaluated
    monkeypatch.setattr(document_scores, "_LOGITS", 257 * 4 * 3)  # four parts of three positions
    bits, num_bytes = document_scores.document_scores(TokenLosses(model), part, batches)
    assert num_bytes.tolist() == [len(text) for text in TEXTS]
    nats = model.evaluate(batches, verbose=0) * (len(part.validation) - 1)
    assert bits.sum() * np.log(2) == pytest.approx(nats, rel=1e-5)
    alone = TokenBatches(
        token_stream(TEXTS[:1], ByteTokenizer()), bos_id=256, seq_len=12, batch_size=4
    )
    of_first = model.evaluate(alone, verbose=0) * (len(TEXTS[0]) + 1)
    assert bits[0] * np.log(2) == pytest.approx(of_first, rel=1e-5), "each document by itself"


def test_the_interval_is_that_of_drawn_documents(evaluated):
    model, part, batches = evaluated
    bits, num_bytes = document_scores.document_scores(TokenLosses(model), part, batches)
    low, high = score_interval(model, data(part), [batches], seed=0)
    assert low < bits.sum() / num_bytes.sum() < high
    # The delta method: the spread of a ratio of means.
    ratio = bits.sum() / num_bytes.sum()
    error = np.sqrt(np.sum((bits - ratio * num_bytes) ** 2)) / num_bytes.sum()
    assert (high - low) / 3.92 == pytest.approx(error, rel=0.25)
    assert [low, high] == score_interval(model, data(part), [batches], seed=0)


def test_the_interval_of_a_mixture_is_of_its_weights(evaluated):
    model, part, batches = evaluated
    few = SimpleNamespace(tokenizer=part.tokenizer, validation=part.validation[:20])
    few_batches = TokenBatches(few.validation, bos_id=256, seq_len=12, batch_size=4)
    both, sizes = data(part, few, weights=(1.0, 0.0)), [batches, few_batches]
    assert score_interval(model, both, sizes, 0) == score_interval(model, data(part), [batches], 0)
    assert score_interval(model, data(part, few, weights=(0.5, 0.5)), sizes, 0) is None
    one = np.diff(score_interval(model, data(part), [batches], 0))
    two = np.diff(score_interval(model, data(part, part, weights=(0.5, 0.5)), [batches] * 2, 0))
    assert two == pytest.approx(one / np.sqrt(2), rel=0.15), "sources are drawn independently"
