"""What both kinds of training share: losses and Adam with relative steps."""

# Rows of logits that are multiplied at once on a CPU, and logits whose softmax each of its cores takes at once: those
# stay in its caches. On a GPU, logits that keep it busy.
ROWS_ON_CPU, LOGITS_OF_A_CORE, LOGITS_ON_GPU = 128, 2**18, 2**26


def bytes_of_logits(kind: str, vocabulary: int, compute: int, cores: int) -> int:
    """Bytes of the logits of source and model that are compared together, and of what is made of them in float32.

    kind: of the device;  compute: bytes of a value in products;  cores: of a CPU that compute
    """
    if kind == "cpu":
        at_once = min(ROWS_ON_CPU * vocabulary, cores * max(vocabulary, LOGITS_OF_A_CORE))
        return 2 * compute * ROWS_ON_CPU * vocabulary + 24 * at_once
    return 24 * max(16 * vocabulary, LOGITS_ON_GPU)
