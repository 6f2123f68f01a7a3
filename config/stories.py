"""
An hour of one consumer GPU, or an evening of a Mac: 14 million parameters that read stories.

TinyStories (Eldan & Li 2023) is two million stories in the words of a four-year-old, written by GPT-3.5 and
GPT-4 so that small models can learn to tell one: its authors got fluent stories from less than 10 million
parameters. What this run costs, computed: python -m bench plan config/stories.py

    python data.py  config/stories.py         streams the stories from the hub and tokenizes them
    python train.py config/stories.py

Does it run? Five steps on built-in texts, in a folder of their own:

    python train.py config/stories.py --out_dir=out/try --max_steps=5 --data=builtin --batch=8 --micro_batch=8
"""

from config import Config

config = Config(
    # A child's words: nearly all of them fit into 4,096 ids. SmolLM's 49,152 would need 19 million embedding
    # parameters, for blocks of 12.6 million.
    vocab_size=4096, tokenizer_bytes=20_000_000,  # a hundredth of the stories: they use the same few words
    n_layer=8, n_head=6, n_kv_head=2, d_model=384,  # heads of 64 channels, three to a key, as in SmolLM
    d_ff=1024,  # 8/3 of d_model, as in SmolLM-135M
    seq_len=512,  # most stories have some 200 words
    init_std=0.051,  # 1 / sqrt(384)

    out_dir="out/stories", dtype="auto",  # also for CPUs and Macs, of which not all compute fast in bfloat16
    data=(("tinystories", 1.0),),
    on_bad="skip",  # one empty story among two million must not stop data.py, which counts it
    val_fraction=0.005,  # ten thousand stories: SmolLM's 0.0005 would be 300 rows

    # 20 tokens per parameter, with which a given amount of compute gets furthest (Hoffmann et al. 2022):
    # 280 million, some 60% of the stories, so none repeats.
    max_steps=8545,
    # 32,768 tokens per step. DeepSeek (Bi et al. 2024, section 3) fitted the best batch to the operations of
    # a run: 0.292 C^0.327 = 69,000 tokens for C = 2.6e16. Half of that keeps a step short on a small machine.
    batch=64, micro_batch=32,
    lr=2e-3,  # their fit, 0.3118 C^-0.125 = 2.8e-3, for a batch half as large: by its square root
    # The schedule's parts are shares of the run, so that --max_steps alone makes it shorter. The decay is the
    # default, two fifths: more than a fifth gains little (Hägele et al. 2024), and costs nothing.
    warmup_ratio=0.02,  # 170 steps: AdamW's averages are over 20
    eval_every=500, save_every=500, sample_every=500,  # every minute or few
)
