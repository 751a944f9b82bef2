"""The figures of docs/exact.md: `python -m irlign.exact docs/exact` computes them exactly and writes four SVG files."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irlign.exact.dynamics import TurnMDP
from irlign.exact.tabular import forward_kl, jensen_shannon, kl_regularised_optimum, reverse_kl
from irlign.statistics import best_of_n_law, kl_bound

GRID = torch.arange(15, dtype=torch.float64)


def bell(centre: Any, width: Any) -> torch.Tensor:
    """A discretised Gaussian over the positions 0..14."""
    return (-((GRID - centre) ** 2) / (2 * width**2)).softmax(-1)


def two_modes() -> torch.Tensor:
    """A demonstrator with modes at 4 (60%) and 10 (40%)."""
    return 0.59 * bell(4.0, torch.tensor(0.5)) + 0.39 * bell(10.0, torch.tensor(0.5)) + 0.02 / len(GRID)


def closest_bell(divergence: Any, demonstrator: torch.Tensor) -> torch.Tensor:
    """The bell curve of least divergence, over a fine grid of centres and widths."""
    bells = [bell(centre, width) for centre in torch.linspace(0, 14, 141) for width in torch.linspace(0.3, 8, 155)]
    return min(bells, key=lambda law: float(divergence(demonstrator, law)))


def modes(axes: Any) -> None:
    demonstrator = two_modes()
    axes.bar(GRID, demonstrator, color="#c9d2dc", label="demonstrator")
    for name, divergence in (("forward KL (SFT)", forward_kl), ("Jensen-Shannon", jensen_shannon), ("reverse KL", reverse_kl)):
        axes.plot(GRID, closest_bell(divergence, demonstrator), marker=".", label=name, ls="--" if name == "reverse KL" else "-")
    axes.set_xlabel("answer")
    axes.set_ylabel("probability")


def extrapolation(axes: Any) -> None:
    initial, sft = bell(4.0, 2.0), bell(6.0, 2.0)
    for name, law in (("initial", initial), ("SFT", sft)):
        axes.plot(GRID, law, color="#7a8694", ls="--" if name == "initial" else "-", label=name)
    for b in (2.0, 1.0, 0.5):
        axes.plot(GRID, kl_regularised_optimum(sft, (sft / initial).log(), b), marker=".", label=f"optimum, b = {b:g}")
    axes.set_ylim(0, 0.33)
    axes.set_xlabel("answer")
    axes.set_ylabel("probability")


def best_of_n_kl(axes: Any) -> None:
    n = [2**k for k in range(9)]
    axes.plot(n, [kl_bound(k) for k in n], color="#10151c", lw=2, label="bound")
    for size in (1000, 30, 4):
        base = np.full(size, 1 / size)
        laws = [torch.from_numpy(best_of_n_law(base, np.arange(size), k)) for k in n]
        axes.plot(n, [float(forward_kl(law, torch.from_numpy(base))) for law in laws], marker=".", label=f"{size} answers")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("n")
    axes.set_ylabel("KL(Best-of-n || policy), nats")


def wrong_environment(axes: Any) -> None:
    """The gradient at the demonstrator's own policy, against how wrong the model of the environment is."""
    mdp = TurnMDP(tokens=2, replies=3, turns=2)
    tables = {
        e: torch.zeros(len(mdp.histories(environment=e)), mdp.replies if e else mdp.tokens, dtype=torch.float64) for e in (False, True)
    }
    generator = torch.Generator().manual_seed(0)
    policy, true, direction = (torch.randn(tables[e].shape, generator=generator, dtype=torch.float64) for e in (False, True, True))
    demonstrator = mdp.log_law(policy, true).exp()
    errors = torch.linspace(0, 2, 21)
    for name, divergence in (("forward KL", forward_kl), ("Jensen-Shannon", jensen_shannon), ("reverse KL", reverse_kl)):
        norms = []
        for error in errors:
            table = policy.clone().requires_grad_()
            value = divergence(demonstrator, mdp.log_law(table, true + error * direction).exp())
            norms.append(float(torch.autograd.grad(value, table)[0].norm()))
        axes.plot(errors, norms, marker=".", label=name)
    axes.set_xlabel("error of the environment's model (logits)")
    axes.set_ylabel("gradient at the demonstrator")


FIGURES = {"modes": modes, "extrapolation": extrapolation, "best_of_n_kl": best_of_n_kl, "wrong_environment": wrong_environment}


def main(folder: Path) -> None:
    """Write FOLDER/NAME.svg for every figure."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.legend(frameon=False, fontsize=8)
        with matplotlib.rc_context({"svg.hashsalt": "irlign"}):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m irlign.exact FOLDER")
    main(Path(sys.argv[1]))
