"""Train a language model with accelerate, in one process or several; an interrupted run resumes from a checkpoint."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from uncork.diagnose.output_layer import learned_slopes
from uncork.lab.data.corpora import Corpus
from uncork.lab.errors import LabError
from uncork.lab.models import LanguageModel
from uncork.lab.run.interrupts import InterruptGuard
from uncork.lab.run.progress import Meter, Progress
from uncork.lab.run.store import Checkpoint, Run
from uncork.lab.run.variables import refuse_variables
from uncork.lab.train import checkpoints as ckpt
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.counted import training_batches
from uncork.lab.train.evaluation import Evaluation, evaluate, unknown_share
from uncork.lab.train.memory import require_memory
from uncork.lab.train.optimisation import (
    averaging_triggered,
    build_optimizer,
    clip_gradients,
    clipped_together,
    lr_factor,
    set_lr,
    weight_average,
)
from uncork.lab.train.result import run_result
from uncork.lab.train.services import build_accelerator, tensorboard_writer


class TrainingDiverged(LabError):
    """The loss or a gradient is NaN or infinite. The last checkpoint, where one was written before, stays.

    Attributes: `step` and `epoch` at which it was seen; `last_loss`, the last finite cross-entropy (nats), or None.
    """

    def __init__(
        self, what: str, step: int, epoch: float, last_loss: float | None, lr: float, kept: int | None
    ) -> None:
        self.step, self.epoch, self.last_loss = step, epoch, last_loss
        before = "no loss was finite before" if last_loss is None else f"the last finite loss was {last_loss:.4g}"
        checkpoint = "No checkpoint was written before" if kept is None else f"The checkpoint of step {kept} is kept"
        super().__init__(
            f"training diverged: {what} at step {step} (epoch {epoch:.2f}); {before}. {checkpoint}. "
            f"Try a lower lr (now {lr:g}), output_lr_scale or function_lr_scale, or a smaller clip"
        )


def train(
    config: TrainConfig,
    corpus: Corpus,
    run: Run,
    *,
    resume: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    tensorboard: bool = False,
    threads: int | None = None,
    cpu: bool = False,
) -> dict[str, Any]:
    """Train one model and return its result, which is also stored as the run's result.json.

    A run that is done, with the same settings on the same text, returns its result at once; one that was stopped goes
    on from its last checkpoint, on a CPU with the same number of threads to the same bits. In several processes
    (`accelerate launch`, `torchrun`), each reads its share of the streams, and the first one writes.

    Args:
        config: what to train; see `TrainConfig`.
        corpus: the text, as `config.load_corpus()` gives it.
        run: where metrics, checkpoints and the result go; made with `config.stored(text_record(corpus))`.
        resume: go on from the last checkpoint; False starts afresh.
        on_progress: called, in the first process, with every row of the metrics.
        tensorboard: also write the metrics to the folder `tensorboard` of the run.
        threads: number of torch's threads, set for the whole process. None: unchanged.
        cpu: compute on the CPU even where there is a GPU.

    Raises:
        TrainingDiverged: the loss is NaN or infinite.
        KeyboardInterrupt: Ctrl-C was pressed; a checkpoint was written first, unless it was pressed a second time.
        LabError: options that do not fit one another or the corpus; a run or a checkpoint of another training, or of
            another text; an environment variable that would change the numbers; a full disk.
    """
    refuse_variables(config.precision)
    run.require(config.stored(text_record(corpus)))
    done = run.result
    if done is not None:
        if not (run.path / ckpt.TOKENIZER_FILE).exists():  # the text is the same, and so is what made its ids
            ckpt.save_tokenizer(run, corpus.tokenizer)
        return done
    if threads is not None:
        torch.set_num_threads(threads)
    accelerator = build_accelerator(config, cpu)
    device = accelerator.device
    with (
        run.lock() if accelerator.is_main_process else nullcontext(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        InterruptGuard() as interrupt,
    ):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            trainer = Trainer(config, corpus, run, accelerator, interrupt, on_progress)
            trainer.start(resume)
        except Exception:
            if accelerator.is_main_process:
                run.discard_unused()
            raise
        with tensorboard_writer(
            run, tensorboard and accelerator.is_main_process, trainer.state.step + 1
        ) as trainer.board:
            trainer.train()
        return trainer.finish()


class Trainer:
    """One session of training: call `start`, `train` and `finish`, in this order.

    Args:
        config, corpus, run, on_progress: as for the function `train`.
        accelerator: an accelerate.Accelerator, for device, processes and precision.
        interrupt: a guard whose context is entered already.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        run: Run,
        accelerator: Any,
        interrupt: InterruptGuard,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.corpus, self.run = config, corpus, run
        self.accelerator, self.interrupt, self.on_progress = accelerator, interrupt, on_progress
        self.board: Any = None  # TensorBoard's SummaryWriter, where wanted
        self.main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device
        self.unknown = {split: unknown_share(corpus.splits[split], corpus.tokenizer) for split in ("valid", "test")}
        require_memory(config, corpus.vocab_size, self.device)
        self.model = ckpt.build_untrained(config, corpus)
        self.streams = training_batches(
            corpus.splits["train"],
            self.model,
            config.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.description = ckpt.describe(config, self.model, corpus)
        self.description["processes"] = accelerator.num_processes
        self.wrapped = accelerator.prepare(self.model)
        self.optimizer = build_optimizer(self.model, config, function_lr_scale=config.function_lr_scale)
        self.average: AveragedModel | None = None
        self.hidden: tuple[Tensor, ...] = ()
        self.state = ckpt.TrainState()
        self.totals = self._zero_totals()
        self.last_loss: float | None = None
        self.valid_seconds = 0.0
        """What the last validation of this session took."""
        self.steps_total = self._count_steps()
        torch.manual_seed(ckpt.derived_seed(config.seed, f"training {accelerator.process_index}"))

    def start(self, resume: bool) -> None:
        """Go to where the last checkpoint was written, or to the beginning."""
        checkpoint = self.run.load_checkpoint(ckpt.LAST) if resume else None
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.main:
            at, validated = self.state.step, self.state.validated_step
            self.run.truncate_metrics(lambda row: row["step"] <= (validated if row["kind"] == "valid" else at))
            ckpt.save_tokenizer(self.run, self.corpus.tokenizer)
        self.segments = self._segments(self.state.epoch)
        self.saved_at = time.perf_counter()
        # A second process must not read checkpoints that the first one is about to replace.
        self.accelerator.wait_for_everyone()

    def train(self) -> None:
        """Train to the end or to Ctrl-C, with validations, rows of the metrics and checkpoints."""
        self.wrapped.train()
        meter = Meter("training")
        try:
            while True:
                if self._validation_due():
                    self._validate()
                if self.interrupt.requested and self.accelerator.num_processes == 1:
                    raise KeyboardInterrupt
                if self.state.step == self.steps_total or self.state.stopped:
                    break
                meter(self.state.step, self.steps_total)
                self._step()
                if self.state.step % self.config.log_every == 0 or self.state.step == self.steps_total:
                    self._row()
            if self.state.row_steps:
                self._row()
        except KeyboardInterrupt:
            if not self.interrupt.torn:
                self._save()
            raise
        self._save()

    def finish(self) -> dict[str, Any]:
        """Evaluate the best weights on the test split and write the result."""
        self.accelerator.wait_for_everyone()
        best = self.run.load_checkpoint(ckpt.BEST)
        if best is None:
            raise LabError(
                f"{self.run.path}: the checkpoint of the best weights is gone; remove the folder and start again"
            )
        ckpt.load_model(self.model, best)
        with self._interruptible():
            test = self._evaluate(self.model, "test")
        assert self.state.best is not None
        result = run_result(
            self.config, self.corpus, self.model, self.state,
            epochs=self._epoch(), valid=self._evaluation("valid", self.state.best), test=test, rows=self.run.metrics(),
            device=self.device,
        )  # fmt: skip
        if self.main:
            self.run.finish(result)
        self.accelerator.wait_for_everyone()
        return result

    def _step(self) -> None:
        state, started = self.state, time.perf_counter()
        if state.segment == 0:
            self._begin_epoch()
        start, length = self.segments[state.segment]
        tokens, target = (part.to(self.device) for part in self.streams.batch(start, length))
        factor = self._lr_factor(state.step) * (length / self.config.bptt if self.config.variable_bptt else 1.0)
        set_lr(self.optimizer, factor, functions=state.step >= self.config.function_start * self.steps_total)
        output = self.wrapped(tokens, target, self.hidden)
        self.optimizer.zero_grad()
        self.accelerator.backward(output.loss)
        norms = clip_gradients(self.optimizer, self.config.clip, self.config.function_clip)
        size = self.streams.size(length)
        reading = torch.stack([output.cross_entropy.double() * size, *(norm.double() for norm in norms)])
        if self.device.type == "cpu":
            self._require_finite(reading)
            self.last_loss = output.cross_entropy.item()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.hidden = tuple(part.detach() for part in output.state)
        self.totals += reading
        state.step += 1
        state.tokens += size * self.accelerator.num_processes
        state.row_tokens += size
        state.row_steps += 1
        state.segment += 1
        if state.segment == len(self.segments):
            state.epoch, state.segment = state.epoch + 1, 0
        state.row_seconds += time.perf_counter() - started

    def _begin_epoch(self) -> None:
        self.segments = self._segments(self.state.epoch)
        self.hidden = ()  # the streams start again
        asgd = self.config.asgd
        if isinstance(asgd, int) and self.state.epoch + 1 >= asgd and self.average is None:
            self.average = weight_average(self.model)

    def _row(self) -> None:
        """Write a row of the metrics; then, if it is time, a checkpoint."""
        state, started = self.state, time.perf_counter()
        due = self.main and time.perf_counter() - self.saved_at >= self.config.checkpoint_every
        asked = torch.tensor([self.interrupt.requested, due], dtype=torch.float64, device=self.device)
        # One reduction carries everything: what any process was asked to do (stop, save), all of them do.
        summed = self.accelerator.reduce(torch.cat([self.totals, asked]), reduction="sum")
        self._require_finite(summed)
        *totals, requested, due_count = summed.tolist()
        nats, *norms = (total / self.accelerator.num_processes for total in totals)
        state.row_seconds += time.perf_counter() - started
        state.seconds += state.row_seconds
        self.last_loss = nats / state.row_tokens
        row = {
            "kind": "train",
            "step": state.step,
            "epoch": self._epoch(),
            "tokens": state.tokens,
            "cross_entropy": self.last_loss,
            "lr": self.config.lr * self._lr_factor(state.step - 1),
            "grad_norm": norms[0] / state.row_steps,
            "function_grad_norm": norms[1] / state.row_steps if norms[1:] else None,
            "tokens_per_second": state.row_tokens * self.accelerator.num_processes / state.row_seconds,
            "seconds": state.seconds,
        }
        self._write(row)
        step_seconds = state.row_seconds / state.row_steps
        self.totals = self._zero_totals()
        state.row_tokens = state.row_steps = 0
        state.row_seconds = 0.0
        if due_count > 0:
            self._save()
        if self.on_progress is not None and self.main:
            self.on_progress(self._progress(row, step_seconds))
        if requested > 0:
            self.interrupt.requested = True
            raise KeyboardInterrupt

    def _validation_due(self) -> bool:
        state = self.state
        if state.validated_step == state.step:
            return False
        if state.step == self.steps_total:
            return True
        return state.segment == 0 if self.config.eval_every is None else state.step % self.config.eval_every == 0

    def _validate(self) -> None:
        state, started = self.state, time.perf_counter()
        model = self.model if self.average is None else cast(LanguageModel, self.average.module)
        with self._interruptible():
            valid = self._evaluate(model, "valid")
        if not math.isfinite(valid.cross_entropy):
            raise self._diverged("the validation loss is not finite")
        if state.best is None or valid.cross_entropy < state.best:
            state.best_step = state.step
            if self.main:
                ckpt.save_best(self.run, state.step, model, self.description)
        state.history.append(valid.cross_entropy)
        state.validated_step = state.step
        row: dict[str, Any] = {
            "kind": "valid", "step": state.step, "epoch": self._epoch(), "tokens": state.tokens,
            "cross_entropy": valid.cross_entropy, "perplexity": valid.perplexity,
        }  # fmt: skip
        slopes = learned_slopes(self.model.head)
        self._write(row if slopes is None else {**row, "slopes": slopes})
        if self.config.asgd == "trigger" and self.average is None and averaging_triggered(state.history):
            self.average = weight_average(self.model)
        state.stopped = self.config.patience is not None and state.checks_since_best >= self.config.patience
        self.valid_seconds = time.perf_counter() - started

    def _evaluate(self, model: LanguageModel, split: str) -> Evaluation:
        """Every process evaluates; all of them use the first one's result, so that they decide alike."""
        tokens, config = self.corpus.splits[split], self.config
        found = evaluate(model, tokens, batch_size=config.eval_batch_size, bptt=config.bptt)
        shared = torch.tensor(found.cross_entropy, dtype=torch.float64, device=self.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(shared, 0)
        return self._evaluation(split, shared.item())

    def _evaluation(self, split: str, cross_entropy: float) -> Evaluation:
        corpus = self.corpus
        return Evaluation.of(
            cross_entropy,
            len(corpus.splits[split]),
            words=corpus.words[split],
            bytes=None if corpus.bytes is None else corpus.bytes[split],
            unknown=self.unknown[split],
        )

    def _interruptible(self) -> AbstractContextManager[None]:
        """Lets Ctrl-C end an evaluation at once; with several processes it waits, so that all stop at the same step."""
        return self.interrupt.raising() if self.accelerator.num_processes == 1 else nullcontext()

    def _save(self) -> None:
        """Write the "last" checkpoint; raises TrainingDiverged instead of saving a model that diverged."""
        self._require_finite(self.totals)
        state = self.state
        state.row_totals = self.totals.tolist()
        state.averaged = None if self.average is None else int(self.average.n_averaged)
        shared = ckpt.rng_tensors(self.device) | {f"hidden.{i}": part for i, part in enumerate(self.hidden)}
        gathered = {key: self.accelerator.gather(t.to(self.device)) for key, t in shared.items()}
        if self.main:
            tensors, rest = ckpt.optimizer_state(self.optimizer)
            tensors |= ckpt.model_tensors(self.model) | gathered
            if self.average is not None:
                tensors |= ckpt.average_tensors(self.average)
            stored = {"description": self.description, "state": vars(state), "optimizer": rest}
            self.run.save_checkpoint(state.step, tensors, stored, name=ckpt.LAST)
        self.saved_at = time.perf_counter()

    def _restore(self, checkpoint: Checkpoint) -> None:
        ckpt.check_description(checkpoint, self.description)
        tensors, rank = checkpoint.tensors, self.accelerator.process_index
        self.state = state = ckpt.TrainState(**checkpoint.state["state"])
        ckpt.load_model(self.model, checkpoint)
        ckpt.load_optimizer(self.optimizer, tensors, checkpoint.state["optimizer"])
        self.totals = torch.tensor(state.row_totals, dtype=torch.float64, device=self.device)
        if state.averaged is not None:
            self.average = weight_average(self.model)
            self.average.n_averaged.fill_(state.averaged)
            for key, tensor in ckpt.average_tensors(self.average).items():
                tensor.copy_(tensors[key])
        mine = slice(rank * self.streams.num_streams, (rank + 1) * self.streams.num_streams)
        self.hidden = tuple(part[mine].to(self.device) for part in ckpt.numbered("hidden", tensors))
        ckpt.load_rng(tensors, self.device, rank)

    def _segments(self, epoch: int) -> list[tuple[int, int]]:
        config = self.config
        return self.streams.segments(config.bptt, variable=config.variable_bptt, seed=config.seed, epoch=epoch)

    def _count_steps(self) -> int:
        part, whole = math.modf(self.config.epochs)
        if self.config.variable_bptt:
            steps = sum(len(self._segments(epoch)) for epoch in range(int(whole)))
        else:
            steps = int(whole) * len(self._segments(0))
        if part:
            steps += max(1, round(part * len(self._segments(int(whole)))))
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def _lr_factor(self, step: int) -> float:
        return lr_factor(step, self.steps_total, schedule=self.config.schedule, warmup=self.config.warmup)

    def _epoch(self) -> float:
        """Passes over the text so far, with the completed fraction of the present one."""
        if self.state.segment == 0:
            return float(self.state.epoch)
        return self.state.epoch + self.segments[self.state.segment][0] / self.streams.length

    def _progress(self, row: dict[str, Any], step_seconds: float) -> Progress:
        state, left = self.state, self.steps_total - self.state.step
        validations = math.ceil(left / (self.config.eval_every or len(self.segments)))
        valid = self._evaluation("valid", state.history[-1]).perplexity if state.history else None
        return Progress(
            state.step, self.steps_total, row["epoch"], row["cross_entropy"], valid, row["tokens_per_second"],
            step_seconds * left + self.valid_seconds * validations,
        )  # fmt: skip

    def _write(self, row: dict[str, Any]) -> None:
        if not self.main:
            return
        self.run.append_metrics(row)
        if self.board is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def _zero_totals(self) -> Tensor:
        return torch.zeros(1 + len(clipped_together(self.optimizer)), dtype=torch.float64, device=self.device)

    def _require_finite(self, numbers: Tensor) -> None:
        nats, *norms = numbers.tolist()
        if not math.isfinite(nats):
            raise self._diverged("the loss is not finite")
        if not all(map(math.isfinite, norms)):
            raise self._diverged("the gradient is not finite")

    def _diverged(self, what: str) -> TrainingDiverged:
        kept = self.run.last_step(ckpt.LAST)
        return TrainingDiverged(what, self.state.step, self._epoch(), self.last_loss, self.config.lr, kept)
