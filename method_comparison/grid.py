"""The grid: a YAML file read whole, and its cells in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from recipes.data.splits import LEAST, Split, check_split_name
from recipes.data.tasks import TASKS, get_task
from recipes.settings import read_settings
from safemerge_callback.errors import ConfigError, nearest
from safemerge_callback.signals.chat import template_settings

from .arms import MERGES, Arm, chosen, read_arms


@dataclass(frozen=True)
class Grid:
    """Every setting of a grid.

    output_dir, page: where cells and their results, and the page, go. launch: the command before
        `recipes/finetune.py`, such as [accelerate, launch, --config_file, FILE]; empty: in this process.
    model, unaligned, target_modules: the model that is fine-tuned, and what its safety subspace is built from.
    random_subspace_seed: of the control `{random_subspace}`.
    finetune: settings of recipes/finetune.py of every training cell; by_task: task -> more of them.
    evaluate: prompts of each set and rows of the task (`harmbench`, ..., `task`: None for all of the split), and
        `batch_size`, `max_new_tokens`, `dtype`, `judges`.
    more: further cells, where a question is decided: mappings of `arms`, whose parents come along, and `seeds`, and
        `tasks` and `poisoned_shares` where they are not the grid's.
    split: which split is read. baseline: the arm without any defence, with which every front begins. reference: the
        arm that others are compared with. contrasts: pairs of arms, the first less the second in the page's summary.
    same_code: digests of code that count as one. `--repeat-in` tells them, and whether a cell came out the same.
    """

    output_dir: str
    arms: Mapping[str, Arm]
    model: str
    unaligned: str
    target_modules: Sequence[str]
    seeds: Sequence[int]
    tasks: Sequence[str]
    poisoned_shares: Sequence[float] = (0.0,)
    more: Sequence[Mapping[str, Any]] = ()
    finetune: Mapping[str, Any] = field(default_factory=dict)
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    page: str = "docs/results.md"
    launch: Sequence[str] = ()
    split: Split = "test"
    baseline: str = "plain"
    reference: str = "plain"
    contrasts: Sequence[Sequence[str]] = ()
    same_code: Sequence[str] = ()
    random_subspace_seed: int = 0

    @property
    def subspace(self) -> Path:
        """The safety subspace's file."""
        return Path(self.output_dir) / "subspace.safetensors"

    @property
    def foreign_rows(self) -> Path:
        """The file of safety rows in nobody's own words."""
        return Path(self.output_dir) / "foreign-rows.jsonl"

    @property
    def random_subspace(self) -> Path:
        """The control's file: same spectrum, random singular vectors."""
        return Path(self.output_dir) / f"random-subspace-{self.random_subspace_seed}.safetensors"


@dataclass(frozen=True)
class GridCell:
    """One run: an arm on a task with a poisoned share and a seed."""

    arm: Arm
    task: str
    poisoned_share: float
    seed: int

    @property
    def name(self) -> str:
        """The cell's folder under the grid's."""
        return f"{self.task}/poisoned-{self.poisoned_share:g}/{self.arm.name}/seed-{self.seed}"


# What `evaluate` may hold, and what it is where the file says nothing.
EVALUATE: dict[str, Any] = {
    **dict.fromkeys(LEAST),
    "batch_size": 32,
    "max_new_tokens": 40,
    "dtype": "float32",
    "judges": ("keywords",),
}


# What it may hold besides; where it does not, the digest of a cell's settings is what it was without them.
MORE = ("chat_template_kwargs",)


def load_grid(path: str | Path) -> Grid:
    """Read a grid from YAML, over its `base` as `read_settings`; ConfigError for keys, arms, tasks, splits and counts
    that cannot be.
    """
    return make_grid(read_settings(path, "grid", advice="Give a YAML file"))


def make_grid(raw: Mapping[str, Any]) -> Grid:
    """Return the grid of a mapping; ConfigError as `load_grid`.

    `templates` is not a setting: it holds mappings for arms to take in with YAML's `<<`.
    """
    raw = {key: value for key, value in raw.items() if key != "templates"}
    allowed = [f.name for f in fields(Grid)]
    for key in raw:
        if key not in allowed:
            raise ConfigError(
                f"grid setting {key!r} is unknown{nearest(str(key), allowed, then=f'choose among {allowed}')}"
            )
    needed = ("output_dir", "arms", "model", "unaligned", "target_modules", "seeds", "tasks")
    if missing := [name for name in needed if not raw.get(name)]:
        raise ConfigError(f"grid settings {missing} are missing: give them")
    evaluate = {**EVALUATE, **(raw.get("evaluate") or {})}
    allowed = [*EVALUATE, *MORE]
    for key in evaluate:
        if key not in allowed:
            raise ConfigError(f"evaluate.{key} is unknown{nearest(key, allowed, then=f'choose among {allowed}')}")
    grid = Grid(**{**raw, "arms": read_arms(raw["arms"]), "evaluate": evaluate})
    _check(grid)
    return grid


def _check(grid: Grid) -> None:
    template_settings(grid.evaluate.get("chat_template_kwargs"))
    check_split_name(grid.split)
    for name in dict.fromkeys([*grid.tasks, *grid.by_task, *(t for a in grid.arms.values() for t in a.tasks or ())]):
        get_task(name)
    for which in ("baseline", "reference"):
        families = {arm.family for arm in grid.arms.values()} | set(grid.arms)
        if (name := getattr(grid, which)) not in families:
            raise ConfigError(
                f"{which} {name!r} is no arm{nearest(name, families, then=f'choose among {sorted(families)}')}"
            )
    if not isinstance(grid.same_code, list | tuple) or not all(isinstance(one, str) for one in grid.same_code):
        raise ConfigError(f"same_code is {grid.same_code!r}: give a list of digests of code, in quotes")
    for pair in grid.contrasts:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ConfigError(f"contrasts hold {pair!r}: give pairs of arms, [one, other]")
        for name in pair:
            if name not in grid.arms:
                raise ConfigError(f"contrast {list(pair)}: {name!r} is no arm{nearest(name, grid.arms)}")
    for more in grid.more:
        _check_more(grid, more)
    for name in LEAST:
        count = grid.evaluate[name]
        if count is not None and count < 1:
            raise ConfigError(f"evaluate.{name} is {count}: give 1 or more, or leave it out for all of the split")


def _check_more(grid: Grid, more: Mapping[str, Any]) -> None:
    allowed = ("arms", "seeds", "tasks", "poisoned_shares")
    if not isinstance(more, Mapping) or not more.get("arms") or not more.get("seeds"):
        raise ConfigError(f"more holds {more!r}: give mappings of arms and seeds, and of {allowed[2:]} if not all")
    for key, values in more.items():
        if key not in allowed:
            raise ConfigError(
                f"more: key {key!r} is unknown{nearest(str(key), allowed, then=f'choose among {allowed}')}"
            )
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"more: {key} is {values!r}: give a list, or leave it out")
    chosen(grid.arms, more["arms"])
    for name in more.get("tasks", ()):
        get_task(name)


def cells_of(
    grid: Grid,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    tasks: Sequence[str] = (),
    poisoned_shares: Sequence[float] = (),
) -> list[GridCell]:
    """Return the cells in the order in which they run: an arm that trains before what merges its adapter.

    `only` names arms (their parents come along), the others some of the grid's. An arm of kind `model` has one cell a
    task: neither seed nor poison reaches it. ConfigError for what is none of these arms', and for a cell whose parent
    has none.
    """
    names = chosen(grid.arms, only)
    order = sorted((grid.arms[name] for name in names), key=lambda arm: arm.kind in MERGES)
    cells = list(dict.fromkeys(_cells(grid, order)))
    wanted = {"seed": seeds, "task": tasks, "poisoned_share": poisoned_shares}
    for key, choice in wanted.items():
        known = sorted({getattr(cell, key) for cell in cells})
        if unknown := [one for one in choice if one not in known]:
            raise ConfigError(f"{key}s {unknown} are none of these arms': choose among {known}")
        free = () if key == "task" else ("model",)
        cells = [cell for cell in cells if not choice or cell.arm.kind in free or getattr(cell, key) in choice]
    _check_parents(grid, cells)
    return cells


def _cells(grid: Grid, arms: Sequence[Arm]) -> Iterator[GridCell]:
    every = dict.fromkeys(seed for arm in arms for seed in arm.seeds or grid.seeds)
    for arm in (a for a in arms if a.kind == "model"):
        for task in arm.tasks or grid.tasks:
            yield GridCell(arm, task, grid.poisoned_shares[0], grid.seeds[0])
    for seed in every:
        for task in TASKS:
            for share in dict.fromkeys(s for a in arms for s in a.poisoned_shares or grid.poisoned_shares):
                for arm in arms:
                    wanted = task in (arm.tasks or grid.tasks) and share in (
                        arm.poisoned_shares or grid.poisoned_shares
                    )
                    if arm.kind != "model" and wanted and seed in (arm.seeds or grid.seeds):
                        yield GridCell(arm, task, share, seed)
    for more in grid.more:
        names = chosen(grid.arms, more["arms"])
        where = more.get("tasks") or grid.tasks, more.get("poisoned_shares") or grid.poisoned_shares
        for seed, task, share, arm in product(more["seeds"], *where, arms):
            if arm.name in names and arm.kind != "model":
                yield GridCell(arm, task, share, seed)


def parent_of(grid: Grid, cell: GridCell) -> GridCell | None:
    """Return the cell whose adapter this one merges, if it is one that merges."""
    if cell.arm.parent is None:
        return None
    return GridCell(grid.arms[cell.arm.parent], cell.task, cell.poisoned_share, cell.seed)


def _check_parents(grid: Grid, cells: Sequence[GridCell]) -> None:
    have = {cell.name for cell in cells}
    for cell in cells:
        parent = parent_of(grid, cell)
        if parent is not None and parent.name not in have:
            raise ConfigError(
                f"cell {cell.name!r} merges the adapter of {parent.name!r}, which is no cell: give arm "
                f"{parent.arm.name!r} the same seeds, tasks and poisoned shares"
            )
