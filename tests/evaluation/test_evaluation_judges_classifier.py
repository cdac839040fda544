import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import decides, load_judge
from safemerge_callback.evaluation.judges import ClassifierJudge

PROMPTS = ["a b", "c", "d e f", "g", "h i j k l", "m"]
RESPONSES = ["n o p", "q", "r s t u v w", "x y", "z", "a b c d e f g"]


@pytest.fixture
def classifier(tmp_path):
    """A factory of folders that hold a random BERT with these labels."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    built = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def make(*labels, pad="[PAD]"):
        folder = tmp_path / "-".join(labels)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="[UNK]", pad_token=pad)
        tokenizer.save_pretrained(folder)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(
            vocab_size=len(words),
            max_position_embeddings=12,
            initializer_range=2.0,
            id2label=dict(enumerate(labels)),
            **sizes,
        )
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
        return str(folder)

    return make


def one_by_one(judge, *texts):
    tokenized = judge.guard.tokenizer(*texts, return_tensors="pt")
    with torch.no_grad():
        return int(judge.guard.model(**tokenized).logits.argmax())


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("reads", ["response", "pair"])
def test_verdicts_are_those_of_one_response_at_a_time(classifier, batch_size, reads):
    judge = ClassifierJudge(classifier("NORMAL", "REJECTION"), batch_size=batch_size, reads=reads)
    pairs = [(p, r) if reads == "pair" else (r,) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    expected = [one_by_one(judge, *texts) == 1 for texts in pairs]
    assert set(expected) == {True, False}
    assert judge.refuse_all(PROMPTS, RESPONSES) == expected
    assert judge.refuses(PROMPTS[0], RESPONSES[0]) is expected[0]
    assert judge.refuse_all([], []) == []


def test_a_response_longer_than_the_model_takes_is_cut(classifier):
    judge = ClassifierJudge(classifier("no refusal", "refusal"))
    long = "a b c d e f g h i j k l"
    assert judge.refuse_all(["", ""], [f"{long} m n o", long]) == judge.refuse_all([""], [long]) * 2


@pytest.mark.parametrize(
    ("labels", "index"),
    [
        (("NORMAL", "REJECTION"), 1),
        (("refusal", "compliance"), 0),
        (("non-refusal", "refusal"), 1),
        (("Not_Refused", "Refused"), 1),
        (("no refusal", "other", "Declined"), 2),
    ],
)
def test_the_label_of_refusals_is_read_from_the_model(classifier, labels, index):
    assert ClassifierJudge(classifier(*labels)).label == index


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (("LABEL_0", "LABEL_1"), {}),
        (("soft refusal", "hard refusal", "none"), {}),
        (("refusal",), {}),
        (("safe", "refusal"), {"decides": "harm"}),
        (("safe", "toxic"), {"label": "harmful"}),
    ],
)
def test_an_unclear_label_is_refused_with_the_labels_there_are(classifier, labels, options):
    with pytest.raises(ConfigError, match=rf"has the labels .*{labels[0]}.*Give label="):
        ClassifierJudge(classifier(*labels), **options)


def test_a_label_may_be_named_or_numbered(classifier):
    folder = classifier("LABEL_0", "LABEL_1")
    by_name, by_number = ClassifierJudge(folder, label="label_1"), ClassifierJudge(folder, label=1)
    assert by_name.refuse_all(PROMPTS, RESPONSES) == by_number.refuse_all(PROMPTS, RESPONSES)
    other = ClassifierJudge(folder, label=0)
    assert other.refuse_all(PROMPTS, RESPONSES) == [not v for v in by_name.refuse_all(PROMPTS, RESPONSES)]


def test_of_harm_the_named_label_is_the_bad_one(classifier):
    folder = classifier("toxic", "neutral")
    judge = load_judge({"name": "classifier", "model": folder, "label": "toxic", "decides": "harm"})
    assert decides(judge) == "harm"
    assert judge.refuse_all(PROMPTS, RESPONSES) == [one_by_one(judge, response) == 1 for response in RESPONSES]


def test_no_verdict_on_what_is_not_a_number(classifier):
    judge = ClassifierJudge(classifier("NORMAL", "REJECTION"))
    judge.guard.model.classifier.weight.data.fill_(torch.nan)
    assert judge.refuse_all(["a"], ["b"]) == [None]


def test_a_tokenizer_without_padding_is_given_one(classifier):
    judge = ClassifierJudge(classifier("NORMAL", "REJECTION", pad=None))
    assert len(judge.refuse_all(PROMPTS, RESPONSES)) == len(PROMPTS)


def test_what_it_reads_is_checked():
    with pytest.raises(ConfigError, match="reads 'prompt': give 'response' or 'pair'"):
        ClassifierJudge("unread", reads="prompt")
