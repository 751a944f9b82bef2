"""What draws samples: the Engine protocol and the choice by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from irlign.config import PassOn, Settings
from irlign.endpoint import EndpointSettings, Url, check_client
from irlign.errors import ConfigError
from irlign.records import Prompt, Sample

ENGINES = ("transformers", "openai", "vllm", "cluster")
NO_MATTER = ("max_concurrency", "timeout_s", "max_retries", "price_in", "price_out", "api_key_env")  # they change no answer


class ServedSettings(Settings):
    """A policy that is a name at a server; a plain name stands for `{model: name}`."""

    model: str = Field(description="the model's name at the endpoint")
    base_url: Url | None = Field(None, description="address of its own, where another server has it; null = sampling.openai.base_url")

    @model_validator(mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class OpenAISettings(EndpointSettings):
    """engine=openai: answers from any OpenAI-compatible endpoint, a vLLM server or a hosted model."""

    policies: dict[str, ServedSettings] = Field(
        default_factory=dict, description="which model at the endpoint each policy is: {init: NAME, sft: NAME}"
    )
    endpoint: Literal["chat", "completions"] = Field(
        "chat", description="chat: the server's own chat template; completions: the prompt's tokens as this run's template makes them"
    )
    logprobs: bool = Field(
        True,
        description="ask for log-probabilities; kept at temperature 1 without top_p and top_k, where all endpoints mean the same by them",
    )

    def served(self, policy: str) -> ServedSettings:
        """The model that stands for a policy of the run. Raises ConfigError where none does."""
        if policy not in self.policies:
            do = f"say so: {{{policy}: NAME, ...}}; a recipe in YAML is the place for it"
            raise ConfigError(f"which model at the endpoint is {policy}?", where="sampling.openai.policies", do=do)
        return self.policies[policy]


class VLLMSettings(Settings):
    """engine=vllm: vLLM in a process of its own."""

    python: str | None = Field(None, description="the Python that has vLLM; null = $IRLIGN_VLLM_PYTHON, or the one that runs this")
    args: PassOn = Field(default_factory=dict, description="passed on to vLLM's LLM(...): {gpu_memory_utilization: 0.7, ...}")


class ClusterSettings(Settings):
    """engine=cluster: the parts of a pool spread over a Ray cluster, and scoring too."""

    engine: Literal["transformers", "vllm", "openai"] = Field("transformers", description="what draws the samples on each worker")
    address: str | None = Field(
        None, description="the cluster's address; null = $RAY_ADDRESS, the cluster that runs here, or one started on this machine"
    )
    num_workers: int | None = Field(None, ge=1, description="workers side by side; null = as many as fit on the nodes")
    num_cpus: float = Field(1.0, gt=0, description="cores, and threads, of each worker")
    num_gpus: float | None = Field(None, ge=0, description="GPUs of each worker; null = one where the cluster has any")
    max_retries: int = Field(3, ge=0, description="how often a part that is lost with its worker is done again")

    def on_a_node(self, cores: int) -> int:
        """The most workers that a node of so many cores has, and that share its memory."""
        fit = max(1, int(cores / self.num_cpus))
        return min(fit, self.num_workers or fit)


class SamplingSettings(Settings):
    """How answers are drawn. Every field is passed explicitly, so a model's own generation_config never narrows it."""

    engine: str = Field(
        "transformers",
        description="what draws the samples: transformers (in process, CPU or GPU), vllm (a process of its own), openai (an endpoint) or "
        "cluster (any of these on the workers of a Ray cluster)",
    )
    num_generations: int = Field(16, ge=1, description="N: samples of pi_SFT for each dev and test prompt (the Best-of-N pool)")
    train_generations: int = Field(4, ge=1, description="samples of each policy for each train prompt, for the reward")
    initial_generations: int = Field(4, ge=1, description="samples of pi_0 for each dev and test prompt, for evaluation")
    max_new_tokens: int = Field(128, ge=1, description="limit of one answer, in tokens")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: the smallest set of tokens with this probability")
    top_k: int = Field(0, ge=0, description="only the k most likely tokens; 0 = all")
    stop: list[str] = Field(default_factory=list, description="strings that end an answer (removed from it)")
    batch_size: int = Field(512, ge=1, description="most answers drawn side by side; fewer where memory is short")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision; auto = bfloat16 where it is supported and faster")
    part_prompts: int = Field(64, ge=1, description="prompts in one stored part: the unit of resume")
    num_workers: int = Field(
        1,
        ge=1,
        description="processes of this machine that draw and score side by side, a part each at a time: one a GPU, or each with its share of "
        "the cores, which pays for small models",
    )
    max_cut_share: float = Field(0.5, ge=0, le=1, description="guard: error when more of pi_SFT's answers are cut at the limit")
    openai: OpenAISettings = Field(default_factory=OpenAISettings, description="engine=openai: where the models are")
    vllm: VLLMSettings = Field(default_factory=VLLMSettings, description="engine=vllm: its Python and its arguments")
    cluster: ClusterSettings = Field(default_factory=ClusterSettings, description="engine=cluster: which, and what draws there")

    @model_validator(mode="after")
    def _spread_once(self) -> "SamplingSettings":
        own = {"openai": "openai.max_concurrency", "cluster": "cluster.num_workers"}
        if self.num_workers > 1 and self.engine in own:
            raise ValueError(
                f"engine={self.engine} is spread in a way of its own: sampling.{own[self.engine]}, and leave out sampling.num_workers"
            )
        return self

    @property
    def spread(self) -> bool:
        """Whether parts are drawn and scored on a cluster."""
        return self.engine == "cluster"

    @property
    def several(self) -> bool:
        """Whether that happens in several processes, on a cluster or here."""
        return self.spread or self.num_workers > 1

    @property
    def here(self) -> "SamplingSettings":
        """The same law on one machine: what each worker of a cluster does, and what a pool says of itself wherever it was drawn."""
        return self.model_copy(update={"engine": self.cluster.engine}) if self.spread else self

    @property
    def by_weights(self) -> "SamplingSettings":
        """The same law by the engine that draws from any folder of weights, on the cluster where there is one."""
        if not self.spread:
            return self.model_copy(update={"engine": "transformers"})
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"engine": "transformers"})})

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the samples depend on: a longer timeout, a known price, a cluster or more processes draw nothing again."""
        engine = self.here.engine
        left_out: dict[str, Any] = {"openai": True, "vllm": True, "cluster": True, "num_workers": True}
        if engine == "openai":
            left_out |= {"openai": set(NO_MATTER), "dtype": True, "batch_size": True}
        elif engine == "vllm":
            left_out["vllm"] = {"python"}
        return self.here.model_dump(mode="json", exclude=left_out)


@dataclass(frozen=True)
class Request:
    """One prompt and the seed of each answer wanted; `limit` is the most tokens of each, where it is not the settings' own.

    `watch(i, text)`, where given, is told the text of answer i every few tokens while it is drawn, by engines that draw here.
    """

    prompt: Prompt
    seeds: tuple[int, ...]
    limit: int | None = None
    watch: Callable[[int, str], None] | None = None


@dataclass(frozen=True)
class Drawn:
    """A sample with what only a server tells of it: the tokens of its prompt, and the id and the log-probability (nats, temperature 1) of
    each drawn token, none where an endpoint drew them."""

    sample: Sample
    prompt_tokens: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class Drawing(Protocol):
    """Requests that are drawn together, each under a number of its own; others may join, and some be dropped, between two turns."""

    def add(self, requests: Mapping[int, Request]) -> None:
        """These begin as soon as there is room. Raises DataError, and adds none, for a prompt that is known to have no answer."""
        ...

    def drop(self, number: int) -> None:
        """Nobody waits for this request any more."""
        ...

    def turn(self) -> dict[int, list[Drawn]]:
        """Go on for a little while; the answers to each request that now has all of them, in order. What it raises ends all."""
        ...


class Engine(Protocol):
    """Draws samples for requests; the same request gives the same samples whatever else is asked for.

    `settled` is what the engine chose by looking at the machine: it is stored with every part and handed back on resume.
    `halvings` counts how often memory ran out in the last draw, so that its batches are not the settled ones. `usage` is what
    the last draw was billed for, `prompt_tokens`, `completion_tokens` and where prices are known `cost`; empty where nothing is.
    """

    name: str
    settled: dict[str, Any]
    halvings: int
    usage: dict[str, float]

    def draw(self, requests: Sequence[Request]) -> list[Sample]:
        """The samples of every request, in order, indices from 0."""
        ...

    def answers(self, requests: Sequence[Request]) -> list[Drawn]:
        """The same with their tokens."""
        ...

    def drawing(self) -> Drawing:
        """Requests to be drawn together, none yet."""
        ...

    def under(self, settings: SamplingSettings) -> "Engine":
        """The same policy, and the same weights in memory, under another law of drawing."""
        ...


class AtOnce:
    """The `Drawing` of an engine whose draw nothing can join: one turn draws all that was added."""

    def __init__(self, engine: Engine):
        self.engine, self.requests = engine, dict[int, Request]()

    def add(self, requests: Mapping[int, Request]) -> None:
        self.requests |= requests

    def drop(self, number: int) -> None:
        del self.requests[number]

    def turn(self) -> dict[int, list[Drawn]]:
        drawn = iter(self.engine.answers([*self.requests.values()]))
        found = {number: list(islice(drawn, len(request.seeds))) for number, request in self.requests.items()}
        self.requests.clear()
        return found


def check_engine(settings: SamplingSettings, policies: Sequence[str] = ()) -> None:
    """Raises ConfigError on an unknown engine, and where the endpoint's client, its address or the model for a policy is missing, the
    Python that has vLLM, or Ray; what the nodes of a cluster have is not looked at, but for what this machine says of it."""
    if settings.engine not in ENGINES:
        raise ConfigError(f"no engine {settings.engine!r}", where="sampling.engine", do=f"use {' or '.join(ENGINES)}")
    if settings.spread:
        if find_spec("ray") is None:
            raise ConfigError("ray is not installed", where="sampling.engine", do="pip install 'irlign[cluster]'")
        check_engine(settings.here, policies)
    if settings.engine == "openai":
        check_client()
        for policy in policies:
            settings.openai.address(settings.openai.served(policy).base_url, "sampling.openai")
    if settings.engine == "vllm":
        from irlign.sampling.vllm_engine import vllm_python

        vllm_python(settings)


def load_engine(
    policy: Path, settings: SamplingSettings, chat_template: str, settled: Mapping[str, Any] | None = None, drawn: Path | None = None
) -> Engine:
    """The engine named in the settings, for the policy in a folder (whose name is the policy's), or what a worker of the cluster has in
    its place; `settled` as an earlier part recorded it. An engine whose answers cost money keeps each in the file `drawn` until its part is stored.

    Raises ConfigError on an unknown name.
    """
    settings = settings.here
    check_engine(settings)
    if settings.engine == "openai":
        from irlign.sampling.openai_engine import served_policy

        return served_policy(policy, settings, chat_template, settled, drawn)
    if settings.engine == "vllm":
        from irlign.sampling.vllm_engine import VLLMEngine

        return VLLMEngine(policy, settings, chat_template, settled)
    from irlign.sampling.transformers_engine import TransformersEngine

    return TransformersEngine(policy, settings, chat_template, settled)
