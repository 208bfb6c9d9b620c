"""Adaptive LoRA merging with parameter pruning (arXiv 2505.24174).

dW = (sum_i s_i B_i)(sum_i A_i) in every module, with the factors of all adapters trained. After
every optimizer step the entries that matter least are pruned, tensor by tensor; they may grow
again, and are judged anew after the next step.

What an entry counts by, for a module with inputs x and an adapter i:

- `input`: |dS / dentry| of S = sum_pq |s_i B_i A_i|_pq n_q, with n_q the 2-norm of x_q over all
  tokens of the training rows. With M = sign(B A) * n that is |B^T M| for A and |M A^T| for B.
- `grad`: I = |entry * gradient|, smoothed as in AdaLoRA (arXiv 2303.10512): Ibar, and U, the
  smoothed |I - Ibar|; an entry counts by Ibar * U.

At level `module` an adapter counts in a module by the mean over the entries of its A and B. These
means are compared across modules as they are, as with the paper's one threshold for all; with
`input`, modules with large inputs are therefore kept longer.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from recycle_cli.engine.adapted import Forward
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.forward import Batch, by_length, collate
from recycle_cli.engine.products import trained_product
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate, row_blocks
from recycle_cli.tuning.factor_sum import stack
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.tuned import Ingredients, Share, Tuned

SMOOTHING = 0.85
ROWS_A_PASS = 16


class MergePrune(Tuned):
    """The factors of all adapters.

    Attributes:
        lora_A: (count, rank, in) float32 by module, of the adapters that have it, filled up with
            zeros to one rank; those zeros are never trained.
        lora_B: (count, out, rank), likewise, with the adapters' scales in it.
    """

    def __init__(
        self, ingredients: Ingredients, *, prune: float, score: str, level: str, restore: str
    ) -> None:
        super().__init__()
        self.prune, self.score, self.level, self.restore = prune, score, level, restore
        self.adapters = len(ingredients.updates)
        self.source = stack(ingredients.updates, ingredients.device)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for path, piece in self.source.items():
            self.lora_A[parameter_name(path)] = nn.Parameter(piece.A.clone())
            self.lora_B[parameter_name(path)] = nn.Parameter(piece.B.clone())
            name = parameter_name(path)
            self.register_buffer(f"norms_{name}", piece.A.new_ones(piece.A.shape[2]))
            if score == "grad":
                for kind, factor in (("A", piece.A), ("B", piece.B)):
                    self.register_buffer(f"mean_{kind}_{name}", torch.zeros_like(factor))
                    self.register_buffer(f"spread_{kind}_{name}", torch.zeros_like(factor))

    def forwards(self, base: BaseModel, tokens: float) -> Mapping[str, Forward]:
        """See `Tuned`."""
        return {path: self._forward(path) for path in self.source}

    def _forward(self, path: str) -> Forward:
        def forward(module: nn.Linear, x: Tensor) -> Tensor:
            a, b = self._sums(path)
            return trained_product(a, b)(module, x)

        return forward

    def _sums(self, path: str) -> tuple[Tensor, Tensor]:
        """sum_i A_i (rank, in) and sum_i s_i B_i (out, rank)."""
        own_a, own_b = self.source[path].own
        a, b = self._factors(path)
        return (a * own_a).sum(0), (b * own_b).sum(0)

    def _factors(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        name = parameter_name(path)
        return self.lora_A[name], self.lora_B[name]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """See `Tuned`."""
        return {path: piece.shape for path, piece in self.source.items()}

    def result(self) -> ModelUpdate:
        """See `Tuned`."""
        with torch.no_grad():
            sums = {path: self._sums(path) for path in self.source}
        return {path: LowRankUpdate(a.cpu(), b.cpu(), 1.0) for path, (a, b) in sums.items()}

    def shares(self) -> list[Share]:
        """For each adapter the share of its entries that are not zero, over all modules and in the
        module where it is largest."""
        kept: list[list[tuple[int, int]]] = [[] for _ in range(self.adapters)]
        for path, piece in self.source.items():
            for at, owner in enumerate(piece.owners.tolist()):
                tensors = self._own(path, at)
                nonzero = sum(int(tensor.count_nonzero()) for tensor in tensors)
                kept[owner].append((nonzero, sum(tensor.numel() for tensor in tensors)))
        return [
            Share(sum(n for n, _ in row) / sum(of for _, of in row), max(n / of for n, of in row))
            for row in kept
        ]

    def held(self) -> list[Tensor]:
        """See `Tuned`."""
        return [*super().held(), *(t for s in self.source.values() for t in (s.A, s.B))]

    @torch.no_grad()
    def prepare(self, base: BaseModel, examples: Sequence[Example]) -> None:
        """Takes the norms of the modules' inputs over all tokens of the training rows."""
        if self.score != "input":
            return
        squares = {path: torch.zeros_like(self._norms(path)) for path in self.source}
        lengths = [len(example.prompt) + len(example.answer) for example in examples]
        for group in by_length(lengths, ROWS_A_PASS):
            # Whole rows, so that a beginning that they share counts once a row.
            batch = collate(base, [examples[index] for index in group], shared=0)
            _add_squares(base, batch, squares)
        for path, total in squares.items():
            self._norms(path).copy_(total.sqrt())

    @torch.no_grad()
    def after_step(self) -> None:
        """Scores all entries and prunes the lowest."""
        if self.prune == 0:
            return
        if self.level == "module":
            self._prune_modules()
        else:
            for path in self.source:
                self._prune_entries(path)

    def _scores(self, path: str) -> tuple[Tensor, Tensor]:
        """What the entries of A (count, rank, in) and of B (count, out, rank) count by."""
        if self.score == "grad":
            return self._smoothed(path, "A"), self._smoothed(path, "B")
        a, b = self._factors(path)
        pairs = [importance(one, other, self._norms(path)) for one, other in zip(a, b, strict=True)]
        return torch.stack([of_a for of_a, _ in pairs]), torch.stack([of_b for _, of_b in pairs])

    def _smoothed(self, path: str, kind: str) -> Tensor:
        name = parameter_name(path)
        factor = (self.lora_A if kind == "A" else self.lora_B)[name]
        mean: Tensor = self.get_buffer(f"mean_{kind}_{name}")
        spread: Tensor = self.get_buffer(f"spread_{kind}_{name}")
        assert factor.grad is not None
        now = (factor * factor.grad).abs()
        mean.lerp_(now, 1 - SMOOTHING)
        spread.lerp_((now - mean).abs(), 1 - SMOOTHING)
        return mean * spread

    def _prune_entries(self, path: str) -> None:
        piece, scores = self.source[path], self._scores(path)
        for at in range(len(piece.ranks)):
            of_entries = piece.own_part(at, scores)
            for tensor, source, score in zip(
                self._own(path, at), piece.one(at), of_entries, strict=True
            ):
                count = max(1, math.floor(self.prune * tensor.numel()))
                self._put_back(tensor, source, _lowest(score, count))

    def _prune_modules(self) -> None:
        means = {}
        for path, piece in self.source.items():
            scores = self._scores(path)
            for at in range(len(piece.ranks)):
                means[path, at] = _mean(piece.own_part(at, scores))
        lowest = sorted(means, key=lambda pair: means[pair])
        for path, at in lowest[: math.floor(self.prune * len(lowest))]:
            for tensor, source in zip(self._own(path, at), self.source[path].one(at), strict=True):
                self._put_back(tensor, source, torch.ones_like(tensor, dtype=torch.bool))

    def _put_back(self, tensor: Tensor, source: Tensor, where: Tensor) -> None:
        before = source if self.restore == "init" else torch.zeros_like(source)
        tensor.copy_(torch.where(where, before, tensor))

    def _own(self, path: str, at: int) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of an adapter, as views, without what fills them up."""
        a, b = self._factors(path)
        return self.source[path].own_part(at, (a.detach(), b.detach()))

    def _norms(self, path: str) -> Tensor:
        return self.get_buffer(f"norms_{parameter_name(path)}")


def importance(a: Tensor, b: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """|dS/dA| and |dS/dB| of S = sum_pq |B A|_pq norms_q.

    It takes 6 * out * in * rank operations. On a processor the signs of B A are made block by block
    of rows, in its cache; an accelerator, which such blocks would leave idle, takes all at once,
    (out, in).

    Args:
        a: (rank, in).
        b: (out, rank).
        norms: (in,), at least 0.

    Returns:
        Tensors of the shapes of a and b.
    """
    shape = b.shape[0], a.shape[1]
    weighted = (a * norms).T
    of_a, of_b = torch.zeros_like(a), torch.empty_like(b)
    for rows in row_blocks(shape) if a.device.type == "cpu" else [slice(None)]:
        signs = (b[rows] @ a).sign_()
        of_a.addmm_(b[rows].T, signs)
        of_b[rows] = signs @ weighted
    return of_a.mul_(norms).abs_(), of_b.abs_()


def _add_squares(base: BaseModel, batch: Batch, squares: Mapping[str, Tensor]) -> None:
    """Adds the squares of each module's inputs over the tokens of a batch, padding left out."""
    there = batch.attention.bool().flatten()

    def add(total: Tensor, inputs: Tensor) -> None:
        # Some models hand the tokens of all rows to a module as one row.
        total.add_(inputs.reshape(len(there), -1)[there].float().square().sum(0))

    head = base.model.get_output_embeddings()
    with ExitStack() as hooks:
        for path, total in squares.items():

            def hook(_module: nn.Module, inputs: tuple[Tensor], total: Tensor = total) -> None:
                add(total, inputs[0])

            module = base.model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        hidden = base.model.base_model(
            batch.tokens, attention_mask=batch.attention, use_cache=False
        ).last_hidden_state
    for path, total in squares.items():
        # The backbone does not run the head, and its logits are not needed.
        if base.model.get_submodule(path) is head:
            add(total, hidden)


def _lowest(score: Tensor, count: int) -> Tensor:
    """Which entries are the `count` lowest: bool, of the shape of the scores."""
    indices = score.flatten().topk(count, largest=False, sorted=False).indices
    where = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    where[indices] = True
    return where.view(score.shape)


def _mean(tensors: tuple[Tensor, Tensor]) -> float:
    return sum(float(t.sum()) for t in tensors) / sum(t.numel() for t in tensors)
