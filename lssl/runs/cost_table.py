"""The account of a run as text; without torch."""

from __future__ import annotations

from lssl.runs.outputs import RunCost

__all__ = ["cost_table"]

PARTS = (
    ("data", "waiting for the loader, copying to the device"),
    ("views", "drawing and resampling"),
    ("model", "forward and backward, losses included"),
    ("optimizer", "update, clipping, guards, teacher"),
    ("rest", "logging and other callbacks"),
)


def cost_table(cost: RunCost) -> str:
    """A line per figure: its name, its value, and what it means."""
    plural = "" if cost.pairs_per_step == 1 else "s"
    rows = [("pairs/s", f"{cost.pairs_per_second:.3g}", f"{cost.pairs_per_step} pair{plural} a step{_devices(cost)}")]
    rows.append(("ms/step", f"{cost.ms_per_step:.1f}", "of which"))
    for name, meaning in PARTS:
        value = getattr(cost, f"ms_{name}")
        share = value / cost.ms_per_step if cost.ms_per_step else 0.0
        rows.append((f"  {name}", f"{value:.1f}", f"{share:4.0%}  {meaning}"))
    between = [(name, getattr(cost, name)) for name in ("monitor", "validation", "checkpoints")]
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in between if seconds >= 0.05)
    if told:
        rows.append(("between steps", f"{sum(seconds for _, seconds in between):.1f} s", told))
    rows.append(("first step", f"{cost.first_step:.1f} s", "workers start, kernels are chosen"))
    rows += [*_memory(cost), *_operations(cost)]
    what = "GPU" if cost.device_memory else "CPU"
    rows.append((f"{what} hours", f"{cost.device_hours:.3g}", f"{cost.seconds:.0f} s of training{_devices(cost)}"))
    if cost.kwh:
        rows.append(("energy", f"{cost.kwh:.3g} kWh", "of the GPUs: power drawn, every few seconds, times time"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows]
    steps = f"{cost.steps} step" + ("" if cost.steps == 1 else "s")
    return "\n".join([f"What training took ({steps}; cost.json has all figures):", *lines])


def _devices(cost: RunCost) -> str:
    return f" on each of {cost.processes} devices" if cost.processes > 1 else ""


def _memory(cost: RunCost) -> list[tuple[str, str, str]]:
    rows = [("peak memory", f"{cost.memory:.3g} GB", "of the process, without its workers")]
    if cost.device_memory:
        rows.insert(0, ("peak on the GPU", f"{cost.device_memory:.3g} GB", "allocated"))
    return rows


def _operations(cost: RunCost) -> list[tuple[str, str, str]]:
    """Utilisation where the device's peak is known, else operations a second."""
    if not cost.flops_per_step:
        return []
    rate = f"{cost.flops_per_second / 1e12:.3g}"
    if cost.peak_flops:
        share = cost.flops_per_second / cost.peak_flops
        note = f"{rate} of the device's {cost.peak_flops / 1e12:.3g} TFLOP/s at this precision"
        return [("model FLOPs utilisation", f"{share:.1%}", note)]
    each = f"{cost.flops_per_step / 1e9:.3g} GFLOP a step; the device's peak is not known"
    return [("TFLOP/s", rate, each)]
