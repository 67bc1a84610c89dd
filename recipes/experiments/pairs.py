r"""Print how all arms of an experiment differ from any one of them, paired by seed, with 95 % intervals.

    python -m recipes.experiments.pairs recipes/configs/experiments/frozen_10.yaml "L2-SP, layer decay, head decayed"
    python -m recipes.experiments.pairs recipes/configs/experiments/frozen_10.yaml SGD --seeds "[5, 6, 7, 8, 9]"
    python -m recipes.experiments.pairs recipes/configs/experiments/frozen_50.yaml SGD \
        --other recipes/configs/experiments/accuracy_50.yaml

The last one is of the arms of one experiment beside an arm of another on the same images. The report has these differences
for the experiment's reference, and for the arms that it names in ``against``.
"""

from __future__ import annotations

from pathlib import Path

from recipes.experiments.report import paired_table
from recipes.experiments.spec import asked_for, load
from recipes.experiments.summary import finals, read


def main(
    experiment: str,
    arm: str,
    seeds: list[int] | None = None,
    other: str | None = None,
    output: str = "docs/experiments",
) -> str:
    """The table, in Markdown.

    Args:
        experiment: the YAML file of an experiment that has been run.
        arm: that the others are compared with.
        seeds: those to compare on; all that two arms share by default.
        other: the YAML file of another experiment that ``arm`` is of, with the same data, network, epochs and norms.
        output: folder of all experiments.

    Raises:
        ValueError: an arm that the experiment does not have, a seed of which it has no run, another experiment of another
            task, or nothing to compare it with.
    """
    spec = load(experiment)
    its = spec if other is None else load(other)
    if arm not in its["arms"]:
        raise ValueError(f"arm: {its['name']} has no arm {arm!r}; choose from {', '.join(map(repr, its['arms']))}")
    rows = asked_for(spec, read(Path(output) / spec["name"]))
    if other is not None:
        for name in ("data", "network", "epochs", "frozen_norms"):
            here, there = spec["common"].get(name), its["common"].get(name)
            if here != there:
                told = f"{its['name']} has {name} {there}, {spec['name']} has {here}"
                raise ValueError(f"other: {told}; give one that has the same")
        theirs = [row for row in asked_for(its, read(Path(output) / its["name"])) if row["arm"] == arm]
        if not finals(theirs, arm):
            raise ValueError(f"other: {arm!r} of {its['name']} has no final run in {Path(output) / its['name']}")
        arm = f"{arm} of {its['name']}"
        rows += [{**row, "arm": arm} for row in theirs]
        spec = {**spec, "arms": {**spec["arms"], arm: {}}}
    if seeds is not None:
        run = finals(rows, arm)
        if missing := [seed for seed in seeds if seed not in run]:
            raise ValueError(f"seeds: {arm!r} was not run with {missing}; choose from {sorted(run)}")
        rows = [row for row in rows if int(row["seed"]) in seeds]
    table = paired_table(rows, {**spec, "reference": arm})
    if not table:
        on = "" if seeds is None else f" on seeds {seeds}"
        raise ValueError(f"arm: no other arm shares two runs with {arm!r}{on} in {Path(output) / spec['name']}")
    return table


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(auto_cli(main))
