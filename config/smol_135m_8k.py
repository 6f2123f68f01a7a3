"""
SmolLM-135M for longer texts: a finished model of 2,048 positions goes on in rows of 8,192.

Behind position 2,048 the slow pairs of RoPE would reach angles that they never had in training. A larger
rope_theta slows them down, and a short continuation gets the model used to it. SmolLM has no such stage;
8,192 positions and rope_theta 100,000 are SmolLM2's, the schedule is this project's. Its tokens are made anew
below its own out_dir. Released weights as a start: --init_from=HuggingFaceTB/SmolLM-135M
"""

from dataclasses import replace

from config.smol_135m import config as smol_135m

config = replace(
    smol_135m,
    init_from=f"{smol_135m.out_dir}/pretrain", out_dir="out/smol_135m_8k",
    seq_len=8192, rope_theta=100_000.0,
    max_steps=2000, batch=128, micro_batch=2,  # as many tokens a step as before: 2.1 billion in all
    lr=3e-4, schedule="cosine", warmup_steps=100, decay_steps=None,
    eval_every=200, save_every=200, sample_every=200,
)
