"""Which module each stored tensor is: fused or split, expert by expert or stacked; apart from what reads tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ...adapters import canonical_name
from ...adapters.names import EMBEDDINGS
from ...errors import SubspaceError
from .shard_files import ShardFile
from .spellings import Spelling

# A fused linear layer, and the layers whose rows it holds one after another. Layers that interleave the rows of heads
# (`query_key_value`, `wqkv`) are not among them: they are read as they are.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Stacked experts whose checkpoint names them unlike the model: Granite MoE.
_STACKED = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint, from the header of the file that it is in; `dtype` such as `BF16`."""

    file: ShardFile
    shape: tuple[int, ...]
    dtype: str


class WeightPiece(NamedTuple):
    """A run of whole rows in one stored tensor, from the flat position `start` on."""

    file: ShardFile
    key: str
    start: int
    shape: tuple[int, int]


class Weight(NamedTuple):
    """One module's weight: the rows of its pieces, one after another. `key` is the first piece's."""

    key: str
    dtype: str
    pieces: tuple[WeightPiece, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), as stored."""
        return sum(piece.shape[0] for piece in self.pieces), self.pieces[0].shape[1]

    def rows(self, start: int, stop: int) -> Weight:
        """Return a part of a weight that is in one piece."""
        (piece,) = self.pieces
        columns = piece.shape[1]
        part = piece._replace(start=piece.start + start * columns, shape=(stop - start, columns))
        return self._replace(pieces=(part,))


def weights_of(tensors: Mapping[str, StoredTensor], spelling: Spelling) -> dict[str, Weight]:
    """Return canonical name -> weight of the 2-D `.weight` tensors and of each stacked expert of a checkpoint.

    Under the names, and fused or apart, as `spelling` says that the model has them. Raises SubspaceError where two
    tensors are one module.
    """
    weights: dict[str, Weight] = {}
    for key in tensors:
        for name, weight in _modules_of(key, tensors, spelling):
            if name in weights:
                raise SubspaceError(f"{weights[name].key!r} and {key!r} are both module {name!r}.")
            weights[name] = weight
    return _in_model_layout(weights, spelling)


def alias_tied_head(weights: dict[str, Weight]) -> None:
    """Where `lm_head` is absent, let it be the one input embedding."""
    if "lm_head" in weights:
        return
    tied = [weight for name, weight in weights.items() if name.rpartition(".")[2] in EMBEDDINGS]
    if len(tied) == 1:
        weights["lm_head"] = tied[0]


def named_as(weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Weight]:
    """Return the same weights under the names of another checkpoint of the model, whose `shapes` are given by name.

    Where that one has a fused layer split, or split layers fused, the weight is a view of rows, or several pieces.
    What can be had in neither way keeps its own name.
    """
    result = dict(weights)
    used: set[str] = set()
    for name in sorted(shapes.keys() - weights.keys()):
        parts = FUSED.get(name.rpartition(".")[2], ())
        assembly = _from_parts(name, weights, parts) or _from_fused(name, weights, shapes)
        if assembly:
            sources, result[name] = assembly
            used.update(sources)
    return {name: weight for name, weight in result.items() if name in shapes or name not in used}


def _in_model_layout(weights: dict[str, Weight], spelling: Spelling) -> dict[str, Weight]:
    result: dict[str, Weight] = {}
    for name, weight in weights.items():
        parent, _, last = name.rpartition(".")
        parts = spelling.apart.get(last, ())
        height, rest = divmod(weight.shape[0], max(1, len(parts)))
        if rest:
            raise SubspaceError(f"{weight.key!r} has {weight.shape[0]} rows, which {', '.join(parts)} cannot share.")
        apart = {f"{parent}.{part}": weight.rows(i * height, (i + 1) * height) for i, part in enumerate(parts)}
        result.update(apart or {name: weight})
    for fused, parts in spelling.together.items():
        first = f".{parts[0]}"
        # Experts are single modules here, whatever the model has.
        for parent in [n.removesuffix(first) for n in weights if n.endswith(first) and ".experts." not in n]:
            assembly = _from_parts(f"{parent}.{fused}", result, parts)
            if assembly:
                result = {n: w for n, w in result.items() if n not in assembly[0]} | {f"{parent}.{fused}": assembly[1]}
    return result


def _from_parts(
    name: str, weights: Mapping[str, Weight], last_parts: tuple[str, ...]
) -> tuple[tuple[str, ...], Weight] | None:
    parent = name.rpartition(".")[0]
    parts = tuple(f"{parent}.{part}" for part in last_parts)
    if not parts or any(part not in weights for part in parts):
        return None
    part_weights = [weights[part] for part in parts]
    if len({(weight.shape[1], weight.dtype) for weight in part_weights}) != 1:
        return None
    return parts, part_weights[0]._replace(pieces=tuple(piece for weight in part_weights for piece in weight.pieces))


def _from_fused(
    name: str, weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, int]]
) -> tuple[tuple[str, ...], Weight] | None:
    parent, _, last = name.rpartition(".")
    for fused, parts in FUSED.items():
        weight = weights.get(f"{parent}.{fused}")
        siblings = [f"{parent}.{part}" for part in parts]
        if last not in parts or weight is None or any(sibling not in shapes for sibling in siblings):
            continue
        heights = [shapes[sibling][0] for sibling in siblings]
        if sum(heights) == weight.shape[0] and len(weight.pieces) == 1:
            start = sum(heights[: parts.index(last)])
            return (f"{parent}.{fused}",), weight.rows(start, start + shapes[name][0])
    return None


def _modules_of(key: str, tensors: Mapping[str, StoredTensor], spelling: Spelling) -> Iterator[tuple[str, Weight]]:
    name, stored = canonical_name(spelling.of(key)), tensors[key]
    if len(stored.shape) == 2 and key.endswith(".weight"):
        whole = WeightPiece(stored.file, key, 0, (stored.shape[0], stored.shape[1]))
        yield name, Weight(key, stored.dtype, (whole,))
    elif len(stored.shape) == 3:
        yield from _experts(key, name, tensors)


def _experts(key: str, name: str, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Weight]]:
    """One module an expert of a stacked tensor (experts, rows, columns); gate and up apart where rows hold both."""
    parent, _, last = name.rpartition(".")
    if last in _STACKED and not parent.endswith(".experts"):
        parent, last = f"{parent}.experts", _STACKED[last]
    if parent.rpartition(".")[2] != "experts":
        return
    stored = tensors[key]
    experts, rows, columns = stored.shape
    parts = FUSED["gate_up_proj"] if last == "gate_up_proj" and _is_out_in(key, tensors) else (last,)
    height = rows // len(parts)
    for expert in range(experts):
        for i, part in enumerate(parts):
            start = (expert * rows + i * height) * columns
            piece = WeightPiece(stored.file, key, start, (height, columns))
            yield f"{parent}.{expert}.{part}", Weight(key, stored.dtype, (piece,))


def _is_out_in(key: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether (experts, 2·hidden, inputs) is what is stored, and not its transpose: told by the tensor beside it."""
    _, rows, columns = tensors[key].shape
    for one, other in (("gate_up_proj", "down_proj"), ("input_linear", "output_linear")):
        down = tensors.get(key.replace(one, other)) if one in key else None
        if down is not None and len(down.shape) == 3:
            return rows == 2 * down.shape[2] and columns == down.shape[1]
    return False
