"""Sizes of grouped-query and latent attention: what is cached, and which sizes are possible.

Only arithmetic on the numbers in a config.json; nothing is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transmla.errors import GeometryError, UnsupportedError

# (kv_lora_rank, qk_rope_head_dim) that the GPU kernels of vLLM, SGLang and llama.cpp are built for, and the widths of
# the heads (qk_nope_head_dim, v_head_dim) that go with them, smallest first: those of vLLM's prefill (0.32.0,
# v1/attention/backends/mla/prefill/flash_attn.py) and of FlashInfer's decoding.
GPU_KERNELS = {(512, 64): ((128, 128),), (256, 64): ((64, 128), (128, 128))}

# Bits per cached value: bfloat16, and llama.cpp's q8_0 and q4_0 with their float16 scale per 32 values.
CACHE_BITS = {"bf16": 16.0, "8-bit": 8.5, "4-bit": 4.5}


# shares of the rotary values of a head that `--rope auto` tries as the width of the rotary key
ROPE_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)


@dataclass(frozen=True)
class GqaGeometry:
    """Sizes of the source's attention, in the words of its config.json.

    num_key_value_heads is num_attention_heads for multi-head attention (MHA), and 1 for multi-query attention (MQA).
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def kind(self) -> str:
        """ "GQA", "MHA" or "MQA"."""
        if self.num_key_value_heads == 1:
            return "MQA"
        return "MHA" if self.num_key_value_heads == self.num_attention_heads else "GQA"

    def cache_values(self, num_key_value_heads: int | None = None) -> int:
        """Values in the cache per token and layer, keys and values together.

        num_key_value_heads: count for this many key/value heads instead of the source's
        """
        return 2 * (num_key_value_heads or self.num_key_value_heads) * self.head_dim


@dataclass(frozen=True)
class MlaGeometry:
    """Sizes of the converted model's attention, in the words of a deepseek_v3 config.

    q_lora_rank:    of the queries' latent; None: they have none
    attention_bias: whether a deepseek_v3 folder has biases in its attention;  query_bias: whether queries have one
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    attention_bias: bool = False
    query_bias: bool = False

    def cache_values(self) -> int:
        """Values in the cache per token and layer: the latent and one rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def widest(self) -> int:
        """Features of the widest regression of the closed form: the input of the attention, or what o_proj reads."""
        return max(self.hidden_size, self.num_attention_heads * self.v_head_dim)

    @property
    def expanded_values(self) -> int:
        """Unrotated keys and values of all heads for one token."""
        return self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def attention_weights(self) -> int:
        """Number of weights in one attention block, as they are fitted."""
        biases = self.cache_values() + self.hidden_size if self.attention_bias else 0
        return self._matrices(self.q_lora_rank) + biases + (self._queries if self.query_bias else 0)

    @property
    def stock_q_lora_rank(self) -> int | None:
        """q_lora_rank of a deepseek_v3 folder. A bias of the queries is a column of q_b_proj there, which reads a
        constant beside the latent or, without a latent, beside the whole input."""
        return (self.q_lora_rank or self.hidden_size) + 1 if self.query_bias else self.q_lora_rank

    @property
    def stock_attention_weights(self) -> int:
        """Number of weights in one attention block of a deepseek_v3 folder, without norms."""
        rank = self.stock_q_lora_rank
        biases = (rank or 0) + self.cache_values() + self.hidden_size if self.attention_bias else 0
        return self._matrices(rank) + biases

    @property
    def _queries(self) -> int:
        return self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)

    def _matrices(self, q_lora_rank: int | None) -> int:
        rows = (q_lora_rank or self._queries) + self.cache_values() + self.num_attention_heads * self.v_head_dim
        through_latent = (q_lora_rank or 0) * self._queries
        return self.hidden_size * rows + self.kv_lora_rank * self.expanded_values + through_latent


def gqa_geometry(config: Mapping[str, Any], where: str) -> GqaGeometry:
    """The geometry of the source, from a parsed config.json.

    where: path of that file, for error messages

    Raises `UnsupportedError` if sizes are missing or impossible.
    """
    try:
        num_heads = int(config["num_attention_heads"])
        geometry = GqaGeometry(
            num_hidden_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            num_attention_heads=num_heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
        )
        if not int(config["vocab_size"]) > 0:
            raise ValueError("vocab_size must be positive")
        for key in ("intermediate_size", "rms_norm_eps", "layer_norm_eps"):
            if config.get(key) is not None and not float(config[key]) > 0:
                raise ValueError(f"{key} must be positive")
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(
            "the config lacks sizes of the attention, or they are invalid",
            where=where,
            why=f"{type(error).__name__}: {error}",
            remedy="check that config.json is complete and belongs to the checkpoint",
        ) from error
    if min(vars(geometry).values()) < 1 or num_heads % geometry.num_key_value_heads or geometry.head_dim % 2:
        raise UnsupportedError(
            "the config describes an impossible attention geometry",
            where=where,
            why=f"{num_heads} query heads, {geometry.num_key_value_heads} key/value heads of {geometry.head_dim}",
            remedy="correct config.json: query heads are a multiple of key/value heads, and head_dim is even",
        )
    return geometry


def default_sizes(source: GqaGeometry) -> tuple[int, int]:
    """The default kv_lora_rank and qk_rope_head_dim: the largest convenient sizes that halve the cache.

    This is a pair with GPU kernels (512+64 or 256+64) if one fits into half of the source's cache and its rotary key is
    not wider than a head. Otherwise the rotary key is half as wide as a head (at most 64), and the latent is the
    largest multiple of 32 (or of 4, if there is no room for 32) that fits into half of the cache beside it.
    """
    half = source.cache_values() // 2
    for rank, rope in GPU_KERNELS:
        if rank + rope <= half and rope <= source.head_dim and rank <= source.hidden_size:
            return rank, rope
    rope = min(64, max(2, source.head_dim // 4 * 2))
    room = min(half - rope, source.hidden_size)
    step = next((step for step in (32, 4) if room >= step), 1)
    return max(1, room // step * step), rope


def latent_candidates(source: GqaGeometry, rope: int | None) -> tuple[int, ...]:
    """The values of kv_lora_rank that `--latent auto` chooses from: about twenty, ascending.

    rope: qk_rope_head_dim; None takes the default. Latent and rotary key together are smaller than the source's cache.
    """
    rope = default_sizes(source)[1] if rope is None else rope
    largest = min(source.cache_values() - rope - 1, source.hidden_size)
    step = max(1, source.cache_values() // 24)
    if step >= 16:
        step = step // 16 * 16
    return tuple(range(step, largest + 1, step)) or (max(1, largest),)


def usual_rope(source: GqaGeometry, total: int) -> int:
    """qk_rope_head_dim if latent and rotary key have `total` values together: that of GPU kernels, else the default."""
    for rank, rope in GPU_KERNELS:
        if rank + rope == total and rope <= source.head_dim:
            return rope
    return default_sizes(source)[1]


def rope_candidates(source: GqaGeometry, total: int, turning: int) -> tuple[int, ...]:
    """The values of qk_rope_head_dim that `--rope auto` chooses from, the usual one first.

    total:   values of latent and rotary key together;  turning: values of a head that rotary embeddings turn

    Raises `GeometryError` if no division is possible.
    """
    max_rank = min(source.cache_values(), source.hidden_size)
    shares = (2 * max(1, round(share * turning / 2)) for share in ROPE_SHARES)
    widths = dict.fromkeys((usual_rope(source, total), *shares))
    possible = tuple(rope for rope in widths if rope <= turning and 1 <= total - rope <= max_rank)
    if not possible:
        nearest = min(max(total, 3), max_rank + turning)
        raise _impossible(
            f"{total} cached values cannot be divided",
            f"a rotary key has 2 to {turning} values, and a latent 1 to {max_rank}",
            f"--total {nearest}",
            "--total",
        )
    return possible


def mla_geometry(
    source: GqaGeometry,
    latent: int | None,
    rope: int | None,
    q_latent: int | None = None,
) -> MlaGeometry:
    """The geometry of the converted model.

    latent:   kv_lora_rank, 1 .. min(2 * num_key_value_heads * head_dim, hidden_size); None takes the default
    rope:     qk_rope_head_dim, even, 2 .. head_dim; None takes the default
    q_latent: q_lora_rank, 1 .. hidden_size; None: queries without a latent

    Raises `GeometryError` for an impossible size; its remedy names the nearest possible one.
    """
    if latent is None or rope is None:
        latent, rope = _complete(source, latent, rope)
    max_rank = min(source.cache_values(), source.hidden_size)
    if not 1 <= latent <= max_rank:
        raise _impossible(
            f"kv_lora_rank {latent} is impossible",
            f"keys and values of one token span at most min(2 * {source.num_key_value_heads} * {source.head_dim}, "
            f"hidden_size {source.hidden_size}) = {max_rank} dimensions",
            f"--latent {min(max(latent, 1), max_rank)}",
        )
    if rope % 2 or not 2 <= rope <= source.head_dim:
        nearest = min(max(2, rope - rope % 2), source.head_dim)
        raise _impossible(
            f"qk_rope_head_dim {rope} is impossible",
            f"rotary dimensions come in pairs, and the source rotates {source.head_dim // 2} pairs per head",
            f"--rope {nearest}",
        )
    if q_latent is not None and not 1 <= q_latent <= source.hidden_size:
        raise _impossible(
            f"q_lora_rank {q_latent} is impossible",
            f"queries are computed from hidden_size = {source.hidden_size} values",
            f"--q-latent {min(max(q_latent, 1), source.hidden_size)}",
            "--q-latent",
        )
    return MlaGeometry(
        num_hidden_layers=source.num_hidden_layers,
        hidden_size=source.hidden_size,
        num_attention_heads=source.num_attention_heads,
        kv_lora_rank=latent,
        qk_rope_head_dim=rope,
        qk_nope_head_dim=source.head_dim,
        v_head_dim=source.head_dim,
        q_lora_rank=q_latent,
    )


def _complete(source: GqaGeometry, latent: int | None, rope: int | None) -> tuple[int, int]:
    """Latent and rotary size, with defaults for those that are None."""
    default_latent, default_rope = default_sizes(source)
    if rope is None:
        return (default_latent if latent is None else latent), default_rope
    # the user chose the rotary size, so the latent grows or shrinks to keep the size of the cache
    room = min(default_latent + default_rope - rope, source.cache_values(), source.hidden_size)
    return max(1, room), rope


def _impossible(what: str, why: str, nearest: str, where: str = "--latent / --rope") -> GeometryError:
    return GeometryError(what, where=where, why=why, remedy=f"use the nearest possible size: {nearest}")
