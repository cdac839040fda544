import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from safemerge_callback.errors import SubspaceError
from safemerge_callback.subspace.checkpoints.targets import select_targets

NAMES = {
    name: f"model.{name}.weight"
    for name in [
        "embed_tokens",
        *(
            f"layers.{i}.{m}"
            for i in (0, 1, 2, 10)
            for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "cross.extra_q_proj")
        ),
    ]
} | {"lm_head": "lm_head.weight"}


def test_none_and_all_linear_leave_embeddings_and_head_out():
    assert select_targets(NAMES, None) == select_targets(NAMES, "all-linear")
    assert set(NAMES) - set(select_targets(NAMES, None)) == {"embed_tokens", "lm_head"}
    gpt2 = {"wte": "wte.weight", "wpe": "wpe.weight", "h.0.attn.c_attn": "h.0.attn.c_attn.weight"}
    assert select_targets(gpt2, None) == ["h.0.attn.c_attn"]


def test_a_linear_layer_that_sounds_like_an_embedding_is_one():
    linear = ["vision_tower.embeddings.patch_embedding", "embeddings_project", "encoder.embedding_hidden_mapping_in"]
    others = ["vision_tower.embeddings.position_embedding", "decoder.embed_positions", "embed_tokens_per_layer"]
    assert set(select_targets({name: f"{name}.weight" for name in linear + others}, None)) == set(linear)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["q_proj", "v_proj"],
        ["self_attn.q_proj"],
        ["model.layers.1.mlp.up_proj", "lm_head"],
        ["embed_tokens"],
        r".*\.layers\.(1|10)\..*proj",
        r"model\.layers\.\d+\.mlp\.up_proj",
        "lm_head",
    ],
)
def test_selection_is_that_of_peft_on_module_paths(targets):
    config = LoraConfig(target_modules=targets)
    expected = {n for n, key in NAMES.items() if check_target_module_exists(config, key.removesuffix(".weight"))}
    assert expected
    assert set(select_targets(NAMES, targets)) == expected


def test_layers_come_in_numeric_order():
    assert select_targets(NAMES, ["q_proj"]) == [f"layers.{i}.self_attn.q_proj" for i in (0, 1, 2, 10)]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_proj", "up_porj"], r"'up_porj' matches none of 18 modules; did you mean 'up_proj'"),
        ("q_proj", "'q_proj' matches none of 18 modules as a regular expression"),
        ("(", "no regular expression"),
        ([], "empty list"),
    ],
)
def test_what_matches_nothing_is_refused(targets, says):
    with pytest.raises(SubspaceError, match=says):
        select_targets(NAMES, targets)
