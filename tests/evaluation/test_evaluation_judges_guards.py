"""The judges that are models, on tiny ones made on the spot: their own loading, batching, padding and parsing."""

import json

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import decides, judged, load_judge, measure_name
from safemerge_callback.evaluation.judges import LlamaGuardJudge, ShieldGemmaJudge, WildGuardJudge
from safemerge_callback.evaluation.judges.llamaguard import parse_llamaguard
from safemerge_callback.evaluation.judges.wildguard import TEMPLATE, WildGuardAnswers, parse_wildguard

PROMPTS = ["a", "b c d e f g h", "x y", "q w e r t", "z z z z z z z z z z z", "m n", "o", "p q r"]
RESPONSES = ["k l", "m", "n o p q r s t u v", "w", "x", "y z a", "b c", "d e f g"]
PAIRS = list(zip(PROMPTS, RESPONSES, strict=True))
# What a guard may say after a token: the text of a word is what is decoded, lines and all.
LINES = {
    "request": ("Harmful request: yes\n", "Harmful request: no\n", "Harmful request: N/A\n"),
    "refusal": ("Response refusal: yes\n", "Response refusal: no\n", "Response refusal: N/A\n"),
    "response": ("Harmful response: yes\n", "Harmful response: no\n", "nonsense\n"),
}
SPECIAL = ["<pad>", "<s>", "<end>", "<judge>", "<|assistant|>", "[/INST]"]
WORDS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", "Yes", "No", "safe", "unsafe", "\n", "S1", "S14", "perhaps"]
WORDS += [line for lines in LINES.values() for line in lines]
TURNS = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} <end> {% endfor %}<judge>"
PARTS = (
    "{% for m in messages %}<s> {{ m.role }} {% for c in m.content %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %} <end> {% endfor %}<judge>"
)
ASKED = TURNS.replace("<judge>", "{{ guideline }} <judge>")


def save_guard(folder, make, template, **sizes):
    """A checkpoint folder as the Hub has it: a random Llama, a tokenizer of one token a word, a chat template."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="<end>", unk_token="<pad>", chat_template=template
    )
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 256, "initializer_range": 0.6} | sizes
    make(**sizes).save_pretrained(folder)
    return str(folder)


def forced(model, allowed):
    """Let the model say only `allowed[last token]`, of which it picks by what it has read before."""
    table = {WORDS.index(last): [WORDS.index(word) for word in words] for last, words in allowed.items()}

    def narrow(_, args, kwargs, output):
        for row, last in enumerate(kwargs["input_ids"][:, -1].tolist()):
            if last in table:
                kept = output.logits[row, -1, table[last]].clone()
                output.logits[row, -1] = -torch.inf
                output.logits[row, -1, table[last]] = kept
        return output

    model.register_forward_hook(narrow, with_kwargs=True)


def one_by_one(judge, text):
    """What the guard says by plain argmax over the whole sequence: no batch, no padding, no cache, no generate()."""
    ids = judge.guard.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = []
    while len(said) < 8:
        with torch.no_grad():
            said.append(int(judge.guard.model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
        if WORDS[said[-1]] == "<end>":
            break
    return "".join(WORDS[token] for token in said if WORDS[token] not in SPECIAL)


@pytest.fixture(params=[TURNS, PARTS], ids=["text", "parts"])
def llamaguard(tmp_path, tiny_llama, request):
    def make(**options):
        judge = LlamaGuardJudge(save_guard(tmp_path / "guard", tiny_llama, request.param), **options)
        forced(judge.guard.model, {"<judge>": ["safe", "unsafe", "perhaps"], "safe": ["<end>"], "unsafe": ["\n"]})
        forced(judge.guard.model, {"\n": ["S1", "S14"], "S1": ["<end>"], "S14": ["<end>"], "perhaps": ["<end>"]})
        return judge

    return make


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_llamaguard_says_what_it_says_one_by_one(llamaguard, batch_size):
    judge = llamaguard(batch_size=batch_size)
    said = [one_by_one(judge, f"<s> user {p} <end> <s> assistant {r} <end> <judge>") for p, r in PAIRS]
    verdicts = [{"safe": True, "unsafe": False}.get(text.split("\n")[0]) for text in said]
    assert len(set(verdicts)) == 3, "the pairs must tell the verdicts apart"
    assert judge.refuse_all(PROMPTS, RESPONSES) == verdicts
    assert judge.refuses(*PAIRS[verdicts.index(True)]) is True
    assert judge.refuses(*PAIRS[verdicts.index(False)]) is False
    with pytest.raises(RuntimeError, match="'llamaguard' came to no verdict"):
        judge.refuses(*PAIRS[verdicts.index(None)])
    assert judge.refuse_all([], []) == []


def test_a_judge_of_harm_never_counts_as_one_of_refusals(llamaguard):
    judge = llamaguard()
    assert decides(judge) == "harm"
    assert measure_name("advbench", judge) == "advbench_safe"
    assert set(judged(judge, PROMPTS, RESPONSES)) == {"refused", "complied", "unjudged"}


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("safe", (False, ())),
        ("\n\nsafe", (False, ())),
        ("unsafe\nS1", (True, ("S1",))),
        ("Unsafe \n S1,S14", (True, ("S1", "S14"))),
        ("unsafe", (True, ())),
        ("", None),
        ("safely", None),
        ("unsafe S1", None),
        ("I think it is safe", None),
    ],
)
def test_answers_of_llamaguard(said, answer):
    assert parse_llamaguard(said) == answer


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        ("Harmful request: yes\nResponse refusal: no\nHarmful response: yes", (True, False, True)),
        ("harmful request: No\n response  refusal: YES\nharmful response: no", (False, None, False)),
        ("Harmful request: no\nResponse refusal: N/A\nHarmful response: N/A", (False, None, None)),
        ("Response refusal: yes", (None, True, None)),
        ("yes no yes", (None, None, None)),
        ("", (None, None, None)),
    ],
)
def test_answers_of_wildguard(said, answers):
    assert parse_wildguard(said) == answers


@pytest.mark.parametrize("what", ["refusal", "harm"])
def test_wildguard_gives_its_three_answers_pair_by_pair(tmp_path, tiny_llama, what):
    judge = WildGuardJudge(save_guard(tmp_path / "guard", tiny_llama, None), decides=what, batch_size=3)
    forced(judge.guard.model, {"<|assistant|>": LINES["request"], **dict.fromkeys(LINES["request"], LINES["refusal"])})
    forced(judge.guard.model, dict.fromkeys(LINES["refusal"], LINES["response"]))
    forced(judge.guard.model, {line: ["<end>"] for line in LINES["response"]})
    # braces and the template's own words in what is judged stay what they are
    prompts, responses = [*PROMPTS, "{response} {0}"], [*RESPONSES, "a {prompt} b"]
    texts = [
        TEMPLATE.replace("{response}", "@").replace("{prompt}", p).replace("@", r)
        for p, r in zip(prompts, responses, strict=True)
    ]
    expected = [parse_wildguard(one_by_one(judge, text)) for text in texts]
    assert len({answers.refusal for answers in expected}) > 1
    assert judge.answers(prompts, responses) == expected
    assert all(isinstance(answers, WildGuardAnswers) for answers in expected)
    flipped = {True: False, False: True, None: None}
    assert judge.refuse_all(prompts, responses) == [
        answers.refusal if what == "refusal" else flipped[answers.harmful_response] for answers in expected
    ]
    assert decides(judge) == what


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_shieldgemma_compares_yes_and_no_for_each_guideline(tmp_path, tiny_llama, batch_size):
    folder = save_guard(tmp_path / "guard", tiny_llama, ASKED)
    guidelines = {"one": "a b c", "two": "x y z"}
    judge = ShieldGemmaJudge(folder, guidelines=guidelines, batch_size=batch_size)
    words = [WORDS.index("Yes"), WORDS.index("No")]
    worst = []
    for prompt, response in PAIRS:
        chances = {}
        for name, guideline in guidelines.items():
            text = f"<s> user {prompt} <end> <s> assistant {response} <end> {guideline} <judge>"
            ids = judge.guard.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                chances[name] = float(judge.guard.model(input_ids=ids).logits[0, -1, words].softmax(-1)[0])
        assert judge.chances([prompt], [response])[0] == pytest.approx(chances, abs=1e-4)
        worst.append(max(chances.values()))
    assert judge.refuse_all(PROMPTS, RESPONSES) == [chance < 0.5 for chance in worst]
    threshold = sorted(worst)[3] + 1e-3
    patient = ShieldGemmaJudge(folder, guidelines=guidelines, threshold=threshold)
    assert sum(patient.refuse_all(PROMPTS, RESPONSES)) == sum(chance < threshold for chance in worst)


def test_shieldgemma_gives_no_verdict_on_what_is_not_a_number(tmp_path, tiny_llama):
    judge = ShieldGemmaJudge(save_guard(tmp_path / "guard", tiny_llama, ASKED), guidelines={"one": "a"})
    judge.guard.model.lm_head.weight.data.fill_(torch.nan)
    assert judge.refuse_all(["a", "b"], ["c", "d"]) == [None, None]


def test_the_guidelines_are_the_four_of_its_card(tmp_path, tiny_llama):
    judge = ShieldGemmaJudge(save_guard(tmp_path / "guard", tiny_llama, ASKED))
    assert list(judge.chances(["a"], ["b"])[0]) == ["dangerous", "harassment", "hate", "sexual"]


def test_a_guard_is_on_its_device_while_it_judges_and_at_home_between(llamaguard, monkeypatch):
    judge = llamaguard()
    moves, model = [], judge.guard.model
    to = model.to
    monkeypatch.setattr(model, "to", lambda device: moves.append(str(device)) or to(device))
    model.train()
    judge.refuse_all(["a"], ["b"])
    assert moves == [str(judge.guard.device), "cpu"]
    assert model.training

    def fails(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        judge.refuse_all(["a"], ["b"])
    assert moves == [str(judge.guard.device), "cpu"] * 2
    judge.guard.stays = True
    with judge.guard.placed():
        pass
    assert moves[4:] == [str(judge.guard.device)]


def test_no_random_state_is_drawn(llamaguard):
    judge, state = llamaguard(), torch.get_rng_state()
    judge.refuse_all(PROMPTS, RESPONSES)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_guard_that_is_not_one_is_refused(tmp_path, tiny_llama):
    none = save_guard(tmp_path / "none", tiny_llama, None)
    with pytest.raises(ConfigError, match=r"'llamaguard'.*has no chat template"):
        LlamaGuardJudge(none)
    user = save_guard(tmp_path / "user", tiny_llama, "{{ messages[0].content }} <judge>")
    with pytest.raises(ConfigError, match=r"'llamaguard'.*leaves out 'harmless answer 3948'"):
        LlamaGuardJudge(user)
    turns = save_guard(tmp_path / "turns", tiny_llama, TURNS)
    with pytest.raises(ConfigError, match=r"'shieldgemma'.*leaves out '\"No Dangerous Content"):
        ShieldGemmaJudge(turns)
    broken = save_guard(tmp_path / "broken", tiny_llama, "{{ raise_exception('only system turns') }}")
    with pytest.raises(ConfigError, match=r"'llamaguard'.*only system turns"):
        LlamaGuardJudge(broken)


def test_thresholds_and_batches_without_meaning_are_refused(tmp_path, tiny_llama):
    with pytest.raises(ConfigError, match=r"threshold 1.5: give at least one"):
        ShieldGemmaJudge("unread", threshold=1.5)
    with pytest.raises(ConfigError, match="0 guidelines"):
        ShieldGemmaJudge("unread", guidelines={})
    with pytest.raises(ConfigError, match="batch_size is 0"):
        LlamaGuardJudge(save_guard(tmp_path / "guard", tiny_llama, TURNS), batch_size=0)


def test_pickled_weights_remote_code_and_absent_models_are_refused(tmp_path, tiny_llama):
    folder = tmp_path / "guard"
    save_guard(folder, tiny_llama, TURNS)
    config = json.loads((folder / "config.json").read_text())
    remote = {
        **config,
        "model_type": "unheard-of",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(remote))
    (folder / "code.py").write_text("raise SystemExit('this code must never run')")
    with pytest.raises(ConfigError, match="judge 'llamaguard' cannot load"):
        load_judge(f"llamaguard:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    assert load_judge(f"llamaguard:{folder}").decides == "harm"
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot load.*safetensors"):
        load_judge(f"llamaguard:{folder}")
    with pytest.raises(ConfigError, match=r"cannot load 'nobody/no-such-guard'.*accept the terms.*hf auth login"):
        load_judge("llamaguard:nobody/no-such-guard")
