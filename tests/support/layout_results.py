"""Reads what the ranks of layout_worker.py wrote, and puts whole parameters together again."""

from pathlib import Path

import torch

from support.errors import relative

TOLERANCE = 1e-5


def assemble(folder: Path, name: str, tolerance: float = TOLERANCE) -> dict:
    """Return a case's records and whole gradients, put together from all ranks' parts, which must agree where they overlap."""
    parts = [torch.load(path, weights_only=True, map_location="cpu") for path in sorted(folder.glob(f"{name}.*.pt"))]
    for part in parts[1:]:
        assert part["records"] == parts[0]["records"], f"{name}: ranks report different figures"
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for key in {key for part in parts for key in part["parameters"]}:
        holders = [p for p in parts if key in p["parameters"]]
        shards: dict[int, dict] = {}
        for part in holders:
            entry = part["parameters"][key]
            first = shards.setdefault(part["tp_rank"], entry)
            assert torch.equal(first["grad"], entry["grad"]), f"{name}: data ranks hold different gradients of {key}"
        whole[key] = {
            what: join([shards[r] for r in sorted(shards)], what, key, tolerance) for what in ("grad", "weight")
        }
    return {"records": torch.tensor(parts[0]["records"], dtype=torch.float64), "parameters": whole}


def join(shards: list[dict], what: str, key: str, tolerance: float) -> torch.Tensor:
    """Return a parameter's tensor from its tensor-parallel shards."""
    tensors, dim = [s[what] for s in shards], shards[0]["dim"]
    if dim < 0 or len(tensors) == 1:
        for other in tensors[1:]:
            assert relative(other, tensors[0]) < tolerance, f"tensor ranks hold different {what} of {key}"
        return tensors[0]
    if "linear_fc1" in key:
        halves = [t.chunk(2, dim=0) for t in tensors]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    return torch.cat(tensors, dim=dim)
