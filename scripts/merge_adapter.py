"""Merge trained adapters into their base model: one ordinary model folder, which needs no peft (docs/adapters.md).

    python scripts/merge_adapter.py --adapter outputs/my_run/step3_tppo/model/adapter --output outputs/my_run/merged
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import run_command


def start() -> None:
    """Imports first, so that their errors are shown as others are: torch needs a folder for temporary files."""
    from common.models.merging import main

    main()


if __name__ == "__main__":
    run_command(start)
