"""Makes this folder's helpers importable: test files are imported by path, so that nothing else is."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
