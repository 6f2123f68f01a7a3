"""
The same system in miniature: 2 million parameters, three million tokens, minutes on a laptop without a GPU.

Its three sources stand for SmolLM's: textbooks and stories, Python, and prose from the documentation.
"""

from config import Config

config = Config(
    vocab_size=2048, n_layer=4, n_head=4, n_kv_head=2, d_model=192, d_ff=512, seq_len=256, init_std=0.06,
    out_dir="out/demo", device="cpu", dtype="float32",
    data=(("builtin-world", 0.75), ("builtin-code", 0.15), ("builtin-docs", 0.10)),
    val_fraction=0.02,
    max_steps=800, batch=16, micro_batch=16, optimizer="muon", lr=5e-3, warmup_ratio=0.02,
    eval_every=100, eval_batches=8, save_every=100, sample_every=100,
)
