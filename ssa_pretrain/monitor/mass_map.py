"""Captured mass by layer over a run as a picture (PNG): a row per layer, a column per evaluation of held-out text, the value as colour.

Trackers draw at most one line per layer, and among 16 to 32 lines it is hard to see which layer lags. The picture is drawn again at every evaluation, from all
evaluations so far, so the newest one shows the whole run. The colour scale is fixed from LOW to 1, so pictures of several runs can be compared; the
number at the end of a row is its newest value. matplotlib, without a display.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ssa_pretrain.monitor.names import HELDOUT, MASS_MAP, MODES, layer_name
from ssa_pretrain.settings.quantities import compact

LOW = 0.5  # captured mass of the weakest colour and below
MOST_COLUMNS = 200  # of a picture; more evaluations are thinned out

Columns = list[tuple[int, list[float | None]]]  # tokens, and the value of each layer


class MassMaps:
    """Collects the held-out evaluations of a run and draws them."""

    def __init__(self) -> None:
        self._columns: dict[str, Columns] = {mode: [] for mode in MODES}

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes a record of the run; only held-out evaluations matter."""
        values = record.get("captured_mass_by_layer")
        if record["kind"] == "evaluation" and record["mode"] in self._columns and values:
            self._columns[record["mode"]].append((record["tokens"], list(values)))

    def pictures(self, values: Mapping[str, Any]) -> dict[str, bytes]:
        """Returns a PNG by name for each mode whose captured mass is among the flat values of a row."""
        return {
            f"{HELDOUT}/{mode}/{MASS_MAP}": draw(columns, f"Captured mass on held-out text, {mode} attention")
            for mode, columns in self._columns.items()
            if columns and layer_name(f"{HELDOUT}/{mode}/captured_mass", 0) in values
        }

    @contextmanager
    def files(self, values: Mapping[str, Any]) -> Iterator[dict[str, Path]]:
        """Yields `pictures` as files, which exist while the context is open."""
        with TemporaryDirectory() as folder:
            found = {}
            for number, (name, png) in enumerate(self.pictures(values).items()):
                found[name] = Path(folder) / f"{number}.png"
                found[name].write_bytes(png)
            yield found


def draw(columns: Columns, title: str) -> bytes:
    """Returns the picture of at least one column as a PNG.

    Args:
        columns: tokens and values by layer, in order; None where a value is not finite.
        title: above the picture.
    """
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display
    from matplotlib.ticker import MaxNLocator

    step = -(-len(columns) // MOST_COLUMNS)
    kept = columns[::-1][::step][::-1]  # the newest column always stays
    num_layers = max(len(values) for _, values in kept)
    image = np.full((num_layers, len(kept)), np.nan)
    for x, (_, values) in enumerate(kept):
        image[: len(values), x] = [np.nan if value is None else value for value in values]
    figure = Figure(figsize=(8, 1.2 + 0.22 * num_layers), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(image, aspect="auto", vmin=LOW, vmax=1.0, cmap="viridis", interpolation="nearest")
    places = sorted({round(i * (len(kept) - 1) / 5) for i in range(6)})
    axes.set_xticks(places, [compact(kept[place][0]) for place in places])
    axes.set(title=title, xlabel="tokens", ylabel="layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    newest = axes.secondary_yaxis("right")
    newest.set_yticks(range(num_layers), ["" if np.isnan(v) else f"{v:.2f}" for v in image[:, -1]], fontsize=7)
    figure.colorbar(drawn, ax=axes, pad=0.02, extend="min")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return out.getvalue()
