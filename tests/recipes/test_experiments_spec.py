import json

import pytest
import yaml

from recipes.experiments.spec import choose, final_runs, load, tuning_runs

SPEC = {
    "name": "small",
    "seeds": [0, 1],
    "tuning_seeds": [100, 101],
    "common": {"epochs": 3, "data": {"source": "digits", "size": 8}},
    "arms": {
        "SGD": {"method": "sgd", "grid": {"lr": [0.1, 0.2], "data.size": [8, 16]}},
        "Stiefel": {"method": "fgsgd", "manifolds": ["stiefel"], "grid": {"lr": [0.1, 1.0]}},
        "Sphere": {"method": "fgsgd", "manifolds": ["sphere"], "tuned_as": "Stiefel", "seeds": [0, 1, 2]},
        "Stiefel, lr 3": {"method": "fgsgd", "manifolds": ["stiefel"], "tuned_as": "Stiefel", "lr": 3.0},
    },
}


def loaded(tmp_path, **changes):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**SPEC, **changes}, sort_keys=False))
    return load(file)


def rows(runs, errors):
    return [{"key": run.key, "val_error": str(error)} for run, error in zip(runs, errors, strict=True)]


def test_a_grid_is_run_at_every_point_with_every_tuning_seed(tmp_path):
    runs = list(tuning_runs(loaded(tmp_path), "SGD"))
    seen = [(run.seed, run.config["lr"], run.config["data"]["size"]) for run in runs]
    assert sorted(seen) == [(seed, lr, size) for seed in (100, 101) for lr in (0.1, 0.2) for size in (8, 16)]
    assert len({run.key for run in runs}) == 8
    assert all(run.stage == "tune" and run.config["data"]["source"] == "digits" for run in runs)


def test_the_point_with_the_least_mean_validation_error_is_what_final_runs_use(tmp_path):
    spec = loaded(tmp_path)
    runs = list(tuning_runs(spec, "SGD"))
    # In the order (0.1, 8), (0.1, 16), (0.2, 8), (0.2, 16) for seed 100, then for 101: the third is best in the mean alone.
    found = rows(runs, [5, 3, 4, 9, 5, 9, 4, 1])
    assert choose(spec, "SGD", found) == {"lr": 0.2, "data.size": 8}
    final = final_runs(spec, "SGD", found)
    assert [run.seed for run in final] == [0, 1]
    assert final[0].config == {"epochs": 3, "data": {"source": "digits", "size": 8}, "method": "sgd", "lr": 0.2}


def test_with_keep_the_point_that_forgets_least_within_a_standard_error_is_what_final_runs_use(tmp_path):
    spec = {**loaded(tmp_path), "keep": "agreement", "tuning_seeds": [100]}
    spec["common"] = {**spec["common"], "data": {"source": "digits", "validation": 400}}
    runs = list(tuning_runs(spec, "SGD"))

    def chosen(errors, agreements):
        found = rows(runs, errors)
        return choose(
            spec, "SGD", [row | {"agreement": str(kept)} for row, kept in zip(found, agreements, strict=True)]
        )

    # √(0.2 * 0.8 / 400) = 2 %, so 22 % is as good as 20 % and 22.1 % is not.
    assert chosen([20, 21, 22, 22.1], [1, 5, 7, 9]) == {"lr": 0.2, "data.size": 8}
    assert chosen([20, 22.1, 23, 24], [1, 5, 7, 9]) == {"lr": 0.1, "data.size": 8}
    assert chosen([20, "nan", 21.9, 20], [1, "", 3, 2]) == {"lr": 0.2, "data.size": 8}
    # Of points that keep as much (a head alone that is trained keeps all) it is the one that makes fewest errors.
    assert chosen([21, 20, 20.5, 30], [100, 100, 100, 100]) == {"lr": 0.1, "data.size": 16}
    with pytest.raises(ValueError, match="keep: 'agreement' was not measured in the runs of 'SGD'"):
        chosen([20, 21, 22, 23], [""] * 4)
    # Of two seeds there are twice as many images: √(0.2 * 0.8 / 800) = 1.41 %.
    spec["tuning_seeds"] = [100, 101]
    runs = list(tuning_runs(spec, "SGD"))
    assert chosen([20, 21.4, 21.5, 30] * 2, [1, 5, 7, 9] * 2) == {"lr": 0.1, "data.size": 16}


def test_a_point_that_diverged_is_not_chosen_and_an_arm_that_always_did_is_an_error(tmp_path):
    spec = loaded(tmp_path)
    runs = list(tuning_runs(spec, "Stiefel"))
    assert choose(spec, "Stiefel", rows(runs, ["nan", 50, 1, 50])) == {"lr": 1.0}
    with pytest.raises(ArithmeticError, match="Stiefel: every point of its grid diverged"):
        choose(spec, "Stiefel", rows(runs, ["nan"] * 4))


def test_final_runs_wait_for_all_of_their_tuning(tmp_path):
    spec = loaded(tmp_path)
    runs = list(tuning_runs(spec, "Stiefel"))
    assert final_runs(spec, "Stiefel", rows(runs[:-1], [1, 2, 3])) is None
    assert final_runs(spec, "Sphere", rows(runs[:-1], [1, 2, 3])) is None


def test_an_arm_that_is_tuned_as_another_takes_its_point_but_for_what_it_says_itself(tmp_path):
    spec = loaded(tmp_path)
    found = rows(tuning_runs(spec, "Stiefel"), [2, 1, 2, 1])
    sphere = final_runs(spec, "Sphere", found)
    assert [run.seed for run in sphere] == [0, 1, 2]
    assert sphere[0].config["lr"] == 1.0
    assert sphere[0].config["manifolds"] == ["sphere"]
    assert final_runs(spec, "Stiefel, lr 3", found)[0].config["lr"] == 3.0


def test_keys_are_of_what_is_run_and_no_more(tmp_path):
    spec = loaded(tmp_path)
    found = rows(tuning_runs(spec, "Stiefel"), [2, 1, 2, 1])
    before = [run.key for run in final_runs(spec, "Sphere", found)]
    assert len(set(before)) == 3
    other = json.loads(json.dumps(spec))
    other["seeds"], other["reference"] = [0, 1, 2, 3], "Sphere"
    assert [run.key for run in final_runs(other, "Sphere", found)] == before
    other["common"]["epochs"] = 4
    found = rows(tuning_runs(other, "Stiefel"), [2, 1, 2, 1])
    assert not set(before) & {run.key for run in final_runs(other, "Sphere", found)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 3}, "unknown field 'budget'"),
        ({"seeds": []}, "seeds is missing"),
        ({"reference": "Adam"}, "reference: there is no arm 'Adam'"),
        ({"against": ["Sphere", "Adam"]}, "against: there is no arm 'Adam'"),
        ({"keep": "drift"}, "keep: 'drift' is not one of 'agreement', 'agreement_recalibrated'"),
        ({"tuning_seeds": []}, "'SGD' has a grid, but tuning_seeds is missing"),
        ({"tuning_seeds": [1]}, "share a seed"),
        ({"arms": {"A": {"method": "sgd", "tuned_as": "B"}}}, "'A' is tuned_as 'B', which is no arm with a grid"),
        ({"arms": {"A": {"grid": {"lr": [1]}, "tuned_as": "A"}}}, "has a grid and is tuned_as another"),
        ({"arms": {"A": {"grid": {"lr": [1]}, "lr": 2}}}, "'A' has lr in its grid and beside it"),
        (
            {"arms": {"A": {"grid": {"data.size": [8]}, "data": {"size": 16}}}},
            "'A' has data.size in its grid and beside",
        ),
        ({"arms": {"A": {"grid": {"lr": [0.1, 0.2, 0.1]}}}}, "'A': its grid has a value of lr twice"),
        ({"seeds": [0, 1, 1]}, "seeds: .* names a seed twice"),
        ({"arms": {"A": {"seeds": [2, 2]}}}, "'A': seeds: .* names one twice"),
        ({"arms": {"A": {"seeds": [0, 100]}}}, "'A': seed 100 is one of tuning_seeds"),
        ({"arms": {"A": {"validate_every": 2}}}, "'A': validate_every 2 leaves out the last of 3 epochs"),
        ({"keep": "agreement"}, "'SGD': keep needs data.validation"),
        ({"seeds": 5}, "seeds: 5 is not a list"),
        ({"common": 3}, "common: 3 has no names and values"),
        ({"arms": {"A": 3}}, "'A': 3 is not a mapping of options"),
        ({"arms": {"A": {"grid": [0.1]}}}, "'A': grid: .* is not a mapping"),
        ({"arms": {"A": {"grid": {"lr": 0.1}}}}, "'A': grid: lr has 0.1 in the place of a list"),
        ({"arms": {"A": {"grid": {"lr": []}}}}, r"'A': grid: lr has \[\] in the place of a list"),
        ({"arms": {"A": {"validate_every": 0}}}, "'A': validate_every: 0 is less than 1"),
    ],
)
def test_a_wrong_file_is_refused_with_the_field_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"small.yaml: .*{message}"):
        loaded(tmp_path, **changes)


def test_an_empty_file_is_refused_and_an_arm_without_options_is_what_is_common(tmp_path):
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ValueError, match=r"empty\.yaml: it holds no fields; give name, seeds"):
        load(tmp_path / "empty.yaml")
    spec = loaded(tmp_path, common={"method": "sgd"}, arms={"SGD": None})
    assert [run.config for run in final_runs(spec, "SGD", [])] == [{"method": "sgd"}] * 2


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no file 'nowhere\.yaml'"):
        load("nowhere.yaml")
