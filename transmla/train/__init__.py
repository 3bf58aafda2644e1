"""What both kinds of training share: losses and Adam with relative steps."""

# Rows of logits at once: on a CPU what fits into the caches of a core (twice as fast as 512), on a GPU what keeps it
# busy.
ROWS_ON_CPU, LOGITS_ON_GPU = 128, 2**26
