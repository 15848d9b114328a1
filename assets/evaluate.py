"""How good the models in the box are: `python assets/evaluate.py`; see `assets/recipe/evaluation.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the command finds the packages

if __name__ == "__main__":
    from assets.recipe.evaluation import main

    main()
