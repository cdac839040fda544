"""Evidence: a digest of what must be equal to the bit, or what was written, less its clocks."""

import hashlib
import io
import json
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open

# What two equal runs may differ in. `save` is the random name of a save; `version` is a stamp of the format, whose
# fields are compared one by one.
CLOCKS = frozenset({"time", "seconds", "training_seconds", "save", "version"})
CLOCK_WORDS = ("seconds", "runtime", "per_second", "share_of_training", "flos", "safemerge/share")
_DURATION = re.compile(r"\d[\d.,]* ?(?:ms|s|min|h)\b|\d[\d.]*% of (?:the |its )?(?:training|run)|\d\d:\d\d(?::\d\d)?")
_DRAWING = re.compile(
    r"<script>.*?</script>|<style>.*?</style>|<meta http-equiv=.Content-Security-Policy.[^>]*>", re.DOTALL
)


def sha(data):
    """The digest of bytes, text, or of anything that JSON holds."""
    if not isinstance(data, bytes | str):
        data = json.dumps(data, sort_keys=True)
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def tensors_digest(tensors):
    """The digest of named tensors: names, dtypes, shapes, and every bit."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        whole.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        whole.update(plain.reshape(-1).view(dtype=torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def lora_digest(model):
    """The digest of all factors that a live model holds."""
    return tensors_digest({name: p for name, p in model.named_parameters() if "lora_" in name})


def file_digest(path):
    """Of a safetensors file the tensors and the header, whose keys safetensors writes in any order; else the bytes."""
    if Path(path).suffix != ".safetensors":
        return sha(Path(path).read_bytes())
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        return {
            "tensors": tensors_digest({name: file.get_tensor(name) for name in file.keys()}),  # noqa: SIM118
            "header": {key: _parsed(value) for key, value in header.items() if key not in CLOCKS},
        }


def _parsed(text):
    try:
        return without_clocks(json.loads(text))
    except ValueError:
        return text


def without_clocks(value):
    """What JSON holds, without what only says when, or how long."""
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def journal(path):
    """The lines of a journal, without clocks."""
    return [without_clocks(json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def history(state):
    """What a trainer logged, without clocks."""
    return [{k: v for k, v in entry.items() if not any(w in k for w in CLOCK_WORDS)} for entry in state.log_history]


def words(text):
    """Printed lines without durations, and without bars, which tell a speed."""
    return [_DURATION.sub("~", line.rstrip()) for line in text.splitlines() if "it/s]" not in line]


@contextmanager
def listening():
    """Catch what is printed and warned of meanwhile; yields a list that holds the lines afterwards."""
    said, out, err = [], io.StringIO(), io.StringIO()
    with warnings.catch_warnings(record=True) as warned, redirect_stdout(out), redirect_stderr(err):
        warnings.simplefilter("always")
        yield said
    ours = [f"warning: {w.message}" for w in warned if "safemerge" in str(w.message)]
    said += words("\n".join([out.getvalue(), *ours]))


def command(*arguments):
    """Run the command line in this process; return its exit code and what it printed, without durations."""
    from safemerge_callback.cli import main

    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["safemerge", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return {"code": code, "out": words(out.getvalue()), "err": words(err.getvalue())}


def page(run, folder):
    """The report's page of a run, made from its journal with every clock set to the same time, and its summary."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (Path(run) / "safemerge.jsonl").read_text(encoding="utf-8").splitlines()]
    stopped = [json.dumps(_stopped(line), ensure_ascii=False) for line in lines]
    (place / "safemerge.jsonl").write_text("\n".join(stopped) + "\n", encoding="utf-8")
    return reported(place)


def _stopped(value):
    """The same entry, with every clock standing still."""
    if isinstance(value, dict):
        fixed = {"time": "2026-01-01T00:00:00.000+00:00", "seconds": 0.25, "training_seconds": 100.0}
        return {key: fixed[key] if key in fixed else _stopped(item) for key, item in value.items()}
    return [_stopped(item) for item in value] if isinstance(value, list) else value


def reported(place):
    """What `report` and `watch` say of the journal in a folder, and the page that `report` writes.

    Without the page's own script and style and their digests: what those draw of the same data is for the browser's
    tests.
    """
    said = command("report", place)
    text = (Path(place) / "safemerge_report.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    watched = command("watch", place, "--once")
    return {
        "summary": said,
        "watch": watched,
        "payload": json.loads(data),
        "page": sha(_DRAWING.sub("", text.replace(data, ""))),
    }
