"""The explorer as a static site: the atlas, and the same JavaScript as the app's, with no Python behind it."""

import shutil
from pathlib import Path

from plotly.offline import get_plotlyjs

from analysis.atlas import ATLAS, MANIFEST
from analysis.records import BenchError

WEB = Path(__file__).with_name("web")
PLOTLY = "plotly.min.js"


def export_site(folder: Path, atlas: Path = ATLAS) -> int:
    """Write the site into a folder, which any file server can serve; files of the same names are replaced.

    Returns:
        Its size in bytes.

    Raises:
        BenchError: there is no atlas, or the folder is a file.
    """
    if not (atlas / MANIFEST).exists():
        raise BenchError(f"{atlas / MANIFEST} is missing; `python -m analysis atlas` writes it")
    if folder.exists() and not folder.is_dir():
        raise BenchError(f"DIR must be a folder, got the file {folder}")
    shutil.copytree(WEB, folder, dirs_exist_ok=True)
    shutil.copytree(atlas, folder / "atlas", dirs_exist_ok=True)
    (folder / PLOTLY).write_text(get_plotlyjs())
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
