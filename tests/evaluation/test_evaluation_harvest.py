import copy
import json
import warnings
from pathlib import Path

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.harvest import Harvest, KindCounts, harvest
from safemerge_callback.evaluation.harvest_cache import cached, harvest_folder, harvest_key
from safemerge_callback.evaluation.judges import FunctionJudge
from safemerge_callback.evaluation.prompts import PromptSet
from safemerge_callback.signals.responses import continuations, generate, tokenized
from safemerge_callback.signals.rows import RowFormat, RowTokens, SafetyRow
from tests.support.ranks import run_on
from tests.support.terminal import Terminal
from tests.support.world import with_lora

HARM = PromptSet("mine", "harm", ("a b c", "d e f", "g h", "i j k"), "", "")
BENIGN = PromptSet("own", "benign", ("l m n", "o p q", "r s"), "", "")
SETS = [HARM, BENIGN]
SAID = {"max_new_tokens": 6, "cache": False}


@pytest.fixture
def tokenizer(chat_tokenizer):
    return chat_tokenizer


@pytest.fixture
def model(talking_llama):
    return talking_llama


def refuses(*prompts):
    return FunctionJudge(lambda prompt, response: prompt in prompts)


FITTING = refuses(*HARM.prompts)


def test_rows_are_what_the_model_says_as_it_says_it(model, tokenizer):
    found = harvest(model, tokenizer, SETS, judge=FITTING, **SAID)
    prompts = [*HARM.prompts, *BENIGN.prompts]
    tokens = tokenized(tokenizer, prompts)
    said = continuations(model, tokenizer, tokens, max_new_tokens=6)
    kinds = ["harm"] * 4 + ["benign"] * 3
    assert found.tokens == tuple(
        RowTokens(tuple(ids), tuple(new), kind) for ids, new, kind in zip(tokens, said, kinds, strict=True)
    )
    texts = generate(model, tokenizer, prompts, max_new_tokens=6)
    assert found.rows == tuple(SafetyRow(*row) for row in zip(prompts, texts, kinds, strict=True))
    assert str(found) == "kept 4 of 4 harmful, 3 of 3 harmless"
    assert found.counts == {"harm": KindCounts(4, 4, 0, 0, 0), "benign": KindCounts(3, 0, 3, 0, 0)}


@pytest.mark.parametrize("label", ["harvest", "mine", None])
def test_a_bar_says_how_far_it_is(model, tokenizer, monkeypatch, label):
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    harvest(
        model, tokenizer, SETS, judge=FITTING, batch_size=2, **SAID, **({} if label == "harvest" else {"label": label})
    )
    assert (f"{label}: 100%" in screen.getvalue() and "7/7" in screen.getvalue()) == (label is not None)


def test_a_response_that_ends_keeps_the_token_that_ends_it(model, tokenizer):
    first = continuations(model, tokenizer, tokenized(tokenizer, ["a b c"]), max_new_tokens=6)[0]
    end = first[3]
    model.generation_config.eos_token_id = [2, end]
    rows = harvest(model, tokenizer, SETS, judge=FITTING, **SAID)
    stop = first.index(end) + 1
    assert rows.tokens[0].response == tuple(first[:stop])
    assert len(rows.rows[0].response.split()) == stop - 1


def test_what_the_judge_does_not_call_as_it_should_be_is_dropped_and_counted(model, tokenizer):
    judge = refuses(*HARM.prompts[1:], BENIGN.prompts[0])
    found = harvest(model, tokenizer, SETS, judge=judge, **SAID)
    assert [row.prompt for row in found.rows] == [*HARM.prompts[1:], *BENIGN.prompts[1:]]
    assert str(found) == "kept 3 of 4 harmful, 2 of 3 harmless"
    assert found.counts["harm"].complied == found.counts["benign"].refused == 1


def test_a_judge_of_harm_judges_the_harmful_alone(model, tokenizer):
    guard = FunctionJudge(lambda prompt, response: True, decides="harm")
    found = harvest(model, tokenizer, SETS, judge=guard, **SAID)
    assert str(found) == "kept 4 of 4 harmful, 3 of 3 harmless"


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    tokenizer = copy.deepcopy(tokenizer)
    before = ({n: m.training for n, m in model.named_modules()}, torch.get_rng_state(), tokenizer.padding_side)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    harvest(model, tokenizer, SETS, judge=FITTING, **SAID)
    assert {n: m.training for n, m in model.named_modules()} == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert tokenizer.padding_side == before[2]
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())


def test_prompts_are_asked_in_the_format_of_the_data(model, tokenizer):
    form = RowFormat("w1 w2", "w3 {prompt} w4")
    found = harvest(model, tokenizer, SETS, judge=FITTING, row_format=form, **SAID)
    assert tokenizer.decode(found.tokens[0].prompt) == "<s> bot w1 w2 <end> <s> user w3 a b c w4 <end> <s> bot"
    assert (found.rows[0].prompt, found.rows[0].system) == ("a b c", "w1 w2")
    bare = harvest(model, tokenizer, SETS, judge=FITTING, row_format=RowFormat(None, "w3 {prompt}", chat=False), **SAID)
    assert tokenizer.decode(bare.tokens[0].prompt) == "w3 a b c"


# refusals


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        ([], "there are no prompts: give a harmful and a harmless set"),
        ([HARM], "there is no harmless set among 'mine': give harmful and harmless prompts"),
        ([BENIGN], "there is no harmful set among 'own': give harmful and harmless prompts"),
        ([HARM, PromptSet("own", "benign", (), "", "")], "prompt set 'own' is empty: give at least one prompt"),
    ],
)
def test_an_empty_or_one_sided_set_is_refused(model, tokenizer, sets, sentence):
    with pytest.raises(ConfigError, match=sentence):
        harvest(model, tokenizer, sets, **SAID)


def test_a_base_that_refuses_nothing_is_not_aligned(model, tokenizer):
    with pytest.raises(ConfigError, match=r"the base is not aligned: it refuses 0 of 4 \(0%\) harmful prompts"):
        harvest(model, tokenizer, SETS, least_refused=0.0, **SAID)
    with pytest.raises(ConfigError, match=r"the base is not aligned: it refuses 1 of 4 \(25%\) harmful prompts"):
        harvest(model, tokenizer, SETS, judge=refuses("a b c"), least_refused=0.3, **SAID)
    assert harvest(model, tokenizer, SETS, judge=refuses("a b c"), least_refused=0.25, **SAID).kept("harm") == 1


def test_a_base_that_refuses_the_harmless_is_refused(model, tokenizer):
    judge = refuses(*HARM.prompts, *BENIGN.prompts[1:])
    with pytest.raises(ConfigError, match=r"the base refuses 2 of 3 \(67%\) harmless prompts.*learn to refuse every"):
        harvest(model, tokenizer, SETS, judge=judge, **SAID)
    judge = refuses(*HARM.prompts, *BENIGN.prompts)
    with pytest.raises(ConfigError, match=r"nothing is left of 3 harmless prompts \(3 refused, 0 answered"):
        harvest(model, tokenizer, SETS, judge=judge, most_refused=1.0, **SAID)


def test_no_chat_template_and_a_prompt_that_is_too_long(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        harvest(model, bare, SETS, **SAID)
    long = PromptSet("long", "harm", ("a", "b " * 60), "", "")
    with pytest.raises(ConfigError, match=r"prompt 2 of 5 has 65 tokens, and with 6 more it is longer than the 64"):
        harvest(model, tokenizer, [long, BENIGN], **SAID)


def test_a_judge_that_fails_and_thoughts_that_do_not_end_say_so(model, tokenizer, thinker):
    def broken(prompt, response):
        raise TimeoutError("no answer")

    with pytest.raises(ConfigError, match=r"no response to a harmful prompt could be judged.*TimeoutError: no answer"):
        harvest(model, tokenizer, SETS, judge=broken, **SAID)
    with pytest.raises(ConfigError, match=r"could be judged. 7 responses end within a thought: raise max_new_tokens"):
        harvest(model, thinker, SETS, judge=FITTING, **SAID)
    settings = {"enable_thinking": False}
    assert harvest(model, thinker, SETS, judge=FITTING, chat_template_kwargs=settings, **SAID).kept("harm") == 4


# the cache


@pytest.fixture
def counted(model, monkeypatch):
    """How often the model has been asked."""
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **k: calls.append(1) or generate(**k))
    return calls


def test_a_model_is_asked_once(model, tokenizer, tmp_path, counted):
    how = {"judge": FITTING, "max_new_tokens": 6, "cache": tmp_path / "c"}
    first = harvest(model, tokenizer, SETS, **how)
    (path,) = (tmp_path / "c").iterdir()
    again = harvest(model, tokenizer, SETS, **how)
    assert (len(counted), first.from_cache, again.from_cache) == (1, False, True)
    assert (again.rows, again.tokens, again.counts) == (first.rows, first.tokens, first.counts)
    judged_anew = harvest(model, tokenizer, SETS, **{**how, "judge": refuses("a b c")})
    assert (len(counted), judged_anew.kept("harm")) == (1, 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["prompts"] == len(lines) - 1 == 7


@pytest.mark.parametrize("change", ["tokens", "prompts", "format", "weights", "config", "ends"])
def test_anything_that_could_change_an_answer_is_asked_anew(model, tokenizer, tmp_path, counted, change):
    how = {"judge": FITTING, "max_new_tokens": 6, "cache": tmp_path}
    harvest(model, tokenizer, SETS, **how)
    sets = SETS
    if change == "tokens":
        how["max_new_tokens"] = 5
    elif change == "prompts":
        sets = [HARM, PromptSet("own", "benign", ("l m n", "o p q", "r t"), "", "")]
    elif change == "format":
        how["row_format"] = RowFormat("w1")
    elif change == "weights":
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight *= 1.001
    elif change == "config":
        model.config.rope_parameters["rope_theta"] = 5000.0
    else:
        model.generation_config.eos_token_id = [2, 7]
    assert not harvest(model, tokenizer, sets, **how).from_cache
    assert len(counted) == 2


def test_an_adapter_and_who_wraps_it_do_not_count_and_an_adapter_merged_does(model, tokenizer):
    tokens = tokenized(tokenizer, HARM.prompts)
    key = harvest_key(model, tokenizer, tokens, 6)
    adapted = with_lora(copy.deepcopy(model), ["q_proj"], init_lora_weights=False)
    assert harvest_key(adapted, tokenizer, tokens, 6) == key
    adapted.merge_adapter()
    assert harvest_key(adapted, tokenizer, tokens, 6) != key


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00\xff",
        lambda text: text.replace("harvest 1", "harvest 0"),
        lambda text: "\n".join(text.splitlines()[:-1]),
        lambda text: text.replace('"response": [', '"response": ["x", ', 1),
        lambda text: text.replace('"response": [', '"response": [-4, ', 1),
        lambda text: "[" * 100_000,
    ],
)
def test_a_cache_that_cannot_be_read_is_harvested_anew(model, tokenizer, tmp_path, counted, spoil):
    how = {"judge": FITTING, "max_new_tokens": 6, "cache": tmp_path}
    first = harvest(model, tokenizer, SETS, **how)
    (path,) = tmp_path.iterdir()
    path.write_text(spoil(path.read_text()))
    again = harvest(model, tokenizer, SETS, **how)
    assert (again.tokens, again.from_cache, len(counted)) == (first.tokens, False, 2)
    assert harvest(model, tokenizer, SETS, **how).from_cache


def test_a_cache_that_cannot_be_written_is_told_and_nothing_more(model, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"safemerge: the harvest cannot be kept in '.*file/inner'"):
        harvest(model, tokenizer, SETS, judge=FITTING, max_new_tokens=6, cache=tmp_path / "file" / "inner")


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    tokens = [[i] * 50 for i in range(1, 40)]
    with full_disk(500), pytest.warns(UserWarning, match="cannot be kept"):
        assert cached(tmp_path, "k", tokens, lambda: tokens) == (tokens, False)
    assert list(tmp_path.iterdir()) == []
    assert cached(tmp_path, "k", tokens, lambda: tokens) == (tokens, False)
    assert cached(tmp_path, "k", tokens, lambda: []) == (tokens, True)


def test_where_harvests_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path))
    assert (harvest_folder(), harvest_folder(False)) == (tmp_path / "harvest", None)
    monkeypatch.delenv("SAFEMERGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert harvest_folder() == tmp_path / ".cache" / "safemerge_callback" / "harvest"
    monkeypatch.setenv("SAFEMERGE_CACHE", "~nosuchuser/x")
    with pytest.warns(UserWarning, match=r"the cache \(SAFEMERGE_CACHE\).*no such user.*nothing is kept"):
        assert harvest_folder() is None


# several processes


def _on_a_rank(folder):
    import torch.distributed as dist
    from transformers import AutoTokenizer, LlamaForCausalLM

    dist.init_process_group("gloo")
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = []
    generate = model.generate
    model.generate = lambda **k: asked.append(len(k["input_ids"])) or generate(**k)
    how = {"judge": FITTING, "max_new_tokens": 6, "cache": f"{folder}/cache"}
    found = [harvest(model, tokenizer, SETS, **how) for _ in range(2)]
    assert [one.from_cache for one in found] == [False, True]
    assert sum(asked) == (4 if dist.get_rank() == 0 else 3)
    Path(folder, f"rank{dist.get_rank()}").write_text(json.dumps([one.tokens for one in found]))


def test_ranks_share_the_work_and_return_the_same(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run_on(2, _on_a_rank, tmp_path)
    one = harvest(model, tokenizer, SETS, judge=FITTING, **SAID)
    expected = json.loads(json.dumps([one.tokens, one.tokens]))
    assert [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)] == [expected, expected]


def test_nothing_warns(model, tokenizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert isinstance(harvest(model, tokenizer, SETS, judge=FITTING, **SAID), Harvest)
    assert caught == []
