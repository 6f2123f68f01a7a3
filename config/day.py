"""
SmolLM-135M in a day on one consumer GPU: its shape and its schedule, on 2.7 billion tokens instead of 600
billion. What it costs, computed: python -m bench plan config/day.py

    python data.py  config/day.py             streams the texts from the hub and tokenizes them
    python train.py config/day.py

Does it run? Five steps on built-in texts, in a folder of their own:

    python train.py config/day.py --out_dir=out/try --max_steps=5 --data=builtin --batch=1 --micro_batch=1

Another three days? The learning rate stays at its peak up to step 6,180 and then decays (wsd). So the run can
continue from step 6,000 as if it had been meant to be longer: delete the checkpoints after it, and say where
it ends now. To 10 billion tokens:

    rm -r out/day/pretrain/step_0008000 out/day/pretrain/step_001*
    python data.py  config/day.py --max_steps=38147
    python train.py config/day.py --max_steps=38147
"""

from dataclasses import replace

from config.evening import config as evening
from config.smol_135m import config as smol_135m

config = replace(
    smol_135m,
    out_dir="out/day",
    data=evening.data, on_bad=evening.on_bad,  # for the same reasons

    # 20 tokens per parameter, with which a given amount of compute gets furthest (Hoffmann et al. 2022).
    # SmolLM read 4,700: a model that answers millions of questions is worth it, as each answer stays cheap.
    max_steps=10_300,
    batch=128,  # 262,144 tokens per step, a quarter of SmolLM's: with 2,575 steps it would learn less
    lr=1.5e-3,  # half of SmolLM's: the square root of a quarter (Malladi et al. 2022). See config/evening.py
    warmup_steps=0, warmup_ratio=0.02, decay_steps=None,  # shares of the run, as in config/evening.py
    eval_every=500, sample_every=500,  # a twentieth of the day
    save_every=2000, keep_checkpoints=0,  # all six: a longer run continues from one of them
)
