"""Start the page: `python app.py`."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import app.zero  # noqa: F401  # on a ZeroGPU Space before anything touches CUDA
from app.page import main

if __name__ == "__main__":
    main()
