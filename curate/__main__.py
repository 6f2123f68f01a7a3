"""python -m curate: see curate/steps.py."""

import config
from curate import steps

if __name__ == "__main__":
    config.command(steps.main, own_help=True)
