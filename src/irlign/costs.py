"""What the work costs: operations, seconds and bytes as pure functions of counts, lengths and a model's shape.

A product of an activation with a weight is 2 operations, so a token forward is 2 for each parameter that multiplies, and 3
times that where gradients of weights and activations follow; attention adds `4 * layers * width` for each token attended to.
"""

from dataclasses import dataclass

# Shares of the speed of a plain matrix product (machine.matmul_flops) that whole stages reached, start and tokenization included.
# From the manifests of recipes/quickstart.yaml (seeds 0 to 4) and recipes/stories.yaml (babyllama-char, seeds 0 to 4), 0.4 and
# 0.9 million parameters, one thread of a CPU each, where the product ran at 138 GFLOPS (docs/scale.md). Nothing larger was fitted.
TRAINING, SAMPLING, SCORING = 0.40, 0.20, 0.45
OPTIMIZED = 16  # bytes of a trained parameter: float32 weight, gradient and AdamW's two moments
SAVED = (
    17 * 4
)  # bytes kept for the backward pass for each token, layer and unit of width (arXiv 2205.05198, section 4.1: 34 in half precision)
LOGITS = 3 * 4  # bytes of one logit: itself, its float32 copy or weight, its gradient or sum
PROCESS = 700 << 20  # bytes of a process with the libraries loaded (quickstart's stages hold 670 to 740 MiB with models of 1.6 MB)
POOL_TOKEN = 2  # bytes of a drawn token in a pool (0.87 MB for 453,000 tokens in the quickstart)
CANDIDATE_TOKEN = 3  # the same in candidates.parquet, scores included (0.38 MB for 141,000)
CANDIDATE = 1.2 * (1 << 10)  # bytes of a candidate that `bon` holds, of a few words (benchmarks/flat_memory.py: 107 MiB for 90,000 more)


@dataclass(frozen=True)
class Shape:
    """A decoder as numbers. `looked_up` of the parameters never multiply (an input embedding of its own), `head` are the output
    layer's; `attention` and `kept` are the widths of all queries and of all keys of a layer; `size` is bytes of a stored weight; `laid_out`
    of the parameters are in memory twice while answers are drawn or scored (packed.py)."""

    parameters: int
    looked_up: int
    head: int
    layers: int
    hidden: int
    attention: int
    kept: int
    vocabulary: int
    size: int = 4
    laid_out: int = 0

    def forward(self, tokens: float, seen: float, head: bool = True) -> float:
        """Operations of so many tokens that attend to `seen` tokens each on average, with the output layer or without."""
        weights = self.parameters - self.looked_up - (0 if head else self.head)
        return tokens * (2 * weights + 4 * self.layers * self.attention * seen)

    def read(self, texts: float, length: float, head: bool = True) -> float:
        """Operations of reading whole texts of this length: a token sees half of its text on average."""
        return self.forward(texts * length, length / 2, head)

    def trained(self, texts: float, length: float, head: bool = True, adapter: bool = False) -> float:
        """Operations of training on whole texts: three times reading them, or twice with an adapter, whose frozen weights need no
        gradient (the adapter's own are left out)."""
        return (2 if adapter else 3) * self.read(texts, length, head)

    def drawn(self, prompts: float, answers: float, prompt: float, answer: float) -> float:
        """Operations of sampling: each prompt read once, each drawn token after its prompt and half of its answer."""
        return self.read(prompts, prompt) + self.forward(answers * answer, prompt + answer / 2)

    def cache(self, tokens: float, size: int) -> float:
        """Bytes of the keys and values of so many tokens."""
        return 2 * tokens * self.layers * self.kept * size

    def training_memory(self, rows: int, length: float, head: bool, adapter: bool) -> float:
        """Bytes while a batch of so many rows is trained on: weights and optimizer, what the backward pass needs, logits."""
        weights = self.parameters * (4 if adapter else OPTIMIZED)
        return weights + rows * length * (SAVED * self.layers * self.hidden + (LOGITS * self.vocabulary if head else 0))

    def sampling_memory(self, rows: int, length: float, size: int, reserved: float | None = None) -> float:
        """Bytes while so many answers are drawn side by side: weights, keys and values (or what is `reserved` for them), one step's logits."""
        kept = self.cache(rows * length, size) if reserved is None else reserved
        return (self.parameters + self.laid_out) * size + kept + rows * LOGITS * self.vocabulary

    def scoring_memory(self, tokens: int, head: bool) -> float:
        """Bytes while a batch of so many tokens is read in float32."""
        return (self.parameters + self.laid_out) * 4 + tokens * 4 * (8 * self.hidden + (2 * self.vocabulary if head else 0))


@dataclass(frozen=True)
class Speed:
    """Operations a second of a plain matrix product in float32 and in what pays for this model (bfloat16, or float32 again)."""

    full: float
    half: float


def steps(rows: float, batch: int, epochs: float, most: int = -1) -> float:
    """Optimizer steps over the rows; `most` caps them where it is above 0."""
    whole = rows / batch * epochs
    return min(whole, most) if most > 0 else whole


def pairs(better: float, worse: float) -> float:
    """Pairs of one prompt: the shorter side is repeated; none where a side is empty."""
    return max(better, worse) if better and worse else 0.0


def member_share(members: int) -> float:
    """How often each pair is trained on in an ensemble whose member k skips every K-th pair."""
    return 1.0 if members == 1 else members - 1.0


def llama(vocabulary: int, hidden: int, layers: int, heads: int, intermediate: int) -> Shape:
    """The shape of a small Llama with tied embeddings, as a world's pi_0 is: four square attention layers, three feed-forward."""
    layer = 4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden
    table, width = vocabulary * hidden, hidden // heads * heads
    return Shape(table + layers * layer + hidden, 0, table, layers, hidden, width, width, vocabulary)
