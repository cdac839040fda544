"""SafeMergeCallback: when the trainer says so, call the verbs of a session."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, Self, Unpack
from weakref import ref

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError, shown
from ..io.text_table import html_table
from ..live.batch_hooks import begin_run, unhook
from ..record.progress import Progress
from .checkpoints import at_each_save, no_more_saves
from .config.keywords import Settings
from .config.settings import SafeMergeConfig, resolve_config
from .run.artifact import Section
from .run.model_card import mark_card, mark_push
from .run.opening import alone, dismissed, open_session
from .run.session import Session

if TYPE_CHECKING:
    from transformers import Trainer


def _nobody() -> None:
    """The trainer of a callback that knows none; a function that a pickle can name."""


class SafeMergeCallback(TrainerCallback):
    """Keep a LoRA fine-tune's safety while it trains: measure each module, decide, merge a safety adapter, record.

    Without a safety adapter the selected updates are pulled toward the aligned model, method `pull`.
    Give a `SafeMergeConfig`, or its settings as keywords, the subspace's path also first and bare; ConfigError for a
    setting that is refused. Making one opens no file and loads nothing: that happens when training begins, and raises
    there if anything does not fit.

    Source: SafeMERGE, arXiv:2503.17239, and Safe LoRA, arXiv:2405.16833. Differs: both merge once, after training; this
    also merges at optimizer steps in between.
    """

    def __init__(self, config: SafeMergeConfig | str | PathLike[str] | None = None, **knobs: Unpack[Settings]) -> None:
        self.config = resolve_config(config, knobs)
        # What a training needs lives in the session, as long as the training. The counts stay, and are plain values.
        self.session: Session | None = None
        self.progress = Progress()
        self.section: Section | None = None
        self._trainer: Callable[[], Trainer | None] = _nobody

    @property
    def trainer(self) -> Trainer | None:
        """The trainer that it was attached to, while that lives."""
        return self._trainer()

    def attach(self, trainer: Trainer) -> Self:
        """Return this callback, which knows the trainer from now on, and is one of its callbacks.

        Gradient terms need it under DeepSpeed; elsewhere it changes nothing. Before `trainer.train()`. Raises
        ConfigError for what is no Trainer of transformers.
        """
        from transformers import Trainer

        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"attach was given {shown(trainer)}: give the Trainer, made before, as guard.attach(trainer)"
            )
        # One that is only being made gets its callbacks later.
        handler = getattr(trainer, "callback_handler", None)
        if handler is not None and not any(callback is self for callback in handler.callbacks):
            trainer.add_callback(self)
        self._trainer = ref(trainer)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the settings and the counts; a training that goes on stays with the original."""
        return {**vars(self), "session": None, "_trainer": _nobody}

    def __repr__(self) -> str:
        return f"SafeMergeCallback({repr(self.config).partition('(')[2]}"

    def _repr_html_(self) -> str:
        """The settings in force that are not the defaults, as a notebook shows them."""
        rows = [[name, str(value)] for name, value in self.config.chosen.items()]
        return html_table("SafeMergeCallback: all settings but these are the defaults", ["setting", "value"], rows)

    @property
    def seconds(self) -> float:
        """Seconds spent in this callback since training began, over all resumes."""
        return self.session.clock.seconds if self.session else self.progress.seconds

    @property
    def share(self) -> float:
        """Share of the training time, from 0 to 1, that this callback took."""
        return self.session.clock.now.share if self.session else self.progress.share

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Take off what an error in an earlier training left on the model, before an optimizer takes its parameters."""
        if model is not None:
            unhook(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Load and check everything; on a resume, go on from the checkpoint's state."""
        from transformers import Trainer

        alone(self, model, state)
        if model is not None:
            begin_run(model, state, Trainer.train)
        self.session, self.progress, self.section = None, Progress(), None
        # It may have been attached to one trainer, and given to another.
        trainer = self.trainer if self.trainer is not None and self.trainer.state is state else None
        with_what = kwargs.get("optimizer"), kwargs.get("processing_class"), trainer
        self.session = session = open_session(self.config, model, args, state, *with_what)
        self.progress = session.progress
        at_each_save(state, session.save)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the gradients that are due: the parameters have none yet, and clipping is still to come."""
        if self.session and not self.session.gradients.idle:
            with self.session.clock.hook():
                self.session.before_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let gradients that were kept apart join the step's, which are whole and clipped."""
        if self.session and not self.session.gradients.idle:
            with self.session.clock.hook():
                self.session.before_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check, and perhaps merge, before this step is evaluated and saved."""
        if self.session:
            with self.session.clock.hook():
                self.session.after_step(stopping=control.should_training_stop)
                self._ready_for_save(control)

    def _ready_for_save(self, control: TrainerControl) -> None:
        """Tell what the gradient terms came to before a checkpoint that no log comes before: a resume begins anew.

        And let the first rank, which writes, know the task rows of all.
        """
        if self.session and control.should_save:
            self.session.data.exchange()
        if self.session and self.session.gradients.untold and control.should_save and not control.should_log:
            self.session.tell_terms()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the weights where the trainer may put its best ones in their place."""
        if self.session:
            with self.session.clock.hook():
                if args.load_best_model_at_end:
                    self.session.marks.end_epoch()
                self._ready_for_save(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the first rank know what all have kept where what was measured decides on a checkpoint."""
        if self.session and args.save_strategy == "best":
            self.session.data.exchange()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell what the gradient terms came to whenever the trainer logs."""
        if self.session and self.session.gradients.untold:
            with self.session.clock.hook():
                self.session.tell_terms((logs or {}).get("grad_norm"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember which checkpoint it is that was just saved."""
        if self.session:
            self.session.checkpoint = self.session.saved

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the card that is uploaded say what was merged, in training and after it."""
        section = self.session.section() if self.session else self.section
        if section is not None and state.is_world_process_zero:
            mark_push(args, lambda folder: mark_card(folder, section))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Make sure that the weights the user is left with had their final check; close the journal."""
        if self.session:
            with self.session.clock.hook():
                self.session.end(model, kwargs.get("eval_dataloader"))
            self.section = self.session.section()
        self.session = None
        no_more_saves(state)
        dismissed(model)
