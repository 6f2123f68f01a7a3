"""
SmolLM-135M for longer texts: a finished model of 2,048 positions continues in rows of 8,192.

After position 2,048 the slow pairs of RoPE would reach angles that they never had in training. A larger
rope_theta slows them down, and a short continuation accustoms the model to it. SmolLM has no such stage:
8,192 positions and rope_theta 100,000 are SmolLM2's, the schedule is this project's. Longer rows need their
own token shards, so this preset has its own out_dir. To start from the released weights:
--init_from=HuggingFaceTB/SmolLM-135M
"""

from dataclasses import replace

from config.smol_135m import config as smol_135m

config = replace(
    smol_135m,
    init_from=f"{smol_135m.out_dir}/pretrain", out_dir="out/smol_135m_8k",
    seq_len=8192, rope_theta=100_000.0,
    max_steps=2000, batch=128, micro_batch=2,  # as many tokens per step as before, 2.1 billion in total
    lr=3e-4, schedule="cosine", warmup_steps=100, decay_steps=None,
    eval_every=200, save_every=200, sample_every=200,
)
