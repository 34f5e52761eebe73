"""Runs an experiment script: options, data, `fit`, evaluation, and a folder with the record."""

import contextlib
import dataclasses
import datetime
import importlib.util
import logging
import math
import os
import pathlib
import shlex
import sys
import tempfile
import time

import click
from grug_keras import sharding
from grug_keras.backend import describe_backend
from grug_keras.callbacks import Checkpoint, CurveLogger, StopOnInterrupt
from grug_keras.config import GrugConfig
from grug_keras.data import TokenBatches, load_corpus, load_tokenizer, token_stream
from grug_keras.data.corpus import cut_text
from grug_keras.generate import generate
from grug_keras.plot import plot_curve
from grug_keras.results import device, git_state, new_run_dir, versions, write_json
from grug_keras.schedule import Trapezoid
import keras

VALIDATION_BYTES = 2**18
EXIT_INTERRUPTED, EXIT_DIVERGED = 130, 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast a size trains.

    Args:
        steps: int, optimizer updates.
        batch_size: int, sequences a step.
        learning_rate: float, peak.
        warmup: float, fraction of the steps spent rising to the peak.
        cooldown: float, fraction of the steps spent falling to zero.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    cooldown: float = 0.7

    def schedule(self):
        """The learning rate by step."""
        return Trapezoid(self.learning_rate, self.steps, self.warmup, self.cooldown)


def main(script, recipes, build_model, build_optimizer, rules=None):
    """The command line of a speedrun script.

    Args:
        script: `__file__` of the script.
        recipes: dict of preset name -> `Recipe`. The first is the default size.
        build_model: function of a `GrugConfig`, returns the model.
        build_optimizer: function of a learning-rate schedule, returns the optimizer.
        rules: dict, how a mesh splits the variables; see `sharding.distribute`.
    """
    sizes, policies = list(recipes), ["float32", "mixed_bfloat16"]

    @click.command(context_settings={"show_default": True})
    @click.option("--size", type=click.Choice(sizes), default=sizes[0], help="Model and recipe.")
    @click.option(
        "--data",
        default="python_stdlib",
        metavar="NAME|PATH",
        help="python_stdlib (no network), a local text file or folder, or a TFDS dataset.",
    )
    @click.option(
        "--tokenizer", default="bytes", metavar="bytes|PATH", help="bytes, or a tokenizer.json."
    )
    @click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Weights and data order."
    )
    @click.option("--steps", type=click.IntRange(min=1), help="Instead of the recipe's.")
    @click.option("--batch", type=click.IntRange(min=1), help="Sequences a step, likewise.")
    @click.option("--seq-len", type=click.IntRange(min=8), help="Instead of the model's longest.")
    @click.option("--dtype", type=click.Choice(policies), default=policies[0], help="Keras policy.")
    @click.option(
        "--backend",
        type=click.Choice(["jax", "tensorflow", "torch"]),
        show_default="KERAS_BACKEND, else keras.json, else jax",
        help="Keras backend.",
    )
    @click.option(
        "--mesh",
        metavar="data=4,model=2|data=auto",
        help="Devices to train on: FSDP over data, tensor parallelism over model. JAX only. "
        "On several hosts, start the same command on each.",
    )
    @click.option(
        "--remat/--no-remat",
        default=None,
        show_default="the size's",
        help="Recompute blocks in the backward pass: less memory, more time.",
    )
    @click.option("--out", default="runs", type=click.Path(file_okay=False), help="Run folders.")
    def command(size, steps, batch, backend, dtype, mesh, **options):
        """Trains this speedrun; leaves results, curve, picture and checkpoint in OUT."""
        restart_with(backend)
        keras.config.set_dtype_policy(dtype)
        changes = {"steps": steps, "batch_size": batch}
        recipe = dataclasses.replace(recipes[size], **{k: v for k, v in changes.items() if v})
        with contextlib.ExitStack() as stack:
            try:
                if mesh:
                    keras.utils.set_random_seed(options["seed"])  # else the processes agree on one
                    sharding.initialize()
                    sharding.distribute(mesh, rules)
                    if sharding.process()[0]:  # does as the first one does, and tells nobody
                        options["out"] = stack.enter_context(tempfile.TemporaryDirectory())
                        nowhere = stack.enter_context(open(os.devnull, "w"))
                        stack.enter_context(contextlib.redirect_stdout(nowhere))
                print(describe_backend(), flush=True)
                _log_to_stderr()
                run = Speedrun(script, size, recipe, **options)
            except (ValueError, OSError, RuntimeError) as error:
                error = click.ClickException(str(error))
                sharding.leave(error)
                raise error from None
            try:
                status = run(build_model, build_optimizer)
            except BaseException as error:
                sharding.leave(error)
                raise
        sys.exit(status)

    command()


def _log_to_stderr():
    logging.basicConfig(format="%(message)s")
    level = logging.WARNING if sharding.process()[0] else logging.INFO
    logging.getLogger("grug_keras").setLevel(level)  # INFO says which kernels run
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS tells every step it takes


def restart_with(backend):
    """Keras fixes its backend on import: another one needs a new process."""
    if backend not in (None, keras.config.backend()):
        if importlib.util.find_spec(backend) is None:
            raise click.ClickException(
                f"--backend {backend}: {backend} is not installed; pip install {backend}"
            )
        os.environ["KERAS_BACKEND"] = backend
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])


class Speedrun:
    """One run: reads and checks everything on construction, trains when called.

    Args:
        script: str, path of the experiment script.
        size: str, preset of the model.
        recipe: `Recipe`.
        data: str, see `load_corpus`.
        tokenizer: str, see `load_tokenizer`.
        seed: int, of the weights and the data order.
        seq_len: int or None, sequence length; defaults to the preset's `max_seq_len`.
        remat: bool or None, instead of the preset's.
        out: str, folder of the run folders.

    Raises:
        ValueError: if the data or the options cannot make a batch.
    """

    def __init__(
        self,
        script,
        size,
        recipe,
        *,
        data,
        tokenizer="bytes",
        seed=0,
        seq_len=None,
        remat=None,
        out="runs",
    ):
        self.script, self.size, self.recipe, self.seed = pathlib.Path(script), size, recipe, seed
        self.tokenizer = load_tokenizer(tokenizer)
        self.config = size_config(size, self.tokenizer.vocab_size, seq_len, remat)
        self.corpus = load_corpus(data)
        self.validation = self.corpus.validation_slice(VALIDATION_BYTES)
        window = {
            "bos_id": self.tokenizer.bos_id,
            "seq_len": self.config.max_seq_len,
            "batch_size": recipe.batch_size,
            "rows": sharding.rows(recipe.batch_size),
        }
        train_tokens = token_stream(self.corpus.train, self.tokenizer)
        self.train_batches = TokenBatches(train_tokens, steps=recipe.steps, seed=seed, **window)
        self.validation_tokens = token_stream(self.validation, self.tokenizer)
        self.validation_batches = TokenBatches(self.validation_tokens, **window)
        self.schedule = recipe.schedule()
        self.folder = new_run_dir(out, f"{self.script.stem}-{size}-seed{seed}")

    def __call__(self, build_model, build_optimizer):
        """Trains, evaluates, records. Returns the exit status of the process."""
        begin = time.perf_counter()
        keras.utils.set_random_seed(self.seed)
        try:
            model = build_model(self.config)
            model.build()
        except ValueError as error:  # a variable that the mesh cannot split
            raise click.ClickException(str(error)) from error
        model.compile(build_optimizer(self.schedule))
        record = self._describe(model)
        self._announce(record)
        self._save(record)
        try:
            self._fit(model, record)
            if record["status"] == "trained":
                self._evaluate(model, record)
                record["status"] = "finished"
                with sharding.on_this_host(model) as whole:
                    record["sample"] = self._sample(whole)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            record["status"] = "interrupted" if interrupted else "failed"
            record["error"] = repr(error)
            raise
        finally:
            record["finished"] = _now()
            record["total_seconds"] = round(time.perf_counter() - begin, 1)
            self._save(record)
        plot_curve(
            self.folder / "curve.csv",
            self.folder / "loss.png",
            title=f"{self.script.stem}, {self.size}, on {self.corpus.name}",
            validation=record["loss"],
        )
        return self._report(record)

    def _save(self, record):
        write_json(self.folder / "results.json", record)

    def _describe(self, model):
        """Everything known before training; figures that come later are null until then."""
        commit, dirty = git_state(self.script.resolve().parent)
        total = model.count_params()
        tables = (model.token_embedding, model.lm_head)
        return {
            "schema": 1,
            "id": self.folder.name,
            "experiment": self.script.stem,
            "status": "running",
            "command": shlex.join(["python", *sys.argv]),
            "started": _now(),
            "finished": None,
            "commit": commit,
            "dirty": dirty,
            "size": self.size,
            "config": dataclasses.asdict(model.config),
            "block_class": model.block_class.__name__,
            "recipe": dataclasses.asdict(self.recipe),
            "optimizer": type(model.optimizer).__name__,
            "dtype": model.dtype_policy.name,
            "seed": self.seed,
            "data": {
                "name": self.corpus.name,
                "sha256": self.corpus.sha256,
                "train_bytes": sum(map(len, self.corpus.train)),
                "validation_bytes": sum(map(len, self.validation)),
            },
            "tokenizer": {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
            "backend": keras.config.backend(),
            "device": device(),
            "mesh": sharding.describe(),
            "versions": versions(),
            "parameters": total,
            "parameters_non_embedding": total - sum(layer.count_params() for layer in tables),
            "steps": 0,
            "tokens": 0,
            "seconds": None,
            "compile_seconds": None,
            "evaluation_seconds": None,
            "total_seconds": None,
            "tokens_per_second": None,
            "train_loss": None,
            "loss": None,
            "bits_per_byte": None,
            "sample": None,
        }

    def _announce(self, record):
        data = record["data"]
        print(
            f"{record['experiment']}: {record['parameters'] / 1e6:.2f}M parameters, "
            f"{self.recipe.steps} steps of {self.recipe.batch_size} x {self.config.max_seq_len} "
            f"tokens of {data['name']} ({data['train_bytes'] / 1e6:.1f} MB, "
            f"sha256 {data['sha256'][:12]})",
            flush=True,
        )

    def _fit(self, model, record):
        """Trains; however it ends, the curve, the last checkpoint and the figures are kept."""
        curve = CurveLogger(
            self.folder / "curve.csv",
            tokens_per_step=self.recipe.batch_size * self.config.max_seq_len,
            steps=self.recipe.steps,
            schedule=self.schedule,
        )
        checkpoint = Checkpoint(
            self.folder / "model.keras", every=max(1, self.recipe.steps // 4), clock=curve
        )
        stop = StopOnInterrupt()
        try:
            model.fit(
                self.train_batches,
                shuffle=False,  # the batches come in their own seeded order
                verbose=1 if sys.stdout.isatty() else 0,
                callbacks=[curve, checkpoint, stop],
            )
            checkpoint.save()
        finally:
            stop.restore()
            curve.close()
            record.update(curve.figures())
        if not math.isfinite(curve.last_loss):
            record["status"] = "diverged"
        elif stop.interrupted and curve.steps_done < self.recipe.steps:
            record["status"] = "interrupted"
        else:
            record["status"] = "trained"

    def _evaluate(self, model, record):
        """Loss per token and bits per byte of the whole validation slice, from its raw bytes."""
        begin = time.perf_counter()
        record["loss"] = model.evaluate(self.validation_batches, verbose=0)
        nats = record["loss"] * (len(self.validation_tokens) - 1)
        record["bits_per_byte"] = nats / math.log(2) / sum(map(len, self.validation))
        record["evaluation_seconds"] = round(time.perf_counter() - begin, 2)

    def _sample(self, model):
        quarter = self.config.max_seq_len // 4
        prompt = cut_text(self.validation[0], quarter - 1)  # a token is a byte or more: it fits
        text = generate(model, self.tokenizer, prompt, length=3 * quarter, seed=self.seed)
        return {"prompt": prompt.decode(errors="replace"), "text": text.decode(errors="replace")}

    def _report(self, record):
        """Prints the outcome; returns the exit status."""
        if record["status"] == "diverged":
            print(f"diverged: the loss of step {record['steps']} is not finite; see {self.folder}")
            return EXIT_DIVERGED
        if record["status"] == "interrupted":
            print(
                f"interrupted after step {record['steps']}; checkpoint and results in {self.folder}"
            )
            return EXIT_INTERRUPTED
        sample = record["sample"]
        print(f"\nsample, continuing {sample['prompt']!r}:\n{sample['text']}\n")
        print(f"results, curve, picture and checkpoint: {self.folder}")
        print(
            f"validation: {record['bits_per_byte']:.3f} bits per byte "
            f"(loss {record['loss']:.4f}), {record['steps']} steps, "
            f"{record['tokens']:,} tokens in {record['seconds']:.0f} s, "
            f"{record['tokens_per_second']:,} tokens/s, {record['total_seconds']:.0f} s in all"
        )
        return 0


def size_config(size, vocab_size, seq_len=None, remat=None):
    """The preset with what a run changes of it.

    Args:
        size: str, name of the preset.
        vocab_size: int, of the tokenizer; the model's is the next multiple of 128.
        seq_len: int or None, `max_seq_len` instead of the preset's.
        remat: bool or None, likewise.
    """
    changes = {"max_seq_len": seq_len, "remat": remat}
    changes = {name: value for name, value in changes.items() if value is not None}
    return GrugConfig.preset(size, vocab_size=128 * math.ceil(vocab_size / 128), **changes)


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
