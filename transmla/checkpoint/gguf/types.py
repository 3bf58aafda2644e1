"""Types of the weights of a GGUF file, by llama.cpp's names."""

# what is written here, by numpy
OWN_TYPES = ("f32", "f16", "bf16", "q8_0")
# what llama.cpp's quantiser makes of a float32 file
QUANTISER_TYPES = (
    "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_nl", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip
GGUF_TYPES = (*OWN_TYPES, *QUANTISER_TYPES)
