#!/usr/bin/env python
"""Write the next queries of users with a trained model (docs/using_the_model.md).

    python scripts/predict.py --model outputs/RUN/step3_tppo/model --history history.jsonl --output predictions.jsonl
    python scripts/predict.py --model outputs/RUN/step3_tppo/model --reward outputs/RUN/step2_token_reward/reward/model

The second holds a dialogue. Runs in one process, with or without a GPU, from any folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import run_command


def start() -> None:
    """Imports first, so that their errors are shown as others are: torch needs a folder for temporary files."""
    from common.prediction.main import main

    main()


if __name__ == "__main__":
    run_command(start)
