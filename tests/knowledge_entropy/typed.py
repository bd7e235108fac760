# mypy: disallow-untyped-calls, disallow-untyped-defs, no-implicit-reexport, warn-return-any
"""A program of somebody else's that mypy checks in its normal run; it is never executed.

An ignore that is not needed is an error: it would mean that a name of the package has no type.
"""

import torch
from torch import nn

import knowledge_entropy as ke


def used(model: nn.Module, rows: list[list[int]], texts: list[str]) -> float:
    result: ke.Result = ke.measure(model, rows, data_size=10, measures=("knowledge", "attention"))
    other = ke.measure("allenai/OLMo-1B", texts, tokenizer="gpt2", precision="bf16", device=torch.device("cuda"))
    difference: ke.Difference = result.compare(other)
    error: float | None = difference.standard_error
    with ke.resuscitate(model, result, 0.5, 2.0, layers=[1]) as edit:
        names: list[int] = list(edit.selected)
    with ke.observe(model, "relu") as observation:
        sizes: list[int] = observation.sizes
    ke.Result.load("folder").save("other")
    return result.entropy + (error or 0.0) + len(names) + len(sizes)


def misused(model: nn.Module, result: ke.Result) -> None:
    ke.measure(model)  # type: ignore[call-arg]
    ke.measure(model, ["text"], batchsize=4)  # type: ignore[call-arg]
    ke.measure(model, ["text"], batch_size="4")  # type: ignore[arg-type]
    ke.resuscitate(model, 3, 0.5, 2.0)  # type: ignore[arg-type]
    entropy: str = result.entropy  # type: ignore[assignment]
    result.compare(entropy)  # type: ignore[arg-type]
    ke.mesure(model, ["text"])  # type: ignore[attr-defined]
