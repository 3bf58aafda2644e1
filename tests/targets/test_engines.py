"""The written contract of each engine: what our config keeps, and which changes each rule sees."""

import json
from pathlib import Path
from typing import Any

import pytest

from transmla.geometry import MlaGeometry
from transmla.model.modeling_transmla import TransmlaConfig
from transmla.targets.engines import (
    COMMANDS,
    ENGINES,
    EVIDENCE,
    LLAMA_CPP,
    MLX,
    OWN,
    OWN_MODEL_TYPE,
    REFUSES,
    RULES,
    RUNS,
    SGLANG,
    STOCK,
    TENSORRT,
    VLLM_BACKEND,
    VLLM_CPU,
    VLLM_GPU,
    WRONG,
    command_of,
    engine_verdicts,
    own_form_sizes,
)
from transmla.targets.stock import deepseek_v3_config, flat_rotary

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "engines"
SOURCE = {
    "vocab_size": 97, "hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 32,
    "hidden_act": "silu",
}  # fmt: skip


def config(rank: int = 512, rope: int = 64, head: int = 128, **changes: Any) -> dict[str, Any]:
    sizes = MlaGeometry(3, 4096, 32, rank, rope, head, head)
    return deepseek_v3_config(SOURCE, sizes, 5000.0, 256, "bfloat16") | changes


def outcomes(given: dict[str, Any]) -> dict[str, str]:
    return {verdict.engine: verdict.outcome for verdict in engine_verdicts(given)}


def test_every_engine_runs_what_is_written_at_its_size() -> None:
    assert set(outcomes(config()).values()) == {RUNS}
    assert set(ENGINES) == set(EVIDENCE) == set(outcomes(config()))


def test_the_own_form_has_the_name_of_its_class() -> None:
    assert TransmlaConfig.model_type == OWN_MODEL_TYPE


SIZES: list[tuple[int, int, int, set[str]]] = [
    (256, 64, 64, {VLLM_CPU, VLLM_BACKEND, VLLM_GPU, SGLANG}),
    (256, 64, 128, {VLLM_CPU, VLLM_BACKEND}),
    (512, 64, 64, {VLLM_GPU, SGLANG}),
    (96, 32, 64, {VLLM_CPU, VLLM_BACKEND, VLLM_GPU, SGLANG}),
]


@pytest.mark.parametrize(("rank", "rope", "head", "refusing"), SIZES)
def test_sizes(rank: int, rope: int, head: int, refusing: set[str]) -> None:
    found = engine_verdicts(config(rank, rope, head))
    assert {verdict.engine for verdict in found if not verdict.accepts} == refusing
    assert all("export --to vllm" in verdict.findings[0].remedy for verdict in found if not verdict.accepts)


VLLM = (VLLM_GPU, VLLM_CPU)


def own_form(rank: int = 512, rope: int = 64, head: int = 128, **source: Any) -> dict[str, Any]:
    return own_form_sizes(source, MlaGeometry(3, 4096, 32, rank, rope, head, head))


OWN_FORM: list[tuple[dict[str, Any], set[str]]] = [
    (own_form(), {OWN, *VLLM}),
    (own_form(256), {OWN, VLLM_GPU}),
    (own_form(head=64), {OWN, VLLM_CPU}),
    (own_form(192), {OWN}),
    (own_form(attn_logit_softcapping=50.0), {OWN}),
    # a window limits the context, and nothing else
    (own_form(sliding_window=4096), {OWN, *VLLM}),
]


@pytest.mark.parametrize(("given", "running"), OWN_FORM)
def test_who_runs_the_own_form(given: dict[str, Any], running: set[str]) -> None:
    found = {verdict.engine: verdict for verdict in engine_verdicts(given)}
    assert {name for name, verdict in found.items() if verdict.accepts} == running
    assert all("pip install PATH/TO/transmla (a checkout)" in found[engine].note for engine in VLLM)


def test_a_window_is_the_longest_request_of_vllm() -> None:
    """Of the sources whose layers use it: see `check_served` in serving/vllm.py for what happens without the option."""
    windowed, kinds = own_form(sliding_window=4096), ["full_attention", "sliding_attention"]
    assert command_of(VLLM_GPU, windowed) == "vllm serve OUT --max-model-len 4096"
    assert command_of(VLLM_CPU, own_form(sliding_window=8, layer_types=kinds)).endswith("--max-model-len 8")
    assert "4,096 tokens at most" in {one.engine: one.note for one in engine_verdicts(windowed)}[VLLM_CPU]
    assert command_of(VLLM_GPU, own_form(256)).endswith("--attention-backend TRITON_MLA")
    assert command_of(VLLM_GPU, config(256)) == command_of(VLLM_GPU, own_form(256))
    for unlimited in (own_form(), own_form(sliding_window=8, layer_types=kinds[:1]), config(sliding_window=8)):
        assert command_of(VLLM_GPU, unlimited) == "vllm serve OUT"
    assert command_of(OWN, windowed) == COMMANDS[OWN]


CHANGES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"rope_scaling": {"rope_type": "llama3"}}, dict.fromkeys((*VLLM, SGLANG, LLAMA_CPP), WRONG)),
    ({"rope_scaling": {"type": "linear"}}, dict.fromkeys((*VLLM, SGLANG), WRONG)),
    (
        {"attention_bias": True},
        dict.fromkeys((*VLLM, SGLANG, TENSORRT), WRONG) | {LLAMA_CPP: REFUSES},
    ),
    ({"tie_word_embeddings": True}, dict.fromkeys((*VLLM, SGLANG, MLX), REFUSES)),
    ({"num_hidden_layers": 62, "first_k_dense_replace": 62}, {MLX: WRONG}),
    ({"num_hidden_layers": 61, "first_k_dense_replace": 61}, {}),
    ({"num_hidden_layers": 27, "first_k_dense_replace": 27, "q_lora_rank": 8}, {LLAMA_CPP: REFUSES}),
    ({"num_hidden_layers": 28, "first_k_dense_replace": 28, "q_lora_rank": 8}, {}),
    ({"num_hidden_layers": 27, "first_k_dense_replace": 27}, {}),
    ({"n_routed_experts": None}, dict.fromkeys((*VLLM, SGLANG, LLAMA_CPP), REFUSES)),
    ({"n_routed_experts": 1}, {LLAMA_CPP: REFUSES}),
    ({"rms_norm_eps": 1e-5}, {STOCK: WRONG, MLX: WRONG}),
    ({"rms_norm_eps": 1e-5, "latent_norm_folded": False}, {}),
    ({"first_k_dense_replace": 2}, dict.fromkeys(ENGINES, REFUSES)),
    ({"routed_scaling_factor": 2.5, "dtype": "float16"}, dict.fromkeys(VLLM, WRONG)),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES, ids=str)
def test_changes_that_engines_would_misread(change: dict[str, Any], expected: dict[str, str]) -> None:
    found = outcomes(config(**change))
    assert {engine: outcome for engine, outcome in found.items() if outcome != RUNS} == expected


def saved_by_transformers() -> dict[str, Any]:
    """The rotary settings where transformers 5 saves them."""
    flat = config()
    rotary = flat.pop("rope_scaling") | {"rope_theta": flat.pop("rope_theta")}
    return flat | {"rope_parameters": rotary}


def test_rotary_settings_that_one_engine_does_not_see() -> None:
    found = outcomes(saved_by_transformers())
    assert {engine for engine, outcome in found.items() if outcome != RUNS} == {MLX} and found[MLX] == WRONG
    assert flat_rotary(saved_by_transformers()) == config()


def note_of(given: dict[str, Any], engine: str = LLAMA_CPP) -> str:
    return next(verdict.note for verdict in engine_verdicts(given) if verdict.engine == engine)


def test_what_llama_cpp_caches_is_what_was_measured() -> None:
    rows = json.loads((RESULTS / "llama-cpp-caches.json").read_text("utf-8"))["rows"]
    sizes = {"96-32": (96, 32), "160-32": (160, 32), "512-64": (512, 64), "24-8": (24, 8)}
    seen = set()
    for name, (rank, rope) in sizes.items():
        note = note_of(config(rank, rope))
        for row in (row for row in rows if row["file"].endswith(f"{name}.gguf") and row["cache"] != "f16"):
            runs = "none of its quantised caches" not in note and row["flash_attention"] == "enabled"
            assert (row["refused"] is None) == runs, row
            if runs:
                assert (row["ratio"] > 1.2) == (row["cache"] == "q4_0") and "-fa on -ctk q8_0 -ctv q8_0" in note
            seen.add((name, row["cache"], row["flash_attention"]))
    assert len(seen) == 4 * 2 * 2, "every size with both types, with and without flash attention"


def test_what_vllm_on_cpus_caches_is_what_was_measured() -> None:
    """A prompt is read without the cache; the second new token wants it, and fp8 fails there."""
    rows = json.loads((RESULTS / "vllm-cpu-fp8.json").read_text("utf-8"))["rows"]
    assert {row["cache"] for row in rows} >= {"auto", "fp8"}
    for row in rows:
        assert row["nats"] is not None and (row["greedy"] is None) == (row["cache"] != "auto") == bool(row["errors"])
        assert "no fp8 cache" in note_of(config(), row["engine"])


@pytest.mark.parametrize(("rank", "head", "backend"), [(512, 128, False), (256, 64, True)])
def test_fp8_caches_of_gpus(rank: int, head: int, backend: bool) -> None:
    """FlashMLA checks that there are 576 values when it runs, not when it is chosen."""
    note = note_of(config(rank, 64, head), VLLM_GPU)
    assert "--kv-cache-dtype fp8" in note and ("TRITON_MLA" in note) == backend
    assert "--kv-cache-dtype fp8_e4m3" in note_of(config(rank, 64, head), SGLANG)


def test_every_rule_applies_to_some_case_above() -> None:
    cases = [config(*sizes) for *sizes, _ in SIZES] + [config(**change) for change, _ in CHANGES]
    cases.append(saved_by_transformers())
    for rule in RULES:
        assert any(rule.applies(case) for case in cases) and not rule.applies(config()), rule.why
        assert rule.remedy and set(rule.engines) <= set(ENGINES) and rule.outcome in (REFUSES, WRONG)
