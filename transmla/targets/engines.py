"""What each inference engine does with a deepseek_v3 config: runs it, refuses it, or computes something else.

A table of rules. Each rule names the engines that it is about, the configs that it applies to, the reason, and what to
do. The facts were measured by running the engine on converted models (tests/targets/test_engines_run.py), or read in
the engine's source code; `EVIDENCE` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transmla.geometry import GPU_KERNELS, MlaGeometry

# of folders in the own form, as `TransmlaConfig` has it
OWN_MODEL_TYPE = "transmla"
# of the form for training, as `UnfoldedConfig` has it, whose file takes seconds to load
UNFOLDED_MODEL_TYPE = "deepseek_v3_unfolded"

RUNS, REFUSES, WRONG = "runs", "refuses", "computes something else"

STOCK, OWN = "transformers, stock class", "transformers, own class"
VLLM_GPU, VLLM_CPU, SGLANG = "vLLM (GPU)", "vLLM (CPU)", "SGLang"
# the stock class of transformers in vLLM, with vLLM's attention; vLLM chooses it if it is asked to
VLLM_BACKEND = "vLLM (CPU, transformers)"
LLAMA_CPP, MLX, TENSORRT = "llama.cpp", "MLX-LM", "TensorRT-LLM"
# engine -> note on a folder that the engine runs
ENGINES = {
    STOCK: "correct, but decompresses the whole cache at every step",
    OWN: "latent cache, absorbed decoding",
    VLLM_GPU: "latent cache, kernels for this size",
    VLLM_CPU: "latent cache",
    VLLM_BACKEND: "latent cache, with --model-impl transformers",
    SGLANG: "latent cache, kernels for this size",
    LLAMA_CPP: "latent cache, any size, as GGUF (transmla export --to gguf); fast GPU attention for 512+64 and 256+64",
    MLX: "latent cache, any size",
    TENSORRT: "latent cache",
}
# engine -> how its rules are known
EVIDENCE = {
    STOCK: "measured", OWN: "measured", VLLM_CPU: "measured", VLLM_BACKEND: "measured", LLAMA_CPP: "measured",
    MLX: "measured", VLLM_GPU: "source code", SGLANG: "source code", TENSORRT: "source code",
}  # fmt: skip

# engine -> the command that serves or runs a folder OUT; see `command_of`
COMMANDS = {
    STOCK: 'AutoModelForCausalLM.from_pretrained("OUT")',
    OWN: 'AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)',
    VLLM_GPU: "vllm serve OUT",
    VLLM_CPU: "vllm serve OUT",
    VLLM_BACKEND: "vllm serve OUT --model-impl transformers",
    SGLANG: "python -m sglang.launch_server --model-path OUT",
    LLAMA_CPP: "transmla export OUT OUT.gguf --type q8_0 && llama-server -m OUT.gguf",
    MLX: 'mlx_lm.generate --model OUT --prompt "Hello"',
    TENSORRT: "trtllm-serve OUT",
}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """A reason why some engines do not run some configs.

    engines: the engines that it is about
    applies: tells whether it applies to a config
    outcome: REFUSES or WRONG, what these engines then do
    why:     the reason;  remedy: what the user can do
    """

    engines: tuple[str, ...]
    applies: Callable[[Config], bool]
    outcome: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """A reason why one engine does not run one folder.

    outcome: REFUSES or WRONG;  why: the reason;  remedy: what the user can do
    """

    outcome: str
    why: str
    remedy: str


@dataclass(frozen=True)
class EngineVerdict:
    """What one engine does with one folder.

    engine:   name of the engine
    outcome:  RUNS, REFUSES or WRONG; the worst of the findings
    evidence: how this is known, "measured" or "source code"
    note:     what to know about the engine where it runs the folder
    findings: the reasons, if it does not run the folder
    """

    engine: str
    outcome: str
    evidence: str
    note: str
    findings: tuple[Finding, ...]

    @property
    def accepts(self) -> bool:
        """Whether the engine runs the folder as it is."""
        return self.outcome == RUNS

    def summary(self) -> dict[str, Any]:
        """The verdict as plain values, for JSON."""
        return asdict(self) | {"findings": [asdict(finding) for finding in self.findings]}


def rope_type(config: Config) -> str:
    """The rope type of a config, from `rope_scaling` or `rope_parameters`; "default" if it names none."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return str(settings.get("rope_type") or settings.get("type") or "default")


def _kernel(config: Config) -> tuple[tuple[int, int], ...]:
    """Head widths (nope, value) of the GPU kernels for this latent and rotary size; none if there are no kernels."""
    return GPU_KERNELS.get((config["kv_lora_rank"], config["qk_rope_head_dim"]), ())


def _head_widths(config: Config) -> tuple[int, int]:
    """Head widths (nope, value) of the config."""
    return config["qk_nope_head_dim"], config["v_head_dim"]


def _has_other_heads(config: Config) -> bool:
    """Whether there are GPU kernels for this latent and rotary size, but not for its heads."""
    kernels = _kernel(config)
    return bool(kernels) and _head_widths(config) not in kernels


def _is_lite(config: Config) -> bool:
    """Whether llama.cpp's deepseek2 takes the model for a lite one, by its depth (models/deepseek2.cpp)."""
    depth = config["num_hidden_layers"]
    return depth in (26, 27) or (depth == 48 and config.get("vocab_size") == 128256)


# measured with its quantisers: relative error of latent rows at hidden sizes from 1,024 on
_SMALL_ROWS = (
    "; quantise with transmla export --type, which keeps attn_kv_a_mqa at f16: its latent rows are too small for "
    "quantised blocks (error in q6_k 100 %, q5_k and q4_k up to 25 %, q8_0 up to 6 %)"
)
# measured: benchmarks/results/engines/llama-cpp-caches.json
_GGML_BLOCK = 32
_SIZES = " and ".join(f"{rank}+{rope}" for rank, rope in GPU_KERNELS)
_HEADS = ", ".join(
    f"{' or '.join(f'{nope} and {value}' for nope, value in heads)} at {rank}+{rope}"
    for (rank, rope), heads in GPU_KERNELS.items()
)
_CONVERT = "convert the model with transmla, which writes plain frequencies"


def _cache_types(config: Config) -> str:
    """What llama.cpp's own quantised caches do with these sizes."""
    if config["kv_lora_rank"] % _GGML_BLOCK or config["qk_rope_head_dim"] % _GGML_BLOCK:
        return "; none of its quantised caches: latent and key are not multiples of 32"
    return "; its quantised cache: -fa on -ctk q8_0 -ctv q8_0 (q4_0 loses far more)"


# FLASHMLA, which vLLM chooses on Hopper for both sizes, has kernels for 576 values, and says so at the first request
# (csrc/pybind.cpp: "Only head_size_k == 576 is supported")
_TRITON = "--attention-backend TRITON_MLA"


def _needs_triton(engine: str, config: Config) -> bool:
    return engine == VLLM_GPU and (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (256, 64)


def _fp8_cache(engine: str, config: Config) -> str:
    """How an engine is asked for a cache of fp8 values; scales are 1, which latents and rotary keys fit."""
    if engine == SGLANG:
        return "; fp8 cache: --kv-cache-dtype fp8_e4m3"
    # one attention for both; measured with the first: benchmarks/results/engines/vllm-cpu-fp8.json
    if engine in (VLLM_CPU, VLLM_BACKEND):
        return "; no fp8 cache"
    return "; fp8 cache: --kv-cache-dtype fp8"


RULES: tuple[Rule, ...] = (
    Rule(
        (VLLM_GPU, SGLANG),
        lambda config: not _kernel(config),
        REFUSES,
        f"it has no GPU kernel for this size, only for {_SIZES}",
        "pad the folder with zeros (transmla export --to vllm), which enlarges the cache, or convert to one of these "
        "sizes",
    ),
    Rule(
        (VLLM_GPU, SGLANG),
        _has_other_heads,
        REFUSES,
        f"its kernels need other head widths (nope and value): {_HEADS}",
        "pad the heads with zeros (transmla export --to vllm), which leaves the cache as it is",
    ),
    Rule(
        (VLLM_CPU, VLLM_BACKEND),
        lambda config: (config["kv_lora_rank"], config["qk_rope_head_dim"]) != (512, 64),
        REFUSES,
        "it loads any size, but fails at the first request unless the size is 512+64",
        "convert to 512+64, or pad a folder without biases with zeros: transmla export --to vllm --size 512+64",
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU, SGLANG),
        lambda config: rope_type(config) in ("llama3", "linear", "dynamic", "longrope"),
        WRONG,
        "it silently treats any rope scaling as YaRN",
        _CONVERT,
    ),
    Rule(
        (LLAMA_CPP,),
        lambda config: rope_type(config) == "llama3",
        WRONG,
        "it ignores frequency factors for deepseek2",
        _CONVERT,
    ),
    Rule(
        (MLX,),
        lambda config: "rope_theta" not in config,
        WRONG,
        "it reads rope_theta alone and takes 10,000 if that is in rope_parameters, where transformers 5 saves it",
        "write rope_theta and rope_scaling into config.json: transmla unfold and fold, or export, do",
    ),
    Rule(
        (LLAMA_CPP,),
        lambda config: bool(config.get("q_lora_rank")) and _is_lite(config),
        REFUSES,
        "it takes a deepseek2 model of this depth (26 or 27 layers; 48 with a vocabulary of 128,256) for a small one "
        "without a latent of the queries",
        "convert without --q-latent",
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU, SGLANG, TENSORRT),
        lambda config: bool(config.get("attention_bias")),
        WRONG,
        "its own deepseek_v3 silently drops the biases of the attention",
        "use transformers, MLX-LM, or vLLM with --model-impl transformers; or convert with --lossy",
    ),
    Rule(
        (LLAMA_CPP,),
        lambda config: bool(config.get("attention_bias")),
        REFUSES,
        "its deepseek2 architecture has no biases",
        "use transformers or MLX-LM; or convert with --lossy",
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU, SGLANG, MLX),
        lambda config: bool(config.get("tie_word_embeddings")),
        REFUSES,
        "it needs the tensor lm_head.weight (SGLang: with more than one pipeline stage)",
        "store lm_head.weight and set tie_word_embeddings to false, as transmla convert does",
    ),
    Rule(
        (MLX,),
        lambda config: config["num_hidden_layers"] > 61,
        WRONG,
        "it drops layer 61, which it mistakes for the extra prediction layer of DeepSeek-V3",
        "use another engine",
    ),
    Rule(
        (VLLM_GPU, VLLM_CPU, SGLANG),
        lambda config: not isinstance(config.get("n_routed_experts"), int),
        REFUSES,
        "loading fails because n_routed_experts is not an integer",
        "set n_routed_experts to 2; no layer has to use the experts",
    ),
    Rule(
        (LLAMA_CPP,),
        lambda config: (config.get("n_routed_experts") or 0) <= (config.get("n_group") or 0),
        REFUSES,
        "it aborts unless there are more experts than expert groups, even if no layer uses them",
        "set n_routed_experts to 2 and n_group to 1",
    ),
    Rule(
        (STOCK, MLX),
        lambda config: bool(config.get("latent_norm_folded")) and float(config.get("rms_norm_eps", 0)) != 1e-6,
        WRONG,
        "it fixes epsilon of the latent norm at 1e-6, and the folded norm depends on epsilon",
        "convert the model with transmla, which scales the residual stream to an epsilon of 1e-6",
    ),
    Rule(
        tuple(ENGINES),
        lambda config: (config.get("first_k_dense_replace") or 0) < config["num_hidden_layers"]
        and bool(config.get("latent_norm_folded")),
        REFUSES,
        "it expects experts in the layers from first_k_dense_replace on",
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


def attention_window(source: Config) -> int | None:
    """Tokens that some layers of a source attend to, None if all layers attend to all.

    source: its complete config, with the defaults of its class
    """
    kinds, window = source.get("layer_types"), source.get("sliding_window")
    return int(window) if window and (not kinds or "sliding_attention" in kinds) else None


# vLLM with this package beside it, see serving/vllm.py
PLUGIN = (VLLM_GPU, VLLM_CPU)


def _beside(config: Config) -> str:
    """How vLLM is made to run the own form."""
    window = attention_window(config["text_config"])
    limit = f"; requests of {window:,} tokens at most, the window of its layers" if window else ""
    return f"; pip install PATH/TO/transmla (a checkout) beside it; no tensor parallelism{limit}"


def command_of(engine: str, config: Config) -> str:
    """The command that serves or runs a folder OUT with this config, in either form."""
    window = attention_window(config["text_config"]) if config.get("model_type") == OWN_MODEL_TYPE else None
    command = COMMANDS[engine] + (f" {_TRITON}" if _needs_triton(engine, config) else "")
    return command + (f" --max-model-len {window}" if window and engine in PLUGIN else "")


# of a folder in the form of the source's own class, see targets/own.py
OWN_FORM_RULES: tuple[Rule, ...] = (
    Rule(
        tuple(engine for engine in ENGINES if engine not in (OWN, *PLUGIN)),
        lambda config: True,
        REFUSES,
        f"it has no class for model_type {OWN_MODEL_TYPE}",
        "use transformers, with trust_remote_code=True, or transmla.load",
    ),
    Rule(
        (VLLM_GPU,),
        lambda config: not _kernel(config),
        REFUSES,
        f"it has no GPU kernel for this size, only for {_SIZES}",
        "convert to one of these sizes",
    ),
    Rule(
        (VLLM_GPU,),
        _has_other_heads,
        REFUSES,
        f"its kernels need other head widths (nope and value): {_HEADS}",
        "use transformers, with trust_remote_code=True, or transmla.load",
    ),
    Rule(
        (VLLM_CPU,),
        lambda config: (config["kv_lora_rank"], config["qk_rope_head_dim"]) != (512, 64),
        REFUSES,
        "it has a kernel for 512+64 alone",
        "convert to 512+64",
    ),
    Rule(
        PLUGIN,
        lambda config: config.get("softcap") is not None,
        REFUSES,
        "its latent attention does not cap scores, as the source does",
        "use transformers, with trust_remote_code=True, or transmla.load",
    ),
)


def own_form_sizes(source: Config, mla: MlaGeometry) -> dict[str, Any]:
    """What rules look at of a folder in the own form that is not written yet; source: its complete config."""
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return {
        "model_type": OWN_MODEL_TYPE,
        "softcap": source.get("attn_logit_softcapping"),
        "text_config": dict(source),
        **{name: getattr(mla, name) for name in sizes},
    }


def engine_verdicts(config: Config) -> tuple[EngineVerdict, ...]:
    """One verdict per engine, from the config.json of a converted folder alone, in either form."""
    verdicts = []
    for engine, note in ENGINES.items():
        own = config.get("model_type") == OWN_MODEL_TYPE
        table = OWN_FORM_RULES if own else RULES
        evidence = EVIDENCE[engine] if not own or engine in (OWN, *PLUGIN) else "source code"
        rules = [rule for rule in table if engine in rule.engines and rule.applies(config)]
        outcomes = {rule.outcome for rule in rules}
        outcome = WRONG if WRONG in outcomes else REFUSES if outcomes else RUNS
        findings = tuple(Finding(rule.outcome, rule.why, rule.remedy) for rule in rules)
        if engine == LLAMA_CPP and config.get("latent_norm_folded"):
            note += _SMALL_ROWS
        if engine == LLAMA_CPP and not own:
            note += _cache_types(config)
        if engine in (VLLM_GPU, VLLM_CPU, VLLM_BACKEND, SGLANG) and not own:
            note += _fp8_cache(engine, config)
        if _needs_triton(engine, config):
            note += f"; on Hopper with {_TRITON}"
        if own and engine in PLUGIN:
            note += _beside(config)
        verdicts.append(EngineVerdict(engine, outcome, evidence, note, findings))
    return tuple(verdicts)
