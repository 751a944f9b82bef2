"""`irlign init`: the recipe it writes is one, says what was answered, and passes `irlign validate` where data is given."""

import io
import json
import sys
from itertools import pairwise

import pytest
from tiny import make_tiny_policy

from irlign.cli import main
from irlign.config import load_recipe
from irlign.errors import ConfigError
from irlign.first_recipe import STARTS, write_recipe
from irlign.recipe import Recipe

ROWS = [{"prompt": f"the {a} {b}", "completion": f" {b} sat."} for a in ("cat", "dog", "bird") for b in ("red", "blue")]


@pytest.fixture
def given(tmp_path):
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [f"model_name_or_path={make_tiny_policy(tmp_path / 'model')}", f"dataset_name={tmp_path}/good.jsonl"]


def _irlign(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return exit_.value.code or 0, *capsys.readouterr()


def test_without_a_terminal_every_answer_is_key_value(capsys, given, tmp_path):
    path = tmp_path / "new/mine.yaml"
    code, out, _ = _irlign(capsys, "init", path, *given, "sampling.stop=[END]", "use_peft=no", "--seed", "7")
    assert code == 2 and not path.exists()  # use_peft stands in three sections: not guessed
    code, out, err = _irlign(capsys, "init", path, *given, "sampling.stop=[END]", "max_new_tokens=8", "--seed", "7")
    assert (code, err) == (0, "") and "Next: irlign validate" in out and "no value yet" not in out
    recipe = load_recipe(Recipe, path)
    assert (recipe.seed, recipe.sampling.stop, recipe.data.chat_template) == (7, ["END"], "auto")
    assert recipe.sampling.num_generations == Recipe.model_fields["sampling"].default_factory().num_generations
    code, out, err = _irlign(capsys, "validate", "--config", path)
    assert code == 0 and "the cat red" in out, err


def test_it_never_overwrites(capsys, given, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    code, _, err = _irlign(capsys, "init", path, *given)
    assert code == 2 and "mine.yaml: is there already" in err and path.read_text() == "seed: 1\n"


def test_a_wrong_answer_writes_nothing(capsys, given, tmp_path):
    code, _, err = _irlign(capsys, "init", tmp_path / "mine.yaml", *given, "optimise.method=sorcery")
    assert code == 2 and "optimise.method: expected 'distill'" in err and not (tmp_path / "mine.yaml").exists()


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_it_asks_what_is_open(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", _Terminal("weights\nmy-model\n2 files.jsonl\n\nchatml\nyes\n\nmine:golden\nruns/x\n"))
    code, out, _ = _irlign(capsys, "init", tmp_path / "mine.yaml")
    recipe = load_recipe(Recipe, tmp_path / "mine.yaml")
    assert code == 0 and out.count("?") == 0 and "Chat template" in out
    assert (recipe.model_name_or_path, recipe.dataset_name, recipe.sft_model_name_or_path) == ("my-model", "2 files.jsonl", None)
    assert (recipe.data.chat_template, recipe.output_dir) == ("chatml", "runs/x")
    assert recipe.sft.use_peft and recipe.reward.use_peft and recipe.optimise.use_peft and recipe.optimise.method == "distill"
    assert recipe.evaluation.golden_reward == "mine:golden"


def test_a_wrong_answer_is_said_and_asked_again(capsys, monkeypatch, tmp_path):
    answers = "both\nweights\nmy-model\ndata.jsonl\n\nchatm\nchatml\nmaybe\nyes\ndistil\ndistill\n\n\n"
    monkeypatch.setattr(sys, "stdin", _Terminal(answers))
    code, out, err = _irlign(capsys, "init", tmp_path / "mine.yaml")
    recipe = load_recipe(Recipe, tmp_path / "mine.yaml")
    assert code == 0 and (recipe.data.chat_template, recipe.reward.use_peft, recipe.optimise.method) == ("chatml", True, "distill"), err
    for said in ("no start from 'both': answer weights or samples", "no chat template 'chatm'", "got 'maybe'", "got 'distil'"):
        assert out.count(said) == 1, out
    assert out.count("What you have") == out.count("Chat template") == out.count("Last step") == 2 and out.count("Folder of the run") == 1


def test_samples_are_asked_about_too(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", _Terminal("samples\nold.jsonl\nnew.jsonl\n\nsft\nwords\n\nruns/x\n"))
    code, out, err = _irlign(capsys, "init", tmp_path / "mine.yaml")
    assert code == 0 and "pools needs reward.backbone" in out, err
    assert load_recipe(Recipe, tmp_path / "mine.yaml").pools.sft == "new.jsonl"


def test_an_answer_may_mend_what_is_given(capsys, monkeypatch, tmp_path):
    """A classifier cannot start from words, which is what is suggested: another backbone is asked for."""
    monkeypatch.setattr(sys, "stdin", _Terminal("\nan-encoder\n\nruns/x\n"))
    given = "pools.initial=old.jsonl", "pools.sft=new.jsonl", "reward.kind=classifier"
    code, out, err = _irlign(capsys, "init", tmp_path / "mine.yaml", *given)
    recipe = load_recipe(Recipe, tmp_path / "mine.yaml")
    assert code == 0 and (recipe.reward.kind, recipe.reward.backbone, recipe.output_dir) == ("classifier", "an-encoder", "runs/x"), (
        out + err
    )


def test_a_wrong_key_is_told_before_anything_is_asked(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", _Terminal(""))
    code, out, err = _irlign(capsys, "init", tmp_path / "mine.yaml", "model_name_or_path=m", "optimise.method=sorcery")
    assert code == 2 and "got 'sorcery'" in err and not out


@pytest.mark.parametrize("source", STARTS)
def test_what_is_missing_is_said_and_marked(tmp_path, source):
    path, first = tmp_path / "r.yaml", STARTS[source].needed[0]
    missing = write_recipe(path, [f"{first}=here.jsonl"])
    assert missing == [key for key in STARTS[source].needed if key != first]
    assert path.read_text().count("null  # needed: ") == len(missing)
    with pytest.raises(ConfigError):
        load_recipe(Recipe, path)
    assert load_recipe(Recipe, path, [f"{key}=there.jsonl" for key in missing])


def test_every_line_is_a_key_with_its_description(tmp_path):
    write_recipe(tmp_path / "r.yaml", ["model_name_or_path=m", "dataset_name=d", "data.chat_template=none"])
    lines = (tmp_path / "r.yaml").read_text().splitlines()
    for above, line in pairwise(lines):
        assert not line.strip() or "  # " in line or line.lstrip().startswith("#") or above.lstrip().startswith("# "), line
    assert f"sft:  # {Recipe.model_fields['sft'].description}" in lines


def test_an_sft_model_leaves_the_settings_of_sft_out(tmp_path):
    write_recipe(tmp_path / "r.yaml", ["model_name_or_path=m", "dataset_name=d", "sft_model_name_or_path=s"])
    assert "\nsft:" not in (tmp_path / "r.yaml").read_text()
    assert load_recipe(Recipe, tmp_path / "r.yaml").sft_model_name_or_path == "s"


def test_a_world_needs_no_questions(tmp_path):
    with pytest.raises(ConfigError, match="a world makes its own model"):
        write_recipe(tmp_path / "r.yaml", ["world=dialogue"])


def test_the_shell_completes_verbs(capsys, monkeypatch):
    monkeypatch.setenv("_IRLIGN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "irlign va")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert _irlign(capsys)[:2] == (0, "validate\n")
