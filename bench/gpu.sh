#!/usr/bin/env bash
# What does a GPU reach? Tables in under ten minutes, ready for docs/performance.md.
#
#     bash bench/gpu.sh               writes out/gpu/table.md; to compare decoding, pip install transformers first
#     bash bench/gpu.sh --tiny        the same rows with tiny models on a CPU: does this script still work?
#
# Each row is a process of its own: 16 steps of train.py or sft.py from random weights on built-in texts, of which
# the last 8 count. A row that fails or takes too long says so in the table, and the next one begins.
set -u
cd "$(dirname "$0")/.."
out=out/gpu steps=16 tiny=() sample=(--dtype=bfloat16 --T=512 --new=128 --rounds=3)
if [ "${1:-}" = --tiny ]; then
    out=out/gpu_tiny steps=4 sample=(--config=config/demo.py --T=16 --new=4 --rounds=1)
    tiny=(--device=cpu --n_layer=2 --n_head=3 --n_kv_head=1 --d_model=48 --d_ff=96 --vocab_size=3072 --seq_len=128)
fi
mkdir -p $out && rm -f $out/table.md
say() { echo "$*" | tee -a $out/table.md; }
limit() { if command -v timeout > /dev/null; then timeout "$@"; else "${@:2}"; fi; }  # a Mac has no timeout

# run COMMAND...: what it prints goes to $out/said; if it fails, $why is one line that says why
run() {
    local code left=$((590 - SECONDS))
    why="not run: the ten minutes are over"
    [ $left -gt 60 ] || return
    limit $((left < 150 ? left : 150)) "$@" > $out/said 2>&1
    code=$?
    why="stopped after $((left < 150 ? left : 150)) s"
    if [ $code != 124 ]; then  # all of an error, or the last line of a traceback
        why=$(tr '\r|' '\n/' < $out/said | grep . | sed -n -e '/^error:/,$p' -e '$p' | uniq | tr -s '\n ' ' ')
    fi
    return $code
}

# row NAME ROWS CHUNK SCRIPT PRESET FLAGS...: one training, one line of the table
row() {
    rm -rf $out/pretrain $out/sft
    if ! run python -m bench.row "${@:3}" --tokenizer=$out/tokenizer --out_dir=$out --max_steps=$steps --batch=$2 \
            --micro_batch=$2 --warmup_steps=1 --decay_steps=0 --eval_every=0 --save_every=0 --sample_every=0 ${tiny[@]+"${tiny[@]}"}
    then say "| $1 | ${why:0:200} | | |"
    elif grep -q 'without torch.compile' $out/said
    then say "| $1 | $(grep -o 'without torch.compile.*' $out/said | cut -c 1-150) | | |"
    else say "| $1 | $(sed -n 's/^cells: //p' $out/said) |"
    fi
}

run python -c "import torch; from plumbing.processes import *; print(name_of(pick_device('auto')), torch.__version__)"
say "$(tail -n 1 $out/said), commit $(git rev-parse --short HEAD), $(date +%F)"
[ ${#tiny[@]} = 0 ] || say "Tiny models on a CPU: these figures say only that the script works."
run python tokenizer.py config/demo.py --out_dir=$out || say "There is no tokenizer: $why"

say $'\n| one training, bfloat16, rows of 2,048 ids | positions/s | MFU | peak memory, GB |\n|---|---|---|---|'
row "135M, 8 rows, eager" 8 24 train config/smol_135m.py --data=builtin --compile=False
row "135M, 8 rows, compiled" 8 24 train config/smol_135m.py --data=builtin
row "135M, 16 rows, compiled" 16 24 train config/smol_135m.py --data=builtin
row "135M, 32 rows, compiled" 32 24 train config/smol_135m.py --data=builtin
row "1.7B, 4 rows, compiled" 4 24 train config/smol_1p7b.py --data=builtin
row "evening, 16 rows of 1,024, compiled" 16 24 train config/evening.py --data=builtin
row "135M, fine-tuning, 8 rows, compiled" 8 24 sft config/smol_135m_sft.py --data=builtin-chats
row "the same with document masks" 8 24 sft config/smol_135m_sft.py --data=builtin-chats --doc_mask=True
row "135M, 8 rows, compiled, 2^26 logits at a time" 8 26 train config/smol_135m.py --data=builtin
row "135M, 8 rows, compiled, 2^28 logits at a time" 8 28 train config/smol_135m.py --data=builtin

say $'\n| writing, 135M, tokens/s: median (range) | ours | transformers | ratio |\n|---|---|---|---|'
if run python -m bench sample "${sample[@]}"
then say "$(awk -F '  +' '/^decode/ {sub(/, tokens.*/, ""); row = $0} /^    ours  / {ours = $3} /^    transformers/ {theirs = $3}
                   /transformers: / && row {sub(/.*: /, ""); print "| " row " | " ours " | " theirs " | " $0 " |"; row = ""}' $out/said)"
else say "| decode | $why | | |"
fi

say $'\n| the other rows | positions/s | MFU | peak memory, GB |\n|---|---|---|---|'
row "135M, 16 rows, eager" 16 24 train config/smol_135m.py --data=builtin --compile=False
row "135M, 32 rows, eager" 32 24 train config/smol_135m.py --data=builtin --compile=False
say $'\n'"$SECONDS seconds"
