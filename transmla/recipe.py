"""Recipes: what to convert and how, as TOML. Unknown keys are errors that name the nearest known key."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from transmla.errors import RecipeError
from transmla.settings import bad_value, installed, read_toml, replaced

REFINE_LEVELS = ("off", "fast", "full")
# calibration text and tokens of each level, where the recipe does not say: what takes many steps needs much text that
# is not repeated, and a model can write most of it
MIX = "wikitext:2+synthetic+code"
# what models that answer are healed on
MIX_OF_CHATS = f"{MIX}+maths"
CALIBRATION = {"off": MIX, "fast": MIX, "full": "wikitext:4+code:2+synthetic:5+continued:3"}
TOKENS = {"off": 131072, "fast": 180224, "full": 573440}
# at least so many for each feature of the widest regression, the larger of hidden size and heads times v_head_dim
TOKENS_PER_FEATURE = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")
# calibration or training windows that start with the begin token, where the tokenizer puts one first
BEGIN = ("half", "all", "none")
FORMATS = ("auto", "deepseek_v3", "transmla")
TRAINED = ("attention", "all")
PRECISIONS = ("auto", "bfloat16", "float32")
# bits per value of the packed latent caches that take them all alike
LATENT_BITS = (2, 3, 4, 8)
# of a recipe: whether someone has run it and the results are in eval/results, or it is a plan
STATES = ("measured", "planned")

# the words that a key takes, where it does not take every string
_WORDS = {
    "theta": ("auto",), "latent": ("auto",), "rope": ("auto",), "refine": REFINE_LEVELS, "dtype": DTYPES,
    "format": FORMATS, "begin": BEGIN, "train": TRAINED, "precision": PRECISIONS, "state": STATES,
}  # fmt: skip
_POSITIVE = (
    "theta", "tokens", "window", "context", "budget", "distinct", "batch", "micro", "rate", "lora", "temperature",
    "top_k", "heldout", "evaluations", "patience", "total", "on_policy_tokens", "resample", "rate_rest", "long_window",
)  # fmt: skip
# tokens: less says nothing of attention
_LEAST = {"window": 8, "long_window": 8}
_NOT_NEGATIVE = ("sampled", "hidden", "latent_recent")
# watch may name none
_TEXTS = ("calibration", "evaluation", "data")
_SHARES = ("warmup", "cross_entropy", "on_policy", "layerwise", "long_share")


Settings = TypeVar("Settings", "Recipe", "Healing", "Shape")


@dataclass(frozen=True)
class Shape:
    """The table [model] of a recipe: sizes of the source in the words of its config.json, by which it can be listed and
    planned before the source is there."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    # of mixtures of experts: how many a layer has (the name depends on the family), and takes for a token
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """As in config.json."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Healing:
    """The table [heal] of a recipe: distillation from the source after the conversion. Windows are rows of tokens."""

    data: str | None = None  # mix of texts, A:3+B; None: MIX, for chat models MIX_OF_CHATS
    tokens: int = 1_000_000  # trained on in all
    distinct: int | None = None  # different ones among them, then they repeat; None: all
    window: int = 1024  # tokens per window
    begin: str = "none"  # windows of plain texts that start with the begin token: half, all, none; rows always do
    batch: int | None = None  # windows per step; None: a 400th of all windows, at least 1, at most 64
    micro: int = 1  # windows at once on a device
    rate: float | None = None  # largest step, as a share of the row that it changes; None: by the size of the model
    warmup: float = 0.05  # share of the steps
    train: str = "attention"  # or "all"
    lora: int | None = None  # rank of adapters on the attention, merged at the end; None: the weights themselves
    temperature: float = 1.0  # of the divergence
    cross_entropy: float = 0.0  # share of the loss that goes to the text itself
    hidden: float = 0.0  # weight of the squared error of all residual streams
    top_k: int | None = None  # predictions of the source that are compared, the others as one; None: all
    cached: bool = False  # the source's predictions (top_k, 64 if not given) are kept on the disk
    heldout: int = 8  # windows of each text that are not trained on, but measured on
    watch: str | None = None  # texts, A+B, that are measured on, too
    evaluations: int = 10
    patience: int | None = None  # evaluations without gain before it stops; None: all steps
    precision: str = "auto"  # of the products: bfloat16 where the device has it; weights are trained in float32
    teacher: str | None = None  # a larger model with the same tokenizer that is distilled; None: the source
    on_policy: float = 0.0  # share of the windows that are of what the model itself writes
    on_policy_tokens: int = 128  # most tokens that it writes behind a prompt
    resample: int = 25  # steps between two times that it writes
    completion_only: bool = False  # of rows with turns, only answers are learned
    rate_rest: float | None = None  # with train "all": rate outside the attention; None: 0.3 of the rate
    layerwise: float = 0.0  # share of the steps, the first, in which every layer learns for itself
    long_share: float = 0.0  # share of the tokens, the last, that come in windows of long_window
    long_window: int = 4096
    latent_bits: int | None = None  # latents are rounded as in the cache latent-intN; None: they are exact
    latent_recent: int = 64  # with latent_bits: newest tokens that stay exact
    checkpointing: bool = False  # layers are computed twice and need less memory
    compile: bool = False  # layers and loss through torch.compile
    seed: int = 0

    @property
    def mix(self) -> str:
        """Text to train on."""
        return self.data or MIX

    def with_overrides(self, **given: Any) -> "Healing":
        """A copy with the values that are not None, checked like those of a file."""
        return _checked(self, {key: value for key, value in given.items() if value is not None}, "the options")


@dataclass(frozen=True)
class Recipe:
    """One conversion. None and "auto" mean: chosen from the source model."""

    source: str | None = None  # folder, .gguf file, embedded model or hub id
    revision: str | None = None  # commit, branch or tag of a hub id
    latent: int | str | None = None  # kv_lora_rank; "auto": the smallest within the budget
    budget: float | None = None  # perplexity increase that "auto" may cost, 0.02 is 2 %
    rope: int | str | None = None  # qk_rope_head_dim; "auto": the best division of the total by measured error
    total: int | None = None  # kv_lora_rank + qk_rope_head_dim, where one of them or none is given
    q_latent: int | None = None  # q_lora_rank; None: queries without a latent
    refine: str = "fast"  # how much gradient refinement: off, fast, full
    batch: int | None = None  # windows per step of it; None: the level's
    latent_bits: int | None = None  # it reads latents as the cache latent-intN holds them; None: they are exact
    latent_recent: int = 64  # with latent_bits: newest tokens that stay exact
    theta: float | str = "auto"  # rope_theta of the target
    calibration: str | None = None  # names of embedded texts, or files, shares of each; None: CALIBRATION
    evaluation: str = "wikitext-valid"  # text that `transmla eval` measures on
    tokens: int | None = None  # calibration tokens in all; None: TOKENS, more for wide models
    sampled: int = 0  # tokens more, written by the source itself as continuations of that text
    window: int = 1024  # tokens per calibration window
    begin: str = "half"  # windows that start with the begin token, where the tokenizer puts one first: half, all, none
    context: int | None = None  # positions that half of the windows are spread over; None: the source's, at most 8,192
    dtype: str = "auto"  # of the written weights
    format: str = "auto"  # of the folder: deepseek_v3, or transmla where that cannot express the model
    lossy: bool = False  # a deepseek_v3 folder without biases, if the source has some: not exact, for all engines
    seed: int = 0
    state: str = "planned"  # measured, or planned
    model: Shape | None = None  # sizes of the source, for lists
    heal: Healing = field(default_factory=Healing)

    def with_overrides(self, **given: Any) -> "Recipe":
        """A copy with the values that are not None, checked like those of a file."""
        return _checked(self, {key: value for key, value in given.items() if value is not None}, "the options")

    @property
    def mix(self) -> str:
        """Calibration text."""
        return self.calibration or CALIBRATION[self.refine]

    @property
    def num_tokens(self) -> int:
        """Calibration tokens in all."""
        return self.tokens or TOKENS[self.refine]

    def for_width(self, width: int) -> "Recipe":
        """With enough calibration tokens for regressions over so many features, unless it says how many."""
        return replace(self, tokens=self.tokens or max(self.num_tokens, TOKENS_PER_FEATURE * width))

    @property
    def resolved(self) -> dict[str, Any]:
        """All values of the conversion, for the provenance file."""
        values = asdict(self) | {"calibration": self.mix, "tokens": self.num_tokens}
        for key in ("heal", "state", "model"):
            del values[key]
        return values


_NO_SHAPE = Shape("", 0, 0, 0, 0, 0, 0, 0, 0)


def load_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file; `RecipeError` if it cannot be read or says something unknown."""
    values = read_toml(path, "recipe", list_recipes())
    healing, model = values.pop("heal", {}), values.pop("model", None)
    for key, table in (("heal", healing), ("model", model)):
        if not isinstance(table, dict | None):
            raise bad_value(key, table, kind="recipe", where=str(path), why=f"{key} is a table: [{key}]")
    recipe = replace(_checked(Recipe(), values, str(path)), heal=_checked(Healing(), healing, f"{path}, [heal]"))
    return recipe if model is None else replace(recipe, model=_checked(_NO_SHAPE, model, f"{path}, [model]"))


def find_recipe(name: str) -> Path | None:
    """The file of an installed recipe, by its name without .toml."""
    return _installed().get(name)


def check_rounded(settings: Recipe | Healing, window: int) -> None:
    """`RecipeError` if latents are to be rounded and in windows of so many tokens none would be."""
    recent = settings.latent_recent
    if settings.latent_bits is not None and window <= 2 * recent:
        raise RecipeError(
            "no latent would be rounded",
            where="--latent-recent",
            why=f"the newest {recent} tokens stay exact until as many more have come, and windows have {window} tokens",
            remedy=f"give at most --latent-recent {(window - 1) // 2}, or longer windows (--window)",
        )


def list_recipes() -> list[str]:
    """Names of the installed recipes."""
    return list(_installed())


def _installed() -> dict[str, Path]:
    return installed("transmla.recipes", checkout="recipes")


def _checked(settings: Settings, values: dict[str, Any], where: str) -> Settings:
    tables = ("heal", "model") if isinstance(settings, Recipe) else ()
    return replaced(settings, values, kind="recipe", where=where, words=_WORDS, objection=_objection, tables=tables)


def _objection(key: str, value: Any) -> str | None:
    # latent and rope are judged by geometry.py, which can name the nearest possible size
    if key in _POSITIVE and not isinstance(value, str) and not 0 < value < float("inf"):
        return f"{key} must be positive"
    if key in _LEAST and value < _LEAST[key]:
        return f"{key} must be at least {_LEAST[key]}"
    if key in _NOT_NEGATIVE and not 0 <= value < float("inf"):
        return f"{key} cannot be negative"
    if key == "latent_bits" and value not in LATENT_BITS:
        return f"there are caches of {', '.join(map(str, LATENT_BITS))} bits"
    if key in _TEXTS and not value.strip():
        return f"{key} names a text, for example wikitext"
    if key in _SHARES and not 0 <= value <= 1:
        return f"{key} is a share, from 0 to 1"
    return None
