"""The counts of a config as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from jaxdecoder import analysis
from jaxdecoder.analysis.memory import Memory
from jaxdecoder.config import ModelConfig
from jaxdecoder.layers.depth import exits_of


def report(config: ModelConfig) -> list[Table]:
    """Return the counts as tables for a terminal."""
    return [_parameter_table(config), _flops_table(config), _bytes_table(config)]


def _parameter_table(config: ModelConfig) -> Table:
    counts = analysis.parameters(config)
    table = _table("parameters", "count", "share")
    for part, count in counts.items():
        _add(table, part, f"{count:,}", f"{count / counts['total']:.1%}")
    return table


def _flops_table(config: ModelConfig) -> Table:
    flops, dense = analysis.flops_per_token(config), analysis.flops_per_token(config, dense=True)
    table = _table("FLOPs a token", *analysis.FlopsPerToken._fields)
    for part in flops.train:
        _add(table, part, *(_short(column[part]) for column in flops))
    _add(table, "total, dense attention", *(_short(column["total"]) for column in dense))
    exits = exits_of(config)
    for depth in exits if len(exits) > 1 else ():
        early = analysis.early_exit_flops(config, depth, start=config.context_length - 1)["total"]
        _add(table, f"total, stopping at depth {depth}", "", "", _short(early))
    table.caption = (
        "Matrix products, 2 a multiply-add; attention over the pairs its mask allows; train is "
        f"forward and backward; decode is the last token of {config.context_length}."
    )
    return table


def _bytes_table(config: ModelConfig) -> Table:
    sizes = {"float32": 4, "bfloat16": 2}
    table = _table("bytes", *sizes)
    weights = [analysis.weight_bytes(config, size) for size in sizes.values()]
    cache = [analysis.cache_bytes(config, size) for size in sizes.values()]
    _add(table, "weights", *(f"{n:,}" for n in weights))
    _add(table, "cache, a sequence", *(f"{n:,}" for n in cache))
    a_token = (f"{n / config.context_length:,.0f}" for n in cache)
    _add(table, f"cache, a token of {config.context_length}", *a_token)
    return table


def memory_table(memory: Memory, room: int, device: str) -> Table:
    """Return what fills a device's memory, of which there are `room` bytes."""
    table = _table(f"memory of {device}", "bytes", "share")
    parts = {**memory._asdict(), "total": memory.total, "usable": room}
    for part, count in parts.items():
        _add(table, _NAMES.get(part, part), f"{count:,}", f"{count / room:.1%}")
    return table


_NAMES = {"average": "moving_average", "activations": "activations_and_other_temporaries"}


def _table(first: str, *others: str) -> Table:
    table = Table(caption_justify="left")
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right")
    return table


def _add(table: Table, name: str, *cells: str) -> None:
    table.add_row(name.replace("_", " "), *cells, style="bold" if name == "total" else None)


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.4g} {unit}".rstrip()
        value /= 1000
    return f"{value:.4g} P"
