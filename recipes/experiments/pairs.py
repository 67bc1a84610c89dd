"""Print how all arms of an experiment differ from any one of them, paired by seed, with 95 % intervals.

    python -m recipes.experiments.pairs recipes/configs/experiments/frozen_10.yaml "L2-SP, layer decay, head decayed"
    python -m recipes.experiments.pairs recipes/configs/experiments/frozen_10.yaml SGD --seeds "[5, 6, 7, 8, 9]"

The report has these differences for the experiment's reference, and for the arms that it names in ``against``.
"""

from __future__ import annotations

from pathlib import Path

from recipes.experiments.report import paired_table
from recipes.experiments.spec import asked_for, load
from recipes.experiments.summary import finals, read


def main(experiment: str, arm: str, seeds: list[int] | None = None, output: str = "docs/experiments") -> str:
    """The table, in Markdown.

    Args:
        experiment: the YAML file of an experiment that has been run.
        arm: that the others are compared with.
        seeds: those to compare on; all that two arms share by default.
        output: folder of all experiments.

    Raises:
        ValueError: an arm that the experiment does not have, a seed of which it has no run, or nothing to compare it with.
    """
    spec = load(experiment)
    if arm not in spec["arms"]:
        raise ValueError(f"arm: {spec['name']} has no arm {arm!r}; choose from {', '.join(map(repr, spec['arms']))}")
    rows = asked_for(spec, read(Path(output) / spec["name"]))
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
