"""Training by Hugging Face's Trainer: checkpoints, resuming, schedules and devices are its own."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from kvlink_rag.compute import Cancelled
from kvlink_rag.errors import BadInput, Diverged
from kvlink_rag.training.learner import TOKENS, TRAINABLE, Learner, Step
from kvlink_rag.training.objectives import NEEDS_TEACHER, OBJECTIVES
from kvlink_rag.training.processes import any_of, num_processes, wait_for_all
from kvlink_rag.training.steps import Steps

TRAINED = "trained.safetensors"
SECONDS = "seconds.json"  # beside it: how long the run had taken by then, all its sessions together
_AFTER_DIVERGING = (
    "start anew in another folder, with a lower learning rate or in float32; --export writes what was saved before"
)
# step, steps, loss (None until one is logged, behind the first step), tokens_per_s, seconds_left
Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Rates are the peaks of a cosine with a warm-up."""

    trainable: str = "reader"
    objective: str = "answers"
    num_link_tokens: int = 5
    slots: int = 1
    num_soft_tokens: int = 0
    min_docs: int = 2
    max_docs: int = 10
    max_turns: int = 16
    max_tokens: int = 2048  # of documents in a context
    causal_share: float = 0.0
    steps: int = 400
    batch: int = 4  # contexts whose gradients are in memory at once
    accumulate: int = 1  # batches per step
    learning_rate: float | None = None  # of weights and adapters; None: 5e-4, with "full" the paper's 5e-6
    link_learning_rate: float = 5e-3
    warmup: float = 0.05
    lora_rank: int = 16  # of an adapter that starts from nothing
    gradient_checkpointing: bool = False
    save_minutes: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trainable not in TRAINABLE:
            raise BadInput(f"trainable {self.trainable!r} is not one of {', '.join(TRAINABLE)}")
        if self.objective not in OBJECTIVES:
            raise BadInput(f"objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if self.trainable == "links" and self.num_link_tokens < 1 and self.num_soft_tokens < 1:
            raise BadInput("with trainable 'links' and neither link tokens nor soft tokens there is nothing to train")
        if self.trainable == "links" and self.causal_share:
            raise BadInput(
                "with trainable 'links' a context read by a full prefill teaches nothing; leave causal_share out"
            )
        if not 1 <= self.min_docs <= self.max_docs:
            raise BadInput(f"min_docs {self.min_docs} and max_docs {self.max_docs} must be positive and in order")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 5e-6 if self.trainable == "full" else 5e-4)
        for name in ("learning_rate", "link_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name} must be a number, and not negative, got {getattr(self, name)}")
        if not self.save_minutes >= 0:
            raise BadInput(f"save_minutes must not be negative, got {self.save_minutes}")
        for name in ("steps", "batch", "accumulate", "slots", "max_turns", "lora_rank", "max_tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.num_link_tokens, self.num_soft_tokens) < 0 or not 0 <= self.causal_share <= 1:
            raise BadInput(
                "num_link_tokens and num_soft_tokens must not be negative, and causal_share lies between 0 and 1"
            )

    @property
    def with_teacher(self) -> bool:
        return self.objective in NEEDS_TEACHER


def run(
    learner: Learner,
    steps: Steps,
    settings: TrainSettings,
    folder: Path,
    *,
    started: float,
    resume: bool,
    report: Report,
) -> tuple[list[dict[str, Any]], float | None]:
    """Train `learner` in place; the log, one entry per logged step, and how many seconds the run has taken.

    folder keeps what resuming needs. started: time.monotonic() when this session began. The seconds are those of all
    sessions, None where an earlier version did not count those of the first. Raises Diverged.
    """
    device = learner.model.device
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(settings.warmup * settings.steps),
        max_grad_norm=1.0,
        save_strategy="no",  # by the clock instead
        save_total_limit=2,  # the last, and the one before it until that is whole
        logging_steps=10 if settings.steps >= 100 else 1,
        logging_first_step=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        # a context without links leaves them unused; an adapter may lie on layers that read no text
        ddp_find_unused_parameters=settings.trainable != "links",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several one, else the library would run copies of the learner
    trainer = _Trainer(
        model=learner,
        args=arguments,
        train_dataset=steps,
        data_collator=_as_is,
        optimizers=(_optimizer(learner, settings), None),
        callbacks=[_Clock(settings, report)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.objective = OBJECTIVES[settings.objective]
    last = _last_checkpoint(folder) if resume else None
    before = _seconds_at(last) if last else 0.0
    trainer.seconds = lambda: None if before is None else before + time.monotonic() - started
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except (KeyboardInterrupt, Cancelled):
        trainer._save_checkpoint(learner, trial=None)
        wait_for_all()  # or torchrun, when one has ended, ends the first while it saves
        raise
    return list(trainer.state.log_history), trainer.seconds()


class _Trainer(Trainer):  # type: ignore[misc]
    """The library's, saving and loading only what is trained, in safetensors."""

    objective: Any = None
    seconds: Callable[[], float | None]  # that the run has taken so far

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(inputs["steps"], self.objective, kwargs["num_items_in_batch"])
        if not torch.isfinite(outputs["loss"]):  # the library would log over it and go on with broken weights
            raise Diverged(
                f"the loss of step {self.state.global_step + 1} is {outputs['loss'].item()}: nothing is learnt any "
                f"more; {_AFTER_DIVERGING}"
            )
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """A step's batches, and the weight of all its contexts as a process's share, by which each loss is divided."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weight = torch.tensor(sum(step.weight for batch in batches for step in batch["steps"]), device=device)
        return batches, self.accelerator.gather(weight).float().mean()

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder, tensors = Path(output_dir or self.args.output_dir), trained_tensors(self.model)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise Diverged(
                f"after step {self.state.global_step} not all that is trained are numbers any more; {_AFTER_DIVERGING}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TRAINED)
        (folder / SECONDS).write_text(json.dumps(self.seconds()), "utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(model or self.model, Path(resume_from_checkpoint) / TRAINED)


def load_last(learner: Learner, folder: Path) -> tuple[int, list[dict[str, Any]], float | None]:
    """Put what the run in `folder` saved last into `learner`; its step, its log and its seconds. Raises BadInput."""
    last = _last_checkpoint(folder)
    if last is None:
        raise BadInput(f"the run in {folder} has saved nothing yet; let it run for longer than --save-minutes")
    load_trained(learner, last / TRAINED)
    state = json.loads((last / "trainer_state.json").read_text("utf-8"))
    return state["global_step"], state["log_history"], _seconds_at(last)


def trained_tensors(learner: Learner) -> dict[str, Tensor]:
    """What is trained, by name."""
    found = learner.named_parameters()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found if tensor.requires_grad}


def load_trained(learner: Learner, path: Path) -> None:
    """Put saved tensors back. Raises BadInput where they are another run's."""
    saved, own = load_file(path), dict(learner.named_parameters())
    wanted = {name for name, tensor in own.items() if tensor.requires_grad}
    if saved.keys() != wanted:
        raise BadInput(f"{path} holds other parameters than this run trains; start anew in another folder")
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Saves by the clock, and tells how far training has come."""

    def __init__(self, settings: TrainSettings, report: Report):
        self._settings, self._report = settings, report
        self._loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._saved = time.monotonic()
        self._first = state.global_step
        self._loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), self._loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = time.monotonic()
        done = state.global_step - self._first
        elapsed = now - self._started
        figures = {
            "step": state.global_step,
            "steps": state.max_steps,
            "loss": self._loss,
            "tokens_per_s": model.num_tokens * num_processes() / elapsed,
            "seconds_left": (state.max_steps - state.global_step) * elapsed / max(done, 1),
        }
        stopped = None
        try:
            self._report(figures)
        except (KeyboardInterrupt, Cancelled) as error:
            stopped = error
        if any_of(stopped is not None):  # all of them after the same step, or one would wait for the others
            raise stopped or KeyboardInterrupt
        due = any_of(now - self._saved >= self._settings.save_minutes * 60)
        if due or state.global_step == state.max_steps:
            control.should_save, self._saved = True, now


def _optimizer(learner: Learner, settings: TrainSettings) -> torch.optim.Optimizer:
    trained = [(name, parameter) for name, parameter in learner.named_parameters() if parameter.requires_grad]
    tokens = [parameter for name, parameter in trained if name in TOKENS]
    others = [parameter for name, parameter in trained if name not in TOKENS]
    rates = ((tokens, settings.link_learning_rate), (others, settings.learning_rate))
    groups = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.999))


def _as_is(steps: Sequence[Step]) -> dict[str, Any]:
    return {"steps": list(steps)}


def _last_checkpoint(folder: Path) -> Path | None:
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _seconds_at(saved: Path) -> float | None:
    """How long the run had taken when this was saved, if that is known."""
    path = saved / SECONDS
    seconds: float | None = json.loads(path.read_text("utf-8")) if path.exists() else None
    return seconds
