"""`irlign VERB`: each verb is one call into the pipeline. Nothing heavy is imported before a verb runs."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from irlign.errors import IrlignError, Terminated, interruption
from irlign.progress import hush

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Alignment of language models from demonstrations, through inverse reinforcement learning.",
    epilog="Every key of the recipe can be given as key=value. --debug shows the traceback of an error; IRLIGN_QUIET=1 silences progress.",
)
INTERRUPTED = 130  # typer turns a KeyboardInterrupt into an exit with this code
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Config = Annotated[str | None, typer.Option("--config", "-c", help="a recipe (YAML); a bare RECIPE needs no --config")]
Context = typer.Context
GIVEN = "[RECIPE | RUN] [KEY=VALUE]... [OPTIONS]"
WORDS: dict[str, Any] = {"context_settings": PASS_ON, "options_metavar": GIVEN}


def _given(context: Context, config: str | None) -> tuple[str | None, list[str]]:
    """The recipe, from --config or as a bare first word, and the overrides."""
    from irlign.config import RECIPES

    words = _overrides(context)
    bare = config is None and bool(words) and not words[0].startswith("-") and "=" not in words[0]
    return (words[0], words[1:]) if bare and Path(words[0]).suffix in RECIPES else (config, words)


def _overrides(context: Context) -> list[str]:
    """key=value words; a bare run directory stands for output_dir, --force for best_of_n.force."""
    words = ["best_of_n.force=true" if word == "--force" else word for word in context.args]
    return [f"output_dir={word}" if (Path(word) / "manifest.json").is_file() else word for word in words]


@app.command(**WORDS)
def run(context: Context, config: Config = None) -> None:
    """The whole chain, from demonstrations to the report; finished stages are skipped."""
    from irlign.pipeline import run as run_chain

    results = run_chain(*_given(context, config))
    for line in results["headline"]:
        typer.echo(line)


@app.command(context_settings=PASS_ON)
def init(context: Context, file: Annotated[str, typer.Argument(help="the recipe to write")] = "recipe.yaml") -> None:
    """A commented recipe from a few questions, written to FILE; key=value answers one, and without a terminal none is asked."""
    from irlign.first_recipe import named, write_recipe

    words = [*([file] if "=" in file or file.startswith("-") else []), *context.args]
    path = Path("recipe.yaml" if words[:1] == [file] else file)
    missing = write_recipe(path, words, _ask if sys.stdin.isatty() else None)
    for line in (*(f"{path}: {key} has no value yet" for key in missing), f"{path}: written. Next: irlign validate {named(path)}"):
        typer.echo(line)


@app.command(**WORDS)
def validate(context: Context, config: Config = None) -> None:
    """Look at the data before any compute: rows, lengths, cuts, EOS, overlap, a decoded example with its loss mask."""
    from irlign.inputs import validate as check

    text, problem = check(*_given(context, config))
    typer.echo(text)
    if problem is not None:
        raise problem


@app.command(**WORDS)
def plan(
    context: Context,
    config: Config = None,
    flops: Annotated[float | None, typer.Option(help="operations a second of this machine (3.5e14), instead of measuring them")] = None,
    prompts: Annotated[int | None, typer.Option(help="plan for so many prompts, without the data file")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(help="mean tokens of a prompt, with --prompts")] = None,
    answer_tokens: Annotated[float | None, typer.Option(help="mean tokens of an answer, with --prompts")] = None,
) -> None:
    """What a RECIPE will cost before any compute: tokens, FLOPs, time, memory, disk of every stage. Loads no weights."""
    from irlign.plan import plan as plan_run

    about: dict[str, Any] = {"flops": flops, "prompts": prompts, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
    typer.echo(plan_run(*_given(context, config), **about))


def _ask(question: str, default: str) -> str:
    return str(typer.prompt(question, default, show_default=bool(default)))


def _stage(name: str, text: str) -> None:
    """One verb for one stage."""

    def verb(context: Context, config: Config = None) -> None:
        from irlign.pipeline import run_stage

        run_stage(name, *_given(context, config))

    app.command(name, help=text, **WORDS)(verb)


_stage("sft", "Fine-tune on the demonstrations: policies/sft.")
_stage("sample", "Draw the pools of pi_0 and pi_SFT: pools/.")
_stage("reward", "Learn the inverse-RL reward model: rewards/.")


@app.command()
def score(reward: str, file: str, output: str) -> None:
    """Score the answers in FILE with the reward in the folder REWARD (rewards/NAME of a run); JSON Lines to OUTPUT."""
    from irlign.optimise.scoring import score_file

    typer.echo(f"{output}: {score_file(reward, file, output)} rows")


@app.command(**WORDS)
def bon(
    context: Context,
    config: Config = None,
    budget: Annotated[float | None, typer.Option(help="mean answers a prompt, each as many as it deserves; by default n for all")] = None,
) -> None:
    """Best-of-N: score the candidates and select: best_of_n/."""
    from irlign.pipeline import run_stage

    config, words = _given(context, config)
    run_stage("bon", config, [*words, *([] if budget is None else [f"best_of_n.budget={budget}"])])


@app.command(context_settings=PASS_ON, options_metavar=f"METHOD {GIVEN}")
def optimise(
    context: Context,
    method: Annotated[str, typer.Argument(hidden=True)] = "",  # the usage line has it, before the recipe
    config: Config = None,
) -> None:
    """From the reward to a policy that needs none at inference, in policies/aligned. METHOD is distill, weighted-sft, dpo, spin, ditto, kto,
    gsil, rloo, grpo, rlsr or gad; none leaves the stage out."""
    from irlign.config import RECIPES
    from irlign.errors import ConfigError
    from irlign.optimise.settings import NAMES
    from irlign.pipeline import run_stage

    if not method:
        raise ConfigError("METHOD is missing", do=f"irlign optimise METHOD ..., one of {', '.join(NAMES)}")
    if method.replace("_", "-") in NAMES:
        method = method.replace("_", "-")
    if method.endswith(RECIPES):
        raise ConfigError(f"{method!r} is a recipe, and METHOD comes first", do=f"irlign optimise distill {method}")
    config, words = _given(context, config)
    if named := next((word for word in words if word.startswith("optimise.method=")), None):
        raise ConfigError(
            f"METHOD is {method}, and {named} says it once more", do="leave out one of them: METHOD comes right after `irlign optimise`"
        )
    run_stage("optimise", config, [*words, f"optimise.method={method}"])


@app.command("eval", **WORDS)
def evaluate(
    context: Context,
    config: Config = None,
    judge: Annotated[
        str | None, typer.Option(help="address of an OpenAI-compatible endpoint whose model compares answers in pairs")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="that model's name there")] = None,
    lm_eval: Annotated[str | None, typer.Option(help="tasks of lm-evaluation-harness for the policies, comma-separated")] = None,
    reward_bench: Annotated[
        list[str] | None, typer.Option(help="a file of prompt, chosen, rejected and subset to try the reward on; may be given again")
    ] = None,
    golden: Annotated[list[str] | None, typer.Option(help="a further golden reward; may be given again")] = None,
) -> None:
    """Measure on the test prompts: evaluation/results.json."""
    from irlign.pipeline import run_stage

    asked: dict[str, Any] = {"judge.base_url": judge, "judge.model": judge_model, "reward_bench": reward_bench}
    asked |= {"lm_eval.tasks": lm_eval.split(",") if lm_eval else None, "other_golden_rewards": golden}
    config, words = _given(context, config)
    run_stage("eval", config, [*words, *(f"evaluation.{key}={_yaml(value)}" for key, value in asked.items() if value)])


def _yaml(value: str | list[str]) -> str:
    """A value as a word of the command line holds it."""
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_stage("report", "Write report.html.")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="run directories; the others are compared with the first")],
    output: Annotated[str, typer.Option("--output", "-o", help="where the page goes")] = "compare.html",
) -> None:
    """Several finished runs on one page: what each gives, paired differences, alarms, the settings that differ."""
    from irlign.compare import compare_runs

    for line in [*compare_runs(runs, Path(output)), f"The page: {output}"]:
        typer.echo(line)


@app.command(context_settings=PASS_ON)
def arena(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="reference (the leaderboard), or a study by its name")] = "reference",
    output_dir: Annotated[str, typer.Option("--output-dir", "-o", help="where the cells and the table go")] = "runs/arena",
    seeds: Annotated[str | None, typer.Option(help="0..9, or 0,3,5; by default the study's own")] = None,
    rows: Annotated[str | None, typer.Option(help="methods by name, comma-separated, * for anything; by default the study's own")] = None,
    only: Annotated[str | None, typer.Option(help="settings by name, such as 'arithmetic*'")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small cells and two seeds: does everything run?")] = False,
    jobs: Annotated[int | None, typer.Option(help="cells side by side, one thread each; by default one a core")] = None,
    config: Annotated[
        str | None, typer.Option(help="a recipe with a golden reward: the methods on one's own data, key=value over it")
    ] = None,
) -> None:
    """Every method on every world, dial setting and seed, against the true reward: one table, one page."""
    from irlign.arena.studies import run_study

    of = {"seeds": seeds, "rows": rows, "only": only, "quick": quick, "jobs": jobs, "config": config}
    words = [*([study] if "=" in study else []), *_overrides(context)]
    for line in run_study("reference" if "=" in study else study, Path(output_dir), **of, overrides=words):  # type: ignore[arg-type]
        typer.echo(line)


@app.command()
def serve(
    run: Annotated[str, typer.Argument(help="the run directory")],
    host: Annotated[str, typer.Option(help="the address to listen at; this machine alone by default")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    policy: Annotated[
        str | None, typer.Option(help="aligned (the default where one was published) or best-of-n, of the SFT policy")
    ] = None,
    n: Annotated[int | None, typer.Option(min=1, help="answers to choose among; by default the run's own label-free n")] = None,
    name: Annotated[str | None, typer.Option(help="the model's name for clients; by default that of the policy")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="draw at this OpenAI-compatible address (http://HOST:PORT/v1), and select here")
    ] = None,
    upstream_model: Annotated[str | None, typer.Option(help="the policy's name at the upstream")] = None,
    force: Annotated[bool, typer.Option("--force", help="allow more answers to choose among than the judge would")] = False,
    api_key_env: Annotated[str | None, typer.Option(help="the variable that holds the API key, by default IRLIGN_API_KEY")] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="requests that may wait; more are told to come back (429)")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="answers drawn together")] = 256,
    max_answers: Annotated[int, typer.Option(min=1, help="answers drawn for one request")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of one answer")] = 4096,
    max_body: Annotated[int, typer.Option(min=1, help="bytes of one request")] = 1 << 20,
) -> None:
    """An OpenAI-compatible endpoint that answers with the aligned policy, or with Best-of-N under the run's reward."""
    from irlign.serve import Limits, Wanted
    from irlign.serve import serve as serve_run

    limits = Limits(max_waiting, max_batch, max_answers, max_tokens, max_body)
    serve_run(run, host, port, Wanted(policy, n, name, upstream, upstream_model, force), limits, api_key_env)


@app.command()
def env() -> None:
    """Versions, devices and memory, ready to paste into a bug report."""
    from irlign.machine import environment

    for key, value in environment().items():
        typer.echo(f"{key}: {', '.join(value) or 'none' if isinstance(value, list) else value}")


@app.command()
def schema() -> None:
    """The JSON Schema of a recipe."""
    import json

    from irlign.config import recipe_schema
    from irlign.recipe import Recipe

    typer.echo(json.dumps(recipe_schema(Recipe), indent=2))


def main(arguments: list[str] | None = None) -> None:
    """The entry point: one clear line for an error, and an exit code that says which kind."""
    hush()
    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(args=[word for word in words if word != "--debug"], prog_name="irlign")
    except BaseException as raised:
        error = interruption(raised) or raised
        if "--debug" in words and not _is_exit(error):
            import traceback

            traceback.print_exception(error)
        sys.exit(_told(error))


def _told(error: BaseException) -> Any:
    """The exit code of what ended the command; what the user has to know of it is printed."""
    if _is_exit(error):
        return error.code  # type: ignore[attr-defined]
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    text, code = "irlign: interrupted; the same command goes on where it stopped", INTERRUPTED
    if isinstance(error, IrlignError):
        text, code = f"irlign: {error}", error.exit_code
    elif isinstance(error, Exception):
        line = (str(error).strip() or "no message").splitlines()[0]
        text = f"irlign: unexpected {type(error).__name__}: {line}\n  --debug shows the traceback; `irlign env` says what to report with it"
        code = 70
    print(text, file=sys.stderr, flush=True)
    return code


def _is_exit(error: BaseException) -> bool:
    """Whether this is an exit that has said all there is to say; typer makes one of Ctrl-C too, which has not."""
    return isinstance(error, SystemExit) and error.code != INTERRUPTED


def _terminate(number: int, frame: FrameType | None) -> Any:
    """SIGTERM ends the process like an error does, so that the run directory says that it was interrupted."""
    print("irlign: terminated; the same command goes on where it stopped", file=sys.stderr, flush=True)
    raise Terminated(128 + number)
