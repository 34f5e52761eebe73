"""One training run: its data, its folder, and the way from the first step to the record."""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import pathlib
import shlex
import sys
import time

import click
from grug_keras import sharding
from grug_keras.checkpoints import Checkpoints
from grug_keras.config import GrugConfig
from grug_keras.data import TokenBatches, load_data
from grug_keras.data.sources import cut_text
from grug_keras.flops import MFU_CONVENTION, flops_per_token, peak_flops
from grug_keras.generate import generate
from grug_keras.interrupt import StopOnInterrupt
from grug_keras.metrics import SINKS, Meter, peak_memory
from grug_keras.plot import plot_curve
from grug_keras.results import (
    device,
    git_state,
    new_run_dir,
    seal,
    versions,
    write_atomically,
    write_json,
)
from grug_keras.resume import check_same, find_run, lock
from grug_keras.roles import table
import keras
import numpy as np

logger = logging.getLogger("grug_keras.run")

VALIDATION_BYTES = 2**18
EXIT_INTERRUPTED, EXIT_DIVERGED = 130, 1


class Speedrun:
    """One run: reads and checks everything on construction, trains when called.

    Args:
        script: str, path of the experiment script.
        size: str, preset of the model.
        recipe: `Recipe`.
        data: str, see `load_data`.
        tokenizer: str or None, likewise.
        packing: str, of `TokenBatches`.
        seed: int, of the weights and the data order.
        seq_len: int or None, sequence length; defaults to the preset's `max_seq_len`.
        remat: bool or None, instead of the preset's.
        out: str, folder of the run folders.
        resume: str or None. Path of a run folder to go on with; `""` is the newest one in `out`
            of this script that is not finished, or a new one.
        log: names of `SINKS`, where the numbers go besides the run folder.

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
        tokenizer=None,
        packing="stream",
        seed=0,
        seq_len=None,
        remat=None,
        out="runs",
        resume=None,
        log=(),
    ):
        self.script, self.size, self.recipe, self.seed = pathlib.Path(script), size, recipe, seed
        self.packing = packing
        began = find_run(out, self.script.stem, resume, size, seed)
        kept = began and began / "tokenizer.json"
        if kept and kept.exists():  # a BPE is not trained again
            tokenizer = str(kept)
        self.data = load_data(data, tokenizer, VALIDATION_BYTES)
        self.tokenizer = self.data.tokenizer
        self.config = size_config(size, self.tokenizer.vocab_size, seq_len, remat)
        window = {
            "bos_id": self.tokenizer.bos_id,
            "seq_len": self.config.max_seq_len,
            "batch_size": recipe.batch_size,
            "rows": sharding.rows(recipe.batch_size, recipe.accumulate),
        }
        self.train_batches = TokenBatches(
            self.data.train, steps=recipe.steps, seed=seed, packing=packing, **window
        )
        self.validation_batches = TokenBatches(self.data.validation, **window)
        self.schedule = recipe.schedule()
        self.out, self.folder, self.began = out, began, None
        if began is not None:
            self.began = json.loads((began / "results.json").read_text(encoding="utf-8"))
        self.log = () if sharding.process()[0] else log
        for name in self.log:
            SINKS[name].require()

    def __call__(self, build_model, build_optimizer):
        """Trains, evaluates, records. Returns the exit status of the process."""
        begin = time.perf_counter()
        keras.utils.set_random_seed(self.seed)
        with _refusals():
            model = build_model(self.config)
            model.build()  # a variable that the mesh cannot split
            model.compile(build_optimizer(self.schedule), accumulate=self.recipe.accumulate)
            model.optimizer.build(model.trainable_variables)  # one that no optimizer takes
            shared = self._open()
            record = self._describe(model)
            if self.began is not None:
                check_same(self.began, record, self.folder)
            self.sinks = [SINKS[name](self.folder / name, self.folder.name) for name in self.log]
            checkpoints = Checkpoints(shared / "checkpoints", keep=self.recipe.keep)
        with contextlib.closing(checkpoints):
            return self._run(model, record, checkpoints, begin)

    def _open(self):
        """Takes the run's folder; returns where all processes find it.

        Late, so that what fails or is killed before it has a record leaves no folder.
        """
        if self.folder is None:
            name = f"{self.script.stem}-{self.size}-seed{self.seed}"
            self.folder = new_run_dir(self.out, name)
        self.lock = lock(self.folder)
        return pathlib.Path(sharding.agree(str(self.folder.resolve())))

    def _run(self, model, record, checkpoints, begin):
        with _refusals():
            step, notes = checkpoints.restore(model) or (0, {})
        self._announce(model, record, step)
        if self.began is not None:
            record["started"] = self.began["started"]
            record["resumed"] = [*self.began.get("resumed", []), step]
            if self.began["dirty"] or self.began["commit"] != record["commit"]:
                record["dirty"] = True  # no one commit has made it
        record.update(notes.get("record", {}))
        self.tokenizer.save(self.folder)
        self._save(record)
        try:
            self._train(model, record, checkpoints, step, notes)
            if record["status"] == "trained":
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
            record["peak_memory_bytes"] = peak_memory()
            for sink in self.sinks:
                sink.close()
            self._save_if_there_is_room(record)
            self.lock.release()
        plot_curve(
            self.folder / "curve.csv",
            self.folder / "loss.png",
            title=f"{self.script.stem}, {self.size}, on {self.data.name}",
            validation=record["loss"],
        )
        return self._report(record, checkpoints)

    def _save(self, record):
        write_json(self.folder / "results.json", seal(record))

    def _save_if_there_is_room(self, record):
        try:
            self._save(record)
        except OSError as error:
            logger.warning("results.json is not written: %s", error)

    def _describe(self, model):
        """Everything known before training; figures that come later are null until then."""
        commit, dirty = git_state(self.script.resolve().parent)
        total = model.count_params()
        tables = (model.token_embedding, model.lm_head)
        return {
            "schema": 3,
            "id": self.folder.name,
            "experiment": self.script.stem,
            "status": "running",
            "command": shlex.join(["python", *sys.argv]),
            "started": _now(),
            "resumed": [],
            "finished": None,
            "commit": commit,
            "dirty": dirty,
            "size": self.size,
            "config": dataclasses.asdict(model.config),
            "block_class": model.block_class.__name__,
            "recipe": dataclasses.asdict(self.recipe),
            "optimizer": type(model.optimizer).__name__,
            "optimizer_config": _plain(keras.saving.serialize_keras_object(model.optimizer)),
            "dtype": model.dtype_policy.name,
            "seed": self.seed,
            "packing": self.packing,
            "data": self.data.describe(),
            "tokenizer": {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
            "backend": keras.config.backend(),
            "device": device(),
            "mesh": sharding.describe(),
            "versions": versions(),
            "parameters": total,
            "parameters_non_embedding": total - sum(layer.count_params() for layer in tables),
            "flops_per_token": flops_per_token(model, self.config.max_seq_len),
            "mfu_convention": MFU_CONVENTION,
            "steps": 0,
            "tokens": 0,
            "seconds": None,
            "compile_seconds": None,
            "evaluation_seconds": 0.0,
            "checkpoint_seconds": 0.0,
            "total_seconds": None,
            "ms_per_step": None,
            "tokens_per_second": None,
            "mfu": None,
            "peak_memory_bytes": None,
            "train_loss": None,
            "evaluations": [],
            "loss": None,
            "bits_per_byte": None,
            "sample": None,
        }

    def _announce(self, model, record, step):
        data = record["data"]
        print(
            f"{record['experiment']}: {record['parameters'] / 1e6:.2f}M parameters, "
            f"{self.recipe.steps} steps of {self.recipe.batch_size} x {self.config.max_seq_len} "
            f"tokens of {data['name']} ({data['train_tokens'] / 1e6:.1f}M, "
            f"sha256 {data['sha256'][:12]})",
            flush=True,
        )
        print(table(model), flush=True)
        if self.began is not None:
            print(f"going on after step {step} of {self.folder}", flush=True)

    def _train(self, model, record, checkpoints, step, notes):
        """Trains from stop to stop; however it ends, curve, checkpoint and figures are kept."""
        recipe, mesh = self.recipe, record["mesh"]
        used = mesh["data"] * mesh["model"] if mesh else 1
        meter = Meter(
            self.folder / "curve.csv",
            tokens_per_step=recipe.batch_size * self.config.max_seq_len,
            steps=recipe.steps,
            schedule=self.schedule,
            flops_per_token=record["flops_per_token"],
            peak_flops=peak_flops({**record["device"], "count": used}),
            first_step=step,
            train_seconds=notes.get("train_seconds", 0.0),
            sinks=self.sinks,
        )
        stop = StopOnInterrupt(model)
        try:
            with stop:
                while meter.steps_done < recipe.steps and not stop.interrupted:
                    model.fit(
                        self.train_batches.between(meter.steps_done, recipe.stop(meter.steps_done)),
                        shuffle=False,  # the batches come in their own seeded order
                        verbose=0,  # the meter speaks
                        callbacks=[meter, stop],
                    )
                    if meter.bad_step is not None or not _finite(model):
                        record["status"] = "diverged"
                        break
                    self._halt(model, record, checkpoints, meter)
            if record["status"] == "running":
                done = meter.steps_done == recipe.steps
                if done and record["loss"] is None:  # a run that goes on only for this
                    self._evaluate(model, record, recipe.steps)
                record["status"] = "trained" if done else "interrupted"
                self._export(model)
        finally:
            meter.close()
            checkpoints.finish()
            record.update(meter.figures())
            record["bad_step"] = meter.bad_step

    def _halt(self, model, record, checkpoints, meter):
        """Evaluates, if it is time, and saves, even if the evaluation fails."""
        loss = None
        try:
            if self.recipe.evaluates(meter.steps_done):
                loss = self._evaluate(model, record, meter.steps_done)
        finally:
            begin = time.perf_counter()
            names = ("evaluations", "loss", "bits_per_byte", "evaluation_seconds")
            notes = {
                "train_seconds": meter.train_seconds,
                "record": {name: record[name] for name in names},
            }
            if meter.flush():  # what goes on from there needs the rows
                checkpoints.save(model, meter.steps_done, notes, loss)
            record["checkpoint_seconds"] += round(time.perf_counter() - begin, 3)
            if loss is not None:
                self._save_if_there_is_room({**record, **meter.figures()})

    def _evaluate(self, model, record, step):
        """Loss per token and bits per byte of the validation slice."""
        begin = time.perf_counter()
        loss = model.evaluate(self.validation_batches, verbose=0)
        nats = loss * (len(self.data.validation) - 1)
        bits = nats / math.log(2) / self.data.validation_bytes
        record["evaluations"].append({"step": step, "loss": loss, "bits_per_byte": bits})
        record["evaluation_seconds"] += round(time.perf_counter() - begin, 2)
        for sink in self.sinks:
            sink.log(step, {"validation_loss": loss, "bits_per_byte": bits})
        if step == self.recipe.steps:
            record.update(loss=loss, bits_per_byte=bits)
        return loss

    def _export(self, model):
        """The model as one file, whole on this host."""
        with sharding.on_this_host(model) as whole:
            if sharding.process()[0] == 0:
                write_atomically(self.folder / "model.keras", whole.save)

    def _sample(self, model):
        quarter = self.config.max_seq_len // 4
        start, tokens = self.tokenizer.bos_id, self.data.validation[1 : 1 + quarter]
        first = tokens[: np.argmax(np.append(tokens, start) == start)]
        # A token is a byte or more: so many bytes fit.
        prompt = cut_text(self.tokenizer.decode(first), quarter - 1)
        text = generate(model, self.tokenizer, prompt, length=3 * quarter, seed=self.seed)
        return {"prompt": prompt.decode(errors="replace"), "text": text.decode(errors="replace")}

    def _report(self, record, checkpoints):
        """Prints the outcome; returns the exit status."""
        if record["status"] == "diverged":
            kept = checkpoints.steps()
            good = f"the last good checkpoint is of step {kept[-1]}" if kept else "no checkpoint"
            bad = record["bad_step"]
            what = f"weights after step {record['steps']} are"
            if bad is not None:
                what = f"loss of step {bad + 1} is"
            print(f"diverged: the {what} not finite; {good}, in {self.folder}")
            if bad is not None:
                documents = self.train_batches.documents(bad)
                shown = ", ".join(map(str, documents[:20])) + (", ..." if documents[20:] else "")
                print(f"its batch holds training documents {shown}")
            return EXIT_DIVERGED
        if record["status"] == "interrupted":
            print(
                f"interrupted after step {record['steps']}; checkpoint and results in "
                f"{self.folder}; --resume goes on"
            )
            return EXIT_INTERRUPTED
        sample = record["sample"]
        print(f"\nsample, continuing {sample['prompt']!r}:\n{sample['text']}\n")
        print(f"results, curve, picture and checkpoints: {self.folder}")
        print(
            f"validation: {record['bits_per_byte']:.3f} bits per byte "
            f"(loss {record['loss']:.4f}), {record['steps']} steps, "
            f"{record['tokens']:,} tokens in {record['seconds']:.0f} s, "
            f"{record['tokens_per_second'] or 0:,} tokens/s, {record['total_seconds']:.0f} s in all"
        )
        return 0


@contextlib.contextmanager
def _refusals():
    """What is refused before training is a line, not a traceback."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _finite(model):
    """The loss of a step is from before its update: only the weights can tell about that."""
    return all(keras.ops.all(keras.ops.isfinite(w)) for w in model.trainable_variables)


def _plain(value):
    """A value as JSON, numbers of other libraries as Python's."""
    return json.loads(json.dumps(value, default=float))


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
