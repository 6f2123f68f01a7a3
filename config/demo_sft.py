"""
The demo learns to answer: chats, and documents among them so that it does not forget what it has read.

The numbers in `data` are fractions of each source, not weights, so they need not add up to 1.
"""

from dataclasses import replace

from config.demo import config as pretraining

config = replace(
    pretraining,
    init_from="out/demo/pretrain",
    data=(
        ("builtin-chats", 0.79),  # tuned, like the other three
        ("builtin-world", 0.226),  # documents are repeated: without them, their bits per byte get worse
        ("builtin-docs", 1.0),  # all of it, because there is little documentation
        ("builtin-code", 0.17),  # a sixth, because there is much code
    ),
    fractions=True,  # of each source; only answers are targets. why: every_token
    max_steps=0, epochs=1,  # every row once
    optimizer="muon",  # as in pretraining
    lr=3e-3,  # tuned: half of pretraining's, so that the model learns without forgetting much
    warmup_ratio=0.05, schedule="cosine",  # the schedule of SmolLM-Instruct with half of its warm-up
    eval_every=100, save_every=100, sample_every=100,  # the run is shorter, so more often
)
