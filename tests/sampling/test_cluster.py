"""A Ray cluster of two nodes on this machine: the bytes of the single process, whatever is killed; scores as of one machine; errors in one line."""

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from shards import WORDS, to_score
from tiny import make_tiny_policy

from irlign.errors import ConfigError, DataError, RunError
from irlign.records import Prompt
from irlign.sampling import cluster as cluster_module
from irlign.sampling import pools
from irlign.sampling.cluster import spread
from irlign.sampling.engine import SamplingSettings, check_engine
from irlign.sampling.pools import draw_pool

WANTED = [(Prompt.of(f"{a} {b}", "train"), 3) for a in WORDS for b in WORDS[:4]]  # 40 prompts, 10 parts


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of one core each, irlign and these tests in reach of both."""
    pytest.importorskip("ray")
    reach = os.pathsep.join([*map(str, Path(__file__).parents[:2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", PYTHONPATH=reach)
    import ray
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    ray.init(address=found.address, log_to_driver=False, configure_logging=False)
    yield found
    ray.shutdown()
    found.shutdown()


def _draw(policy, folder, engine, **changes):
    values = {"part_prompts": 4, "max_new_tokens": 8, "batch_size": 4, "engine": engine, **changes}
    return draw_pool(policy, WANTED, SamplingSettings(**values), chat_template="none", folder=folder, seed=7, name="sft")


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def _workers():
    """The processes of workers that Ray runs here, oldest first."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cmdline").read_bytes().startswith(b"ray::Worker"):
                found.append(int(place.name))
        except OSError:
            continue
    return sorted(found)


@pytest.mark.cluster
def test_two_nodes_give_the_bytes_of_one_process_whatever_is_killed(nodes, tmp_path, monkeypatch):
    """A worker is killed after the first part, and a whole node after the fifth; a later run finds everything done."""
    policy = make_tiny_policy(tmp_path / "sft", seed=3)
    whole = _draw(policy, tmp_path / "whole", "transformers")
    said, written = [], []
    monkeypatch.setattr(cluster_module, "say", said.append)
    real = pools.write_table

    def write(path, rows):
        real(path, rows)
        written.append(path.name)
        if len(written) == 2:
            os.kill(_workers()[0], signal.SIGKILL)
        if len(written) == 5:
            nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)

    with monkeypatch.context() as patch:
        patch.setattr(pools, "write_table", write)
        assert _draw(policy, tmp_path / "spread", "cluster") == whole
    assert sorted(written) == [f"part-{n:05d}.parquet" for n in range(10)]
    assert _bytes(tmp_path / "spread") == _bytes(tmp_path / "whole")
    assert said and all("another takes over" in line for line in said)
    nodes.add_node(num_cpus=1)

    kept = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "spread").glob("*"))[:9]}
    (tmp_path / "spread/part-00009.parquet").unlink()
    assert _draw(policy, tmp_path / "spread", "cluster") == whole
    assert _bytes(tmp_path / "spread") == _bytes(tmp_path / "whole") and all(p.stat().st_mtime_ns == when for p, when in kept.items())
    assert _draw(tmp_path / "nothing", tmp_path / "spread", "cluster") == whole  # no worker is asked


@pytest.mark.cluster
def test_scores_are_those_of_one_machine_to_the_last_digit(nodes, tmp_path, monkeypatch):
    from irlign.data import batches
    from irlign.optimise.scoring import scores_of

    rewards, prompts, answers = to_score(tmp_path)
    monkeypatch.setattr(batches, "BLOCK", 30)
    here = scores_of(rewards, prompts, answers, SamplingSettings(), tmp_path / "none")
    there = scores_of(rewards, prompts, answers, SamplingSettings(engine="cluster"), tmp_path / "kept")
    assert all(np.array_equal(here[name], there[name]) for name in rewards) and set(there) == set(rewards)
    assert len(list((tmp_path / "kept").iterdir())) == 4  # 100 answers, 30 a block
    (tmp_path / "kept/part-00002.parquet").unlink()
    again = scores_of(rewards, prompts, answers, SamplingSettings(engine="cluster"), tmp_path / "kept")
    assert all(np.array_equal(here[name], again[name]) for name in rewards)


def _failing(kind, told):
    def work(shard):
        if shard == 3:
            raise DataError("no good", where="prompt 3", do="leave it out") if kind == "own" else ValueError("a bug")
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * shard, told

    return work, told or os.getpid()


@pytest.mark.cluster
def test_what_the_first_worker_tells_reaches_the_others_and_errors_are_one_line(nodes, monkeypatch):
    monkeypatch.setattr(cluster_module, "say", lambda line: None)
    settings = SamplingSettings(engine="cluster", cluster={"max_retries": 1}).cluster
    found = dict(spread(settings, partial(_failing, "own"), {n: 10 + n for n in range(6)}, "test"))
    assert sorted(found) == list(range(6)) and all(found[n][0] == 20 + 2 * n for n in found)
    assert len({told for _, told in found.values()} - {None}) <= 1
    with pytest.raises(DataError, match="prompt 3: no good") as error:
        list(spread(settings, partial(_failing, "own"), {0: 3}, "test"))
    assert error.value.do == "leave it out"
    with pytest.raises(RunError, match="lost in shard 0 2 times: a bug"):
        list(spread(settings, partial(_failing, "bug"), {0: 3}, "test"))
    with pytest.raises(RunError, match="lost in shard 0 2 times"):
        list(spread(settings, partial(_failing, "dies"), {0: 1}, "test"))


def test_a_cluster_is_no_part_of_what_samples_depend_on():
    alone = SamplingSettings(part_prompts=8)
    there = SamplingSettings(part_prompts=8, engine="cluster", cluster={"address": "auto", "num_workers": 3})
    assert there.identity == alone.identity and there.here.engine == "transformers" and there.by_weights.spread
    served = SamplingSettings(engine="cluster", cluster={"engine": "openai"})
    assert served.identity == SamplingSettings(engine="openai").identity != alone.identity
    assert served.by_weights.here.engine == "transformers" and SamplingSettings(engine="vllm").by_weights.engine == "transformers"


def test_a_missing_ray_is_found_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr("irlign.sampling.engine.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="ray is not installed") as error:
        check_engine(SamplingSettings(engine="cluster"))
    assert "irlign[cluster]" in error.value.do
    check_engine(SamplingSettings())


def test_no_usage_is_reported():
    from irlign.progress import QUIET

    assert QUIET["RAY_USAGE_STATS_ENABLED"] == "0"
