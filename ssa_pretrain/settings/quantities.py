"""Counts and times as people read them: 16.4M tokens, 2h05m. Stdlib only."""


def compact(number: float) -> str:
    """Returns a count in at most five characters: 950, 8.19k, 16.4M, 100B."""
    for unit in ("", "k", "M", "B", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    if not unit:
        return f"{number:.0f}"
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Returns a time in at most seven characters: 8s, 4m08s, 2h05m, 3d04h."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86_400}d{seconds % 86_400 // 3600:02d}h"
