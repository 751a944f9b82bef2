"""The command line: every bad input gets one clear error, an exit code, and no traceback; nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small import small_recipe
from tiny import make_tiny_policy, make_tiny_tokenizer

from irlign.cli import main
from irlign.errors import RunError


def _run(capsys, *words):
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


def _lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


WORDS = ("the cat sat.", "a dog ran.", "the bird sang.", "red cat ran home.", "blue dog sat on the mat.", "a bird ran now.")
GOOD = [
    {"prompt": f"the {a} {b}", "completion": f" {c}"}
    for a, b, c in zip(("cat", "dog", "bird") * 4, ("red", "blue") * 6, WORDS * 2, strict=True)
]
GOOD = list({row["prompt"]: row for row in GOOD}.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_policy(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path, model):
    """A recipe file over the tiny model and a good file, guards off."""
    values = small_recipe(tmp_path / "out", model_name_or_path=str(model), dataset_name=str(_lines(tmp_path / "good.jsonl", GOOD)))
    del values["world"], values["pretrain"]
    values["sampling"]["max_new_tokens"] = 8
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_too_few_dev_prompts_are_told_before_any_compute(capsys, recipe, tmp_path):
    rows = [{"prompt": f"the {a} {b} {c}", "completion": f" {c}"} for a in ("cat", "dog") for b in ("red", "blue", "ran") for c in WORDS]
    many = _lines(tmp_path / "many.jsonl", rows)
    for verb in ("validate", "plan"):
        words = [verb, "--config", recipe, f"dataset_name={many}"]
        code, few, err = _run(capsys, *words, "data.dev_fraction=0.5")  # 18 of 36 prompts
        assert code == 0 and "18 dev prompts with a demonstration are too few for a judge (20 are needed)" in few, err
        code, enough, err = _run(capsys, *words, "data.dev_fraction=0.6")
        assert code == 0 and "too few" not in enough, err


def test_the_recipe_itself_runs(capsys, recipe, tmp_path):
    code, out, err = _run(capsys, "run", "--config", recipe)
    assert (code, err) == (0, "") and "no golden reward" in out and (tmp_path / "out/report.html").is_file()
    assert (tmp_path / "out/report.html").read_text().count("<script") == 1


@pytest.mark.parametrize("verb", ["run", "validate", "plan", "sft", "bon", "eval", "optimise distill"])
def test_a_bare_first_word_is_the_recipe(capsys, recipe, tmp_path, verb):
    words = verb.split()
    for suffix in ("yaml", "yml", "json"):
        bad = tmp_path / f"bad.{suffix}"
        bad.write_text(json.dumps({**yaml.safe_load(recipe.read_text()), "lucky": 1}))
        code, _, err = _run(capsys, *words, bad, "seed=1")
        assert code == 2 and f"bad.{suffix}:1: unknown key lucky" in err, err
    code, _, err = _run(capsys, *words, tmp_path / "recip.yaml")
    assert code == 2 and f"no such recipe\n  did you mean {recipe}" in err, err
    assert not (tmp_path / "out").exists()


def test_both_forms_of_naming_a_recipe_read_it(capsys, recipe):
    bare, named = _run(capsys, "validate", recipe, "seed=1"), _run(capsys, "validate", "seed=1", "--config", recipe)
    assert bare == named and bare[0] == 0 and bare != _run(capsys, "validate", recipe, "seed=2")


def test_the_optimise_verb_names_its_method(capsys, recipe, tmp_path):
    code, _, err = _run(capsys, "optimise", "sorcery", "--config", recipe)
    assert (
        code == 2
        and "optimise.method: expected 'distill', 'weighted-sft', 'dpo', 'spin', 'ditto', 'kto', 'gsil', 'rloo', 'grpo', 'rlsr', 'gad' or 'none', got 'sorcery'"
        in err
    )
    code, _, err = _run(capsys, "optimise", "--config", recipe)
    assert code == 2 and "METHOD is missing" in err and "weighted-sft, dpo" in err
    code, _, err = _run(capsys, "optimise", "dpo", "--config", recipe, "optimise.method=kto")
    assert code == 2 and "optimise.method=kto says it once more" in err and not (tmp_path / "out").exists()
    twice = _lines(tmp_path / "twice.jsonl", [*GOOD, *({**row, "completion": " a bird sat."} for row in GOOD)])
    assert _run(capsys, "optimise", "weighted_sft", "--config", recipe, f"dataset_name={twice}")[0] == 0  # as its page is called
    choice = json.loads((tmp_path / "out/optimise/choice.json").read_text())
    assert (choice["method"], choice["published"]) == ("weighted-sft", "sft") and "1 dev prompt with a demonstration is too few" in choice[
        "why"
    ]
    assert choice["demonstrations"] == 2
    assert _run(capsys, "optimise", "none", tmp_path / "out")[0] == 0 and not (tmp_path / "out/optimise").exists()


BAD_FILES = {
    "a malformed line": ([*GOOD[:2], '{"prompt": "x", '], "bad.jsonl:3: is not JSON"),
    "a missing column": ([*GOOD[:2], {"prompt": "the cat"}], "bad.jsonl:3: has no answer"),
    "no known column": ([{"question": "a", "reply": "b"}], "bad.jsonl:1: has no column 'prompt' (it has question, reply)"),
    "an empty completion": ([*GOOD[:2], {"prompt": "the cat", "completion": "  "}], "bad.jsonl:3: the answer is empty"),
    "no row": ([], "bad.jsonl: holds no rows"),
    "one prompt only": ([{"prompt": "the cat", "completion": f" {w}"} for w in WORDS], "bad.jsonl: holds one prompt only"),
    "identical demonstrations": ([{**row, "completion": " same."} for row in GOOD], "bad.jsonl: all demonstrations are identical"),
    "a number as the answer": ([{"prompt": "the cat", "completion": 3}], "bad.jsonl:1, completion: is a number, neither text"),
    "null as the prompt": ([{"prompt": None, "completion": "x"}], "bad.jsonl:1, prompt: is null, neither text"),
    "half a surrogate pair": ([*GOOD[:2], '{"prompt": "x \\ud83d", "completion": "y"}'], "bad.jsonl:3: holds half of a surrogate pair"),
    "a wrong role": ([{"messages": [{"role": "robot", "content": "x"}]}], "bad.jsonl:1, messages, message 1: role 'robot'"),
    "a row too long": ([*GOOD, {"prompt": "cat " * 80, "completion": " ran."}], "a row is too long"),
    "a question without an answer": ([{"messages": [{"role": "user", "content": "x"}]}], "bad.jsonl:1, messages: has no assistant turn"),
    "conversations for a model without a template": (
        [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]} for row in GOOD],
        "this model has no chat template",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(capsys, recipe, tmp_path, case):
    rows, message = BAD_FILES[case]
    bad = _lines(tmp_path / "bad.jsonl", rows)
    for verb in ("validate", "run"):
        code, out, err = _run(capsys, verb, "--config", recipe, f"dataset_name={bad}")
        assert code == 1 and message in err and "Traceback" not in err + out, err
        assert err.startswith("irlign: ") and ("\n  " in err or case == "no row"), err


BAD_KEYS = {
    "an unknown key": (["sft.learning_rat=1"], "unknown key sft.learning_rat\n  did you mean sft.learning_rate"),
    "a wrong type": (["seed=many"], "seed: expected"),
    "no override": (["fast"], "'fast' is no override\n  write key=value"),
    "a second recipe": (
        ["mine.yaml"],
        "'mine.yaml' is no override\n  one recipe: as the first word, or after --config: --config mine.yaml",
    ),
    "an ambiguous key": (["learning_rate=1"], "learning_rate stands in 4 sections"),
    "an unknown contrast": (["reward.contrast=init-expert"], "reward.contrast: expected 'init-sft'"),
    "preference without a file": (["reward.contrast=preference"], "needs preference_dataset_name"),
    "n over the pool": (["best_of_n.n=99"], "best_of_n.n=99 is more than sampling.num_generations=4"),
    "a budget over the pool": (["best_of_n.n=2", "best_of_n.budget=3"], "budget=3 is a mean number of answers, and a prompt has 2 at most"),
    "seeds that are none": (["seeds=4..1"], "names no seed"),
    "an unknown world": (["model_name_or_path=null", "dataset_name=null", "world=chess"], "no world 'chess'"),
    "nothing to run": (["model_name_or_path=null"], "model_name_or_path is missing"),
    "an unknown trainer field": (["sft.trainer={lerning_rate: 1}"], "TrainingArguments refuses it"),
    "an unknown tracker": (["report_to=nobody"], "no such tracker"),
    "an unknown chat template": (["data.chat_template=mine"], "no chat template 'mine'"),
    "an unknown engine": (["sampling.engine=warp"], "no engine 'warp'"),
    "a golden reward that is not there": (["evaluation.golden_reward=nothing:here"], "cannot be imported"),
}


def test_a_missing_chat_template_is_that_of_the_model_that_was_given(capsys, recipe, tmp_path, model):
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " ran."}]
    talk = _lines(tmp_path / "talk.jsonl", [{"messages": turns}, *GOOD])
    for verb in ("validate", "run"):
        code, _, err = _run(capsys, verb, recipe, f"dataset_name={talk}")
        assert code == 1 and err.startswith(f"irlign: {model}: the data holds conversations"), err
        assert "data.chat_template=chatml, hh, or the path" in err and "policies/init" not in err, err


def test_the_budget_is_an_option_of_bon(capsys, recipe):
    code, _, err = _run(capsys, "bon", "--config", recipe, "--budget", "99")
    assert code == 2 and "best_of_n.budget=99 is a mean number of answers, and a prompt has 4 at most" in err


@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_keys(capsys, recipe, case):
    words, message = BAD_KEYS[case]
    code, out, err = _run(capsys, "run", "--config", recipe, *words)
    assert code == 2 and message in err and "Traceback" not in err + out, err


@pytest.mark.parametrize("verb", ["run", "validate"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation.golden_reward=nothing:here"], "cannot be imported"),
        (["evaluation.golden_reward=./nowhere"], "no such model folder"),
        (["sampling.engine=warp"], "no engine 'warp'"),
        (["reward.trainer={lerning_rate: 1}"], "TrainingArguments refuses it"),
        (["sft.lr_scheduler_type=stairs"], "TrainingArguments refuses it"),
        (["report_to=nobody"], "no such tracker"),
        (["optimise.trainer={lerning_rate: 1}"], "optimise.trainer: TrainingArguments refuses it: there is no field 'lerning_rate'"),
        (["optimise.method=weighted-sft", "optimise.rounds=2"], "learns from demonstrations"),
        (["optimise.method=dpo", "optimise.trainer={btea: 1}"], "DPOConfig refuses it"),
        (
            ["optimise.method=rloo", "optimise.on_policy.num_generations=3"],
            "a step of 16 answers is no whole number of groups of 3",
        ),
        (["optimise.method=dpo", "optimise.answers=1"], "the best and the worst of a prompt's answers, and there is one"),
        (["optimise.max_steps=0"], "no step trains nothing"),
        (["optimise.method=grpo", "optimise.rounds=2"], "grpo draws its answers itself"),
        (["optimise.method=kto", "optimise.per_device_train_batch_size=1"], "estimates its KL over the rows of a batch"),
        (["sft_model_name_or_path=CLASSIFIER"], "no causal language model"),
        (["reward.kind=features", "reward.backbone=./nowhere"], "no such model folder"),
    ],
)
def test_bad_settings_are_found_before_any_compute(capsys, recipe, classifier, tmp_path, verb, words, message):
    words = [word.replace("CLASSIFIER", str(classifier)) for word in words]
    code, out, err = _run(capsys, verb, "--config", recipe, *words)
    assert code in (1, 2) and message in err and "Traceback" not in err + out, err
    assert not (tmp_path / "out").exists()


def test_bad_paths(capsys, recipe, tmp_path):
    for words, message in (
        (["--config", tmp_path / "recipe.yml"], "no such recipe\n  did you mean"),
        (["--config", recipe, "dataset_name=./nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--config", recipe, f"dataset_name={tmp_path}"], "is a folder, not a file"),
        (["--config", recipe, "model_name_or_path=./nowhere"], "no such model folder"),
        (["--config", recipe, f"model_name_or_path={tmp_path}"], "there is no config.json"),
        (["--config", recipe, "sft_model_name_or_path=./nowhere"], "no such model folder"),
        (["--config", recipe, "preference_dataset_name=./nowhere.jsonl", "reward.contrast=preference"], "no such file"),
    ):
        code, out, err = _run(capsys, "run", *words)
        assert code in (1, 2) and message in err and "Traceback" not in err + out, err


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A checkpoint with a head that generates no text."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=50, pad_token_id=3, **shape)).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def test_models_that_cannot_serve(capsys, recipe, classifier, tmp_path):
    without = make_tiny_policy(tmp_path / "no-eos", tokenizer=make_tiny_tokenizer(special=False))
    code, _, err = _run(capsys, "run", "--config", recipe, f"model_name_or_path={without}")
    assert code == 1 and "the tokenizer has no EOS token" in err
    code, _, err = _run(capsys, "run", "--config", recipe, f"model_name_or_path={classifier}")
    assert code == 1 and "no causal language model" in err


def test_a_model_that_never_ends(capsys, recipe, tmp_path):
    code, _, err = _run(capsys, "run", "--config", recipe, "sampling.max_cut_share=0.01", "sft.learning_rate=1e-9", "max_new_tokens=2")
    assert code == 1 and "sampling.max_cut_share=1 goes on" in err
    assert json.loads((tmp_path / "out/manifest.json").read_text())["stages"]["sft"]["status"] == "complete"


def test_training_that_diverges(capsys, recipe, tmp_path):
    code, _, err = _run(capsys, "run", "--config", recipe, "sft.learning_rate=1e30", "sft.num_train_epochs=5")
    assert code == 1 and "training has diverged" in err and "lower sft.learning_rate" in err


def test_an_output_folder_that_cannot_be_used(capsys, recipe, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = _run(capsys, "run", "--config", recipe, f"output_dir={tmp_path}/file/run")
    assert code == 1 and "output_dir that you can write to" in err
    (tmp_path / "mine/data").mkdir(parents=True)
    code, _, err = _run(capsys, "run", "--config", recipe, f"output_dir={tmp_path}/mine")
    assert code == 1 and "no manifest.json says that a run made it" in err


def test_a_full_disk(capsys, recipe, tmp_path, monkeypatch):
    import errno

    from irlign import files

    whole = files.os.replace

    def full(source, target):
        if str(target).endswith("candidates.parquet"):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    code, _, err = _run(capsys, "run", "--config", recipe)
    assert code == 1 and "no space left on the disk" in err and "stage bon" in err
    monkeypatch.undo()
    assert _run(capsys, "run", "--config", recipe)[0] == 0


def test_debug_shows_the_traceback(capsys, recipe):
    code, _, err = _run(capsys, "run", "--config", recipe, "dataset_name=./nowhere.jsonl", "--debug")
    assert code == 1 and "Traceback" in err and err.rstrip().splitlines()[-2].startswith("irlign: nowhere.jsonl")


def test_the_unexpected_is_one_line_too(capsys, recipe, monkeypatch):
    from irlign import inputs

    monkeypatch.setattr(inputs, "validate", lambda *_: 1 / 0)
    code, _, err = _run(capsys, "validate", "--config", recipe)
    assert code == 70 and err.startswith("irlign: unexpected ZeroDivisionError: division by zero\n") and "Traceback" not in err


def test_rewards_that_are_none(capsys, tmp_path):
    code, _, err = _run(capsys, "score", tmp_path, _lines(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl")
    assert code == 1 and "no reward.json here" in err and not (tmp_path / "out.jsonl").exists()


def test_the_reward_is_looked_at_first(capsys, tmp_path):
    code, _, err = _run(capsys, "score", tmp_path / "a", tmp_path / "b.jsonl", tmp_path / "c.jsonl")
    assert code == 1 and err.startswith(f"irlign: {tmp_path}/a: no reward.json here")


def test_a_run_directory_that_is_not_there(capsys, tmp_path):
    for verb in ("run", "report"):
        code, _, err = _run(capsys, verb, f"output_dir={tmp_path}/nowhere")
        assert code == 1 and "nowhere: no run directory is there" in err and not (tmp_path / "nowhere").exists()


def test_ctrl_c_says_that_the_run_can_go_on(capsys, recipe, monkeypatch):
    from irlign import pipeline

    monkeypatch.setattr(pipeline, "run", lambda *_: signal.raise_signal(signal.SIGINT))
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    try:
        code, _, err = _run(capsys, "run", "--config", recipe)
    finally:
        signal.signal(signal.SIGINT, found)
    assert (code, err) == (130, "irlign: interrupted; the same command goes on where it stopped\n")


def test_env_schema_and_help(capsys):
    assert "torch: 2" in _run(capsys, "env")[1]
    schema = json.loads(_run(capsys, "schema")[1])
    assert {"model_name_or_path", "world", "sft", "reward"} <= set(schema["properties"])
    text = _run(capsys, "--help")[1]
    assert all(
        verb in text
        for verb in ("run", "validate", "sft", "sample", "reward", "score", "bon", "optimise", "eval", "report", "plan", "env", "schema")
    )
    assert "irlign optimise METHOD [RECIPE | RUN] [KEY=VALUE]... [OPTIONS]" in _run(capsys, "optimise", "--help")[1]
    for verb in ("run", "validate", "plan", "sft", "bon", "eval", "report"):
        assert f"irlign {verb} [RECIPE | RUN] [KEY=VALUE]... [OPTIONS]\n" in _run(capsys, verb, "--help")[1]


def test_model_output_is_escaped(capsys, recipe, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["completion"] + " <script>alert(1)</script>"} for row in GOOD]
    assert _run(capsys, "run", "--config", recipe, f"dataset_name={_lines(tmp_path / 'script.jsonl', rows)}")[0] == 0
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;" in page


def test_sigterm_says_that_the_run_can_go_on(recipe, tmp_path):
    command = [sys.executable, "-m", "irlign", "run", "--config", str(recipe), "sft.num_train_epochs=5000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    manifest = Path(tmp_path / "out/manifest.json")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (manifest.exists() and '"sft"' in manifest.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert "goes on where it stopped" in process.stderr.read()
    assert json.loads(manifest.read_text())["stages"]["sft"]["status"] == "interrupted"
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_signal_is_told_even_where_a_library_makes_another_error_of_it(capsys, monkeypatch, number, code, word):
    def library():
        try:
            try:
                os.kill(os.getpid(), number)
            finally:
                raise RuntimeError("nothing to undo")
        except RuntimeError as error:
            raise RunError("cannot be read") from error

    monkeypatch.setattr("irlign.machine.environment", library)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores Ctrl-C
    try:
        assert _run(capsys, "env")[::2] == (code, f"irlign: {word}; the same command goes on where it stopped\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_exit_that_a_library_asks_for_is_no_interruption(capsys, monkeypatch):
    def library():
        try:
            sys.exit(3)
        except SystemExit as error:
            raise RunError("it ended", do="mend it") from error

    monkeypatch.setattr("irlign.machine.environment", library)
    assert _run(capsys, "env")[::2] == (1, "irlign: it ended\n  mend it\n")
