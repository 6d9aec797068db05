#!/usr/bin/env bash
# From nothing but python3 to a trained mixture of experts: installs, trains a tokenizer on the text in
# quickstart_corpus/, tokenizes it, trains on 8 local ranks (tensor 2 x pipeline 2 x expert 2, ZeRO-1), validates,
# samples a sentence, and says where everything lies. Run again, it does what is not done yet.
#
#   bash launch_scripts/quickstart.sh [section.key=value ...]      settings for `megamoe train`
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

data=runs/quickstart_data
run=runs/quickstart
corpus=(launch_scripts/quickstart_corpus/*.txt)

stage() { echo; echo "== $* =="; }

stage "1/4 Environment"
use_environment
echo "Using $("$python" --version) in $environment"

stage "2/4 Tokenizer: sentencepiece, 4096 pieces"
mkdir -p "$data"
"$python" tools/train_tokenizer.py "${corpus[@]}" --output "$data/tokenizer" --vocab-size 4096 --model-type bpe

stage "3/4 Dataset: text to token ids"
"$python" tools/preprocess_data.py "${corpus[@]}" --output "$data/text" \
    --tokenizer sentencepiece --tokenizer-path "$data/tokenizer.model" --rules paper --workers 2

stage "4/4 Training: 8 ranks, tensor 2 x pipeline 2 x expert 2, ZeRO-1"
# MEGAMOE_QUICKSTART_ARGS: more settings, separated by spaces (the test of this script shortens the run with it)
read -r -a more <<<"${MEGAMOE_QUICKSTART_ARGS:-}" || true
"$python" -m megamoe train launch_scripts/quickstart.yaml --local-ranks 8 ${more[@]+"${more[@]}"} "$@"

cat <<END

== Done. Where everything lies, seen from $root ==
  text         ${corpus[*]}
  tokenizer    $data/tokenizer.model
  dataset      $data/text.bin, $data/text.idx
  settings     $run/config.yaml
  metrics      $run/metrics.jsonl
  log          $run/log.txt
  checkpoint   $run/checkpoints/

Next:
  source $environment/bin/activate
  megamoe report $run                         its curves, experts and events on one page
  megamoe presets                                        what else there is, with sizes
  megamoe train launch_scripts/quickstart.yaml --local-ranks 4 run.dir=runs/mine \\
      parallel.pipeline_parallel_size=1 moe.num_experts=16
  docs/data.md                                           your own text
END
