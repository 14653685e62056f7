"""Attention against cuDNN, PyTorch's own and its compiled FlexAttention: `benchmarks.attention`,
its first cases, as many as there is time for, and what we aim at as ratios.
"""

from __future__ import annotations

from benchmarks.card.task import Task, first_line, part

LEAST_SECONDS = 12.0
"""What a case takes, about; with less left none is begun."""


def run(task: Task) -> None:
    import jax

    from benchmarks import attention, attention_torch

    quick = ["--quick", "--masks", "causal", "window"] if task.quick else []
    options = attention.options_of(quick)
    on_cpu = jax.devices()[0].platform == "cpu"
    rows: list[dict[str, object]] = []
    task.write(torch=attention_torch.versions())
    for case, names in attention.cases_of(options, "float32" if on_cpu else "bfloat16"):
        if task.left() < LEAST_SECONDS and not task.quick:
            break
        try:
            results = attention.measure(case, names, options.rounds, options.seconds)
        except Exception as error:
            task.row("failed", case=str(case), why=first_line(error))
            continue
        rows.append({**case._asdict(), "results": results})
        for name, found in results.items():
            task.row(
                "cases",
                case=str(case),
                who=name,
                milliseconds=found.get("milliseconds"),
                tflops=found.get("tflops"),
                spread=found.get("spread"),
                error=found.get("error"),
                cannot=found.get("cannot"),
            )
        task.write(rows=rows, goals=attention.goals(rows))
    for name, ratio in task.report.get("goals", {}).items():
        task.row("ratios", of=name, ratio=ratio)
    print(f"{len(rows)} cases")


if __name__ == "__main__":
    part(run)
