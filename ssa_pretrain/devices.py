"""Whether there is a GPU to compute on, told from files: rules ask before torch is imported, and a start that finds torch of another opinion stops.

Stdlib only.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path


def has_gpu() -> bool:
    """Return whether the driver shows a GPU and torch was built for it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles")
    torch = find_spec("torch")
    if hidden or torch is None or not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    version = Path(torch.submodule_search_locations[0]) / "version.py" if torch.submodule_search_locations else None
    return version is not None and re.search(r"^cuda\b.*=\s*['\"]", version.read_text(), re.MULTILINE) is not None
