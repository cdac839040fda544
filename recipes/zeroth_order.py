"""Training by two forward passes a batch and no backward pass: MeZO and TeZO as an optimizer, and a trainer's step.

A step goes along one direction z: the loss is asked at θ + ε·z and θ - ε·z, and (L₊ - L₋)/2ε, the slope, times z has
the gradient for its mean. Of z nothing is kept but what it is drawn from.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from recipes.completion_trainer import CompletionTrainer
from safemerge_callback.corrections.protocol import Batchwise, Term
from safemerge_callback.decision import needs_of
from safemerge_callback.errors import ConfigError, shown
from safemerge_callback.io.choices import one_of
from safemerge_callback.io.numbers import is_number, is_whole
from safemerge_callback.live.gradients import put_back
from safemerge_callback.ops import mask_seed
from safemerge_callback.signals.check_data import GRAMS
from safemerge_callback.signals.model_state import preserve_random_states
from safemerge_callback.signals.module_signals import data_among
from safemerge_callback.signals.task_rows import whole_batch
from safemerge_callback.training import SafeMergeCallback

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

MEZO, TEZO = "mezo", "tezo"
METHODS = (MEZO, TEZO)
_BETAS, _EPSILON = (0.9, 0.99), 1e-8


@dataclass(frozen=True)
class Directions:
    """Where a seed's directions come from: coordinates c of a step, drawn normal, and z of them.

    `mezo`: c is z. `tezo`: of a matrix z = U·diag(c)·Vᵀ/√r with U (rows, r) and V (columns, r) normal and the same in
    all steps, so that over all three E[vec z·vec zᵀ] is the identity; of anything else c is z. Each tensor has a
    generator of its own, on its device: no other random number is drawn, and the order of tensors does not matter.
    """

    method: str = MEZO
    rank: int = 8
    seed: int = 0

    def coordinates(self, name: str, parameter: Tensor, step: int) -> Tensor:
        """Return c of a parameter at an optimizer step, float32: (r) or in its shape."""
        low = self._low_rank(parameter)
        return self._normal((self.rank,) if low else tuple(parameter.shape), parameter.device, step, name)

    def along(self, name: str, parameter: Tensor, coordinates: Tensor) -> Tensor:
        """Return z of coordinates, float32, in the parameter's shape."""
        if not self._low_rank(parameter):
            return coordinates
        rows, columns = parameter.shape
        U = self._normal((rows, self.rank), parameter.device, -1, name)
        V = self._normal((columns, self.rank), parameter.device, -2, name)
        return (U * coordinates) @ V.T / math.sqrt(self.rank)

    def _low_rank(self, parameter: Tensor) -> bool:
        return self.method == TEZO and parameter.dim() == 2

    def _normal(self, shape: Sequence[int], device: torch.device, step: int, name: str) -> Tensor:
        source = torch.Generator(device).manual_seed(mask_seed(self.seed, step, name))
        return torch.randn(shape, generator=source, device=device)


class ZerothOrder(torch.optim.Optimizer):
    """Steps along a direction by the slope of the loss; with `tezo` by Adam, whose state is that of the coordinates.

    Source: MeZO, arXiv:2305.17333, and TeZO, arXiv:2501.19057. Differs: parameters come back from a copy, where the
    released MeZO shifts them three times in place and in bf16 ends elsewhere; all micro-batches of a step see one
    direction, so that accumulation is right; the global random state is left alone; and Adam's second moment is that of
    the coordinates, where TeZO keeps the separable part of the matrix's. A slope that is no number is a step left out.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        *,
        directions: Directions | None = None,
        epsilon: float = 1e-3,
    ) -> None:
        self.named = list(named)
        self.directions = directions or Directions()
        self.epsilon = epsilon
        self.at, self.slope, self.skips = 0, 0.0, 0
        super().__init__([parameter for _, parameter in self.named], {"lr": lr})

    def probe(self, loss: Callable[[], Tensor], step: int, first: AbstractContextManager[Any] | None = None) -> Tensor:
        """Ask for a batch's loss on both sides, add its slope to that of optimizer step `step`, and return the mean.

        Two forward passes, the first of them within `first`; the parameters have their bits back.
        """
        self.at = step
        with first or nullcontext():
            higher = self._beside(loss, self.epsilon)
        lower = self._beside(loss, -self.epsilon)
        self.slope += float(higher - lower) / (2 * self.epsilon)
        return (higher + lower) / 2

    @torch.no_grad()
    def _beside(self, loss: Callable[[], Tensor], reach: float) -> Tensor:
        with self._displaced(reach):
            return loss().detach().double()

    @contextmanager
    def _displaced(self, reach: float) -> Iterator[None]:
        with put_back([parameter.detach() for _, parameter in self.named]) as copies:
            for (name, parameter), copy in zip(self.named, copies, strict=True):
                wide = torch.promote_types(copy.dtype, torch.float32)
                parameter.copy_(copy + reach * self._direction(name, parameter).to(wide))
            yield

    def _direction(self, name: str, parameter: Tensor) -> Tensor:
        coordinates = self.directions.coordinates(name, parameter, self.at)
        return self.directions.along(name, parameter, coordinates)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Go along the direction of the last probes; afterwards the slope is 0 again."""
        slope, self.slope = self.slope, 0.0
        if not math.isfinite(slope):
            if not self.skips:
                warnings.warn(
                    f"the loss beside the parameters was not finite at step {self.at + 1}, which is left out, as later "
                    "ones will be: try a smaller learning_rate or zo_epsilon",
                    stacklevel=2,
                )
            self.skips += 1
            return
        rate = self.param_groups[0]["lr"]
        for name, parameter in self.named:
            way = slope * self.directions.coordinates(name, parameter, self.at)
            if self.directions.method == TEZO:
                way = self._adapted(parameter, way)
            parameter.sub_((rate * self.directions.along(name, parameter, way)).to(parameter.dtype))

    def _adapted(self, parameter: Tensor, way: Tensor) -> Tensor:
        """Adam's direction of a gradient of coordinates."""
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(way), exp_avg_sq=torch.zeros_like(way))
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(way, 1 - _BETAS[0])
        square.lerp_(way.square(), 1 - _BETAS[1])
        counts = [1 - beta ** state["step"] for beta in _BETAS]
        return (mean / counts[0]) / ((square / counts[1]).sqrt() + _EPSILON)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a state over, its moments in float32, which torch would round to the parameters' dtype."""
        super().load_state_dict(dict(state_dict))
        for number, stored in state_dict["state"].items():
            parameter = self.named[number][1]
            self.state[parameter] = {
                key: value.to(parameter.device).clone() if isinstance(value, Tensor) else value
                for key, value in stored.items()
            }


@dataclass(frozen=True)
class ZerothOrderSettings:
    """How a training goes without gradients; ConfigError for what cannot be."""

    method: str = MEZO
    epsilon: float = 1e-3
    rank: int = 8

    def __post_init__(self) -> None:
        one_of(self.method, METHODS, "zo_method")
        if not is_number(self.epsilon) or self.epsilon <= 0:
            raise ConfigError(f"zo_epsilon is {shown(self.epsilon)}: give how far a probe goes, above 0, such as 0.001")
        if not is_whole(self.rank, 1):
            raise ConfigError(
                f"zo_rank is {shown(self.rank)}: give of how many parts a direction of tezo is made, 1 or more"
            )


class ZerothOrderSteps(Trainer):
    """A Trainer without a backward pass; named before another kind of Trainer it makes that one so.

    `zeroth_order`: its settings. One process; callbacks, logs, checkpoints and resumes are the Trainer's. There is no
    gradient to clip, so `max_grad_norm` is 0. ConfigError, before the training, for what needs a gradient.
    """

    optimizer: Any

    def __init__(self, *arguments: Any, zeroth_order: ZerothOrderSettings | None = None, **more: Any) -> None:
        self.zeroth_order = zeroth_order or ZerothOrderSettings()
        super().__init__(*arguments, **more)
        check_arguments(self.args, self.accelerator.distributed_type)
        self.args.max_grad_norm = 0.0

    def train(self, *arguments: Any, **more: Any) -> Any:
        """Train as the Trainer does; ConfigError for a callback that adds a gradient."""
        check_callbacks(self.callback_handler.callbacks)
        return super().train(*arguments, **more)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer, of all parameters that are trained."""
        if self.optimizer is None:
            settings, trained = self.zeroth_order, self.model if model is None else model
            self.optimizer = ZerothOrder(
                [(name, parameter) for name, parameter in trained.named_parameters() if parameter.requires_grad],
                self.args.learning_rate,
                directions=Directions(settings.method, settings.rank, self.args.seed),
                epsilon=settings.epsilon,
            )
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Ask for the batch's loss on both sides and return the mean; what is dropped out is the same on both."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        loss = partial(self._loss_of, model, inputs, num_items_in_batch)
        # Who keeps the rows of the task looks at passes with gradients alone.
        with torch.enable_grad(), whole_batch(self.model, inputs):
            mean = optimizer.probe(loss, self.state.global_step, self._uncounted(model))
        return mean.to(self.args.device, torch.float32)

    @contextmanager
    def _uncounted(self, model: nn.Module) -> Iterator[None]:
        """Within, no random number is used up, and TRL's count of tokens does not grow."""
        tokens = getattr(self, "_total_train_tokens", None)
        with preserve_random_states(model):
            yield
        if tokens is not None:
            self._total_train_tokens = tokens

    def _loss_of(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """The batch's share of the step's loss, by the Trainer's own rule for accumulation."""
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return loss if scaled else loss / self.current_gradient_accumulation_steps


class ZerothOrderTrainer(ZerothOrderSteps, CompletionTrainer):
    """The recipes' trainer without a backward pass."""


def check_arguments(args: TrainingArguments, distributed: DistributedType) -> None:
    """Raise ConfigError for what a training without gradients does not have."""
    if distributed != DistributedType.NO or args.n_gpu > 1:
        raise ConfigError(
            f"this training is spread out ({distributed.value}, {args.n_gpu} GPUs), and zeroth order trains in one "
            "process on one device: start it so, or use recipes/finetune.py"
        )
    if args.fp16:
        raise ConfigError("fp16 is true, and zeroth order has no gradients for its scaler: use bf16, or neither")
    if args.weight_decay:
        raise ConfigError(f"weight_decay is {args.weight_decay}, which zeroth order has not: set it to 0")


def check_callbacks(callbacks: Iterable[TrainerCallback]) -> None:
    """Raise ConfigError for what a SafeMergeCallback gathers, or corrects, where gradients are: there are none."""
    for guard in (one for one in callbacks if isinstance(one, SafeMergeCallback)):
        config = guard.config
        needs = data_among(needs_of(config.how, config.gate_at(), config.rules)) if config.measures else {}
        if GRAMS in needs:
            raise ConfigError(
                f"{needs[GRAMS]} goes by the inputs of passes with gradients, and zeroth order makes none: choose "
                "another, or merge after the training with `safemerge merge`"
            )
        for chosen in config.chosen_corrections:
            if isinstance(chosen.kind.make(chosen.settings), Term | Batchwise):
                raise ConfigError(
                    f"correction {chosen.kind.name!r} is one of gradients, and zeroth order takes none: leave it out "
                    "(a subspace and a merge work), or use recipes/finetune.py"
                )
