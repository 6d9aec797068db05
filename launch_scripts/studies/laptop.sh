#!/usr/bin/env bash
# The study of laptop.yaml, where megamoe is installed: builds its texts from Debian's documentation packages (apt-get
# and dpkg-deb are needed, nothing is installed; a minute), tokenizes them, trains 13 runs, evaluates them, and writes
# runs/laptop/index.html: 70 minutes on two quiet cores, 3 GB of disk. Run again, it goes on where it was. Options go
# to `megamoe study`.
#
#   bash launch_scripts/studies/laptop.sh [--plan --cluster cpu | --report-only | ...]
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
cd "$root"
find_environment

data=runs/study_corpus
[[ -f $data/essays.jsonl ]] || "$python" tools/make_study_corpus.py --output "$data"
"$python" tools/train_tokenizer.py "$data/train.jsonl" --output "$data/tokenizer" --vocab-size 2048 --sample-megabytes 12
"$python" tools/preprocess_data.py "$data/train.jsonl" --output "$data/train" \
    --tokenizer sentencepiece --tokenizer-path "$data/tokenizer.model"
exec "$python" -m megamoe study launch_scripts/studies/laptop.yaml "$@"
