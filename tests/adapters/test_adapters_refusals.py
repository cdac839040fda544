import peft
import pytest
import torch
from packaging.version import Version
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import AdapterError
from safemerge_callback.live import live_factors, writer_for

Q = {"target_modules": ["q_proj"], "r": 4}
VARIANTS = {
    "use_dora": (LoraConfig(**Q, use_dora=True), "DoRA"),
    "lora_bias": (LoraConfig(**Q, lora_bias=True), "lora_bias=True"),
    "alora": (LoraConfig(**Q, alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "ALoraLinearVariant"),
    "mica": (LoraConfig(**Q, init_lora_weights="mica"), "MiCALinearVariant"),
}
if Version(peft.__version__) < Version("0.20"):
    del VARIANTS["mica"]  # which came with 0.20
TUNERS = {
    "ADALORA": AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "LOHA": LoHaConfig(**Q),
    "LOKR": LoKrConfig(**Q),
    "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}
BASE_CHANGING = ["pissa", "pissa_niter_2", "olora"]


@pytest.fixture
def adapted(tiny_llama):
    def make(config):
        model = tiny_llama()
        if config.peft_type == "LORA" and config.lora_bias:
            for layer in model.model.layers:
                layer.self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
        return get_peft_model(model, config)

    return make


def forget_configs(model):
    for module in model.modules():
        module.__dict__.pop("peft_config", None)


# PEFT warns of its own lora_bias file, where the bias is no matrix.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor:UserWarning")
@pytest.mark.parametrize("kind", VARIANTS)
def test_lora_variants_are_refused_live_and_on_disk(adapted, kind, tmp_path):
    config, word = VARIANTS[kind]
    model = adapted(config)
    with pytest.raises(AdapterError, match="adapter 'default' has"):
        live_factors(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=rf"adapter '{tmp_path}' has"):
        load_adapter(tmp_path)
    forget_configs(model)
    with pytest.raises(AdapterError, match=rf"q_proj'.*{word}"):
        live_factors(model)


@pytest.mark.parametrize("kind", TUNERS)
def test_other_tuners_are_refused_live_and_on_disk(adapted, kind, tmp_path):
    model = adapted(TUNERS[kind])
    with pytest.raises(AdapterError, match=r"q_proj' is adapted by .*allowed is LoRA only"):
        live_factors(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=f"is of type {kind}"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("start", BASE_CHANGING)
def test_initialisations_that_change_the_base_are_refused(adapted, start, tmp_path):
    model = adapted(LoraConfig(**Q, init_lora_weights=start))
    with pytest.raises(AdapterError, match=rf"init_lora_weights='{start}'.*moves part of the base"):
        live_factors(model)
    with pytest.raises(AdapterError, match="give writer_for the factors at which training began"):
        writer_for(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="moves part of the base"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_initialisations_that_keep_the_base_are_not(adapted, start):
    assert len(live_factors(adapted(LoraConfig(**Q, init_lora_weights=start)))) == 2


def test_lora_on_bare_parameters_is_refused(adapted, tmp_path):
    model = adapted(LoraConfig(target_modules=[], target_parameters=["mlp.up_proj.weight"], r=4))
    with pytest.raises(AdapterError, match=r"up_proj' is adapted by lora.layer.ParamWrapper"):
        live_factors(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="target_parameters"):
        load_adapter(tmp_path)


class Mixed(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.fc, self.other = nn.Linear(8, 8), other


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (nn.Conv1d(8, 8, 3), "Conv1d"),
        (nn.Conv2d(8, 8, 3), "Conv2d"),
        (nn.Conv3d(8, 8, 3), "Conv3d"),
        (nn.MultiheadAttention(8, 2), "MultiheadAttention"),
    ],
)
def test_modules_that_are_not_one_matrix_are_refused(other, kind, tmp_path):
    model = get_peft_model(Mixed(other), LoraConfig(target_modules=["fc", "other"], r=4))
    with pytest.raises(AdapterError, match=rf"other' is adapted by lora.layer.{kind}"):
        live_factors(model)
    model.save_pretrained(tmp_path)
    if kind.startswith("Conv"):
        with pytest.raises(AdapterError, match=r"'other' has lora_A \(4, 8, 3.*Conv2d"):
            load_adapter(tmp_path)


def test_replicated_layers_are_refused(adapted):
    model = adapted(LoraConfig(**Q, layer_replication=[(0, 2), (0, 2)]))
    with pytest.raises(AdapterError, match="layer_replication"):
        live_factors(model)


def test_trained_tokens_and_saved_heads_beside_lora_are_fine(adapted):
    config = LoraConfig(**Q, trainable_token_indices=[3, 4], modules_to_save=["lm_head"])
    assert list(live_factors(adapted(config))) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
