"""
One small model, a million parameters, for the four data sets of experiment.py: one pass over the raw crawl.

The learning rate stays constant, so that each checkpoint is what a run of its length would have ended with.
"""

from config import Config

config = Config(
    vocab_size=2048, n_layer=4, n_head=4, n_kv_head=2, d_model=128, d_ff=344, seq_len=256, rope_theta=1000.0,
    init_std=0.06, doc_mask=True, out_dir="out/experiment", device="cpu", dtype="float32",
    tokenizer_bytes=3_000_000, val_fraction=0.0,
    epochs=1.0, batch=8, micro_batch=8, optimizer="muon", lr=5e-3, warmup_steps=20, decay_steps=0,
    eval_every=0, save_every=100, keep_checkpoints=0, sample_every=0,
)
