"""The demo learns to answer: chats, and documents among them so that it does not forget."""

from dataclasses import replace

from config.demo import config as pretraining

config = replace(
    pretraining,
    init_from="out/demo/pretrain",
    data=(("builtin-chats", 0.79), ("builtin-world", 0.226), ("builtin-docs", 1.0), ("builtin-code", 0.17)),
    fractions=True,
    max_steps=0, epochs=1, optimizer="muon", lr=2e-3, warmup_ratio=0.05, schedule="cosine",
    eval_every=100, save_every=100, sample_every=100,
)
