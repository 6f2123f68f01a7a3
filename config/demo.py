"""
The same system in miniature: 2 million parameters, three million tokens, minutes on a laptop without a GPU.

Its sources stand for SmolLM's: textbooks and stories, questions and answers, Python, documentation.
"""

from config import Config

config = Config(
    vocab_size=2048, n_layer=4, n_head=3, n_kv_head=1, d_model=192, d_ff=512, seq_len=256, init_std=0.06,
    out_dir="out/demo", device="cpu", dtype="float32",
    data=(("builtin-world", 0.40), ("builtin-transcripts", 0.30),
          ("builtin-code", 0.18), ("builtin-docs", 0.12)),
    val_fraction=0.04,
    doc_mask=True, max_steps=1440, batch=8, micro_batch=8, optimizer="muon", lr=5e-3, warmup_ratio=0.02,
    eval_every=200, eval_batches=16, save_every=200, sample_every=200,
)
