"""A model as lm-eval's tasks see it: text in, log-likelihoods and text out.

Whatever lm-eval's own `HFLM` does to text is done here: the split of context and continuation
(`TemplateLM._encode_pair`), the cut at the left of what is too long, the rolling windows.
"""

import json
import math

from grug_keras.generation import score_tokens
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

_MOST_NEW_TOKENS = 256  # where a task says nothing, as in HFLM
_PROMPTS = 32  # that are continued together
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class GrugLM(TemplateLM):
    """The model of a run or of a Hugging Face folder, for `lm_eval.simple_evaluate`.

    Args:
        trained: `Trained`, model and tokenizer.

    Example:

    >>> lm_eval.simple_evaluate(GrugLM(load_trained("runs/x")), tasks=["lambada_openai"])
    """

    def __init__(self, trained):
        super().__init__()
        self.model, self.bytes_tokenizer = trained.model, trained.tokenizer
        self.max_length = trained.model.config.max_seq_len
        self.name = trained.name

    @property
    def eot_token_id(self):
        """int: a document ends where the next one starts."""
        return self.bytes_tokenizer.bos_id

    @property
    def tokenizer_name(self):
        return self.bytes_tokenizer.name

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Returns the ids of a text, list of int, after a document start unless it says False.

        Every document that the model has seen began with one.
        """
        ids = self.bytes_tokenizer.encode(string.encode()).tolist()
        return ids if add_special_tokens is False else [self.bytes_tokenizer.bos_id, *ids]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """Returns the log-likelihood of each continuation, and whether it is the likeliest."""
        rows, counted = [], []
        for number, (_, context, continuation) in enumerate(requests):
            for before, rest in self._windows(context, continuation):
                rows.append((before + rest)[-(self.max_length + 1) :])
                counted.append((number, len(rest)))
        scores = score_tokens(self.model, rows) if rows else []
        found = [(0.0, True)] * len(requests)
        for (number, last), (nats, greedy) in zip(counted, scores, strict=True):
            total, is_greedy = found[number]
            nats, greedy = nats[-last:], greedy[-last:]
            found[number] = total + float(nats.sum()), is_greedy and bool(greedy.all())
        for (text, *_), answer in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def _windows(self, context, continuation):
        """Cuts a continuation that is longer than the model's context, which HFLM refuses."""
        if len(continuation) <= self.max_length:
            return [(context, continuation)] if continuation else []
        return self._rolling(continuation, context[-1])

    def _rolling(self, ids, prefix):
        windows = utils.get_rolling_token_windows(ids, prefix, self.max_length, context_len=1)
        return [utils.make_disjoint_window(window) for window in windows]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Returns the log-likelihood of each whole text, after one document start."""
        windows, counted = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for before, rest in self._rolling(ids, self.prefix_token_id):
                windows.append((None, before, rest))
                counted.append(number)
        found = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows)
        for number, (nats, _) in zip(counted, scores, strict=True):
            found[number] += nats
        for request, nats in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return found

    def generate_until(self, requests, disable_tqdm=False):
        """Returns the continuation of each context, up to the first of its stop texts."""
        alike, made = {}, [None] * len(requests)
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in alike.values():
            for i in range(0, len(numbers), _PROMPTS):
                some = numbers[i : i + _PROMPTS]
                options = requests[some[0]].args[1]
                texts = self._generate([requests[n].args[0] for n in some], options, seed=i)
                for number, text in zip(some, texts, strict=True):
                    made[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return made

    def _generate(self, contexts, options, seed):
        """Continues contexts with one set of options, as lm-eval has them."""
        default = min(_MOST_NEW_TOKENS, self.max_length // 2)
        options = normalize_gen_kwargs(options, default)
        if unknown := set(options) - _KNOWN:
            raise ValueError(f"generation_kwargs: {', '.join(sorted(unknown))} is not supported")
        new, until = options["max_gen_toks"], [u for u in options["until"] if u]
        if not 0 < new < self.max_length:
            raise ValueError(
                f"max_gen_toks={new} must leave room for a context: max_seq_len={self.max_length}"
            )
        prompts = [self.tok_encode(text)[-(self.max_length - new) :] for text in contexts]
        # A stop text that is one token ends a row there; all are looked for in the text as well.
        stop = [ids[0] for u in until if len(ids := self.tok_encode(u, False)) == 1]
        rows = self.model.generate(
            prompts,
            new,
            sampler=_sampler(options),
            stop=[self.bytes_tokenizer.bos_id, *stop],
            seed=seed,
            vocab_size=self.bytes_tokenizer.vocab_size,
        )
        texts = [self.bytes_tokenizer.decode(row, starts=False) for row in rows]
        return [
            postprocess_generated_text(text.decode(errors="replace"), until, None) for text in texts
        ]


def _sampler(options):
    """Returns the sampler that lm-eval's options ask for."""
    temperature = float(options.get("temperature", 0.0))
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if not options["do_sample"] or temperature == 0:
        return "greedy"
    import keras_hub  # takes seconds

    if options.get("top_p", 1.0) < 1:
        p, k = options["top_p"], options.get("top_k") or None
        return keras_hub.samplers.TopPSampler(p=p, k=k, temperature=temperature)
    if options.get("top_k"):
        return keras_hub.samplers.TopKSampler(k=options["top_k"], temperature=temperature)
    return keras_hub.samplers.RandomSampler(temperature=temperature)
