"""The figures of a run as tables: the one source of what the terminal, the HTML report and the README show."""

from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from typing import Any


@dataclass(frozen=True)
class Table:
    """A titled table of text cells."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table in Markdown, without the title."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def down(value: float, digits: int = 3) -> str:
    """Return a number cut off, never rounded up, as every certified figure is printed."""
    # by way of the shortest decimal: 0.57 lies just below itself in binary
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_DOWN))


def chain_tables(result: dict[str, Any]) -> list[Table]:
    """Return accuracy by depth for both models, at the length of training and at a longer one."""
    models = result["models"]
    columns = ["overall", "0", "1", "2-3", "4-7", "8-15", "16-31", "unseen"]
    deepest = result["deepest_in_training"]
    head = [
        "test",
        "attention",
        "overall",
        *(f"depth {name}" for name in columns[1:-1]),
        f"depth > {deepest} (never seen)",
    ]
    rows = [
        [
            length,
            name,
            *(down(model["accuracy"][length][c]) if c in model["accuracy"][length] else "-" for c in columns),
        ]
        for length in models["chain"]["accuracy"]
        for name, model in models.items()
    ]
    return [Table("Share of right answers of one-layer models, by hops to the answer", head, rows)]


def highway_tables(result: dict[str, Any]) -> list[Table]:
    """Return the cosines between gradients, and losses with times."""
    variants = list(result["cosines"][0]["cosine"])
    cosines = [
        [f"{probe['when']} (step {probe['step']})", *(f"{probe['cosine'][name]:.3f}" for name in variants)]
        for probe in result["cosines"]
    ]
    ratio = result["step_time_ratio"]
    low, high = ratio["quartiles"]
    times = {"exact": "1", "k = 1": f"{ratio['median']:.2f} (quartiles {low:.2f} to {high:.2f})"}
    losses = [
        [name, f"{curve[-1][1]:.3f}", f"{result['held_back_loss'][name]:.3f}", times[name]]
        for name, curve in result["curves"].items()
    ]
    return [
        Table("Cosine between the gradient and the exact one", ["when", *variants], cosines),
        Table("Training", ["gradients", "last training loss", "loss on held-back text", "time of a step"], losses),
    ]


def certification_tables(result: dict[str, Any]) -> list[Table]:
    """Return certified accuracy by radius for each interval, in the pipeline's units and in gray ones."""
    intervals = result["intervals"]
    radii = list(next(iter(intervals.values()))["certified_accuracy"])
    head = ["interval", *(f"r = {radius}" for radius in radii)]
    more = [*head, "average certified radius", "abstentions", "draws per image"]
    rows = [
        [
            name,
            *(down(figures["certified_accuracy"][radius], 2) for radius in radii),
            down(figures["average_certified_radius"]),
            str(figures["abstentions"]),
            str(figures["draws_per_image"]),
        ]
        for name, figures in intervals.items()
    ]
    gray = [
        [name, *(down(figures["certified_accuracy_gray"][radius], 2) for radius in radii)]
        for name, figures in intervals.items()
    ]
    return [
        Table("Certified accuracy at l2 radius r, RGB pixels in [0, 1]", more, rows),
        Table("The same for a change of the gray digit", head, gray),
    ]


TABLES = {"chain": chain_tables, "highway": highway_tables, "certification": certification_tables}


def statements(part: str, result: dict[str, Any]) -> list[str]:
    """Return what a part shows and what it does not, in plain sentences with this run's own figures."""
    return {"chain": chain_statements, "highway": highway_statements, "certification": certification_statements}[part](
        result
    )


def chain_statements(result: dict[str, Any]) -> list[str]:
    """Return the sentences of part 1."""
    return [
        "A sequence is T statements, each setting a name to a value or to what another name holds; the model says at "
        "each statement what its name holds now. The answer lies as many hops away as names were copied.",
        f"Both models are the same one-layer Llama, trained for {result['steps']} steps on T = 30 only; just "
        "attn_implementation differs. Three chains grow side by side, so guessing is right one time in three. At 16 "
        "to 31 hops of T = 30 most statements belong to one chain, and guessing its value is right more often.",
        "An ordinary layer reads one hop: it is right at depth 0 and 1. A chain layer follows the whole chain, also "
        "at lengths and depths it never saw.",
        "This is a task made to need depth. Nothing here says that language models become better.",
    ]


def highway_statements(result: dict[str, Any]) -> list[str]:
    """Return the sentences of part 2."""
    ratio = result["step_time_ratio"]["median"]
    return [
        f"A GPT-2 of {result['blocks']} blocks and {result['parameters']:,} parameters on {result['tokens']:,} tokens "
        "of film reviews. Same seed, same batches; only the gradients differ: exact, or Highway-BP with k = 1, where "
        "k is the number of corrections. For comparison, k = 0 is the residual path alone, and the fixed point is one "
        "correction without a residual path.",
        f"On one device Highway-BP saves no time: a step with k = 1 took {ratio:.2f} times that of a step with exact "
        "gradients. What it buys is parallelism between devices; its price in gradient quality is measured here.",
    ]


def certification_statements(result: dict[str, Any]) -> list[str]:
    """Return the sentences of part 3."""
    return [
        f"{result['images']} digits that the model never saw, noise of sigma = {result['sigma']} in raw RGB pixels "
        f"of [0, 1]; each certificate fails with probability at most {result['alpha']}.",
        f"The rule {result['chosen_before_the_draws']} was chosen before the draws. The others read the same votes "
        "for comparison: each is valid by itself, the larger of two is not.",
        "The curves end where unanimous votes prove no larger radius.",
        "The guarantee is for the smoothed classifier at model resolution, not for the network inside it. The digits "
        "are gray and enter as three equal channels, so a gray radius is the RGB radius over sqrt(3), as shown.",
    ]
