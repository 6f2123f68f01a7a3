"""
An evening on one consumer GPU: 67 million parameters, half of SmolLM-135M, that have read 1.35 billion tokens
of the web, of textbooks and of mathematics. What it costs, computed: python -m bench plan config/evening.py

    python data.py  config/evening.py         streams the texts from the hub and tokenizes them
    python train.py config/evening.py

Does it run? Five steps on built-in texts, in a folder of their own:

    python train.py config/evening.py --out_dir=out/try --max_steps=5 --data=builtin --batch=2 --micro_batch=2
"""

from config import Config

config = Config(
    vocab_size=16384,  # the table has 12% of the parameters; with SmolLM's 49,152 ids it would have 30%
    n_layer=20, n_head=8, n_kv_head=4, d_model=512,  # deep and narrow, as SmolLM: MobileLLM, Liu et al. 2024
    d_ff=1408,  # 8/3 of d_model, rounded up to a multiple of 128: whole tiles for a GPU's matrix units
    seq_len=1024,  # most pages and textbook chapters fit; twice as many rows fit into memory as of 2,048
    init_std=0.0442,  # 1 / sqrt(512)

    out_dir="out/evening", dtype="bfloat16", compile=True,
    # Without python-edu, whose files come one by one from another server, and stackoverflow, a hundredth.
    # Textbooks get their share: a small model learns more per token from texts that explain.
    data=(("fineweb-edu-dedup", 0.70), ("cosmopedia-v2", 0.25), ("open-web-math", 0.05)),
    on_bad="skip",  # one empty page among millions must not stop data.py, which counts it

    # 20 tokens per parameter, with which a given amount of compute gets furthest (Hoffmann et al. 2022).
    max_steps=10_300,
    # 131,072 tokens per step, not SmolLM's million: 1,300 steps would be too few. DeepSeek's fit (Bi et al.
    # 2024, section 3) for the 6.3e17 operations of this run is 0.292 C^0.327 = 190,000 tokens.
    batch=128, micro_batch=16,
    lr=1.5e-3,  # their fit, 0.3118 C^-0.125 = 1.9e-3, times the square root of 131 / 190
    # Shares of the run, so that --max_steps alone makes it shorter: 206 steps of warm-up, and the default
    # decay, two fifths. SmolLM's 5,000 and 100,000 steps are 1% and 17% of its run.
    warmup_ratio=0.02,
    eval_every=500, save_every=1000, sample_every=500,  # a twentieth of the evening
)
