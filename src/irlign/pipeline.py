"""The method on one page: one function for each stage, and `run`, which calls them in order.

    init -> data -> sft -> sample -> reward -> bon -> optimise -> eval -> report

With stored samples (`pools`) the chain is data -> sample (the files become the pools) -> reward -> bon -> eval -> report.
Stages meet only through files of the run directory (docs/run_directory.md). A finished stage whose settings and inputs
have not changed is skipped (bon, optimise and eval say what they came to all the same); a changed one runs again, and so does what follows from it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from irlign import __version__
from irlign.black_box import pool_files, selection_source, take_pools, why_no_judge
from irlign.data.checks import read_notes
from irlign.data.splits import stored_demonstrations, stored_prompts
from irlign.files import read_json, write_json, write_rows, write_table
from irlign.inputs import contrast_answers, read_splits, take_checkpoint
from irlign.launch import launch
from irlign.optimise.label_free import JUDGE
from irlign.optimise.safety_net import RULE
from irlign.optimise.work import stage_of
from irlign.preflight import check_stage, judge_note, preflight
from irlign.progress import say
from irlign.recipe import Recipe, as_recipe, stored_recipe
from irlign.records import SPLITS
from irlign.runs import Run
from irlign.sampling.given import beside_selection
from irlign.sampling.pools import stored_samples
from irlign.summary import sources, stand_ins, summary

Config = str | Path | Mapping[str, Any] | Recipe | None


def init(recipe: Recipe, run: Run) -> None:
    """pi_0 in policies/init: pretrained on the world's corpus (stage `pretrain`), or the given checkpoint (stage `init`)."""
    if recipe.pools:
        return None
    world = recipe.world
    if world is None:
        return take_checkpoint(recipe, run, "init", str(recipe.model_name_or_path))

    def build(folder: Path) -> dict[str, Any]:
        from irlign.policy.pretrain import pretrain

        return pretrain(
            world.corpus(run.seed),
            world.vocabulary(),
            recipe.pretrain,
            chat_template=world.chat_template,
            folder=folder / "policies/init",
            checkpoints=folder / "checkpoints",
            seed=run.seed,
        )

    run.do("pretrain", build, settings={"world": world, "pretrain": recipe.pretrain}, outputs=["policies/init"])
    return None


def data(recipe: Recipe, run: Run) -> None:
    """Demonstrations split by prompt: train for SFT and reward, dev for every choice, test for evaluation only."""

    def build(folder: Path) -> dict[str, Any]:
        splits, notes = read_splits(recipe, str(run.path("policies/init")))
        rows = {split: len(splits[split]) for split in SPLITS}
        for split in SPLITS:
            write_table(folder / f"data/{split}.parquet", [d.to_row() for d in splits[split]])
        for line in [
            *read_notes(notes),
            ", ".join(f"{n} {split}" for split, n in rows.items()),
            *stand_ins(notes),
            *judge_note(recipe, splits),
        ]:
            say(f"data: {line}")
        return {"files": notes, "prompts": {s: len({d.prompt.prompt_id for d in splits[s]}) for s in SPLITS}, "rows": rows}

    given = {key: getattr(recipe, key) for key in ("dataset_name", "eval_dataset_name", "prompt_dataset_name")}
    pools = pool_files(recipe)
    settings = {"data": recipe.data, "world": recipe.world, "max_new_tokens": recipe.sampling.max_new_tokens, **given, **pools}
    run.do(
        "data",
        build,
        settings=settings,
        inputs={**_policies(recipe, "init"), **{key: name for key, name in {**given, **pools}.items() if name}},
        outputs=[f"data/{split}.parquet" for split in SPLITS],
    )


def sft(recipe: Recipe, run: Run) -> None:
    """pi_SFT in policies/sft: forward KL on the train demonstrations, or the SFT model the user already has."""
    if recipe.pools:
        return None
    if recipe.sft_model_name_or_path:
        return take_checkpoint(recipe, run, "sft", recipe.sft_model_name_or_path)

    def build(folder: Path) -> dict[str, Any]:
        from irlign.policy.sft import publish_card, train_sft

        log = launch(
            recipe.processes,
            train_sft,
            run.path("policies/init"),
            stored_demonstrations(run, "train"),
            stored_demonstrations(run, "dev"),
            recipe.sft,
            chat_template=recipe.data.chat_template,
            folder=folder / "policies/sft",
            checkpoints=folder / "checkpoints",
            seed=run.seed,
            report_to=recipe.report_to,
        )
        start, shown = sources(recipe)
        about = {"start": start, "data": shown, "chat_template": recipe.data.chat_template, "version": __version__}
        publish_card(folder / "policies/sft", log, recipe.sft, **about)
        return log

    run.do(
        "sft",
        build,
        settings={"sft": recipe.sft, "chat_template": recipe.data.chat_template, **recipe.processes.identity},
        inputs=_inside("policies/init", "data/train.parquet", "data/dev.parquet"),
        outputs=["policies/sft", *(f"policies/{name}" for name in recipe.sft.kept)],
    )
    return None


def sample(recipe: Recipe, run: Run) -> None:
    """Pools of pi_0 and pi_SFT, by the same engine: train prompts for the reward, dev and test prompts for evaluation. Pools of
    earlier checkpoints are for the reward alone: train and dev."""
    if recipe.pools:
        return take_pools(recipe, run, stored_prompts(run))
    settings, earlier = recipe.sampling, list(recipe.sft.kept)

    def build(folder: Path) -> dict[str, Any]:
        from irlign.sampling.pools import draw_pool, guard_finished, publish_card

        statistics = {}
        sizes = {name: {"dev": settings.initial_generations} for name in ("init", *earlier)} | {"sft": {"dev": settings.num_generations}}
        for name in ("init", "sft"):
            sizes[name]["test"] = sizes[name]["dev"]
        for name, held_out in sizes.items():
            wanted = [(p, {"train": settings.train_generations, **held_out}.get(p.split, 0)) for p in stored_prompts(run)]
            statistics[name] = draw_pool(
                run.path("policies", name),
                wanted,
                settings,
                chat_template=recipe.data.chat_template,
                folder=folder / f"pools/{name}.parquet",
                seed=run.seed,
                name=name,
            )
            finished, tokens = 1 - statistics[name]["completions/clipped_ratio"], statistics[name]["completions/mean_length"]
            say(f"sample {name}: {finished:.0%} finished, {tokens:.1f} tokens each")
            publish_card(folder / f"pools/{name}.parquet", name, statistics[name], settings)
        guard_finished(statistics["sft"], settings)
        return statistics

    run.do(
        "sample",
        build,
        settings={"sampling": settings.identity, "chat_template": recipe.data.chat_template},
        inputs=_inside(*(f"policies/{name}" for name in ("init", "sft", *earlier)), *(f"data/{s}.parquet" for s in SPLITS)),
        outputs=[f"pools/{name}.parquet" for name in ("init", "sft", *earlier)],
    )
    return None


def reward(recipe: Recipe, run: Run) -> None:
    """The inverse-RL reward model in rewards/CONTRAST (method.md section 3), and the log-ratios, the baselines without training."""
    settings, template, preferences, names = recipe.reward, recipe.data.chat_template, recipe.preference_dataset_name, recipe.rewards
    own_policy = settings.backbone in ("sft", "init")
    inputs = _inside("pools/init.parquet", "pools/sft.parquet", "data/train.parquet", "data/dev.parquet")
    inputs |= _policies(recipe, "init", "sft") | _inside(*(f"pools/{name}.parquet" for name in recipe.sft.kept))
    inputs |= {} if own_policy else {"backbone": settings.backbone}
    inputs |= {"preference_dataset_name": preferences} if preferences else {}
    reading = {"data": recipe.data} if preferences else {}

    def build(folder: Path) -> dict[str, Any]:
        from irlign.reward.contrasts import contrast_pairs, describe_pairs, guard_leak, leak_controls
        from irlign.reward.features import known_features
        from irlign.reward.learn import train_reward_of
        from irlign.reward.publish import publish_log_ratios, publish_reward

        match, hashes = settings.ending == "match", run.input_hashes(inputs)
        pairs, left_out, controls = contrast_pairs(contrast_answers(recipe, run, "train"), match=match)
        dev, _, _ = contrast_pairs(contrast_answers(recipe, run, "dev"), match=match, needed=False)
        for line in describe_pairs(pairs, left_out, controls):
            say(f"reward: {line}")
        for own in pairs.values():
            guard_leak(leak_controls(own), settings.max_leak_accuracy, len(own))
        backbone = run.path("policies", settings.backbone) if own_policy else Path(settings.backbone)
        target = folder / "rewards" / settings.name
        log = train_reward_of(
            settings,
            backbone,
            pairs,
            dev,
            folder=target,
            checkpoints=folder / "checkpoints",
            chat_template=template,
            seed=run.seed,
            report_to=recipe.report_to,
            features=known_features(backbone, template, run.path("rewards")) if settings.kind == "features" else None,
            encoder=f"../../policies/{settings.backbone}" if own_policy else None,
            processes=recipe.processes,
        )
        about = {"ending": settings.ending, "controls": controls, "left_out": left_out, "inputs": hashes}
        publish_reward(target, {**log, **about}, __version__)
        if names[1:]:
            publish_log_ratios(folder / "rewards", names[1:], hashes, chat_template=template, seed=run.seed)
        return {"controls": controls, "left_out": left_out, "pairs": log["pairs"], "dev": log["dev"]}

    stated = {"reward": settings, "chat_template": template, "preference_dataset_name": preferences, **reading}
    stated |= {} if settings.kind == "features" else recipe.processes.identity
    run.do("reward", build, settings=stated, inputs=inputs, outputs=[f"rewards/{name}" for name in names])


def bon(recipe: Recipe, run: Run) -> None:
    """Best-of-N: every reward scores pi_SFT's pool on dev and test prompts; the trained reward held to what pi_SFT finds likely, or that
    likelihood alone, selects among as many answers as a judge that neither has met allows on dev (method.md section 9, last point), or
    with a budget among as many of those as each prompt deserves (optimise/adaptive.py)."""
    settings, selectors, source = recipe.best_of_n, recipe.selectors, selection_source(recipe, run)

    def build(folder: Path) -> dict[str, Any]:
        from irlign.optimise.adaptive import answers_used
        from irlign.optimise.best_of_n import candidate_rows, scored_texts, select
        from irlign.optimise.heldout import judge_pool
        from irlign.optimise.label_free import choice_of, guard_n
        from irlign.optimise.scoring import scores_of
        from irlign.reward.controls import length
        from irlign.reward.publish import held_to_likelihood, publish_held

        pool, initial = stored_samples(run, source.pool, "dev", "test"), stored_samples(run, "init", "dev")
        shown, texts = stored_demonstrations(run, "dev"), scored_texts(pool)
        scores = scores_of({name: run.path("rewards", name) for name in recipe.rewards}, *texts, recipe.sampling, folder / "scores")
        if weight := settings.likelihood:
            learned, dev = recipe.reward.name, [s.prompt.prompt_id if s.prompt.split == "dev" else None for s in pool]
            scores[selectors[0]], scales = held_to_likelihood(scores[learned], scores["likelihood"], dev, weight)
            publish_held(folder / "rewards", selectors[0], run.path("rewards", learned), scales, weight)
        no_judge = why_no_judge(source.reads, shown)
        verdicts = judge_pool(source.reads, pool, initial, [] if no_judge else shown, chat_template=recipe.data.chat_template)
        rows = candidate_rows(pool, {**scores, "length": length(*texts)}, verdicts.logits, verdicts.style)
        about: dict[str, Any] = {"judge_auc": verdicts.auc, "kept": source.kept, "no_judge": no_judge}
        choice = choice_of(rows, selectors, settings.n, demonstrations=shown, **about)
        guard_n(choice, settings.force)
        used, choice["adaptive"] = answers_used(rows, choice, settings.budget)
        selected = select(rows, choice["reward"], used)
        if recipe.pools:
            selected = beside_selection(run.path(f"pools/{source.pool}.parquet"), selected)
        write_table(folder / "best_of_n/candidates.parquet", rows)
        write_rows(folder / "best_of_n/selected.jsonl", selected)
        write_json(folder / "best_of_n/choice.json", choice)
        return {"candidates": len(rows), "selected": len(selected), **{key: choice[key] for key in ("reward", "n", "why")}}

    stated = {"n": settings.n, "budget": settings.budget, "selectors": selectors, "likelihood": settings.likelihood, "judge": JUDGE}
    pools = dict.fromkeys((f"pools/{source.pool}.parquet", "pools/init.parquet", "data/dev.parquet"))
    run.do(
        "bon",
        build,
        settings={**stated, "chat_template": recipe.data.chat_template},
        inputs=_inside(*pools, *(f"rewards/{name}" for name in recipe.rewards))
        | (_policies(recipe, "init") or {"backbone": str(source.reads)}),
        outputs=["best_of_n", *([f"rewards/{selectors[0]}"] if settings.likelihood else [])],
    )
    choice = read_json(run.path("best_of_n/choice.json"))
    say(f"bon: {choice['reward']}, n = {choice['n']}: {choice['why']}")
    if settings.budget is not None and settings.budget >= choice["n"]:
        say(f"bon: best_of_n.budget={settings.budget:g} is not below n = {choice['n']}, so it changes nothing")
    elif choice["adaptive"]:
        say("bon: of these a prompt uses " + ", ".join(f"{n:.2f} on {split}" for split, n in choice["adaptive"]["n"].items()))


def optimise(recipe: Recipe, run: Run, name: str = "aligned") -> None:
    """From the reward to a policy that needs none at inference, in policies/aligned: the candidate of `optimise.method` that the judge of
    held-out demonstrations and the reward that selects both show to beat pi_SFT, and pi_SFT itself where there is none
    (optimise/safety_net.py). Under another name it is published beside it, by a stage of its own."""
    settings, template, stage = recipe.optimise, recipe.data.chat_template, stage_of(name)
    if settings.method == "none":
        run.do(stage, lambda folder: None, settings={"method": "none"})  # takes back what an earlier recipe published
        return
    selector = read_json(run.path("best_of_n/choice.json"))["reward"]
    here = recipe.sampling.by_weights  # an endpoint does not know the weights of a candidate
    # the reward is trained anew, as it was trained before, or a discriminator of tokens beside it
    again = settings.refresh != "none" or settings.on_policy.dense == "discriminator"
    learning = {"learning": recipe.reward, "likelihood": recipe.best_of_n.likelihood} if again else {}
    models = {"backbone": recipe.reward.backbone} if again and recipe.reward.backbone not in ("sft", "init") else {}
    models |= {"encoder": settings.on_policy.encoder} if settings.method == "rlsr" and settings.on_policy.encoder != "words" else {}

    def build(folder: Path) -> dict[str, Any]:
        from irlign.optimise.align import align
        from irlign.optimise.work import Work

        say(f"{stage}: {settings.in_words}")
        own = recipe.processes, name, recipe.reward, recipe.best_of_n.likelihood, recipe.sampling.here.engine == here.here.engine
        choice = align(Work(run, settings, here, selector, template, folder, recipe.report_to, *own), __version__)
        return {key: choice[key] for key in ("method", "published", "why")}

    run.do(
        stage,
        build,
        settings={
            "optimise": settings.identity,
            "sampling": here.identity,
            "reward": selector,
            "judge": JUDGE,
            "safety_net": RULE,
            "chat_template": template,
            **learning,
            **recipe.processes.identity,
        },
        inputs=_inside(
            *("best_of_n/candidates.parquet", "pools/sft.parquet", "pools/init.parquet", "data/train.parquet", "data/dev.parquet"),
            *("policies/sft", "policies/init", *(f"rewards/{name}" for name in dict.fromkeys((recipe.reward.name, *recipe.selectors)))),
        )
        | models,
        outputs=[f"policies/{name}", f"pools/{name}.parquet", stage],
    )
    choice = read_json(run.path(stage, "choice.json"))
    say(f"{stage}: {choice['published']} is published: {choice['why']}")


def evaluate(recipe: Recipe, run: Run) -> None:
    """Evidence on the test prompts: golden reward where there is one, held-out measures, intervals and tests."""
    from irlign.evaluate.golden import golden_inputs

    others, asked = recipe.evaluation.other_golden_rewards, recipe.evaluation.lm_eval is not None
    spec, world, better = recipe.evaluation.golden_reward, recipe.world, bool(recipe.pools and recipe.pools.candidates)
    name = spec or (f"the golden reward of the {world.name} world" if world else "none")
    aligned = [] if recipe.optimise.method == "none" else ["optimise", "pools/aligned.parquet"]

    def build(folder: Path) -> dict[str, Any]:
        from irlign.evaluate.golden import guard_golden, load_golden
        from irlign.evaluate.results import measure

        for given in (spec, *others):
            guard_golden(given, [run.path(name) for name in ("rewards", "policies", "optimise")])
        golden = load_golden(spec) if spec else world.golden if world else None
        more = {other: load_golden(other) for other in others}
        about = summary(recipe, run)
        results, rows = measure(run, recipe.reward.name, golden, name, recipe.evaluation, about, bool(aligned), better, more)
        write_json(folder / "evaluation/results.json", results)
        write_table(folder / "evaluation/prompts.parquet", rows)
        return {"headline": results["headline"]}

    run.do(
        "eval",
        build,
        settings={"evaluation": recipe.evaluation, "world": world},
        inputs={
            **_inside("best_of_n", "pools/init.parquet", "data/test.parquet", *aligned, *(["pools/sft.parquet"] if better else [])),
            **_inside(*(f"rewards/{name}" for name in dict.fromkeys((recipe.reward.name, *recipe.selectors)))),
            **golden_inputs(spec),
            **{f"other_golden_rewards {other}": of for other in others for of in golden_inputs(other).values()},
            **{f"reward_bench {file}": file for file in recipe.evaluation.reward_bench},
            **(_policies(recipe, "init", "sft", *(["aligned"] if aligned else [])) if asked else {}),
        },
        outputs=["evaluation"],
    )
    results = read_json(run.path("evaluation/results.json"))
    for line in [*results["headline"], *(f"ALARM, {a['name']}: {a['seen']}. {a['do']}" for a in results["alarms"])]:
        say(f"eval: {line}")


def report(recipe: Recipe, run: Run) -> None:
    """report.html: the answer first, then what it rests on."""

    def build(folder: Path) -> None:
        from irlign.report import write_report

        write_report(run.root, folder / "report.html")

    run.do("report", build, inputs=_inside("evaluation", "best_of_n"), outputs=["report.html"])
    say(f"report: {run.path('report.html')}")


STAGES: dict[str, Callable[[Recipe, Run], None]] = {
    "init": init,
    "data": data,
    "sft": sft,
    "sample": sample,
    "reward": reward,
    "bon": bon,
    "optimise": optimise,
    "eval": evaluate,
    "report": report,
}


def run(config: Config = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The whole chain: every stage in order, finished ones skipped. Returns the contents of evaluation/results.json.

    `config` is a recipe file, a mapping of its keys, or a Recipe; `overrides` are `key=value` texts. With `seeds` it runs
    each in OUT/seed-K, writes one table over them (OUT/seeds.json, OUT/seeds.html) and returns that. Without `config`, the
    recipe that the run directory holds is taken. Settings that no stage could use are errors before anything is computed.
    """
    recipe = as_recipe(config if config is not None else stored_recipe(overrides), overrides)
    preflight(recipe)
    if recipe.seeds is not None:
        from irlign.seeds import write_seeds

        root, results = Path(recipe.output_dir), {}
        for seed in recipe.seeds:
            one = recipe.model_copy(update={"seed": seed, "seeds": None, "output_dir": str(root / f"seed-{seed}")})
            say(f"seed {seed}: {one.output_dir}")
            results[seed] = run(one)
        return write_seeds(root, results)
    with Run.open(recipe.output_dir, recipe) as here:
        for stage in STAGES.values():
            stage(recipe, here)
        return read_json(here.path("evaluation/results.json"))


def run_stage(name: str, config: Config = None, overrides: Sequence[str] = ()) -> Path:
    """One stage on the files of a run directory. Returns the run directory.

    Stages before it run only where their outputs are missing or out of date. Without `config`, the recipe that the
    run directory holds is taken, so that `irlign reward output_dir=RUN reward.loss=bradley-terry` is enough.
    """
    recipe = as_recipe(config if config is not None else stored_recipe(overrides), overrides)
    check_stage(name, recipe)
    with Run.open(recipe.output_dir, recipe) as here:
        for stage, function in STAGES.items():
            function(recipe, here)
            if stage == name:
                break
        if here.outdated("eval"):
            say(f"the evaluation and the report are of before this: irlign report output_dir={here.root} brings them up to date")
        return here.root


def _policies(recipe: Recipe, *names: str) -> dict[str, str]:
    """The policies of the run as inputs of a stage; none where samples are given in their place."""
    return {} if recipe.pools else _inside(*(f"policies/{name}" for name in names))


def _inside(*paths: str) -> dict[str, str]:
    """Inputs that are the run's own: each labelled with its path."""
    return {path: path for path in paths}
