"""Where does a run live? Files, checkpoints, processes and signals; nothing about learning, so skip it."""

import os

# Each command imports this package before torch, which loads OpenMP, which reads this variable. A step has
# thousands of short operations, and after each the threads wait for the slowest. They wait by spinning, up to
# 300,000 rounds by default. If another program holds the core of the slowest, the others burn the time that
# it needs: a busy neighbor made a step up to 15 times slower. After 10,000 rounds they sleep instead
# (python -m bench neighbor). What the user has set is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
