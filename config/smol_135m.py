"""
SmolLM-135M as published: one mixture throughout, 629 billion tokens (the announcement rounds to 600 billion).

Why 30 narrow layers instead of a few wide ones? MobileLLM (Liu et al. 2024) compared models below a billion
parameters and found that depth matters more than width. Nine query heads share three key/value heads, which
makes the KV cache three times smaller.

Prepare the tokens first: python data.py config/smol_135m.py (many hours and a network). On the built-in
corpus the same model needs no preparation: python train.py config/smol_135m.py --data=builtin
"""

from config import Config

config = Config(
    vocab_size=49152,  # the table has 21% of the parameters; with Llama 3's 128,256 ids it would have 41%
    n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536, seq_len=2048,
    rope_theta=10000.0, norm_eps=1e-5,
    tie_embeddings=True,  # a head of its own would be another 28 million parameters
    init_std=0.0416,  # 1 / sqrt(576): a product with 576 inputs of size 1 has size 1
    out_dir="out/smol_135m", seed=8, data_seed=42, dtype="bfloat16", compile=True,
    data=(
        ("fineweb-edu-dedup", 0.70),  # web pages that a classifier found educational
        ("cosmopedia-v2", 0.15),  # synthetic textbooks and stories
        ("python-edu", 0.08),  # Python files that a classifier found educational
        ("open-web-math", 0.06),
        ("stackoverflow", 0.01),
    ),
    max_steps=600_000, batch=512, micro_batch=8,  # 600,000 steps of 1,048,576 tokens
    lr=3e-3,  # small models train at higher rates: the 1.7B at 5e-4
    schedule="wsd", warmup_steps=5000, decay_steps=100_000,  # a constant rate, so the run could be extended
    beta1=0.9, beta2=0.95,  # averages over the last 10 and 20 steps; PyTorch's 0.999 would be 1,000
    weight_decay=0.01, grad_clip=1.0,
    eval_every=2000, save_every=2000, sample_every=2000,
)
