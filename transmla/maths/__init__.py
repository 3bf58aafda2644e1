"""Conversion mathematics: tensors in, tensors out, float64. Imports torch and nothing else.

Legend used by every file of this package

    D  hidden_size                 T, S  query and key positions
    H  num_attention_heads         r  kv_lora_rank
    G  num_key_value_heads         e  qk_rope_head_dim, M = e / 2 rotary pairs of the target
    R  H / G                       n  qk_nope_head_dim
    d  head_dim, P = d / 2 pairs   v  v_head_dim
                                   q  q_lora_rank, where queries have one

Rotary pairs are stored half-split: pair p of a head is (x[p], x[p + P]), the complex number
x[p] + i x[p + P], and turning by the angle f_p * t multiplies it by exp(i f_p t).
"""

# The one epsilon of folded norms: transformers and MLX fix it on the latent norm, the others read it from the config.
EPS = 1e-6
