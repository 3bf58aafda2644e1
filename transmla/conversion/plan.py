"""What a conversion would do, from file headers alone: sizes, savings, needs, engines, and every refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transmla.checkpoint.hub_headers import open_on_hub
from transmla.checkpoint.read import Source, open_source, refuse_quantised
from transmla.checkpoint.resolve import ResolvedSource, resolve
from transmla.checkpoint.write import SHARD_BYTES, check_destination
from transmla.errors import GeometryError, RecipeError, SourceError, UnsupportedError
from transmla.families import Family, family_of, rope_parameters, rotary_dim
from transmla.geometry import (
    CACHE_BITS,
    GqaGeometry,
    MlaGeometry,
    default_sizes,
    gqa_geometry,
    latent_candidates,
    mla_geometry,
    rope_candidates,
    usual_rope,
)
from transmla.model.source import (
    AttentionFacts,
    attention_facts,
    checkpoint_tensors,
    complete_config,
    is_tied,
    skeleton,
    source_config,
    source_frequencies,
)
from transmla.recipe import Recipe, find_recipe, load_recipe
from transmla.targets.engines import EngineVerdict, engine_verdicts
from transmla.targets.own import obstacles, own_config
from transmla.targets.stock import deepseek_v3_config
from transmla.text.mixes import needs_source

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Python, torch and transformers themselves
_RUNTIME_BYTES = 400 * 2**20
# tokenizer, configs, provenance and modeling file, generously
_COMPANION_BYTES = 32 * 2**20

# positions that calibration windows are spread over, if nothing is said
MOST_CALIBRATION_CONTEXT = 8192


@dataclass(frozen=True)
class CacheRow:
    """One way to cache: values per token and layer, bytes per token over all layers."""

    name: str
    values_per_token: int
    bytes_per_token: float

    def total_bytes(self, context: int) -> float:
        return self.bytes_per_token * context


@dataclass(frozen=True)
class Split:
    """One way to divide the cached values between latent and rotary key, and the engines that run it."""

    mla: MlaGeometry
    engines: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a weight is read.

    config:    of the source, with the defaults of its class
    attention: what the attention of its first layer does
    obstacles: what keeps stock deepseek_v3 from expressing the model
    form:      of the folder that is written: "deepseek_v3" or "transmla", see targets/own.py
    splits:    what `rope="auto"` chooses from, the usual one first; empty otherwise
    """

    resolved: ResolvedSource
    source: Source
    recipe: Recipe
    config: Mapping[str, Any]
    family: Family
    attention: AttentionFacts
    obstacles: tuple[str, ...]
    form: str
    gqa: GqaGeometry
    mla: MlaGeometry
    dtype: str
    max_position_embeddings: int
    cache: tuple[CacheRow, ...]
    engines: tuple[EngineVerdict, ...]
    disk_bytes: int
    memory_bytes: int
    notes: tuple[str, ...]
    splits: tuple[Split, ...] = ()

    @property
    def calibration_context(self) -> int:
        """Positions that calibration windows are spread over."""
        return min(self.recipe.context or MOST_CALIBRATION_CONTEXT, self.max_position_embeddings)

    @property
    def cache_ratio(self) -> float:
        """Cached values of the target over those of the source."""
        return self.mla.cache_values() / self.gqa.cache_values()

    def summary(self) -> dict[str, Any]:
        """The plan as plain numbers, for JSON."""
        return {
            "source": self.resolved.name,
            "revision": self.resolved.revision,
            "family": self.family.model_type,
            "format": self.form,
            "obstacles": list(self.obstacles),
            "gqa": asdict(self.gqa),
            "mla": asdict(self.mla),
            "dtype": self.dtype,
            "max_position_embeddings": self.max_position_embeddings,
            "cache": [asdict(row) for row in self.cache],
            "engines": [verdict.summary() for verdict in self.engines],
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "notes": list(self.notes),
            "splits": [
                {
                    "kv_lora_rank": split.mla.kv_lora_rank,
                    "qk_rope_head_dim": split.mla.qk_rope_head_dim,
                    "engines": list(split.engines),
                }
                for split in self.splits
            ],
        }


def plan(
    source: str,
    destination: str | Path | None = None,
    *,
    latent: int | str | None = None,
    rope: int | str | None = None,
    recipe: str | Path | None = None,
    download: bool = False,
    **overrides: Any,
) -> Plan:
    """Read the headers of `source` and say what `transmla.convert` would do; nothing is loaded or written.

    source:      Hugging Face folder, .gguf file, hub id, recipe name, or "stories260k" (ships with the package)
    destination: checked for existence and disk space when given
    latent:      kv_lora_rank;  rope: qk_rope_head_dim;  None: see `geometry.default_sizes`; latent "auto": chosen by
                 measured loss, planned for the largest; rope "auto": by measured error, planned for the usual width
    recipe:      path or name of a recipe; its values give way to the arguments
    download:    bring the weights of a hub id into the local cache; False: read their headers where they are
    overrides:   any other field of `transmla.recipe.Recipe`
    Raises SourceError, UnsupportedError, GeometryError, DestinationError, RecipeError.
    """
    settings = _redivided(_recipe(source, recipe), latent, rope, overrides.get("total"))
    settings = settings.with_overrides(latent=latent, rope=rope, **overrides)
    resolved = resolve(settings.source or source, settings.revision, headers_only=not download)
    opened = open_on_hub(resolved) if resolved.weights_on_hub else open_source(resolved.path)
    where = opened.config_where
    family = family_of(opened.config, where)
    refuse_quantised(opened)
    gqa_geometry(opened.config, where)  # refuses what is missing or impossible before a class fills in its defaults
    config, model = complete_config(opened.config), skeleton(source_config(opened.config))
    gqa = gqa_geometry(_filled(opened.config, config), where)
    facts = attention_facts(family, model, gqa)
    found = obstacles(config, family, encoded=facts.encoded)
    form = _form(settings, found, where)
    candidates = _candidates(gqa, settings)
    latent, rope = chosen_sizes(gqa, settings, candidates)
    divided = _divided(gqa, settings, rotary_dim(config, gqa.head_dim))
    stock = form == "deepseek_v3"
    mla = replace(
        divided[0] if divided else mla_geometry(gqa, latent, rope, settings.q_latent),
        attention_bias=stock and (facts.biased or facts.output_bias),
        query_bias=stock and facts.biased,
    )
    if settings.q_latent is not None and form != "deepseek_v3":
        raise GeometryError(
            "this model keeps its queries as they are",
            where="--q-latent",
            why=f"it is written in the form of {family.model_type}: {'; '.join(found) or 'as asked for'}",
            remedy="leave out --q-latent; it saves no cache",
        )
    _check_tensors(opened, family, model, tied=is_tied(config))
    dtype = _output_dtype(opened, family, settings.dtype)
    context, notes = _context(opened, config, form)
    if settings.context and settings.context > context:
        raise RecipeError(
            "the calibration would leave the source's context",
            where="--context",
            why=f"{settings.context:,} positions, and the source knows {context:,}",
            remedy=f"give at most --context {context}",
        )
    if candidates:
        notes.append(
            f"--latent auto: the smallest of {len(candidates)} sizes, {candidates[0]} to {candidates[-1]}, whose "
            f"perplexity stays within {settings.budget:.1%}; up to {len(candidates).bit_length()} conversions"
        )
    if divided:
        notes.append(
            f"--rope auto: {len(divided)} ways to divide {mla.cache_values()} cached values, of which convert takes "
            "the one with the smallest error in a few layers; all else here is for the first"
        )
    if form != "deepseek_v3" and found:
        notes.append(f"written as {family.model_type} with latent attention: deepseek_v3 has no {', '.join(found)}")
    if mla.query_bias:
        notes.append(_query_bias(mla))
    if settings.begin != "half":
        which = "every" if settings.begin == "all" else "no"
        notes.append(f"{which} calibration window starts with the begin token, where the tokenizer puts one first")
    if settings.refine != "off":
        notes.append("refinement takes as many layers at once as fit into half of the free memory")
    if needs_source(settings.mix, settings.sampled):
        notes.append(
            "while it writes calibration text, the whole source is in memory, in addition to the memory given here"
        )
    if mla.cache_values() >= gqa.cache_values():
        notes.append(
            f"this cache is not smaller: {mla.cache_values()} values per token and layer, source {gqa.cache_values()}"
        )
    if gqa.num_key_value_heads > 1:
        notes.append(_tensor_parallel(gqa, mla))
    weights = _weight_bytes(opened, family, gqa, mla, dtype)
    disk = weights + _COMPANION_BYTES + _journal_bytes(mla, settings)
    if destination is not None:
        check_destination(Path(destination), disk)
    planned = Plan(
        resolved=resolved,
        source=opened,
        recipe=settings,
        config=config,
        family=family,
        attention=facts,
        obstacles=found,
        form=form,
        gqa=gqa,
        mla=mla,
        dtype=dtype,
        max_position_embeddings=context,
        cache=cache_rows(gqa, mla),
        engines=(),
        disk_bytes=disk,
        memory_bytes=_memory_bytes(config, gqa, settings, weights, 4 * layer_values(opened, family)),
        notes=tuple(notes),
    )
    splits = (with_sizes(planned, one) for one in divided)
    return replace(
        planned,
        engines=engine_verdicts(_planned_config(planned)),
        splits=tuple(
            Split(one.mla, tuple(verdict.engine for verdict in one.engines if verdict.accepts)) for one in splits
        ),
    )


def _redivided(recipe: Recipe, latent: int | str | None, rope: int | str | None, total: int | None) -> Recipe:
    """The recipe without the sizes that these divide anew; the sum of its own remains, unless another is given."""
    if latent is not None and rope is not None:
        return replace(recipe, total=None)
    if rope != "auto" and total is None:
        return recipe
    if latent is not None:
        return replace(recipe, rope=None)
    own = recipe.total
    if isinstance(recipe.latent, int) and isinstance(recipe.rope, int):
        own = recipe.latent + recipe.rope
    return replace(recipe, latent=None, total=own)


def _filled(config: Mapping[str, Any], complete: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the sizes that it leaves to its class, as transformers does. complete: with all defaults"""
    wanted = ("num_key_value_heads", "head_dim", "rms_norm_eps", "intermediate_size")
    defaults = {key: complete[key] for key in wanted if complete.get(key) is not None}
    return defaults | {key: value for key, value in config.items() if value is not None}


def _form(recipe: Recipe, found: tuple[str, ...], where: str) -> str:
    """The form of the folder; `UnsupportedError` if the one that was asked for cannot express the model."""
    if recipe.format == "deepseek_v3" and found:
        raise UnsupportedError(
            "stock deepseek_v3 cannot express this model",
            where=where,
            why="; ".join(found),
            remedy="leave out --format, which writes the form of the source's own class",
        )
    if recipe.format != "auto":
        return recipe.format
    return "transmla" if found else "deepseek_v3"


def _candidates(gqa: GqaGeometry, recipe: Recipe) -> tuple[int, ...]:
    """Sizes for `--latent auto`, else none; raises `RecipeError` unless latent and budget go together."""
    if (recipe.latent == "auto") != (recipe.budget is not None):
        raise RecipeError(
            "latent auto and a budget belong together",
            where="--latent / --budget",
            why=f"latent is {recipe.latent!r}, budget {recipe.budget!r}",
            remedy="give both, for example --latent auto --budget 2%, or a number for --latent alone",
        )
    if recipe.latent != "auto":
        return ()
    if recipe.rope == "auto" or recipe.total is not None:
        raise RecipeError(
            "latent auto goes with a rotary width",
            where="--latent / --rope / --total",
            why="it searches for the smallest latent, so there is no total to divide",
            remedy="give --rope a number or leave it out, and leave out --total",
        )
    return latent_candidates(gqa, _number(recipe.rope))


def chosen_sizes(gqa: GqaGeometry, recipe: Recipe, candidates: Sequence[int] = ()) -> tuple[int | None, int | None]:
    """kv_lora_rank and qk_rope_head_dim of a recipe; None takes the default. What is "auto" is the largest, the usual.

    candidates: for `latent="auto"`
    Raises `RecipeError` if more is given than fits together.
    """
    latent, rope, total = recipe.latent, recipe.rope, recipe.total
    if None not in (latent, rope, total) or (rope == "auto" and latent not in (None, "auto")):
        raise RecipeError(
            "the sizes say more than fits together",
            where="--latent / --rope / --total",
            why="the total is the sum of latent and rotary width, and --rope auto divides it",
            remedy="leave out --latent" if rope == "auto" else "leave out one of the three",
        )
    if candidates:
        return candidates[-1], _number(rope)
    latent, rope = _number(latent), _number(rope)
    if total is None:
        return latent, rope
    if latent is not None:
        return latent, total - latent
    rope = usual_rope(gqa, total) if rope is None else rope
    return total - rope, rope


def _number(size: int | str | None) -> int | None:
    return None if isinstance(size, str) else size


def _divided(gqa: GqaGeometry, recipe: Recipe, turning: int) -> tuple[MlaGeometry, ...]:
    """The divisions for `rope="auto"`, else none."""
    if recipe.rope != "auto":
        return ()
    total = recipe.total or sum(default_sizes(gqa))
    widths = rope_candidates(gqa, total, turning)
    return tuple(mla_geometry(gqa, total - rope, rope, recipe.q_latent) for rope in widths)


def with_latent(planned: Plan, latent: int) -> Plan:
    """The same conversion at another kv_lora_rank."""
    recipe = planned.recipe
    return with_sizes(planned, mla_geometry(planned.gqa, latent, _number(recipe.rope), recipe.q_latent))


def with_sizes(planned: Plan, mla: MlaGeometry) -> Plan:
    """The same conversion at other sizes; biases stay those of the plan."""
    mla = replace(mla, attention_bias=planned.mla.attention_bias, query_bias=planned.mla.query_bias)
    planned = replace(planned, mla=mla, cache=cache_rows(planned.gqa, mla))
    return replace(planned, engines=engine_verdicts(_planned_config(planned)))


def target_config(
    planned: Plan, theta: float | None, inv_freq_LM: Sequence[Sequence[float]] = (), *, tied: bool | None = None
) -> dict[str, Any]:
    """config.json of the folder that is written.

    theta:       base of the rotary frequencies of a deepseek_v3 folder
    inv_freq_LM: those of each layer, in the own form
    tied:        whether lm_head is the embeddings, in the own form; None: as the source's config says
    """
    if planned.form == "deepseek_v3":
        assert theta is not None
        source = _filled(planned.source.config, planned.config)
        return deepseek_v3_config(source, planned.mla, theta, planned.max_position_embeddings, planned.dtype)
    config = dict(planned.config) if tied is None else dict(planned.config) | {"tie_word_embeddings": tied}
    facts = planned.attention
    _, factor = source_frequencies(source_config(planned.source.config), planned.gqa, planned.family, 0)
    return own_config(
        config, planned.family, planned.gqa, planned.mla, inv_freq_LM, planned.dtype,
        softmax_scale=facts.scaling * factor**2, softcap=facts.softcap, biased=facts.biased, encoded=facts.encoded,
        output_bias=facts.output_bias or (facts.biased and not facts.encoded),
    )  # fmt: skip


def _planned_config(planned: Plan) -> dict[str, Any]:
    """The same before the rotary frequencies are chosen."""
    return target_config(planned, float(rope_parameters(planned.config)["rope_theta"]))


def cache_rows(gqa: GqaGeometry, mla: MlaGeometry) -> tuple[CacheRow, ...]:
    """The source's cache in its common forms, then the cache of the converted model."""
    layers = gqa.num_hidden_layers

    def row(name: str, values: int, cache: str = "bf16") -> CacheRow:
        return CacheRow(name, values, values * layers * CACHE_BITS[cache] / 8)

    own = gqa.cache_values()
    rows = [row(f"source {gqa.kind}, bf16", own), row("source, 8-bit", own, "8-bit")]
    rows.append(row("source, 4-bit", own, "4-bit"))
    rows.append(row("as MHA, bf16", gqa.cache_values(gqa.num_attention_heads)))
    rows.append(row("as MQA, bf16", gqa.cache_values(1)))
    rows.append(row(f"MLA {mla.kv_lora_rank}+{mla.qk_rope_head_dim}, bf16", mla.cache_values()))
    return tuple(rows)


def _recipe(source: str, recipe: str | Path | None) -> Recipe:
    if recipe is not None:
        named = find_recipe(str(recipe))
        # SRC was named as well, and is what the user means; the recipe's revision belongs to its own source
        return replace(load_recipe(named if named is not None else Path(recipe)), source=source, revision=None)
    named = None if Path(source).exists() else find_recipe(source)
    return load_recipe(named) if named is not None else Recipe(source=source)


def _check_tensors(source: Source, family: Family, model: Any, tied: bool) -> None:
    head, shape = f"{family.lm_head}.weight", tuple(model.get_output_embeddings().weight.shape)
    if not tied and head not in source.tensors:
        raise SourceError(
            "tensors are missing",
            where=str(source.path),
            why=f"{head}, and the config does not say that the head is the embeddings",
            remedy="download the checkpoint again; if its head is the embeddings, set tie_word_embeddings to true in "
            "config.json",
        )
    if head in source.tensors:
        source.require({head: shape})
    source.require(checkpoint_tensors(family, model, tied))


def _output_dtype(source: Source, family: Family, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    stored = source.tensors[f"{family.embed_tokens}.weight"].dtype
    return stored if stored in _DTYPE_BYTES else "float32"


def _context(source: Source, config: Mapping[str, Any], form: str) -> tuple[int, list[str]]:
    context = int(config.get("max_position_embeddings") or 2048)
    notes = []
    window = config.get("sliding_window")
    kinds = set(config.get("layer_types") or ("sliding_attention",))
    if form == "deepseek_v3" and window and kinds == {"sliding_attention"} and 0 < window < context:
        notes.append(
            f"max_position_embeddings becomes {window:,}: up to there sliding and full attention are the same function"
        )
        context = int(window)
    types = {rope_parameters(config, kind)["rope_type"] for kind in config.get("layer_types") or (None,)}
    if source.rope_frequency_factors is not None:
        types = {"llama3"}
    for rope_type in sorted(types - {"default"}):
        notes.append(f"{rope_type} rope scaling becomes plain frequencies of a rope_theta of its own")
    return context, notes


def _query_bias(mla: MlaGeometry) -> str:
    constant, fitted = mla.stock_attention_weights - mla.attention_weights, mla.attention_weights
    return (
        f"deepseek_v3 has no bias for queries: q_lora_rank {mla.stock_q_lora_rank} with a constant in it takes "
        f"{constant:,} weights a layer beside the attention's {fitted:,}, and no cache; --format transmla needs none"
    )


def _tensor_parallel(gqa: GqaGeometry, mla: MlaGeometry) -> str:
    ranks = min(4, gqa.num_key_value_heads)
    return (
        f"tensor parallel: key/value heads are split over ranks, a latent is on every rank; "
        f"at {ranks} ranks {gqa.cache_values() // ranks} values per token and layer become {mla.cache_values()}"
    )


def _weight_bytes(source: Source, family: Family, gqa: GqaGeometry, mla: MlaGeometry, dtype: str) -> int:
    """What is written: all tensors of the source with other attention weights, and a head of its own."""
    values = 0
    for name, info in source.tensors.items():
        if f".{family.attention}." not in name:
            values += math.prod(info.shape)
    if f"{family.lm_head}.weight" not in source.tensors:
        values += math.prod(source.tensors[f"{family.embed_tokens}.weight"].shape)
    # the own form may keep the source's projections beside the latent's
    kept = gqa.cache_values() * gqa.hidden_size
    return (values + mla.num_hidden_layers * (mla.stock_attention_weights + kept)) * _DTYPE_BYTES[dtype]


def layer_values(source: Source, family: Family) -> int:
    """Number of values in the largest layer, experts included."""
    sizes: dict[str, int] = {}
    prefix = f"{family.layers}."
    for name, info in source.tensors.items():
        if name.startswith(prefix):
            index = name.removeprefix(prefix).partition(".")[0]
            sizes[index] = sizes.get(index, 0) + math.prod(info.shape)
    return max(sizes.values())


def _journal_bytes(mla: MlaGeometry, recipe: Recipe) -> int:
    """Disk that the journal of an unfinished conversion takes, float32.

    The fitted weights, and behind them either two states of the optimiser of three weights each (one is written before
    the other is deleted) or the refined weights; with `latent="auto"` also those of the best size so far.
    """
    copies, kept = (1, 1) if recipe.refine == "off" else (7, 2)
    if recipe.latent == "auto":
        copies += kept
    return copies * 4 * mla.num_hidden_layers * mla.attention_weights


def _memory_bytes(config: Mapping[str, Any], gqa: GqaGeometry, recipe: Recipe, weight_bytes: int, layer: int) -> int:
    """Estimated peak of the conversion, in bytes.

    While layers are fitted: streams, head outputs, one layer, moments, and the attention of one group. While the result
    is written: a shard of it and two copies of the embedding.
    """
    hidden, window = gqa.hidden_size, recipe.window
    width = gqa.num_attention_heads * gqa.head_dim
    streams = (recipe.num_tokens + recipe.sampled) * (2 * hidden + width) * 4
    moments = 10 * hidden * hidden * 8
    attention = 6 * (gqa.num_attention_heads // gqa.num_key_value_heads) * window * window * 4
    embedding = int(config["vocab_size"]) * hidden * 4
    fitting = streams + max(2 * layer + moments + attention, embedding)
    writing = min(SHARD_BYTES, weight_bytes) + 2 * embedding
    return _RUNTIME_BYTES + max(fitting, writing)
