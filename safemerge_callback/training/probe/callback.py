"""SafetyEvalCallback: ask the live model harmful and harmless prompts while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...corrections.schedule import due
from ...errors import ConfigError, shown
from ...evaluation.judges import KeywordJudge, check_ready, decides, load_judge, measure_name
from ...evaluation.probe import Asking, Questions
from ...evaluation.units import check_unit
from ...io.callables import check_callable
from ...io.choices import truth
from ...io.numbers import is_number
from ...live.ranks import all_or_none, rank
from ...record.log import Log
from ...signals.chat import template_settings, text_part
from ...signals.losses import EvalLoss
from ...signals.model_state import preserve_state
from ...signals.responses import check_vocabulary
from ..checkpoints import at_each_save, no_more_saves
from ..run.opening import guard_of
from .opening import (
    Prompts,
    check_judges,
    check_rules,
    check_rules_of_run,
    check_sizes,
    choose_tokenizer,
    connect,
    prompt_sets,
)
from .probing import Probing, Rules, Spent, load_standing, save_standing
from .rules import Rollback, Stop, Trigger, as_rule


class SafetyEvalCallback(TrainerCallback):
    """Ask the live model a fixed set of harmful and benign prompts, and change nothing about its training.

    It asks every `every` optimizer steps (0: not), when training begins and ends, and before and after each merge of a
    `SafeMergeCallback` of the same trainer. `prompts` and `benign` are names of prompt sets (`n` prompts of each), or
    mappings from a name to prompts of your own. Responses are greedy, of `max_new_tokens` tokens at most, in the
    model's chat template, which is given `chat_template_kwargs` (as `{"enable_thinking": False}`), after a `system`
    prompt where one is given; or in `template`, a text with `{prompt}` in it. Thoughts are cut before judging. `judge`
    is anything `load_judge` takes, the keywords by default; where it decides harm, `benign_judge` (the keywords) judges
    the benign ones; `judge_seconds` bounds what a probe waits for both. `task(model, tokenizer)` gives the task's
    score, higher is better, as a number or a `Share`, in `task_unit`: "share" for a part of 1, which is shown in
    percent, any other text for another unit, None for a plain number; `eval_batches`, an iterable of the trainer's
    evaluation batches or what returns one, as `trainer.get_eval_dataloader`, gives the evaluation loss on the first 50
    of them.

    `rollback`, `trigger` and `stop` are rules, or mappings of their settings. ConfigError here or when training begins
    for whatever does not fit. What fails later is told once and recorded, and training goes on.
    """

    def __init__(
        self,
        prompts: Prompts,
        benign: Prompts,
        *,
        every: int = 50,
        n: int = 32,
        judge: Any = None,
        benign_judge: Any = None,
        judge_seconds: float | None = None,
        task: Callable[[Any, Any], Any] | None = None,
        task_unit: str | None = None,
        eval_batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        max_new_tokens: int = 24,
        batch_size: int = 32,
        template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | str | None = None,
        system: str | None = None,
        tokenizer: Any = None,
        rollback: Rollback | Mapping[str, Any] | None = None,
        trigger: Trigger | Mapping[str, Any] | None = None,
        stop: Stop | Mapping[str, Any] | None = None,
        journal: str | None = None,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        check_sizes(every=every, n=n, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch_size)
        if judge_seconds is not None and not (is_number(judge_seconds) and judge_seconds > 0):
            raise ConfigError(f"judge_seconds is {shown(judge_seconds)}: give more than 0, or None for any time")
        if task is not None:
            check_callable(task, "task", ("model", "tokenizer"), "the task's score, a number")
        _check_batches(eval_batches)
        _check_texts(template=template, journal=journal, system=system)
        self.system = _system(system, template)
        self.every, self.journal, self.quiet = every, journal, truth(quiet, "quiet")
        self.rules = Rules(as_rule(Rollback, rollback), as_rule(Trigger, trigger), as_rule(Stop, stop))
        self.prompt_sets = (prompt_sets(prompts, "harm", n, seed), prompt_sets(benign, "benign", n, seed))
        harmful, self.template, self.tokenizer = self.prompt_sets[0], template, tokenizer
        self.chat_template_kwargs = template_settings(chat_template_kwargs)
        judges = _judges(judge, benign_judge)
        check_judges(*judges, self.prompt_sets[1])
        measures = [measure_name(name, judges[0]) for name in harmful]
        has_loss = eval_batches is not None
        check_rules(self.rules, every=every, task=task is not None, eval_batches=has_loss, measures=measures)
        self.asking = Asking(
            *judges,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            task=task,
            task_unit=_unit(task_unit, task),
            judge_seconds=judge_seconds,
            loss=None if eval_batches is None else EvalLoss(eval_batches),
        )
        # What a training needs lives in `probing`, as long as the training.
        self.probing: Probing | None = None
        self.spent = Spent()
        self.begun = False

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the settings and the clock; a training that goes on stays with the original."""
        return {**vars(self), "probing": None, "begun": False}

    @property
    def seconds(self) -> float:
        """Seconds that probing has taken since training began, over all resumes; in no other callback's count."""
        return self.spent.seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check what can be checked without the other callbacks."""
        if self.probing is not None and self.probing.state is state:
            raise ConfigError(
                "this trainer has its SafetyEvalCallback twice: give it once, in callbacks= or to add_callback"
            )
        paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if not hasattr(model, "generate") or paired:
            raise ConfigError(f"a {type(model).__name__} cannot be asked anything: give the trainer a causal LM")
        check_rules_of_run(self.rules, every=self.every, max_steps=state.max_steps)
        processing = choose_tokenizer(self.tokenizer, kwargs.get("processing_class"))
        settings = self.chat_template_kwargs
        how: dict[str, Any] = {"template": self.template, "settings": settings, "system": self.system}
        questions = Questions.of(processing, *self.prompt_sets, **how)
        check_vocabulary(model, (ids for tokens in questions.tokens.values() for ids in tokens))
        # The first rank judges.
        all_or_none(lambda: check_ready((self.asking.judge, self.asking.benign_judge)) if rank() == 0 else None)
        self.probing = Probing(
            model, text_part(processing), args, state, questions, self.asking, self.rules, settings, self.system
        )
        self.probing.log = Log(self.quiet, state.is_world_process_zero)
        self.begun, self.spent = False, self.probing.spent

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the guard, once every callback has begun and before the first step; probe the model as it is."""
        if self.begun or self.probing is None:
            return
        self.begun, probing = True, self.probing
        guard = guard_of(probing.model, state)
        connect(probing, guard.session.guarded() if guard and guard.session else None, self.journal)
        if isinstance(self.asking.loss, EvalLoss):
            with preserve_state(probing.model):
                self.asking.loss.load()
        load_standing(probing, args, state)
        if state.is_world_process_zero:
            at_each_save(state, lambda folder: save_standing(probing, folder))
        probing.look("begin")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe where it is due, and follow the rules."""
        if self.probing and due(state.global_step, every=self.every):
            self.probing.after_step(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Probe what training left; where a guard may still merge, it asks for that itself."""
        if self.probing and self.begun and self.probing.guard is None:
            self.probing.closing()
            self.probing.trackers.close()
        self.probing = None
        no_more_saves(state)


def _check_batches(eval_batches: Any) -> None:
    if callable(eval_batches) and not isinstance(eval_batches, Iterable):
        check_callable(eval_batches, "eval_batches", (), "evaluation batches")
    elif eval_batches is not None and (isinstance(eval_batches, str) or not isinstance(eval_batches, Iterable)):
        raise ConfigError(
            f"eval_batches is {shown(eval_batches)}: give evaluation batches, or what returns them, such as "
            "trainer.get_eval_dataloader"
        )


def _unit(unit: Any, task: Any) -> str | None:
    if unit is None:
        return None
    if task is None:
        raise ConfigError(f"task_unit is {unit!r} and there is no task: give task, or leave it out")
    try:
        return check_unit(unit)
    except ValueError as error:
        raise ConfigError(f"task_{error}") from None


def _system(system: str | None, template: str | None) -> str | None:
    if system is not None and template is not None:
        raise ConfigError(
            f"system is {shown(system)} and template {shown(template)}, which is all that the model reads: write the "
            "system prompt into it, or leave template out"
        )
    return system


def _check_texts(**texts: Any) -> None:
    for name, value in texts.items():
        if value is not None and (not isinstance(value, str | PurePath) or not str(value)):
            raise ConfigError(f"{name} is {shown(value)}: give a text that is not empty, or leave it out")


def _judges(judge: Any, benign_judge: Any) -> tuple[Any, Any]:
    first = KeywordJudge() if judge is None else load_judge(judge)
    if benign_judge is not None:
        return first, load_judge(benign_judge)
    return first, first if decides(first) == "refusal" else KeywordJudge()
