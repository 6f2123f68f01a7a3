"""Where does a run live? Files, checkpoints, processes and signals; nothing about learning, so skip it."""

import os

# Each command imports this package before torch, which loads OpenMP, which reads this variable. A step has
# thousands of short operations, and after each the threads wait for the slowest. They wait by spinning, up to
# 300,000 rounds by default. If another program holds the core of the slowest, the others burn the time that
# it needs. After 1,000 rounds they sleep: a step beside a busy neighbor on each core then takes 1.9 times as
# long as alone, and not 3.2 times; a step alone takes 7% longer (python -m bench neighbor). What the user has
# set is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
