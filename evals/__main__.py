"""python -m evals: see evals/builtin.py."""

import config
from evals import builtin

if __name__ == "__main__":
    config.command(builtin.main, own_help=True)
