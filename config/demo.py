"""
The same system in miniature: 2 million parameters, 4 million tokens, minutes on a laptop without a GPU.

Its sources stand for SmolLM's: textbooks and stories, questions and answers, Python, documentation.
"""

from config import Config

config = Config(
    vocab_size=3072, n_layer=4, n_head=4, n_kv_head=2, d_model=192, d_ff=512, seq_len=256, rope_theta=1000.0,
    init_std=0.06, doc_mask=True, out_dir="out/demo", device="cpu", dtype="float32",
    data=(("builtin-world", 0.40), ("builtin-transcripts", 0.42),
          ("builtin-code", 0.11), ("builtin-docs", 0.07)),
    tokenizer_bytes=6_000_000, val_fraction=0.15,
    max_steps=1900, batch=8, micro_batch=8, optimizer="muon", lr=5e-3, warmup_ratio=0.02,
    eval_every=200, eval_batches=16, save_every=200, sample_every=200,
)
