"""Start the page: `python app.py`."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from app.page import main

if __name__ == "__main__":
    main()
