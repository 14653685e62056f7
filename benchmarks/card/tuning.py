"""The best block sizes of our attention kernels on this card, into tuned.json of the folder:
`benchmarks.tune_attention`, as far as the time goes.

On a CPU the kernels are interpreted, so that what is found there means nothing.
"""

from __future__ import annotations

from benchmarks.card.task import Task, part, skip


def run(task: Task) -> None:
    import jax

    from benchmarks import tune_attention

    out = task.out.with_name("tuned.json")
    quick = (
        *("--widths", "16", "--dtypes", "float32", "--time", "384", "--batch", "1"),
        *("--model-width", "16", "--rounds", "1", "--count", "1", "--candidates", "2"),
    )
    # Width 128 first: it is what the comparisons are at.
    chosen = quick if task.quick else ("--widths", "128", "64", "--rounds", "5")
    if jax.devices()[0].platform != "gpu" and not task.quick:
        skip("block sizes are measured on a GPU")
    minutes = max(0.0, task.left() - 10) / 60 if not task.quick else 1.0
    options = ["--out", str(out), "--minutes", str(minutes), *chosen]
    for found in tune_attention.search(tune_attention.options_of(options)):
        task.row(
            "sizes",
            kernel=found.kernel,
            sizes=str(found.sizes),
            milliseconds=found.milliseconds,
            **found.key._asdict(),
        )
    print(f"{sum(len(table['rows']) for table in task.report['tables'])} kernels tuned")


if __name__ == "__main__":
    part(run)
