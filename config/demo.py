"""
The same system in miniature: 2 million parameters, 4 million tokens, minutes on a laptop without a GPU.

Its sources mirror SmolLM's: textbooks and stories, questions and answers, Python, documentation. Each value
that differs from SmolLM's has its reason next to it. "Tuned" means that it was adjusted by hand until the
demo answered well. "why: wide" means that docs/why.md has a measured comparison, in the row `wide`; python -m
learn.why wide repeats it. Change one yourself, and compare: docs/records.md.
"""

from config import Config

config = Config(
    # The shape, tuned: enough for questions about a small world, and trained in minutes on a CPU.
    # SmolLM's 49,152 ids would need 9.4 million embedding parameters for blocks of 1.6 million. Digits are
    # tokens of their own, as in SmolLM (tokenizer.py). why: vocab_1024, vocab_8192, digits, untied
    vocab_size=3072,
    n_layer=4,  # why: wide, wide_longer
    n_head=4, n_kv_head=2,  # grouped-query attention: two query heads share one key/value head. why: mha, mqa
    d_model=192, d_ff=512,  # d_ff is 8/3 of d_model, as in SmolLM-135M
    seq_len=256,  # a page of a textbook, or several chats; longer rows would make each step slower
    # RoPE's slowest pair should turn noticeably within a row. Here it turns by 20 degrees in 256 positions;
    # with SmolLM's 10,000 it would turn by 2. SmolLM's own turns by 16 degrees in 2,048 positions. why: rope
    rope_theta=1000.0,
    init_std=0.06,  # a little below 1 / sqrt(192) = 0.072. why: init
    doc_mask=True,  # a row holds several short texts; none of them helps to predict the next. why: no_mask

    out_dir="out/demo", device="cpu", dtype="auto",  # bfloat16 takes 3/4 of the time where the CPU has it

    # Weights, tuned: questions and answers have the largest, because sums need many examples. The
    # documentation is short, and a larger weight would only repeat it.
    data=(("builtin-world", 0.40), ("builtin-transcripts", 0.42),
          ("builtin-code", 0.11), ("builtin-docs", 0.07)),
    tokenizer_bytes=2_000_000,  # enough to count the pairs of 3,072 ids: from 6 MB come equally short texts
    val_fraction=0.15,  # over 30 unseen texts of each kind, so that bits per byte has an error bar

    max_steps=880,  # tuned: five minutes on two cores
    # 4,096 tokens per step. From 2.5 million tokens, batches of 8, 16 and 32 rows reached 0.759, 0.720 and
    # 0.754 bits per byte in validation (one run each, rates of 5e-3, 7e-3, 1e-2; its sources are mixed by
    # weight, so other texts have other figures): too large a batch leaves too few steps.
    batch=16, micro_batch=16,
    # Muon gets further per step than AdamW (make_optimizers in train.py). why: adamw, adamw_low, adamw_lower
    optimizer="muon",
    lr=6e-3,  # tuned; small models train at higher rates: SmolLM-1.7B at 5e-4, the 135M at 3e-3
    warmup_ratio=0.02,  # 18 steps; SmolLM's 5,000 would be longer than the run. why: no_warmup
    # decay_steps: the default, two fifths of the run; SmolLM's sixth would be some 150 steps. Weight decay
    # and clipping are SmolLM's. why: no_decay, cosine, no_weight_decay, no_clip
    eval_every=200, save_every=200, sample_every=200,  # often, to watch it learn
    eval_batches=8,  # 128 rows
)
