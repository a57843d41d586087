#!/usr/bin/env bash
# From a bare clone to a comparison of AdamW, GaLore and Fira on real English, with merged snapshots and plots.
# Seven to ten minutes on two cores after set-up. Usage: scripts/quickstart.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/quickstart}

scripts/setup.sh
cmake --preset release -DKILN_TESTS=OFF >/dev/null
cmake --build --preset release
kiln=build/release/kiln

"$kiln" tokenize --input data/corpus/train.txt --out data/shards --train-vocab 4096
"$kiln" tokenize --input data/corpus/valid.txt --out data/shards --tokenizer data/shards/tokenizer.model --prefix valid

# Two ranks, one thread each; a single rank where there is no mpirun. Open MPI asks for consent to run as root.
launch=()
if command -v mpirun >/dev/null; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  launch=(mpirun -n 2 --oversubscribe)
fi
rm -rf "$out"
"${launch[@]}" "$kiln" compare configs/quickstart.yaml --optimizers adamw,galore,fira --peak-lr 0.003,0.02,0.02 --out "$out"

"$kiln" generate "$out/fira/merged" --prompt "The old man looked at the sea and" --tokens 60
