#!/usr/bin/env bash
# The whole course on the built-in corpus, from nothing to a conversation: ten minutes on two CPU cores,
# without a network. Each command resumes where it was interrupted; run this again at any time.
set -euo pipefail
cd "$(dirname "$0")"

step() { printf '\n== %s\n   $ %s\n' "$1" "${*:2}"; "${@:2}"; }

step "Learn 3,072 tokens from the built-in texts: frequent pairs of bytes become one."   python tokenizer.py config/demo.py
step "Write the texts as token ids, in rows of 256."                                     python data.py config/demo.py
step "Pretrain: predict every next token. It learns English, facts and sums."            python train.py config/demo.py
step "What does a model know that only continues text?"                                  python -m evals out/demo/pretrain
step "Supervised fine-tuning: learn what to say, and when to stop."                      python sft.py config/demo_sft.py
step "The same questions again."                                                         python -m evals out/demo/sft
step "Preferences: right, polite, complete answers before wrong, rude, rambling ones."   python dpo.py config/demo_dpo.py
step "The same questions a last time."                                                   python -m evals out/demo/dpo
step "Ask it." python sample.py out/demo/dpo --chat "hello" "1+1=" "What is the capital of Italy?" "47+38=" "Who are you?"
echo
echo "Now talk to it:  python sample.py out/demo/dpo --chat"
