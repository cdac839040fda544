import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safemerge_callback.adapters import LoraFactors
from safemerge_callback.errors import SubspaceError
from safemerge_callback.live import live_factors
from safemerge_callback.ops import Factored
from safemerge_callback.subspace import Request, Subspace, build_subspace, compress_subspace
from safemerge_callback.subspace import file as subspace_file
from safemerge_callback.subspace.placement import Device


def build(tmp_path, aligned, unaligned, **knobs):
    for name, tensors in (("aligned", aligned), ("unaligned", unaligned)):
        (tmp_path / name).mkdir(exist_ok=True)
        save_file(
            {f"model.{key}.weight": t.contiguous() for key, t in tensors.items()}, tmp_path / name / "model.safetensors"
        )
    return build_subspace(
        tmp_path / "v.safetensors",
        aligned=tmp_path / "aligned",
        unaligned=tmp_path / "unaligned",
        progress=False,
        **knobs,
    )


@pytest.fixture
def pair():
    base = {name: torch.randn(12, 20) for name in ("a", "b", "c", "low1", "low2", "still")}
    base["tall"] = torch.randn(20, 12)
    aligned = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in base.items()}
    aligned["low1"] = base["low1"] + 3 * torch.randn(12, 1) @ torch.randn(1, 20)
    aligned["low2"] = base["low2"] + 3 * torch.randn(12, 3) @ torch.randn(3, 20)
    aligned["still"] = base["still"]
    # Half the values, so that the difference is exact in the checkpoint's bfloat16.
    base["c"] = aligned["c"].bfloat16()
    aligned["c"] = base["c"] * 2
    return aligned, base


@pytest.fixture
def subspace(pair, tmp_path):
    return build(tmp_path, *pair)


def factors(name, shape, transposed=False):
    d_out, d_in = shape
    return LoraFactors(name, torch.randn(2, d_in), torch.randn(d_out, 2), 1.0, transposed)


def all_factors(names=("a", "b", "c", "low1", "tall")):
    return {n: factors(n, (20, 12) if n == "tall" else (12, 20)) for n in names}


def test_a_file_that_vanished_is_told_so(subspace):
    subspace.path.unlink()
    with pytest.raises(SubspaceError, match="changed or vanished"):
        subspace.stack(["a"])


def test_the_disk_is_told_of_the_next_stack_before_the_present_one_is_used(subspace, monkeypatch):
    told = []
    monkeypatch.setattr(subspace_file, "will_need", lambda path, spans: told.append(spans))
    requests = [Request((name,), torch.device("cpu")) for name in ("a", "low1", "b")]
    stacks = subspace.stacks(requests)
    for i in range(3):
        assert len(told) == i
        next(stacks)
    # A dense V of 12 x 20 in its dtype is one span, two factors are two; behind the last comes nothing.
    assert [[size for _, size in spans] for spans in told] == [[48, 80], [960], []]
    subspace.place(Device())
    list(subspace.stacks(requests))
    assert len(told) == 3


def test_stack_keeps_order_dtype_and_orientation(subspace, pair):
    V = {n: pair[0][n].float() - pair[1][n].float() for n in pair[0]}
    assert torch.equal(subspace.stack(["b", "a"]), torch.stack([V["b"], V["a"]]))
    assert torch.equal(subspace.stack(["a", "b"], transposed=True), torch.stack([V["a"], V["b"]]).mT)
    assert subspace.stack(["c"]).dtype == torch.bfloat16
    mixed = subspace.stack(["a", "c"])
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, torch.stack([V["a"], V["c"]]))


def test_factors_of_unequal_rank_stack_with_zeros(subspace, pair):
    assert [subspace.modules[n].rank for n in ("low1", "low2")] == [1, 3]
    V = torch.stack([pair[0][n].double() - pair[1][n].double() for n in ("low1", "low2")])
    for transposed in (False, True):
        matrix = subspace.stack(["low1", "low2"], transposed=transposed)
        assert isinstance(matrix, Factored)
        assert matrix.U.shape[-1] == 3
        expected = V.mT if transposed else V
        assert (matrix.U.double() @ matrix.W.double() - expected).norm() < 1e-5 * V.norm()


@pytest.mark.parametrize("names", [["a", "tall"], ["a", "low1"], []])
def test_unlike_modules_do_not_stack(subspace, names):
    with pytest.raises(SubspaceError, match="one shape and kind"):
        subspace.stack(names)


def test_unknown_and_unmoved_modules_are_told_apart(subspace):
    with pytest.raises(SubspaceError, match="no module 'lowl'; did you mean 'low"):
        subspace.stack(["lowl"])
    with pytest.raises(SubspaceError, match="'still' has no alignment matrix"):
        subspace.stack(["still"])


def test_kept_stacks_need_the_file_no_more(subspace):
    before = subspace.stack(["a", "b"])
    assert subspace.stack(["a", "b"]).data_ptr() != before.data_ptr()
    subspace.place(Device())
    kept = subspace.stack(["a", "b"])
    low = subspace.stack(["low1"])
    subspace.path.unlink()
    assert subspace.stack(["a", "b"]).data_ptr() == kept.data_ptr()
    assert torch.equal(kept, before)
    assert subspace.stack(["low1"]).U.data_ptr() == low.U.data_ptr()
    with pytest.raises(SubspaceError, match="changed or vanished"):
        subspace.stack(["b", "a"])
    with pytest.raises(SubspaceError, match="changed or vanished"):
        subspace.stack(["a", "b"], transposed=True)


def test_one_dense_module_is_mapped_and_survives_a_rebuild(subspace, pair, tmp_path):
    before = subspace.stack(["a"])
    copy = before.clone()
    build(tmp_path, pair[1], pair[0])
    assert torch.equal(before, copy)
    assert torch.equal(Subspace.load(subspace.path).stack(["a"]), -copy)


def test_describe_lists_everything(subspace):
    text = subspace.describe()
    for name, module in subspace.modules.items():
        (line,) = [line for line in text.splitlines() if f" {name} " in line]
        assert f"{module.shape[0]} x {module.shape[1]}" in line
        assert module.kind in line
        assert f"{module.null_cosine:.3f}" in line
    assert "aligned:   aligned" in text
    assert "unaligned: unaligned" in text
    assert "equal at 1 modules (not stored), first still" in text


def rewrite(path, change):
    """Write the file anew with changed metadata, header or tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header, tensors = json.loads(metadata["header"]), {k: t.clone() for k, t in load_file(path).items()}
    change(metadata, header, tensors)
    text = metadata.pop("broken", None) or json.dumps(header)
    sha256 = metadata.pop("wrong", None) or hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, {**metadata, "header": text, "sha256": sha256})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, h, t: m.update(version="3"), "format version '3'; this release reads version '2'"),
        (lambda m, h, t: m.update(version="1"), "format version '1'.*Build the subspace again"),
        (lambda m, h, t: m.update(format="pt"), "not a safety-subspace file: format is 'pt'"),
        (lambda m, h, t: m.update(broken="{"), "corrupt header .*no JSON"),
        (lambda m, h, t: m.update(wrong="0" * 64), "corrupt header .*not the one whose sha256"),
        (lambda m, h, t: h.pop("modules"), "corrupt header .*modules"),
        (lambda m, h, t: h["modules"]["a"].pop("norm"), "corrupt header .*norm"),
        (lambda m, h, t: h["modules"]["a"].update(kind="sparse"), "corrupt header .*sparse"),
        (lambda m, h, t: h["modules"]["a"].update(dtype="float16"), r"'a\.V' should be float16 but is F32"),
        (lambda m, h, t: t.pop("a.V"), r"'a\.V' should be \(12, 20\) but is absent"),
        (lambda m, h, t: t.update({"a.V": torch.zeros(2, 2)}), r"should be \(12, 20\) but is \(2, 2\)"),
        (lambda m, h, t: t.update(probes=t["probes"][:2].clone()), "probes of"),
    ],
)
def test_a_file_that_is_not_right_is_refused_by_what_is_wrong(subspace, change, says):
    rewrite(subspace.path, lambda m, h, t: None)
    Subspace.load(subspace.path)
    rewrite(subspace.path, change)
    with pytest.raises(SubspaceError, match=says):
        Subspace.load(subspace.path)


def test_other_files_are_refused(subspace, tmp_path):
    with pytest.raises(SubspaceError, match="no such file"):
        Subspace.load(tmp_path / "gone")
    with pytest.raises(SubspaceError, match="format is 'none'"):
        Subspace.load(tmp_path / "aligned" / "model.safetensors")
    whole = subspace.path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"\x00" * 50, whole[:8] + b"?" + whole[9:]):
        subspace.path.write_bytes(damaged)
        with pytest.raises(SubspaceError, match="corrupt, cut short"):
            Subspace.load(subspace.path)


def test_check_accepts_what_fits(subspace, pair):
    subspace.check(all_factors())
    subspace.check({**all_factors(), "still": factors("still", (12, 20))})
    subspace.check({"a": factors("a", (20, 12), transposed=True)})
    subspace.check(all_factors(), pair[0])


def test_check_names_what_is_lacking_or_has_another_shape(subspace):
    with pytest.raises(
        SubspaceError, match=r"lacks 2 of 3 LoRA modules, first 'x\.up'.*target_modules=\['a', 'q', 'up'\]"
    ):
        subspace.check({**all_factors(["a"]), "x.up": factors("x.up", (3, 3)), "x.q": factors("x.q", (3, 3))})
    with pytest.raises(SubspaceError, match=r"'a' is \(20, 12\) \(out, in\) in the model but \(12, 20\)"):
        subspace.check({"a": factors("a", (20, 12))})
    with pytest.raises(SubspaceError, match=r"'a' is \(12, 20\) \(out, in\) in the model but \(20, 12\)"):
        subspace.check({"a": factors("a", (12, 20), transposed=True)})
    with pytest.raises(SubspaceError, match="equal at all 1 LoRA modules"):
        subspace.check({"still": factors("still", (12, 20))})


@pytest.mark.parametrize(
    "route", [(torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_a_base_loaded_in_half_precision_is_still_aligned(subspace, pair, route):
    live = pair[0]
    for dtype in route:
        live = {name: weight.to(dtype) for name, weight in live.items()}
    subspace.check(all_factors(), live)


def test_another_base_is_recognised(subspace, pair):
    aligned, unaligned = pair
    with pytest.raises(SubspaceError, match=r"not the aligned checkpoint 'aligned'.*1 of 5 modules differ, first 'b'"):
        subspace.check(all_factors(), {**{n: aligned[n] for n in ("a", "c", "low1", "tall")}, "b": unaligned["b"]})
    with pytest.raises(SubspaceError, match="6 of 6 modules differ"):
        subspace.check(all_factors(), unaligned)
    with pytest.raises(SubspaceError, match=r"base weight of 'a' is \(20, 20\)"):
        subspace.check(all_factors(), {**aligned, "a": torch.zeros(20, 20)})


def test_checkpoints_that_differ_in_a_few_weights_are_told_apart(tmp_path):
    """Two bfloat16 checkpoints equal at all but 3 of 100 000 weights a module, each by one unit in the last place."""
    aligned = torch.randn(250, 400).bfloat16()
    unaligned = aligned.clone()
    places = torch.randperm(aligned.numel())[:3]
    bits = unaligned.reshape(-1).view(torch.int16)
    bits[places] += 1
    subspace = build(tmp_path, {"a": aligned}, {"a": unaligned})
    subspace.check({"a": factors("a", (250, 400))}, {"a": aligned.float()})
    subspace.check({"a": factors("a", (250, 400))}, {"a": aligned})
    with pytest.raises(SubspaceError, match="1 of 1 modules differ"):
        subspace.check({"a": factors("a", (250, 400))}, {"a": unaligned})


def test_the_null_value_of_a_module_never_exceeds_one(tmp_path):
    row = torch.ones(1, 64)
    subspace = build(tmp_path, {"a": row * 2, "b": torch.eye(4)}, {"a": row, "b": torch.zeros(4, 4)})
    assert subspace.null_cosine("a") == pytest.approx(1.0)
    assert subspace.null_cosine("a", transposed=True) == pytest.approx(1 / 8)
    assert subspace.null_cosine("b") == pytest.approx(1.0)


def test_every_tensor_has_a_checksum(subspace):
    noted = {key for module in subspace.modules.values() for key in module.checksums}
    assert noted == {key for name, module in subspace.modules.items() for key in module.tensors(name)}
    subspace.verify()


def test_verify_names_the_tensor_that_differs(subspace):
    whole = bytearray(subspace.path.read_bytes())
    raw = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    begin, end = raw["b.V"]["data_offsets"]
    whole[8 + int.from_bytes(whole[:8], "little") + (begin + end) // 2] ^= 1
    subspace.path.write_bytes(whole)
    with pytest.raises(SubspaceError, match=r"1 of \d+ tensors .* first 'b\.V'"):
        Subspace.load(subspace.path).verify()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.booleans())
def test_a_byte_that_was_edited_is_found(subspace, where, bit, in_header):
    """Anywhere in the file but in the padding, which says nothing."""
    whole = subspace.path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    place = int(where * (size if in_header else len(whole)))
    raw = json.loads(whole[8:size])
    spans = [raw[key]["data_offsets"] for key in raw if not key.startswith(("__", "padding"))]
    if place >= size and not any(begin <= place - size < end for begin, end in spans):
        return
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    copy = subspace.path.with_name("damaged.safetensors")
    copy.write_bytes(damaged)
    if _same(bytes(damaged), raw, size):
        return
    with pytest.raises(SubspaceError):
        Subspace.load(copy).verify()


def _same(damaged, raw, size):
    """Whether the header, which is JSON and may be written in several ways, still says the same."""
    if damaged[:8] != (size - 8).to_bytes(8, "little"):
        return False
    try:
        found = json.loads(damaged[8:size])
    except ValueError:
        return False
    kept = [{k: v for k, v in header.items() if not k.startswith("padding")} for header in (found, raw)]
    return kept[0] == kept[1]


def test_describe_as_plain_data(subspace):
    plain = json.loads(json.dumps(subspace.to_dict()))
    assert plain["modules"]["a"]["bytes"] == 12 * 20 * 4
    assert plain["bytes"] == sum(entry["bytes"] for entry in plain["modules"].values())
    assert plain["aligned"]["source"] == "aligned"
    assert (plain["version"], plain["unmoved"]) == ("2", ["still"])


def test_describe_has_energy_null_spread_and_bytes(subspace):
    module = replace(subspace.modules["a"], energy={"1": 0.5, "16": 0.97}, null_std={"4": 0.012, "64": 0.003})
    subspace.header.modules["a"] = module
    (line,) = [line for line in subspace.describe().splitlines() if " a " in line]
    assert "50 % / - / 97 % / -" in line
    assert f"{module.null_cosine:.3f} ± 0.003 to 0.012" in line
    assert "960 B" in line
    assert f"in {len(subspace.modules)} modules (4 dense, 2 factor)" in subspace.describe()


def test_a_placement_holds_what_is_read(subspace):
    class Twice:
        def stacks(self, read, requests):
            for request in requests:
                yield 2 * read(request.names, request.transposed)

    plain = subspace.stack(["a", "b"], transposed=True)
    subspace.place(Twice())
    assert torch.equal(subspace.stack(["a", "b"], transposed=True), 2 * plain)
    wanted = [Request(("a",), torch.device("cpu")), Request(("b",), torch.device("cpu"), transposed=True)]
    assert [tuple(V.shape) for V in subspace.stacks(wanted)] == [(1, 12, 20), (1, 20, 12)]


@pytest.mark.parametrize("kind", [None, "int8", "truncated"])
def test_the_pages_reader_reads_every_kind(subspace, tmp_path, kind):
    page = (Path(__file__).parents[2] / "docs" / "subspace_format.md").read_text(encoding="utf-8")
    (code,) = [part for part in page.split("```python\n")[1:] if "def alignment_matrix" in part]
    names = {}
    exec(code.split("```")[0], names)
    knobs = {"rank": 3} if kind == "truncated" else {}
    path = (
        compress_subspace(subspace, tmp_path / "small", kind, **knobs, progress=False).path if kind else subspace.path
    )
    for name, module in Subspace.load(path).modules.items():
        V = names["alignment_matrix"](path, name)
        exact = names["alignment_matrix"](subspace.path, name)
        assert float(torch.linalg.matrix_norm((V - exact).double(), 2)) <= module.error * (1 + 1e-5) + 1e-5
        assert tuple(V.shape) == module.shape


def two_models(tmp_path, tiny_llama, **sizes):
    for name, seed in (("base", 2), ("chat", 1)):
        tiny_llama(seed=seed, **sizes).save_pretrained(tmp_path / name)
    return {"aligned": tmp_path / "chat", "unaligned": tmp_path / "base", "progress": False}


def test_the_digest_of_headers_is_named_so_and_one_of_values_tells_models_apart(tmp_path, tiny_llama):
    parts = two_models(tmp_path, tiny_llama)
    one = build_subspace(tmp_path / "one", **parts)
    assert one.aligned["header_sha256"] == one.unaligned["header_sha256"]
    assert one.aligned["weights_sha256"] != one.unaligned["weights_sha256"]
    turned = build_subspace(tmp_path / "two", aligned=parts["unaligned"], unaligned=parts["aligned"], progress=False)
    assert turned.aligned["weights_sha256"] == one.unaligned["weights_sha256"]
    fewer = build_subspace(tmp_path / "three", **parts, target_modules=["q_proj"])
    assert fewer.aligned["weights_sha256"] != one.aligned["weights_sha256"]
    assert len(one.aligned["weights_sha256"]) == 64


@pytest.mark.parametrize("side", [{"source": "m", "sha256": "h"}, {"alignment_adapter": "a", "sha256": "w"}])
def test_an_older_files_digest_is_read_under_its_present_name(tmp_path, tiny_llama, side):
    path = tmp_path / "v"
    build_subspace(path, **two_models(tmp_path, tiny_llama))
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.dumps(json.loads(metadata["header"]) | {"unaligned": side})
    sha256 = hashlib.sha256(header.encode()).hexdigest()
    save_file(tensors, path, {**metadata, "header": header, "sha256": sha256})
    wanted = {"weights_sha256": "w"} if "alignment_adapter" in side else {"header_sha256": "h"}
    assert Subspace.load(path).unaligned == {key: side[key] for key in side if key != "sha256"} | wanted


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_vocabulary_that_was_resized_since_is_told_with_what_helps(tmp_path, tiny_llama, module):
    from peft import LoraConfig, get_peft_model

    parts = two_models(tmp_path, tiny_llama)
    subspace = build_subspace(tmp_path / "v", **parts, target_modules=[module])
    model = tiny_llama(seed=1)
    model.resize_token_embeddings(67, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    factors = live_factors(get_peft_model(model, LoraConfig(target_modules=[module])))
    with pytest.raises(
        SubspaceError, match=r"vocabulary was resized since\. Save the resized model .*common_rows=True"
    ):
        subspace.check(factors)
    parts["aligned"] = tmp_path / "resized"
    build_subspace(tmp_path / "w", **parts, target_modules=[module], common_rows=True).check(factors)


def test_a_model_of_another_size_is_told_as_that(tmp_path, tiny_llama):
    from peft import LoraConfig, get_peft_model

    subspace = build_subspace(tmp_path / "v", **two_models(tmp_path, tiny_llama), target_modules=["lm_head"])
    model = get_peft_model(tiny_llama(hidden_size=16, vocab_size=32), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(SubspaceError, match="from a model of another size"):
        subspace.check(live_factors(model))
