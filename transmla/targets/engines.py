"""What each inference engine makes of a deepseek_v3 config: runs it, refuses it, or computes something else.

A table of rules. Each names the engines it is about, the configs it applies to, the fact, and what to do. Facts are
measured (the engine ran on converted models, see tests/test_engines_run.py) or read from the engines' sources;
`EVIDENCE` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transmla.geometry import GPU_KERNELS
from transmla.maths.pad import Widths

RUNS, REFUSES, WRONG = "runs", "refuses", "computes something else"

STOCK, OWN = "transformers, stock class", "transformers, own class"
VLLM_GPU, VLLM_CPU, SGLANG = "vLLM (GPU)", "vLLM (CPU)", "SGLang"
LLAMA_CPP, MLX, TENSORRT = "llama.cpp", "MLX-LM", "TensorRT-LLM"
# engine -> what is known of a folder that no rule objects to
ENGINES = {
    STOCK: "right, but decompresses the whole cache at every step",
    OWN: "latent cache, absorbed decode",
    VLLM_GPU: "latent cache, kernels for this size",
    VLLM_CPU: "latent cache",
    SGLANG: "latent cache, kernels for this size",
    LLAMA_CPP: "any size, as GGUF: transmla export --to gguf; fast attention on GPUs for 512+64 and 256+64",
    MLX: "latent cache, any size",
    TENSORRT: "latent cache",
}
EVIDENCE = {
    STOCK: "measured", OWN: "measured", VLLM_CPU: "measured", LLAMA_CPP: "measured", MLX: "measured",
    VLLM_GPU: "from its source", SGLANG: "from its source", TENSORRT: "from its source",
}  # fmt: skip

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """engines: concerned;  applies: whether a config is of this kind;  outcome: REFUSES or WRONG"""

    engines: tuple[str, ...]
    applies: Callable[[Config], bool]
    outcome: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """One reason, and what to do about it."""

    outcome: str
    why: str
    remedy: str


@dataclass(frozen=True)
class EngineVerdict:
    """outcome: RUNS, REFUSES or WRONG, the worst of the findings;  note: what a user should know all the same"""

    engine: str
    outcome: str
    evidence: str
    note: str
    findings: tuple[Finding, ...]

    @property
    def accepts(self) -> bool:
        """Whether the folder can be given to the engine as it is."""
        return self.outcome == RUNS

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"findings": [asdict(finding) for finding in self.findings]}


def widths_of(config: Config) -> Widths:
    """Sizes of the attention of a deepseek_v3 config."""
    return Widths(
        heads=config["num_attention_heads"],
        rank=config["kv_lora_rank"],
        rope=config["qk_rope_head_dim"],
        nope=config["qk_nope_head_dim"],
        value=config["v_head_dim"],
    )


def rope_type(config: Config) -> str:
    """Of the rotary settings in either spelling."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return str(given.get("rope_type") or given.get("type") or "default")


def _kernel(config: Config) -> tuple[int, int] | None:
    """Widths of the heads that GPU kernels of this size want; None where there are none."""
    sizes = widths_of(config)
    return GPU_KERNELS.get((sizes.rank, sizes.rope))


def _head_widths(config: Config) -> tuple[int, int]:
    return config["qk_nope_head_dim"], config["v_head_dim"]


_SIZES = " and ".join(f"{rank}+{rope}" for rank, rope in GPU_KERNELS)
_CONVERT = "convert with transmla, which gives the model plain frequencies of its own"

RULES: tuple[Rule, ...] = (
    Rule(
        (VLLM_GPU, SGLANG),
        lambda config: _kernel(config) is None,
        REFUSES,
        f"no GPU kernel for this size, only for {_SIZES}",
        "transmla export --to vllm pads it with zeros, at the cost of cache; or convert at one of these sizes",
    ),
    Rule(
        (VLLM_GPU, SGLANG),
        lambda config: _kernel(config) not in (None, _head_widths(config)),
        REFUSES,
        "its kernels want other widths of the heads: " + ", ".join(
            f"{rank}+{rope} {heads[0]} and {heads[1]}" for (rank, rope), heads in GPU_KERNELS.items()
        ),
        "transmla export --to vllm pads the heads with zeros, at no cost of cache",
    ),
    Rule(
        (VLLM_CPU,),
        lambda config: (config["kv_lora_rank"], config["qk_rope_head_dim"]) != (512, 64),
        REFUSES,
        "it loads every size and fails at the first request unless it is 512+64",
        "transmla export --to vllm --size 512+64",
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU, SGLANG),
        lambda config: rope_type(config) in ("llama3", "linear", "dynamic", "longrope"),
        WRONG,
        "any rope scaling is taken for YaRN, without a word",
        _CONVERT,
    ),
    Rule(
        (LLAMA_CPP,),
        lambda config: rope_type(config) == "llama3",
        WRONG,
        "frequency factors are ignored for deepseek2",
        _CONVERT,
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU, SGLANG, TENSORRT),
        lambda config: bool(config.get("attention_bias")),
        WRONG,
        "biases of the attention are dropped without a word",
        "there is no place for them; use transformers or MLX-LM",
    ),
    Rule(
        (LLAMA_CPP,),
        lambda config: bool(config.get("attention_bias")),
        REFUSES,
        "deepseek2 has no biases",
        "use transformers or MLX-LM",
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU, SGLANG, MLX),
        lambda config: bool(config.get("tie_word_embeddings")),
        REFUSES,
        "it wants lm_head.weight among the tensors (SGLang: for more than one pipeline stage)",
        "write lm_head and set tie_word_embeddings to false, as transmla convert does",
    ),
    Rule(
        (MLX,),
        lambda config: config["num_hidden_layers"] > 61,
        WRONG,
        "it drops layer 61, which it takes for the extra prediction layer of DeepSeek-V3",
        "use another engine",
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU, SGLANG),
        lambda config: not isinstance(config.get("n_routed_experts"), int),
        REFUSES,
        "loading adds to n_routed_experts, which is no number",
        "set n_routed_experts to 2; no layer has to use them",
    ),
    Rule(
        (LLAMA_CPP,),
        lambda config: (config.get("n_routed_experts") or 0) <= (config.get("n_group") or 0),
        REFUSES,
        "it aborts unless there are more experts than expert groups, used or not",
        "set n_routed_experts to 2 and n_group to 1",
    ),
    Rule(
        (STOCK, MLX),
        lambda config: bool(config.get("latent_norm_folded")) and float(config.get("rms_norm_eps", 0)) != 1e-6,
        WRONG,
        "epsilon of the latent norm is fixed at 1e-6 there, and the folded norm relies on it",
        "convert with transmla, which scales the residual stream to an epsilon of 1e-6",
    ),
    Rule(
        tuple(ENGINES),
        lambda config: (config.get("first_k_dense_replace") or 0) < config["num_hidden_layers"]
        and bool(config.get("latent_norm_folded")),
        REFUSES,
        "layers behind first_k_dense_replace are expected to have experts",
        "set first_k_dense_replace to num_hidden_layers",
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU),
        lambda config: float(config.get("routed_scaling_factor") or 1) != 1 and config.get("dtype") == "float16",
        WRONG,
        "in float16 it rescales the residual stream by routed_scaling_factor",
        "set routed_scaling_factor to 1.0, or use bfloat16",
    ),
)  # fmt: skip


def engine_verdicts(config: Config) -> tuple[EngineVerdict, ...]:
    """One verdict per engine, from a deepseek_v3 config.json alone."""
    found = []
    for engine, note in ENGINES.items():
        rules = [rule for rule in RULES if engine in rule.engines and rule.applies(config)]
        outcomes = {rule.outcome for rule in rules}
        outcome = WRONG if WRONG in outcomes else REFUSES if outcomes else RUNS
        findings = tuple(Finding(rule.outcome, rule.why, rule.remedy) for rule in rules)
        found.append(EngineVerdict(engine, outcome, EVIDENCE[engine], note, findings))
    return tuple(found)
