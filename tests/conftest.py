"""Shared by all tests: shapes on floor 1 are checked, the hub is off, models are made on the spot."""

import contextlib
import gc
import os
import resource
import signal
import sys
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Before torch: a test's fork would wait for ever for OpenMP threads that it has not got.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a run keeps for the next one is kept from the user's own.
os.environ["SAFEMERGE_CACHE"] = tempfile.mkdtemp(prefix="safemerge-cache-")
# Read once, when any library first imports trackio.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

import pytest
from jaxtyping import install_import_hook

install_import_hook("safemerge_callback.ops", "beartype.beartype")

import torch  # noqa: E402 - after the hook, which only sees what is imported later

# Seconds of a test that is not marked slow; the summary names what takes more, and fails nothing: machines differ.
LONG = 60


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.duration > LONG and "slow" not in report.keywords:
            terminalreporter.write_line(
                f"{report.nodeid} took {report.duration:.0f} s: make it smaller, or mark it slow"
            )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Leave what was imported so far out of garbage collection, which every training asks for before its first step.

    A walk over all that torch, transformers and the tests hold takes longer than one of our trainings.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two checkpoints, their subspace, a safety adapter, and a way to train; not to be changed."""
    from tests.support.world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def runs():
    """What tests/support/trainer.py knows of the real Trainer's runs; transformers is imported by who asks."""
    from tests.support import trainer

    return trainer


@pytest.fixture
def tiny_llama():
    """A factory of randomly initialised two-layer Llamas; keywords override the config."""
    return _factory("Llama", num_key_value_heads=4)


@pytest.fixture
def talking_llama(tiny_llama):
    """A random Llama whose weights are large enough that what it says depends on the prompt; for `chat_tokenizer`."""
    return tiny_llama(vocab_size=64, pad_token_id=2, initializer_range=0.6).eval()


@pytest.fixture
def tiny_qwen2():
    """Two-layer Qwen2: grouped-query attention and biases on q, k, v."""
    return _factory("Qwen2", num_key_value_heads=2)


@pytest.fixture
def tiny_gemma():
    """Two-layer Gemma: output head tied to the embedding."""
    return _factory("Gemma", num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)


def _factory(family, **defaults):
    def make(seed=0, **overrides):
        import transformers

        from tests.support.world import SIZES

        config = getattr(transformers, f"{family}Config")(**{**SIZES, **defaults, **overrides})
        torch.manual_seed(seed)
        return getattr(transformers, f"{family}ForCausalLM")(config)

    return make


@pytest.fixture
def thinker(chat_tokenizer):
    """The chat tokenizer of a model that thinks: `<think>` and `</think>` are words, and the template opens a thought.

    `enable_thinking=False` leaves it out. A random model seldom ends what it began.
    """
    import copy
    import json

    from tokenizers import Tokenizer

    made = copy.deepcopy(chat_tokenizer)
    built = json.loads(made.backend_tokenizer.to_str())
    words = built["model"]["vocab"]
    words["<think>"], words["</think>"] = words.pop("w10"), words.pop("w11")
    made._tokenizer = Tokenizer.from_str(json.dumps(built))
    made.chat_template = (
        "{% for m in messages %}<s> user {{ m.content }} <end> {% endfor %}<s> bot "
        "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def chat_tokenizer():
    """One token a word, 64 of them, a chat template, and SmolLM2's trait: the end of a turn also pads."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "<end>", "user", "bot", *"abcdefghijklmnopqrstuvwxyz", "positive", "negative", "yes"]
    words += [f"w{i}" for i in range(64 - len(words))]
    template = (
        "{% for m in messages %}<s> {{ 'user' if m.role == 'user' else 'bot' }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<s> bot{% endif %}"
    )
    built = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token="<end>", pad_token="<end>", unk_token="<pad>", chat_template=template
    )


@pytest.fixture(scope="session")
def replayed(world, chat_tokenizer, tmp_path_factory):
    """The folder of a run without a subspace, which replayed safety rows in 12 steps; not to be changed."""
    from tests.support.replay import replaying

    folder = tmp_path_factory.mktemp("replayed") / "out"
    world.trainer(folder, replaying(batch_size=2), tokenizer=chat_tokenizer, max_steps=12).train()
    return folder


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory):
    """The address of MLflow's tables, which take it many seconds to make; each test has an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine for the real client, which is logged in there; see tests/support/hub.py."""
    from tests.support.hub import hub_on

    with hub_on(monkeypatch, tmp_path / "hub-cache") as server:
        yield server


@pytest.fixture
def full_disk():
    """A context: no file can grow beyond so many bytes, which is what a full disk looks like to who writes."""

    @contextlib.contextmanager
    def full(size):
        limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return full


@pytest.fixture
def kills():
    """A function: `action(place)` in a process killed before its first change to the disk, then its second, and so on.

    `fresh(k)` makes the place for the k-th; each place is yielded as its kill left it, until one ends by itself.
    """

    def every(fresh, action):
        for k in range(1, 200):
            place = fresh(k)
            if not _killed(action, place, k):
                return
            yield place

    return every


def _killed(action, place, k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which do nothing here
        process = os.fork()
    if process == 0:
        try:
            sys.addaudithook(_kill_before(k, str(place.parent)))
            action(place)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def _kill_before(k, folder):
    seen = []

    def hook(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        change = writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
        if change and str(args[0]).startswith(folder):
            seen.append(event)
            if len(seen) == k:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook
