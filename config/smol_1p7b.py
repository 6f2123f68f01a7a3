"""
SmolLM-1.7B as published: a trillion tokens, every head with its own key and value, a lower learning rate.

At step 300,000 Python-Edu replaces general Python, and some mathematics exercises are added: the better data
comes late, when the model can use it.
"""

from dataclasses import replace

from config.smol_135m import config as smol_135m

config = replace(
    smol_135m,
    n_layer=24, n_head=32, n_kv_head=32, d_model=2048, d_ff=8192, init_std=0.022097086912079608,
    out_dir="out/smol_1p7b",
    data=(
        ("fineweb-edu-dedup", 0.70),
        ("cosmopedia-v2", 0.15),
        ("open-web-math", 0.06),
        ("starcoderdata-python", 0.08),
        ("stackoverflow", 0.01),
        ("fineweb-edu-dedup", 0.70, 300_000),
        ("cosmopedia-v2", 0.15, 300_000),
        ("open-web-math", 0.055, 300_000),
        ("python-edu", 0.08, 300_000),
        ("stackoverflow", 0.01, 300_000),
        ("deepmind_mathematics", 0.005, 300_000),
    ),
    max_steps=500_000, batch=1024, micro_batch=4,  # 2,097,152 tokens per step, 1,049 billion in total
    lr=5e-4, warmup_steps=2000, decay_steps=100_000,
)
