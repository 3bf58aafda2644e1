"""What a conversion would do, from file headers alone: sizes, savings, needs, engines, and every refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from transmla.checkpoint.destination import check_destination, named_path
from transmla.checkpoint.read import Source, open_source, refuse_quantised
from transmla.checkpoint.resolve import EMBEDDED_MODELS, ResolvedSource, local, resolve
from transmla.checkpoint.store import understood
from transmla.conversion.needs import (
    COMPANION_BYTES,
    DTYPE_BYTES,
    journal_bytes,
    layer_values,
    memory_bytes,
    weight_bytes,
)
from transmla.conversion.refusals import check_lossy, check_rounding, check_tokens, chosen_form
from transmla.conversion.remarks import remarks
from transmla.conversion.sizes import as_number, chosen_sizes, divisions, redivided, tried_latents
from transmla.conversion.target import planned_config, target_config
from transmla.errors import DestinationError, GeometryError, RecipeError, SourceError
from transmla.families import LONG_ROPE, Family, family_of, rope_parameters, rotary_dim
from transmla.geometry import (
    CACHE_BITS,
    GqaGeometry,
    MlaGeometry,
    gqa_geometry,
    mla_geometry,
)
from transmla.model.outline import Outline, filled, is_tied, outline_of_headers
from transmla.recipe import Recipe, find_recipe, list_recipes, load_recipe
from transmla.tables import Shown
from transmla.targets.engines import EngineVerdict, engine_verdicts
from transmla.targets.stock import obstacles
from transmla.text.mixes import SELF, parse_mix
from transmla.text.sources import check_name

if TYPE_CHECKING:
    from transmla.model.skeleton import AttentionFacts

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
class Plan(Shown):
    """Everything that is known before a weight is read.

    outline:   what is known of the source's class, which `config` and `attention` ask for the rest
    obstacles: what keeps stock deepseek_v3 from expressing the model
    form:      of the folder that is written: "deepseek_v3" or "transmla", see targets/own.py
    splits:    what `rope="auto"` chooses from, the usual one first; empty otherwise
    """

    resolved: ResolvedSource
    source: Source
    recipe: Recipe
    family: Family
    outline: Outline
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

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Of the source, with the defaults of its class."""
        if self.outline.facts is not None:
            return self.outline.config
        from transmla.model.skeleton import complete_config

        return complete_config(self.source.config)

    @cached_property
    def attention(self) -> AttentionFacts:
        """What the attention of the source's first layer does."""
        if self.outline.facts is not None:
            return self.outline.facts
        return _ask_class(self.source, self.family).facts  # type: ignore[return-value]

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

    def show(self, console: Console) -> None:
        from transmla.conversion.show_plan import show_plan

        show_plan(self, console)


def plan(
    source: str | Path,
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
    download:    bring the weights of a hub id into the local cache, and let the source's class in transformers judge;
                 False: read headers where they are, and ask the class only where they and the config leave doubts
    overrides:   any other field of `transmla.recipe.Recipe`
    Raises SourceError, UnsupportedError, GeometryError, DestinationError, RecipeError, DataError (too few tokens).
    """
    source = str(source)
    settings = redivided(_recipe(source, recipe), latent, rope, overrides.get("total"))
    settings = settings.with_overrides(latent=latent, rope=rope, **overrides)
    resolved = resolve(settings.source or source, settings.revision, headers_only=not download)
    opened = _opened(resolved, sizes_only=not download)
    where = opened.config_where
    with understood(where):
        family = family_of(opened.config, where)
        _name_as_the_class(opened, family)
        refuse_quantised(opened)
        gqa_geometry(opened.config, where)  # refuses what is missing or impossible before a class fills in its defaults
        # a conversion needs the class itself, which takes seconds to load
        outline = None if download else outline_of_headers(opened, family)
        if outline is None:
            if not download and opened.format == "gguf":  # all of its config is needed now
                opened = open_source(resolved.path)
                _name_as_the_class(opened, family)
            outline = _ask_class(opened, family)
        config = outline.config
        gqa = gqa_geometry(filled(opened.config, config), where)
        found = obstacles(config, family, encoded=outline.encoded)
        form = chosen_form(settings, found, where)
        candidates = tried_latents(gqa, settings)
        latent, rope = chosen_sizes(gqa, settings, candidates)
        divided = divisions(gqa, settings, rotary_dim(config, gqa.head_dim))
        stock = form == "deepseek_v3" and not settings.lossy
        if settings.lossy:
            check_lossy(form, found, outline)
        mla = replace(
            divided[0] if divided else mla_geometry(gqa, latent, rope, settings.q_latent),
            attention_bias=stock and (outline.biased or outline.output_bias),
            query_bias=stock and outline.biased,
        )
        settings = settings.for_width(mla.widest)
        if settings.q_latent is not None and form != "deepseek_v3":
            raise GeometryError(
                "this model keeps its queries as they are",
                where="--q-latent",
                why=f"it is written in the form of {family.model_type}: {'; '.join(found) or 'as asked for'}",
                remedy="leave out --q-latent; it saves no cache",
            )
        _check_tensors(opened, family, outline)
        dtype = _output_dtype(opened, family, settings.dtype)
        context, notes = _context(opened, config, form, form == "deepseek_v3" or settings.theta != "auto")
        if settings.context and settings.context > context:
            raise RecipeError(
                "the calibration would leave the source's context",
                where="--context",
                why=f"{settings.context:,} positions, and the source knows {context:,}",
                remedy=f"give at most --context {context}",
            )
        for part in parse_mix(settings.mix, "--calibration"):
            if part.name != SELF:
                check_name(part.name)
        check_tokens(settings, context)
        check_rounding(settings, context)
        known = int(config.get("max_position_embeddings") or 2048)
        # that of a recipe is for models of all lengths, and is shortened; so is any to a sliding window
        if (overrides.get("window") or 0) > known:
            raise RecipeError(
                "the calibration windows are longer than the source's context",
                where="--window",
                why=f"{overrides['window']:,} tokens, and the source knows {known:,} positions",
                remedy=f"give at most --window {context}",
            )
    weights = weight_bytes(opened, family, gqa, mla, dtype)
    disk = weights + COMPANION_BYTES + journal_bytes(mla, settings)
    if destination is not None:
        if str(destination) in (*EMBEDDED_MODELS, *list_recipes()):
            raise DestinationError(
                "the destination has the name of a source",
                where=str(destination),
                why="a folder is looked for first, so the name would stand for the converted model from then on",
                remedy=f"choose another one, for example {destination}-mla",
            )
        check_destination(named_path(destination), disk, resumes=True)
    planned = Plan(
        resolved=resolved,
        source=opened,
        recipe=settings,
        family=family,
        outline=outline,
        obstacles=found,
        form=form,
        gqa=gqa,
        mla=mla,
        dtype=dtype,
        max_position_embeddings=context,
        cache=cache_rows(gqa, mla),
        engines=(),
        disk_bytes=disk,
        memory_bytes=memory_bytes(config, gqa, mla, settings, weights, layer_values(opened, family), dtype),
        notes=(),
    )
    if outline.facts is not None:
        with understood(where):  # what the class does not understand is said now, and not when all is done
            target_config(planned, float(rope_parameters(config)["rope_theta"]))
            _check_frequencies(planned)
    splits = (with_sizes(planned, one) for one in divided)
    return replace(
        planned,
        notes=(*notes, *remarks(planned, candidates, len(divided))),
        engines=engine_verdicts(planned_config(planned)),
        splits=tuple(
            Split(one.mla, tuple(verdict.engine for verdict in one.engines if verdict.accepts)) for one in splits
        ),
    )


def _opened(resolved: ResolvedSource, *, sizes_only: bool) -> Source:
    if not resolved.weights_on_hub:
        return open_source(resolved.path, sizes_only=sizes_only)
    from transmla.checkpoint.hub_headers import open_on_hub

    return open_on_hub(resolved)


def _name_as_the_class(source: Source, family: Family) -> None:
    """Give tensors the names that the class with a head has for them, as transformers does when it loads what was saved
    from the class without one, or where the tied embeddings are only there as the head."""
    table, head = f"{family.embed_tokens}.weight", f"{family.lm_head}.weight"
    prefix = f"{family.embed_tokens.partition('.')[0]}."
    if table in source.tensors:
        return
    if table.removeprefix(prefix) in source.tensors:
        source.rename({prefix + name: name for name in source.tensors if name != head})
    elif head in source.tensors:
        from transmla.model.skeleton import complete_config

        if is_tied(complete_config(source.config)):
            source.rename({table: head, head: head})


def _ask_class(source: Source, family: Family) -> Outline:
    from transmla.model.skeleton import outline_of_class

    return outline_of_class(source.config, family, source.config_where)


def with_latent(planned: Plan, latent: int) -> Plan:
    """The same conversion at another kv_lora_rank."""
    recipe = planned.recipe
    return with_sizes(planned, mla_geometry(planned.gqa, latent, as_number(recipe.rope), recipe.q_latent))


def with_sizes(planned: Plan, mla: MlaGeometry) -> Plan:
    """The same conversion at other sizes; biases stay those of the plan."""
    mla = replace(mla, attention_bias=planned.mla.attention_bias, query_bias=planned.mla.query_bias)
    planned = replace(planned, mla=mla, cache=cache_rows(planned.gqa, mla))
    return replace(planned, engines=engine_verdicts(planned_config(planned)))


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
    named = None if local(source) is not None else find_recipe(source)
    return load_recipe(named) if named is not None else Recipe(source=source)


def _check_tensors(source: Source, family: Family, outline: Outline) -> None:
    head = f"{family.lm_head}.weight"
    if not is_tied(outline.config) and head not in source.tensors:
        raise SourceError(
            "tensors are missing",
            where=str(source.path),
            why=f"{head}, and the config does not say that the head is the embeddings",
            remedy="download the checkpoint again; if its head is the embeddings, set tie_word_embeddings to true in "
            "config.json",
        )
    if head in source.tensors:
        source.require({head: outline.head})
    source.require(outline.tensors)


def _output_dtype(source: Source, family: Family, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    stored = source.tensors[f"{family.embed_tokens}.weight"].dtype
    return stored if stored in DTYPE_BYTES else "float32"


def _check_frequencies(planned: Plan) -> None:
    """Let the class compute the rotary frequencies of every layer."""
    from transmla.model.skeleton import source_config, source_frequencies

    config = source_config(planned.source.config)
    for index in range(planned.gqa.num_hidden_layers):
        source_frequencies(config, planned.gqa, planned.family, index)


def _context(source: Source, config: Mapping[str, Any], form: str, of_a_theta: bool) -> tuple[int, list[str]]:
    """The context of the result, and notes; `of_a_theta`: its frequencies are those of one rope_theta."""
    known = context = int(config.get("max_position_embeddings") or 2048)
    notes = []
    window = config.get("sliding_window")
    kinds = set(config.get("layer_types") or ("sliding_attention",))
    if form == "deepseek_v3" and window and kinds == {"sliding_attention"} and 0 < window < context:
        notes.append(
            f"max_position_embeddings becomes {window:,}: up to there sliding and full attention are the same function"
        )
        context = int(window)
    # of the source as it is, not as `fixed_rotary` takes it
    types = {rope_parameters(source.config, kind)["rope_type"] for kind in config.get("layer_types") or (None,)}
    if source.rope_frequency_factors is not None:
        types = {"llama3"}
    if "dynamic" in types:
        notes.append(f"dynamic rope scaling is left out: it begins behind {known:,} tokens")
    if types & set(LONG_ROPE):
        types = types - set(LONG_ROPE) | {"longrope"}
        notes.append(
            f"longrope: texts of all lengths turn like those of {known:,} tokens, here and in `eval` of the source"
        )
    for rope_type in sorted(types - {"default", "dynamic"}):
        became = "plain frequencies of a rope_theta of its own" if of_a_theta else "frequencies that each layer keeps"
        notes.append(f"{rope_type} rope scaling becomes {became}")
    return context, notes
