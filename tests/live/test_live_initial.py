"""Factors that began as a part of the base weight: the update is what training changed, and nothing else."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import AdapterError
from safemerge_callback.live import base_moved, writer_for
from safemerge_callback.live.initial import INITIAL_FILE, initial_factors, load_initial, save_initial, since

STARTS = ["pissa", "pissa_niter_4", "olora"]
NAMES = [f"layers.{n}.self_attn.q_proj" for n in (0, 1)]


@pytest.fixture
def begun(tiny_llama):
    def make(start):
        torch.manual_seed(0)
        return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=start))

    return make


@torch.no_grad()
def weights(model):
    """The whole weight of each module, adapter included, in float64."""
    found = {}
    for path, module in model.named_modules():
        if path.endswith("q_proj"):
            delta = (
                module.scaling["default"]
                * module.lora_B["default"].weight.double()
                @ module.lora_A["default"].weight.double()
            )
            found[path.removeprefix("base_model.model.model.")] = module.base_layer.weight.double() + delta
    return found


def nudge(model, by=1e-3):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(by * torch.randn_like(parameter))


@pytest.mark.parametrize("start", STARTS)
def test_the_update_is_the_change_of_the_whole_weight(begun, start):
    model = begun(start)
    writer, before = writer_for(model, initial="now"), weights(model)
    assert base_moved(model)
    assert all(not (f.update.B @ f.update.A).any() for f in writer.gather().values())
    nudge(model)
    after = weights(model)
    for name, factors in writer.gather().items():
        change = after[name] - before[name]
        found = factors.scaling * factors.update.B.double() @ factors.update.A.double()
        assert float((found - change).norm() / change.norm()) < 1e-5
        # B·A itself is far from it: it holds a part of the base weight.
        whole = factors.scaling * (factors.B @ factors.A).double()
        assert float((whole - change).norm() / change.norm()) > 10


def test_a_plain_adapter_has_no_initial_factors(begun):
    model = begun(True)
    writer = writer_for(model, initial="now")
    assert not base_moved(model)
    assert not writer.initial
    assert {f.initial for f in writer.gather().values()} == {None}


def test_initial_factors_come_back_from_their_file_to_the_bit(begun, tmp_path):
    model = begun("pissa")
    writer = writer_for(model, initial="now")
    save_initial(tmp_path, writer.initial)
    nudge(model)
    again = writer_for(model, initial=load_initial(tmp_path))
    for name, factors in writer.gather().items():
        for mine, other in zip(factors.update, again.gather()[name].update, strict=True):
            assert torch.equal(mine, other)


def test_initial_factors_that_do_not_fit_are_refused(begun, tmp_path):
    model = begun("pissa")
    factors = writer_for(model, initial="now").gather()
    short = {name: pair for name, pair in initial_factors(factors).items() if name != NAMES[1]}
    with pytest.raises(AdapterError, match=rf"'{NAMES[1]}': its initial factors should be \(4, 32\).* and are nothing"):
        writer_for(model, initial=short)
    wrong = {name: pair._replace(A=pair.A[:, :5]) for name, pair in initial_factors(factors).items()}
    with pytest.raises(AdapterError, match=r"are \(4, 5\) and \(32, 4\)"):
        since(factors, wrong)
    with pytest.raises(AdapterError, match=f"holds no {INITIAL_FILE}"):
        load_initial(tmp_path)
    (tmp_path / INITIAL_FILE).write_bytes(b"\x08\x00")
    with pytest.raises(AdapterError, match="corrupt or truncated"):
        load_initial(tmp_path)


def test_such_an_adapter_on_disk_is_read_only_when_asked(begun, tmp_path):
    model = begun("pissa")
    saved = copy.deepcopy(model)
    saved.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="convert it to a plain LoRA"):
        load_adapter(tmp_path)
    live = writer_for(model, initial="now").gather()
    assert all(torch.equal(f.A, live[n].A) for n, f in load_adapter(tmp_path, moved_base=True).factors.items())
