"""One prompt in several caches: what each stores of a token, and what the model writes with it.

    python examples/quantised_cache.py [SOURCE] [--out FOLDER] [--prompt TEXT] [--tokens N]

Converts SOURCE, prepares the result for coded caches, and generates with the cache as computed, as packed integers and
transform coded. With a folder that is there already the same takes transformers alone: `trust_remote_code=True`, then
`model.latent_cache(kind)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

import transmla

KINDS = ("exact", "int8", "int4", "coded4", "coded3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="stories260k")
    parser.add_argument("--out", type=Path, default=Path("coded"))
    parser.add_argument("--prompt", default="Once upon a time, there was a cat. ")
    parser.add_argument("--tokens", type=int, help="of calibration text")
    parser.add_argument("--new-tokens", type=int, default=200)
    arguments = parser.parse_args()

    converted = arguments.out.with_name(f"{arguments.out.name}-mla")
    if not converted.exists():
        print(transmla.convert(arguments.source, converted, tokens=arguments.tokens))
    if not arguments.out.exists():
        print(transmla.quantise(converted, arguments.out))
    model = transmla.load(arguments.out, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    for kind in KINDS:
        # the newest tokens stay as they are; few of them here, so that something is packed
        cache = model.latent_cache(kind, recent=16)
        ids = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=arguments.new_tokens, do_sample=False, pad_token_id=0
        )
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        print(f"{kind:<8} {cache.bytes_per_token:7.1f} bytes per token  ...{text[-60:]!r}")


if __name__ == "__main__":
    main()
