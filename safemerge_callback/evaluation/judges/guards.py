"""What the judges that are models share: where the model is, batches padded on the left, its own template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, shown
from ...io.choices import truth
from ...io.numbers import is_whole
from ...signals.chat import rendered as written
from ...signals.chat import shows
from ...signals.responses import respond
from ...signals.thoughts import answer_of
from ..loading import accelerator

if TYPE_CHECKING:
    from torch import Tensor

_MARKS = ("harmless question 7261", "harmless answer 3948")


class Guard:
    """A judge's model and tokenizer, and where the model is while it judges.

    `device` None means the accelerator where there is one, else the CPU. The model waits on the CPU and is moved to
    `device` for a batch of verdicts only, unless `stays`; so a judge takes no memory from the training between two.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, device: str | None = None, batch_size: int = 8, stays: bool = False
    ) -> None:
        if not is_whole(batch_size, 1):
            raise ConfigError(f"a judge's batch_size is {shown(batch_size)}: give 1 or more")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = batch_size
        self.stays = truth(stays, "a judge's `stays`")
        self.device = accelerator(device)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Have the model on its device in here; what it says does not depend on the training's autocast."""
        from ...ops import full_precision

        home = self.model.device
        self.model.to(self.device)
        try:
            with full_precision():
                yield
        finally:
            if not self.stays:
                self.model.to(home)

    def continuations(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return what the model writes after each text, greedily. Special tokens are those that the texts hold."""
        with self.placed():
            said = respond(
                self.model,
                self.tokenizer,
                self._tokens(texts),
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
            )
        return [answer_of(answer.text) for answer in said]

    def last_logits(self, texts: Sequence[str], tokens: Sequence[int]) -> list[list[float]]:
        """Return the logits of `tokens` right after each text, in float32."""
        import torch

        logits_of_texts: list[list[float]] = [[]] * len(texts)
        with self.placed(), torch.inference_mode():
            for rows, ids, mask in self._batches(texts):
                # Counted from the first real token, as generate() does; else left padding would shift the positions.
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits
                for i, row in zip(rows, logits[:, -1, list(tokens)].float().tolist(), strict=True):
                    logits_of_texts[i] = row
        return logits_of_texts

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield positions in `texts`, ids and mask (batch, length) padded on the left; the longest texts first."""
        import torch

        tokens = self._tokens(texts)
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            longest = len(tokens[rows[0]])
            ids = [[0] * (longest - len(tokens[i])) + tokens[i] for i in rows]
            mask = [[0] * (longest - len(tokens[i])) + [1] * len(tokens[i]) for i in rows]
            yield rows, torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


def rendered(tokenizer: Any, prompt: str, response: str, **more: Any) -> str:
    """Return a question and its answer as the chat template of a guard writes them, as text or as parts."""
    return written(tokenizer, (("user", prompt), ("assistant", response)), **more)


def check_template(who: str, source: str, tokenizer: Any, **more: Any) -> None:
    """Raise ConfigError where the chat template does not show what is to be judged; `more` must be shown too."""
    if not tokenizer.chat_template:
        raise ConfigError(f"{who}: {source!r} has no chat template, which holds its instructions; is it a guard model?")
    try:
        text = rendered(tokenizer, *_MARKS, **more)
    except Exception as error:
        # A template is a program of its own, and raises whatever it likes.
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{who}: the chat template of {source!r} fails ({reason}); is it a guard model?") from error
    missing = [mark for mark in (*_MARKS, *more.values()) if not shows(text, str(mark))]
    if missing:
        raise ConfigError(
            f"{who}: the chat template of {source!r} leaves out {missing[0]!r}; is it a guard model of this kind?"
        )
